"""The leading directions of a block's inputs are found in the block of full precision."""

from dataclasses import replace

import torch

from rotoboa.boa.block.block import quantize_block
from rotoboa.boa.block.block_output import transformed
from rotoboa.boa.block.context import Streams
from rotoboa.boa.block.directions_step import find_directions
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.directions import DIRECTED, LeadingDirections, leading
from rotoboa.boa.online.transforms import OnlineTransforms

from ..small_block import HIDDEN, LLAMA, QUANTIZED, make_block, make_context, make_decoder, make_streams

COUNT = 3


def _directed(transforms: OnlineTransforms) -> OnlineTransforms:
    for site in DIRECTED:  # all of one width here
        transform, few = getattr(transforms, site), LeadingDirections.of(DynamicQuantizer(3), HIDDEN, COUNT)
        transforms = transforms.with_input(site, replace(transform, quantizer=few))
    return transforms


@torch.no_grad()
def test_each_is_that_of_what_is_rounded() -> None:
    """Inputs after their rotations; a token a hundred times larger than others counts as they do."""
    decoder = make_decoder()
    context = make_context(decoder, make_block(decoder), transforms=_directed(QUANTIZED))
    streams = Streams(*make_streams())
    streams.full[0, 0] *= 100
    seen = {}
    names = (LLAMA.query, LLAMA.output, LLAMA.gate)
    with transformed(decoder, context.full, QUANTIZED.without_quantizers):
        handles = [
            context.full.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)})
            )
            for name in names
        ]
        decoder.run(context.full, streams.full)
    for handle in handles:
        handle.remove()
    again, found = find_directions(context, streams)
    assert list(found.centers) == [f"{name}.input_directions" for name in names]
    for site, name in zip(DIRECTED, names, strict=True):
        x = seen[name] / seen[name].square().mean(1, keepdim=True).sqrt()
        quantizer = getattr(again.transforms, site).quantizer
        torch.testing.assert_close(quantizer.directions, leading(x.T @ x, COUNT), rtol=0, atol=0.01)
        assert quantizer.directions is found.centers[f"{name}.input_directions"]


@torch.no_grad()
def test_the_block_is_nearer_to_full_precision_with_them() -> None:
    errors = {}
    for name, transforms in {"with": _directed(QUANTIZED), "without": QUANTIZED}.items():
        for site in () if name == "with" else DIRECTED:
            transforms = transforms.with_input(site, replace(getattr(transforms, site), quantizer=DynamicQuantizer(3)))
        decoder, streams = make_decoder(), Streams(*make_streams())
        context = make_context(decoder, make_block(decoder), transforms=transforms)
        quantize_block(context, streams)
        errors[name] = float((streams.quantized - streams.full).square().sum())
    assert errors["with"] < errors["without"]
