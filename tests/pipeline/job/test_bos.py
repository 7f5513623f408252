"""Windows of text that begin with BOS: who decides it, and a whole run of such windows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rotoboa
from rotoboa.errors import InputError
from rotoboa.pipeline import stages
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.job.texts import calibration_windows, evaluation_windows
from rotoboa.pipeline.measure.evaluating import evaluate
from rotoboa.pipeline.measure.pages import write_page
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe

MakeRecipe = Callable[..., Recipe]
SMALL = {"weights.method": "rtn", "calibration.sequence_length": 24, "evaluation.baseline": False}


@pytest.fixture(scope="module")
def run(
    save_family: Callable[..., Path], make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Folder and report of a finished run of a Gemma by its default."""
    folder = tmp_path_factory.mktemp("bos")
    model = save_family(folder / "gemma2", "gemma2")
    return folder / "run", rotoboa.quantize(
        make_recipe("w4a16", {"model": str(model), "output": folder / "run", **SMALL})
    )


@pytest.mark.usefixtures("undrawn")
def test_a_run_keeps_it_and_says_it(run: tuple[Path, dict[str, Any]]) -> None:
    folder, report = run
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["identity"]["bos"] is report["bos"] is True and report["recipe"]["bos"] is None
    assert json.loads((folder / "report.json").read_text())["bos"] is True
    shown = CliRunner().invoke(app, ["inspect", str(folder)]).stdout
    page = write_page(folder, []).read_text(encoding="utf-8")
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "begins with BOS" in shown and "begins with the tokenizer" in page and "BOS at the head of each" in card


def test_evaluating_again_has_the_same_windows(run: tuple[Path, dict[str, Any]]) -> None:
    folder, report = run
    again = evaluate(folder).to_json()
    assert again["bos"] is True and again["perplexity"] == report["perplexity"]
    # A run of an earlier release, which had no such field, had windows without.
    path, manifest = folder / "manifest.json", json.loads((folder / "manifest.json").read_text())
    earlier = {**manifest, "identity": {name: part for name, part in manifest["identity"].items() if name != "bos"}}
    try:
        path.write_text(json.dumps(earlier))
        plain = evaluate(folder).to_json()
    finally:
        path.write_text(json.dumps(manifest))
    assert plain["bos"] is False and plain["perplexity"] != report["perplexity"]


def test_an_unfinished_run_goes_on_with_its_own_alone(
    run: tuple[Path, dict[str, Any]], make_recipe: MakeRecipe, tmp_path: Path, interrupted: Callable[..., Path]
) -> None:
    recipe = make_recipe("w4a16", {"model": str(run[0].parent / "gemma2"), "output": tmp_path / "run", **SMALL})
    interrupted(recipe, stages, "write_native")
    with pytest.raises(InputError, match=r"holds another run, with other recipe\.bos"):
        rotoboa.quantize(recipe.model_copy(update={"bos": False}))
    path, manifest = tmp_path / "run" / "manifest.json", json.loads((tmp_path / "run" / "manifest.json").read_text())
    path.write_text(json.dumps({**manifest, "identity": {**manifest["identity"], "bos": False}}))
    with pytest.raises(InputError, match="holds another run, with other bos"):
        rotoboa.quantize(recipe)
    path.write_text(json.dumps(manifest))
    assert rotoboa.quantize(recipe)["perplexity"] == run[1]["perplexity"]


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [("gemma2", None, True), ("gemma3_text", False, False), ("llama", None, False), ("llama", True, True)],
)
def test_the_recipe_decides_else_the_family(
    save_family: Callable[..., Path],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    name: str,
    given: bool | None,
    wanted: bool,
) -> None:
    folder = save_family(tmp_path / name, name)
    recipe = make_recipe("w4a16", {"model": str(folder), "bos": given})
    job = prepare(recipe)
    assert job.bos is wanted
    dataset, bos = str(recipe.calibration.dataset), job.tokenizer.bos_token_id
    for windows in (calibration_windows(job, dataset, 16), evaluation_windows(job, dataset, "evaluation", 16, 8)):
        assert bool((windows[:, 0] == bos).all()) is wanted
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": None}))
    if not wanted:
        assert prepare(recipe).tokenizer.bos_token_id is None
        return
    with pytest.raises(InputError, match=rf"({name} models begin|bos is true).*{name} has none: give --no-bos"):
        prepare(recipe)


def test_the_field_is_true_false_or_none(llama: Path) -> None:
    assert [build_recipe({"bos": value}).bos for value in (True, "false", None, "none")] == [True, False, None, None]
    with pytest.raises(InputError, match="bos is 7 but must be true or false, or none"):
        build_recipe({"bos": 7})
    plan = CliRunner().invoke(app, ["inspect", str(llama), "--bos", "--calibration.sequence_length", "32", "--json"])
    assert json.loads(plan.stdout)["calibration"]["bos"] is True
    shown = CliRunner().invoke(app, ["inspect", str(llama), "--no-bos", "--calibration.sequence_length", "32"]).stdout
    assert "windows begin with BOS" in shown and "no" in shown.partition("windows begin with BOS")[2].splitlines()[0]
