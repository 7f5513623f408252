"""Runs of several bits, and with few bits outside the blocks, in GGUF: each tensor in its own type, exactly."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor

from rotoboa.boa.scheme import QuantizationArgs
from rotoboa.boa.solver.rounding import Quantized
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import compressed_tensors, gguf, mlx
from rotoboa.export.formats.gguf_reader import inspect, read
from rotoboa.export.ggml.gguf_blocks import Q2_0, TYPES, to_blocks
from rotoboa.export.ggml.gguf_types import file_type, type_of
from rotoboa.export.ggml.k_blocks import NAMES
from rotoboa.pipeline.verifying import run_logits

Opened = Callable[..., Finished]
ENDS = {"embedding.bits": 8, "embedding.symmetric": True, "head.bits": 4, "head.group_size": 32}
HALF = "blocks 0: weights.bits=16; *.down_proj: weights.bits=8"


def types(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(inspect(folder)).tensors}


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 2048, (1, 40), generator=torch.Generator().manual_seed(0))


def test_q2_0_is_what_llama_cpp_unpacks() -> None:
    """Two bits a value from the lowest on, less one, times d: as dequantize_row_q2_0 in ggml-quants.c has it."""
    integers = torch.randint(4, (3, 128), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    scale = torch.tensor([[0.5, 0.25], [1.0, 2.0], [3.0, 0.125]])
    result = Quantized(integers, scale, torch.full((3, 2), 2.0))
    data, weight = to_blocks(result, Q2_0), result.dequantize()
    assert data.shape == (3, 36)
    for r in range(3):
        for c in range(128):
            block = data[r, c // 64 * 18 :][:18]
            d = np.frombuffer(block[:2].tobytes(), np.float16)[0]
            q = block[2 + c % 64 // 4] >> 2 * (c % 4) & 3
            assert float(d) * (int(q) - 1) == weight[r, c]
    assert file_type(Q2_0) == 41  # LLAMA_FTYPE_MOSTLY_Q2_0 in llama.h


def test_every_type_names_its_file() -> None:
    """By the numbers of llama.h."""
    numbers = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_0": 41}
    numbers |= {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}
    assert {kind.name: file_type(kind) for kind in (*TYPES.values(), *NAMES.values())} == numbers


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "config", "expected"),
    [
        (
            {**ENDS, "weights.group_size": 32, "overrides": HALF},
            None,
            {"token_embd": "Q8_0", "output": "Q4_1", "blk.0.ffn_down": "Q8_0", "blk.0.attn_q": "BF16",
             "blk.1.attn_q": "Q4_0", "blk.1.ffn_down": "Q8_0"},
        ),
        (
            {"embedding.format": "q4_k", "head.format": "q6_k"}, {"hidden_size": 256},
            {"token_embd": "Q4_K", "output": "Q6_K", "blk.1.attn_q": "Q4_0"},
        ),
        (  # widths are filled up for what down has: 80 to 128, but rows of block 0 for its type too
            {"weights.bits": 2, "overrides": "blocks 0: weights.bits=16; *.o_proj: weights.bits=5"},
            {"intermediate_size": 80},
            {"blk.1.attn_q": "Q2_0", "blk.1.ffn_down": "Q2_0", "blk.1.attn_output": "Q5_0", "blk.0.ffn_down": "BF16"},
        ),
    ],
)  # fmt: skip
def test_each_tensor_in_its_own_type(
    opened_run: Opened, ids: Tensor, tmp_path: Path, changes: dict[str, Any], config: Any, expected: dict[str, str]
) -> None:
    run, folder = opened_run("w4a16", {"weights.symmetric": True, **changes}, config), tmp_path / "export"
    gguf.write(run, folder)
    found = types(folder)
    assert {name: found[f"{name}.weight"] for name in expected} == expected
    found_logits, logits = read(folder)(ids).logits, run_logits(run, ids, plain=True)
    offsets = 0.02 if "head.bits" in changes else 1e-4  # of Q4_1
    assert (found_logits - logits).abs().max() < offsets * logits.std()
    gguf.write(run, tmp_path / "dense", dense=True)
    assert not {"Q4_0", "Q4_1", "Q8_0", "Q2_0", "Q5_0", "Q4_K", "Q6_K"} & set(types(tmp_path / "dense").values())
    assert (read(tmp_path / "dense")(ids).logits - logits).abs().max() < 1e-4 * logits.std()


def test_k_types_of_head_alone_are_refused_elsewhere(opened_run: Opened) -> None:
    run = opened_run("w4a16", {"weights.symmetric": True, "head.format": "q6_k"}, {"hidden_size": 256})
    for name, writer in {"MLX": mlx, "compressed-tensors": compressed_tensors}.items():
        with pytest.raises(InputError, match=f"{name} is not written with weights in q6_k, .*: use --format gguf"):
            writer.check(run)


@torch.no_grad()
@pytest.mark.parametrize(
    ("ends", "config", "kind"),
    [
        ({"embedding.bits": 8, "embedding.symmetric": True}, {}, "Q8_0"),
        ({"embedding.format": "q6_k"}, {"hidden_size": 256}, "Q6_K"),
    ],
)
def test_a_packed_embedding_that_is_the_head(
    opened_run: Opened, ids: Tensor, tmp_path: Path, ends: dict[str, Any], config: dict[str, Any], kind: str
) -> None:
    changes = {"weights.symmetric": True, "rotation.r1": "none", **ends}
    run = opened_run("w4a16", changes, {"tie_word_embeddings": True, **config})
    assert run.spec.tied_head
    gguf.write(run, tmp_path)
    found = types(tmp_path)
    assert found["token_embd.weight"] == kind and "output.weight" not in found
    logits = run_logits(run, ids, plain=True)
    assert (read(tmp_path)(ids).logits - logits).abs().max() < 1e-4 * logits.std()


def test_a_head_that_has_no_place_is_said(opened_run: Opened) -> None:
    run = opened_run("w4a16", {"weights.symmetric": True})
    assert gguf.warning(run) is None
    tied = replace(run, spec=replace(run.spec, r1=True, tied_head=True))
    assert "--head.bits 8" in str(gguf.warning(tied))


def test_what_a_type_cannot_hold_is_refused(mixed_run: Opened, tmp_path: Path) -> None:
    o = "*.o_proj: weights.bits=4"
    for changes, words in (
        ({}, r"symmetric ones of 3 in model\.layers\.0\.self_attn\.o_proj: override it with weights\.bits 4, or"),
        (
            {"overrides": o, "embedding.bits": 8},
            r"asymmetric ones of 8 in the embedding: .* --embedding\.symmetric, or",
        ),
        ({"overrides": o, "head.bits": 4, "head.group_size": 16}, r"one for 16 in the head: .* --head\.group_size 32"),
        ({"overrides": "*.o_proj: weights.bits=2 weights.group_size=32"}, "Q2_0 has a scale for 64 weights"),
        ({"overrides": "*: weights.bits=16"}, "all layers of this run have 16-bit weights"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            gguf.write(mixed_run(changes), tmp_path / "export")
        assert "\n" not in str(caught.value) and not (tmp_path / "export").exists()
    with pytest.raises(InputError, match=r"asymmetric ones of 2: quantize with --weights\.symmetric,"):
        type_of(QuantizationArgs(2))
