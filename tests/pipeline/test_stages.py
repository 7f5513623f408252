"""Whole runs, small: what they report and leave, what is measured of them again, and the text they need."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rotoboa
from rotoboa.errors import InputError
from rotoboa.export.runtime.memory import model_bytes
from rotoboa.pipeline.job.calibration import evaluation_tokens, load_texts
from rotoboa.pipeline.measure import evaluating
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.storage.files import tensor_sizes

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
    assert list(seconds) == ["text", "quantize", "export", *(f"evaluate {name}" for name in (*EVALUATED, "logits"))]
    assert 0 < report["plain_forward_seconds"] < report["seconds"]["total"]
    assert report["peak_memory_bytes"]["host"] > 2**26
    outer = 2 * 2048 * 64
    assert report["sizes"] == {
        "original": (llama / "model.safetensors").stat().st_size,
        "quantized": (run / "model" / "model.safetensors").stat().st_size,
        "blocks": sum(tensor_sizes(run / "model" / "model.safetensors").values()) - 2 * outer,
        "embedding": outer,
        "head": outer,
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
        *("manifest.json", "recipe.yaml", "report.json", "scales.safetensors"),
        *("blocks/00000.safetensors", "blocks/00001.safetensors"),
        *("model/config.json", "model/generation_config.json", "model/model.safetensors"),
        *("model/tokenizer.json", "model/tokenizer_config.json"),
        *("model/README.md", "model/recipe.yaml", "model/report.json", "model/export.json"),
    }
    with safe_open(run / "scales.safetensors", "pt") as scales:  # of keys too, which this recipe quantizes
        sites = ("qkv", "output", "gate_up", "down", "keys", "queries")
        assert set(scales.keys()) == {f"{i}.{site}" for i in range(2) for site in sites}
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
    again = evaluating.evaluate(run).to_json()
    assert all(again[name] == report[name] for name in ("perplexity", "divergence", "sizes"))
    fewer = evaluating.evaluate(run, windows=2).to_json()
    assert perplexities(fewer)["quantized"] != perplexities(report)["quantized"]
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    assert list(evaluating.evaluate(run, dataset=str(other)).to_json()["perplexity"]) == [str(other)]
    for both in (f"{text}, {other}", [str(text), str(other)]):
        found = evaluating.evaluate(run, dataset=both).to_json()
        assert list(found["perplexity"]) == list(found["divergence"]) == [str(text), str(other)]
        assert found["perplexity"][str(text)] == report["perplexity"][str(text)]
        assert found["tokens"] == {"evaluation": {str(text): [4, 64], str(other): [4, 64]}}
        assert "evaluate quantized" in found["seconds"]
    longer = evaluating.evaluate(run, sequence_length=128).to_json()
    assert perplexities(longer)["full_precision"] != perplexities(report)["full_precision"]
    assert model_files(run) == before


def test_what_evaluate_refuses(finished: Finished, tmp_path: Path) -> None:
    run, *_ = finished
    with pytest.raises(InputError, match="--sequence-length 257 is more than the 256 positions"):
        evaluating.evaluate(run, sequence_length=257)
    with pytest.raises(InputError, match="is no folder of a run"):
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
    assert evaluating.evaluate(tmp_path / "run").to_json()["perplexity"] == report["perplexity"]
    written = (tmp_path / "run" / "report.json").read_bytes()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(-1)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"is not the checkpoint any more .* with another model\.safetensors: bring"):
        evaluating.evaluate(tmp_path / "run")
    assert (tmp_path / "run" / "report.json").read_bytes() == written


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
