"""The pages of `make limits` are those of the counts as they are."""

import json
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import limits  # type: ignore[import-not-found]  # noqa: E402


def test_pages_are_made_anew_when_counts_change() -> None:
    speed = json.loads((BENCHMARKS / "speed.json").read_text(encoding="utf-8"))
    assert (BENCHMARKS / "limits.md").read_text(encoding="utf-8") == limits.limits(speed)
    assert (BENCHMARKS / "scaling.md").read_text(encoding="utf-8") == limits.scaling_page()
    factors = (BENCHMARKS.parent / "pipeline" / "estimate" / "factors.json").read_text(encoding="utf-8")
    assert json.loads(factors) == limits.factors(speed)
