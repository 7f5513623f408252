"""What each quantizer costs alone: against whole models of transformers, against the whole run, families."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rotoboa
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import CENTER, NAME, AttentionTransform, set_attention
from rotoboa.boa.online.directions import LeadingDirections
from rotoboa.pipeline import stages
from rotoboa.pipeline.job.calibration import evaluation_tokens, load_texts
from rotoboa.pipeline.measure import evaluating
from rotoboa.pipeline.recipe.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
SOURCES = ["weights", "qkv", "output", "gate_up", "down", "keys", "values", "all"]
READERS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "output": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
CHEAP = {"weights.method": "rtn", "evaluation.baseline": False, "evaluation.sources": True}
UNROTATED = {f"rotation.{name}": False for name in ("r1", "r2", "r3", "r4", "heads", "scale")}


def kl_of(report: dict[str, Any]) -> float:
    (found,) = report["divergence"].values()
    return float(found["kl"])


@pytest.fixture(scope="module")
def measured(
    llama: Path, make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Folder and report of a w4a4kv4 run with sources. Not to be changed."""
    output = tmp_path_factory.mktemp("sources") / "run"
    return output, rotoboa.quantize(make_recipe("w4a4kv4", {"model": str(llama), "output": output, **CHEAP}))


def test_all_together_is_the_run_and_none_is_full_precision(measured: tuple[Path, dict[str, Any]], text: Path) -> None:
    run, report = measured
    found = report["sources"]
    assert list(found["kl"]) == list(found["blocks"]) == SOURCES
    assert found["dataset"] == str(text) and found["tokens"] == [4, 64]
    assert found["kl"]["all"] == pytest.approx(kl_of(report), rel=0.01)  # by floats, as packed layers do by integers
    assert abs(found["exact"]) < 0.05 * min(found["kl"].values())  # embedding and head are rotated in bfloat16
    assert all(found["kl"][name] < found["kl"]["all"] for name in SOURCES[:-1])
    assert all(len(errors) == 2 and min(errors) > 1e-6 for errors in found["blocks"].values())
    assert all(max(found["blocks"][name]) < max(found["blocks"]["all"]) for name in SOURCES[:-1])
    assert json.loads((run / "manifest.json").read_text())["sources"] == found


@torch.no_grad()
def test_sources_are_those_of_a_whole_model(llama: Path, make_recipe: MakeRecipe, text: Path, tmp_path: Path) -> None:
    """Without rotation: transformers' model with one quantizer put on by hand."""
    changes = {"model": str(llama), "output": tmp_path / "run", "activations.search": False, "cache.search": False}
    recipe = make_recipe("w4a4kv4", {**changes, **CHEAP, **UNROTATED, "evaluation.windows": 3})
    sources = rotoboa.quantize(recipe)["sources"]
    windows = evaluation_tokens(AutoTokenizer.from_pretrained(llama), load_texts(str(text), "evaluation"), 64, 3)
    inputs = DynamicQuantizer(4, recipe.activations.symmetric, recipe.activations.clip)
    cache = DynamicQuantizer(4, False, recipe.cache.clip)
    stored = load_file(tmp_path / "run" / "model" / "model.safetensors")

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation=NAME).eval()

    def logits(model: Any) -> Tensor:
        found: Tensor = model(windows).logits[:, :-1].log_softmax(-1).flatten(0, 1)
        return found

    def rounded(_: nn.Module, arguments: tuple[Tensor, ...], directions: Tensor | None) -> tuple[Tensor, ...]:
        return ((inputs if directions is None else LeadingDirections(inputs, directions))(arguments[0]),)

    original, streams = logits(model()), model()(windows, output_hidden_states=True).hidden_states
    for source in SOURCES[1:-1]:
        changed = model()
        for index, layer in enumerate(changed.model.layers):
            for name, module in layer.named_modules():
                part, _, last = name.rpartition(".")
                if last in READERS.get(source, ()):
                    found = stored.get(f"model.layers.{index}.{part}.{READERS[source][0]}.input_directions")
                    assert (found is None) == (source == "down")
                    module.register_forward_pre_hook(partial(rounded, directions=found))
            if source in ("keys", "values"):
                key, value = (cache if source == name else None for name in ("keys", "values"))
                center = stored[f"model.layers.{index}.self_attn.{CENTER}"].float()
                set_attention(layer.self_attn, AttentionTransform(None, key, value, recipe.cache.sink, center=center))
        kl = nn.functional.kl_div(logits(changed), original, log_target=True, reduction="batchmean")
        assert sources["kl"][source] == pytest.approx(float(kl), rel=1e-3), source
        first = changed(windows, output_hidden_states=True).hidden_states[1]  # what comes into block 0 is exact
        lost = (first - streams[1]).square().sum(-1) / streams[1].square().sum(-1)
        assert sources["blocks"][source][0] == pytest.approx(float(lost.mean()), rel=1e-3), source
    assert sources["exact"] < 1e-9


@torch.no_grad()
def test_weights_alone(measured: tuple[Path, dict[str, Any]], llama: Path, text: Path) -> None:
    """The exported model, its quantizers taken off by hand."""
    run, report = measured
    windows = evaluation_tokens(AutoTokenizer.from_pretrained(llama), load_texts(str(text), "evaluation"), 64, 4)
    model, _ = rotoboa.load(run, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "transform"):
            object.__setattr__(module.transform, "quantizer", None)
        if hasattr(module, "rotoboa_transform"):
            for name in ("key", "value"):
                object.__setattr__(module.rotoboa_transform, name, None)
    full = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    found, original = (
        part(windows, use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1) for part in (model, full)
    )
    kl = nn.functional.kl_div(found, original, log_target=True, reduction="batchmean")
    assert report["sources"]["kl"]["weights"] == pytest.approx(float(kl), rel=1e-3)


def test_what_is_not_quantized_is_no_source(llama: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    report = rotoboa.quantize(make_recipe("w2a16", {"model": str(llama), "output": tmp_path / "weights", **CHEAP}))
    found = report["sources"]
    assert list(found["kl"]) == list(found["blocks"]) == ["weights", "all"]
    assert found["kl"]["weights"] == found["kl"]["all"] == pytest.approx(kl_of(report), rel=1e-4)
    assert found["blocks"]["weights"] == found["blocks"]["all"]
    changes = {"model": str(llama), "output": tmp_path / "keys", "cache.key_bits": 2, "weights.bits": 8}
    report = rotoboa.quantize(make_recipe("w4a16", {**changes, **CHEAP}))
    found = report["sources"]
    assert list(found["kl"]) == ["weights", "keys", "all"]
    assert found["kl"]["keys"] == pytest.approx(kl_of(report), rel=0.05), "weights in 8 bits cost next to nothing"
    assert found["kl"]["weights"] < 0.02 * found["kl"]["keys"]


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "opt", "phi3"])
def test_families(save_family: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    """Experts, online R1, LayerNorm, merged layers."""
    model = save_family(tmp_path / name, name)
    small = {"calibration.samples": 4, "calibration.sequence_length": 40, "evaluation.windows": 2}
    report = rotoboa.quantize(
        make_recipe("w4a4kv4", {"model": str(model), "output": tmp_path / "run", **small, **CHEAP})
    )
    found = report["sources"]
    assert list(found["kl"]) == SOURCES
    assert found["exact"] < 1e-4 < min(found["kl"].values())
    assert found["kl"]["all"] == pytest.approx(kl_of(report), rel=0.02)


# -- when it is measured ----------------------------------------------------------------------------------------------


def test_evaluating_measures_them_afterwards(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = Path(shutil.copytree(measured[0], tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    sources = report.pop("sources")
    (run / "report.json").write_text(json.dumps(report))
    fewer = evaluating.evaluate(run, sources=True, windows=2).to_json()
    assert fewer["sources"]["tokens"] == [2, 64] and fewer["perplexity"] == {}
    assert "sources" not in json.loads((run / "report.json").read_text()), "what was cut short is not kept"
    assert evaluating.evaluate(run, sources=True).to_json()["sources"] == sources
    assert json.loads((run / "report.json").read_text()) == report | {"sources": sources}


def test_another_seed_of_the_rotation_is_that_of_the_run(llama: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The seed that was chosen, which no recipe has."""
    changes = {"model": str(llama), "output": tmp_path / "run", "rotation.seeds": 4, "rotation.r1": "merged", **CHEAP}
    report = rotoboa.quantize(make_recipe("w4a4kv4", changes))
    assert report["seeds"]["rotation"] > 0, "the first one is the best: nothing is shown"
    assert evaluating.evaluate(tmp_path / "run", sources=True).to_json()["sources"] == report["sources"]


def test_a_run_that_goes_on_measures_them_once(
    llama: Path,
    make_recipe: MakeRecipe,
    interrupted: Callable[..., Path],
    tmp_path: Path,
    measured: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe("w4a4kv4", {"model": str(llama), "output": tmp_path / "run", **CHEAP})
    interrupted(recipe, stages, "peak_so_far")  # after everything that is measured
    monkeypatch.setattr(stages, "measure_sources", lambda *arguments: pytest.fail("measured again"))
    assert rotoboa.quantize(recipe)["sources"] == measured[1]["sources"]
