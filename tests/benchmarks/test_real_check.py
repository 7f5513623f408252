"""The guard of the defaults on a real model: when it fails, and what it refuses."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rotoboa.errors import InputError

BASE = {"w4a4kv4": {"default": 0.25, "gptq": 0.4}, "w2a16": {"default": 1.0, "gptq": 2.0}}


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("real_check")
    for name in ("real_check", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def changes(llama: Path, text: Path) -> dict[str, Any]:
    quick = {"weights.refine": 0, "weights.starts": 1, "weights.tabu": 0, "weights.grid": "minmax"}
    sizes = {"calibration.samples": 2, "calibration.sequence_length": 32, "evaluation.windows": 2}
    texts = {"evaluation.dataset": str(text), "calibration.dataset": str(text)}
    return {**quick, **sizes, "model": str(llama), **texts}


def test_worse_than_before_and_worse_than_gptq_are_told(guard: Any) -> None:
    assert guard.regressions({"w4a4kv4": 0.27, "w2a16": 1.09}, BASE) == []
    (worse,) = guard.regressions({"w4a4kv4": 0.29, "w2a16": 1.0}, BASE)
    assert "w4a4kv4: KL went from 0.2500 to 0.2900" in worse
    assert len(guard.regressions({"w4a4kv4": 0.25, "w2a16": 2.0}, BASE)) == 2
    assert len(guard.regressions({"w4a4kv4": float("nan"), "w2a16": 1.0}, BASE)) == 2


def test_a_baseline_is_made_and_held(guard: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    with pytest.raises(InputError, match="--accept"):
        guard.check(changes, file, accept=False)
    guard.check(changes, file, accept=True)
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    for recipe in guard.CHECKED:
        kept["kl"][recipe]["gptq"] = 100.0  # a random model says nothing of methods
    kept["kl"]["w2a16"]["default"] /= 1.2
    file.write_text(json.dumps(kept), encoding="utf-8")
    (found,) = guard.check(changes, file, accept=False)
    assert found.startswith("w2a16: KL went from")
    with pytest.raises(InputError, match="another model, text or setting"):
        guard.check({**changes, "evaluation.windows": 1}, file, accept=False)
