"""Reports side by side: nothing is lost, nothing is mixed up, and what cannot be compared is said."""

import copy
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import rotoboa
from rotoboa.errors import InputError
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.measure.comparing import comparison, format_of, render, short_names, table
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.storage.files import read_report
from rotoboa.pipeline.storage.run_report import Report

REPORT: dict[str, Any] = {
    "model": "tiny",
    "perplexity": {"stdlib": {"full_precision": 12.0, "rtn": 1234.5, "quantized": 13.25}},
    "divergence": {"stdlib": {"kl": 0.0625, "top1": 0.875}},
    "tasks": {"next_line": {"metric": "acc", "full_precision": 0.75, "quantized": 0.7, "stderr": 0.02}},
    "tokens": {"calibration": [128, 512], "evaluation": [200, 512]},
    "seconds": {"quantize": 61.0, "total": 90.0},
    "plain_forward_seconds": 6.1,
    "peak_memory_bytes": {"host": 2**30},
    "sizes": {"original": 2**23, "quantized": 2**21},
    "bits_per_weight": 4.125,
    "device": "a CPU",
    "recipe": build_recipe(load_recipe("w4a4kv4")).model_dump(mode="json"),
}


def changed(**changes: Any) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    for name, value in changes.items():
        *path, last = name.split("__")
        part = report
        for key in path:
            part = part[key]
        part[last] = value
    return report


def rows(*reports: dict[str, Any]) -> list[dict[str, Any]]:
    return comparison([(Path(f"runs/{index}"), Report.model_validate(report)) for index, report in enumerate(reports)])


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def folder(path: Path, report: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    (path / "report.json").write_text(json.dumps(report))
    return path


def test_json_holds_the_figures_of_the_report() -> None:
    (row,) = json.loads(render(rows(REPORT), "json"))
    for name in ("model", "perplexity", "divergence", "tasks", "seconds", "peak_memory_bytes", "sizes"):
        assert row[name] == REPORT[name], name
    assert row["run"] == "0" and row["method"] == "boa" and row["group_size"] is None and row["notes"] == []
    assert row["bits"] == {"weights": 4, "activations": 4, "keys": 4, "values": 4, "per_weight": 4.125}


def test_csv_has_a_column_for_each_figure_and_a_line_for_each_run() -> None:
    groups = {"recipe__weights__group_size": 64, "recipe__activations__group_size": 32}
    other = changed(model='a, "b"', perplexity__c4={"quantized": 7.5}, **groups)
    first, second = csv.DictReader(io.StringIO(render(rows(REPORT, other), "csv")))
    assert float(first["perplexity.stdlib.quantized"]) == 13.25 and first["perplexity.c4.quantized"] == ""
    assert second["perplexity.c4.quantized"] == "7.5" and second["model"] == 'a, "b"'
    assert (first["group_size"], second["group_size"]) == ("", "64")
    assert (first["activation_group"], second["activation_group"]) == ("", "32")
    assert second["notes"] == "other model; other evaluation text"
    assert list(first)[:4] == ["run", "model", "method", "group_size"] and list(first)[-1] == "notes"


def test_markdown_in_the_units_a_person_reads() -> None:
    lines = render(rows(REPORT, changed(model="a|b")), "markdown").splitlines()
    cells = [[cell.strip() for cell in line.replace(r"\|", "/").strip("|").split("|")] for line in lines]
    assert len({len(line) for line in cells}) == 1
    first, second = (dict(zip(cells[0], line, strict=True)) for line in cells[2:])
    assert first == {
        "run": "0", "model": "tiny", "method": "boa", "W": "4", "A": "4", "K": "4", "V": "4",
        "bits per weight": "4.12", "size": "2 MiB", "original size": "8 MiB",
        "perplexity on stdlib, full precision": "12.000", "perplexity on stdlib, RTN, no rotation": "1,234.500",
        "perplexity on stdlib, quantized": "13.250", "KL on stdlib": "0.0625", "top-1 agreement on stdlib": "87.5%",
        "next_line (acc), full precision": "0.750", "next_line (acc), quantized": "0.700 ± 0.020",
        "quantization": "1 min 01 s", "whole run": "1 min 30 s", "memory": "1 GiB", "notes": "",
    }  # fmt: skip
    assert second["model"] == "a/b" and second["notes"] == "other model"


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, []),
        ({"model": "other"}, ["other model"]),
        ({"perplexity": {"c4": {"full_precision": 12.0, "quantized": 13.0}}}, ["other evaluation text"]),
        ({"tokens__evaluation": [4, 512]}, ["other evaluation windows"]),
        ({"recipe__evaluation__split": "validation"}, ["other split of the evaluation text"]),
        ({"perplexity__stdlib__full_precision": 12.1}, ["other full precision on stdlib"]),
        ({"perplexity__stdlib__full_precision": 12.001}, []),
        ({"perplexity__stdlib__quantized": 15.0, "recipe__weights__bits": 2}, []),
        ({"device": "a GPU"}, ["other device"]),
    ],
)
def test_what_cannot_be_compared_with_the_first_run_is_noted(changes: dict[str, Any], note: list[str]) -> None:
    first, second = rows(REPORT, changed(**changes))
    assert first["notes"] == [] and second["notes"] == note


def test_what_no_run_has_is_no_column() -> None:
    report = changed(bits_per_weight=None)
    del report["divergence"], report["tasks"]
    report["perplexity"]["stdlib"].pop("rtn")
    titles = [title for title, _ in table(rows(report))]
    assert not [title for title in titles if "KL" in title or "RTN" in title or "bits" in title or title == "notes"]
    mixed = dict(table(rows(report, REPORT)))
    assert mixed["KL on stdlib"] == ["", "0.0625"] and mixed["next_line (acc), quantized"] == ["", "0.700 ± 0.020"]


def test_short_names_stay_apart() -> None:
    given = ["/data/a/run", "/data/b/run", "runs/x", "stdlib", "/texts/test.txt"]
    shown = short_names(given)
    assert list(shown.values()) == ["/data/a/run", "/data/b/run", "x", "stdlib", "test.txt"]


def test_the_command(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", REPORT), folder(tmp_path / "two", changed(model="other"))
    shown = call("compare", one, two)
    assert shown.exit_code == 0 and shown.stdout.startswith("| run | model |") and "other model" in shown.stdout
    assert shown.stdout == render(comparison([(run, read_report(run)) for run in (one, two)]), "markdown")
    for name, form in (("t.md", "markdown"), ("t.csv", "csv"), ("t.JSON", "json")):
        done = call("compare", one, two, "--output", tmp_path / name)
        assert done.exit_code == 0 and done.stdout == ""
        assert (tmp_path / name).read_text() == call("compare", one, two, "--format", form).stdout
        assert format_of(Path(name)) == form
    assert call("compare", one, "--output", tmp_path / "t", "--format", "csv").exit_code == 0


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    good = folder(tmp_path / "good", REPORT)
    unfinished = folder(tmp_path / "unfinished", REPORT)
    (unfinished / "report.json").unlink()
    cases = {
        (good, tmp_path / "absent"): "no folder of a run",
        (unfinished, good): "is not finished",
        (good, folder(tmp_path / "old", {"perplexity": {}})): "is not one that this release of rotoboa reads",
        (folder(tmp_path / "odd", changed(sizes=[1])),): "is not one that this release of rotoboa reads",
        (good, "--output", tmp_path / "t.html"): "give --format",
        (good, "--output", tmp_path / "absent" / "t.csv"): "cannot be written",
    }
    for arguments, words in cases.items():
        result = call("compare", *arguments)
        assert result.exit_code == 2 and result.stdout == "", arguments
        assert len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert call("compare").exit_code == 2
    assert call("compare", good, "--format", "xml").exit_code == 2
    with pytest.raises(InputError):
        format_of(Path("t.txt"))


def test_a_real_run(llama: Path, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """What a run reports is what is compared; the bits of a weight are those of its row of integers and scale."""
    output = tmp_path / "run"
    report = rotoboa.quantize(make_recipe("w2a16", {"model": str(llama), "output": output}))
    (row,) = json.loads(call("compare", output, "--format", "json").stdout)
    assert row["perplexity"] == report["perplexity"] and row["seconds"] == report["seconds"]
    # A row of c weights: c 2-bit integers, a float16 scale, a uint8 zero point. Q, K, V, O, gate and up; down.
    rows = {64: 64 + 32 + 32 + 64 + 96 + 96, 96: 64}
    bits = sum(count * (2 * columns + 16 + 8) for columns, count in rows.items())
    assert row["bits"]["per_weight"] == pytest.approx(bits / sum(c * r for c, r in rows.items()), abs=1e-9)
