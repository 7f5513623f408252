"""A block of a model without a row: each group of layers on what those before it make of the quantized stream."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rotoboa.boa.block.block import quantize_block
from rotoboa.boa.block.context import BlockContext, Share, Streams, shared_copy
from rotoboa.boa.block.forward_parts import capture, capture_all
from rotoboa.boa.online.transforms import OnlineTransforms
from rotoboa.boa.ranks import Ranks
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.generic.generic_decoder import decoder_for
from rotoboa.tests.generic_models import save_generic

from ..small_block import Solved

GPTQ = Settings(bits=3, refine=1, starts=1, tabu=0, method="gptq")
SEQUENCES, LENGTH = 3, 24
FIRST = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_generic(tmp_path_factory.mktemp("model"), "helium"))


def _streams() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    full = torch.randn(SEQUENCES, LENGTH, 32, generator=generator)
    return full, full + 0.05 * torch.randn(full.shape, generator=generator)


def _context(checkpoint: Checkpoint, **options: object) -> BlockContext:
    decoder = decoder_for(checkpoint.config)
    block, share = decoder.block(1, checkpoint.block(1)), Share.of(Ranks(), SEQUENCES, 2)
    return BlockContext(decoder, block, shared_copy(block), GPTQ, OnlineTransforms(), share, **options)  # type: ignore[arg-type]


def _input(decoder: Decoder, block: torch.nn.Module, layer: str, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return capture(block.get_submodule(layer), partial(decoder.run, block, hidden)).flatten(0, 1)


def test_objectives_are_those_of_layers(checkpoint: Checkpoint, solved: Solved) -> None:
    """Of queries, then keys and values, which have fewer rows; and so on. The shift of targets is of their inputs."""
    context = _context(checkpoint)
    full, quantized = (part.clone() for part in _streams())
    found = quantize_block(context, Streams(full, quantized))
    assert tuple(found.results) == context.family.projections
    assert [weight.shape for weight, _ in solved] == [
        *((1, 32, 32), (2, 16, 32), (1, 32, 32), (2, 48, 32), (1, 32, 48)),
    ]
    for layer, (_, goal) in zip(FIRST, (solved[i] for i in (0, 2, 3, 4)), strict=True):
        before_full, before_quantized = _streams()
        # What comes before the layer is quantized; what comes after it does not matter.
        x = _input(context.decoder, context.quantized, layer, before_quantized)
        wanted = _input(context.decoder, context.full, layer, before_full)
        assert goal.h_out is None and goal.residual is not None
        torch.testing.assert_close(goal.h_in[0], x.T @ x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(goal.residual[0], (wanted - x).T @ x, rtol=1e-3, atol=1e-3)


def test_streams_are_forward_passes_and_go_on(checkpoint: Checkpoint) -> None:
    """Both are the block's output; a run that goes on from the results has the same ones, and solves nothing."""
    context = _context(checkpoint)
    full, quantized = (part.clone() for part in _streams())
    found = quantize_block(context, Streams(full, quantized))
    with torch.no_grad():
        torch.testing.assert_close(full, context.decoder.run(context.full, _streams()[0]))
        torch.testing.assert_close(quantized, context.decoder.run(context.quantized, _streams()[1]))
    assert (full - quantized).abs().max() > 0.01
    again = tuple(part.clone() for part in _streams())
    quantize_block(_context(checkpoint, previous=found.results), Streams(*again))
    assert torch.equal(again[0], full) and torch.equal(again[1], quantized)


def test_an_expert_is_calibrated_on_its_tokens(tmp_path: Path, solved: Solved) -> None:
    """By the routing of the quantized stream, a token by the square of its weight; one with few on tokens of all."""
    checkpoint = Checkpoint(save_generic(tmp_path / "model", "flex_olmo"))
    decoder, generator = decoder_for(checkpoint.config), torch.Generator().manual_seed(6)
    block, share = decoder.block(1, checkpoint.block(1)), Share.of(Ranks(), 6, 2)
    context = BlockContext(decoder, block, shared_copy(block), GPTQ, OnlineTransforms(), share)
    full = torch.randn(6, LENGTH, 32, generator=generator)
    before = full + 0.05 * torch.randn(full.shape, generator=generator)
    found = quantize_block(context, Streams(full, before.clone()))
    assert tuple(found.results) == context.family.projections
    with torch.no_grad():
        experts = context.quantized.get_submodule(str(context.family.experts))
        x, index, weights = capture_all(experts, partial(decoder.run, context.quantized, before))
    counts = torch.bincount(index.flatten(), minlength=4)
    few = {name for name in found.fallbacks if name.endswith("down_proj")}
    assert few == {f"mlp.experts.{i}.down_proj" for i in range(4) if counts[i] < 32} and len(few) < 4
    goals = [goal for weight, goal in solved if weight.shape == (2, 48, 32)]
    for i in (i for i in range(4) if counts[i] >= 32):
        p = (weights * (index == i)).sum(-1, keepdim=True)
        torch.testing.assert_close(goals[i].h_in[0], (x * p).T @ (x * p), rtol=1e-3, atol=1e-3)
