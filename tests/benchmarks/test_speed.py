"""The factors of `inspect` are those of what `make speed` measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_factors_are_made_anew_when_counts_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    figures = json.loads((BENCHMARKS / "speed.json").read_text(encoding="utf-8"))
    found = importlib.import_module("speed").factors(figures)
    for name in ("speed", "common"):
        sys.modules.pop(name, None)
    kept = (BENCHMARKS.parent / "pipeline" / "estimate" / "factors.json").read_text(encoding="utf-8")
    assert json.loads(kept) == found
