"""Reading the files of a run folder without torch: for the commands that only show a run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ..errors import InputError


def read_json(run: Path, name: str) -> dict[str, Any]:
    """A file of a run folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = run / name
    if not path.is_file():
        raise InputError(f"{run} is no folder of a run: it has no {name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read: it holds no JSON object.")
    return content


def read_report(run: Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if (run / "manifest.json").is_file() and not (run / "report.json").is_file():
        raise InputError(f"{run} is not finished: run `rotoboa quantize` with the same recipe and output first.")
    return read_json(run, "report.json")


def tensor_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, from its header alone.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return {name: int(end) - int(start) for name, (start, end) in spans.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise InputError(f"{path} is missing or damaged: run the recipe again.") from error
