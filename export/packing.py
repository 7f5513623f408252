"""Integers of 2 to 8 bits to int32 words and back, without a gap: 32 values fill `bits` words.

Value i of a row starts at bit `i * bits` of the row, least significant bit first; the last word is padded with zeros.
Worked example, 4 bits: the row `[1, 2, 3]` is the one word `0x321`.

Eight values are `bits` bytes when packed and one 64-bit lane when not, so all eight move at once: three times the lower
and the upper half of what a lane holds are drawn apart, or together. Rows go in parts, so that temporaries stay small.

The words are those of compressed-tensors' `pack_to_int32`; a test holds every bit. Its own functions are too slow where
words are cut as a model runs: on one core a 4096 x 4096 matrix takes 6 to 25 ms to pack here and 200 to 215 there, 10
to 19 to unpack here and 235 to 310 there (22 of 4 bits).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from ..boa import super_scales
from ..boa.kernels.levels import E2M1, E2M1_ZERO, E4M3, UNITS, middle_of
from ..boa.scheme import SUPER, QuantizationArgs, QuantizationScheme
from ..boa.solver.rounding import Quantized
from ..boa.stored_scales import decode, encode

_CHUNK = 1 << 20  # values at a time
_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)  # what the codes of E2M1 without a sign mean, times two
PARTS = ("qweight", "scale", "zero")
"""The tensors of a packed weight of integers."""
SUPER_PARTS = ("super_scale", "super_zero")
ALL_PARTS = (*PARTS, "global_scale", *SUPER_PARTS)
"""Those of any format: floating point has no zero point, MXFP4 no global scale; scales of two levels are bytes."""


def packed_width(columns: int, bits: int) -> int:
    """Words of one row."""
    return -(-columns * bits // 32)


def pack(integers: Tensor, bits: int) -> Tensor:
    """(rows, columns) integers in 0 .. 2^bits - 1 -> (rows, ceil(columns * bits / 32)) int32.

    Raises:
        ValueError: bits is not 2 to 8, or a value does not fit.
    """
    _check(bits)
    if integers.numel() and (int(integers.min()) < 0 or int(integers.max()) >= 2**bits):
        raise ValueError(f"a value lies outside 0 .. {2**bits - 1}, which {bits} bits hold")
    return pack_levels(integers, bits)


def pack_levels(integers: Tensor, bits: int) -> Tensor:
    """`pack` of values that are known to fit: to look at them would wait for a GPU."""
    rows, columns = integers.shape
    width = packed_width(columns, bits)
    words = torch.empty(rows, width, dtype=torch.int32, device=integers.device)
    for start, stop in _parts(rows, columns, integers.device):
        # A copy, whole words wide: lanes are changed in place.
        lanes = torch.zeros(stop - start, -(-columns // 32) * 32, dtype=torch.uint8, device=integers.device)
        lanes[:, :columns] = integers[start:stop]
        packed = _draw_together(lanes.view(torch.int64), bits).view(torch.uint8)
        data = packed.view(stop - start, -1, 8)[..., :bits].reshape(stop - start, -1)
        words[start:stop].view(torch.uint8).copy_(data[:, : 4 * width])
    return words


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: (rows, columns) uint8.

    Raises:
        ValueError: bits is not 2 to 8, or the words are too few or too many for the columns.
    """
    _check(bits)
    if words.shape[1] != packed_width(columns, bits):
        raise ValueError(
            f"{words.shape[1]} words a row cannot be {columns} values of {bits} bits, "
            f"which take {packed_width(columns, bits)}"
        )
    rows, groups = words.shape[0], -(-columns // 8)
    lanes = torch.empty(rows, groups, dtype=torch.int64, device=words.device)
    for start, stop in _parts(rows, columns, words.device):
        data = words[start:stop].contiguous().view(torch.uint8)
        data = torch.nn.functional.pad(data, (0, max(0, groups * bits - data.shape[1])))[:, : groups * bits]
        part = lanes[start:stop]
        part.view(torch.uint8).view(stop - start, groups, 8)[..., :bits] = data.view(stop - start, groups, bits)
        _draw_apart(part, bits)
    return lanes.view(torch.uint8)[:, :columns]


def planes(words: Tensor, bits: int) -> Tensor:
    """The values of 2- or 4-bit words with less work than `unpack`, in another order.

    Returns:
        (rows, 8 / bits, 4 * words) uint8: [r, p, k] is value p of byte k, so column k * 8 / bits + p of the row; the
        padding at a row's end is zero.
    """
    _check(bits)
    count, mask = 8 // bits, (2**bits - 1) * 0x01010101
    out = torch.empty(words.shape[0], count, words.shape[1], dtype=torch.int32, device=words.device)
    for plane in range(count):
        torch.bitwise_right_shift(words, plane * bits, out=out[:, plane])
        out[:, plane].bitwise_and_(mask)
    return out.view(torch.uint8)


def _draw_apart(lanes: Tensor, bits: int) -> Tensor:
    """Eight values in the low 8 * bits bits of each lane (the rest is anything) -> one a byte; in place."""
    for values in (4, 2, 1):  # that a half holds
        half = 8 * values
        low, shift = _low_halves(half, values * bits), half - values * bits
        if shift:
            upper = (lanes << shift).bitwise_and_(_signed(low << half))
            lanes.bitwise_and_(low).bitwise_or_(upper)
    return lanes


def _draw_together(lanes: Tensor, bits: int) -> Tensor:
    """The inverse of `_draw_apart`; the bits above are zero."""
    for values in (1, 2, 4):
        half = 8 * values
        low, shift = _low_halves(half, values * bits), half - values * bits
        if shift:  # then the top bit of a lane is zero, and a shift to the right brings in no sign
            upper = (lanes >> shift).bitwise_and_(_signed(low << values * bits))
            lanes.bitwise_and_(low).bitwise_or_(upper)
    return lanes


def _low_halves(half: int, bits: int) -> int:
    """A mask of the low `bits` bits of every second field of `half` bits, the lowest one included."""
    return sum(((1 << bits) - 1) << start for start in range(0, 64, 2 * half))


def _signed(mask: int) -> int:
    """64 bits as an int64 has them."""
    mask &= (1 << 64) - 1
    return mask - (1 << 64) if mask >> 63 else mask


def _parts(rows: int, columns: int, device: torch.device) -> list[tuple[int, int]]:
    chunk = _CHUNK if device.type == "cpu" else 16 * _CHUNK  # elsewhere starting an operation costs more than memory
    step = max(1, chunk // max(1, columns))
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def _check(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits cannot be packed; 2 to 8 can")
    if sys.byteorder != "little":
        raise ValueError("words are cut into bytes here as little-endian machines have them, which this is not")


def dequantize_rows(words: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int) -> Tensor:
    """Packed rows (..., words) with scale and zero point (..., groups) as float32 (..., columns)."""
    integers = unpack(words.reshape(-1, words.shape[-1]), bits, columns).float().view(*words.shape[:-1], columns)
    parts = integers.unflatten(-1, (scale.shape[-1], -1))
    return ((parts - zero.float()[..., None]) * scale.float()[..., None]).flatten(-2)


def part_names(args: QuantizationArgs) -> tuple[str, ...]:
    """The last parts of the names of the tensors of a weight, as of `packed_parts`."""
    if args.type == "k":
        symmetric = ("qweight", "scale", "super_scale")
        return symmetric if args.symmetric else (*symmetric, "zero", "super_zero")
    return {"int": PARTS, "nvfp4": ("qweight", "scale", "global_scale")}.get(args.format, PARTS[:2])


def packed_bytes(rows: int, columns: int, args: QuantizationArgs, itemsize: int) -> int:
    """Bytes of a weight as a native checkpoint has it; `itemsize` is that of a weight left as it is."""
    if not args.quantizes:
        return rows * columns * itemsize
    groups = columns // (args.group_size or columns)
    if args.type == "k":  # of a group its bytes, of a super-block float16 for each
        of_each = 1 if args.symmetric else 2
        supers = columns // SUPER
        return rows * (4 * packed_width(columns, args.num_bits) + of_each * (groups + 2 * supers))
    of_group, of_tensor = {"int": (3, 0), "nvfp4": (1, 4), "mxfp4": (1, 0), "fp8": (2, 0)}[args.format]
    return rows * (4 * packed_width(columns, args.num_bits) + of_group * groups) + of_tensor


def to_codes(integers: Tensor) -> Tensor:
    """Integers of E2M1 (`kernels.levels`) as its codes, uint8: the sign, two bits of exponent, one of mantissa."""
    codes = torch.zeros(E2M1 + 1, dtype=torch.uint8)
    codes[[E2M1_ZERO + value for value in _DOUBLED]] = torch.arange(8, dtype=torch.uint8)
    codes[[E2M1_ZERO - value for value in _DOUBLED[1:]]] = torch.arange(9, 16, dtype=torch.uint8)
    return codes.to(integers.device)[integers.int()]


def from_codes(codes: Tensor) -> Tensor:
    """The inverse, of any shape."""
    integers = [E2M1_ZERO + value for value in _DOUBLED] + [E2M1_ZERO - value for value in _DOUBLED]
    return torch.tensor(integers, dtype=torch.uint8, device=codes.device)[codes.int()]


def to_float8(integers: Tensor) -> Tensor:
    """Integers of E4M3 (`kernels.levels`) as these numbers."""
    return ((integers - E4M3 // 2) / UNITS["fp8"]).to(torch.float8_e4m3fn)


def packed_parts(result: Quantized, args: QuantizationArgs) -> dict[str, Tensor]:
    """The tensors of a weight by the last part of their names: integers (r, c), scale and zero (r, groups)."""
    if args.format == "fp8":
        scale = encode(UNITS["fp8"] * result.scale, args.format).contiguous()
        return {"qweight": pack(to_float8(result.integers).view(torch.uint8), 8), "scale": scale}
    if args.format == "int":
        scale, zero = result.scale.to(torch.float16).contiguous(), result.zero.to(torch.uint8).contiguous()
        return {"qweight": pack(result.integers, args.num_bits), "scale": scale, "zero": zero}
    if args.type == "k":
        d, sc, dmin, m = super_scales.parts_of(result.scale, result.zero, args.format)
        found = {"qweight": pack(result.integers, args.num_bits), "scale": sc.to(torch.uint8), "super_scale": d.half()}
        return found if dmin is None or m is None else found | {"zero": m.to(torch.uint8), "super_zero": dmin.half()}
    scale = encode(2 * result.scale, args.format, result.global_scale).contiguous()
    parts = {"qweight": pack(to_codes(result.integers), args.num_bits), "scale": scale}
    return parts | ({"global_scale": torch.tensor([result.global_scale])} if args.format == "nvfp4" else {})


def unpacked(parts: Mapping[str, Tensor], args: QuantizationArgs, columns: int) -> Quantized:
    """The inverse."""
    integers = unpack(parts["qweight"], args.num_bits, columns)
    if args.format == "int":
        return Quantized(integers, parts["scale"].float(), parts["zero"].float())
    if args.format == "fp8":
        scale = decode(parts["scale"], args.format) / UNITS["fp8"]
        whole = (integers.view(torch.float8_e4m3fn).float() * UNITS["fp8"]).to(torch.int32) + E4M3 // 2
        return Quantized(whole, scale, torch.full_like(scale, E4M3 // 2))
    if args.type == "k":
        two = parts["super_scale"], parts["scale"], parts.get("super_zero"), parts.get("zero")
        return Quantized(integers, *super_scales.grid(*two, middle_of(2**args.num_bits - 1)))
    factor = float(parts["global_scale"]) if args.format == "nvfp4" else 1.0
    scale = decode(parts["scale"], args.format, factor) / 2
    return Quantized(from_codes(integers), scale, torch.full_like(scale, E2M1_ZERO), global_scale=factor)


def pack_block(
    results: Mapping[str, Quantized],
    others: Mapping[str, Tensor],
    schemes: Mapping[str, QuantizationScheme],
    dtype: torch.dtype,
    exact: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of a finished block by their names inside the block.

    Args:
        results: integers (r, c), scale and zero (r, groups) of each projection that is quantized.
        others: the block's tensors after rotation; those that are no quantized weight are kept, in `dtype`.
        schemes: of each projection.
        exact: how the names of those end that are kept in float32.
    """
    kept = {name: tensor for name, tensor in others.items() if name.removesuffix(".weight") not in results}
    packed = {n: t.to(torch.float32 if n.endswith(exact) else dtype).contiguous() for n, t in kept.items()}
    for name, result in results.items():
        parts = packed_parts(result, schemes[name].weights)
        packed |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return packed


def unpack_block(
    tensors: Mapping[str, Tensor], schemes: Mapping[str, QuantizationScheme], columns: Mapping[str, int]
) -> dict[str, Quantized]:
    """The inverse, for the projections that are quantized: `columns` says how many inputs each has."""
    return {
        name: unpacked(
            {part: tensors[f"{name}.{part}"] for part in ALL_PARTS if f"{name}.{part}" in tensors},
            scheme.weights,
            columns[name],
        )
        for name, scheme in schemes.items()
        if scheme.weights.quantizes
    }
