"""The diagonal that balances a site: least noise, by its formula and as it is measured; what is dead, and who can."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rotoboa.models.families import FAMILIES
from rotoboa.rotation.balance import BOUND, Moments, balance, balanced_sites
from rotoboa.rotation.hadamard import Hadamard


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_no_other_diagonal_has_less_noise() -> None:
    energy, moment = random(24, seed=0).exp(), random(24, seed=1).exp()

    def noise(t: Tensor) -> float:
        return float((energy / t.square()).sum() * (moment * t.square()).sum())

    found = balance(energy, moment)
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-12), "of geometric mean 1"
    assert noise(found) == pytest.approx(float((energy * moment).sqrt().sum()) ** 2, rel=1e-12)  # Cauchy-Schwarz
    assert noise(found) < noise(torch.ones(24))
    for seed in range(20):
        assert noise(found * (0.1 * random(24, seed=2 + seed)).exp()) > noise(found)


def test_it_lowers_the_noise_of_rounded_inputs() -> None:
    """Four bits by token behind a Hadamard rotation: the error of the outputs, with the diagonal and without."""
    x, weight = random(500, 64, seed=0) * random(64, seed=1).exp(), random(48, 64, seed=2) * random(64, seed=3).exp()
    rotation = Hadamard.of(64)

    def error(t: Tensor) -> float:
        turned = rotation.apply(x * t)
        step = turned.abs().amax(-1, keepdim=True) / 7
        return float((((turned / step).round() * step - turned) @ rotation.apply(weight / t).T).square().sum())

    t = balance(weight.square().sum(0), x.square().mean(0))
    assert error(t) < 0.7 * error(torch.ones(64))


def test_dead_channels_stay_and_extremes_are_bounded() -> None:
    energy, moment = torch.tensor([1.0, 0, 1, 1e30, 1]).double(), torch.tensor([1.0, 1, 0, 1e-30, 1]).double()
    found = balance(energy, moment)
    assert found[1] == found[2] == 1 and found.min() >= 1 / BOUND and found.max() == BOUND
    assert torch.equal(balance(torch.zeros(3), torch.ones(3)), torch.ones(3))


def test_a_massive_token_counts_as_the_others() -> None:
    block = nn.Module()
    block.o = nn.Linear(6, 2)
    family = replace(FAMILIES["llama"], output="o")
    seen = Moments(family, block, ("output",))
    x = random(2, 5, 6, seed=0).float()
    x[0, 0] *= 1000
    for part in x:
        block.o(part[None])
    flat = x.double().flatten(0, 1)
    expected = sum(token.square() / token.square().mean() for token in flat) / len(flat)
    torch.testing.assert_close(seen.value()["output"], expected, rtol=1e-5, atol=1e-6)
    block.o(x[:1] * 0)  # looked at no longer
    torch.testing.assert_close(seen.value()["output"], expected, rtol=1e-5, atol=1e-6)


def test_which_sites_can_take_scales() -> None:
    none, relu, gelu = (SimpleNamespace(activation_function=name) for name in (None, "relu", "gelu"))
    llama, opt = FAMILIES["llama"], FAMILIES["opt"]
    assert balanced_sites(llama, none, folded=False) == ("qkv", "output", "gate_up", "down")
    assert balanced_sites(llama, none, folded=True) == ("output", "down")
    assert balanced_sites(opt, relu, folded=True) == ("output", "down")
    assert balanced_sites(opt, gelu, folded=False) == ("qkv", "output", "gate_up")
    mixtral = replace(FAMILIES["mixtral"], expert_count=2)
    downs = ("mlp.experts.0.down_proj", "mlp.experts.1.down_proj")
    assert balanced_sites(mixtral, none, folded=False) == ("qkv", "output", "gate_up", *downs)
