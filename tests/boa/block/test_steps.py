"""Each step of a block by itself finds what the whole block finds in its place, to the last bit."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import nn

from rotoboa.boa.block.attention_step import center_keys, quantize_attention
from rotoboa.boa.block.block_output import learn_output
from rotoboa.boa.block.context import BlockContext, BlockResult, Streams
from rotoboa.boa.block.experts_step import quantize_experts
from rotoboa.boa.block.fold_step import fold_channels
from rotoboa.boa.block.mlp_step import quantize_mlp
from rotoboa.boa.block.solving import Layers, solve_layers
from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.online.attention import NAME
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import SITES

from ..small_block import (
    HIDDEN,
    LLAMA,
    PLAIN,
    QUANTIZED,
    QUICK,
    SHAPES,
    block_tensors,
    make_block,
    make_context,
    make_decoder,
    make_streams,
    run_block,
    run_small,
)

ATTENTION = (LLAMA.query, LLAMA.key, LLAMA.value, LLAMA.output)
CENTERED = replace(QUANTIZED, attention=replace(QUANTIZED.attention, centered=True))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterable[None]:
    with torch.no_grad():
        yield


def _context(**options: object) -> BlockContext:
    decoder = make_decoder()
    return make_context(decoder, make_block(decoder, QUANTIZED), **{"transforms": QUANTIZED, **options})  # type: ignore[arg-type]


def _streams() -> Streams:
    return Streams(*make_streams())


def _same(found: dict[str, Quantized], whole: dict[str, Quantized], names: Iterable[str]) -> None:
    assert list(found) == list(names)
    for name, part in found.items():
        for tensor in ("integers", "scale", "zero"):
            assert torch.equal(getattr(part, tensor), getattr(whole[name], tensor)), (name, tensor)


def _where_attention_leaves(context: BlockContext) -> Streams:
    """Both streams after the attention of the whole block."""
    streams = _streams()
    quantize_attention(context, streams)
    return streams


# -- steps that quantize -----------------------------------------------------------------------------------------------


def test_attention() -> None:
    whole, context, streams = run_small(transforms=QUANTIZED), _context(), _streams()
    before = context.full.state_dict()
    found = quantize_attention(context, streams)
    _same(found.results, whole.found.results, ATTENTION)
    assert found.losses == {name: whole.found.losses[name] for name in ATTENTION}
    for name, tensor in context.quantized.state_dict().items():  # the MLP is as it was
        assert torch.equal(tensor, before[name]) == (name.removesuffix(".weight") not in ATTENTION)


def test_attention_rounds_keys_without_their_center() -> None:
    whole = run_small(transforms=CENTERED).found
    context, centers = center_keys(_context(transforms=CENTERED), _streams())
    found = quantize_attention(context, _streams())
    _same(found.results, whole.results, ATTENTION)
    assert torch.equal(*(tensor for part in (centers, whole) for tensor in part.centers.values()))


def test_mlp() -> None:
    """From a quantized attention that is given as the result of an earlier run."""
    whole = run_small(transforms=QUANTIZED)
    context, streams = _context(), _where_attention_leaves(_context(previous=whole.found.results))
    found = quantize_mlp(context, streams)
    _same(found.results, whole.found.results, (LLAMA.gate, LLAMA.up, LLAMA.down))
    assert torch.equal(streams.full, whole.full) and torch.equal(streams.quantized, whole.quantized)


def test_experts(family_model: Callable[..., nn.Module]) -> None:
    model = family_model("mixtral")
    decoder = Decoder(model.config, attention=NAME)
    block, tensors = decoder.empty_block(0), block_tensors(model, decoder, 0)
    tensors = {name: tensors[name] for name in block.state_dict()}
    whole = run_block(decoder, decoder.block(0, tensors), QUICK, PLAIN, make_streams())
    streams = Streams(*make_streams())
    quantize_attention(make_context(decoder, decoder.block(0, tensors), previous=whole.found.results), streams)
    found = quantize_experts(make_context(decoder, decoder.block(0, tensors)), streams)
    names = [name for i in range(decoder.shape.experts) for name in decoder.family.expert(i)]
    _same(found.results, whole.found.results, names)
    assert found.fallbacks == whole.found.fallbacks
    assert torch.equal(streams.full, whole.full) and torch.equal(streams.quantized, whole.quantized)


# -- before and after them ---------------------------------------------------------------------------------------------


def test_fold() -> None:
    settings = QUICK.but(bits=2, zfold=SITES)
    whole = run_small(settings).found
    decoder = make_decoder()
    context, (full, _) = make_context(decoder, make_block(decoder), settings), make_streams()
    before = full.clone()
    found = fold_channels(context, full)
    assert torch.equal(full, before) and not found.results
    assert list(found.channel_scales) == list(SITES) and list(found.folded) == list(whole.folded)
    for site, scales in found.channel_scales.items():
        assert torch.equal(scales.zeta, whole.channel_scales[site].zeta)
    for name, tensor in whole.folded.items():
        assert torch.equal(found.folded[name], tensor)
        for block in (context.full, context.quantized):
            assert torch.equal(block.get_parameter(name), tensor)


def test_the_output_of_the_block() -> None:
    """From what boa finds, given the streams before and after it."""
    settings = QUICK.but(bits=2, method="brecq", iterations=40, learning_rate=0.05)
    whole = run_small(settings).found
    start = run_small(settings.but(method="boa"))
    found = learn_output(replace(start.context, settings=settings), start.found.results, make_streams()[1], start.full)
    _same(found.results, whole.results, LLAMA.projections)
    assert found.output_error == whole.output_error
    assert any(not torch.equal(r.integers, start.found.results[n].integers) for n, r in found.results.items())


# -- what they are made of ---------------------------------------------------------------------------------------------


def test_solving_layers() -> None:
    """Two that share an objective get their own rows, and their weights, dequantized."""
    told: list[tuple[str, float]] = []
    context = _context(report=lambda *seen: told.append(seen))
    x = torch.randn(3 * HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))
    objective, names = Objective((x.T @ x)[None]), [LLAMA.gate, LLAMA.up]
    found = solve_layers(context, Layers(names, lambda: objective, [1, 1]))
    both = quantize(torch.stack([context.weight(name) for name in names]), objective, context.settings)
    rows = SHAPES[LLAMA.gate][0]
    assert torch.equal(both.integers.flatten(0, 1)[:rows], found.results[LLAMA.gate].integers)
    assert told == list(found.losses.items()) and list(found.losses) == names
    for name in names:
        weight = context.quantized.get_parameter(f"{name}.weight")
        assert torch.equal(weight, found.results[name].dequantize()) and not torch.equal(weight, context.weight(name))
    again = _context(previous=found.results)
    earlier = solve_layers(again, Layers(names, lambda: pytest.fail("it is solved already"), [1, 1]))
    _same(earlier.results, found.results, names)
    assert torch.equal(again.quantized.get_parameter(f"{LLAMA.up}.weight"), found.results[LLAMA.up].dequantize())


def test_results_of_steps_are_put_together() -> None:
    one = torch.ones(1, 1)
    first, second = Quantized(one, one, one), Quantized(2 * one, one, one)
    a = BlockResult({"q": first, "k": first}, {"q": 0.1}, output_error=(2.0, 1.0))
    b = BlockResult({"k": second}, {"k": 0.2}, fallbacks={"up": 3})
    both = a | b
    assert both.results["q"] is first and both.results["k"] is second and a.results["k"] is first
    assert both.losses == {"q": 0.1, "k": 0.2} and both.fallbacks == {"up": 3} and both.output_error == (2.0, 1.0)
