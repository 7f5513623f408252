"""Whole runs, small: what they report and leave, what is measured of them again, and the text they need."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rotoboa
from rotoboa.errors import InputError
from rotoboa.export.memory import model_bytes
from rotoboa.pipeline import evaluating
from rotoboa.pipeline.calibration import evaluation_tokens, load_texts
from rotoboa.pipeline.recipe import Recipe
from rotoboa.pipeline.recipe_files import build_recipe, load_recipe

MakeRecipe = Callable[..., Recipe]
ModelFiles = Callable[[Path], dict[str, bytes]]
Finished = tuple[Path, Recipe, dict[str, Any]]
EVALUATED = ("full precision", "rtn", "quantized")


def perplexities(report: dict[str, Any]) -> dict[str, float]:
    (measured,) = report["perplexity"].values()
    return dict(measured)


# -- the report -------------------------------------------------------------------------------------------------------


def test_report(finished: Finished, text: Path, llama: Path) -> None:
    run, recipe, report = finished
    assert json.loads((run / "report.json").read_text()) == report
    assert report["perplexity"].keys() == {str(text)}
    measured = perplexities(report)
    assert list(measured) == ["full_precision", "rtn", "quantized"]
    assert all(math.isfinite(value) and value > 1 for value in measured.values())
    (divergence,) = report["divergence"].values()
    assert report["divergence"].keys() == report["perplexity"].keys()
    assert set(divergence) == {"kl", "top1", "rtn"} and set(divergence["rtn"]) == {"kl", "top1"}
    assert divergence["kl"] > 0 and 0 < divergence["top1"] < 1
    assert report["model"] == str(llama)
    assert report["recipe"] == recipe.model_dump(mode="json")
    assert report["seeds"] == {"rotation": 0, "calibration": 0}
    assert report["tokens"] == {"calibration": [4, 64], "evaluation": {str(text): [4, 64]}}
    assert set(report["versions"]) >= {"rotoboa", "torch", "transformers", "safetensors", "tokenizers", "numpy"}
    assert report["versions"]["torch"] == torch.__version__
    seconds = dict(report["seconds"])
    assert seconds.pop("total") >= sum(seconds.values()) > 0
    assert list(seconds) == ["text", "quantize", "export", *(f"evaluate {name}" for name in EVALUATED)]
    assert 0 < report["plain_forward_seconds"] < report["seconds"]["total"]
    assert report["peak_memory_bytes"]["host"] > 2**26
    assert report["sizes"] == {
        "original": (llama / "model.safetensors").stat().st_size,
        "quantized": (run / "model" / "model.safetensors").stat().st_size,
    }
    held = model_bytes(rotoboa.load(run)[0])
    original = model_bytes(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16))
    assert report["memory"]["model"] == {"bfloat16": original, "quantized": held}
    assert report["memory"]["cache"]["tokens"] == 64
    assert report["python"] and report["device"]


def test_run_folder(finished: Finished) -> None:
    run, recipe, _ = finished
    found = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert found == {
        *("manifest.json", "recipe.yaml", "report.json"),
        *("blocks/00000.safetensors", "blocks/00001.safetensors"),
        *("model/config.json", "model/generation_config.json", "model/model.safetensors"),
        *("model/tokenizer.json", "model/tokenizer_config.json"),
        *("model/README.md", "model/recipe.yaml", "model/report.json", "model/export.json"),
    }
    assert build_recipe(load_recipe(str(run / "recipe.yaml"))) == recipe
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert [block["index"] for block in manifest["blocks"]] == [0, 1]
    for block in manifest["blocks"]:
        assert block["seconds"] > 0 and len(block["layers"]) == 7
        assert all(0 <= layer["loss"] < 1 for layer in block["layers"].values())


def test_the_model_folder_has_the_measured_perplexity(finished: Finished, llama: Path, text: Path) -> None:
    run, _, report = finished
    windows = evaluation_tokens(AutoTokenizer.from_pretrained(llama), load_texts(str(text), "evaluation"), 64, 4)
    model, _ = rotoboa.load(run, dtype=torch.float32)
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    assert math.exp(loss) == pytest.approx(perplexities(report)["quantized"], rel=1e-4)


def test_evaluating_again_gives_the_figures_of_the_report(
    finished: Finished, model_files: ModelFiles, tmp_path: Path, text: Path
) -> None:
    run, _, report = finished
    before = model_files(run)
    again = evaluating.evaluate(run)
    assert all(again[name] == report[name] for name in ("perplexity", "divergence", "sizes"))
    fewer = evaluating.evaluate(run, windows=2)
    assert perplexities(fewer)["quantized"] != perplexities(report)["quantized"]
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    assert list(evaluating.evaluate(run, dataset=str(other))["perplexity"]) == [str(other)]
    for both in (f"{text}, {other}", [str(text), str(other)]):
        found = evaluating.evaluate(run, dataset=both)
        assert list(found["perplexity"]) == list(found["divergence"]) == [str(text), str(other)]
        assert found["perplexity"][str(text)] == report["perplexity"][str(text)]
        assert found["tokens"] == {"evaluation": {str(text): [4, 64], str(other): [4, 64]}}
        assert "evaluate quantized" in found["seconds"]
    longer = evaluating.evaluate(run, sequence_length=128)
    assert perplexities(longer)["full_precision"] != perplexities(report)["full_precision"]
    assert model_files(run) == before


def test_what_evaluate_refuses(finished: Finished, tmp_path: Path) -> None:
    run, *_ = finished
    with pytest.raises(InputError, match="--sequence-length 257 is more than the 256 positions"):
        evaluating.evaluate(run, sequence_length=257)
    with pytest.raises(InputError, match="is no run folder"):
        evaluating.evaluate(tmp_path)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "blocks" / "00001.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"00001\.safetensors is missing or damaged"):
        evaluating.evaluate(copy)


def test_evaluating_needs_the_checkpoint_that_the_run_was_made_of(
    llama: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given by a relative path, it is found from another folder too; changed, it is named."""
    model = Path(shutil.copytree(llama, tmp_path / "some" / "model"))
    monkeypatch.chdir(tmp_path)
    changes = {"model": "some/model", "output": tmp_path / "run", "weights.method": "rtn"}
    report = rotoboa.quantize(make_recipe("w4a16", changes))
    monkeypatch.chdir(tmp_path / "some")
    assert evaluating.evaluate(tmp_path / "run")["perplexity"] == report["perplexity"]
    written = (tmp_path / "run" / "report.json").read_bytes()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(-1)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"is not the checkpoint any more .* with another model\.safetensors: bring"):
        evaluating.evaluate(tmp_path / "run")
    assert (tmp_path / "run" / "report.json").read_bytes() == written


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def two_bits(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Perplexities of the embedded model in 2 bits, with the settings that are the default."""
    changes = {"output": tmp_path_factory.mktemp("runs") / "run", "calibration.samples": 16, "weights.grid": "diagonal"}
    return perplexities(rotoboa.quantize(make_recipe("w2a16", changes)))


def test_two_bits_are_better_than_rounding_to_nearest(two_bits: dict[str, float]) -> None:
    assert two_bits["full_precision"] < two_bits["quantized"] < two_bits["rtn"]


@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
@pytest.mark.parametrize(("bits", "group"), [(2, 8), (2, None), (3, 16), (4, 32), (8, None)])
def test_methods_bits_and_groups(
    llama: Path, make_recipe: MakeRecipe, tmp_path: Path, method: str, bits: int, group: int | None
) -> None:
    changes = {
        "weights.method": method,
        "weights.bits": bits,
        "weights.group_size": group,
        "evaluation.baseline": False,
    }
    report = rotoboa.quantize(make_recipe("w4a16", {"model": str(llama), "output": tmp_path / "run", **changes}))
    measured = perplexities(report)
    assert list(measured) == ["full_precision", "quantized"] and "evaluate rtn" not in report["seconds"]
    (divergence,) = report["divergence"].values()
    assert list(divergence) == ["kl", "top1"]
    if bits == 8:
        assert measured["quantized"] == pytest.approx(measured["full_precision"], rel=0.02)
        assert divergence["kl"] < 0.01 and divergence["top1"] > 0.9
    tensors = load_file(tmp_path / "run" / "blocks" / "00001.safetensors")
    assert tensors["mlp.down_proj.qweight"].shape == (64, packed_width(96, bits))
    assert tensors["mlp.down_proj.scale"].shape == tensors["mlp.down_proj.zero"].shape == (64, 96 // (group or 96))
    assert tensors["mlp.down_proj.scale"].dtype == torch.float16
    assert int(tensors["mlp.down_proj.zero"].max()) < 2**bits
    with torch.no_grad():
        assert rotoboa.load(tmp_path / "run")[0](torch.arange(20)[None]).logits.isfinite().all()


def test_losses_fall_with_bits_and_methods(llama: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def loss(method: str, bits: int) -> float:
        output = tmp_path / f"{method}{bits}"
        changes = {"weights.method": method, "weights.bits": bits, "model": str(llama), "output": output}
        rotoboa.quantize(make_recipe("w4a16", changes))
        first = json.loads((output / "manifest.json").read_text())["blocks"][0]["layers"]
        return float(first["self_attn.q_proj"]["loss"])

    losses = {(method, bits): loss(method, bits) for method in ("rtn", "gptq", "boa") for bits in (2, 4)}
    for method in ("rtn", "gptq", "boa"):
        assert 0 < losses[method, 4] < losses[method, 2] < 1
    for bits in (2, 4):
        assert losses["boa", bits] < losses["gptq", bits] < losses["rtn", bits]


def test_symmetric_grids_have_their_zero_in_the_middle(llama: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes = {"weights.symmetric": True, "weights.bits": 3, "model": str(llama), "output": tmp_path}
    rotoboa.quantize(make_recipe("w4a16", changes))
    tensors = load_file(tmp_path / "blocks" / "00000.safetensors")
    assert all((tensor == 4).all() for name, tensor in tensors.items() if name.endswith("zero"))


# -- the same bytes ---------------------------------------------------------------------------------------------------


def test_two_runs_are_the_same_bytes(finished: tuple[Recipe, dict[str, Any]], tmp_path: Path) -> None:
    recipe, report = finished
    again = rotoboa.quantize(recipe.model_copy(update={"output": tmp_path / "run"}))
    assert model_files(tmp_path / "run") == model_files(output_of(recipe))
    assert again["perplexity"] == report["perplexity"]


def test_seeds_matter(finished: tuple[Recipe, dict[str, Any]], tmp_path: Path) -> None:
    recipe, _ = finished
    ours = model_files(output_of(recipe))["blocks/00001.safetensors"]
    for section in ("rotation", "calibration"):
        part = getattr(recipe, section).model_copy(update={"seed": 1})
        output = tmp_path / section
        rotoboa.quantize(recipe.model_copy(update={"output": output, section: part}))
        assert model_files(output)["blocks/00001.safetensors"] != ours


@pytest.mark.parametrize("moment", ["first block", "second block", "block written", "export", "evaluation"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    finished: tuple[Recipe, dict[str, Any]], tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, report = finished
    recipe = recipe.model_copy(update={"output": tmp_path / "run"})
    calls = 0

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def second_call(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return interrupt() if calls == 2 else original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if moment == "first block":
            patch.setattr(BlockQuantizer, "run", interrupt)
        elif moment == "second block":
            patch.setattr(BlockQuantizer, "_mlp_half", second_call(BlockQuantizer._mlp_half))
        elif moment == "block written":
            # The block's file is there, its line in the manifest is not.
            save = RunFolder.save
            patch.setattr(
                RunFolder, "save", lambda self: interrupt() if len(self.manifest["blocks"]) == 2 else save(self)
            )
        elif moment == "export":
            patch.setattr(stages, "write_native", interrupt)
        else:
            patch.setattr(stages, "perplexities", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rotoboa.quantize(recipe)
    done = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "finished" not in done
    assert len(done["blocks"]) == {"first block": 0, "second block": 1, "block written": 1}.get(moment, 2)
    assert not (tmp_path / "run" / "report.json").exists()
    kept = written(recipe, len(done["blocks"]))
    resumed = rotoboa.quantize(recipe)
    assert model_files(tmp_path / "run") == model_files(output_of(finished[0]))
    assert resumed["perplexity"] == report["perplexity"]
    assert written(recipe, len(done["blocks"])) == kept  # not made again
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.parametrize(
    "changes",
    [
        {"weights.bits": 2, "weights.group_size": 16, "weights.starts": 3},
        {"weights.bits": 3, "weights.symmetric": True, "weights.grid": "hessian"},
        {"weights.method": "rtn", "activations.bits": 4},
        {"weights.drift": False, "weights.sequential": False, "rotation.r4": True},
    ],
)
def test_other_settings_interrupted(
    llama: Path, make_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("w4a16", {"model": str(llama), "output": tmp_path / "whole", **changes})
    whole = rotoboa.quantize(recipe)
    recipe = recipe.model_copy(update={"output": tmp_path / "parts"})
    write = RunFolder.write_block

    def interrupt(self: RunFolder, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_block", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rotoboa.quantize(recipe)
    assert rotoboa.quantize(recipe)["perplexity"] == whole["perplexity"]
    assert model_files(tmp_path / "parts") == model_files(tmp_path / "whole")


def test_a_killed_process_ends_with_the_same_bytes(finished: tuple[Recipe, dict[str, Any]], tmp_path: Path) -> None:
    recipe, _ = finished
    recipe = recipe.model_copy(update={"output": tmp_path / "run"})
    code = (
        "import os, signal, sys\n"
        "import rotoboa\n"
        "from rotoboa.pipeline.recipe import build_recipe, load_recipe\n"
        "from rotoboa.pipeline import run, stages\n"
        "write = run.write_tensors\n"
        "def killed(path, tensors):\n"
        "    if path.name.startswith('00001'):\n"
        "        path.with_name('.' + path.name + '.tmp').write_bytes(b'half of it')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(path, tensors)\n"
        "run.write_tensors = killed\n"
        "stages.quantize(build_recipe(load_recipe(sys.argv[1]), {'output': sys.argv[2]}))\n"
    )
    source = output_of(finished[0]) / "recipe.yaml"
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "run")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums are in another order with another number
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(json.loads((tmp_path / "run" / "manifest.json").read_text())["blocks"]) == 1
    rotoboa.quantize(recipe)
    assert model_files(tmp_path / "run") == model_files(output_of(finished[0]))
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_finished_run_is_refused(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, _ = finished
    before = model_files(output_of(recipe))
    with pytest.raises(InputError, match="holds this very run, finished: see it with `rotoboa inspect"):
        rotoboa.quantize(recipe)
    assert model_files(output_of(recipe)) == before


# -- text -------------------------------------------------------------------------------------------------------------


def test_lines_of_json_as_text(llama: Path, make_recipe: MakeRecipe, text: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": part}) + "\n" for part in text.read_text().split("\n\n")))
    changes = {"calibration.dataset": str(lines), "evaluation.dataset": str(text)}
    report = rotoboa.quantize(make_recipe("w4a16", {"model": str(llama), "output": tmp_path / "run", **changes}))
    assert list(report["perplexity"]) == [str(text)]


@pytest.mark.parametrize("option", ["calibration.dataset", "evaluation.dataset"])
def test_a_local_folder_has_no_default_text(llama: Path, make_recipe: MakeRecipe, tmp_path: Path, option: str) -> None:
    recipe = make_recipe("w4a16", {"model": str(llama), "output": tmp_path / "run", option: None})
    with pytest.raises(InputError, match=rf"is a local folder, which has no default text: give --{option} wikitext2"):
        rotoboa.quantize(recipe)
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_output(llama: Path, make_recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="the recipe has no output folder: give --output"):
        rotoboa.quantize(make_recipe("w4a16", {"model": str(llama)}))
