"""Looks after the other ranks: who has failed, died or hangs, so that none waits for ever for one that will not come.

Every rank writes a heartbeat into the store that torchrun's ranks share, and reads those of the others: its number,
how many collective operations its work has reached, and how often it has said that it is at work. Three things end a
run:

| what | how it is known |
|---|---|
| a rank has failed | it wrote down its error before it ended |
| a rank has died | its process is gone, as any rank on the same machine sees; elsewhere its heartbeat has stopped |
| a rank hangs | its heartbeat has stopped, or its work has, for a timeout that others wait for it |
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

import psutil
import torch.distributed as dist

from ...errors import RunError
from . import launch

BEAT = 1.0  # seconds
LAPSE = 60.0  # seconds without a heartbeat after which a rank is given up, where the timeout is not shorter
GRACE = 10.0  # seconds to find out who has failed, and for the one that speaks to speak


class PeerError(RunError):
    """Another rank has failed, died or hangs.

    Attributes:
        ranks: those that have.
        said: whether the message is that rank's own, which says what to do.
    """

    def __init__(self, message: str, ranks: set[int], said: bool) -> None:
        super().__init__(message)
        self.ranks, self.said = ranks, said


class Watch:
    """Heartbeats of all ranks, in a thread of its own.

    Args:
        store: of torch.distributed, with a connection of its own.
        rank, size: of this process, and how many there are.
        timeout: seconds that ranks wait for one whose work does not go on.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.reached = self.ticks = 0
        self.waiting: float | None = None  # since when, by time.monotonic
        self.server: dist.Store | None = None
        self.silent = False  # whether another rank says what has happened
        self._found: dict[int, str] = {}
        self._lock, self._looking, self._ended = threading.Lock(), threading.Lock(), threading.Event()
        self._seen: dict[int, tuple[bytes, float, tuple[int, int], float]] = {}
        self._beats = 0
        me = {"host": launch.host(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        store.set(f"who/{rank}", json.dumps(me))
        self._beat()
        self._who: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._run, name="rotoboa-watch", daemon=True)

    @property
    def lapse(self) -> float:
        """Seconds without a heartbeat after which a rank is given up."""
        return min(self.timeout, LAPSE)

    def start(self) -> None:
        """Begin to look; every rank has been constructed by then."""
        self._who = [json.loads(self.store.get(f"who/{rank}")) for rank in range(self.size)]
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(2 * BEAT)

    def name(self, rank: int) -> str:
        """A rank as a person finds it."""
        who = self._who[rank]
        return f"rank {rank} ({who['host']}, process {who['pid']})"

    def tell_error(self, message: str) -> None:
        """Write down why this rank ends."""
        self.store.set(f"error/{self.rank}", message)

    def tell_done(self) -> None:
        """Write down that this rank has done all of its work."""
        self.store.set(f"done/{self.rank}", "")

    def check(self) -> None:
        """Raise PeerError where another rank has failed, died or hangs."""
        with self._lock:
            found = dict(self._found)
        if found:
            raise self._error(found)

    def find(self, seconds: float) -> PeerError | None:
        """Who has failed, once that is known, or nobody within some seconds."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            self._look()
            try:
                self.check()
            except PeerError as error:
                return error
            time.sleep(0.05)
        return None

    def tell_left(self) -> None:
        """Write down that this rank needs the store no more."""
        self.store.set(f"left/{self.rank}", "")

    def wait_until_all_left(self, seconds: float) -> None:
        """Keep the store, which may be in this process, until every rank that can has done without it."""
        limit, left = time.monotonic() + seconds, set(range(self.size)) - {self.rank}
        while left and time.monotonic() < limit:
            left -= {rank for rank in left if self.store.check([f"left/{rank}"]) or self._is_gone(rank)}
            with self._lock:
                left -= set(self._found)
            time.sleep(0.02)

    def wait_for(self, key: str, seconds: float) -> None:
        """Wait until a key is in the store."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            try:
                if self.store.check([key]):
                    return
            except (RuntimeError, OSError):
                return
            time.sleep(0.05)

    def _error(self, found: dict[int, str]) -> PeerError:
        rank = min(found, key=lambda rank: (not found[rank].startswith("ended: "), rank))
        return PeerError(f"{self.name(rank)} {found[rank]}", set(found), found[rank].startswith("ended: "))

    def _run(self) -> None:
        while not self._ended.wait(min(BEAT, self.lapse / 5)):
            self._beat()
            self._look()

    def _beat(self) -> None:
        self._beats += 1
        try:
            self.store.set(f"beat/{self.rank}", f"{self._beats} {self.reached} {self.ticks}")
        except (RuntimeError, OSError):
            return  # `_look` says so

    def _look(self) -> None:
        try:
            with self._looking:
                found = self._failed()
        except (RuntimeError, OSError):
            found = {0: "or what started it cannot be reached any more"}
        with self._lock:
            self._found |= found

    def _failed(self) -> dict[int, str]:
        found: dict[int, str] = {}
        now = time.monotonic()
        others = [rank for rank in range(self.size) if rank != self.rank]
        beats = self.store.multi_get([f"beat/{rank}" for rank in others])
        for rank, beat in zip(others, beats, strict=True):
            work = tuple(int(part) for part in beat.split()[1:])
            assert len(work) == 2
            old, since, old_work, work_since = self._seen.get(rank, (b"", now, (-1, -1), now))
            since, work_since = (now if beat != old else since), (now if work != old_work else work_since)
            self._seen[rank] = (beat, since, work, work_since)
            if self.store.check([f"error/{rank}"]):
                found[rank] = f"ended: {self.store.get(f'error/{rank}').decode()}"
            elif self.store.check([f"done/{rank}"]):
                continue
            elif self.store.check([f"dead/{rank}"]) or self._is_gone(rank):
                found[rank] = "died, perhaps for want of memory"
            elif now - since > self.lapse:
                found[rank] = f"died or hangs: it has not answered for {now - since:.0f} s"
            elif self._is_late(now, self.timeout) and work[0] < self.reached and now - work_since > self.timeout:
                found[rank] = f"hangs: its work has not gone on for {now - work_since:.0f} s"
        still = self.timeout + self.lapse  # whoever has stopped would be known by then
        if not found and self._is_late(now, still) and all(now - seen[3] > still for seen in self._seen.values()):
            found = dict.fromkeys(others[:1], f"and rank {self.rank} do not reach each other")
        return found

    def _is_late(self, now: float, after: float) -> bool:
        waiting = self.waiting
        return waiting is not None and now - waiting > after

    def _is_gone(self, rank: int) -> bool:
        """Whether its process, on this machine, has ended; the ranks on others are told."""
        who = self._who[rank]
        if who["host"] != launch.host():
            return False
        try:
            process = psutil.Process(who["pid"])
            if process.create_time() == who["started"] and process.status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            pass
        if self.store.check([f"error/{rank}"]) or self.store.check([f"done/{rank}"]):
            return False
        self.store.set(f"dead/{rank}", "")
        return True
