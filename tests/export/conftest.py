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
