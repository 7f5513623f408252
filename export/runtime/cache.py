"""The key/value cache of a loaded model: packed integers, dequantized as attention reads them.

It is a layer type for transformers' `DynamicCache`. Keys are rotated (R3) and rounded once, as they come, by the
quantizer that calibration and evaluation use; what attention gets is what they get, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...boa.online.activations import DynamicQuantizer
from ...boa.online.attention import AttentionTransform, CacheQuantizer, mark_stored
from ...boa.online.float8 import StaticFloat8
from ...boa.online.served_cache import ServedQuantizer
from ...boa.stored_scales import E4M3
from ..packing import pack_levels, packed_width, unpack
from .sinks import Sinks

_PACKED = ("keys", "key_spans", "values", "value_spans")


class PackedLayer(DynamicLayer):
    """The cache of one attention layer.

    `keys` and `values` are (batch, heads, tokens, words) int32; `key_spans` and `value_spans` (batch, heads, tokens, 2)
    hold the smallest and the largest entry of each vector in the model's dtype, from which its scale and zero point
    follow (`DynamicQuantizer.grid`). Keys that have a center are stored without it. Without a quantizer, vectors are
    kept as they are and have no span. FP8 is kept in bytes (batch, heads, tokens, head_dim), on the transform's own
    scale. Those of the transform's `sink` first positions are kept beside them as they came, in `sinks`;
    `starts` (batch or 1,) says how much padding is before these.

    Args:
        transform: of the attention module, whose quantizers and rotation these are.
    """

    def __init__(self, transform: AttentionTransform) -> None:
        super().__init__()
        self.transform = transform
        self.key_spans: Tensor | None = None
        self.value_spans: Tensor | None = None
        self.sinks: Sinks | None = None
        self.starts: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty cache for states of these sizes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.sizes = {"key": key_states.shape[-1], "value": value_states.shape[-1]}
        self.keys, self.key_spans = _store(key_states[:, :, :0], self.transform.key)
        self.values, self.value_spans = _store(value_states[:, :, :0], self.transform.value)
        if self.transform.sink:
            quantized = (self.transform.key is not None, self.transform.value is not None)
            self.sinks = Sinks(self.transform.sink, (key_states, value_states), quantized)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys after RoPE and values, (batch, heads, new, head_dim); returns all of them, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states = self.transform.rotate(key_states)
        before = self.get_seq_length()
        plain = key_states.detach(), value_states.detach()
        if self.sinks is not None:
            self.sinks.start(self.starts)
            self.sinks.keep(plain, before)
        key, value = self.transform.key, self.transform.value
        center = self.transform.center_of(key_states)
        near = plain[0] if center is None else plain[0] - center
        self._append(_PACKED, (*_store(near, key), *_store(plain[1], value)))
        keys = _read(self.keys, self.key_spans, key, self.sizes["key"], self.dtype)
        keys = keys if center is None else keys + center
        values = _read(self.values, self.value_spans, value, self.sizes["value"], self.dtype)
        if self.sinks is not None:
            self.sinks.restore((keys, values), before + key_states.shape[2] - keys.shape[2])
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys, values = (_with_gradient(*pair) for pair in ((keys, key_states), (values, value_states)))
        return mark_stored(keys), values

    def _append(self, names: Sequence[str], new: Sequence[Tensor | None]) -> None:
        for name, tensor in zip(names, new, strict=True):
            if tensor is not None:
                setattr(self, name, torch.cat([getattr(self, name), tensor], 2))

    @property
    def bytes(self) -> int:
        """What this layer holds."""
        state = (getattr(self, name) for name in _PACKED)
        packed = sum(tensor.numel() * tensor.element_size() for tensor in state if tensor is not None)
        return packed + (0 if self.sinks is None else self.sinks.bytes)

    def get_seq_length(self) -> int:
        """Tokens."""
        return int(self.keys.shape[2]) if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; transformers gives a number that is not positive."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        if tokens_to_remove < 0 and self.is_initialized:
            left = max(0, self.keys.shape[2] + tokens_to_remove)
            self._change(lambda tensor: tensor[:, :, :left])

    def reset(self) -> None:
        """Forget everything."""
        for name in (*_PACKED, "sinks", "starts"):
            setattr(self, name, None)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was."""
        self._choose(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._choose(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences."""
        self._choose(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Move it to the CPU."""
        self._choose(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move it back."""
        self._choose(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in _PACKED:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def _choose(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change(change)
        self.starts = None  # where there are sinks, they know
        if self.sinks is not None:
            self.sinks.change(change)


class PackedSlidingLayer(PackedLayer):
    """The cache of a layer whose tokens see the `window` last ones: the `window` - 1 last are kept between calls.

    The first positions leave the window as any other, kept as they are or not. Lengths and masks are those of
    transformers' `DynamicSlidingWindowLayer`. Assisted decoding, which takes tokens back, calls
    `activate_past_recording` first; all are kept then until the next `crop`.
    """

    is_sliding = True

    def __init__(self, transform: AttentionTransform, window: int) -> None:
        super().__init__(transform)
        self.sliding_window, self.cumulative_length, self.record_past = window, 0, False

    def activate_past_recording(self) -> None:
        """Keep every token until `crop`."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, and return those that the new ones may see."""
        key, value = super().update(key_states, value_states)
        new = key_states.shape[2]
        self.cumulative_length += new
        if not self.record_past:
            self._keep()
        seen = self.sliding_window - 1 + new
        return mark_stored(key[:, :, -seen:]), value[:, :, -seen:]

    def get_seq_length(self) -> int:
        """Tokens so far, with those that are forgotten."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `query_length` new queries meet, and the position of the first."""
        kept = min(self.cumulative_length, self.sliding_window - 1)
        return kept + query_length, self.cumulative_length - kept

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, then those that the window has passed.

        Raises:
            RuntimeError: the tokens before them are forgotten already.
        """
        if not self.is_initialized:
            return
        past = self.cumulative_length >= self.sliding_window
        if tokens_to_remove < 0 and past and not self.record_past:
            raise RuntimeError("tokens that the window has passed are forgotten: call activate_past_recording before")
        super().crop(tokens_to_remove)
        self.cumulative_length += tokens_to_remove
        self._keep()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.cumulative_length = 0

    def _keep(self) -> None:
        gone = self.keys.shape[2] - (self.sliding_window - 1) if self.is_initialized else 0
        if gone > 0:
            # A copy: of a view, what is forgotten would stay in memory.
            self._change(lambda tensor: tensor[:, :, gone:].clone())


def _store(x: Tensor, quantizer: CacheQuantizer | None) -> tuple[Tensor, Tensor | None]:
    """Words and spans of x (batch, heads, tokens, head_dim); x itself without a quantizer, and rounded as another
    runtime's cache does, in its dtype: the layout of that is the runtime's own.
    """
    if quantizer is None:
        return x, None
    if isinstance(quantizer, ServedQuantizer):
        return quantizer(x), None
    if isinstance(quantizer, StaticFloat8):
        return quantizer.codes(x).view(torch.uint8), None
    width = packed_width(x.shape[-1], quantizer.bits)
    if not x.numel():
        return x.new_empty(*x.shape[:3], width, dtype=torch.int32), x.new_empty(*x.shape[:3], 2 - quantizer.symmetric)
    span = quantizer.span(x)
    levels = quantizer.levels(x, *quantizer.grid(span)).add_(_lowest(quantizer)).to(torch.uint8)
    return pack_levels(levels.flatten(0, 2), quantizer.bits).view(*x.shape[:3], width), span


def _read(
    stored: Tensor,
    span: Tensor | None,
    quantizer: CacheQuantizer | None,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    if isinstance(quantizer, StaticFloat8):
        return quantizer.values(stored.view(E4M3), dtype)
    if not isinstance(quantizer, DynamicQuantizer) or span is None:
        return stored.view_as(stored)  # a tensor of its own, to be marked
    scale, zero = quantizer.grid(span)
    levels = unpack(stored.flatten(0, 2), quantizer.bits, size).view(*stored.shape[:3], size).to(scale.dtype)
    return quantizer.values(levels.sub_(_lowest(quantizer)), scale, zero, dtype)


def _with_gradient(read: Tensor, new: Tensor) -> Tensor:
    """What was read, with the gradient of the new states that it ends with: adapters are trained with a cache too."""
    past = read.shape[2] - new.shape[2]
    return torch.cat([read[:, :, :past], read[:, :, past:] + (new - new.detach())], 2)


def _lowest(quantizer: DynamicQuantizer) -> int:
    """What symmetric levels need to be added to become 0 .. 2^bits - 1."""
    return 2 ** (quantizer.bits - 1) if quantizer.symmetric else 0


def cache_bytes(cache: Cache) -> int:
    """What a cache of packed layers holds; what a stock one does, where it has keys and values alone."""
    return sum(
        layer.bytes
        if isinstance(layer, PackedLayer)
        else sum(tensor.numel() * tensor.element_size() for tensor in (layer.keys, layer.values) if tensor is not None)
        for layer in cache.layers
    )


def packed_cache(transforms: Sequence[AttentionTransform]) -> DynamicCache:
    """An empty cache of packed layers."""
    cache = DynamicCache()
    pack_layers(cache, transforms)
    return cache


def pack_layers(cache: DynamicCache, transforms: Sequence[AttentionTransform]) -> None:
    """Put packed layers in place of stock ones that hold keys and values alone; others stay."""
    layers = cache.layers or [DynamicLayer() for _ in transforms]
    cache.layers = [_packed(layer, transform) for layer, transform in zip(layers, transforms, strict=True)]


def _packed(layer: Any, transform: AttentionTransform) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        packed = PackedSlidingLayer(transform, layer.sliding_window)
        packed.record_past = layer.record_past
        return packed
    return PackedLayer(transform) if type(layer) is DynamicLayer else layer
