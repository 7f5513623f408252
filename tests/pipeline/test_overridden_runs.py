"""A run whose layers have schemes of their own: planned, stored, loaded and measured as it is computed with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.export.packing import PARTS
from rotoboa.export.runtime.linear import QuantizedLinear
from rotoboa.export.runtime.memory import model_bytes
from rotoboa.export.stored_sizes import projection_bytes
from rotoboa.pipeline.console.sizes import exported_sizes
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.exporting import open_finished
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.measure.evaluating import evaluate
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.storage.files import read_report
from rotoboa.pipeline.storage.run_folder import RunFolder
from rotoboa.pipeline.verifying import run_logits, verify

IDS = torch.randint(2, 2048, (2, 20), generator=torch.Generator().manual_seed(0))
OVERRIDES = (
    "*.down_proj: weights.bits=16 activations.bits=8; block 1: weights.bits=3 weights.group_size=16;"
    "*.q_proj: weights.bits=16; *.gate_proj: weights.symmetric=true"
)
ENDS = {"embedding.bits": 8, "embedding.group_size": 16, "head.bits": 6}


@pytest.fixture(scope="module")
def recipe(llama: Path, make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a run that is finished. Not to be changed."""
    changes = {"model": str(llama), "weights.method": "gptq", "overrides": OVERRIDES, **ENDS}
    made = make_recipe("w4a4kv4", {**changes, "output": tmp_path_factory.mktemp("overridden") / "run"})
    rotoboa.quantize(made)
    return made


@torch.no_grad()
def test_loaded_and_measured(recipe: Recipe, tmp_path: Path) -> None:
    run = recipe.output
    assert run is not None
    expected = run_logits(open_finished(RunFolder.open(run)), IDS)
    model, _ = rotoboa.load(run, dtype=torch.float32)
    assert (model(IDS).logits - expected).abs().max() < 1e-4
    packed = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    bits = {name.removeprefix("model.layers."): layer.bits for name, layer in packed.items()}
    assert bits["0.mlp.up_proj"] == 4 and bits["1.mlp.up_proj"] == bits["1.mlp.down_proj"] == 3
    assert "0.mlp.down_proj" not in bits and not any("q_proj" in name for name in bits)
    down = packed["model.layers.1.mlp.down_proj"]
    assert down.transform.quantizer is not None and down.transform.quantizer.bits == 8 and down.scale.shape[1] == 6
    model.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert all(result.passed for result in verify(run))
    small, _ = rotoboa.load(run)
    evaluated = evaluate(run).to_json()
    assert evaluated["memory"]["model"]["quantized"] == model_bytes(small)


def test_bits_of_layers_add_up_to_the_file(recipe: Recipe) -> None:
    """As the plan has them, as they are on disk, and as the report counts them."""
    run = recipe.output
    assert run is not None
    job, planned = prepare(recipe), plan(recipe)
    stored, family = exported_sizes(run / "model"), job.decoder.family
    by_layer = projection_bytes(job.decoder, job.spec, job.checkpoint.dtype.itemsize)
    assert len(by_layer) == len(family.projections) * job.decoder.shape.blocks
    for name, size in by_layer.items():
        assert sum(stored.get(f"{name}.{part}", 0) for part in (*PARTS, "weight")) == size, name
    report = read_report(run).to_json()
    sizes, weights = report["sizes"], planned["model"]["quantized_parameters"]
    assert 8 * sum(by_layer.values()) / weights == report["bits_per_weight"] == planned["sizes"]["bits_per_weight"]
    norms = sum(size for name, size in stored.items() if "norm" in name)
    found = sum(size for name, size in stored.items() if name.endswith(("center", "input_directions")))
    assert sizes["blocks"] == sum(by_layer.values()) + norms + found
    assert sizes["blocks"] + sizes["embedding"] + sizes["head"] == sum(stored.values())
    headers = 0
    for file in (run / "model").glob("*.safetensors"):
        headers += 8 + int.from_bytes(file.read_bytes()[:8], "little")
        with safe_open(file, framework="pt") as reader:
            assert set(reader.keys()) == set(stored)
    assert sizes["quantized"] == sum(stored.values()) + headers, "every byte of the file"
