"""What an export says of itself, export.json: its format, the run it was made from, the checksums of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path

from ..errors import InputError
from .writing import write_json

RECORD, RECORD_VERSION = "export.json", 1
_FREE = {RECORD, "README.md", ".gitattributes"}  # may be edited


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Record:
    """The content of export.json.

    Attributes:
        format: what the export was asked for as.
        run: the way from the export's folder to the run's.
        blocks: checksum of the checksums of the run's blocks: which run it was.
        files: SHA-256 of each file.
    """

    format: str
    run: str
    blocks: str
    files: dict[str, str] = field(default_factory=dict)
    record_version: int = RECORD_VERSION
    rotoboa: str = ""


def digest(checksums: Sequence[str]) -> str:
    """One checksum for those of a run's blocks."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def write_record(folder: Path, format_name: str, run: Path, final: Path, blocks: str) -> None:
    """Write export.json into `folder`, which will be at `final`, of the run in `run`."""
    files = {file.name: checksum(file) for file in sorted(folder.iterdir()) if file.name not in _FREE}
    way = Path(os.path.relpath(run.resolve(), final.resolve())).as_posix()
    record = Record(format_name, way, blocks, files, rotoboa=version("rotoboa"))
    write_json(folder / RECORD, asdict(record))


def read_record(folder: Path) -> Record:
    """Read export.json.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    path = folder / RECORD
    if not folder.exists():
        raise InputError(f"there is no folder {folder}: check the path, or write an export with `rotoboa export`.")
    if not path.is_file():
        raise InputError(f"{folder} is no export: it has no {RECORD}; write one with `rotoboa export`.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = data["record_version"]
        if found == RECORD_VERSION:
            record = Record(**data)
            kinds = {f.name: dict if f.name == "files" else str for f in fields(record) if f.name != "record_version"}
            if wrong := [name for name, kind in kinds.items() if not isinstance(getattr(record, name), kind)]:
                raise ValueError(f"{wrong[0]} is {getattr(record, wrong[0])!r}")
            return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{path} is damaged ({what}): export the run again.") from error
    raise InputError(
        f"{path} has version {found}, and this installation reads {RECORD_VERSION}: install the release that wrote it, "
        "or export the run again."
    )


def check_files(folder: Path, record: Record) -> None:
    """Compare every file of an export with what was written.

    Raises:
        InputError: one is missing, cut off or edited.
    """
    for name, expected in record.files.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}, which was exported: copy or export it again.")
        if checksum(folder / name) != expected:
            raise InputError(
                f"{folder / name} is not the file that was exported (its checksum differs): copy or export it again."
            )
