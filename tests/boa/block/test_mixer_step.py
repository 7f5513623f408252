"""Blocks without attention through the quantizer: a gated delta net, a short convolution."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rotoboa.boa.solver.rounding_settings import Settings

from ..small_block import Solved, run_block
from .test_block_families import HIDDEN, ROTATIONS, SETTINGS, Setup

NAMES = ("qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid")  # whose first blocks have none


@pytest.mark.parametrize("rotated", ROTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_streams_are_forward_passes(family_model: Callable[..., nn.Module], name: str, rotated: str) -> None:
    setup = Setup(family_model(name), 16 if rotated == "plain" else 4, index=0, **ROTATIONS[rotated])
    found, full, quantized, context = run_block(setup.decoder, setup.block, SETTINGS, setup.transforms, setup.streams())
    before_full, before_quantized = setup.streams()
    torch.testing.assert_close(full, setup.forward(setup.block, before_full, exact=True), rtol=0, atol=2e-5)
    expected = setup.forward(context.quantized, before_quantized, exact=False)
    assert ((quantized - expected).abs() > 1e-4).float().mean() < 0.02
    assert (full - quantized).abs().max() > 0.01
    family = setup.decoder.family.at(0)
    assert family.mixed and sorted(found.results) == sorted(family.projections)
    for name in family.kept:  # what is kept is what it was
        assert torch.equal(context.quantized.get_parameter(f"{name}.weight"), context.weight(name))


@pytest.mark.parametrize("method", ["boa", "gptq"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_have_the_objective_of_their_inputs(
    family_model: Callable[..., nn.Module], name: str, solved: Solved, method: str
) -> None:
    setup = Setup(family_model(name), index=0)
    full, quantized = setup.streams()
    settings = Settings(bits=4, refine=1, starts=1, tabu=0, method=method)  # type: ignore[arg-type]
    run_block(setup.decoder, setup.block, settings, setup.transforms, (full, quantized.clone()))
    family = setup.decoder.family.at(0)
    x = setup.block.get_submodule(family.attention_norm)(quantized).flatten(0, 1)
    width = setup.block.get_parameter(f"{family.output}.weight").shape[1]
    readers = solved[: len(family.mixed)]
    for weight, goal in readers:
        assert weight.shape[-1] == HIDDEN and goal.h_out is None
        torch.testing.assert_close(goal.h_in[0], x.T @ x, rtol=1e-4, atol=1e-4)
    assert sum(weight.shape[:2].numel() for weight, _ in readers) == sum(
        len(setup.block.get_parameter(f"{name}.weight")) for name in family.mixed
    )
    output, goal = solved[len(family.mixed)]
    assert output.shape == (1, HIDDEN, width) and goal.h_in.shape == (1, width, width) and goal.h_out is None


@pytest.mark.parametrize("name", NAMES)
def test_going_on_gives_the_same(family_model: Callable[..., nn.Module], name: str) -> None:
    def run(**options: Any) -> tuple[Any, torch.Tensor]:
        setup = Setup(family_model(name), 4, index=0, r1=True, r4=True)
        found, _, quantized, _ = run_block(
            setup.decoder, setup.block, SETTINGS, setup.transforms, setup.streams(), **options
        )
        return found.results, quantized

    results, quantized = run()
    _, again = run(previous=results)
    assert torch.equal(quantized, again)
