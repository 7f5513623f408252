"""Models without a row through whole runs: measured as transformers measures them, saved, loaded, computed again."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.errors import InputError
from rotoboa.pipeline.exporting import export, open_finished
from rotoboa.pipeline.storage.run_folder import RunFolder
from rotoboa.pipeline.verifying import run_logits
from rotoboa.tests.generic_models import GENERIC, save_generic

SMALL = {"calibration.samples": 4, "calibration.sequence_length": 40, "evaluation.windows": 2}


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", GENERIC)
def test_run_save_and_load(make_recipe: Callable[..., Any], tmp_path: Path, name: str) -> None:
    model = save_generic(tmp_path / "model", name)
    fields = {"model": str(model), "output": tmp_path / "run", **SMALL, "evaluation.report": False}
    report = rotoboa.quantize(
        make_recipe("w4a4kv4", {**fields, "weights.group_size": 8, "evaluation.references": True})
    )
    (notice,) = [one for one in report["notices"] if one.startswith("family generic")]
    assert "rotation.r1" in notice and "cache.key_bits" in notice and "activations.bits" in notice
    run = RunFolder.open(tmp_path / "run")
    finished = open_finished(run)
    for block in run.manifest.blocks:
        assert list(block.layers) == list(finished.family.projections)
        assert all(0 <= layer.loss < 0.1 for layer in block.layers.values())

    ids = _tokens(2, 30)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded, _ = rotoboa.load(tmp_path / "run", dtype=torch.float32)
    logits = loaded(ids, use_cache=False).logits
    torch.testing.assert_close(logits, run_logits(finished, ids), rtol=1e-3, atol=1e-3)
    wanted = original(ids, use_cache=False).logits
    assert 0.001 < (logits - wanted).norm() / wanted.norm() < 0.5, "quantized, and still the same model"
    before = original.state_dict()
    packed = {f"{finished.family.layers}.{i}.{n}.weight" for i in range(2) for n in finished.family.projections}
    after = loaded.state_dict()
    for key in before.keys() - packed:
        torch.testing.assert_close(after[key], before[key], msg=f"{key} is untouched")
    with pytest.raises(InputError, match=f"this is a '{name}'"):
        export(tmp_path / "run", "compressed-tensors")


@torch.no_grad()
@pytest.mark.parametrize("name", GENERIC)
def test_perplexity_is_that_of_transformers(make_recipe: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Block by block as the whole model, with all weights in 8 bits: biases, windows, factors are the model's own."""
    model = save_generic(tmp_path / "model", name)
    fields = {"model": str(model), "output": tmp_path / "run", **SMALL, "evaluation.report": False}
    report = rotoboa.quantize(
        make_recipe("w4a16", {**fields, "weights.bits": 8, "weights.group_size": 8, "weights.method": "rtn"})
    )
    (measured,) = report["perplexity"].values()
    assert measured["quantized"] == pytest.approx(measured["original"], rel=0.05)
    assert math.isfinite(measured["original"])
