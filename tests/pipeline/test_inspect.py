"""`rotoboa inspect` as a user calls it."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from rotoboa.pipeline.cli import app


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
        ((tmp_path,), "has no config.json"),
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
        assert words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
