"""Texts of local files: anything that is text, JSON by lines or as a list, and by `datasets` tables and folders."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...errors import InputError

COLUMN = "text"
POSSIBLE = (
    "'stdlib', 'wikitext2', 'c4', or the path of a text file, of a .jsonl, .json, .csv or .parquet file with a field "
    f"'{COLUMN}', or of a folder of these; several with commas"
)
JSON_SUFFIXES = (".jsonl", ".json")
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")  # which `datasets` reads through
SAVED = ("state.json", "dataset_dict.json")  # of `save_to_disk`
# Which split of a folder serves; the first that is there, else any.
SPLITS = {
    "calibration": ("train", "validation", "test"),
    "validation": ("validation", "test", "train"),
    "evaluation": ("test", "validation", "train"),
}


def read_texts(name: str, split: str) -> list[str]:
    """The texts of a file, which serves every split, or of a folder, whose files may be named by splits.

    Raises:
        InputError: it is not there, cannot be read, or holds no text.
    """
    path = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if name and path.is_dir():
        return _texts_of_folder(path, name, split)
    if not path.is_file():
        if path.suffix or name.startswith((os.sep, ".", "~")):
            raise InputError(f"Dataset file '{name}' does not exist; check the path, or use {POSSIBLE}.")
        raise InputError(f"Dataset '{name}' is unknown, and there is no such file or folder; use {POSSIBLE}.")
    suffix = path.suffix.lower()
    if suffix in PACKED_SUFFIXES:
        builder = BUILDERS.get(Path(path.stem).suffix.lower(), "text")
        return _table(name, builder, data_files={"all": glob.escape(str(path))}, split="all", **_whole(builder))
    if suffix in BUILDERS and suffix not in JSON_SUFFIXES:
        options = {"sep": "\t"} if suffix == ".tsv" else {}
        return _table(name, BUILDERS[suffix], data_files={"all": glob.escape(str(path))}, split="all", **options)
    content = _decoded(path, name)
    return _texts_of_json(content, name) if suffix in JSON_SUFFIXES else [content]


def _whole(builder: str) -> dict[str, str]:
    """A file of plain text is one text."""
    return {"sample_by": "document"} if builder == "text" else {}


def _decoded(path: Path, name: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"Dataset file '{name}' cannot be read ({error.strerror}); check the file.") from error
    try:
        content = raw.decode("utf-8-sig")  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"Dataset file '{name}' is text in UTF-16; convert it to UTF-8, as iconv does.") from error
        if b"\0" not in raw:
            raise InputError(
                f"Dataset file '{name}' cannot be read as UTF-8 text (byte 0x{raw[error.start]:02x} at {error.start}); "
                "convert it from its own encoding, as `iconv -f latin1 -t utf-8` does."
            ) from error
        content = "\0"
    if "\0" in content:
        raise InputError(f"Dataset file '{name}' is binary, no text; use {POSSIBLE}.")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _texts_of_json(content: str, name: str) -> list[str]:
    """Of one object a line, or of one list of objects."""
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except json.JSONDecodeError:
            rows = None  # the message on lines says where it is malformed
        if rows is not None:
            return [_text_of(row, f"entry {number} of '{name}'") for number, row in enumerate(rows, start=1)]
    # Not splitlines: it would also break at U+2028 and the like, which JSON allows inside a string.
    lines = enumerate(content.split("\n"), start=1)
    return [_text_of_line(line, f"line {number} of '{name}'") for number, line in lines if line.strip()]


def _text_of_line(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f'Malformed JSON in {place} ({error.msg}); write one object {{"text": ...}} per line.'
        ) from error
    return _text_of(row, place)


def _text_of(row: Any, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(COLUMN), str):
        raise InputError(f"No field 'text' with a string in {place}; write one object {{\"text\": ...}} per line.")
    text: str = row[COLUMN]
    return text


def _texts_of_folder(path: Path, name: str, split: str) -> list[str]:
    """Of the split that serves; files that are no tables are one text each."""
    hidden = (".", "__")  # which `datasets` leaves out too
    files = [
        f for f in path.rglob("*") if f.is_file() and not any(p.startswith(hidden) for p in f.relative_to(path).parts)
    ]
    if any((path / saved).is_file() for saved in SAVED):
        import datasets

        with _reading(name):
            found = datasets.load_from_disk(str(path))
            return _column(_part(found, split), name)
    if any(BUILDERS.keys() & {suffix.lower() for suffix in file.suffixes} for file in files):
        return _table(name, str(path), wanted=split)
    for file in files:
        _decoded(file, str(file))  # which says what is no text, and where
    return _table(name, "text", wanted=split, data_dir=str(path), sample_by="document", encoding="utf-8-sig")


def _table(name: str, builder: str, wanted: str = "", **options: Any) -> list[str]:
    """The column of a table that `datasets` reads; nothing is left in its cache."""
    # Imported here: it takes seconds, and most runs need it not.
    import datasets

    with _reading(name), TemporaryDirectory() as cache:  # it locks files there, even where it keeps none
        return _column(_part(datasets.load_dataset(builder, streaming=True, cache_dir=cache, **options), wanted), name)


def _part(found: Any, split: str) -> Iterable[Mapping[str, Any]]:
    """The split of a folder that serves, or the table itself."""
    if not isinstance(found, Mapping):
        return found
    name = next((name for name in SPLITS[split] if name in found), next(iter(found)))
    return found[name]


def _column(rows: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    texts = []
    for number, row in enumerate(rows, start=1):
        if COLUMN not in row:
            raise InputError(f"'{name}' has no column '{COLUMN}' (it has {', '.join(row)}); name one so.")
        if row[COLUMN] is not None:  # as tables have what is missing
            texts.append(_text_of(row, f"row {number} of '{name}'"))
    return texts


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Say in one sentence why `datasets` cannot read `name`; its own word on that goes nowhere."""
    import datasets

    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        what = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(f"Dataset '{name}' cannot be read ({what}); check it, or use {POSSIBLE}.") from error
    finally:
        logger.setLevel(level)
