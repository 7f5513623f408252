"""Whole runs repeat bit for bit, and one that was interrupted or killed ends like any other."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rotoboa
from rotoboa.boa.block import block
from rotoboa.errors import InputError
from rotoboa.pipeline import quantizing, stages
from rotoboa.pipeline.recipe.recipe import Recipe
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


def test_a_killed_process_ends_with_the_same_bytes(finished: Finished, model_files: ModelFiles, tmp_path: Path) -> None:
    whole, recipe, _ = finished
    recipe = recipe.model_copy(update={"output": tmp_path / "run"})
    code = (
        "import os, signal, sys\n"
        "import rotoboa\n"
        "from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe\n"
        "from rotoboa.pipeline import stages\n"
        "from rotoboa.pipeline.storage import run_writer\n"
        "write = run_writer.write_tensors\n"
        "def killed(path, tensors):\n"
        "    if path.name.startswith('00001'):\n"
        "        path.with_name('.' + path.name + '.tmp').write_bytes(b'half of it')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(path, tensors)\n"
        "run_writer.write_tensors = killed\n"
        "stages.quantize(build_recipe(load_recipe(sys.argv[1]), {'output': sys.argv[2]}))\n"
    )
    source = whole / "recipe.yaml"
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "run")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are in another order with another number
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)
    assert done.returncode == -signal.SIGKILL, done.stderr
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
