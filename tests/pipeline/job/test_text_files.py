"""Texts of local files and folders, and one sentence on each that holds none."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from rotoboa.errors import InputError
from rotoboa.pipeline.job.calibration import Split, load_texts

SPLITS: tuple[Split, ...] = ("calibration", "validation", "evaluation")
ROWS = datasets.Dataset.from_dict({"text": ["one\nstill", None, "two"], "id": [1, 2, 3]})


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing is left in a cache."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    yield
    assert list(cache.iterdir()) == []


def refusal(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        load_texts(str(path), "calibration")
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_text_file_serves_every_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Grüße\n\nzwei", encoding="utf-8")
    assert [load_texts(str(path), split) for split in SPLITS] == [["Grüße\n\nzwei"]] * 3


@pytest.mark.parametrize("name", ["wiki.test.raw", "a.md", "a.py", "README", "b.log", "x.tar.notes"])
def test_anything_that_is_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("words\r\nmore", encoding="utf-8", newline="")
    assert load_texts(str(tmp_path / name), "calibration") == ["words\nmore"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text('{"text": "one\u2028still one", "id": 1}\n\n{"text": "two"}\r\n', encoding="utf-8")
    assert load_texts(str(path), "calibration") == ["one\u2028still one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "Malformed JSON in line 3 of '.*'"),
        ('{"content": "x"}', "No field 'text' with a string in line 3 of"),
        ('{"text": 7}', "No field 'text' with a string in line 3 of"),
        ('["x"]', "No field 'text' with a string in line 3 of"),
    ],
)
def test_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_texts(str(path), "calibration")


@pytest.mark.parametrize(("name", "content"), [("a.TXT", "words"), ("a.JSONL", '{"text": "words"}')])
def test_capital_suffixes_and_byte_order_marks(name: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8-sig")
    assert load_texts(str(file), "calibration") == ["words"]


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "/nowhere.jsonl", "~/nowhere", "wiki.test.raw"])
def test_missing_file(name: str) -> None:
    with pytest.raises(InputError, match=r"does not exist; check the path, or use 'stdlib', 'wikitext2', 'c4'"):
        load_texts(name, "calibration")


@pytest.mark.parametrize("name", ["wikitext", "", "someone/dataset"])
def test_unknown_dataset(name: str) -> None:
    with pytest.raises(
        InputError,
        match="is unknown, and there is no such file or folder; use 'stdlib', 'wikitext2', 'c4', or the path of a",
    ):
        load_texts(name, "calibration")


def test_json_of_one_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two", "id": 3}], indent=2), encoding="utf-8")
    assert load_texts(str(path), "calibration") == ["one", "two"]
    path.write_text(json.dumps([{"text": "one"}, {"content": "two"}]), encoding="utf-8")
    assert "No field 'text' with a string in entry 2 of" in refusal(path)
    path.write_text('[{"text": "one"},', encoding="utf-8")
    assert "Malformed JSON in line 1 of" in refusal(path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda path: ROWS.to_csv(path),
    "a [1]*.csv": lambda path: ROWS.to_csv(path),
    "a.tsv": lambda path: ROWS.to_csv(path, sep="\t"),
    "a.PARQUET": lambda path: ROWS.to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    for split in SPLITS:
        assert load_texts(str(tmp_path / name), split) == ["one\nstill", "two"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt.gz", "one\n\ntwo\n"), ("a.jsonl.gz", '{"text": "one\\n\\ntwo\\n"}\n')]
)
def test_packed_files(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    assert load_texts(str(tmp_path / name), "calibration") == ["one\n\ntwo\n"]


def test_a_folder_of_texts_named_by_split(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        (tmp_path / f"wiki.{part}.raw").write_text(f"{part}\n\nends\n")
    (tmp_path / ".hidden").write_bytes(b"\0")
    found = [load_texts(str(tmp_path), split) for split in SPLITS]
    assert found == [[f"{part}\n\nends\n"] for part in ("train", "valid", "test")]


def test_a_folder_of_texts_is_the_same_for_every_split(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_text("a\n\na\n")
    (tmp_path / "sub" / "b.py").write_text("b\n")
    for split in SPLITS:
        assert sorted(load_texts(str(tmp_path), split)) == ["a\n\na\n", "b\n"]


def test_a_folder_of_tables(tmp_path: Path) -> None:
    for part in ("train", "test"):
        table = datasets.Dataset.from_dict({"text": [part]})
        table.to_parquet(tmp_path / f"{part}-00000-of-00001.parquet")
    assert [load_texts(str(tmp_path), split) for split in SPLITS] == [["train"], ["test"], ["test"]]


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    ROWS.save_to_disk(tmp_path / "one")
    assert load_texts(str(tmp_path / "one"), "evaluation") == ["one\nstill", "two"]
    datasets.DatasetDict(train=ROWS, validation=ROWS.select([2])).save_to_disk(tmp_path / "splits")
    found = [load_texts(str(tmp_path / "splits"), split) for split in SPLITS]
    assert found == [["one\nstill", "two"], ["two"], ["two"]]


def test_several_with_commas(tmp_path: Path) -> None:
    for name in ("a", "b", "with, comma"):
        (tmp_path / name).write_text(name)
    a, b = tmp_path / "a", tmp_path / "b"
    assert load_texts(f"{a}, {b},{a}", "calibration") == ["a", "b", "a"]
    assert load_texts(str(tmp_path / "with, comma"), "calibration") == ["with, comma"]
    assert f"Dataset file '{tmp_path}/c' does not exist" in refusal(f"{a},{tmp_path}/c")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("schön".encode("latin-1"), "cannot be read as UTF-8 text (byte 0xf6 at 3); convert it from its own encoding"),
        ("words".encode("utf-16"), "is text in UTF-16; convert it to UTF-8"),
        (b"\x7fELF\x00\x01\xff", "is binary, no text; use 'stdlib'"),
        (b"all\0ascii", "is binary, no text; use 'stdlib'"),
    ],
)
def test_what_is_no_text(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert "a.txt'" in refusal(tmp_path / "a.txt") and words in refusal(tmp_path / "a.txt")
    assert "a.txt'" in refusal(tmp_path) and words in refusal(tmp_path)  # and in a folder


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.txt.gz", "a.arrow"])
def test_damaged_tables(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(b'a,b\n"\xff')
    assert f"{name}' cannot be read (" in refusal(tmp_path / name)
    assert capfd.readouterr().err == "" and logging.getLogger("datasets").level != logging.CRITICAL


def test_tables_without_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,body\n1,words\n")
    assert "a.csv' has no column 'text' (it has id, body); name one so." in refusal(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("id,text\n1,7\n")
    assert "No field 'text' with a string in row 1 of" in refusal(tmp_path / "b.csv")


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty' cannot be read (" in refusal(tmp_path / "empty")
