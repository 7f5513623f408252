"""Integers to words and back, against strings of bits."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from rotoboa.export import packing
from rotoboa.export.packing import pack, packed_width, planes, unpack

ALL_BITS = range(2, 9)
COLUMNS = [1, 2, 7, 31, 32, 33, 43, 64, 100, 129, 688]


def integers(rows: int, columns: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * columns + bits)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def reference(row: list[int], bits: int) -> list[int]:
    """A row as one string of bits, value 0 at its right end, cut into words of 32 from the right; int32."""
    text = "".join(format(value, f"0{bits}b") for value in reversed(row))
    text = text.zfill(-(-len(text) // 32) * 32)
    words = [int(text[start : start + 32], 2) for start in range(len(text) - 32, -1, -32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_words_are_those_of_the_bit_string_and_come_back(bits: int, columns: int) -> None:
    values = integers(3, columns, bits)
    words = pack(values, bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape == (3, packed_width(columns, bits)) == (3, -(-columns * bits // 32))
    assert words.tolist() == [reference(row, bits) for row in values.tolist()]
    signed = (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(words, pack_to_int32(signed, bits))
    back = unpack(words, bits, columns)
    assert back.dtype == torch.uint8 and torch.equal(back, values)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_extremes(bits: int) -> None:
    for value in (0, 2**bits - 1):
        full = torch.full((2, 45), value, dtype=torch.uint8)
        assert torch.equal(unpack(pack(full, bits), bits, 45), full)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
def test_any_dtype_that_holds_integers_packs_alike(dtype: torch.dtype) -> None:
    values = integers(2, 50, 3)
    assert torch.equal(pack(values.to(dtype), 3), pack(values, 3))


def test_views_pack_like_copies() -> None:
    values = integers(40, 30, 5)
    assert torch.equal(pack(values.T, 5), pack(values.T.contiguous(), 5))
    assert torch.equal(unpack(pack(values, 5)[::2], 5, 30), values[::2])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_parts_give_what_the_whole_gives(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = integers(23, 75, bits)
    words = pack(values, bits)
    monkeypatch.setattr(packing, "_CHUNK", 160)  # two rows at a time
    assert torch.equal(pack(values, bits), words)
    assert torch.equal(unpack(words, bits, 75), values)


def test_what_was_packed_stays_as_it_was() -> None:
    values = integers(5, 64, 4)
    copy = values.clone()
    words = pack(values, 4)
    kept = words.clone()
    unpack(words, 4, 64)
    planes(words, 4)
    assert torch.equal(values, copy) and torch.equal(words, kept)


@pytest.mark.parametrize("columns", [16, 43, 64, 688])
@pytest.mark.parametrize("bits", [2, 4])
def test_planes_hold_the_values_of_unpack(bits: int, columns: int) -> None:
    values = integers(6, columns, bits)
    words = pack(values, bits)
    found = planes(words, bits)
    assert found.dtype == torch.uint8 and found.shape == (6, 8 // bits, 4 * words.shape[1])
    in_order = found.transpose(1, 2).flatten(1)
    assert torch.equal(in_order[:, :columns], values) and not in_order[:, columns:].any()


def test_worked_example() -> None:
    assert pack(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x321]]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_values_that_do_not_fit(bits: int) -> None:
    for value in (-1, 2**bits):
        with pytest.raises(ValueError, match=rf"outside 0 \.\. {2**bits - 1}"):
            pack(torch.tensor([[0, value]]), bits)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_that_cannot_be_packed(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits cannot be packed; 2 to 8 can"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"{bits} bits cannot be packed; 2 to 8 can"):
        unpack(torch.zeros(1, 8, dtype=torch.int32), bits, 8)


@pytest.mark.parametrize(("words", "columns"), [(5, 48), (5, 32), (4, 40), (6, 40), (0, 1)])
def test_words_of_another_width(words: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{words} words a row cannot be {columns} values of 4 bits"):
        unpack(torch.zeros(2, words, dtype=torch.int32), 4, columns)
