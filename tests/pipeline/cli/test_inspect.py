"""`rotoboa inspect` as a user calls it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from typer.testing import CliRunner

from rotoboa.errors import InputError
from rotoboa.export.record import read_record
from rotoboa.pipeline.cli.app import app


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_tables_and_json(llama: Path) -> None:
    result = call(llama, "--recipe", "w2a16", "--weights.group_size", "16", "--evaluation.windows", "3")
    assert result.exit_code == 0, result.output
    for words in (
        "quantized parameters",
        "Sylvester of order 64",
        "bits per weight of what is quantized",
        "3.500",
        "bits per weight of the whole file",
        "128 x 256 = 32,768",
    ):
        assert words in result.stdout
    found = json.loads(call(llama, "--recipe", "w2a16", "--json").stdout)
    assert found["model"]["blocks"] == 2 and found["rotations"].keys() == {"r1", "r2"}


def test_a_run_is_shown_as_json(tiny_run: Path) -> None:
    found = json.loads(call(tiny_run, "--json").stdout)
    assert found["manifest"]["finished"] and found["report"]["perplexity"]


def test_what_cannot_be_planned_is_one_sentence(llama: Path, tiny_run: Path, tmp_path: Path) -> None:
    for arguments, words in [
        ((tmp_path,), r"has no config\.json"),
        ((tmp_path / "absent",), "does not exist; check the path"),
        (("nothing",), "is no known name, no local folder and no hub id"),
        ((llama, "--weights.bits", "1"), "weights.bits is 1 but must be 2 to 8"),
        ((llama, "--weights.group_size", "48"), "does not divide the hidden size 64"),
        ((llama, "--model", "tiny"), "the model is given twice: leave out --model"),
        ((tiny_run, "--weights.bits", "3"), "is a run, which has its recipe: leave out the other options"),
        ((llama, "--device", "abacus"), "device 'abacus' cannot be used"),
    ]:
        result = call(*map(str, arguments))
        assert result.exit_code == 2 and result.stdout == "", result.output
        assert re.search(words, result.stderr) and len(result.stderr.splitlines()) == 1, result.stderr


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr("rotoboa.models.remote.snapshot_download")  # the hub is not asked
    assert "runs/nothing is no folder of a run: it does not exist.\n" in call("runs/nothing").stderr
    for run in ("first", "second"):
        (tmp_path / "mine" / run).mkdir(parents=True)
        (tmp_path / "mine" / run / "manifest.json").write_text("{}")
    result = call("mine/secnd")
    assert result.exit_code == 2
    assert "mine/secnd is no folder of a run: it does not exist, while mine holds second, first." in result.stderr


def test_an_export_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*absent: check the path, or write an export with"):
        read_record(tmp_path / "absent")


def test_a_hub_id_that_is_no_folder_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> str:
        raise LocalEntryNotFoundError("not there")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rotoboa.models.remote.snapshot_download", missing)
    monkeypatch.setattr("rotoboa.models.remote.hf_hub_download", missing)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert "error: models/lama is no folder here, could not be fetched" in call("models/lama").stderr
