"""The text of the embedded model: the running interpreter's own standard library.

Every machine that installs the project holds it, so the default run downloads nothing. The modules fall into three
parts that share no file:

| part        | modules                                          | what it is for                       |
|-------------|--------------------------------------------------|--------------------------------------|
| calibration | the first 120 training modules, shuffled, seed 0 | collecting the statistics of a layer |
| validation  | the training modules after those 120             | choosing defaults                    |
| evaluation  | the held-out modules, in sorted order            | the perplexity that is reported      |

The embedded model was trained on the first two parts and never saw the third.
"""

from __future__ import annotations

import os
import random
import sysconfig
from pathlib import Path

from ...errors import InputError

# Standard-library modules kept out of training. Perplexity is measured on them.
HELD_OUT = frozenset(
    {
        "argparse.py",
        "asyncio",
        "calendar.py",
        "csv.py",
        "dataclasses.py",
        "difflib.py",
        "email",
        "fractions.py",
        "http",
        "ipaddress.py",
        "json",
        "logging",
        "statistics.py",
        "tarfile.py",
        "textwrap.py",
        "typing.py",
        "urllib",
        "wsgiref",
        "zipfile.py",
        "zipfile",
    }
)
# Folders that hold no library text: other people's packages, caches, tests, and generated topics.
SKIP = frozenset(
    {
        "site-packages",
        "__pycache__",
        "idlelib",
        "lib2to3",
        "test",
        "tests",
        "testing",
        "turtledemo",
        "pydoc_data",
    }
)
CALIBRATION_MODULES = 120


def stdlib_files(held_out: bool) -> list[Path]:
    """List the modules of the standard library, sorted by path: the held-out ones, or the training ones.

    Raises:
        InputError: this interpreter's standard library has no ``.py`` files on disk (it is zipped or stripped).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIP]  # most files of the library are its tests
        first = Path(folder).relative_to(root).parts[:1]
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and ((*first, name)[0] in HELD_OUT) == held_out
        ]
    if not files:
        raise InputError(
            f"The dataset 'stdlib' is empty: this Python has no standard-library .py files in {root} (it may be zipped "
            "or stripped); run with an ordinary CPython, or give a local text file as the dataset."
        )
    return sorted(files)


def read(path: Path) -> str:
    """Read one module's source; bytes that are not UTF-8 are dropped, as they were for training."""
    return path.read_text(encoding="utf-8", errors="ignore")


def calibration_texts() -> list[str]:
    """Return the sources of the calibration part, one string per module.

    Raises:
        InputError: see `stdlib_files`.
    """
    return [read(path) for path in _shuffled_training_files()[:CALIBRATION_MODULES]]


def validation_texts() -> list[str]:
    """Return the sources of the validation part, one string per module.

    Raises:
        InputError: see `stdlib_files`.
    """
    return [read(path) for path in _shuffled_training_files()[CALIBRATION_MODULES:]]


def evaluation_texts() -> list[str]:
    """Return the sources of the evaluation part, one string per module, held out from training.

    Raises:
        InputError: see `stdlib_files`.
    """
    return [read(path) for path in stdlib_files(held_out=True)]


def _shuffled_training_files() -> list[Path]:
    files = stdlib_files(held_out=False)
    random.Random(0).shuffle(files)
    return files
