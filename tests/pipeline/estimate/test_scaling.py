"""Several devices: who does what, what is sent, and when the last is done."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rotoboa.boa.objective.statistics import value_stride
from rotoboa.boa.solver.rounding import Settings
from rotoboa.errors import InputError
from rotoboa.models.shape import Shape
from rotoboa.pipeline.estimate.counting import Online, Sizes, Work
from rotoboa.pipeline.estimate.counting_run import Plan, quantization
from rotoboa.pipeline.estimate.counting_solver import problems
from rotoboa.pipeline.estimate.machines import GPUS, NETWORKS, SLOWEST, Machine, measured, published
from rotoboa.pipeline.estimate.scaling import device_memory, estimate, gathered, makespan, summed, triangle

SIZES = Sizes(Shape(3, 64, 96, 4, 2, 16, 100))
LARGE = Sizes(Shape(32, 4096, 14336, 32, 8, 128, 128256))
RUN = Plan(Settings(2), 16, 64, 4, Online(), head=True, windows=8)
MACHINE = Machine("", 1e9, 1e9, 1e9, 1e12, link=1e6, network=1e5, per_node=4)


@pytest.mark.parametrize("costs", [[5, 4, 3, 3, 3], [1], [2, 2, 2, 2, 2], [7, 1, 1, 1, 4, 4]])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_largest_first_is_near_the_best(costs: list[float], ranks: int) -> None:
    best = min(
        max(sum(c for c, r in zip(costs, who, strict=True) if r == rank) for rank in range(ranks))
        for who in itertools.product(range(ranks), repeat=len(costs))
    )
    assert best <= makespan(costs, ranks) <= (4 / 3 - 1 / (3 * ranks)) * best  # Graham, 1969


def test_one_rank_does_what_is_counted() -> None:
    found = estimate(SIZES, RUN, MACHINE)
    for name, work in quantization(SIZES, RUN).items():
        if work != Work() and name != "head":
            assert found[name].seconds == pytest.approx(MACHINE.seconds(work), rel=0.3), name  # by problem, not in all
    assert all(stage.wire == stage.transfer == 0 for stage in found.values())


def test_calibration_is_shared_and_solving_is() -> None:
    one, two = estimate(SIZES, RUN, MACHINE), estimate(SIZES, RUN, MACHINE, 2)
    for name in ("plain forward pass", "forward", "value statistics"):
        assert two[name].seconds == pytest.approx(one[name].seconds / 2, rel=0.1), name
    for name in ("columns", "refinement", "starts"):
        assert one[name].seconds / 2 <= two[name].seconds < 0.7 * one[name].seconds, name
    assert two["rotation"] == one["rotation"]
    factors = two["factors"].seconds / one["factors"].seconds
    assert 0.5 < factors < 1  # only the values' Hessians are by head


@pytest.mark.parametrize("ranks", [2, 4])
def test_values_of_a_share_are_weighed_by_every_nth_query_of_all(ranks: int) -> None:
    """Which queries count goes by the sequences of all ranks: by its own alone, each of N would take N times more."""
    run = replace(RUN, settings=Settings(2, value_rows=128), samples=4 * 64)
    assert [value_stride(count * run.length, 2, 64, 128) for count in (256, 128, 64)] == [4, 2, 1]
    one, several = (estimate(SIZES, run, MACHINE, n)["value statistics"].seconds for n in (1, ranks))
    assert several == pytest.approx(one / ranks)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring(ranks: int) -> None:
    """Every rank passes on a part 2 (N - 1) times for a sum, N - 1 times for results; counted step by step."""
    found = estimate(SIZES, RUN, MACHINE, ranks)
    steps = sum(summed(SIZES) / ranks for _ in range(2 * (ranks - 1))) * 3
    assert found["sums"].wire == pytest.approx(steps)
    assert found["results"].wire == pytest.approx(sum(gathered(SIZES, None) / ranks for _ in range(ranks - 1)) * 3)
    assert found["sums"].transfer == pytest.approx(steps / (1e6 if ranks <= 4 else 1e5))


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 256, 300])
def test_grams_are_sent_as_they_are_summed(columns: int) -> None:
    width = max(64, -(-columns // 4))
    sent = sum(1 for i in range(columns) for j in range(columns) if i // width >= j // width or i >= j)
    assert triangle(columns) == sent


def test_results() -> None:
    weights = sum(p.all_rows * p.columns for p in problems(SIZES))
    assert gathered(SIZES, 32) == weights + 2 * 4 * weights // 32


def test_memory_falls_with_ranks() -> None:
    sizes = [device_memory(LARGE, RUN, ranks) for ranks in (1, 2, 8, 64)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * 4 * LARGE.block_weights


@pytest.mark.parametrize("gpu", GPUS)
def test_published_rates_are_in_order(gpu: str) -> None:
    plain, tensor = published(gpu), published(gpu, tf32=True)
    assert plain.products < tensor.products and plain.link > 0 and plain.memory
    assert [published(gpu, network).network for network in NETWORKS] == sorted(
        (published(gpu, network).network for network in NETWORKS), reverse=True
    )


def test_a_network_that_is_in_no_table() -> None:
    with pytest.raises(InputError, match="--network string is in no table: give one of ndr, hdr"):
        published("h100", "string")


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
