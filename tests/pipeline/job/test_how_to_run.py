"""A checkpoint whose config.json says how somebody ran it: nothing that is made of it does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rotoboa
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.running import what_it_is
from rotoboa.pipeline.exporting import export
from rotoboa.pipeline.verifying import verify

FIELDS: dict[str, Any] = {
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "experts_implementation": "deepgemm",
    "output_hidden_states": True,
    "return_dict": False,
    "cache_implementation": "hybrid",
    "_name_or_path": "/home/somebody/model",
    "auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"},
}


@pytest.fixture
def checkpoint(save_family: Callable[..., Path], change_config: Callable[..., None], tmp_path: Path) -> Path:
    folder = save_family(tmp_path / "model", "llama", num_hidden_layers=1)
    change_config(folder, **FIELDS)
    generation = {"bos_token_id": 0, "cache_implementation": "static", "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@torch.no_grad()
def test_run_and_exports_do_not(checkpoint: Path, make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    small = {"calibration.sequence_length": 40, "weights.method": "rtn", "evaluation.windows": 2}
    settings = {"model": str(checkpoint), "output": tmp_path / "run", "evaluation.baseline": False, **small}
    rotoboa.quantize(make_recipe("w4a16", settings))
    run = tmp_path / "run"
    model, _ = rotoboa.load(run, dtype=torch.float32)
    assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    exports = [export(run, name) for name in ("gptq", "compressed-tensors", "native")]
    for folder in (run / "model", *exports):
        config = json.loads((folder / "config.json").read_text())
        assert config["hidden_size"] == 32 and "quantization_config" in config
        assert not {name.strip("_") for name in FIELDS} & {name.strip("_") for name in config}
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 0, "temperature": 0.5}
    assert all(result.passed for result in verify(exports[0]))


def test_an_older_run_is_loaded_and_exported(
    cheap_run: Callable[..., Path], change_config: Callable[..., None], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(cheap_run("w4a16"), tmp_path / "run"))
    change_config(run / "model", _attn_implementation="flash_attention_2")
    with pytest.warns(UserWarning, match="'flash_attention_2' is not used"):
        rotoboa.load(run)
    assert all(result.passed for result in verify(export(run, "gptq")))


def test_a_checkpoint_is_read_without(checkpoint: Path) -> None:
    config = Checkpoint(checkpoint).config
    assert config._attn_implementation is None and config._experts_implementation is None
    assert config.return_dict and not config.output_hidden_states and not config.output_attentions


def test_what_it_is_stays() -> None:
    config = {"hidden_size": 32, "dtype": "bfloat16", "use_cache": False, "attention_bias": True, "attn_temperature": 1}
    assert what_it_is({**config, **FIELDS}) == config
