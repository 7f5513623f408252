"""Embedding and head on their way through a run: by rows, with the values they have as a whole."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rotoboa
from rotoboa.errors import RunError
from rotoboa.models.matrices import StoredMatrix, spans
from rotoboa.pipeline.job.job import Job, prepare
from rotoboa.pipeline.measure.evaluating import evaluate
from rotoboa.pipeline.rotating.outside_blocks import rotated_outer_layers
from rotoboa.pipeline.rotating.seeds import _embedded

MakeRecipe = Callable[..., Any]
FAMILIES = ("llama", "llama-biases", "opt", "gemma2", "gemma3_text")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "__defaults__", (7 * 32,))  # 7 rows of the families' small models


def job_of(make_recipe: MakeRecipe, folder: Path, **changes: Any) -> Job:
    return prepare(make_recipe("w4a16", {"model": str(folder), "output": folder / "run", **changes}))


@pytest.mark.parametrize("r1", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_rotated_by_rows(
    save_family: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path, name: str, r1: bool, few: None
) -> None:
    job = job_of(make_recipe, save_family(tmp_path, name, torch.bfloat16), **{"rotation.r1": r1})
    found, family = rotated_outer_layers(job), job.decoder.family
    whole = job.rotations.rotate_outer_layers(job.checkpoint.outer_layers(), family).map(
        lambda tensor: tensor.to(torch.bfloat16)
    )
    assert len(spans(whole.head)) > 10
    named, expected = (
        found.named(family) | {"head": found.head[:]},
        replace(whole, head=whole.embedding if found.tied else whole.head).named(family) | {"head": whole.head[:]},
    )
    assert named.keys() == expected.keys()
    assert all(torch.equal(named[key], expected[key]) for key in named)
    size = sum(matrix[:].numel() * 2 for matrix in (found.embedding, found.head))
    assert job.buffers.held == 0
    if r1 and not family.post_norms:
        assert job.buffers.spilled == size  # both lie in files
    else:
        assert job.buffers.spilled == 0 and isinstance(found.embedding, StoredMatrix)  # those of the checkpoint
        assert found.tied == job.checkpoint.config.tie_word_embeddings == (name != "llama")


@pytest.mark.parametrize("r1", [True, False])
def test_a_head_of_another_dtype_gets_that_of_the_embedding(
    llama: Path, make_recipe: MakeRecipe, change_tensors: Callable[..., Path], tmp_path: Path, r1: bool
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    noise = torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": noise}))
    job = job_of(make_recipe, folder, **{"rotation.r1": r1})
    found = rotated_outer_layers(job)
    assert found.head[:].dtype == found.embedding[:].dtype == torch.bfloat16
    assert torch.equal(found.head[:], noise.bfloat16()) != r1


def test_what_does_not_fit_is_named(save_family: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = save_family(tmp_path, "llama", torch.float16)
    job = job_of(make_recipe, folder)
    job = replace(job, rotations=_Huge(job.rotations))  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"tensor lm_head\.weight does not fit into float16 once rotated"):
        rotated_outer_layers(job)


class _Huge:
    """Rotations that blow up the head."""

    def __init__(self, rotations: Any) -> None:
        self.rotations = rotations

    turned = True

    def rotate_outer_layers(self, outer: Any, family: Any) -> Any:
        rotated = self.rotations.rotate_outer_layers(outer, family)
        rotated.head.mul_(1e9)
        return rotated


@pytest.mark.parametrize("name", FAMILIES)
def test_seeds_see_the_rotated_embedding(
    save_family: Callable[..., Path], make_recipe: MakeRecipe, tmp_path: Path, name: str
) -> None:
    job = job_of(make_recipe, save_family(tmp_path, name))
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    outer = job.rotations.rotate_outer_layers(job.checkpoint.outer_layers(), job.decoder.family)
    assert torch.equal(_embedded(job, job.rotations, ids), job.decoder.embed(outer, ids))


def test_a_run_never_reads_a_whole_matrix(
    llama: Path, make_recipe: MakeRecipe, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does evaluation; and what comes out is what it is when all rows are taken at once."""
    changes: dict[str, Any] = {"model": str(llama), "rotation.seeds": 2, "weights.head": 0.5, "calibration.samples": 2}
    changes["rotation.r1"] = "merged"  # where the stream is not turned, the embedding is mapped whole, and written
    whole = rotoboa.quantize(make_recipe("w4a4kv4", {**changes, "output": tmp_path / "whole"}))
    seen: list[int] = []
    read = StoredMatrix.__getitem__

    def recorded(self: StoredMatrix, index: slice | Tensor) -> Tensor:
        rows = read(self, index)
        seen.append(rows.numel() // self.shape[1])
        return rows

    monkeypatch.setattr(StoredMatrix, "__getitem__", recorded)
    monkeypatch.setattr(spans, "__defaults__", (40 * 64,))  # 40 rows
    report = rotoboa.quantize(make_recipe("w4a4kv4", {**changes, "output": tmp_path / "parts"}))
    evaluated = evaluate(tmp_path / "parts").to_json()
    vocabulary = prepare(make_recipe("w4a4kv4", changes)).decoder.shape.vocabulary
    assert 0 < max(seen) <= 8 * 64 < vocabulary  # a batch of tokens
    assert sum(count == 40 for count in seen) > 2 * (vocabulary // 40)
    for file in sorted((tmp_path / "whole" / "blocks").iterdir()):
        assert (tmp_path / "parts" / "blocks" / file.name).read_bytes() == file.read_bytes()
    for part in ("perplexity", "divergence"):
        assert evaluated[part] == report[part]
    (ours,), (theirs,) = report["perplexity"].values(), whole["perplexity"].values()
    assert ours == pytest.approx(theirs, rel=1e-6)
