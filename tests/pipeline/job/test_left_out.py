"""A run says what it leaves out of its checkpoint, before the work and in its report."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rotoboa
from rotoboa.pipeline import stages
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.console.progress import Progress

Change = Callable[..., Any]


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A copy of the small Llama, to be changed."""
    return Path(shutil.copytree(llama, tmp_path / "copied"))


def test_a_run_names_what_it_leaves_out(
    copied: Path,
    change_tensors: Change,
    change_config: Change,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change_config(copied, tie_word_embeddings=True)  # and the head that is stored is another
    change_tensors(copied, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(2, 2)}))
    said: list[str] = []
    monkeypatch.setattr(Progress, "log", lambda self, message: said.append(message))
    changes = {"model": str(copied), "output": tmp_path / "run", "weights.bits": 8, "weights.method": "rtn"}
    report = stages.quantize(make_recipe("w4a16", changes)).to_json()
    words = [
        "Left out: a tensor of the checkpoint that 'llama' models have no place for (mtp.fc.weight).",
        "output layer",
    ]
    assert all(any(word in notice for notice in report["notices"]) for word in words)
    assert said[:2] == report["notices"][:2]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = rotoboa.load(tmp_path / "run", dtype=torch.float32)[0](ids).logits
        expected = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)(ids).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_inspect_names_it_too(copied: Path, change_tensors: Change) -> None:
    change_tensors(copied, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(2, 2)}))
    result = CliRunner().invoke(app, ["inspect", str(copied)])
    assert result.exit_code == 0 and "Left out: a tensor of the checkpoint" in result.stdout
