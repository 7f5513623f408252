"""Who is found to have failed, died or to hang, and who is not."""

import os
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from rotoboa.pipeline.ranks.watch import PeerError, Watch

TIMEOUT = 0.6


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True)


@pytest.fixture
def watches(store: dist.TCPStore) -> Iterator[list[Watch]]:
    """Three ranks in this process; none of them beats yet."""
    found = [Watch(store, rank, 3, TIMEOUT) for rank in range(3)]
    for watch in found:
        watch.start()
    yield found
    for watch in found:
        watch.stop()


def blamed(watch: Watch, seconds: float = 3.0) -> PeerError:
    error = watch.find(seconds)
    assert error is not None
    return error


def test_nothing_is_found_while_all_are_at_work(watches: list[Watch]) -> None:
    watches[0].reached, watches[0].waiting = 5, time.monotonic() - 1000
    limit = time.monotonic() + 2 * TIMEOUT
    while time.monotonic() < limit:
        for watch in watches[1:]:
            watch.ticks += 1
        assert watches[0].find(0.1) is None


def test_an_error_that_was_written_down(watches: list[Watch]) -> None:
    watches[2].tell_error("its disk is full.")
    error = blamed(watches[0])
    assert str(error).endswith(f"process {os.getpid()}) ended: its disk is full.") and str(error).startswith("rank 2 (")
    assert error.ranks == {2} and error.said


def test_a_heartbeat_that_stops(watches: list[Watch]) -> None:
    watches[1].stop()
    error = blamed(watches[0])
    assert error.ranks == {1} and "rank 1" in str(error) and "died or hangs: it has not answered for" in str(error)


def test_who_has_done_its_work_may_stop(watches: list[Watch]) -> None:
    watches[1].tell_done()
    watches[1].stop()
    assert watches[0].find(2 * TIMEOUT) is None


def test_work_that_does_not_go_on(watches: list[Watch]) -> None:
    watches[0].reached, watches[0].waiting = 5, time.monotonic()
    watches[1].reached, watches[1].waiting = 5, time.monotonic()  # it waits too
    watches[2].reached = 4
    error = blamed(watches[0])
    assert error.ranks == {2} and "hangs: its work has not gone on for" in str(error)


def test_no_connection(watches: list[Watch]) -> None:
    for watch in watches:
        watch.reached, watch.waiting = 5, time.monotonic()
    error = blamed(watches[0])
    assert error.ranks == {1} and str(error).endswith("and rank 0 do not reach each other")


def test_a_process_that_is_gone(store: dist.TCPStore) -> None:
    process = os.fork()
    if not process:
        Watch(store.clone(), 1, 2, 100.0)  # type: ignore[attr-defined]
        os._exit(0)
    os.waitpid(process, 0)
    watch = Watch(store, 0, 2, 100.0)
    watch.start()
    error = blamed(watch)
    watch.stop()
    assert str(error).startswith("rank 1 (") and str(error).endswith("died, perhaps for want of memory")
