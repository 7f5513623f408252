"""The schemes of layers as `inspect` shows them: of a plan, of a run, and of a run that is not finished."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rotoboa.boa.scheme import QuantizationArgs, QuantizationScheme
from rotoboa.errors import InputError
from rotoboa.export.spec import Spec
from rotoboa.models.families import FAMILIES
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.console.plan_table import scheme_table
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.estimate.schemes import planned_schemes, schemes_of_run
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.storage.files import read_manifest


def rows(schemes: dict[str, Any] | None) -> list[tuple[str, ...]]:
    assert schemes is not None
    return list(zip(*(map(str, column.cells) for column in scheme_table(schemes).columns), strict=True))


def inspected(*arguments: object) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["inspect", *map(str, arguments), "--json"])
    assert found.exit_code == 0, found.output
    return dict(json.loads(found.stdout))


def test_a_row_for_each_scheme(llama: Path) -> None:
    text = "blocks 0: weights.bits=4; *.down_proj: weights.bits=8; *.1.*.down_proj: weights.bits=16"
    options = ("--recipe", "w2a16", "--weights.group_size", 16, "--embedding.bits", 8)
    found = inspected(llama, *options, "--overrides", text)["schemes"]
    assert rows(found) == [
        ("W4A16 g16", "6", "all others"),
        ("W2A16 g16", "6", "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj in block 1"),
        ("W8A16 g16", "1", "down_proj in block 0"),
        ("W16A16", "1", "down_proj in block 1"),
        ("W8", "1", "embedding"),
        ("W16", "1", "head"),
    ]
    assert found["layers"][2]["blocks"] == {"down_proj": [0]} and found["layers"][2]["weights"]["num_bits"] == 8
    printed = CliRunner().invoke(app, ["inspect", str(llama), *map(str, options), "--overrides", text]).stdout
    assert "down_proj in block 1" in printed


def test_where_all_are_alike_there_is_no_table(llama: Path, cheap_run: Callable[..., Path]) -> None:
    assert "schemes" not in inspected(llama, "--recipe", "w2a16")
    assert "schemes" not in inspected(llama, "--recipe", "w2a16", "--overrides", "*.q_proj: weights.bits=2")
    assert "schemes" not in inspected(cheap_run("w4a16"))
    options = ("--recipe", "w2a16", "--embedding.bits", 4, "--embedding.group_size", 32)
    assert rows(inspected(llama, *options)["schemes"]) == [
        ("W2A16", "14", "all"), ("W4 g32", "1", "embedding"), ("W16", "1", "head"),
    ]  # fmt: skip


def planned(
    family: str, blocks: int, spec: Spec, fields: dict[str, Any] | None = None, tied: bool = False
) -> dict[str, Any] | None:
    recipe = build_recipe(load_recipe("w2a16"), fields or {})
    return planned_schemes(recipe, spec, FAMILIES[family], blocks, tied=tied)


def test_a_plan_with_a_budget_says_what_is_chosen_later() -> None:
    kept = QuantizationScheme(QuantizationArgs(8), QuantizationArgs(symmetric=True))
    spec = Spec(2, layers={"model.layers.3.mlp.down_proj": kept})
    found = planned("llama", 4, spec, {"weights.budget": 3, "weights.choices": "2,3,4"})
    assert rows(found)[:2] == [
        ("W2/3/4A16, by the budget", "27", "all others"),
        ("W8A16", "1", "down_proj in block 3"),
    ]
    assert found is not None and found["layers"][0]["weights"]["choices"] == [2, 3, 4]


@pytest.mark.parametrize("changes", [{"weights.budget": 3.4}, {"weights.size": 0}, {"weights.budget": 8}])
def test_what_the_file_of_a_budget_can_take(llama: Path, changes: dict[str, Any]) -> None:
    """Held against uniform runs: 2 and 4 bits everywhere, and what the budget says."""
    fields = {"model": str(llama), "weights.choices": "2,4", "head.bits": 8}
    sizes = {}
    for bits in (2, 4):
        found = plan(build_recipe(load_recipe("w2a16"), {**fields, "weights.bits": bits}))["sizes"]
        sizes[bits] = found["quantized"]
    if "weights.size" in changes:
        changes = {"weights.size": (sizes[2] + sizes[4]) // 2}
    found = plan(build_recipe(load_recipe("w2a16"), {**fields, **changes}))
    least, most = found["budget"]["least"], found["budget"]["most"]
    assert least == sizes[2]
    if "weights.size" in changes:
        assert most == changes["weights.size"]
    elif changes["weights.budget"] == 8:
        assert most == sizes[4]
    else:
        numbers = found["model"]["quantized_parameters"]
        assert most == pytest.approx(least + (3.4 - plan_bits(llama, fields)) * numbers / 8, abs=2)
    assert "found by measurement" in found["notices"][0] and "the file will take" in found["notices"][0]
    with pytest.raises(InputError, match="with 2 bits everywhere: give more, fewer bits"):
        plan(build_recipe(load_recipe("w2a16"), {**fields, "weights.size": "30KB"}))


def plan_bits(model: Path, fields: dict[str, Any]) -> float:
    """Bits a weight of the blocks at 2 bits everywhere."""
    return float(plan(build_recipe(load_recipe("w2a16"), fields))["sizes"]["bits_per_weight"])


def test_eighty_blocks_stay_short() -> None:
    whole = Spec(2, group_size=64)
    wide = QuantizationScheme(QuantizationArgs(4, 64), whole.scheme.input_activations)
    names = [f"model.layers.{index}.mlp.down_proj" for index in (*range(10), *range(11, 80, 2))]
    found = rows(planned("llama", 80, Spec(2, group_size=64, layers=dict.fromkeys(names, wide)), tied=True))
    assert found == [
        ("W2A16 g64", str(560 - 45), "all others"),
        ("W4A16 g64", "45", "down_proj in blocks 0-9, 11, 13, 15 ... 79 (45 of them)"),
        ("W16", "1", "embedding, which is the head"),
    ]


def test_some_experts_of_a_block() -> None:
    family = replace(FAMILIES["mixtral"], expert_count=3)
    name = family.projections[-1]
    spec = Spec(2, layers={f"{family.layers}.1.{name}": QuantizationScheme(QuantizationArgs(4))})
    found = rows(planned_schemes(build_recipe(load_recipe("w2a16")), spec, family, 2, tied=False))
    assert found[:2] == [("W2A16", "25", "all others"), ("W4A16", "1", "some experts down_proj in block 1")]


def test_a_run_with_a_budget(cheap_run: Callable[..., Path], tmp_path: Path) -> None:
    run = cheap_run("w2a16", {"weights.budget": 3.4, "weights.choices": "2,3,4,8", "head.bits": 8})
    budget = read_manifest(run).budget
    assert budget is not None
    found = inspected(run)["schemes"]
    for unit in budget.units:
        (group,) = [group for group in found["layers"] if group["weights"]["num_bits"] == unit.bits]
        for name in unit.layers:
            assert unit.block in group["blocks"][name.rpartition(".")[2]]
    assert sum(group["count"] for group in found["layers"]) == 14
    assert rows(found)[-2:] == [("W16", "1", "embedding"), ("W8", "1", "head")]

    # Before the model is written, the manifest says it.
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    early = schemes_of_run(copy, read_manifest(copy))
    assert early is not None and early["layers"] == found["layers"] and "head" not in early
    assert len(rows(early)) == len(found["layers"])
