"""The attention function registered with transformers as "rotoboa".

It sees queries and keys after RoPE. Where a module carries an `AttentionTransform`, it rotates queries and keys (R3)
and quantizes keys and values as the cache will hold them, unless they come from a cache that has done so; where it
carries a recorder, the recorder sees what attention computes with. The product itself is transformers' SDPA, and
`capped_attention` where logits have a soft cap; where heads have sinks, SDPA is given one more key, `with_sink`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...errors import InputError
from ...rotation.hadamard import Hadamard
from .activations import DynamicQuantizer
from .float8 import StaticFloat8
from .products import capped_attention, with_sink
from .served_cache import ServedQuantizer

NAME = "rotoboa"
CENTER = "key_center"
"""Of an attention module: the tensor with the center of its keys."""
_ELEMENTS = 1 << 20  # of probabilities that are held at a time
CACHE_SCALES = {"key": "k_scale", "value": "v_scale"}
"""Of it too: the tensors (1,) with the scales of keys and of values in FP8, as compressed-tensors calls them."""
CacheQuantizer = DynamicQuantizer | ServedQuantizer | StaticFloat8


@dataclass(frozen=True)
class AttentionTransform:
    """What happens to queries, keys and values of one attention layer on their way into the product.

    Keys and values of the first `sink` positions are not quantized; of a cache that forgets, and is not ours, they are
    the first that it still holds.

    `centered` keys are rounded without `center`, what the keys of a head have in common, (key heads * head_dim,) after
    rotation, which is added again. It is of a block's own, and not here before it is known.
    """

    rotation: Hadamard | None = None
    key: CacheQuantizer | None = None
    value: CacheQuantizer | None = None
    sink: int = 0
    centered: bool = False
    center: Tensor | None = field(default=None, compare=False)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each (batch, heads, length, head_dim), after RoPE, from the first position on.

        `starts` (batch or 1,) says how much padding is before the first position of each sequence.
        """
        query, key = self.rotate(query), self.rotate(key)
        key = self._rounded(key, self.key, starts, self.center_of(key))
        return query, key, self._rounded(value, self.value, starts)

    def _rounded(
        self,
        x: Tensor,
        quantizer: CacheQuantizer | None,
        starts: Tensor | None,
        center: Tensor | None = None,
    ) -> Tensor:
        if quantizer is None:
            return x
        if x.requires_grad and torch.is_grad_enabled():  # adapters are trained: rounding has a gradient of 0
            return self._rounded(x.detach(), quantizer, starts, center) + (x - x.detach())
        if not self.sink:
            return _beside(center, quantizer, x)
        if starts is None:
            return torch.cat([x[..., : self.sink, :], _beside(center, quantizer, x[..., self.sink :, :])], -2)
        index = torch.arange(x.shape[-2], device=x.device) - starts.to(x.device)[:, None]
        kept = (index >= 0) & (index < self.sink)
        return torch.where(kept[:, None, :, None], x, _beside(center, quantizer, x))

    def center_of(self, key: Tensor) -> Tensor | None:
        """(key heads, 1, head_dim), for keys (batch, key heads, length, head_dim) that are rounded; None without."""
        if self.center is None or self.key is None:
            return None
        return self.center.view(key.shape[1], 1, -1)

    @property
    def scale_names(self) -> dict[str, str]:
        """Of `CACHE_SCALES`, those that calibration finds."""
        return {part: name for part, name in CACHE_SCALES.items() if isinstance(getattr(self, part), StaticFloat8)}

    def calibrated(self, found: Callable[[str], Tensor | None]) -> AttentionTransform:
        """The same with the center and the scales that `found` has by the names of their tensors."""
        changes: dict[str, Any] = {} if (center := found(CENTER)) is None else {"center": center}
        for part, name in self.scale_names.items():
            if (scale := found(name)) is not None:
                changes[part] = StaticFloat8(scale)
        return replace(self, **changes) if changes else self

    def rotate(self, x: Tensor) -> Tensor:
        """Queries or keys (..., head_dim), rotated."""
        return x if self.rotation is None else self.rotation.apply(x)


def _beside(center: Tensor | None, quantizer: CacheQuantizer, x: Tensor) -> Tensor:
    """`x`, what it is without `center` rounded."""
    return quantizer(x) if center is None else quantizer(x - center) + center


def mark_stored(key: Tensor) -> Tensor:
    """Say of keys that they, and the values beside them, come from a cache: rotated and rounded already."""
    key.rotoboa_stored = True  # type: ignore[attr-defined]
    return key


class AttentionInputs(NamedTuple):
    """What attention computes with: queries (batch, heads, length, head_dim), keys with key heads.

    A token sees the `window` last ones, itself among them, those of its own `chunk` of so many, or all; logits s are
    `softcap * tanh(s / softcap)`. What is added to them for each key is `bias`, (batch or 1, heads, 1, keys). `sinks`
    (heads,) are the logits of a key more, which has no value: probabilities of keys do not sum to 1 then.
    """

    query: Tensor
    key: Tensor
    scaling: float
    window: int | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    chunk: int | None = None


class _Ungrouped(nn.Module):
    """Stands for an attention module whose key heads are as many as its query heads."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


Recorder = Callable[[AttentionInputs], None]


def set_attention(module: nn.Module, transform: AttentionTransform | None, recorder: Recorder | None = None) -> None:
    """Put a transform and a recorder on an attention module.

    The recorder is called with what attention computes with, after the transform.
    """
    module.rotoboa_transform = transform  # type: ignore[assignment]
    module.rotoboa_recorder = recorder  # type: ignore[assignment]


def transform_of(module: nn.Module) -> AttentionTransform | None:
    """The transform on an attention module; with what calibration has found, where the module holds that itself."""
    transform: AttentionTransform | None = getattr(module, "rotoboa_transform", None)
    return None if transform is None else transform.calibrated(lambda name: getattr(module, name, None))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` (batch, heads, length, head_dim) over `key`, `value` (batch, key heads, length, ...).

    Without a mask it is causal, a query at the key of its own index: later keys are room in a cache that is empty so
    far. One query sees every key. A row of the mask that lets nothing through (padding on the left) gives any finite
    number.

    Raises:
        InputError: the mask is neither of booleans nor of floating-point numbers.
    """
    transform = transform_of(module)
    if transform is not None and getattr(key, "rotoboa_stored", False):
        query = transform.rotate(query)
    elif transform is not None:
        query, key, value = transform(query, key, value, getattr(module, "rotoboa_starts", None))
    recorder: Recorder | None = getattr(module, "rotoboa_recorder", None)
    bias, chunk = kwargs.pop("key_bias", None), kwargs.pop("chunk", None)  # which are in the mask
    own, sinks = scaling if scaling is not None else query.shape[-1] ** -0.5, kwargs.pop("s_aux", None)
    if recorder is not None:
        limits = (kwargs.get("sliding_window"), kwargs.get("softcap"))
        recorder(AttentionInputs(query, key, own, *limits, bias, sinks, chunk))
    if attention_mask is not None:
        attention_mask = open_rows(attention_mask, query.dtype)
    elif query.shape[2] > 1:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if kwargs.get("softcap") is not None:
        return capped_attention(query, key, value, attention_mask, scaling=scaling, softcap=kwargs["softcap"]), None
    if sinks is not None:
        query, key, value, attention_mask = with_sink(query, key, value, attention_mask, sinks / own)
    groups, prompt = query.shape[1] // key.shape[1], attention_mask is None and query.shape[2] > 1
    if groups > 1 and prompt and query.is_cuda and query.dtype == torch.float32:
        # transformers would leave the groups to SDPA, whose one fused kernel for float32 on CUDA takes none: it would
        # form all logits.
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        module = _Ungrouped(getattr(module, "is_causal", True))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def open_rows(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (..., length, key length) whose rows that let nothing through let all through; numbers become `dtype`.

    The softmax of no logits is NaN, in the forward or the backward pass, whichever kernel computes it.

    Raises:
        InputError: the mask is neither of booleans nor of floating-point numbers.
    """
    if mask.dtype == torch.bool:
        return mask | ~mask.any(-1, keepdim=True)
    if not mask.is_floating_point():
        kind = str(mask.dtype).removeprefix("torch.")
        raise InputError(
            f"an attention_mask of 4 dimensions is of booleans or of numbers to add, and this one is of {kind}: "
            "give mask.bool(), or the mask of 2 dimensions."
        )
    mask = mask.to(dtype)  # the smallest number of a wider type becomes minus infinity
    return mask.masked_fill((mask <= torch.finfo(dtype).min).all(-1, keepdim=True), 0.0)


def causal_probabilities(seen: AttentionInputs, index: int, start: int, stop: int, step: int = 1) -> Tensor:
    """Softmax probabilities A of causal attention of one sequence, for n query positions range(start, stop, step).

    Args:
        seen: queries, keys and scaling of a batch.
        index: which sequence of the batch.

    Returns:
        (key heads, heads / key heads * n, stop): rows are the group's heads, then query positions; columns are the key
        positions that any of them may see.
    """
    query, key = seen.query[index, :, start:stop:step], seen.key[index, :, :stop]
    logits = (query * seen.scaling).reshape(len(key), -1, query.shape[-1]) @ key.transpose(1, 2)
    if seen.softcap is not None:
        logits = logits.div_(seen.softcap).tanh_().mul_(seen.softcap)
    by_head = logits.unflatten(1, (-1, query.shape[1]))
    if seen.bias is not None:
        by_head += seen.bias[min(index, len(seen.bias) - 1), :, :, :stop].view(len(key), -1, 1, stop)
    by_head[..., start:] += _future(stop - start, step, logits.dtype, logits.device)
    rows, keys = (torch.arange(*span, device=query.device) for span in ((start, stop, step), (stop,)))
    if seen.window is not None and stop > seen.window:
        by_head.masked_fill_(keys <= rows[:, None] - seen.window, float("-inf"))
    if seen.chunk is not None and stop > seen.chunk:
        by_head.masked_fill_(keys < rows[:, None] // seen.chunk * seen.chunk, float("-inf"))
    if seen.sinks is not None:
        sinks = seen.sinks.to(by_head).view(len(key), -1, 1, 1).expand(*by_head.shape[:3], 1)
        return torch.cat([by_head, sinks], -1).softmax(-1)[..., :-1].flatten(1, 2)
    return logits.softmax(-1)


def seen_mass(seen: AttentionInputs) -> Tensor:
    """What the probabilities of keys sum to for each query, (batch, length, heads), where heads have sinks."""
    batch, heads, length = seen.query.shape[:3]
    mass, step = seen.query.new_empty(batch, length, heads), max(1, _ELEMENTS // (heads * length))
    for i in range(batch):
        for start in range(0, length, step):
            stop = min(start + step, length)
            mass[i, start:stop] = causal_probabilities(seen, i, start, stop).sum(-1).view(heads, -1).T
    return mass


@lru_cache(maxsize=8)
def _future(size: int, step: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Added to logits of `size` keys, for queries at every `step` of them: minus infinity where a key is later."""
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)[::step].contiguous()


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
