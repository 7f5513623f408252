"""A run that is killed again and again ends like one that was not, and nothing that has changed goes unnoticed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rotoboa
from rotoboa.errors import InputError
from rotoboa.pipeline import stages
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import recipe_to_yaml

MakeRecipe = Callable[..., Recipe]
Interrupted = Callable[..., Path]
KILLS = 6
TIMINGS = ("seconds", "stages", "plain_forward_seconds", "peak_memory_bytes", "parts")


@pytest.fixture(scope="module")
def model(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, in shards."""
    return save_llama(tmp_path_factory.mktemp("three"), num_hidden_layers=3, shard="400KB")


@pytest.fixture(scope="module")
def short(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that is tokenized in no time."""
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text(text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture
def recipe(model: Path, short: Path, make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    data = {"calibration.dataset": str(short), "evaluation.dataset": str(short), "calibration.samples": 2}
    return make_recipe("w4a4kv4", {"model": str(model), "output": tmp_path / "run", "evaluation.windows": 2, **data})


def content(run: Path) -> dict[str, Any]:
    """Every file of a run; of the manifest and the report all but what timing decides."""
    found: dict[str, Any] = {str(f.relative_to(run)): f.read_bytes() for f in run.rglob("*") if f.is_file()}
    for name in ("manifest.json", "report.json", "model/report.json"):
        data = {key: value for key, value in json.loads(found[name]).items() if key not in TIMINGS}
        for block in data.get("blocks", []):
            del block["seconds"], block["stages"]
        data.get("recipe", {}).pop("output", None)
        found[name] = data
    if "model/export.json" in found:
        record = json.loads(found["model/export.json"])
        del record["files"]["report.json"]
        found["model/export.json"] = record
    found["recipe.yaml"] = b"".join(line for line in found["recipe.yaml"].splitlines() if b"output" not in line)
    return found


def test_killed_at_random(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    given = [tmp_path / name for name in ("recipe.yaml", "whole", "killed")]
    command = [sys.executable, Path(__file__).with_name("kills.py"), *given, 0, KILLS]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    kills, finished = map(int, done.stdout.split())
    assert kills >= KILLS and kills > finished + 1  # fewer runs than kills: one was killed more than once
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_what_is_done_is_not_done_again(
    recipe: Recipe, tmp_path: Path, interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rotoboa.quantize(recipe.model_copy(update={"output": tmp_path / "whole"}))
    run = interrupted(recipe, stages, "shared_outer_layers")  # exported, not yet evaluated
    first = json.loads((run / "manifest.json").read_text())
    assert first["parts"] == 1 and first["seconds"]["quantize"] > 0
    for function in ("plain_forward", "quantize_blocks", "write_native"):
        monkeypatch.delattr(stages, function)
    report = rotoboa.quantize(recipe)
    assert report["perplexity"] == whole["perplexity"] and report["parts"] == 2
    assert report["seconds"]["quantize"] == first["seconds"]["quantize"]
    assert report["seconds"]["total"] > first["seconds"]["total"]
    assert list(report["seconds"]) == list(whole["seconds"])
    assert content(run) == content(tmp_path / "whole")


def test_time_and_memory_of_all_parts_count(recipe: Recipe, interrupted: Interrupted) -> None:
    run = interrupted(recipe, stages, "write_native")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["seconds"] = {"text": 1000.0, "quantize": 2000.0, "total": 4000.0}
    manifest["peak_memory_bytes"] = {"host": 2**50}
    (run / "manifest.json").write_text(json.dumps(manifest))
    report = rotoboa.quantize(recipe)
    seconds = report["seconds"]
    assert 1000 < seconds["text"] < 1100 and 2000 < seconds["quantize"] < 2100 and 4000 < seconds["total"] < 4100
    assert report["peak_memory_bytes"]["host"] == 2**50


def test_a_model_folder_that_was_damaged_is_written_again(
    recipe: Recipe, tmp_path: Path, interrupted: Interrupted
) -> None:
    rotoboa.quantize(recipe.model_copy(update={"output": tmp_path / "whole"}))
    run = interrupted(recipe, stages, "perplexities")
    file = run / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x77")
    rotoboa.quantize(recipe)
    assert content(run) == content(tmp_path / "whole")


# -- what has changed is named ----------------------------------------------------------------------------------------


def test_a_changed_checkpoint_is_named(recipe: Recipe, tmp_path: Path, interrupted: Interrupted) -> None:
    copy = Path(shutil.copytree(recipe.model, tmp_path / "model"))
    recipe = recipe.model_copy(update={"model": str(copy)})
    run = interrupted(recipe, stages, "write_native")
    shard = max(copy.glob("model-*.safetensors"))
    state, whole = shard.stat(), shard.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name].view(-1)[3] += 0.25
    save_file(tensors, shard, {"format": "pt"})
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    with pytest.raises(InputError, match=rf"holds another run, with other checkpoint\.{shard.name}: give another"):
        rotoboa.quantize(recipe)
    shard.write_bytes(whole)  # the old content, written anew, is the same checkpoint
    assert rotoboa.quantize(recipe)["parts"] == 2
    assert json.loads((run / "manifest.json").read_text())["finished"]


def test_unchanged_files_are_not_read_again(
    recipe: Recipe, interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, stages, "write_native")
    monkeypatch.setattr("rotoboa.pipeline.job.identity.checksum", lambda file: pytest.fail(f"{file} was read"))
    rotoboa.quantize(recipe)


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_a_changed_text_is_named(recipe: Recipe, tmp_path: Path, interrupted: Interrupted, part: str) -> None:
    text = Path(shutil.copy(str(recipe.calibration.dataset), tmp_path / "mine.txt"))
    section = getattr(recipe, part).model_copy(update={"dataset": str(text) if part == "calibration" else (str(text),)})
    recipe = recipe.model_copy(update={part: section})
    interrupted(recipe, stages, "write_native")
    text.write_text("import this\n" + text.read_text())
    with pytest.raises(InputError, match=rf"holds another run, with other text\.{part}[^:]*: give another --output"):
        rotoboa.quantize(recipe)


def test_a_damaged_block_is_named_before_any_work(recipe: Recipe, interrupted: Interrupted) -> None:
    run = interrupted(recipe, stages, "write_native")
    file = run / "blocks" / "00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"00001\.safetensors is missing or damaged \(its checksum differs\)"):
        rotoboa.quantize(recipe)
    assert (run / "manifest.json").read_bytes() == before
    file.write_bytes(whole)
    rotoboa.quantize(recipe)


# -- the command ------------------------------------------------------------------------------------------------------


def test_resume_takes_the_recipe_of_the_run(recipe: Recipe, tmp_path: Path, interrupted: Interrupted) -> None:
    rotoboa.quantize(recipe.model_copy(update={"output": tmp_path / "whole"}))
    run = interrupted(recipe, stages, "write_native")
    moved = run.rename(tmp_path / "moved")

    def resume(*more: str) -> Any:
        return CliRunner().invoke(app, ["quantize", "--resume", str(moved), "--quiet", *more])

    def refused(*more: str) -> str:
        before = content(moved) if (moved / "report.json").exists() else {}
        result = resume(*more)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
        assert not before or content(moved) == before
        return str(result.stderr)

    message = refused("--weights.bits", "3", "--rotation.seed", "1", "--calibration.samples", "2")
    assert (
        f"goes on with the recipe of {moved}, which has another rotation.seed, weights.bits: leave them out" in message
    )
    assert "which has another output: leave it out" in refused("--output", str(tmp_path / "elsewhere"))
    assert f"--resume takes the recipe of {moved}: leave out --recipe" in refused("--recipe", "w2a16")
    assert "weights.bits is 99 but must be 2 to 8" in refused("--weights.bits", "99")
    result = resume("--weights.bits", "4")
    assert result.exit_code == 0, result.output
    assert content(moved) == content(tmp_path / "whole")
    assert "holds this very run, finished" in refused()


def test_a_relative_model_is_no_hub_id_from_elsewhere(
    recipe: Recipe, llama: Path, interrupted: Interrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    run = interrupted(recipe.model_copy(update={"model": "owner/name"}), stages, "write_native")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = CliRunner().invoke(app, ["quantize", "--resume", str(run), "--quiet"])
    assert result.exit_code == 2 and "is the folder 'owner/name', which is not there from here" in result.stderr


def test_nothing_to_resume(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", "--resume", str(tmp_path)])
    assert result.exit_code == 2 and "is no folder of a run: it has no manifest.json" in result.stderr
