"""A run that fails on its way is one sentence and exit code 1; what it had finished is kept, and looked at again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner

from rotoboa.boa.block.block import quantize_block
from rotoboa.boa.block.context import BlockContext, BlockResult, Streams
from rotoboa.models.checkpoint import SINGLE
from rotoboa.pipeline import quantizing
from rotoboa.pipeline.cli.app import app

if TYPE_CHECKING:
    from rotoboa.tests.pipeline.conftest import User

Change = Callable[..., object]


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        *("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        "model.layers.1.input_layernorm.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_tensor_is_named(user: User, copied: Path, change_tensors: Change, name: str, value: float) -> None:
    change_tensors(copied, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    assert f"{SINGLE}: tensor {name} holds NaN or Inf" in user.fails(1, "--quiet")


def test_a_block_that_overflows_is_named_and_the_finished_ones_stay(
    user: User, copied: Path, change_tensors: Change
) -> None:
    # Finite, but its products are not.
    name = "model.layers.1.self_attn.q_proj.weight"
    change_tensors(copied, lambda tensors: tensors[name].fill_(3e38))
    message = user.fails(1, "--quiet", "--rotation.r1", "none", "--no-rotation.r2", "--no-rotation.scale")
    assert "block 1, self_attn.q_proj, self_attn.k_proj: what weighs its outputs holds NaN or Inf" in message
    assert "look for NaN, Inf or huge values in the checkpoint" in message
    manifest = json.loads((user.output / "manifest.json").read_text())
    assert [block["index"] for block in manifest["blocks"]] == [0] and "finished" not in manifest
    assert (user.output / "blocks" / "00000.safetensors").is_file()


def test_a_run_that_fails_goes_on_once_the_cause_is_gone(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(context: BlockContext, streams: Streams) -> BlockResult:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return quantize_block(context, streams)

    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "quantize_block", failing)
        message = user.fails(1, "--quiet")
    assert (
        f"the run in {user.output} failed: CUDA out of memory. Tried to allocate; the same command goes on" in message
    )
    first = (user.output / "blocks" / "00000.safetensors").stat().st_mtime_ns
    user.succeeds()
    assert (user.output / "blocks" / "00000.safetensors").stat().st_mtime_ns == first


def test_a_full_disk_while_it_runs(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rotoboa.pipeline.storage.run_writer.write_tensors", full)
    assert "failed: [Errno 28] No space left on device; the same command goes on" in user.fails(1, "--quiet")


def test_a_damaged_block_of_an_unfinished_run(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr("rotoboa.pipeline.stages.write_native")
        result = CliRunner().invoke(app, user.arguments("--quiet"))
    assert result.exit_code == 1
    (user.output / "blocks" / "00001.safetensors").write_bytes(b"")
    message = user.fails(2, "--quiet")
    assert (
        f"00001.safetensors is missing or damaged (its checksum differs): remove {user.output} and start again"
        in message
    )
