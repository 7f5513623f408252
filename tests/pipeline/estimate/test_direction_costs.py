"""What directions of inputs cost: held against the tensors of a run, and against sums by hand."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.tests.fixtures import MakeRecipe


def inspected(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_directions_of_a_run_and_of_its_plan(tiny_run: Path) -> None:
    found = json.loads(inspected(str(tiny_run), "--json"))["directions"]
    assert found == json.loads(inspected("tiny", "--recipe", "w4a4kv4", "--json"))["directions"]
    with safe_open(tiny_run / "model" / "model.safetensors", "pt") as file:
        held = [file.get_tensor(name) for name in file.keys() if name.endswith("input_directions")]  # noqa: SIM118
    hidden, kept, rows = 256, 32, (256, 128, 128, 256, 688, 688)  # of q, k, v, O, gate and up; down reads 688
    assert len(held) == 4 * 3 and found["bytes"] == sum(tensor.nbytes for tensor in held) > 0
    weights, beside = hidden * (sum(rows) + 688), sum(kept * (2 * hidden + out) for out in rows)
    assert found["kept"] == kept and found["products"] == pytest.approx(beside / weights)
    assert found["bits_per_weight"] == pytest.approx(3 * hidden * kept * 16 / weights)
    assert "of each input of q, k, v, O, gate and up" in inspected(str(tiny_run))


def test_without_directions_nothing_is_said(llama: Path, make_recipe: MakeRecipe) -> None:
    assert "directions" not in plan(make_recipe("w4a4kv4", {"model": str(llama), "activations.directions": 0}))
    assert "directions" not in plan(make_recipe("w4a16", {"model": str(llama), "activations.directions": 8}))


def test_more_than_a_quarter_of_the_channels_are_not_kept(llama: Path, make_recipe: MakeRecipe) -> None:
    assert plan(make_recipe("w4a4kv4", {"model": str(llama)}))["directions"]["kept"] == 64 // 4
