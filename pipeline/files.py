"""Reading the JSON files of a run folder, without torch: for the commands that only show a run."""

from __future__ import annotations

import json
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
