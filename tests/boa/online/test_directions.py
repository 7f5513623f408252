"""Leading directions of an input beside what is left of it."""

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.directions import LeadingDirections, directed, leading
from rotoboa.boa.online.transforms import InputTransform, OnlineTransforms, holder

from ..small_block import LLAMA


def _inputs(tokens: int = 300, width: int = 48, strong: int = 3) -> Tensor:
    """Tokens with some strong directions, none of which is a channel."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    sizes = torch.ones(width, dtype=torch.float64)
    sizes[:strong] = torch.tensor([20.0, 12.0, 8.0])[:strong]
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) * sizes @ basis.T


def test_they_hold_the_most_energy() -> None:
    x = _inputs()
    found = leading(x.T @ x, 3).double()
    torch.testing.assert_close(found.T @ found, torch.eye(3).double(), rtol=0, atol=0.02)  # bfloat16
    values = torch.linalg.eigvalsh(x.T @ x).flip(0)[:3]
    torch.testing.assert_close((x @ found).square().sum(0), values, rtol=0.01, atol=0)
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rest", [DynamicQuantizer(4), DynamicQuantizer(4, False, group_size=16, search=True)])
def test_what_is_left_is_rounded_beside_them(rest: DynamicQuantizer) -> None:
    x = _inputs()
    directions = leading(x.T @ x, 3)
    quantizer = LeadingDirections(rest, directions)
    found = quantizer(x)
    for token, y in zip(x[:20], found[:20], strict=True):
        along = directions.double().T @ token
        step = along.abs().max() / 127
        kept = directions.double() @ ((along / step).round() * step)
        torch.testing.assert_close(y, kept + rest(token - kept), rtol=1e-9, atol=1e-9)
    assert (found - x).square().sum() < 0.2 * (rest(x) - x).square().sum()
    weight = torch.randn(7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    coefficients, left = quantizer.split(x)
    product = rest(left) @ weight.T + coefficients @ quantizer.through(weight).T
    torch.testing.assert_close(product, found @ weight.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_any_found_all_is_left(dtype: torch.dtype) -> None:
    x, rest = _inputs().to(dtype), DynamicQuantizer(4)
    found = LeadingDirections.of(rest, 48, 5)(x)
    assert found.dtype == dtype and torch.equal(found, rest(x))


def test_only_few_bits_have_them() -> None:
    assert directed(None, 48, 4) is None
    for plain in (DynamicQuantizer(8), DynamicQuantizer(4, group_size=16, format="nvfp4")):
        assert directed(plain, 48, 4) is plain
    assert directed(DynamicQuantizer(4), 48, 0) == DynamicQuantizer(4)
    assert isinstance(directed(DynamicQuantizer(4), 48, 4), LeadingDirections)


def test_the_first_projection_holds_them_for_all_of_its_input() -> None:
    x = _inputs().float()
    transform = InputTransform(quantizer=LeadingDirections.of(DynamicQuantizer(4), 48, 3))
    first, second = nn.Linear(48, 4), nn.Linear(48, 4)
    transform.make_room(first)
    transform.make_room(second, first)
    assert set(first.state_dict()) - set(second.state_dict()) == {"input_directions"}
    first.get_buffer("input_directions").copy_(leading(x.T @ x, 3))
    assert torch.equal(transform.of(second)(x), transform.of(first)(x))
    assert not torch.equal(transform.of(second)(x), transform(x))
    every = OnlineTransforms(qkv=transform, gate_up=transform)
    assert list(every.scales(LLAMA)) == [f"{name}.input_directions" for name in (LLAMA.query, LLAMA.gate)]
    assert [holder(LLAMA, name) for name in (LLAMA.value, LLAMA.output, LLAMA.up)] == [
        LLAMA.query, LLAMA.output, LLAMA.gate
    ]  # fmt: skip
