"""A linear layer that stays packed in memory and computes from its integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, reduce
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...boa.online.activations import DynamicQuantizer
from ...boa.online.directions import LeadingDirections
from ...boa.online.transforms import InputQuantizer, InputTransform
from ...boa.scheme import GROUPS, QuantizationArgs
from ..packing import from_codes, pack, planes, unpack
from .gradient import with_gradient
from .packed_weight import PackedWeight
from .tiles import ROWS, TOKENS, grid_of, group_of, product, tiled, untiled

_CHUNK = {"cpu": 1 << 20}  # weights that are unpacked at a time: what a processor's cache holds
_CHUNK_ELSEWHERE = 1 << 24
_COLUMNS = 128  # least of a product of integers by group, by estimate: with fewer, scaling the sums should cost more
_SLOW_INTEGERS = ("NO AVX", "AVX2")  # processors where oneDNN has no kernel: 25 times a float product's time, as seen


class QuantizedLinear(PackedWeight, nn.Linear):
    """y = dequantize(qweight) transform(x) + bias.

    A linear layer to those who look for one, as PEFT does for its adapters. Its buffers are those of `PackedWeight`, a
    row an output; `bias` (out,) where the original has one.

    | activations | weights | computed |
    |---|---|---|
    | any in bfloat16, of few tokens | 4 bits, on a processor with AVX-512 | by torch's own product: `tiles` |
    | 8 bits or fewer, 7 with a zero point | one scale a row | int8 x int8 in int32, scales applied to the sums |
    | such, in groups | one scale a row, or groups that they divide or that divide them | so by group, or as below |
    | such, beside directions | as above | so, and the columns that directions meet as floats |
    | any other | any | a part of the weight at a time becomes floats, and is dropped |

    Sums of products of integers are exact, so the second and third differ from the last, which is what is simulated, by
    the rounding of floats alone; so does the first, whose scales are rounded to bfloat16. Integers are taken where they
    are fast (`fast_integers`), by group on processors alone and of 128 columns or more, and not of groups of weights by
    themselves: a product for each was no faster there. What is left after a call is of the size of its output, and of
    the first kind the words in another order.
    """

    tile_grid: Tensor | None
    through: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bits: int,
        group_size: int | None = None,
        format: str = "int",
        bias: bool = False,
        transform: InputTransform | None = None,
        holder: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)  # without a weight
        self.in_features, self.out_features = inputs, outputs
        self.transform = transform or InputTransform()
        self.transform.make_room(self, holder)
        self.make_room(outputs, inputs, bits, group_size, format)
        self.register_buffer("tile_grid", None, persistent=False)
        self.register_buffer("through", None, persistent=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None)

    @classmethod
    def in_place_of(
        cls,
        linear: nn.Linear,
        args: QuantizationArgs,
        transform: InputTransform | None = None,
        holder: nn.Module | None = None,
    ) -> QuantizedLinear:
        """One of the same size, on the same device, without data; `holder` as of `InputTransform.make_room`."""
        bias = linear.bias is not None
        with linear.weight.device:
            return cls(
                linear.in_features,
                linear.out_features,
                bits=args.num_bits,
                group_size=args.group_size,
                format=args.format,
                bias=bias,
                transform=transform,
                holder=holder,
            )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(out, in) weights, computed in float32 and rounded to `dtype`."""
        scale, zero = self.grid()
        integers = self._integers(slice(None), scale.shape[1], in_order=True)
        return ((integers.float() - zero.float()[..., None]) * scale.float()[..., None]).flatten(1).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._untile()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._untile()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._untile()
        super()._load_from_state_dict(*args)

    def _untile(self) -> None:
        """Have the words as the files have them, and nothing that was made of them."""
        self.through = None
        if self.tile_grid is not None:
            self.qweight, self.tile_grid = pack(untiled(self.qweight), self.bits), None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return with_gradient(self.transform.rotate(x), self._from_rotated, self.dequantize)

    def _from_rotated(self, x: Tensor) -> Tensor:
        quantizer = self.transform.of(self).quantizer
        flat = x.reshape(-1, self.in_features)
        if 0 < len(flat) <= TOKENS and flat.dtype == torch.bfloat16 and self._tile():
            y = self._from_tiles(flat if quantizer is None else quantizer(flat))
        elif isinstance(quantizer, DynamicQuantizer) and len(flat) and self.counts(quantizer, x.device):
            y = self._from_integers(flat, quantizer)
        elif isinstance(quantizer, LeadingDirections) and len(flat) and self.counts(quantizer.rest, x.device):
            y = self._beside_directions(flat, quantizer)
        else:
            y = self._from_floats(flat if quantizer is None else quantizer(flat))
        return y.view(*x.shape[:-1], self.out_features)

    def _beside_directions(self, x: Tensor, quantizer: LeadingDirections) -> Tensor:
        """(T, in) -> (T, out); what coefficients meet, (out, k), is held from the first call on."""
        coefficients, left = quantizer.split(x)
        if self.through is None or self.through.dtype != left.dtype:
            self.through = quantizer.through(self.dequantize(left.dtype))
        return self._from_integers(left, quantizer.rest).addmm_(coefficients, self.through.T).to(x.dtype)

    def counts(self, quantizer: InputQuantizer | None, device: torch.device) -> bool:
        """Whether products are taken of integers."""
        if not isinstance(quantizer, DynamicQuantizer) or {self.format, quantizer.format} != {"int"}:
            return False
        if quantizer.bits + (not quantizer.symmetric) > 8 or not fast_integers(device.type):
            return False
        inputs, weights = self.in_features // (quantizer.group_size or self.in_features), self.scale.shape[1]
        if inputs == 1:
            return weights == 1
        groups = max(inputs, weights)
        nested = groups % min(inputs, weights) == 0
        return nested and self.in_features // groups >= _COLUMNS and device.type == "cpu"

    def _from_integers(self, x: Tensor, quantizer: DynamicQuantizer) -> Tensor:
        """(T, in) -> (T, out): sum_c q_c (I_c - z) = sum_c q_c I_c - z sum_c q_c by group, times both scales."""
        vectors = quantizer.vectors(x)
        scale, middle = quantizer.grid(quantizer.span(vectors))
        levels = quantizer.levels(vectors, scale, middle)
        levels = (levels if middle is None else levels.sub_(middle)).to(torch.int8).flatten(1)
        scale, late = scale.reshape(len(x), -1), self.scale.shape[1] == 1
        groups = max(scale.shape[1], self.scale.shape[1])
        scale = _each(scale, groups)[..., None]
        levels = self._ordered(levels, groups).transpose(0, 1).contiguous()
        total = levels.sum(2, keepdim=True, dtype=torch.int32)
        parts = []
        for rows in self._parts(x.device):
            integers, zero = self._integers(rows, groups), _each(self.zero[rows], groups).to(torch.int32)
            if self.bits == 8:  # int8 holds 0 .. 255 less 128
                integers, zero = integers.bitwise_xor_(128), zero - 128
            integers = integers.view(torch.int8).transpose(0, 1).contiguous()
            products = map(_product, levels, integers, total, zero, scale)
            if late:
                part = reduce(Tensor.add_, products).mul_(self.scale[rows, 0])
            else:
                part = reduce(Tensor.add_, map(Tensor.mul_, products, _each(self.scale[rows], groups)))
            parts.append((part if self.bias is None else part.add_(self.bias[rows])).to(x.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _from_floats(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out) in the dtype of x."""
        dtype = x.dtype
        # One scale a row is applied to the sums, which would overflow float16.
        groups = self.scale.shape[1]
        late = groups == 1 and dtype != torch.float16
        wide = torch.float32 if dtype == torch.bfloat16 and not late else dtype
        x = self._ordered(x, groups).flatten(1)
        parts = []
        for rows in self._parts(x.device):
            integers, (scale, zero) = self._integers(rows, groups), (part[..., None] for part in self.grid(rows))
            # Below 8 bits the difference fits int8, whose bits are those of the uint8 one.
            if zero.is_floating_point():  # of two levels: any number
                weight = integers.float().sub_(zero)
            else:
                less = self.bits < 8
                weight = integers.sub_(zero).view(torch.int8).to(wide) if less else integers.to(wide).sub_(zero)
            if not late:
                weight = weight.mul_(scale).to(dtype)
            part = x @ weight.flatten(1).T
            if late:
                part *= scale[:, 0, 0].to(torch.float32 if dtype == torch.bfloat16 else dtype)
            parts.append(part if self.bias is None else part.add_(self.bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _from_tiles(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out), bfloat16."""
        assert self.tile_grid is not None
        y = product(x, self.qweight, self.tile_grid)
        return y if self.bias is None else y.add_(self.bias)

    def _tile(self) -> bool:
        """Have the words in tiles, where they can be."""
        if self.tile_grid is None and self.bits == 4 and self.format == "int" and self.qweight.device.type == "cpu":
            group = group_of(self.out_features, self.in_features, self.scale.shape[1])
            if group is not None:
                self.qweight = tiled(self.qweight, self.in_features)
                self.tile_grid = grid_of(self.scale, self.zero, self.in_features, group)
        return self.tile_grid is not None

    def _planes(self, groups: int) -> int:
        """Values a byte where they are used in the order of `planes`, which whole words of a group have; else 1."""
        if self.tile_grid is not None:
            return 1
        whole_words = groups == 1 or self.in_features // groups * self.bits % 32 == 0
        return 8 // self.bits if self.bits in (2, 4) and whole_words else 1

    def _ordered(self, x: Tensor, groups: int) -> Tensor:
        """Columns of x (T, in) in the order of `_integers`: (T, groups, columns)."""
        count = self._planes(groups)
        if count == 1:
            return x.unflatten(1, (groups, -1))
        padding = self.qweight.shape[1] * 32 // self.bits - self.in_features
        x = nn.functional.pad(x, (0, padding)) if padding else x
        return x.unflatten(1, (groups, -1, count)).transpose(-1, -2).flatten(2)

    def _integers(self, rows: slice, groups: int, *, in_order: bool = False) -> Tensor:
        """Those of some rows, (rows, groups, columns) uint8, a new tensor; padding is any number. Of FP8 these are its
        numbers.
        """
        if self.tile_grid is not None:
            every = slice(None) if rows.stop is None else slice(rows.start // ROWS, -(-rows.stop // ROWS))
            return untiled(self.qweight[every]).unflatten(1, (groups, -1))
        words = self.qweight[rows]
        if in_order or self._planes(groups) == 1:
            found = unpack(words, self.bits, self.in_features).unflatten(1, (groups, -1))
        else:
            found = planes(words.reshape(len(words) * groups, -1), self.bits).view(len(words), groups, -1)
        if self.format == "fp8":
            return found.view(torch.float8_e4m3fn)
        return found if self.format not in GROUPS else from_codes(found)

    def _parts(self, device: torch.device) -> Iterator[slice]:
        least = 8 if self.tile_grid is None else ROWS
        step = max(1, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // self.in_features // least) * least
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, groups={self.scale.shape[1]}"


def _each(part: Tensor, groups: int) -> Tensor:
    """What (n, fewer groups) has for each of `groups`: (groups, n)."""
    return part.repeat_interleave(groups // part.shape[1], 1).T


def _product(levels: Tensor, integers: Tensor, total: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """One group: levels (T, c) times integers (out, c) less zero (out), exact, times scale (T, 1); in its dtype."""
    return integer_product(levels, integers).addcmul_(total, zero, value=-1).to(scale.dtype).mul_(scale)


@cache
def fast_integers(device: str) -> bool:
    """Whether int8 x int8 is at least as fast as floats on a type of device; a processor needs AVX-512's or ARM's."""
    if device == "cpu":
        return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() not in _SLOW_INTEGERS
    return device == "cuda"


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in int32, of int8 (T, c) and (out, c)."""
    if not x.is_cuda:
        return torch._int_mm(x, weight.T)
    rows, outputs = len(x), len(weight)
    return torch._int_mm(*pad_for_cuda(x, weight))[:rows, :outputs]


def pad_for_cuda(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`x` and the transpose of `weight` with zeros, so that cuBLAS takes them: 17 rows or more, multiples of 8."""
    columns = -x.shape[1] % 8
    x = nn.functional.pad(x, (0, columns, 0, max(0, 17 - len(x))))
    return x, nn.functional.pad(weight, (0, columns, 0, -len(weight) % 8)).T
