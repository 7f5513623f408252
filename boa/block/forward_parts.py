"""Parts of a block's forward pass: it is stopped where what is wanted is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...models.decoder import Decoder
from ...models.families import Family
from ..online.attention import AttentionInputs, AttentionTransform, Recorder, set_attention


class Captured(Exception):  # noqa: N818 (a signal, not an error)
    """Carries a layer's input out of a forward pass that need not go on."""

    def __init__(self, value: Any) -> None:
        self.value = value


def capture(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The input of `module` in `run`, which goes no further."""
    return capture_all(module, run)[0]


def capture_all(module: nn.Module, run: Callable[[], object]) -> tuple[Tensor, ...]:
    """All that `module` is given in `run`, which goes no further, in order."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise Captured(args)

    handle = module.register_forward_pre_hook(hook)
    try:
        run()
    except Captured as captured:
        found: tuple[Tensor, ...] = captured.value
        return found
    finally:
        handle.remove()
    raise RuntimeError("the captured layer did not run")


def attend(decoder: Decoder, block: nn.Module, x: Tensor, transform: AttentionTransform) -> Tensor:
    """The input of the output projection (batch, length, heads * head_dim), of that of queries, keys and values."""
    return capture(block.get_submodule(decoder.family_of(block).output), _attention(decoder, block, x, transform, None))


def attend_ungated(
    decoder: Decoder, block: nn.Module, x: Tensor, transform: AttentionTransform
) -> tuple[Tensor, Tensor | None]:
    """As `attend`, before the gate; and the gate that it is multiplied by, of the same shape, where there is one.

    A gate that is given zeros lets one half through.
    """
    name = decoder.family_of(block).attention_gate
    if not name:
        return attend(decoder, block, x, transform), None
    layer = block.get_submodule(name)
    gate = layer(x).sigmoid()
    with nothing_of(layer):
        return 2 * attend(decoder, block, x, transform), gate


def attention_inputs(decoder: Decoder, block: nn.Module, x: Tensor, transform: AttentionTransform) -> AttentionInputs:
    """Queries and keys: the forward pass ends where attention would begin."""

    def stop(seen: AttentionInputs) -> None:
        raise Captured(seen)

    try:
        with nothing_of(block.get_submodule(decoder.family_of(block).value)):
            _attention(decoder, block, x, replace(transform, value=None), stop)()
    except Captured as captured:
        seen: AttentionInputs = captured.value
        return seen
    raise RuntimeError("attention did not run")


def mlp_hidden(family: Family, block: nn.Module, x: Tensor) -> Tensor:
    """The input of the down projection, before R4, (batch, length, ffn)."""
    if family.activation:
        hidden: Tensor = block.get_submodule(family.activation)(block.get_submodule(family.up)(x))
        return hidden
    mlp = block.get_submodule(family.mlp)
    return capture(block.get_submodule(family.down), lambda: mlp(x))


def branch_output(decoder: Decoder, block: nn.Module, post_norm: str | None, x: Tensor) -> Tensor:
    """What is added to the stream of what a projection put out: behind a norm, or multiplied, where the family does."""
    normed: Tensor = x if post_norm is None else block.get_submodule(post_norm)(x)
    return normed if decoder.branch_factor == 1 else normed * decoder.branch_factor


def _attention(
    decoder: Decoder, block: nn.Module, x: Tensor, transform: AttentionTransform, recorder: Recorder | None
) -> Callable[[], object]:
    attention = block.get_submodule(decoder.family_of(block).attention)

    def run() -> object:
        set_attention(attention, transform, recorder)
        try:
            return attention(hidden_states=x, **decoder.arguments(block, x.shape[1]))
        finally:
            set_attention(attention, transform, None)

    return run


@contextmanager
def nothing_of(projection: nn.Module) -> Iterator[None]:
    """Let a linear layer put out zeros, one number seen from everywhere, and compute nothing."""
    rows = projection.get_parameter("weight").shape[0]
    projection.forward = lambda x: x.new_zeros(()).expand(*x.shape[:-1], rows)
    try:
        yield
    finally:
        del projection.forward
