"""Seconds by stage of a block: parts of the quantizer name themselves, and a `Stopwatch` adds up what each takes.

Time belongs to the innermost stage. Where no stopwatch runs a stage costs a microsecond, and on CUDA an event is
recorded at each border, so that nothing waits for the device before the seconds are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token

import torch

STAGES = {
    "rotation": "norms folded, weights rotated, in float64",
    "forward": "both streams through the block, activation quantizers and their online rotations among it",
    "input statistics": "H_in, residual and drift of every input of a layer",
    "head statistics": "the Grams of queries and keys",
    "value statistics": "H_in and drift of the values, weighted by attention",
    "factors": "damping, Cholesky factors and their inverses, the shift of the target",
    "grid search": "scale and zero point of every row",
    "columns": "columns one after another, and the product for those after a block of them",
    "rows": "rows of a head below those that are rounded",
    "refinement": "scales in closed form, coordinate descent, learned rounding",
    "search": "tabu search, and refinement of what it finds",
    "starts": "rounding and refinement from other grids",
    "losses": "the objective at the result",
    "references": "RTN and plain GPTQ on the same statistics, for the report",
}
"""What is measured, by name, in the order of a block."""

_running: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


class Stopwatch:
    """Adds up seconds by stage while it is entered; it may be entered again.

    Args:
        device: where the stages compute; of CUDA the seconds are those of its current stream.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[torch.cuda.Event, str | None]] = []  # the stage that an event begins
        self._last = 0.0
        self._stages: list[tuple[str, bool]] = []
        self._token: Token[Stopwatch | None] | None = None

    def __enter__(self) -> Stopwatch:
        self._token = _running.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _running.reset(self._token)

    @property
    def is_closed(self) -> bool:
        """Whether the innermost stage takes all stages inside it for its own."""
        return bool(self._stages) and self._stages[-1][1]

    def begin(self, name: str, whole: bool) -> None:
        """A stage begins: what came before belongs to the one around it."""
        self._mark(name)
        self._stages.append((name, whole))

    def end(self) -> None:
        """The innermost stage ends."""
        left = self._stages[:-1]
        self._mark(left[-1][0] if left else None)
        self._stages.pop()

    def _mark(self, following: str | None) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((event, following))
            return
        now = time.perf_counter()
        if self._stages:
            name = self._stages[-1][0]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far, in the order of `STAGES`; on CUDA this waits for the device."""
        if self._marks:
            self._marks[-1][0].synchronize()
            for (first, name), (second, _) in zip(self._marks, self._marks[1:], strict=False):
                if name is not None:
                    self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(second) / 1000
            self._marks.clear()
        return {name: self._seconds[name] for name in STAGES if name in self._seconds}


@contextmanager
def stage(name: str, *, whole: bool = False) -> Iterator[None]:
    """A stage of `STAGES`, as a context or as a decorator of a function; `whole`: with all the stages inside it."""
    watch = _running.get()
    if watch is None or watch.is_closed:
        yield
        return
    watch.begin(name, whole)
    try:
        yield
    finally:
        watch.end()
