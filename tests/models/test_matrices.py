"""Embedding and head are read by rows, and nothing of them is held."""

import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rotoboa.boa.online.attention import NAME
from rotoboa.errors import InputError, RunError
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.matrices import StoredMatrix, spans
from rotoboa.models.outer_layers import OuterLayers


def stored(folder: Path, tensor: Tensor) -> StoredMatrix:
    save_file({"m": tensor, "other": torch.ones(3)}, folder / "m.safetensors")
    return StoredMatrix(folder / "m.safetensors", "m", tensor.shape, "model.m")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = stored(tmp_path, whole)
    assert matrix.shape == (50, 8)
    for index in (slice(3, 17), slice(None), torch.tensor([49, 0, 0]), torch.tensor([[1, 2], [3, 49]])):
        assert torch.equal(matrix[index], whole[index]) and matrix[index].dtype == dtype


@pytest.mark.parametrize(("rows", "elements", "count"), [(50, 80, 10), (50, 799, 99), (50, 1, 1), (7, 80, 10)])
def test_spans(rows: int, elements: int, count: int) -> None:
    parts = spans(torch.empty(rows, 8), elements)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
    assert {part.stop - part.start for part in parts[:-1]} <= {count}


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_only_the_rows_asked_for_are_in_memory(tmp_path: Path) -> None:
    matrix, process = stored(tmp_path, torch.ones(1 << 14, 1 << 10)), psutil.Process()  # 64 MiB
    part = matrix[:16]  # whatever the first read needs besides is there now
    before = process.memory_info().rss
    part = matrix[torch.arange(0, 1 << 14, 1 << 11)]
    for rows in spans(matrix, 1 << 20):  # all of it, 4 MiB at a time
        part = matrix[rows]
        assert process.memory_info().rss - before < 16 * 2**20
    assert part.shape == (1 << 10, 1 << 10)
    whole = matrix[:]
    assert process.memory_info().rss - before > 60 * 2**20  # so it would show
    del whole


def test_nan_and_damage_are_named(tmp_path: Path) -> None:
    matrix = stored(tmp_path, torch.tensor([[0.0, 1.0], [2.0, float("nan")]]))
    assert torch.equal(matrix[:1], torch.tensor([[0.0, 1.0]]))
    for index in (slice(None), torch.tensor([1])):
        with pytest.raises(RunError, match=r"m\.safetensors: tensor model\.m holds NaN or Inf"):
            matrix[index]
    matrix.file.write_bytes(matrix.file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"tensor model\.m cannot be read .*: download it again"):
        matrix[:1]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "__defaults__", (7 * 32,))  # 7 rows of the families' small models


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_logits_and_embeddings_by_rows(
    save_family: Callable[..., Path], tmp_path: Path, name: str, small: None
) -> None:
    checkpoint = Checkpoint(save_family(tmp_path, name))
    decoder, outer = Decoder(checkpoint.config, attention=NAME, dtype=torch.float64), checkpoint.outer_layers()
    assert isinstance(outer.embedding, StoredMatrix) and isinstance(outer.head, StoredMatrix)
    assert len(spans(outer.head)) > 10
    bias = torch.randn(len(outer.head[:]), generator=torch.Generator().manual_seed(1)) if name == "opt" else None
    outer = OuterLayers(**{**vars(outer), "head_bias": bias})
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    hidden = decoder.embed(outer, tokens)
    assert torch.equal(hidden, decoder.embed(outer.map(lambda tensor: tensor), tokens))
    expected = decoder.norm(outer.norm, outer.norm_bias)(hidden) @ outer.head[:].double().T
    if bias is not None:
        expected = expected + bias
    if name == "gemma2":
        cap = checkpoint.config.final_logit_softcapping
        expected = torch.tanh(expected / cap) * cap
    torch.testing.assert_close(decoder.logits(outer)(hidden), expected, rtol=0, atol=1e-12)
