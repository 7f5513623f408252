"""Whole runs repeat bit for bit, and one that was interrupted or killed ends like any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rotoboa
from rotoboa.boa.block import block
from rotoboa.errors import InputError
from rotoboa.pipeline import quantizing, stages
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.storage import run_writer
from rotoboa.pipeline.storage.run_writer import RunWriter

MakeRecipe = Callable[..., Recipe]
Interrupted = Callable[..., Path]
ModelFiles = Callable[[Path], dict[str, bytes]]
Finished = tuple[Path, Recipe, dict[str, Any]]


def written(run: Path, blocks: int) -> list[int]:
    """When each of the first `blocks` was written."""
    return [(run / "blocks" / f"{index:05}.safetensors").stat().st_mtime_ns for index in range(blocks)]


def test_two_runs_are_the_same_bytes(finished: Finished, model_files: ModelFiles, tmp_path: Path) -> None:
    run, recipe, report = finished
    again = rotoboa.quantize(recipe.model_copy(update={"output": tmp_path / "run"}))
    assert model_files(tmp_path / "run") == model_files(run)
    assert again["perplexity"] == report["perplexity"]


def test_seeds_matter(finished: Finished, model_files: ModelFiles, tmp_path: Path) -> None:
    run, recipe, _ = finished
    ours = model_files(run)["blocks/00001.safetensors"]
    for section in ("rotation", "calibration"):
        part = getattr(recipe, section).model_copy(update={"seed": 1})
        output = tmp_path / section
        rotoboa.quantize(recipe.model_copy(update={"output": output, section: part}))
        assert model_files(output)["blocks/00001.safetensors"] != ours


# Which call ends the run.
MOMENTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "first block": (quantizing, "quantize_block", {}),
    "second block": (block, "quantize_mlp", {"call": 2}),
    # The block's file is there, its line in the manifest is not.
    "block written": (RunWriter, "save", {"when": lambda folder: len(folder.manifest.blocks) == 2}),
    "export": (stages, "write_native", {}),
    "evaluation": (stages, "perplexities", {}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_ends_with_the_same_bytes(
    finished: Finished, interrupted: Interrupted, model_files: ModelFiles, tmp_path: Path, moment: str
) -> None:
    whole, recipe, report = finished
    recipe = recipe.model_copy(update={"output": tmp_path / "run"})
    owner, name, how = MOMENTS[moment]
    run = interrupted(recipe, owner, name, **how)
    done = json.loads((run / "manifest.json").read_text())
    assert "finished" not in done
    assert len(done["blocks"]) == {"first block": 0, "second block": 1, "block written": 1}.get(moment, 2)
    assert not (run / "report.json").exists()
    kept = written(run, len(done["blocks"]))
    resumed = rotoboa.quantize(recipe)
    assert model_files(run) == model_files(whole)
    assert resumed["perplexity"] == report["perplexity"]
    assert written(run, len(done["blocks"])) == kept  # not made again
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize(
    "changes",
    [
        {"weights.bits": 2, "weights.group_size": 16, "weights.starts": 3},
        {"weights.bits": 3, "weights.symmetric": True, "weights.grid": "hessian"},
        {"weights.method": "rtn", "activations.bits": 4},
        {"weights.drift": False, "rotation.r4": True},
    ],
)
def test_other_settings_interrupted(
    llama: Path,
    make_recipe: MakeRecipe,
    interrupted: Interrupted,
    model_files: ModelFiles,
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    recipe = make_recipe("w4a16", {"model": str(llama), "output": tmp_path / "whole", **changes})
    whole = rotoboa.quantize(recipe)
    recipe = recipe.model_copy(update={"output": tmp_path / "parts"})
    interrupted(recipe, RunWriter, "write_block", call=2)
    assert rotoboa.quantize(recipe)["perplexity"] == whole["perplexity"]
    assert model_files(tmp_path / "parts") == model_files(tmp_path / "whole")


def test_half_a_file_leaves_nothing_behind(
    finished: Finished, model_files: ModelFiles, interrupted: Interrupted, tmp_path: Path
) -> None:
    """As a process leaves it that is killed while it writes; `test_resume` kills some."""
    whole, recipe, _ = finished
    recipe = recipe.model_copy(update={"output": tmp_path / "run"})

    def is_second(path: Path, tensors: Any) -> bool:
        if path.name.startswith("00001"):
            path.with_name("." + path.name + ".tmp").write_bytes(b"half of it")
        return path.name.startswith("00001")

    interrupted(recipe, run_writer, "write_tensors", when=is_second)
    assert len(json.loads((tmp_path / "run" / "manifest.json").read_text())["blocks"]) == 1
    rotoboa.quantize(recipe)
    assert model_files(tmp_path / "run") == model_files(whole)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_finished_run_is_refused(finished: Finished, model_files: ModelFiles) -> None:
    run, recipe, _ = finished
    before = model_files(run)
    with pytest.raises(InputError, match="holds this very run, finished: see it with `rotoboa inspect"):
        rotoboa.quantize(recipe)
    assert model_files(run) == before
