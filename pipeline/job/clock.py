"""How long the stages of a run take, over all of its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by stage, and in all since it was made.

    Attributes:
        seconds: of the stages that have ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self._running: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str, device: torch.device) -> Iterator[None]:
        """Add the seconds of a stage, of what `device` was given to do too."""
        self._running[stage] = time.perf_counter()
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - self._running.pop(stage)

    def go_on(self, seconds: Mapping[str, float]) -> None:
        """Count on from what earlier parts of the run have spent, as `spent` gave it."""
        earlier = dict(seconds)
        self._started -= earlier.pop("total", 0.0)
        self.seconds = {name: earlier.get(name, 0.0) + self.seconds.get(name, 0.0) for name in earlier | self.seconds}

    def spent(self) -> dict[str, float]:
        """Seconds by stage, those of the running ones up to now, and in total."""
        now = time.perf_counter()
        running = {name: self.seconds.get(name, 0.0) + now - start for name, start in self._running.items()}
        return {**self.seconds, **running, "total": now - self._started}
