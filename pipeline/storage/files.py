"""Reading the files of a run folder without torch: for the commands that only show a run."""

from __future__ import annotations

import difflib
import json
import struct
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ...errors import InputError
from ...eval.results import Stored
from .manifest import MANIFEST_VERSION, Manifest
from .run_report import REPORT_VERSION, Report

MANIFEST, REPORT = "manifest.json", "report.json"
_File = TypeVar("_File", bound=Stored)


def absence(folder: Path, name: str) -> str:
    """Why a folder has no file `name`: 'it has no report.json', or 'it does not exist, while runs holds first'."""
    if folder.exists():
        return f"it has no {name}"
    near = difflib.get_close_matches(folder.name, runs_in(folder.parent), n=3, cutoff=0)
    beside = f", while {folder.parent} holds {', '.join(near)}" if near else ""
    return f"it does not exist{beside}"


def runs_in(folder: Path) -> list[str]:
    """The names of the runs in a folder; none where there is no such folder."""
    return sorted(manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST}"))


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


def read_manifest(run: Path) -> Manifest:
    """The manifest of a run folder.

    Raises:
        InputError: there is none, it is damaged, or of a later release.
    """
    return parsed(Manifest, read_json(run, MANIFEST), run / MANIFEST, MANIFEST_VERSION)


def read_report(run: Path) -> Report:
    """The report of a finished run.

    Raises:
        InputError: there is none, it is damaged, or of a later release.
    """
    if (run / MANIFEST).is_file() and not (run / REPORT).is_file():
        raise InputError(f"{run} is not finished: run `rotoboa quantize` with the same recipe and output first.")
    return parsed(Report, read_json(run, REPORT), run / REPORT, REPORT_VERSION)


def parsed(kind: type[_File], content: dict[str, Any], path: Path, version: int) -> _File:
    """The content of a file, as facts of a kind. Files of releases that wrote no version are read too.

    Args:
        version: the latest that this release reads.

    Raises:
        InputError: it is of a later version, or something in it is not what it should be.
    """
    found = content.get("version", 0)
    if isinstance(found, int) and found > version:
        raise InputError(
            f"{path} has version {found}, and this release of rotoboa reads up to {version}: "
            "use the release that made the run, or a later one."
        )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InputError(
            f"{path} is not one that this release of rotoboa reads ({_first_of(error)}): "
            "use the release that made the run, or run it again."
        ) from error


def _first_of(error: ValidationError) -> str:
    """The first of the errors in words: 'blocks.0.index: field required'."""
    first = error.errors()[0]
    name, message = ".".join(map(str, first["loc"])), first["msg"].rstrip(".")
    return f"{name}: {message[:1].lower()}{message[1:]}"


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
