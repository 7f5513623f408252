"""The scripts of examples/ run, on a small random model where they take one, and say what they promise."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rotoboa.models.families import FAMILIES

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("undrawn")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {
        "quantize_and_generate",
        "own_recipe",
        "custom_family",
        "walkthrough",
    }


def small(llama: Path, text: Path, output: Path) -> dict[str, Any]:
    return {"model": str(llama), "text": str(text), "output": output, "samples": 2, "windows": 2}


def test_quantize_and_generate(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("quantize_and_generate").main(**small(llama, text, tmp_path / "run"))
    shown = capsys.readouterr().out
    assert "'full_precision': " in shown and "'quantized': " in shown
    assert "def read_lines(path):\n" in shown and (tmp_path / "run" / "model" / "config.json").is_file()


def test_own_recipe(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("own_recipe").main(**small(llama, text, tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["mine", "plain GPTQ"]
    assert all(float(line.rpartition("KL ")[2]) > 0 for line in lines)
    assert (tmp_path / "mine" / "recipe.yaml").read_text().count("group_size: 16") == 2


def test_custom_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(FAMILIES, "arcee", FAMILIES["llama"])  # whatever the script puts there is taken out again
    load("custom_family").main(tmp_path, 2)
    assert float(capsys.readouterr().out.rpartition(": ")[2]) < 1e-3


def test_a_row_that_does_not_fit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(FAMILIES, "arcee", FAMILIES["llama"])
    script = load("custom_family")
    FAMILIES["arcee"] = replace(FAMILIES["arcee"], norm_offset=1.0)
    with pytest.raises(SystemExit, match="does not fit the architecture"):
        script.main(tmp_path, 2)


def test_walkthrough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What rotation promises: spikes go, rounding loses less, the block computes the same."""
    monkeypatch.setenv("TOKENS", "64")
    found = runpy.run_path(str(EXAMPLES / "walkthrough.py"))
    shown = capsys.readouterr().out
    assert "rotated           [4.0, 4.0, 4.0, 4.0]" in shown and found["largest"] < 1e-5
    for site in ("qkv", "gate_up", "down"):
        before, after = found["before"][site], found["after"][site]
        assert float(found["kurtosis"](after).mean()) < 4 < float(found["kurtosis"](before).mean())
        assert found["error"](after) < found["error"](before) / 2
