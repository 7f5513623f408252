"""Embedding and head in few bits: stored, planned, loaded, measured and saved again as they are computed with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import rotoboa
from rotoboa.boa.online.attention import NAME
from rotoboa.errors import InputError
from rotoboa.export.packed_matrix import PackedMatrix
from rotoboa.export.runtime.embedding import QuantizedEmbedding, TiedHead
from rotoboa.export.runtime.linear import QuantizedLinear
from rotoboa.export.runtime.memory import model_bytes
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.outer_layers import TURN, OuterLayers
from rotoboa.pipeline import stages
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.exporting import open_finished
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.measure.evaluating import evaluate
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.storage.run_folder import RunFolder
from rotoboa.pipeline.verifying import run_logits, verify
from rotoboa.rotation.fold import neutral
from rotoboa.rotation.rotate import Rotations

from ..model_files import config, ids, tensors

MakeRecipe = Callable[..., Recipe]
SaveFamily = Callable[..., Path]
SMALL = {"calibration.samples": 4, "calibration.sequence_length": 40, "evaluation.windows": 3, "weights.method": "gptq"}
MERGED, OFF = {"rotation.r1": "merged"}, {"rotation.r1": "none"}
# By name: family, what of the recipe is other, the bits of embedding and head in the end, and whether they are one.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int], bool]] = {
    "both": ("llama", {**MERGED, "embedding.bits": 4, "embedding.group_size": 8, "head.bits": 3}, (4, 3), False),
    "groups of the head": ("llama", {**OFF, "embedding.bits": 8, "head.bits": 6, "head.group_size": 16}, (8, 6), False),
    "embedding alone": ("qwen3", {**MERGED, "embedding.bits": 6}, (6, 16), False),
    "head alone": ("llama", {**MERGED, "head.bits": 4, "weights.head": 0.5}, (16, 4), False),
    "tied, head alone": ("llama-biases", {**OFF, "head.bits": 4}, (16, 4), False),
    "tied": ("llama-biases", {**OFF, "embedding.bits": 4, "embedding.group_size": 16}, (4, 4), True),
    "tied, scaled": ("gemma2", {"embedding.bits": 8, "head.bits": 3}, (8, 8), True),
    "tied, moved": ("gemma3_text", {"embedding.bits": 8, "weights.head": 0.5}, (8, 16), False),
    "tied, merged": ("qwen2", {**MERGED, "embedding.bits": 4, "embedding.group_size": 8, "head.bits": 3}, (4, 4), True),
    "tied, merged, moved": ("qwen2", {**MERGED, "embedding.bits": 8, "weights.head": 0.5}, (8, 16), False),
    "K types": ("llama", {**MERGED, "embedding.format": "q4_k", "head.format": "q6_k"}, (4, 6), False),
    "K types, tied, merged": ("qwen2", {**MERGED, "embedding.format": "q3_k", "head.format": "q6_k"}, (3, 3), True),
    "LayerNorm": ("opt", {**MERGED, "embedding.bits": 4, "head.bits": 4}, (4, 4), False),
}
AGAIN = ("both", "tied, scaled", "tied, merged", "K types", "LayerNorm")  # of each kind one, since it takes long


def size_of(stored: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_stored_planned_and_loaded(save_family: SaveFamily, make_recipe: MakeRecipe, tmp_path: Path, case: str) -> None:
    name, changes, bits, tied = CASES[case]
    wide = {"hidden_size": 256} if case.startswith("K") else {}
    folder, run = save_family(tmp_path / "model", name, torch.bfloat16, **wide), tmp_path / "run"
    recipe = make_recipe("w4a16", {"model": str(folder), "output": run, **SMALL, **changes})
    planned, report = plan(recipe), rotoboa.quantize(recipe)
    family, stored = Checkpoint(folder).family, tensors(run / "model")
    outer = open_finished(RunFolder.open(run)).outer_layers()
    modules = (family.embedding, family.head)
    for matrix, module, wanted in zip((outer.embedding, outer.head), modules, bits, strict=True):
        assert isinstance(matrix, PackedMatrix) == (wanted < 16)
        if isinstance(matrix, PackedMatrix):
            assert matrix.bits == wanted and f"{module}.weight" not in stored
    assert outer.tied == tied and config(run / "model")["tie_word_embeddings"] is False
    turned = tied and "rotation.r1" in changes and changes["rotation.r1"] == "merged"
    of_head = {key.removeprefix(f"{family.head}.") for key in stored if key.startswith(f"{family.head}.")}
    assert of_head == {TURN} if turned else bool(of_head) != tied

    assert planned["sizes"]["quantized"] == size_of(stored)
    for part in ("embedding", "head", "blocks", "bits_per_weight_of_file"):
        found = report if part.startswith("bits") else report["sizes"]
        assert found[part] == planned["sizes"][part]
    assert report["sizes"]["embedding"] + report["sizes"]["head"] + report["sizes"]["blocks"] == size_of(stored)
    assert report["peak_memory_bytes"]["spilled"] == planned["calibration"]["spilled"]

    model, _ = rotoboa.load(run, dtype=torch.float32)
    expected = run_logits(open_finished(RunFolder.open(run)), ids())
    assert expected.std() > 0.1
    assert (model(ids()).logits - expected).abs().max() < 1e-4
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding if bits[0] < 16 else nn.Embedding)
    assert isinstance(head, TiedHead if tied else QuantizedLinear if bits[1] < 16 else nn.Linear)
    small, _ = rotoboa.load(run)
    assert small.get_input_embeddings().weight.dtype == (torch.int32 if bits[0] < 16 else torch.bfloat16)
    assert small(ids()).logits.dtype == torch.bfloat16
    if name not in ("llama-biases", "opt", "qwen2"):  # biases are counted in float32
        assert report["memory"]["model"]["quantized"] == model_bytes(small)

    if case not in AGAIN:
        return
    model.save_pretrained(tmp_path / "again")
    assert set(tensors(tmp_path / "again")) == set(stored)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    evaluated = evaluate(run).to_json()
    assert evaluated["perplexity"] == report["perplexity"] and evaluated["memory"] == report["memory"]
    assert all(result.passed for result in verify(run))


@torch.no_grad()
def test_rounded_as_each_alone(save_family: SaveFamily, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The embedding to nearest; the head by its solver, which loses less of what it reads than rounding to nearest."""
    folder = save_family(tmp_path / "model", "llama")
    changes = {"model": str(folder), **SMALL, **MERGED, "embedding.bits": 4, "head.bits": 3, "calibration.samples": 32}
    errors = {}
    for method in ("rtn", "gptq"):
        recipe = make_recipe("w4a16", {**changes, "output": tmp_path / method, "weights.method": method})
        kl = rotoboa.quantize(recipe)["divergence"]
        errors[method] = next(iter(kl.values()))["kl"]
    rtn, gptq = (open_finished(RunFolder.open(tmp_path / name)).outer_layers() for name in ("rtn", "gptq"))
    assert torch.equal(rtn.embedding[:], gptq.embedding[:]) and not torch.equal(rtn.head[:], gptq.head[:])
    job = prepare(recipe)
    exact = job.rotations.rotate_outer_layers(job.checkpoint.outer_layers(), job.decoder.family)
    assert isinstance(gptq.head, PackedMatrix)
    for matrix, whole in ((rtn.embedding, exact.embedding), (rtn.head, exact.head)):
        assert isinstance(matrix, PackedMatrix)
        step = matrix.stored["scale"].float()
        inside = (matrix[:] - whole[:]).abs() <= 0.51 * step  # the rest is clipped
        assert inside.float().mean() > 0.9
    assert errors["gptq"] < errors["rtn"]


@torch.no_grad()
@pytest.mark.parametrize("case", ["both", "tied"])
def test_without_the_head(save_family: SaveFamily, make_recipe: MakeRecipe, tmp_path: Path, case: str) -> None:
    name, changes, _, _ = CASES[case]
    folder, run = save_family(tmp_path / "model", name, torch.bfloat16), tmp_path / "run"
    quick = {**SMALL, "weights.method": "rtn", "evaluation.baseline": False, **changes, **OFF}
    rotoboa.quantize(make_recipe("w4a16", {"model": str(folder), "output": run, **quick}))
    whole, _ = rotoboa.load(run, dtype=torch.float32)
    model = AutoModel.from_pretrained(run / "model", dtype=torch.float32)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    expected = whole(ids(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(model(ids()).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "again")
    assert not any("lm_head" in key for key in tensors(tmp_path / "again"))
    again = AutoModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids()).last_hidden_state, expected)


def test_generates(save_family: SaveFamily, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A token after the other what all at once do."""
    folder, run = save_family(tmp_path / "model", "gemma2", torch.bfloat16), tmp_path / "run"
    quick = {**SMALL, "weights.method": "rtn", "evaluation.baseline": False, "embedding.bits": 4}
    rotoboa.quantize(make_recipe("w4a16", {"model": str(folder), "output": run, **quick}))
    model, _ = rotoboa.load(run, dtype=torch.float32)
    found = model.generate(ids()[:1, :8], max_new_tokens=4, do_sample=False)
    assert torch.equal(model(found).logits[0, 7:-1].argmax(-1), found[0, 8:])


def test_goes_on_with_the_same_bytes(
    save_family: SaveFamily,
    make_recipe: MakeRecipe,
    interrupted: Callable[..., Path],
    model_files: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    folder = save_family(tmp_path / "model", "llama", torch.bfloat16)
    changes = {"model": str(folder), **SMALL, **MERGED, "embedding.bits": 4, "head.bits": 3, "weights.head": 0.5}
    recipe = make_recipe("w4a16", {**changes, "output": tmp_path / "whole"})
    rotoboa.quantize(recipe)
    again = make_recipe("w4a16", {**changes, "output": tmp_path / "run"})
    run = interrupted(again, stages, "write_native")
    rotoboa.quantize(again)
    assert model_files(run) == model_files(tmp_path / "whole")


def test_a_group_that_does_not_fit(save_family: SaveFamily, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "model", "llama")
    for section in ("embedding", "head"):
        changes = {f"{section}.bits": 4, f"{section}.group_size": 12, "output": tmp_path / "run", **OFF}
        with pytest.raises(InputError, match=rf"{section}\.group_size 12 does not divide the hidden size 32: give one"):
            rotoboa.quantize(make_recipe("w4a16", {"model": str(folder), **changes}))
        k_type = {f"{section}.format": "q4_k", "output": tmp_path / "run", **OFF}
        with pytest.raises(InputError, match=rf"{section}\.format q4_k has rows in parts of 256 .* size 32: give"):
            rotoboa.quantize(make_recipe("w4a16", {"model": str(folder), **k_type}))
    assert not (tmp_path / "run").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_what_is_before_a_head_that_is_the_rotated_embedding(
    save_family: SaveFamily, tmp_path: Path, name: str
) -> None:
    """x^ diag(g) E^T, whatever g is, of a stream that is turned."""
    checkpoint = Checkpoint(save_family(tmp_path, name))
    decoder = Decoder(checkpoint.config, attention=NAME)
    family, rotations = decoder.family, Rotations.of(decoder.shape, r1=True, r2=False, r3=False, r4=False, seed=3)
    outer = checkpoint.outer_layers()
    tied = replace(outer, head=outer.embedding)
    turned, before = rotations.rotate_embedding(outer.embedding[:]), rotations.before_head(outer.norm, family)
    hidden = torch.randn(5, decoder.shape.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = rotations.rotate_stream(hidden, family)
    root = hidden.square().mean(-1, keepdim=True).sqrt()  # of the rotated stream too
    exact = hidden / root * (outer.norm.double() + family.norm_offset) @ outer.embedding[:].double().T
    assert exact.std() > 0.1 and (x / root @ before @ turned.T - exact).abs().max() < 1e-9
    assert (x / root @ turned.T - exact).abs().max() > 0.1

    one = OuterLayers(turned.float(), neutral(outer.norm, family), turned.float(), before_head=before.float())
    one = replace(one, head=one.embedding)
    expected = decoder.logits(tied)(hidden.float())
    assert (decoder.logits(one)(x.float()) - expected).abs().max() < 1e-4
    rotated, ours = rotations.rotate_outer_layers(tied, family).head[:], one.untied()
    assert not ours.tied and ours.before_head is None and ours.head.shape == outer.embedding.shape
    assert (ours.head[3:7] - rotated[3:7]).abs().max() < 1e-5
    assert (decoder.logits(ours)(x.float()) - expected).abs().max() < 1e-4
    assert torch.equal(OuterLayers.of(family, one.named(family)).before_head, before.float())  # type: ignore[arg-type]
    assert outer.untied() is outer


@torch.no_grad()
def test_one_matrix_in_the_rotated_stream(
    save_family: SaveFamily,
    make_recipe: MakeRecipe,
    interrupted: Callable[..., Path],
    model_files: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    """Its logits are those of two matrices, but for rounding; and a run goes on with the same bytes."""
    folder = save_family(tmp_path / "model", "qwen2", torch.bfloat16)
    changes = {"model": str(folder), **SMALL, **MERGED, "weights.bits": 8, "embedding.bits": 8}
    recipe = make_recipe("w4a16", {**changes, "output": tmp_path / "one"})
    one = rotoboa.quantize(recipe)
    run = interrupted(make_recipe("w4a16", {**changes, "output": tmp_path / "run"}), stages, "write_native")
    rotoboa.quantize(make_recipe("w4a16", {**changes, "output": run}))
    assert model_files(run) == model_files(tmp_path / "one")
    two = rotoboa.quantize(make_recipe("w4a16", {**changes, "embedding.bits": 16, "output": tmp_path / "two"}))
    assert one["sizes"]["head"] == 0 < two["sizes"]["head"]
    original: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = original(ids()).logits
    for name in ("one", "two"):
        model, _ = rotoboa.load(tmp_path / name, dtype=torch.float32)
        assert (model(ids()).logits - expected).std() < 0.05 * expected.std(), name
    with pytest.raises(InputError, match=r"lacks lm_head\.turn: run the recipe again"):
        stored = {key: tensor for key, tensor in tensors(run / "model").items() if key != "lm_head.turn"}
        save_file(stored, run / "model" / "model.safetensors", {"format": "pt"})
        open_finished(RunFolder.open(run)).outer_layers()
    with pytest.raises(InputError, match=r"has no tensor lm_head\.turn"):
        rotoboa.load(run)
