"""Where the attention of a block looks for what it has just worked out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rotoboa.boa.block import attention_step
from rotoboa.boa.block.context import Streams
from rotoboa.boa.online.attention import CENTER, AttentionInputs, set_attention

from ..small_block import (
    KEY_HEADS,
    LLAMA,
    QUANTIZED,
    SIZE,
    make_block,
    make_context,
    make_decoder,
    make_streams,
    run_small,
)


def test_values_take_what_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what has gone into a buffer for all tokens, which may be on the host while blocks compute on a GPU."""
    buffers: list[Tensor] = []
    given: list[Tensor] = []
    plain = attention_step.add_values

    def empty(*size: int, **options: Any) -> Tensor:
        buffers.append(torch.empty(*size, **options))
        return buffers[-1]

    def add_values(*args: Any) -> None:
        given.append(args[4])
        plain(*args)

    monkeypatch.setattr(attention_step, "add_values", add_values)
    run_small(empty=empty)
    stored = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    assert len(given) == 2 and len(buffers) > 2
    assert not stored & {part.untyped_storage().data_ptr() for part in given}


@torch.no_grad()
def test_the_center_of_keys_is_their_mean() -> None:
    """Over all tokens of all batches, after RoPE and R3, of the quantized stream; stored so that bfloat16 holds it."""
    transforms = replace(QUANTIZED, attention=replace(QUANTIZED.attention, centered=True))
    decoder = make_decoder()
    block, seen = make_block(decoder, transforms), list[AttentionInputs]()
    given = make_context(decoder, block, transforms=transforms)
    context, found = attention_step.center_keys(given, Streams(*make_streams()))
    center = found.centers[f"{LLAMA.attention}.{CENTER}"]
    assert torch.equal(center, center.bfloat16().float())
    assert context.transforms.attention.center is center and given.transforms.attention.center is None
    assert torch.equal(center, run_small(transforms=transforms).found.centers[f"{LLAMA.attention}.{CENTER}"])

    for name in (LLAMA.query, LLAMA.key, LLAMA.value):
        block.get_submodule(name).register_forward_pre_hook(lambda _, args: transforms.qkv(args[0]))
    set_attention(block.get_submodule(LLAMA.attention), None, seen.append)
    decoder.run(block, make_streams()[1])
    rotation = transforms.attention.rotation
    assert rotation is not None
    means = rotation.apply(torch.cat([part.key for part in seen]).double()).mean((0, 2))
    torch.testing.assert_close(center.view(KEY_HEADS, SIZE).double(), means, rtol=2**-8, atol=1e-6)


def test_no_center_is_looked_for_where_keys_have_none() -> None:
    given = make_context(make_decoder(), make_block(make_decoder()), transforms=QUANTIZED)
    context, found = attention_step.center_keys(given, Streams(*make_streams()))
    assert context is given and not found.centers
