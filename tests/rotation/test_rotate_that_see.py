"""Rotations of models that see: an image goes through the whole class in float64, before and after."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.online.attention import NAME
from rotoboa.models.decoder import Decoder
from rotoboa.models.layout import split_modules
from rotoboa.models.outer_layers import OuterLayers
from rotoboa.rotation.rotate import Rotations
from rotoboa.tests.rotation.test_rotate_families import split_modules_state
from rotoboa.tests.seen import inputs, llama4_runs  # noqa: F401 (a fixture)
from rotoboa.tests.small_families import SEEING

EXACT = 1e-9


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_rotate_families.py: transformers casts to float32 inside norms, and hides an error up to 1e-7."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@torch.no_grad()
@pytest.mark.parametrize("name", [*SEEING])
def test_logits_of_an_image_stay(family_model: Callable[..., nn.Module], name: str) -> None:
    """R2 everywhere, and R1 merged where there are no post norms: of embeddings, of what writes images, and of all."""
    model: Any = family_model(name, attention=NAME, tie_word_embeddings=False).double()
    decoder = Decoder(model.config, attention=NAME, dtype=torch.float64)
    family, shape = decoder.family, decoder.shape
    seen = inputs(name, torch.float64)
    expected = model(**seen).logits
    blind = model(**{**seen, "pixel_values": torch.zeros_like(seen["pixel_values"])}).logits
    assert (blind - expected).abs().max() > 0.1, "the image matters"

    state = {key: tensor.clone() for key, tensor in split_modules_state(model, decoder).items()}
    for i, block in enumerate(model.get_submodule(family.layers)):
        split_modules(block, family.at(i), shape)
    rotations = Rotations.of(shape, r1=not family.post_norms, r2=True, r3=False, r4=False, seed=3)
    rotated = dict(state)
    rotated |= rotations.rotate_outer_layers(OuterLayers.of(family, state), family).named(family)
    for index in range(shape.blocks):
        prefix = f"{family.layers}.{index}."
        tensors = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        rotated |= {prefix + key: t for key, t in rotations.rotate_block(tensors, family, index).items()}
    model.load_state_dict(rotated)
    if rotations.turned:
        assert (model(**seen).logits - expected).abs().max() > 1e-2, "images come in another basis than the stream's"
    assert family.sight is not None
    towers = {key: t for key, t in state.items() if key.startswith(family.sight.prefixes)}
    turned = {key: rotations.rotate_tower(key, tensor, family) for key, tensor in towers.items()}
    model.load_state_dict(rotated | turned)
    assert (model(**seen).logits - expected).abs().max() < EXACT
    changed = {key for key, tensor in turned.items() if tensor is not towers[key]}
    assert changed == {key for key in towers if rotations.turned and family.sight.writes(key)}
    assert bool(changed) == rotations.turned


def test_writers_are_linear_layers_as_wide_as_the_stream(family_model: Callable[..., nn.Module]) -> None:
    for name in SEEING:
        model = family_model(name)
        decoder = Decoder(model.config, attention=NAME)
        assert decoder.family.sight is not None
        writers = [key for key in decoder.shapes if decoder.family.sight.writes(key)]
        assert bool(writers) != decoder.family.post_norms
        for key in writers:
            assert isinstance(model.get_submodule(key.rpartition(".")[0]), nn.Linear)
            assert decoder.shapes[key][0] == decoder.shape.hidden
