"""What many tests stand on: a short text, small Llama checkpoints, and finished runs, made once a session."""

import argparse
import html
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import rotoboa
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

from .small_families import make_family, save_as_family

# Grids without a search and few row blocks: the code is the same, and a run of two blocks takes a second.
QUICK = {
    "weights.grid": "minmax",
    "weights.refine": 1,
    "weights.starts": 1,
    "weights.tabu": 0,
    "weights.rows": 8,
    "calibration.samples": 4,
    "calibration.sequence_length": 64,
    "evaluation.windows": 4,
    "evaluation.references": False,
    "evaluation.report": False,
}


MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some 3,000 tokens of the embedded model, short because every run turns it into tokens anew."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(argparse.__file__).read_text(encoding="utf-8")[:10000], encoding="utf-8")
    return path


def _save_llama(
    folder: Path, *, shard: str = "5GB", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any
) -> Path:
    """A random Llama with the embedded model's tokenizer; norms and biases are not those of a fresh model."""
    sizes: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_llama() -> Callable[..., Path]:
    """save_llama(folder, hidden_size=...): as `_save_llama`."""
    return _save_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks: hidden 64, ffn 96, 4 query and 2 key heads of 16. Not to be changed."""
    return _save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def change_tensors() -> Callable[..., Path]:
    """change_tensors(folder, change): what `change` makes of the tensors of a checkpoint in one file."""

    def apply(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # of the file that is written
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return folder

    return apply


@pytest.fixture(scope="session")
def change_config() -> Callable[..., None]:
    """change_config(folder, hidden_size=...): other values in the config.json of a checkpoint."""

    def apply(folder: Path, **changes: Any) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


@pytest.fixture(scope="session")
def family_model() -> Callable[..., nn.Module]:
    """family_model("gemma2", attention="eager", sliding_window=...): as `make_family`."""
    return make_family


@pytest.fixture(scope="session")
def save_family() -> Callable[..., Path]:
    """save_family(folder, "gemma2", dtype): as `save_as_family`."""
    return save_as_family


@pytest.fixture(scope="session")
def make_recipe(text: Path) -> MakeRecipe:
    """make_recipe("w2a16", {"model": ...}): a recipe of the package by its name, made small."""

    def make(name: str, overrides: dict[str, Any]) -> Recipe:
        data = {"calibration.dataset": str(text), "evaluation.dataset": str(text)}
        return build_recipe(load_recipe(name), QUICK | data | overrides)

    return make


@pytest.fixture(scope="session")
def cheap_run(
    llama: Path, save_llama: Callable[..., Path], make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """cheap_run("w4a16", {"weights.bits": 3}, config={...}): a finished run, rounded to nearest. Not to be changed."""
    made: dict[str, Path] = {}

    def run(name: str, changes: dict[str, Any] | None = None, config: dict[str, Any] | None = None) -> Path:
        key = repr((name, *(sorted((part or {}).items()) for part in (changes, config))))
        if key not in made:
            folder = tmp_path_factory.mktemp("cheap")
            model = save_llama(folder / "llama", **config) if config else llama
            fixed = {
                "model": str(model),
                "output": folder / "run",
                "weights.method": "rtn",
                "evaluation.baseline": False,
            }
            rotoboa.quantize(make_recipe(name, fixed | (changes or {})))
            made[key] = folder / "run"
        return made[key]

    return run


@pytest.fixture(scope="session")
def leave_out_drawings() -> Callable[[pytest.MonkeyPatch], None]:
    """leave_out_drawings(patch): as `_leave_out_drawings`."""
    return _leave_out_drawings


def _leave_out_drawings(patch: pytest.MonkeyPatch) -> None:
    """Pictures hold what their marks are called, and are not drawn: drawing one page takes seconds."""

    def svg(chart: Any, description: str) -> str:
        return f"<svg><title>{html.escape(description)} {html.escape(repr(chart._titles))}</title></svg>"

    patch.setattr("rotoboa.eval.drawing.charts.Chart._draw", lambda self: "")
    patch.setattr("rotoboa.eval.drawing.charts.Chart.svg", svg)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without drawings."""
    _leave_out_drawings(monkeypatch)


@pytest.fixture
def runtimes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes are asked in this process: others take seconds to start; `pipeline/test_serving.py` starts one."""

    def run(command: list[str], **_: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])  # behind the interpreter and -I
            runpy.run_path(command[2], run_name="__main__")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("rotoboa.export.runtimes.ask.subprocess", SimpleNamespace(run=run))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> Path:
    """A finished w4a4kv4 run of the embedded model. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    rotoboa.quantize(make_recipe("w4a4kv4", {"output": folder}))
    return folder
