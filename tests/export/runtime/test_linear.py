"""The packed layer against its dequantized weight in float64, on both of its ways."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.directions import LeadingDirections, leading
from rotoboa.boa.online.transforms import InputTransform
from rotoboa.export.packing import pack
from rotoboa.export.runtime import linear
from rotoboa.export.runtime.linear import QuantizedLinear, integer_product, pad_for_cuda
from rotoboa.rotation.hadamard import Hadamard

ALL_BITS = range(2, 9)
FAST_INTEGERS = linear.fast_integers
ACTIVATIONS = [None, DynamicQuantizer(4, clip=0.9), DynamicQuantizer(8), DynamicQuantizer(4, False, 0.95),
               DynamicQuantizer(8, False), DynamicQuantizer(4, search=True),
               DynamicQuantizer(4, False, search=True)]  # fmt: skip
NAMES = ["a16", "a4", "a8", "a4 asymmetric", "a8 asymmetric", "a4 searched", "a4 asymmetric, searched"]


@pytest.fixture(autouse=True)
def _integers_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways are tested on any processor."""
    monkeypatch.setattr(linear, "fast_integers", lambda device: True)


def layer(
    inputs: int,
    outputs: int,
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    bias: bool = True,
    transform: InputTransform | None = None,
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(inputs * bits)
    made = QuantizedLinear(inputs, outputs, bits=bits, group_size=group_size, bias=bias, transform=transform)
    made.qweight = pack(torch.randint(0, 2**bits, (outputs, inputs), generator=generator, dtype=torch.uint8), bits)
    made.scale = (torch.rand(made.scale.shape, generator=generator) * 0.1 + 0.01).half()
    made.zero = torch.randint(0, 2**bits, made.zero.shape, generator=generator, dtype=torch.uint8)
    if symmetric:
        made.zero.fill_(2 ** (bits - 1))
    if made.bias is not None:
        made.bias.data.normal_(generator=generator)
    return made


def tokens(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x[..., 3] *= 20
    return x


def simulated(module: QuantizedLinear, x: Tensor) -> Tensor:
    """What calibration computes: quantized and dequantized input times the dequantized weight, float64."""
    y = module.transform(x).double() @ module.dequantize(torch.float64).T
    return y if module.bias is None else y + module.bias.double()


def ways(module: QuantizedLinear, x: Tensor) -> str:
    return "integers" if module.counts(module.transform.quantizer, x.device) else "floats"


@pytest.mark.parametrize("quantizer", ACTIVATIONS, ids=NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_equals_the_simulation(bits: int, symmetric: bool, quantizer: DynamicQuantizer | None) -> None:
    for inputs, outputs, count in ((64, 24, 5), (100, 7, 1), (33, 40, 30)):
        module = layer(inputs, outputs, bits, symmetric=symmetric, transform=InputTransform(None, quantizer))
        x = tokens(2, count, inputs)
        floats = quantizer is None or (quantizer.bits == 8 and not quantizer.symmetric)  # a level less its zero point
        assert ways(module, x) == ("floats" if floats else "integers")
        expected = simulated(module, x)
        assert module(x).shape == (2, count, outputs) and module(x).dtype == torch.float64
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("quantizer", ACTIVATIONS, ids=NAMES)
@pytest.mark.parametrize(("bits", "group"), [(2, 8), (2, 16), (3, 32), (4, 8), (4, 32), (5, 8), (8, 16)])
def test_groups_equal_the_simulation(bits: int, group: int, quantizer: DynamicQuantizer | None) -> None:
    module = layer(96, 24, bits, group_size=group, transform=InputTransform(None, quantizer))
    x = tokens(6, 96)
    assert ways(module, x) == "floats"
    expected = simulated(module, x)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "activations"), [(2, 4), (3, 2), (4, 4), (4, 8), (5, 3), (8, 8)])
def test_groups_of_activations_equal_the_simulation(
    bits: int, activations: int, symmetric: bool, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale a row; groups of weights as wide, wider, narrower; and such as neither divides."""
    monkeypatch.setattr(linear, "_COLUMNS", 8)
    for group, weights in ((16, None), (16, 16), (8, 24), (24, 8), (12, 12), (96, 16), (96, None), (32, 24)):
        quantizer = DynamicQuantizer(activations, symmetric, clip, group)
        module = layer(96, 24, bits, group_size=weights, transform=InputTransform(None, quantizer))
        x = tokens(2, 3, 96)
        by_integers = activations + (not symmetric) <= 8 and (group, weights) not in ((96, 16), (32, 24))
        assert ways(module, x) == ("integers" if by_integers else "floats")
        expected = simulated(module, x)
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
        flat = replace(module.transform, quantizer=replace(quantizer, group_size=None))
        assert group == 96 or (flat(x) @ module.dequantize(torch.float64).T - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, 128])
@pytest.mark.parametrize("group", [64, 128])
def test_groups_of_activations_in_parts(
    group: int, weights: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_CHUNK", {"cpu": 16 * 384})
    quantizer = DynamicQuantizer(4, True, 0.9, group)
    module = layer(384, 50, 4, group_size=weights, transform=InputTransform(Hadamard.of(384), quantizer)).to(dtype)
    x = tokens(6, 384).to(dtype)
    assert ways(module, x) == ("integers" if group == 128 else "floats")
    expected = simulated(module, x)
    assert (module(x).double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize(("capability", "fast"), [("AVX2", False), ("NO AVX", False), ("AVX512", True)])
def test_processors_without_fast_integers_compute_from_floats(
    capability: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(linear, "fast_integers", FAST_INTEGERS.__wrapped__)
    module, x = layer(64, 10, 4, transform=InputTransform(None, DynamicQuantizer(4))), tokens(5, 64)
    assert ways(module, x) == ("integers" if fast else "floats")
    expected = simulated(module, x)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rotation_comes_before_the_quantizer(bits: int) -> None:
    quantizer = DynamicQuantizer(4)
    module = layer(96, 24, bits, bias=False, transform=InputTransform(Hadamard.of(96), quantizer))
    x = tokens(6, 96)
    expected = quantizer(Hadamard.of(96).apply(x)) @ module.dequantize(torch.float64).T
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", ACTIVATIONS[:2], ids=["a16", "a4"])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_dtypes(bits: int, group: int | None, quantizer: DynamicQuantizer | None, dtype: torch.dtype) -> None:
    module = layer(96, 24, bits, group_size=group, transform=InputTransform(None, quantizer)).to(dtype)
    x = tokens(6, 96).to(dtype)
    expected, found = simulated(module, x), module(x)
    assert found.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_large_sums_do_not_overflow_float16() -> None:
    """Integers alone would reach 64 * 1000 * 15, scales bring that back."""
    module = layer(64, 8, 4, bias=False).half()
    module.scale.fill_(1e-3)
    module.zero.zero_()
    module.qweight.fill_(-1)
    y = module(torch.full((2, 64), 1000.0, dtype=torch.float16))
    assert y.isfinite().all() and (y - 960).abs().max() <= 2


@pytest.mark.parametrize("quantizer", ACTIVATIONS[:2], ids=["a16", "a4"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_parts_give_what_the_whole_gives(
    bits: int, quantizer: DynamicQuantizer | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = layer(64, 50, bits, transform=InputTransform(None, quantizer)), tokens(9, 64)
    expected = module(x)
    monkeypatch.setattr(linear, "_CHUNK", {"cpu": 16 * 64})
    assert len(list(module._parts(x.device))) == 4
    torch.testing.assert_close(module(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (1, 1, 64)])
def test_shapes(shape: tuple[int, ...]) -> None:
    for quantizer in ACTIVATIONS[:2]:
        module = layer(64, 10, 4, transform=InputTransform(None, quantizer)).float()
        assert module(torch.ones(shape)).shape == (*shape[:-1], 10)


def test_extremes_of_both_are_exact() -> None:
    """The largest sum of 8-bit integers, which float32 could not hold: 16384 * 127 * 255 and a one."""
    module = layer(16384, 8, 8, bias=False, transform=InputTransform(None, DynamicQuantizer(8)))
    module.qweight.fill_(-1)  # 255 everywhere
    module.zero.zero_()
    module.scale.fill_(1.0)
    x = torch.full((1, 16384), 127.0, dtype=torch.float64)
    x[0, 5] = 1
    assert module(x).tolist() == [[(16383 * 127 + 1) * 255] * 8]


class Largest(TorchDispatchMode):
    """The largest tensor of a dtype that any operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements[result.dtype] = max(self.elements.get(result.dtype, 0), result.numel())
        return result


@pytest.mark.parametrize("quantizer", ACTIVATIONS[:2], ids=["a16", "a4"])
def test_no_float_of_the_weights_size(quantizer: DynamicQuantizer | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With integers no float at all is made of the weight, without a part at a time."""
    monkeypatch.setattr(linear, "_CHUNK", {"cpu": 16 * 256})
    module = layer(256, 512, 4, transform=InputTransform(None, quantizer))
    before = {name: buffer.data_ptr() for name, buffer in module.named_buffers()}
    with Largest() as largest, torch.no_grad():
        module(tokens(2, 256).float())
    assert largest.elements[torch.float32] <= (16 * 256 if quantizer is None else 2 * 512)
    assert largest.elements[torch.uint8] <= 16 * 256
    assert {name: buffer.data_ptr() for name, buffer in module.named_buffers()} == before


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 64, 8), (16, 30, 7), (17, 8, 9), (40, 33, 24)])
def test_padding_for_cuda(rows: int, columns: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (outputs, columns), generator=generator, dtype=torch.int8)
    padded, transposed = pad_for_cuda(x, weight)
    assert padded.shape[0] > 16 and padded.shape[1] % 8 == transposed.shape[1] % 8 == 0
    expected = x.long() @ weight.long().T
    assert torch.equal((padded.long() @ transposed.long())[:rows, :outputs], expected)
    assert torch.equal(integer_product(x, weight).long(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantizer", ACTIVATIONS, ids=NAMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_cuda(bits: int, quantizer: DynamicQuantizer | None) -> None:
    for inputs, outputs, count in ((64, 24, 5), (100, 7, 1), (33, 40, 30)):
        module, x = layer(inputs, outputs, bits, transform=InputTransform(None, quantizer)), tokens(2, count, inputs)
        expected = simulated(module, x)
        found = module.cuda()(x.cuda()).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_scales_stay_float16() -> None:
    module = nn.Sequential(layer(64, 8, 4)).to(torch.bfloat16)[0]
    assert module.scale.dtype == torch.float16 and module.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_directions_are_columns_beside_the_integers(symmetric: bool, dtype: torch.dtype) -> None:
    x = tokens(40, 96)
    rest = DynamicQuantizer(4, symmetric, search=True)
    module = layer(96, 24, 4, transform=InputTransform(None, LeadingDirections.of(rest, 96, 5))).to(dtype)
    module.get_buffer("input_directions").copy_(leading(x.T @ x, 5))
    assert module.get_buffer("input_directions").dtype == torch.bfloat16 and ways(module, x) == "floats"
    assert module.counts(rest, x.device)
    expected = simulated(replaced(module), x.to(dtype))
    scale, eps = float(expected.abs().max()), torch.finfo(dtype).eps
    assert (module(x.to(dtype)).double() - expected).abs().max() <= 4 * max(eps, 2**-22) * scale
    module.load_state_dict(module.state_dict())
    assert module.through is None  # of another weight, maybe


def replaced(module: QuantizedLinear) -> QuantizedLinear:
    """The same with what it holds in its transform."""
    module.transform = module.transform.of(module)
    return module
