"""report.html of real, small runs: made at their end, made again, beside other runs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

import rotoboa
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.console.progress import short_layer
from rotoboa.pipeline.measure.pages import siblings
from rotoboa.pipeline.recipe.recipe import Recipe


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(
    llama: Path,
    make_recipe: Callable[..., Recipe],
    leave_out_drawings: Callable[[pytest.MonkeyPatch], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with `first` and `second`, whose pictures are not drawn, and with what is no run."""
    folder = tmp_path_factory.mktemp("runs")
    full = {"model": str(llama), "evaluation.references": True, "evaluation.report": True}
    with pytest.MonkeyPatch.context() as patch:
        leave_out_drawings(patch)
        rotoboa.quantize(make_recipe("w4a4kv4", {**full, "output": folder / "first"}))
        rotoboa.quantize(make_recipe("w2a16", {**full, "output": folder / "second"}))
    (folder / "notes").mkdir()
    (folder / "odd").mkdir()
    (folder / "odd" / "report.json").write_text("{")
    return folder


def test_a_run_leaves_its_page_and_what_it_is_made_of(runs: Path) -> None:
    text = (runs / "first" / "report.html").read_text(encoding="utf-8")
    assert "the only run with this model" in text and "Activations before and after rotation" in text
    assert str(runs) not in text, "a page names no path of the machine"
    layers = json.loads((runs / "first" / "manifest.json").read_text())["blocks"][1]["layers"]
    for layer in layers.values():
        found = layer["objective"]
        assert list(found) == ["quantized", "gptq", "rtn"] and 0 < found["quantized"] < found["rtn"]
    loss = layers["mlp.down_proj"]["objective"]["gptq"]
    assert (
        f"<td>1</td><td>down_proj</td><td>{layers['mlp.down_proj']['objective']['quantized']:.3g}</td><td>{loss:.3g}</td>"
        in text
    )
    found = load_file(runs / "first" / "activations.safetensors")
    assert found["before.kurtosis"].shape == found["after.peak"].shape == (2, 4)
    assert all(
        np.isfinite(found[f"{state}.{name}"]).all() for state in ("before", "after") for name in ("kurtosis", "peak")
    )
    assert found["before.picture.down.1"].shape == (64, 96)


def test_the_second_run_stands_beside_the_first(runs: Path) -> None:
    text = (runs / "second" / "report.html").read_text(encoding="utf-8")
    assert "2 runs of the same model on the same text" in text and '<th scope="col">first</th>' in text
    assert siblings(runs / "second") == [runs / "first"]


@pytest.mark.usefixtures("undrawn")
def test_made_again_it_is_the_same_page(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs, tmp_path / "runs"))
    before = (copy / "second" / "report.html").read_text(encoding="utf-8")
    (copy / "second" / "report.html").unlink()
    done = call("report", copy / "second")
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(copy / "second" / "report.html")]
    assert (copy / "second" / "report.html").read_text(encoding="utf-8") == before
    assert call("report", copy / "first", copy / "second").exit_code == 0
    assert "2 runs of the same model" in (copy / "first" / "report.html").read_text(encoding="utf-8")


def test_storage_adds_up_to_the_exported_model(runs: Path) -> None:
    text = re.sub(r"<svg.*?</svg>", "", (runs / "first" / "report.html").read_text(encoding="utf-8"), flags=re.S)
    report = json.loads((runs / "first" / "report.json").read_text())
    shown = re.search(r"The model takes ([\d.]+) KiB", text)
    assert shown and float(shown[1]) == pytest.approx(report["sizes"]["quantized"] / 1024, rel=5e-3)


def test_bad_input_is_one_sentence(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "first", tmp_path / "first"))
    for damage, words in (
        (lambda: (copy / "activations.safetensors").write_bytes(b"x"), "activations.safetensors cannot be read"),
        (lambda: (copy / "blocks" / "00000.safetensors").write_bytes(b"\xff" * 9), "is missing or damaged"),
        (lambda: (copy / "report.json").unlink(), "is not finished"),
        (lambda: shutil.rmtree(copy), "no folder of a run"),
    ):
        damage()
        result = call("report", copy)
        assert result.exit_code == 2 and result.stdout == ""
        assert len(result.stderr.splitlines()) == 1 and words in result.stderr, result.stderr
    assert call("report").exit_code == 2


def test_short_names_of_layers() -> None:
    assert short_layer("self_attn.q_proj") == "q_proj"
    assert short_layer("mlp.experts.17.up_proj") == "experts up_proj"


@pytest.mark.usefixtures("undrawn")
def test_the_page_of_a_run_with_a_budget(cheap_run: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(cheap_run("w2a16", {"weights.budget": 3.4, "weights.choices": "2,3,4,8", "head.bits": 8}), run)
    assert call("report", run).exit_code == 0
    budget = json.loads((run / "manifest.json").read_text())["budget"]
    text = (run / "report.html").read_text(encoding="utf-8")
    assert f"left {budget['room']:,} bytes for these layers, and they take {budget['taken']:,}" in text
    for block in range(2):
        cells = "".join(f"<td>{unit['bits']}</td>" for unit in budget["units"] if unit["block"] == block)
        assert f"<td>{block}</td>{cells}</tr>" in text
