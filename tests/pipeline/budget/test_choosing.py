"""A budget of bits in a run: it fits, it is spent where it counts, and every part of the run knows it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rotoboa
from rotoboa.boa.ranks import Ranks
from rotoboa.boa.scheme import QuantizationArgs
from rotoboa.errors import InputError
from rotoboa.export.formats.native import load_native
from rotoboa.export.packing import ALL_PARTS
from rotoboa.pipeline.budget.choosing import choose_bits
from rotoboa.pipeline.budget.sensitivity import Unit, measure_units
from rotoboa.pipeline.console.progress import Progress
from rotoboa.pipeline.console.sizes import exported_sizes
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.estimate.schemes import schemes_of_run
from rotoboa.pipeline.job.job import Job, prepare
from rotoboa.pipeline.measure.evaluating import evaluate
from rotoboa.pipeline.recipe.layers import choice_args
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.rotating.outside_blocks import rotated_outer_layers
from rotoboa.pipeline.storage.manifest import BudgetEntry
from rotoboa.pipeline.storage.run_folder import RunFolder, recipe_of

MakeRecipe = Callable[..., Recipe]
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sequences are judged; units are rounded by the others."""
    monkeypatch.setattr("rotoboa.pipeline.budget.sensitivity.TOKENS", 96)


@pytest.fixture(scope="module")
def make_job(llama: Path, make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    def make(**changes: Any) -> Job:
        output = tmp_path_factory.mktemp("jobs") / "run"
        return prepare(make_recipe("w2a16", {"model": str(llama), "output": output, **changes}), "cpu", Ranks())

    return make


def chosen(job: Job, tokens: torch.Tensor) -> BudgetEntry:
    found = choose_bits(job, tokens, rotated_outer_layers(job), QUIET)
    assert found is not None
    return found


def measured(job: Job, tokens: torch.Tensor, bits: tuple[int, ...]) -> list[Unit]:
    choices = {b: QuantizationArgs(b) for b in bits}
    return measure_units(job, tokens, rotated_outer_layers(job), lambda index, name: True, choices, QUIET)


def test_costs_are_divergences_of_the_model(make_job: Callable[..., Job], tokens: torch.Tensor) -> None:
    """Those of other bits are taken to rise as the layer's error does: held against measuring them."""
    job = make_job()
    units = measured(job, tokens, (3, 4, 5))
    assert [(unit.block, unit.site) for unit in units] == [
        (block, site) for block in range(2) for site in ("qkv", "output", "gate_up", "down")
    ]
    alone = {bits: measured(job, tokens, (bits,)) for bits in (3, 5)}
    for i, unit in enumerate(units):
        assert unit.costs[3] > unit.costs[4] > unit.costs[5] > 0
        for bits, found in alone.items():
            assert unit.costs[bits] == pytest.approx(found[i].costs[bits], rel=0.5)


def test_a_budget_fits_and_is_spent(make_job: Callable[..., Job], tokens: torch.Tensor) -> None:
    taken = []
    for bits in (2.8, 3.5, 5.0):
        found = chosen(make_job(**{"weights.budget": bits}), tokens)
        assert found.taken <= found.room
        assert len({unit.bits for unit in found.units}) > 1
        taken.append(found.taken)
    assert taken == sorted(taken)


def test_what_an_override_says_stays(make_job: Callable[..., Job], tokens: torch.Tensor) -> None:
    job = make_job(**{"weights.budget": 4, "overrides": "*.down_proj: weights.bits=8; blocks 0: activations.bits=8"})
    found = chosen(job, tokens)
    assert {unit.site for unit in found.units} == {"qkv", "output", "gate_up"}
    spec = job.budgeted(found).spec
    assert spec.layers["model.layers.1.mlp.down_proj"].weights.num_bits == 8
    first = spec.layers["model.layers.0.self_attn.q_proj"]
    assert first.input_activations.num_bits == 8
    assert first.weights.num_bits == next(unit.bits for unit in found.units if (unit.block, unit.site) == (0, "qkv"))


def test_too_little_is_refused(make_job: Callable[..., Job], tokens: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"weights\.size leaves .* for layers that take .* in 2 bits: give more"):
        chosen(make_job(**{"weights.size": "20KB"}), tokens)


def test_a_run_with_a_size(llama: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        "w2a16",
        {"model": str(llama), "output": tmp_path / "run", "weights.size": "230KB", "weights.choices": "2,3,4,8",
         "embedding.bits": 4, "head.bits": 4, "evaluation.baseline": True},
    )  # fmt: skip
    report = rotoboa.quantize(recipe)
    run = tmp_path / "run"
    size = (run / "model" / "model.safetensors").stat().st_size
    assert 0.85 * 230_000 < size <= 230_000 and size == report["sizes"]["quantized"]
    kept = BudgetEntry.model_validate(json.loads((run / "manifest.json").read_text())["budget"])
    assert report["budget"] == kept.model_dump(mode="json")
    model, _ = load_native(run)
    for unit in kept.units:
        for name in unit.layers:
            assert model.get_submodule(f"model.layers.{unit.block}.{name}").bits == unit.bits
    (name,) = report["perplexity"]
    again = evaluate(run).to_json()
    assert again["perplexity"][name]["quantized"] == pytest.approx(report["perplexity"][name]["quantized"], rel=1e-6)


@pytest.mark.parametrize(
    ("choices", "config", "budget"),
    [("3,nvfp4,fp8", {}, 5.5), ("q2_k,q4_k,6", {"hidden_size": 256, "intermediate_size": 256}, 4.5)],
    ids=["floating point", "K types"],
)
def test_formats_are_chosen_from(
    cheap_run: Callable[..., Path], choices: str, config: dict[str, Any], budget: float
) -> None:
    """By their own bytes; what is chosen is stored, loaded and named."""
    run = cheap_run("w2a16", {"weights.budget": budget, "weights.choices": choices}, config)
    manifest = json.loads((run / "manifest.json").read_text())
    kept, recipe = BudgetEntry.model_validate(manifest["budget"]), recipe_of(run)
    args = choice_args(recipe)
    assert list(args) == sorted(args) and len({unit.bits for unit in kept.units}) > 1
    stored, taken = exported_sizes(run / "model"), 0
    model, _ = load_native(run)
    for unit in kept.units:
        assert list(unit.costs) == list(args) and unit.costs[min(args)] > unit.costs[max(args)] > 0
        for name in unit.layers:
            full = f"model.layers.{unit.block}.{name}"
            layer = model.get_submodule(full)
            assert (layer.bits, layer.format) == (unit.bits, args[unit.bits].format)
            taken += sum(stored.get(f"{full}.{part}", 0) for part in ALL_PARTS)
    assert taken == kept.taken <= kept.room
    planned = plan(recipe)["budget"]
    assert planned["least"] < sum(stored.values()) <= planned["most"]
    shown = {group["scheme"] for group in (schemes_of_run(run, RunFolder.open(run).manifest) or {})["layers"]}
    assert any("nvfp4" in name or "q4_k" in name for name in shown), shown


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ("4,nvfp4", r"weights.choices is 4,nvfp4 but must be some of 2 to 8 and nvfp4, .*of each width one"),
        ("3,nvfp5", "must be some of 2 to 8 and nvfp4"),
    ],
)
def test_choices_that_are_none(choices: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Recipe(weights={"choices": choices})


def test_formats_need_their_widths(make_job: Callable[..., Job]) -> None:
    with pytest.raises(
        InputError, match=r"weights.choices q4_k has groups of 256, which do not divide .*: leave it out"
    ):
        make_job(**{"weights.budget": 4, "weights.choices": "2,q4_k"})
    with pytest.raises(InputError, match=r"weights.zfold is for format int alone"):
        make_job(**{"weights.budget": 4, "weights.choices": "2,nvfp4", "weights.zfold": True})
