"""The scales that are one for all tokens: those of the largest numbers of the block of full precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rotoboa.boa.block.block_output import transformed
from rotoboa.boa.block.context import Streams
from rotoboa.boa.block.directions_step import find_directions
from rotoboa.boa.block.input_scales import find_scales
from rotoboa.boa.online.activations import UNCALIBRATED, DynamicQuantizer
from rotoboa.boa.online.attention import AttentionInputs, set_attention
from rotoboa.boa.online.float8 import StaticFloat8, scale_of
from rotoboa.boa.online.transforms import InputTransform, OnlineTransforms
from rotoboa.models.families import SITES

from ..small_block import LLAMA, PLAIN, QUANTIZED, make_block, make_context, make_decoder, make_streams


def _static(transforms: OnlineTransforms) -> OnlineTransforms:
    for site in SITES:
        transforms = transforms.with_input(site, replace(getattr(transforms, site), quantizer=StaticFloat8()))
    return replace(transforms, attention=replace(transforms.attention, key=StaticFloat8(), value=StaticFloat8()))


@torch.no_grad()
def test_each_is_that_of_what_is_seen() -> None:
    """Inputs after their rotations, keys and values after theirs; of the first positions none where they are kept."""
    transforms = _static(QUANTIZED)
    transforms = replace(transforms, attention=replace(transforms.attention, sink=2))
    decoder = make_decoder()
    context = make_context(decoder, make_block(decoder), transforms=transforms)
    streams = Streams(*make_streams())
    context.full.get_parameter(f"{LLAMA.value}.weight").mul_(100)
    seen: dict[str, torch.Tensor] = {}

    def record(inputs: AttentionInputs) -> None:
        seen["k_scale"] = inputs.key[..., 2:, :]

    plain = PLAIN
    for site in SITES:
        plain = plain.with_input(site, replace(getattr(plain, site), rotation=getattr(QUANTIZED, site).rotation))
    handles = [
        context.full.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: args[0], f"out of {name}": out})
        )
        for name in LLAMA.sites
    ]
    with transformed(decoder, context.full, plain):
        set_attention(
            context.full.get_submodule(LLAMA.attention), replace(QUANTIZED.attention, key=None, value=None), record
        )
        decoder.run(context.full, streams.full)
    for handle in handles:
        handle.remove()
    seen["v_scale"] = seen[f"out of {LLAMA.value}"][:, 2:]
    _, found = find_scales(context, streams)
    peaks = {f"{LLAMA.attention}.{name}": seen[name] for name in ("k_scale", "v_scale")}
    peaks |= {f"{name}.input_scale": seen[name] for name in LLAMA.sites}
    assert found.centers.keys() == peaks.keys()
    for name, tensor in peaks.items():
        assert float(found.centers[name]) == scale_of(float(tensor.abs().max())), name
    assert len({float(scale) for scale in found.centers.values()}) > 1


@pytest.mark.parametrize("find", [find_scales, find_directions])
@torch.no_grad()
def test_none_is_looked_for_where_none_is_wanted(find: Callable[..., Any]) -> None:
    decoder = make_decoder()
    context = make_context(decoder, make_block(decoder), transforms=QUANTIZED)
    again, found = find(context, Streams(*make_streams()))
    assert again is context and not found.centers


@torch.no_grad()
def test_what_follows_has_them() -> None:
    decoder, attention = make_decoder(), replace(PLAIN.attention, key=StaticFloat8())
    context = make_context(decoder, make_block(decoder), transforms=replace(PLAIN, attention=attention))
    context, found = find_scales(context, Streams(*make_streams()))
    quantizer = context.transforms.attention.key
    assert isinstance(quantizer, StaticFloat8) and list(found.centers.values()) == [quantizer.scale]
    nvfp4 = PLAIN.with_input("qkv", InputTransform(quantizer=DynamicQuantizer(4, group_size=16, format="nvfp4")))
    assert {float(scale) for scale in nvfp4.scales(LLAMA).values()} == {UNCALIBRATED}


def test_layers_that_share_an_input_have_tensors_of_their_own() -> None:
    """Files of safetensors hold no tensors that share memory, as those of float32 would do that nothing converts."""
    found = _static(PLAIN).with_input("qkv", InputTransform(quantizer=StaticFloat8(torch.tensor([2.0])))).scales(LLAMA)
    assert float(found[f"{LLAMA.query}.input_scale"]) == float(found[f"{LLAMA.key}.input_scale"]) == 2
    assert len({scale.data_ptr() for scale in found.values()}) == len(found)
