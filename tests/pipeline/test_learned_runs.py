"""Runs with learned rounding: what is reported of them, and that one that is interrupted ends like one that is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rotoboa
from rotoboa.boa.ranks import Ranks
from rotoboa.errors import InputError
from rotoboa.pipeline import quantizing
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
SHORT = {"weights.iterations": 8, "weights.learning_rate": 0.1, "weights.bits": 2, "evaluation.baseline": False}


@pytest.mark.parametrize("method", ["adaround", "aespa", "brecq"])
def test_interrupted_after_a_block(
    llama: Path, make_recipe: MakeRecipe, interrupted: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    def recipe(name: str) -> Recipe:
        changes = {"model": str(llama), "output": tmp_path / name, "weights.method": method, **SHORT}
        return make_recipe("w4a4kv4", changes)

    report = rotoboa.quantize(recipe("whole"))
    assert report["recipe"]["weights"]["method"] == method
    interrupted(recipe("parts"), quantizing, "quantize_block", call=2)
    rotoboa.quantize(recipe("parts"))
    for file in ("blocks/00000.safetensors", "blocks/00001.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    blocks = [_blocks(tmp_path / name) for name in ("whole", "parts")]
    assert [block["layers"] for block in blocks[0]] == [block["layers"] for block in blocks[1]]
    assert ["output_error" in block for block in blocks[1]] == [method == "brecq"] * 2
    if method == "brecq":
        assert all(0 < block["output_error"][1] <= block["output_error"][0] for block in blocks[0])


def _blocks(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["blocks"]
    return found


def test_brecq_is_of_one_process(llama: Path, make_recipe: MakeRecipe) -> None:
    ranks = Ranks()
    ranks.size = 2
    with pytest.raises(InputError, match="one process"):
        prepare(make_recipe("w2a16", {"model": str(llama), "weights.method": "brecq"}), ranks=ranks)
