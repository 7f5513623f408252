"""One block of a small random Llama: streams and results against plain forward passes, and what settings are for."""

from typing import Any

import pytest
import torch

from rotoboa.boa.block.block import quantize_block
from rotoboa.boa.block.context import Streams, needs_full
from rotoboa.boa.online.transforms import OnlineTransforms
from rotoboa.boa.solver.rounding_settings import Settings

from ..small_block import (
    LLAMA,
    PLAIN,
    QUANTIZED,
    QUICK,
    ROTATED,
    SHAPES,
    forward,
    make_block,
    make_context,
    make_decoder,
    make_streams,
    make_tensors,
    run_small,
)

# streams and results


@pytest.mark.parametrize("transforms", [PLAIN, ROTATED, QUANTIZED], ids=["plain", "rotated", "w4a4kv4"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
@pytest.mark.parametrize("drift", [True, False])
def test_streams_are_forward_passes(drift: bool, method: str, transforms: OnlineTransforms) -> None:
    ran = run_small(QUICK.but(method=method, drift=drift), transforms)
    full, quantized = make_streams()
    decoder = make_decoder()
    block = make_block(decoder, transforms)
    # float32 throughout; values are of order 10.
    torch.testing.assert_close(ran.full, forward(decoder, block, full, transforms, exact=True), rtol=0, atol=1e-5)
    expected = forward(decoder, ran.context.quantized, quantized, transforms, exact=False)
    torch.testing.assert_close(ran.quantized, expected, rtol=0, atol=1e-5)
    assert (ran.full - ran.quantized).abs().max() > 0.01


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
def test_results(method: str, group_size: int | None) -> None:
    reported: list[tuple[str, float]] = []
    settings = QUICK.but(method=method, group_size=group_size)
    ran = run_small(settings, QUANTIZED, report=lambda *seen: reported.append(seen))
    found, context = ran.found, ran.context
    assert list(found.results) == list(found.losses) == list(LLAMA.projections)
    assert reported == list(found.losses.items())
    original = make_block(make_decoder(), QUANTIZED)
    for name, (rows, columns) in SHAPES.items():
        result, weight = found.results[name], context.quantized.get_parameter(f"{name}.weight")
        assert result.integers.shape == (rows, columns) and result.integers.dtype == torch.uint8
        assert result.scale.shape == result.zero.shape == (rows, columns // (group_size or columns))
        assert int(result.integers.max()) <= 15
        assert torch.equal(weight, result.dequantize())
        given = original.get_parameter(f"{name}.weight")
        assert torch.equal(context.full.get_parameter(f"{name}.weight"), given), "the full block was written to"
        # Rows and heads in their places: others than its own would be 1.4 away. The target moves by some of this.
        assert (weight - given).norm() < 0.5 * given.norm()
        assert 0 < found.losses[name] < 0.2
    for name in (LLAMA.attention_norm, LLAMA.mlp_norm):
        assert torch.equal(context.quantized.get_parameter(f"{name}.weight"), make_tensors()[f"{name}.weight"])


@pytest.mark.parametrize("transforms", [PLAIN, QUANTIZED], ids=["plain", "w4a4kv4"])
def test_going_on_from_results_gives_the_same_bits(transforms: OnlineTransforms) -> None:
    settings = QUICK
    first = run_small(settings, transforms)
    again = run_small(settings, transforms, previous=first.found.results)
    assert torch.equal(again.full, first.full) and torch.equal(again.quantized, first.quantized)
    assert list(again.found.results) == list(first.found.results)
    for name, result in first.found.results.items():
        other = again.found.results[name]
        assert torch.equal(other.integers, result.integers)
        assert torch.equal(other.scale, result.scale) and torch.equal(other.zero, result.zero)
        weights = [ran.context.quantized.get_parameter(f"{name}.weight") for ran in (first, again)]
        assert torch.equal(*weights)


def test_the_quantized_copy_shares_weights_until_they_are_replaced() -> None:
    decoder = make_decoder()
    block = make_block(decoder, PLAIN)
    before = {name: weight.clone() for name, weight in block.named_parameters()}
    context = make_context(decoder, block)
    for name, weight in context.quantized.named_parameters():
        assert weight is not block.get_parameter(name) and weight.data_ptr() == block.get_parameter(name).data_ptr()
    quantize_block(context, Streams(*make_streams()))
    projections = {f"{name}.weight" for name in decoder.family.projections}
    for name, given in before.items():
        assert torch.equal(block.get_parameter(name), given)
        assert torch.equal(context.quantized.get_parameter(name), given) == (name not in projections)


def test_values_without_the_output_projection() -> None:
    """aespa's own objective of the values; whatever comes before them is as it was."""
    settings = Settings(bits=2, method="aespa", refine=1, starts=1, tabu=0, iterations=20)
    with_output, without = (run_small(settings.but(value_output=on)).found.results for on in (True, False))
    for name in (LLAMA.query, LLAMA.key):
        assert torch.equal(with_output[name].integers, without[name].integers)
    assert not torch.equal(with_output[LLAMA.value].integers, without[LLAMA.value].integers)


@pytest.mark.parametrize("transforms", [PLAIN, QUANTIZED], ids=["plain", "w4a4kv4"])
@pytest.mark.parametrize(("method", "start"), [("aespa", "boa"), ("adaround", "gptq")])
def test_learned_rounding_lowers_the_loss_of_every_layer(method: str, start: str, transforms: OnlineTransforms) -> None:
    """In the first layers, whose statistics no earlier choice of integers has changed."""
    settings = Settings(bits=2, refine=2, starts=1, tabu=0, iterations=200, learning_rate=0.05)
    learned, plain = (run_small(settings.but(method=name), transforms).found.losses for name in (method, start))
    assert list(learned) == list(LLAMA.projections)
    before, after = (losses[LLAMA.query] + losses[LLAMA.key] for losses in (plain, learned))
    assert after < before


def test_twice_is_the_same() -> None:
    first, second = run_small(transforms=QUANTIZED), run_small(transforms=QUANTIZED)
    assert torch.equal(first.quantized, second.quantized)
    for name, result in first.found.results.items():
        assert torch.equal(result.integers, second.found.results[name].integers)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batch_size_does_not_matter(batch: int) -> None:
    """Sums over tokens come in another order, so that a rounding at the brink may fall the other way: 1 % of them."""
    first, second = run_small(batch=2), run_small(batch=batch)
    torch.testing.assert_close(first.full, second.full, rtol=0, atol=1e-5)
    differing = total = 0
    for name, result in first.found.results.items():
        other = second.found.results[name]
        differing += int((result.integers != other.integers).sum())
        total += result.integers.numel()
    assert differing <= 0.01 * total
    assert (first.quantized - second.quantized).norm() < 0.02 * first.quantized.norm()


# what each setting is for


def test_methods_in_order() -> None:
    """What the block's output has lost on the calibration text, at 3 bits: nearest, GPTQ, BoA."""
    lost = {}
    for method in ("rtn", "gptq", "boa"):
        ran = run_small(QUICK.but(bits=3, method=method, refine=4))
        lost[method] = float((ran.full - ran.quantized).norm())
    assert lost["gptq"] < 0.9 * lost["rtn"] and lost["boa"] < 0.9 * lost["rtn"]


def test_drift_brings_the_streams_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rotoboa.boa.objective.objective.FEW_TOKENS", 0
    )  # on the text that is rounded by, shrunk or not
    runs = [run_small(QUICK.but(drift=on)) for on in (True, False)]
    lost = [float((ran.full - ran.quantized).norm()) for ran in runs]
    assert lost[0] < 0.97 * lost[1]


@pytest.mark.parametrize("transforms", [PLAIN, QUANTIZED], ids=["plain", "w4a4kv4"])
def test_plain_gptq_finds_the_same_without_the_full_stream(transforms: OnlineTransforms) -> None:
    settings = QUICK.but(method="gptq", alpha=0.0)
    assert not needs_full(settings, LLAMA)
    both, alone = (run_small(settings, transforms, follows_full=follows) for follows in (True, False))
    assert torch.equal(alone.quantized, both.quantized) and alone.found.losses == both.found.losses
    assert all(torch.equal(alone.found.results[n].integers, r.integers) for n, r in both.found.results.items())
    assert torch.equal(alone.full, make_streams()[0]) and not torch.equal(both.full, alone.full)


def test_rounding_to_nearest_finds_the_same_without_the_full_stream() -> None:
    """Whatever part of the shift a recipe has: it takes none."""
    settings = QUICK.but(method="rtn", alpha=0.25)
    assert not needs_full(settings, LLAMA)
    both, alone = (run_small(settings, QUANTIZED, follows_full=follows) for follows in (True, False))
    assert torch.equal(alone.quantized, both.quantized)
    assert all(torch.equal(alone.found.results[n].integers, r.integers) for n, r in both.found.results.items())


@pytest.mark.parametrize("change", [{"alpha": 0.25}, {"method": "boa"}, {"zfold": ("down",)}])
def test_what_needs_the_full_stream(change: dict[str, Any]) -> None:
    assert needs_full(QUICK.but(**{"method": "gptq", "alpha": 0.0, **change}), LLAMA)
