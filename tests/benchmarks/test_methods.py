"""The comparison of methods: its cases, its table, its picture; a cell is measured on a small model."""

import importlib
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("methods")
    for name in ("methods", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def results(methods: Any) -> dict[str, dict[str, float]]:
    """Two seeds of all cells but one; the figures tell cells apart."""
    found = {}
    for number, case in enumerate(methods.cases(methods.RECIPES, 2)):
        cell = {"perplexity": 13.0 + number, "full_precision": 12.0, "kl": 0.01 * number}
        found[case.key] = {**cell, "seconds": 10.0 + number, "memory": 2.0**30}
    return {key: value for key, value in found.items() if not key.startswith("w2a16 | BRECQ | none")}


def test_every_cell_is_a_recipe_of_its_own(methods: Any) -> None:
    cases = methods.cases(methods.RECIPES, 1)
    assert len(cases) == 32
    recipes = {case.key: build_recipe(load_recipe(case.recipe), case.changes) for case in cases}
    assert len({recipe.model_dump_json() for recipe in recipes.values()}) == 32
    for case in cases:
        recipe = recipes[case.key]
        rotated = load_recipe(case.recipe)["rotation"]
        assert (recipe.rotation.r1 != "none") == recipe.rotation.r2 == (case.transform == "rotation")
        assert recipe.rotation.r4 == (case.transform == "rotation" and rotated["r4"])
        plain = recipe.weights.starts == 1 and recipe.weights.head == 0 and not recipe.activations.search
        assert plain == (case.method != "default")
    solvers = {"RTN": "rtn", "GPTQ": "gptq", "BoA": "boa", "TurboBoA": "boa", "AdaRound": "adaround", "BRECQ": "brecq"}
    assert {case.method: recipes[case.key].weights.method for case in cases} == solvers | {
        "aespa": "aespa",
        "default": "boa",
    }


def test_rotations_of_papers_are_without_what_this_project_adds(methods: Any) -> None:
    for transform, kept in (("quarot", 0), ("quarot-64", 64)):
        case = methods.Case("w4a4kv4", "GPTQ", transform, 0)
        recipe = build_recipe(load_recipe(case.recipe), case.changes)
        rotation = recipe.rotation
        assert rotation.r1 == "merged" and rotation.r2 and rotation.r3 and rotation.r4
        assert not rotation.scale and not rotation.heads and recipe.activations.directions == kept


def test_table(methods: Any, results: dict[str, dict[str, float]]) -> None:
    lines = methods.table("w2a16", results)
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 15 and not any("BRECQ | none" in line for line in lines)
    # Seeds of a cell are 32 apart: the first cell has 13 and 45.
    assert rows[0][:2] == ["| RTN", "none"] and rows[0][4:] == ["29.00", "0.1600", "26", "1024 |"]
    text = methods.document(results, methods.RECIPES, 2)
    assert "--weights.method aespa" in text and "--no-weights.value_output" in text and "--rotation.r1 none" in text


def test_picture(methods: Any, results: dict[str, dict[str, float]], tmp_path: Path) -> None:
    methods.write(results, methods.RECIPES, 2, tmp_path, "methods")
    text = (tmp_path / "methods.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and "RTN, none: 29.00" in text and "--series-1:" in text
    used = {part.split(")")[0] for part in text.split("var(")[1:]}
    assert used and all(f"{name}:" in text for name in used), "a colour that nothing defines"
    assert "methods.svg" in (tmp_path / "methods.md").read_text(encoding="utf-8")


def test_summary(methods: Any, results: dict[str, dict[str, float]]) -> None:
    rows = [line.split(" | ") for line in methods.summary(results).splitlines()]
    assert [row[0] for row in rows[2:]] == [f"| {name}" for name in methods.METHODS]
    assert rows[2][3:] == ["29.00", "30.00", "31.00", "32.00", "29", "1024 |"], "the dearest cell's seconds"
    brecq = next(row for row in rows if row[0] == "| BRECQ")
    assert brecq[3] == "" and float(brecq[4]) > 29, "what is not measured is left out"


def test_documents_are_of_the_committed_cells(methods: Any) -> None:
    committed = methods.json.loads((methods.HERE / "methods.json").read_text(encoding="utf-8"))
    results = (methods.HERE.parent / "docs" / "results.md").read_text(encoding="utf-8")
    assert {case.key for case in methods.cases(methods.RECIPES, 1)} == set(committed)
    assert methods.summary(committed) in results and "(../benchmarks/methods.svg)" in results
    page = (methods.HERE / "methods.md").read_text(encoding="utf-8")
    assert all("\n".join(methods.table(recipe, committed)).strip() in page for recipe in methods.RECIPES)


def test_a_cell_is_measured(methods: Any, llama: Path, text: Path) -> None:
    case = methods.Case("w2a16", "AdaRound", "rotation", 0)
    small = {
        "model": str(llama),
        "calibration.dataset": str(text),
        "evaluation.dataset": str(text),
        "calibration.samples": 2,
        "calibration.sequence_length": 32,
        "evaluation.windows": 2,
        "weights.iterations": 10,
    }
    found = methods.run(case, 1, small)
    assert found["perplexity"] > 1 and found["seconds"] > 0 and found["kl"] > 0 and found["memory"] > 2**26
    assert methods.table("w2a16", {case.key: found})[4].startswith("| AdaRound | rotation | layer | learned rounding |")


def test_what_is_measured_is_not_measured_again(
    methods: Any, results: dict[str, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "HERE", tmp_path)
    (tmp_path / "methods.json").write_text(methods.json.dumps(results), encoding="utf-8")
    called: list[Any] = []
    monkeypatch.setattr(methods, "run", lambda *given: called.append(given))
    methods.main(seeds=2, jobs=1, threads=1, methods="RTN,GPTQ,aespa")
    assert not called and (tmp_path / "methods.svg").is_file()
    with pytest.raises(Exception, match="there are RTN, GPTQ"):
        methods.main(methods="SmoothQuant")
