"""Ranks of torch.distributed, as torchrun starts them: NCCL between GPUs, gloo between processors."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ...boa.ranks import Ranks
from ...errors import InputError, RunError
from . import launch
from .bucketing import buckets, unpack
from .watch import GRACE, PeerError, Watch

TIMEOUT = 600.0
AGAIN = "run the same command again, with any number of ranks, and it goes on from its last block"

_watch: Watch | None = None  # of this process, for `leave`


class TerminatedError(RunError):
    """This process was asked to end: by torchrun, since another has failed, or by a person."""


class TorchRanks(Ranks):
    """One of several processes; the default group of torch.distributed is theirs.

    Waiting is done here and not inside of torch, so that a rank that will not come any more is noticed.

    Args:
        deterministic: as of `Ranks`.
        watch: looks after the other ranks.

    Attributes:
        sent: bytes of what was summed and spread, by the kind of operation.
    """

    def __init__(self, deterministic: bool, watch: Watch) -> None:
        super().__init__(deterministic)
        self.rank, self.size, self._watch = watch.rank, watch.size, watch
        self.sent = {"sum": 0, "broadcast": 0, "values": 0}

    def sum(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """As `Ranks.sum`, in buckets, all of which are under way when this returns."""
        pending = []
        for flat, parts in buckets(tensors):
            pending.append((self._begin(dist.all_reduce, "sum", flat), flat, parts))

        def wait() -> None:
            while pending:
                work, flat, parts = pending.pop(0)
                self._finish(work)
                unpack(flat, parts)

        return wait

    def broadcast(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """As `Ranks.spread`."""
        for flat, parts in buckets(tensors):
            self._finish(self._begin(dist.broadcast, "broadcast", flat.view(torch.uint8), src=source))
            if self.rank != source:
                unpack(flat, parts)

    def broadcast_value(self, value: Any = None, source: int = 0) -> Any:
        """As `Ranks.broadcast_value`; on other ranks than `source` what JSON makes of it."""
        data = _encoded(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self._finish(self._begin(dist.broadcast, "values", length, src=source))
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._finish(self._begin(dist.broadcast, "values", data, src=source))
        return value if self.rank == source else _decoded(data)

    def gather(self, value: Any) -> list[Any]:
        """As `Ranks.gather`."""
        data = _encoded(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._finish(self._begin(lambda t, **k: dist.all_gather(lengths, t, **k), "values", torch.tensor([len(data)])))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._finish(self._begin(lambda t, **k: dist.all_gather(found, t, **k), "values", padded))
        return [_decoded(part[: int(length)]) for part, length in zip(found, lengths, strict=True)]

    def tick(self) -> None:
        """As `Ranks.tick`; raises PeerError where another rank has failed."""
        self._watch.ticks += 1
        self._watch.check()

    def _begin(self, operation: Callable[..., Any], kind: str, tensor: Tensor, **options: Any) -> Any:
        self._watch.reached += 1
        self.sent[kind] += tensor.numel() * tensor.element_size()
        try:
            return operation(tensor, async_op=True, **options)
        except RuntimeError as error:
            raise self._broken(error) from error

    def _finish(self, work: Any) -> None:
        delay = 0.0
        self._watch.waiting = time.monotonic()
        try:
            while not work.is_completed():
                self._watch.check()
                time.sleep(delay)
                delay = min(2 * delay + 2e-5, 5e-3)
            work.wait()
        except RuntimeError as error:
            raise self._broken(error) from error
        finally:
            self._watch.waiting = None
            self._watch.ticks += 1

    def _broken(self, error: RuntimeError) -> RunError:
        """A connection has gone: that of a rank which has failed, if it can be found."""
        found = self._watch.find(self._watch.lapse + GRACE)
        return found or RunError(f"the connection to the other ranks broke ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, default=str).encode() or b" "), dtype=torch.uint8)


def _decoded(data: Tensor) -> Any:
    return json.loads(bytes(data.numpy()))


def device_name(given: str | None) -> str | None:
    """The device of this rank: of several on a machine each has the GPU of its number.

    Raises:
        InputError: there are fewer GPUs than ranks.
    """
    if launch.world() == 1 or (given or "cuda") != "cuda" or not torch.cuda.is_available():
        return given
    gpus, number = torch.cuda.device_count(), launch.local_rank()
    if number >= gpus:
        raise InputError(f"{launch.host()} has {gpus} GPUs for {launch.local_world()} ranks: start {gpus} there.")
    return f"cuda:{number}"


@contextlib.contextmanager
def joined(
    *, deterministic: bool = False, timeout: float = TIMEOUT, device: str | None = None, again: str = AGAIN
) -> Iterator[Ranks]:
    """The ranks that this process is one of, while the block runs; without torchrun the only one.

    `again` is what to do when a rank has died.

    What goes wrong on one of them ends all, with one sentence on the first rank that can still say it: errors of the
    others have the attribute `silent`.

    Raises:
        PeerError: another rank has failed, died or hangs.
        RunError: the ranks do not find each other.
    """
    with _reproducible(deterministic):
        if launch.world() == 1:
            yield Ranks(deterministic)
            return
        watch = _join(timeout, device)
        try:
            with _terminable(again):
                ranks = TorchRanks(deterministic, watch)
                yield ranks
                watch.tell_done()
                ranks.gather(None)
        except BaseException as error:
            if (other := _last_word(watch, error, again)) is error:
                raise
            raise other from error
        watch.stop()
        with contextlib.suppress(RuntimeError, OSError):  # the work is done
            watch.tell_left()
            if watch.rank == 0:
                watch.wait_until_all_left(GRACE)
        dist.destroy_process_group()


def _join(timeout: float, device: str | None) -> Watch:
    global _watch
    name, wait = device_name(device), timedelta(seconds=timeout)
    on_gpu = name is not None and name.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(name)
    if launch.rank() > 0:
        logging.getLogger(__package__.partition(".")[0]).setLevel(logging.ERROR)  # the first rank says it
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        _watch = Watch(dist.PrefixStore("watch", store.clone()), rank, size, timeout)
        _watch.server = store  # which ends with the last reference to it, where this process holds it
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=wait
        )
        _watch.start()
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"rank {launch.rank()} ({launch.host()}) does not find the other {launch.world() - 1} within "
            f"{timeout:.0f} s ({_first_line(error)}): check that all were started, and MASTER_ADDR and MASTER_PORT."
        ) from error
    return _watch


def _last_word(watch: Watch, error: BaseException, again: str) -> BaseException:
    """What to raise in place of an error: who is to blame for it, told to the others."""
    blamed: set[int] = set()
    if isinstance(error, TerminatedError):
        found = watch.find(min(GRACE / 2, watch.lapse))
        error = found or error
    if isinstance(error, PeerError):
        blamed = error.ranks
        if not error.said:
            error = PeerError(f"{error}: {again}.", blamed, said=False)
    elif not isinstance(error, TerminatedError):
        with contextlib.suppress(RuntimeError, OSError):
            watch.tell_error(_sentence(error))
    speaker = min(set(range(watch.size)) - blamed, default=watch.rank)
    if watch.rank != speaker:
        watch.silent = True
        watch.wait_for("said", GRACE)
        error.silent = True  # type: ignore[attr-defined]
    return error


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def shared_by(ranks: Ranks) -> dict[str, Any]:
    """What a report says of the ranks of its run: how many, and bytes that one of them summed and spread."""
    return {"ranks": {"count": ranks.size, "bytes": ranks.sent}} if isinstance(ranks, TorchRanks) else {}


def leave(code: int) -> None:
    """End this process at once where it is one of several: threads of torch may wait for ranks that have gone."""
    if _watch is None:
        return
    with contextlib.suppress(RuntimeError, OSError):
        if code and not _watch.silent:
            _watch.store.set("said", "")
        _watch.tell_left()
        if _watch.rank == 0:
            _watch.wait_until_all_left(GRACE / 2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _terminable(again: str) -> Iterator[None]:
    """SIGTERM, which torchrun sends where another rank has ended, becomes an error, so that the reason can be said."""

    def terminated(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise TerminatedError(f"ended by SIGTERM: {again}.")

    try:
        before = signal.signal(signal.SIGTERM, terminated)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _reproducible(wanted: bool) -> Iterator[None]:
    """One thread, on which products depend in their last bits, and torch's deterministic algorithms on GPUs."""
    if not wanted:
        yield
        return
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)
