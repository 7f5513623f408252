"""GGUF: what the gguf package reads back is the run exactly; llama.cpp's order of rows, sizes and tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rotoboa.boa.solver.rounding import Quantized
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import gguf, gguf_metadata
from rotoboa.export.formats.gguf import permute
from rotoboa.export.formats.gguf_reader import inspect
from rotoboa.export.ggml.gguf_blocks import Q2_0, TYPES, from_q2_0, to_blocks

Opened = Callable[..., Finished]
SYMMETRIC = {"weights.symmetric": True}
# head_dim 32, so that the attention width is a multiple of 32; ffn 80 is none, and is filled up to 96.
NARROW = {"intermediate_size": 80}


def read(file: Path) -> tuple[GGUFReader, dict[str, Tensor]]:
    reader = GGUFReader(file)
    return reader, {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


@pytest.mark.parametrize(("bits", "symmetric"), TYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_blocks_are_dequantized_to_the_weights(bits: int, symmetric: bool, groups: int) -> None:
    """As the gguf package reads them: exactly, but for an offset that float16 rounds by less than a part of a step."""
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(2**bits, (64, 192), generator=generator).to(torch.uint8)
    scale = torch.rand(64, groups, generator=generator).half().float() * 0.05
    scale[0] = 6e-8  # the smallest float16, whose offset has no more digits to lose
    zero = torch.full((64, groups), 2.0 ** (bits - 1))
    if not symmetric:
        zero = torch.randint(2**bits, (64, groups), generator=generator).float()
    result, kind = Quantized(integers, scale.half().float(), zero), TYPES[bits, symmetric]
    data = to_blocks(result, kind)
    block, size = GGML_QUANT_SIZES[kind]
    assert data.shape == (64, 192 // block * size) and data.dtype == np.uint8
    unpacked = from_q2_0(data) if kind == Q2_0 else dequantize(data, kind)
    found, weight = torch.from_numpy(unpacked), result.dequantize()
    if symmetric:
        assert torch.equal(found, weight)
        return
    step = result.scale.repeat_interleave(192 // groups, 1)
    error = ((found.double() - weight.double()) / step).abs()
    assert 0 < error.max() <= {4: 15, 5: 31}[bits] / 2048 + 1e-6
    power = torch.isin(zero, torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0])).repeat_interleave(192 // groups, 1)
    assert power.any() and error[power].max() < 1e-6


def test_permuted_rows_under_neighbour_rope_give_the_attention_of_half_rope() -> None:
    # The definition: llama.cpp turns (x[2i], x[2i+1]) where transformers turns (x[i], x[i + d/2]), by the same angle.
    heads, d, n = 2, 8, 6
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * d, n, dtype=torch.float64, generator=generator) for _ in range(2))
    angles = torch.arange(n)[:, None] * 100.0 ** (-torch.arange(d // 2) * 2 / d).double()
    cos, sin = (torch.cat([f(angles)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    theirs_q, theirs_k = apply_rotary_pos_emb(q.view(1, heads, d, n).mT, k.view(1, heads, d, n).mT, cos, sin)

    def neighbours(x: Tensor) -> Tensor:
        even, odd = x.mT.unflatten(-1, (d // 2, 2)).unbind(-1)
        c, s = angles.cos(), angles.sin()
        return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)

    ours_q, ours_k = (neighbours(permute(x, heads).view(1, heads, d, n)) for x in (q, k))
    assert (ours_q @ ours_k.mT - theirs_q @ theirs_k.mT).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("changes", "config", "kind"),
    [
        ({"weights.group_size": 32}, None, GGMLQuantizationType.Q4_0),
        ({}, NARROW, GGMLQuantizationType.Q4_0),
        ({"weights.bits": 5}, None, GGMLQuantizationType.Q5_0),
        ({"weights.bits": 8}, {"attention_bias": True, "mlp_bias": True, **NARROW}, GGMLQuantizationType.Q8_0),
    ],
)
def test_file_holds_the_run_exactly(
    opened_run: Opened, tmp_path: Path, changes: dict[str, Any], config: Any, kind: GGMLQuantizationType
) -> None:
    run = opened_run("w4a16", SYMMETRIC | changes, config)
    gguf.write(run, tmp_path / "export")
    file = inspect(tmp_path / "export")
    assert file.name == f"model-{kind.name}.gguf"
    reader, tensors = read(file)
    stored = {t.name: t.tensor_type for t in reader.tensors}
    f, s = run.family, run.shape
    names = {f.query: "attn_q", f.key: "attn_k", f.value: "attn_v", f.output: "attn_output", f.gate: "ffn_gate",
             f.up: "ffn_up", f.down: "ffn_down", f.attention_norm: "attn_norm", f.mlp_norm: "ffn_norm"}  # fmt: skip
    heads = {f.query: s.query_heads, f.key: s.key_heads}
    seen = 0
    for index in range(s.blocks):
        quantized, others = run.split(index)
        dense = {f"{name}.weight": result.dequantize() for name, result in quantized.items()} | others
        for name, weight in dense.items():
            part, _, last = name.rpartition(".")
            found = tensors[f"blk.{index}.{names[part]}.{last}"]
            if part in heads:  # back to transformers' order, row by row
                d = weight.shape[0] // heads[part]
                order = [h * d + (j % (d // 2)) * 2 + j // (d // 2) for h in range(heads[part]) for j in range(d)]
                found = found[order]
            inside = found[tuple(slice(n) for n in weight.shape)]
            assert torch.equal(inside, weight.float())
            assert found.count_nonzero() == inside.count_nonzero()  # what is filled up is zero
            assert stored[f"blk.{index}.{names[part]}.{last}"] == (
                kind if part in quantized and last == "weight" else 0
            )
            seen += 1
    outer = run.outer_layers()
    embedding, norm, head = outer.embedding[:], outer.norm, outer.head[:]
    for name, tensor in {"token_embd": embedding, "output_norm": norm, "output": head}.items():
        assert torch.equal(tensors[f"{name}.weight"], tensor.float())
    assert stored["token_embd.weight"] == GGMLQuantizationType.BF16
    assert len(tensors) == seen + 3


def test_a_dense_file_has_the_same_weights(opened_run: Opened, tmp_path: Path) -> None:
    run = opened_run("w4a16", SYMMETRIC, NARROW)
    for dense in (False, True):
        gguf.write(run, tmp_path / str(dense), dense=dense)
    _, packed = read(inspect(tmp_path / "False"))
    reader, unpacked = read(inspect(tmp_path / "True"))
    assert packed.keys() == unpacked.keys() and all(torch.equal(packed[name], unpacked[name]) for name in packed)
    blocks = {tensor.tensor_type for tensor in reader.tensors if tensor.name.startswith("blk.")}
    assert blocks == {GGMLQuantizationType.F32} and inspect(tmp_path / "True").name == "model-F32.gguf"


def test_metadata(opened_run: Opened, tmp_path: Path) -> None:
    run = opened_run("w4a16", SYMMETRIC, NARROW)
    gguf.write(run, tmp_path / "export")
    reader = GGUFReader(inspect(tmp_path / "export"))

    def value(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    expected = {
        "general.architecture": "llama", "general.file_type": 2, "general.quantization_version": 2,
        "llama.block_count": 2, "llama.context_length": 256, "llama.embedding_length": 64,
        "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": 2048, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: value(key) for key in expected} == expected
    assert value("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    data = json.loads((run.folder / "tokenizer.json").read_text())
    tokens = value("tokenizer.ggml.tokens")
    assert {token: index for index, token in enumerate(tokens)} == data["model"]["vocab"]
    assert value("tokenizer.ggml.merges") == [" ".join(pair) for pair in data["model"]["merges"]]
    assert value("tokenizer.ggml.token_type") == [3, 3] + [1] * 2046
    assert json.loads((tmp_path / "export" / "config.json").read_text())["intermediate_size"] == 96


def test_factors_of_llama3_rope_are_those_of_transformers(opened_run: Opened) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    run = opened_run("w4a16", SYMMETRIC, {"rope_parameters": rope})
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](run.transformers_config(), "cpu")
    plain = 1000.0 ** (-torch.arange(0, 16, 2) / 16)
    factors = gguf_metadata.rope_factors(run)
    assert factors is not None and factors.min() == 1 and factors.max() == 8 and len(set(factors.tolist())) > 2
    assert torch.allclose(plain / factors, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "changes", "config", "words"),
    [
        ("w4a4kv4", {}, None, "needs .*R3 .*which GGUF cannot hold"),
        ("w4a16", {"weights.bits": 8}, None, r"this run has asymmetric ones of 8: quantize with --weights\.symmetric,"),
        (
            "w3a16",
            SYMMETRIC,
            None,
            r"\(Q8_0\) bits; and this run has symmetric ones of 3: .* --weights\.bits 4",
        ),
        ("w4a16", SYMMETRIC | {"weights.group_size": 16}, None, "one for 16: quantize with --weights.group_size 32"),
        ("w4a16", SYMMETRIC, {"hidden_size": 48, "head_dim": 16}, "the hidden size 48 is no multiple"),
        ("w4a16", SYMMETRIC, {"hidden_act": "gelu"}, "has the activation silu, and this model gelu"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    opened_run: Opened, tmp_path: Path, recipe: str, changes: dict[str, Any], config: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        gguf.write(opened_run(recipe, changes, config), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_damaged_files_are_named(opened_run: Opened, tmp_path: Path) -> None:
    gguf.write(opened_run("w4a16", SYMMETRIC | {"weights.group_size": 32}), tmp_path)
    file = inspect(tmp_path)
    whole = file.read_bytes()

    def refusal(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(InputError) as caught:
            inspect(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for size in (0, 3, 100, 5000, len(whole) // 2, len(whole) - 40):
        assert "is not a whole GGUF file" in refusal(whole[:size])
    assert "is not a whole GGUF file (GGUF magic invalid)" in refusal(b"GGML" + whole[4:])
    assert "version 9" in refusal(whole[:4] + b"\x09" + whole[5:])
    for key, words in {
        b"llama.block_count": "has no tensor blk.2.attn_norm.weight",
        b"llama.feed_forward_length": "metadata ask for",
        b"llama.vocab_size": "tensor token_embd.weight has shape (2048, 64)",
    }.items():
        place = whole.index(key) + len(key) + 4  # behind the key is its type
        assert words in refusal(whole[:place] + bytes([whole[place] + 1]) + whole[place + 1 :])
    assert "does not say llama.block_count" in refusal(whole.replace(b"llama.block_count", b"llama.block_sount"))
    file.rename(tmp_path / "other.txt")
    with pytest.raises(InputError, match="has 0 GGUF files"):
        inspect(tmp_path)


def test_tokens_beyond_the_embedding_stay_out(opened_run: Opened, tmp_path: Path) -> None:
    run = opened_run("w4a16", SYMMETRIC, NARROW)
    folder = Path(shutil.copytree(run.folder, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)
    larger = Finished.open(folder, sorted((run.folder.parent / "blocks").iterdir()))
    gguf.write(larger, tmp_path / "export")
    reader = GGUFReader(inspect(tmp_path / "export"))
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert tokens is not None and len(tokens.contents()) == 2048 and "<|pad|>" not in tokens.contents()
    assert reader.get_field("tokenizer.ggml.padding_token_id") is None
