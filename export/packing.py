"""Integers of 2 to 8 bits to int32 words and back, without a gap: 32 values fill `bits` words.

Value i of a row starts at bit `i * bits` of the row, least significant bit first; the last word is padded with zeros.
Worked example, 4 bits: the row `[1, 2, 3]` is the one word `0x321`.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    rows, columns = integers.shape
    values = torch.nn.functional.pad(integers.to(torch.int64), (0, -columns % 32)).view(rows, -1, 32)
    words = values.new_zeros(rows, values.shape[1], bits)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= values[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= values[..., i] >> (32 - shift)
    words = (words & 0xFFFFFFFF).flatten(1)[:, : packed_width(columns, bits)]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


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
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).view(words.shape[0], -1, bits)
    mask = 2**bits - 1
    values = torch.empty(*padded.shape[:2], 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = padded[..., word] >> shift  # arithmetic: the mask below takes off the copies of the sign
        if shift + bits > 32:
            value = (value & (2 ** (32 - shift) - 1)) | (padded[..., word + 1] << (32 - shift))
        values[..., i] = (value & mask).to(torch.uint8)
    return values.flatten(1)[:, :columns]


def _check(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits cannot be packed; 2 to 8 can")
