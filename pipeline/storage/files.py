"""Reading the files of a run folder without torch: for the commands that only show a run."""

from __future__ import annotations

import difflib
import json
import struct
from pathlib import Path
from typing import Any

from ...errors import InputError


def absence(folder: Path, name: str) -> str:
    """Why a folder has no file `name`: 'it has no report.json', or 'it does not exist, while runs holds first'."""
    if folder.exists():
        return f"it has no {name}"
    near = difflib.get_close_matches(folder.name, runs_in(folder.parent), n=3, cutoff=0)
    beside = f", while {folder.parent} holds {', '.join(near)}" if near else ""
    return f"it does not exist{beside}"


def runs_in(folder: Path) -> list[str]:
    """The names of the runs in a folder; none where there is no such folder."""
    return sorted(manifest.parent.name for manifest in folder.glob("*/manifest.json"))


def read_json(run: Path, name: str) -> dict[str, Any]:
    """A file of a run folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = run / name
    if not path.is_file():
        raise InputError(f"{run} is no folder of a run: {absence(run, name)}.")
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
