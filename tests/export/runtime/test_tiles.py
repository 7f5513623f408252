"""Four-bit weights in torch's own order: the same integers, and the same product to rounding."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.transforms import InputTransform
from rotoboa.export.packing import pack
from rotoboa.export.runtime import linear, tiles
from rotoboa.export.runtime.linear import QuantizedLinear
from rotoboa.export.runtime.memory import model_bytes

pytestmark = pytest.mark.skipif(not tiles.available(), reason="needs AVX-512")
GROUPS = [None, 32, 64, 128, 192, 256, 768]


def layer(group: int | None, *, rows: int = 128, bias: bool = True, quantizer: bool = False) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(group or 0)
    transform = InputTransform(quantizer=DynamicQuantizer(8, group_size=64)) if quantizer else None
    made = QuantizedLinear(768, rows, bits=4, group_size=group, bias=bias, transform=transform)
    made.qweight = pack(torch.randint(16, (rows, 768), generator=generator, dtype=torch.uint8), 4)
    made.scale = (torch.rand(made.scale.shape, generator=generator) * 0.02 + 0.005).half()
    made.zero = torch.randint(16, made.zero.shape, generator=generator, dtype=torch.uint8)
    if made.bias is not None:
        made.bias.data = torch.randn(rows, generator=generator).bfloat16()
    return made


def x(count: int) -> Tensor:
    return torch.randn(count, 768, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each call of the product had."""
    seen: list[int] = []

    def product(x: Tensor, *rest: Tensor) -> Tensor:
        seen.append(len(x))
        return tiles.product(x, *rest)

    monkeypatch.setattr(linear, "product", product)
    yield seen


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_equals_the_floats_to_rounding(group: int | None, bias: bool, calls: list[int]) -> None:
    made, few, many = layer(group, bias=bias), x(3), x(tiles.TOKENS + 1)
    exact = made.dequantize(torch.float64)
    offset = 0 if made.bias is None else made.bias.double()
    before = made(many)
    for batch in (few, many, few[:1]):
        expected = batch.double() @ exact.T + offset
        error = (made(batch).double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.004  # a dense product in bfloat16: 0.0025
    assert calls == [3, 1]
    assert torch.equal(made.dequantize(torch.float64), exact)  # its integers, from the tiles
    torch.testing.assert_close(made(many), before, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_integers_are_held_once_and_saved_as_before() -> None:
    made = layer(128)
    words, size = made.qweight.clone(), model_bytes(made)
    made(x(1))
    assert made.qweight.dtype == torch.uint8 and model_bytes(made) < 1.1 * size
    other = copy.deepcopy(made)
    assert torch.equal(made.state_dict()["qweight"], words) and set(made.state_dict()) == set(layer(128).state_dict())
    assert torch.equal(other(x(1)), made(x(1)))
    other.load_state_dict(layer(128).state_dict())
    assert torch.equal(other.qweight, words) and model_bytes(other) == size
    made(x(1))
    assert torch.equal(made.to(torch.float32).qweight, words)


@torch.no_grad()
def test_quantized_inputs_come_first(calls: list[int]) -> None:
    """In groups that are no product of integers."""
    made = layer(None, quantizer=True)
    quantizer = made.transform.quantizer
    assert quantizer is not None
    expected = quantizer(x(2)).double() @ made.dequantize(torch.float64).T
    error = (made(x(2)).double() - made.bias.double() - expected).square().mean().sqrt()
    assert calls == [2] and error < 0.006 * expected.square().mean().sqrt()


@torch.no_grad()
@pytest.mark.parametrize(("rows", "group", "dtype"), [(96, 128, torch.bfloat16), (128, 16, torch.bfloat16),
                                                      (128, 128, torch.float32)])  # fmt: skip
def test_others_are_left_alone(rows: int, group: int, dtype: torch.dtype) -> None:
    made = layer(group, rows=rows)
    made(x(1).to(dtype))
    assert made.qweight.dtype == torch.int32 and made.tile_grid is None


@torch.no_grad()
def test_a_large_matrix_goes_by_parts() -> None:
    words = layer(128, rows=8192).qweight
    found = tiles.tiled(words, 768)
    assert torch.equal(pack(tiles.untiled(found), 4), words)
