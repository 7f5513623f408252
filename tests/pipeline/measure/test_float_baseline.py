"""The baseline of four-bit floating point: the original weights rounded to nearest, on scales of their own size."""

import pytest

from rotoboa.export.runtime.linear import QuantizedLinear
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.measure.measuring import rounded_block

from ...fixtures import MakeRecipe


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4"])
def test_weights_are_near_the_original(recipe: str, llama: object, make_recipe: MakeRecipe) -> None:
    job = prepare(make_recipe(recipe, {"model": str(llama)}), "cpu")
    weight = job.checkpoint.block(0)["mlp.down_proj.weight"].float()
    layer = rounded_block(job, 0).get_submodule("mlp.down_proj")
    assert isinstance(layer, QuantizedLinear)
    found = layer.dequantize(weight.dtype)
    assert 0.002 < float((found - weight).square().mean() / weight.square().mean()) < 0.02
