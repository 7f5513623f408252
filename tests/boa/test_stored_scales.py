"""Scales of NVFP4, MXFP4 and FP8 against compressed-tensors, bit by bit, and the grids that are searched over them."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale, decompress_mx_scale
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_scheme import FP8_DYNAMIC, MXFP4, MXFP4A16, NVFP4, NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor

from rotoboa.boa import stored_scales
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.scheme import GROUPS
from rotoboa.boa.solver.grid import GridSettings, search
from rotoboa.boa.solver.rounding import quantize
from rotoboa.boa.solver.rounding_settings import Settings

from .problems import dense_losses, problem, random

STOCK: dict[str, QuantizationArgs] = {"nvfp4": NVFP4A16["weights"], "mxfp4": MXFP4A16["weights"]}
FORMATS = pytest.mark.parametrize("name", list(GROUPS))


def _settings(name: str, **fields: Any) -> Settings:
    return Settings.model_validate({"bits": 4, "group_size": GROUPS[name], "symmetric": True, "format": name, **fields})


def _weight(name: str) -> Tensor:
    """Groups of very different sizes, (40, 6 groups); one of zeros, and one of a single number."""
    weight = random(40, 6 * GROUPS[name], dtype=torch.float32) * torch.logspace(-4, 2, 40)[:, None]
    weight[3, : GROUPS[name]] = 0
    weight[4, 1 : GROUPS[name]] = 0
    return weight


def _stock(weight: Tensor, name: str, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and weights as compressed-tensors rounds to the nearest."""
    parts = weight.unflatten(-1, (-1, GROUPS[name]))
    scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), STOCK[name], global_scale=global_scale)
    return scale, fake_quantize(weight, scale, torch.tensor(0), STOCK[name], global_scale=global_scale)


@FORMATS
@pytest.mark.parametrize("own_global", [True, False])
def test_rounding_to_nearest_is_that_of_compressed_tensors(name: str, own_global: bool) -> None:
    weight = _weight(name)
    stock = generate_gparam(weight.min(), weight.max())
    factor = stored_scales.global_scale_of(float(weight.abs().max())) if own_global else float(stock)
    wide = torch.tensor([factor]) if name == "nvfp4" else None
    scale, expected = _stock(weight, name, wide)
    settings = _settings(name, method="rtn", grid="minmax").with_global_scale(factor)
    found = quantize(weight[None], None, settings)
    assert torch.equal(2 * found.scale[0], scale if wide is None else scale / wide)
    assert torch.equal(found.dequantize()[0], expected + 0.0)
    stored = stored_scales.encode(2 * found.scale[0], name, factor)
    assert torch.equal(
        stored, scale.to(torch.float8_e4m3fn) if wide is not None else compress_mx_scale(scale, torch.uint8)
    )
    assert torch.equal(stored_scales.decode(stored, name, factor), 2 * found.scale[0])


def test_a_global_scale_is_the_power_of_two_below_that_of_compressed_tensors() -> None:
    for peak in (1e-3, 0.7, 1.3125, 5.25, 300.0):
        own, stock = stored_scales.global_scale_of(peak), float(generate_gparam(torch.tensor(-peak), torch.tensor(0.0)))
        assert own <= stock * (1 + 1e-6) < 2 * own * (1 + 1e-6)
    assert stored_scales.global_scale_of(0.0) == 1


@FORMATS
def test_a_weight_is_exact_in_bfloat16(name: str) -> None:
    weight = _weight(name)[None]
    settings = _settings(name, method="rtn")
    found = quantize(weight, None, settings.with_global_scale(stored_scales.global_scale_of(200.0))).dequantize()
    assert torch.equal(found.bfloat16().float(), found)


def test_all_codes_and_their_neighbours() -> None:
    codes = torch.arange(1, 127, dtype=torch.uint8)
    scale = stored_scales.decode(codes.view(torch.float8_e4m3fn), "nvfp4", 8.0)
    assert torch.equal(stored_scales.encode(scale, "nvfp4", 8.0).view(torch.uint8), codes)
    assert torch.equal(stored_scales.beside(scale, 1, "nvfp4", 8.0)[:-1], scale[1:])
    assert stored_scales.beside(scale, 200, "nvfp4", 8.0).unique().tolist() == [448 / 8]
    middle = (scale[1:] + scale[:-1]) / 2
    assert torch.equal(stored_scales.nearest(middle * 1.001, "nvfp4", 8.0), scale[1:])
    assert torch.equal(stored_scales.nearest(middle * 0.999, "nvfp4", 8.0), scale[:-1])
    codes = torch.arange(27, 228, dtype=torch.uint8)
    scale = stored_scales.decode(codes, "mxfp4")
    assert torch.equal(scale, decompress_mx_scale(codes).float())
    assert torch.equal(stored_scales.encode(scale, "mxfp4"), codes)
    assert torch.equal(stored_scales.beside(scale, -2, "mxfp4")[2:], scale[:-2])
    assert torch.equal(stored_scales.nearest(scale * 1.499, "mxfp4"), scale)
    assert torch.equal(stored_scales.nearest(scale * 1.501, "mxfp4")[:-1], scale[1:])


@FORMATS
@pytest.mark.parametrize("method", ["diagonal", "hessian"])
def test_the_search_finds_the_best_storable_scale(name: str, method: str) -> None:
    size = GROUPS[name]
    weight, objective = problem(1, 6, size, h_out=False)
    settings = GridSettings(4, True, method, name, 64.0)
    h_in = objective.h_in if method == "hessian" else torch.diag_embed(objective.h_in.diagonal(dim1=1, dim2=2))
    scale, zero = search(weight, objective.h_in, settings)
    assert torch.equal(settings.snap(scale), scale) and torch.all(zero == 12)

    def cost(scale: Tensor) -> Tensor:
        error = fake_quantize(weight[0], 2 * scale, torch.tensor(0), STOCK[name]) - weight[0]
        return ((error @ h_in[0]) * error).sum(-1)

    best = cost(scale[0, :, None])
    for steps in stored_scales.OFFSETS[name]:
        full = stored_scales.full_range(weight[0].abs().amax(-1), name, 64.0) / 2
        assert torch.all(best <= cost(settings.beside(full, steps)[:, None]) * (1 + 1e-9))


@FORMATS
@pytest.mark.parametrize("h_out", [True, False])
def test_each_step_of_the_solver_lowers_the_loss(name: str, h_out: bool) -> None:
    """RTN, error compensation, refinement, further starts, a search: on the grid of the format all the way."""
    size = GROUPS[name]
    weight, objective = problem(2, 8, 4 * size, h_out=h_out)
    steps: tuple[dict[str, Any], ...] = (
        {"method": "rtn", "grid": "minmax"},
        {"refine": 0, "starts": 1, "tabu": 0},
        {"starts": 1, "tabu": 0},
        {"tabu": 0},
        {},
    )
    losses = []
    for changes in steps:
        settings = _settings(name, **changes).with_global_scale(64.0)
        found = quantize(weight.float(), objective, settings)
        losses.append(float(dense_losses(found, weight, objective.damped(0.01)).sum()))
        assert torch.equal(settings.grid_settings.snap(found.scale), found.scale)
        assert torch.equal(
            fake_quantize(
                found.dequantize().flatten(0, 1), 2 * found.scale.flatten(0, 1), torch.tensor(0), STOCK[name]
            ),
            found.dequantize().flatten(0, 1),
        )
    assert losses[1] < 0.7 * losses[0] and losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("h_out", [True, False])
def test_eight_bits_are_those_of_compressed_tensors_and_solved_alike(h_out: bool) -> None:
    weight, objective = problem(2, 8, 48, h_out=h_out)
    losses = []
    for changes in ({"method": "rtn", "grid": "minmax"}, {"refine": 0, "starts": 1, "tabu": 0}, {"tabu": 0}, {}):
        settings = Settings.model_validate({"bits": 8, "symmetric": True, "format": "fp8", **changes})
        found = quantize(weight.float(), objective, settings)
        losses.append(float(dense_losses(found, weight, objective.damped(0.01)).sum()))
        scale, values = (512 * found.scale).flatten(0, 1), found.dequantize().flatten(0, 1)
        assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5)), "powers of two"
        assert torch.equal(fake_quantize(values, scale, torch.tensor(0), FP8_DYNAMIC["weights"]), values)
        assert torch.equal(values.bfloat16().float(), values)
        if len(losses) == 1:  # to the nearest, ties as there
            assert torch.all(scale * 448 >= weight.float().flatten(0, 1).abs().amax(-1, keepdim=True))
            nearest = fake_quantize(weight.float().flatten(0, 1), scale, torch.tensor(0), FP8_DYNAMIC["weights"])
            assert torch.equal(nearest + 0.0, values)
    assert losses[1] < 0.7 * losses[0] and losses == sorted(losses, reverse=True)


def test_eight_bit_activations_are_those_of_compressed_tensors() -> None:
    x = random(1, 40, 48, dtype=torch.float32) * torch.logspace(-6, 4, 40)[:, None]
    x[0, 3] = 0
    stock = FP8_DYNAMIC["input_activations"]
    scale, zero = compute_dynamic_scales_and_zp(x, stock, torch.nn.Module())
    expected = fake_quantize(x, scale, zero.float(), stock)
    quantizer = DynamicQuantizer(8, format="fp8")
    assert torch.equal(quantizer(x), expected + 0.0) and not torch.equal(expected, x)
    assert torch.equal(quantizer(x.bfloat16()), quantizer(x.bfloat16().float()).bfloat16())


@FORMATS
def test_activations_are_those_of_compressed_tensors(name: str) -> None:
    x = _weight(name)[None]
    stock = (NVFP4 if name == "nvfp4" else MXFP4)["input_activations"]
    factor = generate_gparam(x.min() / 3, x.max() / 3)  # the largest are beyond the scales
    wide = factor if name == "nvfp4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, stock, torch.nn.Module(), global_scale=wide)
    expected = fake_quantize(x, scale, zero.float(), stock, global_scale=wide)
    quantizer = DynamicQuantizer(4, group_size=GROUPS[name], format=name, global_scale=factor)
    found = quantizer(x)
    assert torch.equal(found, expected + 0.0) and not torch.equal(found, x)
    assert torch.equal(quantizer(x.bfloat16()), quantizer(x.bfloat16().float()).bfloat16())
