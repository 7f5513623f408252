"""K types: the gguf package unpacks what the run has, and native and GGUF files of a run compute the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize

from rotoboa.boa import super_scales
from rotoboa.boa.scheme import TWO_LEVELS, QuantizationArgs
from rotoboa.boa.solver.rounding import Quantized
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import gguf, mlx
from rotoboa.export.formats.gguf_reader import inspect, read
from rotoboa.export.ggml.k_blocks import NAMES, to_super_blocks
from rotoboa.export.packing import packed_bytes, packed_parts, unpacked
from rotoboa.pipeline.verifying import run_logits

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "num_key_value_heads": 2,
}


def made(name: str) -> Quantized:
    """A layer (6, 512) on a random grid of two levels, one of its groups of zeros."""
    bits, group, symmetric = TWO_LEVELS[name]
    generator = torch.Generator().manual_seed(bits)
    top, offsets = super_scales.TOPS[name]
    d, dmin = (torch.rand(2, 6, 2, generator=generator) * 1e-2).half()
    sc = torch.randint(1, top + 1, (6, 512 // group), generator=generator)
    m = torch.randint(offsets + 1, (6, 512 // group), generator=generator)
    d[0, 0] = 0
    grid = super_scales.grid(d, sc, None if symmetric else dmin, None if symmetric else m, 2 ** (bits - 1))
    return Quantized(torch.randint(2**bits, (6, 512), generator=generator).to(torch.uint8), *grid)


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_the_gguf_package_unpacks_them_bit_by_bit(name: str) -> None:
    result = made(name)
    found = torch.from_numpy(dequantize(to_super_blocks(result, name), NAMES[name]))
    d, sc, dmin, m = super_scales.parts_of(result.scale, result.zero, name)
    per = sc.shape[1] // d.shape[1]
    scale = (d.repeat_interleave(per, 1) * sc)[..., None]
    q = result.integers.float().unflatten(1, (sc.shape[1], -1))
    if dmin is None or m is None:
        expected = scale * (q - 2 ** (TWO_LEVELS[name][0] - 1))
    else:
        expected = scale * q - (dmin.repeat_interleave(per, 1) * m)[..., None]
    assert torch.equal(found, expected.flatten(1))
    alive = result.scale.repeat_interleave(512 // sc.shape[1], 1) > 0
    assert alive.any() and (found - result.dequantize())[alive].abs().max() < 2e-6


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_native_parts(name: str) -> None:
    args, result = QuantizationArgs.of(name, 4, None, False), made(name)
    supers = 256 // TWO_LEVELS[name][1]
    result.scale[0, :supers], result.zero[0, :supers] = result.scale[1, :supers], result.zero[1, :supers]
    parts = packed_parts(result, args)
    back = unpacked(parts, args, 512)
    assert torch.equal(back.scale, result.scale) and torch.equal(back.integers, result.integers)
    assert torch.allclose(back.zero, result.zero, rtol=1e-6)
    assert sum(part.nbytes for part in parts.values()) == packed_bytes(6, 512, args, 2)


@torch.no_grad()
@pytest.mark.parametrize(("name", "bits"), [("q4_k", 4), ("q6_k", 6)])
def test_a_run(opened_run: Callable[..., Finished], tmp_path: Path, name: str, bits: int) -> None:
    mixed = "*.o_proj: weights.format=int weights.bits=8 weights.symmetric=true weights.group_size=none"
    changes = {"weights.format": name, "weights.bits": bits, "overrides": mixed}
    run, folder = opened_run("w4a16", changes, WIDE), tmp_path / "export"
    gguf.write(run, folder)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(inspect(folder)).tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_down.weight"] == name.upper()
    assert types["blk.0.attn_output.weight"] == "Q8_0"
    ids = torch.randint(2, 2048, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = run_logits(run, ids)
    assert (read(folder)(ids).logits - logits).abs().max() < 1e-4 * logits.std()
    with pytest.raises(InputError, match=f"not written with weights in {name}, which this run has: use --format gguf"):
        mlx.check(run)


def test_a_width_that_is_no_multiple_of_256_is_refused(opened_run: Callable[..., Finished]) -> None:
    with pytest.raises(
        InputError, match=r"weights\.format q4_k has groups of 256, which do not divide the hidden size"
    ):
        opened_run("w4a16", {"weights.format": "q4_k"})
    with pytest.raises(
        InputError, match=r"q6_k has 6 bits, groups of 16 in 256 and no zero point, and weights.bits is"
    ):
        opened_run("w4a16", {"weights.format": "q6_k"}, WIDE)
