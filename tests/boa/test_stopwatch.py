"""Time belongs to the innermost stage, and to nobody where no stopwatch runs."""

import time
from collections.abc import Iterator

import pytest

from rotoboa.boa.stopwatch import STAGES, Stopwatch, stage

FIRST, SECOND, THIRD = list(STAGES)[:3]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that stands still until its only element is changed."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    yield now


def test_time_belongs_to_the_innermost_stage(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch, stage(FIRST):
        clock[0] += 1
        with stage(SECOND):
            clock[0] += 2
            with stage(FIRST):
                clock[0] += 4
        clock[0] += 8
    clock[0] += 16  # no stage
    with watch, stage(THIRD):
        clock[0] += 32
    assert watch.seconds() == {FIRST: 13, SECOND: 2, THIRD: 32}


def test_a_whole_stage_keeps_what_is_inside(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch, stage(FIRST), stage(SECOND, whole=True):
        clock[0] += 1
        with stage(THIRD), stage(FIRST):
            clock[0] += 2
    assert watch.seconds() == {FIRST: 0, SECOND: 3}


def test_a_decorated_function_can_call_itself(clock: list[float]) -> None:
    @stage(SECOND)
    def down(steps: int) -> None:
        clock[0] += 1
        if steps:
            down(steps - 1)

    watch = Stopwatch()
    with watch:
        down(3)
        down(0)
    assert watch.seconds() == {SECOND: 5}


def test_an_error_ends_its_stages(clock: list[float]) -> None:
    watch = Stopwatch()
    with pytest.raises(KeyError), watch, stage(FIRST), stage(SECOND):
        clock[0] += 1
        raise KeyError
    clock[0] += 1
    with watch, stage(THIRD):
        clock[0] += 1
    assert watch.seconds() == {FIRST: 0, SECOND: 1, THIRD: 1}


def test_without_a_stopwatch_nothing_is_kept(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch:
        pass
    with stage(FIRST):
        clock[0] += 1
    assert watch.seconds() == {}
