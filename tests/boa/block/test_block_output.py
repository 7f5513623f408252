"""Learned rounding on the output of a block: the error against a plain forward pass, gradients, units, what is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.block.block_output import BlockOutput, StraightThrough, straight_through, transformed
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import NAME
from rotoboa.boa.online.transforms import OnlineTransforms
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.models.decoder import Decoder

from ..small_block import (
    HIDDEN,
    PLAIN,
    QUANTIZED,
    ROTATED,
    Ran,
    block_tensors,
    make_block,
    make_decoder,
    run_block,
)

SEQUENCES, LENGTH = 6, 40
SETTINGS = Settings(bits=2, method="brecq", refine=1, starts=1, tabu=0, iterations=80, learning_rate=0.05)


def _streams(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    full = torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator)
    return full.to(dtype), (full + 0.05 * torch.randn(full.shape, generator=generator)).to(dtype)


def _weights(decoder: Decoder, block: nn.Module) -> dict[str, Tensor]:
    return {name: block.get_parameter(f"{name}.weight").detach() for name in decoder.family.projections}


def test_error_is_that_of_a_forward_pass() -> None:
    decoder = make_decoder(dtype=torch.float64)
    block, (wanted, given) = make_block(decoder), _streams(torch.float64)
    output = BlockOutput(decoder, block, PLAIN, given, wanted)
    weights = {name: 1.1 * weight for name, weight in _weights(decoder, block).items()}
    moved = make_block(decoder)
    for name, weight in weights.items():
        moved.get_parameter(f"{name}.weight").copy_(weight)
    tokens = (decoder.run(moved, given) - wanted).square().mean(-1)
    assert float(output.error(weights, torch.arange(SEQUENCES))) == pytest.approx(float(tokens.mean()), rel=1e-12)
    assert float(output.error(weights, torch.tensor([2]))) == pytest.approx(float(tokens[2].mean()), rel=1e-12)
    assert output.whole(weights, 3) == pytest.approx(float(tokens.mean()), rel=1e-12)


def test_gradient_against_finite_differences() -> None:
    """Rotations between the layers, and no quantizer: the error is smooth."""
    decoder = make_decoder(dtype=torch.float64)
    block, (wanted, given) = make_block(decoder), _streams(torch.float64)
    output, weights = BlockOutput(decoder, block, ROTATED, given, wanted), _weights(decoder, block)
    rows = torch.arange(2)
    found = output.gradients(weights, rows)
    assert list(found) == list(decoder.family.projections)
    for name, weight in weights.items():
        largest = divmod(int(found[name].abs().argmax()), weight.shape[1])
        for index in ((0, 0), largest):
            ends = []
            for way in (2e-3, -2e-3):  # no less: the norms compute in float32
                moved = weight.clone()
                moved[index] += way
                ends.append(float(output.error({**weights, name: moved}, rows)))
            assert float(found[name][index]) == pytest.approx((ends[0] - ends[1]) / 4e-3, rel=1e-2, abs=1e-4)


def test_gradient_passes_the_quantizers() -> None:
    """Straight through: that of the smooth function, taken where the quantized values are."""
    quantizer = DynamicQuantizer(4, True, 0.9)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    through = StraightThrough(4, True, 0.9)(x)
    torch.testing.assert_close(through.detach(), quantizer(x.detach()), rtol=0, atol=1e-15)
    (slope,) = torch.autograd.grad(through.square().sum(), x)
    torch.testing.assert_close(slope, 2 * through.detach(), rtol=0, atol=0)
    changed = straight_through(QUANTIZED)
    assert changed.down.rotation == QUANTIZED.down.rotation
    assert isinstance(changed.attention.key, StraightThrough) and straight_through(PLAIN) == PLAIN
    decoder = make_decoder()
    block, (wanted, given) = make_block(decoder), _streams()
    found = BlockOutput(decoder, block, QUANTIZED, given, wanted).gradients(_weights(decoder, block), torch.arange(2))
    assert all(slope.isfinite().all() and slope.any() for slope in found.values())


def test_transforms_are_taken_off_again() -> None:
    decoder = make_decoder()
    block, (full, _) = make_block(decoder), _streams()
    plain = decoder.run(block, full)
    with transformed(decoder, block, QUANTIZED):
        assert not torch.allclose(decoder.run(block, full), plain)
    assert torch.equal(decoder.run(block, full), plain)


def test_units_are_half_the_curvature() -> None:
    """Against the trace of the Hessian of the error, near its minimum."""
    decoder = make_decoder(dtype=torch.float64)
    block, (wanted, given) = make_block(decoder), _streams(torch.float64)
    wanted = decoder.run(block, given) + 0.01 * (wanted - given)
    output, weights, rows = BlockOutput(decoder, block, PLAIN, given, wanted), _weights(decoder, block), torch.arange(2)
    name = decoder.family.output  # in which the block is not linear: the MLP follows
    scales = {key: torch.full_like(weight, 0.02) for key, weight in weights.items()}
    trace = 0.0
    for i in range(0, weights[name].numel(), 7):
        ends = []
        for way in (1e-3, 0.0, -1e-3):
            moved = weights[name].clone()
            moved.view(-1)[i] += way
            ends.append(float(output.error({**weights, name: moved}, rows)))
        trace += (ends[0] - 2 * ends[1] + ends[2]) / 1e-6 / len(range(0, weights[name].numel(), 7))
    # One sample of random signs, every seventh weight of the trace.
    assert output.units(weights, scales, rows)[name] == pytest.approx(0.02**2 * trace / 2, rel=0.3)


def _run(settings: Settings, transforms: OnlineTransforms = PLAIN, **options: Any) -> Ran:
    decoder = make_decoder()
    return run_block(decoder, make_block(decoder), settings, transforms, _streams(), **options)


@pytest.mark.parametrize("transforms", [PLAIN, QUANTIZED], ids=["plain", "w4a4kv4"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_output_error_falls(group_size: int | None, transforms: OnlineTransforms) -> None:
    """On the streams themselves, from the result of boa; on its grids."""
    settings = SETTINGS.but(group_size=group_size)
    start, full, before, _ = _run(settings.but(method="boa"), transforms)
    found, full_again, after, context = _run(settings, transforms)
    assert torch.equal(full, full_again)
    errors = [float((q - full).square().mean()) for q in (before, after)]
    assert found.output_error == pytest.approx(errors, rel=0.02)  # of values at the edge of two levels
    assert errors[1] < 0.95 * errors[0]
    for name, result in found.results.items():
        first = start.results[name]
        assert torch.equal(result.scale, first.scale) and torch.equal(result.zero, first.zero)
        assert result.integers.dtype == torch.uint8 and int(result.integers.max()) <= 3
        assert int((result.integers.int() - first.integers.int()).abs().max()) <= 1
        assert torch.equal(context.quantized.get_parameter(f"{name}.weight"), result.dequantize())
    assert found.losses == start.losses
    assert any(not torch.equal(r.integers, start.results[name].integers) for name, r in found.results.items())


def test_what_would_be_worse_is_not_kept() -> None:
    """A learning rate that leads nowhere: the start, and its streams."""
    start, _, before, _ = _run(SETTINGS.but(method="boa"))
    found, _, after, _ = _run(SETTINGS.but(iterations=3, learning_rate=50.0))
    assert found.output_error is not None and found.output_error[0] == found.output_error[1]
    assert torch.equal(before, after)
    assert all(torch.equal(r.integers, start.results[name].integers) for name, r in found.results.items())


@pytest.mark.parametrize("transforms", [PLAIN, QUANTIZED], ids=["plain", "w4a4kv4"])
def test_going_on_gives_the_same_bits(transforms: OnlineTransforms) -> None:
    first, full, quantized, _ = _run(SETTINGS.but(iterations=20), transforms)
    again, full_again, quantized_again, _ = _run(SETTINGS.but(iterations=20), transforms, previous=first.results)
    assert torch.equal(full, full_again) and torch.equal(quantized, quantized_again)
    assert again.output_error is None
    second = _run(SETTINGS.but(iterations=20), transforms)
    assert all(torch.equal(r.integers, second.found.results[name].integers) for name, r in first.results.items())


@pytest.mark.parametrize("name", ["qwen3", "phi3", "opt", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"])
def test_families(family_model: Callable[..., nn.Module], name: str) -> None:
    """Norms after the layers, merged layers, soft caps, experts: every projection is learned."""
    model = family_model(name)
    decoder = Decoder(model.config, attention=NAME)
    tensors = block_tensors(model, decoder, 0)  # OPT's LayerNorms without their biases, which are not folded here
    block = decoder.block(0, {name: tensors[name] for name in decoder.empty_block(0).state_dict()})
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(3, 40, HIDDEN, generator=generator)
    quantized = full + 0.05 * torch.randn(full.shape, generator=generator)
    settings = SETTINGS.but(iterations=30, learning_rate=0.1)
    found = run_block(decoder, block, settings, PLAIN, (full, quantized)).found
    assert found.output_error is not None and found.output_error[1] < found.output_error[0]
    assert list(found.results) == list(decoder.family.projections)
    assert quantized.isfinite().all()
