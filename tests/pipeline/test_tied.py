"""Embedding and head that are tied, and that nothing turns or moves, are stored once, unchanged, in every format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.errors import InputError
from rotoboa.export.formats.gguf_reader import inspect
from rotoboa.export.runtime.memory import model_bytes
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.outer_layers import OuterLayers
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.exporting import FORMATS, export, open_finished
from rotoboa.pipeline.measure.evaluating import evaluate
from rotoboa.pipeline.storage.run_folder import RunFolder
from rotoboa.pipeline.verifying import run_logits, verify

from ..model_files import config, ids, tensors

MakeRecipe = Callable[..., Any]
SaveFamily = Callable[..., Path]
OFF, ONLINE = {"rotation.r1": False}, {"rotation.r1": "online"}
# Post norms keep the stream from being turned, whatever the recipe says.
TIED: dict[str, dict[str, Any]] = {"llama-biases": OFF, "qwen2": ONLINE, "opt": OFF, "gemma2": {}, "gemma3_text": {}}
SMALL = {"calibration.samples": 4, "calibration.sequence_length": 40, "evaluation.windows": 3}


@torch.no_grad()
@pytest.mark.parametrize("name", TIED)
def test_one_matrix(save_family: SaveFamily, make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    """Stored, planned, loaded, measured and saved again."""
    folder, run = save_family(tmp_path / "model", name, torch.bfloat16), tmp_path / "run"
    recipe = make_recipe("w4a16", {"model": str(folder), "output": run, **SMALL, **TIED[name]})
    planned, report = plan(recipe), rotoboa.quantize(recipe)
    checkpoint, stored = Checkpoint(folder), tensors(run / "model")
    names, family = OuterLayers.names(checkpoint.family), checkpoint.family
    assert config(run / "model")["tie_word_embeddings"] is True
    assert f"{family.head}.weight" not in stored
    assert checkpoint.outer_layers().tied and open_finished(RunFolder.open(run)).outer_layers().tied
    original = tensors(folder)
    outside = {key for key in original if key in names}
    assert outside and all(torch.equal(stored[key], original[key]) for key in outside), "the final norm is not folded"
    assert report["peak_memory_bytes"]["spilled"] == planned["calibration"]["spilled"] == 0
    assert planned["sizes"]["quantized"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert report["sizes"]["head"] == planned["sizes"]["head"] == 0 < report["sizes"]["embedding"]
    assert report["bits_per_weight_of_file"] == planned["sizes"]["bits_per_weight_of_file"]
    reference: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert planned["model"]["parameters"] == sum(p.numel() for p in reference.parameters())

    model, _ = rotoboa.load(run, dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected = run_logits(open_finished(RunFolder.open(run)), ids())
    assert expected.std() > 0.1
    assert torch.equal(model(ids()).logits, expected)
    model.save_pretrained(tmp_path / "again")
    assert f"{family.head}.weight" not in tensors(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids()).logits, expected)
    if name.startswith("gemma"):  # the others have biases, which are counted in float32
        small, _ = rotoboa.load(run)
        assert report["memory"]["model"]["quantized"] == model_bytes(small)

    evaluated = evaluate(run).to_json()
    assert evaluated["perplexity"] == report["perplexity"] and evaluated["memory"] == report["memory"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-biases", "gemma3_text"])
def test_a_moved_head_is_stored(save_family: SaveFamily, make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    folder, run = save_family(tmp_path / "model", name, torch.bfloat16), tmp_path / "run"
    before = (folder / "model.safetensors").read_bytes()
    changes = {"model": str(folder), "output": run, "weights.head": 0.5, **SMALL, **TIED[name]}
    recipe = make_recipe("w4a16", changes)
    planned, report = plan(recipe), rotoboa.quantize(recipe)
    assert (folder / "model.safetensors").read_bytes() == before
    assert any("weights.head moves the output layer away" in notice for notice in report["notices"])
    stored, head = tensors(run / "model"), "lm_head.weight"
    embedding = stored["model.embed_tokens.weight"]
    assert config(run / "model")["tie_word_embeddings"] is False
    assert torch.equal(embedding, tensors(folder)["model.embed_tokens.weight"])
    assert 0 < (stored[head] - embedding).float().norm() < 0.5 * embedding.float().norm()
    assert report["peak_memory_bytes"]["spilled"] == planned["calibration"]["spilled"] == 2 * embedding.numel()
    assert planned["sizes"]["quantized"] == sum(t.numel() * t.element_size() for t in stored.values())
    model, _ = rotoboa.load(run, dtype=torch.float32)
    assert torch.equal(model(ids()).logits, run_logits(open_finished(RunFolder.open(run)), ids()))


@pytest.mark.parametrize(("head", "method"), [(0.5, "rtn"), (0.0, "gptq")])
def test_a_head_that_stays_needs_no_notice(
    save_llama: SaveFamily, make_recipe: MakeRecipe, tmp_path: Path, head: float, method: str
) -> None:
    folder, run = save_llama(tmp_path / "model", tie_word_embeddings=True), tmp_path / "run"
    changes = {"model": str(folder), "output": run, "weights.head": head, "weights.method": method, **OFF}
    notices = rotoboa.quantize(make_recipe("w4a16", changes))["notices"]
    assert not [notice for notice in notices if "output layer" in notice]
    assert config(run / "model")["tie_word_embeddings"] is True


@pytest.fixture(scope="module")
def tied_run(save_llama: SaveFamily, make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that every format holds. Not to be changed."""
    folder = tmp_path_factory.mktemp("tied")
    model = save_llama(folder / "model", tie_word_embeddings=True)
    changes = {"model": str(model), "output": folder / "run", "weights.symmetric": True, "weights.group_size": 32}
    rotoboa.quantize(make_recipe("w4a16", changes | OFF))
    return folder / "run"


@pytest.mark.usefixtures("runtimes_here")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_one_matrix(tied_run: Path, tmp_path: Path, name: str) -> None:
    folder = export(tied_run, name, output=tmp_path / name)
    assert config(folder)["tie_word_embeddings"] is True
    if name == "gguf":
        found = {tensor.name for tensor in GGUFReader(inspect(folder)).tensors}
        assert "token_embd.weight" in found and "output.weight" not in found
    else:
        stored = tensors(folder)
        assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    judged = [result for result in verify(folder, run=tied_run) if result.tolerance is not None]
    assert judged and all(result.passed for result in judged)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gguf"])
def test_a_head_that_an_untied_export_lacks_is_missed(
    tied_run: Path, tmp_path: Path, change_config: Callable[..., None], name: str
) -> None:
    folder = export(tied_run, name, output=tmp_path / name)
    change_config(folder, tie_word_embeddings=False)
    (folder / "export.json").write_text(json.dumps({**json.loads((folder / "export.json").read_text()), "files": {}}))
    with pytest.raises(InputError, match=r"has no tensor (lm_head|output)\.weight"):
        verify(folder, run=tied_run)


@torch.no_grad()
def test_finished_runs_of_before_are_read(tied_run: Path, tmp_path: Path, text: Path) -> None:
    """They have a copy of the embedding as head, and their config does not tie the two."""
    run = tmp_path / "run"
    for file in (file for file in tied_run.rglob("*") if file.is_file()):
        (run / file.relative_to(tied_run)).parent.mkdir(parents=True, exist_ok=True)
        (run / file.relative_to(tied_run)).write_bytes(file.read_bytes())
    stored = tensors(run / "model")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, run / "model" / "model.safetensors", {"format": "pt"})
    (run / "model" / "config.json").write_text(json.dumps({**config(run / "model"), "tie_word_embeddings": False}))
    model, _ = rotoboa.load(run)
    once, _ = rotoboa.load(tied_run)
    assert torch.equal(model(ids()).logits, once(ids()).logits)
    report, evaluated = json.loads((tied_run / "report.json").read_text()), evaluate(run).to_json()
    assert evaluated["perplexity"] == report["perplexity"]
    assert evaluated["memory"]["model"]["quantized"] == model_bytes(model) > model_bytes(once)
    assert "lm_head.weight" in tensors(export(run, "native"))


def test_tied_outer_layers_by_name(save_family: SaveFamily, tmp_path: Path) -> None:
    """As they go from one rank to the others."""
    checkpoint = Checkpoint(save_family(tmp_path / "model", "gemma2"))
    outer = checkpoint.outer_layers()
    named = outer.named(checkpoint.family)
    assert set(named) == {"model.embed_tokens.weight", "model.norm.weight"}
    found = OuterLayers.of(checkpoint.family, named)
    assert found.tied and torch.equal(found.head[:], outer.head[:])
    assert OuterLayers.missing(checkpoint.family, named) == ["lm_head.weight"]
    assert OuterLayers.missing(checkpoint.family, named, tied=True) == []
