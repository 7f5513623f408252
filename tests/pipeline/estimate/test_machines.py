"""Rates that are measured, and what is said of them."""

from collections.abc import Callable

import pytest
import torch

from rotoboa.pipeline.estimate.counting import Work
from rotoboa.pipeline.estimate.machines import SLOWEST, measured


class Clock:
    """Gives each run, by its number, the seconds that `took` says."""

    def __init__(self, took: Callable[[int], float]) -> None:
        self.took, self.calls, self.now = took, 0, 0.0

    def __call__(self) -> float:
        if self.calls % 2:  # the end of a run
            self.now += self.took(self.calls // 2)
        self.calls += 1
        return self.now


def test_rates_are_those_of_the_quickest_runs() -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    still = measured(cpu, Clock(lambda run: 0.01))
    assert not still.disturbed and still.products > SLOWEST["products"]
    # Of the runs of every measurement, which are 5 or 6 where all take 0.02 s or longer, a single one is left alone.
    some = measured(cpu, Clock(lambda run: 0.01 if run % 5 == 0 else 0.5))
    assert set(some.disturbed) == SLOWEST.keys()
    for kind in SLOWEST:
        assert getattr(some, kind) == pytest.approx(getattr(still, kind))
    assert torch.get_num_threads() == threads


def test_no_rate_is_below_what_any_core_does() -> None:
    machine = measured(torch.device("cpu"), Clock(lambda run: 1000.0))
    assert {kind: getattr(machine, kind) for kind in SLOWEST} == SLOWEST
    assert set(machine.disturbed) == SLOWEST.keys()


def test_threads_in_each_others_way_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads wait for each other, every time; one thread alone does what it can."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    count = [2]
    monkeypatch.setattr(torch, "set_num_threads", lambda number: count.__setitem__(0, number))
    machine = measured(torch.device("cpu"), Clock(lambda run: 0.001 if count[0] == 1 else 1.0))
    assert machine.elements == pytest.approx(16 * 2 * 2**16 / 0.001) and set(machine.disturbed) == SLOWEST.keys()
    assert count == [2]


def test_this_machine() -> None:
    machine = measured(torch.device("cpu"))
    assert 1e7 < machine.products < 1e14 and 1e7 < machine.bandwidth < 1e13
    assert machine.seconds(Work(products=machine.products)) == pytest.approx(1)
    assert machine.seconds(Work(products=1, bytes=3 * machine.bandwidth)) == pytest.approx(3)
