"""Models without a row through whole runs: measured as transformers measures them, saved, loaded, computed again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.errors import InputError
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.generic.generic_decoder import decoder_for
from rotoboa.pipeline.estimate.plan import plan
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
    for key in (key for key in before.keys() - packed if ".experts." not in key):
        torch.testing.assert_close(after[key], before[key], msg=f"{key} is untouched")
    with pytest.raises(InputError, match=f"this is a '{name}'"):
        export(tmp_path / "run", "compressed-tensors")


@torch.no_grad()
@pytest.mark.parametrize("name", GENERIC)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Block by block as the whole model: masks, windows, biases of attention and factors are the model's own."""
    folder, ids = save_generic(tmp_path / "model", name), _tokens(3, 40)
    checkpoint = Checkpoint(folder)
    decoder, outer = decoder_for(checkpoint.config), checkpoint.outer_layers()
    checkpoint.check(decoder.shapes)
    hidden = decoder.embed(outer, ids)
    for index in range(decoder.shape.blocks):
        hidden = decoder.run(decoder.block(index, checkpoint.block(index)), hidden)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(decoder.logits(outer)(hidden), expected, rtol=1e-4, atol=1e-4)


def test_what_is_left_would_not_be_what_was_asked_for(
    make_recipe: Callable[..., Any], save_family: Callable[..., Path], tmp_path: Path
) -> None:
    model = save_generic(tmp_path / "model", "helium")
    for fields, words in (
        ({"weights.method": "brecq"}, "brecq learns blocks that have one"),
        ({"weights.budget": 3.0}, "bits are not chosen by a budget there"),
    ):
        recipe = make_recipe("w4a16", {"model": str(model), "output": tmp_path / "run", **SMALL, **fields})
        with pytest.raises(InputError, match=rf"is a 'helium' model, which has no row of its own, and {words}"):
            rotoboa.quantize(recipe)
        assert not (tmp_path / "run").exists()
    variant = save_family(tmp_path / "variant", "phi", qk_layernorm=True)  # its type has a row, which it is not
    for one in (model, variant):
        with pytest.raises(InputError, match="what a run of it takes is not estimated: start the run"):
            plan(make_recipe("w4a16", {"model": str(one)}))
