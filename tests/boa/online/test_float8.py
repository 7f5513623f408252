"""Static FP8: against every number of E4M3 in float64, against compressed-tensors; the scale that a peak asks for."""

import math

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import Tensor

from rotoboa.boa.block.block_output import StraightThroughFloat8
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import AttentionTransform
from rotoboa.boa.online.float8 import StaticFloat8, scale_of
from rotoboa.boa.online.transforms import InputTransform
from rotoboa.export.formats.compressed_floats import static_float8

SCALES = pytest.mark.parametrize("scale", [2.0**-14, 0.0625, 1.0, 8.0])


@pytest.fixture
def x() -> Tensor:
    """Numbers of all sizes, those beside which E4M3 has no more, halves between neighbours."""
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 4, 500)
    x[0, :6] = torch.tensor([0.0, 448.0, -448.0, 449.0, 1e6, 464.0])
    x[1, :5] = torch.tensor([17.0, 19.0, -17.0, 2**-10, 3 * 2**-10])
    return x


def slowly(x: Tensor, scale: float) -> Tensor:
    """The nearest of all finite numbers of E4M3; of two the one with an even code."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]
    means, even = codes.double() * scale, codes.view(torch.uint8) % 2 == 0
    off = (x.double().flatten()[:, None] - means).abs()
    off[:, ~even] *= 1 + 1e-12
    return means[off.argmin(1)].view(x.shape)


@SCALES
def test_numbers_go_to_the_nearest(x: Tensor, scale: float) -> None:
    for own in (scale, torch.tensor([scale])):
        quantizer = StaticFloat8(own)
        assert torch.equal(quantizer(x * scale).double(), slowly(x * scale, scale))
        assert torch.equal(quantizer(x.double() * scale), slowly(x * scale, scale))
    assert quantizer.codes(x).dtype == torch.float8_e4m3fn and quantizer(x.bfloat16()).dtype == torch.bfloat16
    worked = StaticFloat8(2.0)(torch.tensor([1.0, 0.1, 1000.0]))
    assert worked.tolist() == [1.0, 0.1015625, 896.0]


@SCALES
def test_it_is_what_compressed_tensors_computes(x: Tensor, scale: float) -> None:
    found = fake_quantize(x * scale, torch.tensor([scale]), None, static_float8())
    assert torch.equal(StaticFloat8(scale)(x * scale), found)


def test_a_scale_is_the_power_of_two_that_holds_the_peak() -> None:
    for peak in (0.1, 0.5, 1.0, 447.9, 448.0, 448.1, 5000.0):
        scale = scale_of(peak)
        assert math.log2(scale).is_integer() and peak / 448 <= scale < peak / 224
        assert StaticFloat8(scale)(torch.tensor(peak)) == pytest.approx(peak, rel=2**-4)
    assert scale_of(0.0) == 1.0 and scale_of(1e-30) == 2.0**-14 and scale_of(1e30) == 2.0**15


def test_what_holds_a_scale_gives_it_to_the_quantizer() -> None:
    module, transform = torch.nn.Module(), InputTransform(quantizer=StaticFloat8())
    x = torch.tensor([1000.0])
    transform.make_room(module)
    assert transform.of(module)(x) == 448 and transform.scale_name == "input_scale"
    module.get_buffer("input_scale").fill_(4.0)
    assert transform.of(module)(x) == 1024 and transform(x) == 448
    nvfp4 = InputTransform(quantizer=DynamicQuantizer(4, group_size=16, format="nvfp4"))
    assert nvfp4.scale_name == "input_global_scale" and InputTransform().scale_name is None
    cache = AttentionTransform(key=StaticFloat8(), value=DynamicQuantizer(4, False))
    found = cache.calibrated({"k_scale": torch.tensor([2.0]), "v_scale": torch.tensor([9.0])}.get)
    assert cache.scale_names == {"key": "k_scale"} and found.value == cache.value
    assert found.key is not None and found.key(x) == 896


def test_gradient_passes_it() -> None:
    x = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    through = StraightThroughFloat8(0.5)(x)
    torch.testing.assert_close(through.detach(), StaticFloat8(0.5)(x.detach()), rtol=0, atol=1e-15)
    (slope,) = torch.autograd.grad(through.square().sum(), x)
    torch.testing.assert_close(slope, 2 * through.detach(), rtol=0, atol=0)
