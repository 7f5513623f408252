"""What a loaded model holds in memory, itself and for each token of its cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ...boa.online.attention import NAME
from ...models.decoder import Decoder
from ...models.seeing.whole_model import attention_in, auto_class
from ..runtime.prepared import prepare_model
from ..spec import Spec
from .cache import cache_bytes, packed_cache

REFERENCE = torch.bfloat16


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; what is tied counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def memory(decoder: Decoder, spec: Spec, dtype: torch.dtype, tokens: int, *, tied: bool = False) -> dict[str, Any]:
    """Bytes of the model and of the cache of one sequence, packed and as the original has them in bfloat16.

    The model is made as the loader makes it, but without data. The cache of a block is filled with `tokens` random
    tokens and measured; the blocks' are alike, but for those without attention, whose state does not grow and is left
    out.

    Args:
        decoder: of the original model.
        dtype: of the checkpoint, which is that of the loaded model.
        tokens: length of the sequence.
        tied: embedding and head of the packed model are one, as they are in the original.

    Returns:
        {"model": {"bfloat16": ..., "quantized": ...}, "cache": {"tokens": ..., "bfloat16": ..., "quantized": ...}}
    """
    cache = {
        "bfloat16": _cache_bytes(decoder, None, REFERENCE, tokens),
        "quantized": _cache_bytes(decoder, spec, dtype, tokens),
    }
    original, packed = _skeleton(decoder, REFERENCE, tied=True), _skeleton(decoder, dtype, tied=tied)
    prepare_model(packed, decoder.family, decoder.shape, spec)
    return {
        "model": {"bfloat16": model_bytes(original), "quantized": model_bytes(packed)},
        "cache": {"tokens": tokens, **cache},
    }


def _skeleton(decoder: Decoder, dtype: torch.dtype, *, tied: bool) -> nn.Module:
    config = copy.deepcopy(decoder.whole)
    if not tied:
        config.tie_word_embeddings = False
    family = decoder.family
    attention = {} if family.generic else {"attn_implementation": attention_in(family, NAME)}
    with torch.device("meta"):
        model: nn.Module = auto_class(family).from_config(config, dtype=dtype, **attention)
    return model


def _cache_bytes(decoder: Decoder, spec: Spec | None, dtype: torch.dtype, tokens: int) -> int:
    family, shape = decoder.family, decoder.shape
    attending = [index for index in range(shape.blocks) if not family.at(index).mixed]
    if not attending:
        return 0
    packs = spec is not None and min(spec.key_bits, spec.value_bits) < 16
    cache = (
        packed_cache([spec.transforms(shape, family, attending[0]).attention])
        if spec is not None and packs
        else DynamicCache()
    )
    sizes = ((shape.key_heads, shape.head_dim),) * 2
    if family.compressions:  # they are kept as they are, the part that RoPE turns beside them
        (rows, _), (_, latent) = ((family.sizes or {})[name] for name in (family.compressions[-1], family.value))
        sizes = (1, latent), (1, rows - latent)
    keys, values = (torch.randn(1, heads, tokens, size, dtype=dtype) for heads, size in sizes)
    cache.update(keys, values, 0)
    return cache_bytes(cache) * len(attending)
