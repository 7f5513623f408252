"""What the tests of several formats stand on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rotoboa.export.finished import Finished


@pytest.fixture(scope="session")
def opened_run(cheap_run: Callable[..., Path]) -> Callable[..., Finished]:
    """opened_run("w4a16", {"weights.bits": 3}, {...}): the run of `cheap_run`, opened as for an export."""

    def opened(*arguments: Any) -> Finished:
        run = cheap_run(*arguments)
        return Finished.open(run / "model", sorted((run / "blocks").iterdir()))

    return opened


@pytest.fixture(scope="session")
def mixed_run(opened_run: Callable[..., Finished]) -> Callable[..., Finished]:
    """mixed_run({"activations.bits": 8}): block 0 in 16 bits but O in 3, and block 1 in 4 but O in 3 and down in 8."""
    layers = "*.down_proj: weights.bits=8; blocks 0: weights.bits=16; *.o_proj: weights.bits=3 weights.group_size=none"

    def run(changes: dict[str, Any] | None = None) -> Finished:
        whole = {"weights.symmetric": True, "weights.group_size": 32, "overrides": layers}
        return opened_run("w4a16", whole | (changes or {}))

    return run
