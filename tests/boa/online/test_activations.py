"""The dynamic quantizer against a loop over single numbers."""

import pytest
import torch
from torch import Tensor

from rotoboa.boa.online import activations
from rotoboa.boa.online.activations import RATIOS, SEARCHED, DynamicQuantizer

MODES = [(True, 1.0), (True, 0.9), (False, 1.0), (False, 0.95)]
# Tokens of ordinary keys, with outliers, of one sign, far from zero, tiny, and long.
TOKENS = 40


def _tokens(seed: int = 0, width: int = 24) -> Tensor:
    x = torch.randn(TOKENS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0:8, 3] *= 30
    x[8:16] = x[8:16].abs()
    x[16:20] -= 50
    x[20:24] *= 1e-20
    x[24:28] *= 1e20
    return x


def _slowly(x: list[float], quantizer: DynamicQuantizer) -> tuple[list[int], float, int]:
    """Levels, scale and zero point of one token, by the docstring's table; Python rounds half to even, as torch."""
    if quantizer.symmetric:
        top = 2 ** (quantizer.bits - 1) - 1
        scale = max(abs(v) for v in x) / (top / quantizer.clip)
        return [max(-top - 1, min(top, round(v / scale))) for v in x], scale, 0
    top = 2**quantizer.bits - 1
    low, high = min(*x, 0) * quantizer.clip, max(*x, 0) * quantizer.clip
    scale = (high - low) / top
    zero = round(-low / scale)
    return [max(0, min(top, round(v / scale) + zero)) for v in x], scale, zero


def _reference(x: Tensor, quantizer: DynamicQuantizer) -> Tensor:
    rows = []
    for token in x.double().tolist():
        levels, scale, zero = _slowly(token, quantizer)
        rows.append([(level - zero) * scale for level in levels])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("symmetric", "clip"), MODES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_the_loop(bits: int, symmetric: bool, clip: float) -> None:
    quantizer, x = DynamicQuantizer(bits, symmetric, clip), _tokens()
    # The same operations in the same order, in float64: no difference at all.
    assert torch.equal(quantizer(x), _reference(x, quantizer))


@pytest.mark.parametrize(("symmetric", "clip"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, symmetric: bool, clip: float) -> None:
    quantizer = DynamicQuantizer(4, symmetric, clip)
    x = _tokens()[:20].to(dtype)
    given = x.clone()
    y = quantizer(x)
    assert y.dtype == dtype and torch.equal(x, given)
    # One rounding of the scale in float32, one of the result in `dtype`: a level more or less would be 5% of the range.
    eps = max(torch.finfo(dtype).eps, 2 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(y.double(), _reference(x, quantizer), rtol=eps, atol=0)


@pytest.mark.parametrize(("symmetric", "clip"), MODES)
@pytest.mark.parametrize("bits", [2, 4])
def test_levels_are_few_and_evenly_spaced(bits: int, symmetric: bool, clip: float) -> None:
    quantizer, x = DynamicQuantizer(bits, symmetric, clip), _tokens(1, width=200)
    for token, y in zip(x.tolist(), quantizer(x), strict=True):
        _, scale, zero = _slowly(token, quantizer)
        levels = y / scale + zero
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        assert low <= levels.round().min() and levels.round().max() <= high
        assert len(y.unique()) <= 2**bits


def test_worked_example_of_the_docstring() -> None:
    x = torch.tensor([0.9, -0.2, 0.4, -1.0])
    assert DynamicQuantizer(2)(x).tolist() == [1, 0, 0, -1]


def test_worked_example_asymmetric() -> None:
    """Range -1 .. 2 in 3 steps of 1, zero point 1."""
    x = torch.tensor([-1.0, 2.0, 0.6, -0.4])
    assert DynamicQuantizer(2, symmetric=False)(x).tolist() == [-1, 2, 1, 0]


def test_lowest_level_is_used_where_clipping_reaches_it() -> None:
    """Symmetric, 2 bits, clip 0.5: scale 0.5 gives -2 .. 1 times it."""
    assert DynamicQuantizer(2, clip=0.5)(torch.tensor([-1.0, 1.0, 0.2])).tolist() == [-1.0, 0.5, 0.0]


@pytest.mark.parametrize(("symmetric", "clip"), MODES)
def test_each_vector_has_its_own_scale(symmetric: bool, clip: float) -> None:
    quantizer, x = DynamicQuantizer(4, symmetric, clip), _tokens().view(2, 5, 4, 24)
    alone = torch.stack([quantizer(token) for token in x.flatten(0, 2)]).view_as(x)
    assert torch.equal(quantizer(x), alone)


@pytest.mark.parametrize(("symmetric", "clip"), MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_token(dtype: torch.dtype, symmetric: bool, clip: float) -> None:
    assert torch.equal(
        DynamicQuantizer(4, symmetric, clip)(torch.zeros(3, 8, dtype=dtype)), torch.zeros(3, 8, dtype=dtype)
    )


@pytest.mark.parametrize(("symmetric", "clip"), MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e-20, -0.3, 1.0, 5.0, -2e4, 1e30])
def test_constant_token(value: float, dtype: torch.dtype, symmetric: bool, clip: float) -> None:
    """It becomes `clip` times itself, as any token's extreme does."""
    x = torch.full((8,), value, dtype=dtype)
    levels = 8 if symmetric and value < 0 and clip < 1 else 7  # the lowest level lies one step further out
    factor = clip * levels / 7
    rtol = max(torch.finfo(dtype).eps, 2 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps)
    torch.testing.assert_close(DynamicQuantizer(4, symmetric, clip)(x), x * factor, rtol=rtol, atol=0)


@pytest.mark.parametrize("search", [False, True])
def test_zero_is_a_level(search: bool) -> None:
    """Of tokens far from it too, so that a level less the zero point is no more than the levels are."""
    x, quantizer = _tokens(), DynamicQuantizer(4, symmetric=False, search=search)
    scale, zero = quantizer.grid(quantizer.span(x))
    assert zero is not None and zero.min() >= 0 and zero.max() <= 15
    assert (quantizer(x) / scale)[16:20].max() < -10


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_twice_is_once_where_the_extreme_is_kept(bits: int) -> None:
    """Symmetric at clip 1 always; asymmetric where the least value lies on the grid, as zero does."""
    x = _tokens()
    once = DynamicQuantizer(bits)(x)
    torch.testing.assert_close(DynamicQuantizer(bits)(once), once, rtol=1e-15, atol=0)
    quantizer = DynamicQuantizer(bits, symmetric=False)
    x = x - x.amin(-1, keepdim=True)
    once = quantizer(x)
    torch.testing.assert_close(quantizer(once), once, rtol=1e-15, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step(symmetric: bool) -> None:
    """At clip 1, where nothing is clipped but by the rounding of the asymmetric zero point, half a step more."""
    x = _tokens()
    for token, y in zip(x, DynamicQuantizer(4, symmetric)(x), strict=True):
        _, scale, _ = _slowly(token.tolist(), DynamicQuantizer(4, symmetric))
        assert (token - y).abs().max() <= scale * (0.5 if symmetric else 1.0) * (1 + 1e-9)


@pytest.mark.parametrize(("symmetric", "clip"), MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_group_has_its_own_scale(dtype: torch.dtype, symmetric: bool, clip: float) -> None:
    x = _tokens()[:20].view(2, 10, 24).to(dtype)
    for group in (1, 3, 8, 12):
        y = DynamicQuantizer(4, symmetric, clip, group)(x)
        assert y.shape == x.shape and y.dtype == dtype
        parts = [DynamicQuantizer(4, symmetric, clip)(part) for part in x.split(group, -1)]
        assert torch.equal(y, torch.cat(parts, -1))
    whole = DynamicQuantizer(4, symmetric, clip)(x)
    assert torch.equal(DynamicQuantizer(4, symmetric, clip, 24)(x), whole) and not torch.equal(y, whole)


def test_groups_of_what_is_not_contiguous() -> None:
    x, quantizer = _tokens().view(4, 10, 24), DynamicQuantizer(4, group_size=8)
    assert torch.equal(quantizer(x.transpose(0, 1)), quantizer(x).transpose(0, 1))
    assert torch.equal(quantizer(x.mT[..., :8]), quantizer(x.mT[..., :8].contiguous()))
    assert quantizer(x[:0]).shape == (0, 10, 24)


def test_groups_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(RuntimeError):
        DynamicQuantizer(4, group_size=7)(_tokens())


def test_sixteen_bits_are_none() -> None:
    assert DynamicQuantizer.of(16, True, 0.9) is None
    assert DynamicQuantizer.of(16, True, 0.9, 8) is None
    assert DynamicQuantizer.of(4, False, 0.95) == DynamicQuantizer(4, False, 0.95)
    assert DynamicQuantizer.of(4, False, 0.95, 8) == DynamicQuantizer(4, False, 0.95, 8)


def _chosen(x: Tensor, symmetric: bool, bits: int) -> Tensor:
    """Each token at the ratio of least squared error, the first of several alike; one after the other."""
    rows = []
    for token in x:
        tried = [_reference(token[None], DynamicQuantizer(bits, symmetric, ratio)) for ratio in RATIOS]
        scale = token.abs().max() / (2 ** (bits - 1) - 1)
        for zero in () if symmetric else (2 ** (bits - 1), 2 ** (bits - 1) - 1):
            tried.append(((token[None] / scale).round().add(zero).clamp(0, 2**bits - 1) - zero) * scale)
        errors = [float((y - token).square().sum()) for y in tried]
        rows.append(tried[errors.index(min(errors))])
    return torch.cat(rows)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_token_chooses_its_ratio(bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _tokens(width=200)[:20]
    quantizer, expected = DynamicQuantizer(bits, symmetric, search=True), _chosen(x, symmetric, bits)
    found = quantizer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    monkeypatch.setattr(activations, "CHUNK", 2000)  # two tokens at a time
    assert torch.equal(quantizer(x), found) and torch.equal(quantizer(x.view(4, 5, 200)), found.view(4, 5, 200))
    assert quantizer(x[:0]).shape == quantizer(x[:0].float()).shape == (0, 200)
    used = {round(float(span / whole), 6) for span, whole in zip(
        quantizer.span(x)[:, -1], DynamicQuantizer(bits, symmetric).span(x)[:, -1], strict=True
    )}  # fmt: skip
    assert len(used) > 1


def test_each_group_chooses_its_ratio() -> None:
    x = _tokens(2)[:20]
    found = DynamicQuantizer(4, group_size=8, search=True)(x)
    parts = [DynamicQuantizer(4, search=True)(part) for part in x.split(8, -1)]
    assert torch.equal(found, torch.cat(parts, -1))


@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_massive_token_is_kept_whole_beside_others_that_are_clipped(symmetric: bool, group_size: int | None) -> None:
    """Of one channel far above the others a rotation makes entries that all lie at the peak."""
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(3))
    x[0] = 1000 * x[0].sign()
    y = DynamicQuantizer(4, symmetric, group_size=group_size, search=True)(x)
    torch.testing.assert_close(y[0], x[0], rtol=1e-6, atol=0)
    for clip in (1.0, 0.9, 0.8):
        other = DynamicQuantizer(4, symmetric, clip, group_size)(x)
        assert (y[1:] - x[1:]).norm() < (other[1:] - x[1:]).norm()


@pytest.mark.parametrize("bits", [SEARCHED + 1, 8])
def test_many_levels_are_not_clipped(bits: int) -> None:
    x = _tokens()
    quantizer = DynamicQuantizer.of(bits, True, 0.9, search=True)
    assert quantizer is not None and torch.equal(quantizer(x), DynamicQuantizer(bits)(x))
