"""`make sweep`: what becomes of a type, and that one that hangs or dies costs itself alone."""

import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("sweep", "watched", "common")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """sweep.py and watched.py, which import each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


def test_types(modules: Any) -> None:
    sweep = modules("sweep")
    found = {name: sweep.examine(name) for name in ("llama", "helium", "gpt2", "bert")}
    assert {name: one.kind for name, one in found.items()} == {
        "llama": "row",
        "helium": "fallback",
        "gpt2": "refused",
        "bert": "refused by type",
    }
    assert found["helium"].note == "7"
    assert found["gpt2"].note == "it is no list of blocks with linear layers"
    text = sweep.page(found)
    assert "| 1 | refused |" in text and "| `llama` | row | 7 |" in text and "| 0 | failed |" in text


def test_other_logits_fail(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = modules("sweep")
    run = sweep.decoder_for

    def wrong(*args: Any, **kwargs: Any) -> Any:
        decoder = run(*args, **kwargs)
        embed = decoder.embed
        decoder.embed = lambda outer, tokens: embed(outer, tokens.roll(1))
        return decoder

    monkeypatch.setattr(sweep, "decoder_for", wrong)
    assert sweep.examine("helium").kind == "failed"


def test_one_that_hangs_or_dies_costs_itself_alone(modules: Any) -> None:
    watched = modules("watched").watched
    assert list(watched(time.sleep, [0, 60, -1], 0.5)) == [
        (0, None, None),
        (60, None, "it took more than 0.5 s"),
        (-1, None, "ValueError: sleep length must be non-negative"),
    ]
    assert list(watched(os._exit, [3, 4], 20.0)) == [(code, None, "its process ended") for code in (3, 4)]
