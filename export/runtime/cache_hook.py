"""Lets a loaded model pack the keys and values that it keeps, and says where the sequences of a batch begin."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ...boa.online.attention import transform_of
from .cache import PackedLayer, pack_layers
from .sinks import first_positions


def use_packed_cache(decoder: nn.Module, layers: str, attention: Sequence[str]) -> None:
    """Let `decoder` (the module whose forward takes `past_key_values`) pack what it keeps, in place.

    A cache that it would make, and an empty `DynamicCache` that it is given (`generate` makes one), gets packed layers.
    Any other cache was somebody's choice and is left as it is; attention then rounds what it reads from there.

    Args:
        layers: attribute of the decoder that lists its blocks.
        attention: name of the attention module in each block, or of what stands in its place, which carries its
            transform.
    """
    # transformers 5.24 calls it `cache`, and still takes the older name.
    own = inspect.signature(type(decoder).forward).parameters
    name = "cache" if "cache" in own else "past_key_values"
    hook = partial(_give_cache, name=name, layers=layers, attention=attention)
    decoder.register_forward_pre_hook(hook, with_kwargs=True)


def _give_cache(
    decoder: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    name: str,
    layers: str,
    attention: Sequence[str],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cache, wanted = kwargs.get(name), kwargs.get("use_cache")
    if cache is None and kwargs.get("past_key_values") is not None:
        cache = kwargs["past_key_values"]
    if wanted is None:
        wanted = getattr(decoder.config, "use_cache", False)
    if cache is None and wanted:
        cache = DynamicCache(config=decoder.config)
        kwargs = {**kwargs, name: cache}
    blocks = decoder.get_submodule(layers).children()
    modules = [block.get_submodule(own) for block, own in zip(blocks, attention, strict=True)]
    transforms = [transform for module in modules if (transform := transform_of(module)) is not None]
    length = 0 if cache is None else int(cache.get_seq_length())
    if type(cache) is DynamicCache and not length:
        pack_layers(cache, transforms)
    if any(transform.sink for transform in transforms):
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        _say_starts(modules, cache, mask, length)
    return args, kwargs


def _say_starts(modules: list[nn.Module], cache: Any, mask: Any, length: int) -> None:
    """Tell attention modules and packed layers how much padding is before each sequence; `length` tokens are cached."""
    if length and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        return  # a mask of 4 dimensions begins where a window does: what was said with the first tokens holds
    starts = first_positions(mask)
    for module in modules:
        module.rotoboa_starts = starts  # type: ignore[assignment]
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, PackedLayer):
            layer.starts = starts
