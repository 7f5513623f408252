"""What tests of several modules need; functions that they share are in the modules beside this one."""

import pytest
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver import units
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.boa.solver.rounding_settings import Settings

from .small_block import Solved

# Before a test imports it: its asserts tell what they compared, as those of the tests do.
pytest.register_assert_rewrite(f"{__package__}.problems")


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Solved:
    """What blocks quantize from now on."""
    seen: Solved = []

    def spy(weight: Tensor, objective: Objective, settings: Settings) -> Quantized:
        seen.append((weight, objective))
        return quantize(weight, objective, settings)

    monkeypatch.setattr(units, "quantize", spy)
    return seen
