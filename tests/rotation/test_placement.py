"""How loud R1 is where it is merged, against loops over channels and against noise that is measured."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.online.attention import NAME
from rotoboa.models.decoder import Decoder
from rotoboa.rotation.placement import HARMFUL, noise_figure, noise_figures

from .test_rotate_families import split_modules_state


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_definition() -> None:
    weight, energy, stream = (random(12, seed=seed).square() for seed in range(3))
    merged = sum(float(e * g * g) for e, g in zip(energy, weight, strict=True)) * sum(map(float, stream))
    behind = sum(map(float, energy)) * sum(float(g * g * s) for g, s in zip(weight, stream, strict=True))
    assert noise_figure(weight, energy, stream) == pytest.approx(merged / behind, rel=1e-12)


def test_a_constant_norm_changes_nothing() -> None:
    assert noise_figure(torch.full((9,), 0.3), random(9, seed=0).square(), random(9, seed=1).square()) == (
        pytest.approx(1, rel=1e-6)
    )


def test_it_is_the_noise_of_the_outputs() -> None:
    """White noise as strong as what is rounded, through the readers: folded over behind the norm."""
    weight, readers = random(16, seed=0).exp(), random(40, 16, seed=1)
    x = random(4000, 16, seed=2) * random(16, seed=3).exp()
    x /= x.square().mean(-1, keepdim=True).sqrt()
    noise = random(4000, 16, seed=4)
    folded = (noise * x.square().mean().sqrt()) @ (readers * weight).T
    behind = (noise * (x * weight).square().mean().sqrt()) @ readers.T
    found = noise_figure(weight, readers.square().sum(0), x.square().mean(0))
    assert found == pytest.approx(float(folded.square().sum() / behind.square().sum()), rel=0.05)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "qwen3"])
def test_a_massive_channel_that_the_norm_silences_is_harmful(family_model: Callable[..., nn.Module], name: str) -> None:
    model = family_model(name, attention=NAME)
    decoder = Decoder(model.config, attention=NAME)
    family, prefix = decoder.family, f"{decoder.family.layers}.0."
    state = split_modules_state(model, decoder)
    tensors = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    hidden = random(2, 16, decoder.shape.hidden, seed=5).float()
    usual = noise_figures(decoder, tensors, decoder.block(0, tensors), hidden)
    assert len(usual) == 2 and max(usual) < HARMFUL
    hidden[..., 3] = 300 * torch.sign(hidden[..., 3])
    for norm in (family.attention_norm, family.mlp_norm):
        tensors[f"{norm}.weight"] = tensors[f"{norm}.weight"].clone()
        tensors[f"{norm}.weight"][3] = 1e-3
    assert min(noise_figures(decoder, tensors, decoder.block(0, tensors), hidden)) > HARMFUL
