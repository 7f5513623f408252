"""R1 is left out, or warned of, in a model whose norms silence massive channels; elsewhere it is merged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import rotoboa
from rotoboa.pipeline.measure.evaluating import evaluate
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.rotation.placement import HARMFUL

MakeRecipe = Callable[..., Recipe]


def _silence(tensors: dict[str, Tensor]) -> None:
    """Channel 3 of the stream is massive, and the norms hand little of it on."""
    tensors["model.embed_tokens.weight"][:, 3] = 2000
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor.fill_(1.0)[3] = 1e-3


@pytest.fixture(scope="module")
def silenced(
    save_llama: Callable[..., Path], change_tensors: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return change_tensors(save_llama(tmp_path_factory.mktemp("silenced")), _silence)


def _run(make_recipe: MakeRecipe, model: Path, output: Path, r1: str, **changes: Any) -> dict[str, Any]:
    fixed = {"model": str(model), "output": output, "weights.method": "rtn", "rotation.r1": r1}
    return rotoboa.quantize(make_recipe("w4a16", {**fixed, **changes}))


def _config(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((run / "model" / "config.json").read_text())["quantization_config"]
    return config


def _of_r1(report: dict[str, Any]) -> list[str]:
    return [notice for notice in report["notices"] if "R1" in notice]


def test_auto_leaves_r1_out(silenced: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    found = _run(make_recipe, silenced, tmp_path / "auto", "auto", **{"evaluation.sources": True})
    none = _run(make_recipe, silenced, tmp_path / "none", "none")
    merged = _run(make_recipe, silenced, tmp_path / "merged", "merged")
    assert found["perplexity"] == none["perplexity"] != merged["perplexity"]
    assert not _config(tmp_path / "auto")["r1"] and _config(tmp_path / "merged")["r1"]
    noise = json.loads((tmp_path / "auto" / "manifest.json").read_text())["r1_noise"]
    assert noise > HARMFUL and any(f"R1 is left out: merged, it would make the noise of rounding {noise:.0f}" in n
                                   for n in found["notices"])  # fmt: skip
    assert any(n.startswith("Merged R1 makes the noise") for n in merged["notices"]) and not _of_r1(none)
    assert found["sources"]["exact"] < 1e-4
    again = evaluate(tmp_path / "auto", sources=True, windows=2).to_json()
    assert again["sources"]["exact"] < 1e-4


def test_auto_merges_r1(llama: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    found = _run(make_recipe, llama, tmp_path / "auto", "auto")
    merged = _run(make_recipe, llama, tmp_path / "merged", "merged")
    assert found["perplexity"] == merged["perplexity"] and _config(tmp_path / "auto")["r1"]
    assert not _of_r1(found) and not _of_r1(merged)


def test_auto_leaves_r1_out_where_it_cannot_be_merged(
    save_family: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    _run(make_recipe, save_family(tmp_path, "gemma2"), tmp_path / "run", "auto")
    assert not _config(tmp_path / "run")["r1"] and not _config(tmp_path / "run")["online_r1"]
