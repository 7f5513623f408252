"""Runs recipes on one rank or on several, as torchrun would start them, in processes that are forked.

    python worlds.py CASES

CASES is a JSON list of objects: `recipe` (a YAML file), `output`, `ranks`, `overrides`, and `fault`: null, or a rank,
what happens to it ("kill", "stop" or "raise"), and when it has finished how many blocks. Importing torch and what a
first run loads takes longer than a run: cases of one rank run in this process, before the others are forked off it.
Prints a JSON list: for each case the seconds, and of each rank its exit code and what it said.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rotoboa.pipeline import stages
from rotoboa.pipeline.job.sharing import FollowedRun
from rotoboa.pipeline.ranks import distributed
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

LIMIT = 100.0  # seconds for a case


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def fail(kind: str, blocks: int) -> None:
    """Let this rank, which is not the first, fail when it hears of its `blocks`-th block."""
    heard = FollowedRun.write_block

    def write_block(self: FollowedRun, index: int, tensors: Any, entry: Any) -> None:
        heard(self, index, tensors, entry)
        if index + 1 < blocks:
            return
        if kind == "raise":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

    FollowedRun.write_block = write_block  # type: ignore[method-assign]


def quantize(case: dict[str, Any]) -> None:
    """What every rank of a case does."""
    stages.quantize(build_recipe(load_recipe(case["recipe"]), {"output": case["output"], **case["overrides"]}))


def child(case: dict[str, Any], rank: int, port: int, said: Path) -> int:
    """Start a rank; the process id."""
    process = os.fork()
    if process:
        return process
    sys.stdout = sys.stderr = said.open("w")
    code = 0
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case["ranks"]),
        "LOCAL_WORLD_SIZE": str(case["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        fault = case["fault"]
        if fault is not None and fault[0] == rank:
            fail(*fault[1:])
        quantize(case)
    except BaseException as error:
        if not getattr(error, "silent", False):
            print(f"{type(error).__name__}: {error}", flush=True)
        code = 1
    sys.stdout.flush()
    distributed.leave(code)
    os._exit(code)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """All ranks of a case; those that a fault has stopped are killed when the others have ended."""
    started, port = time.monotonic(), free_port()
    if case["ranks"] == 1:
        quantize(case)
        return {"seconds": time.monotonic() - started, "codes": [0], "said": [""]}
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(case["ranks"])]
        running = {child(case, rank, port, said[rank]): rank for rank in range(case["ranks"])}
        codes: dict[int, int] = {}
        stopped = case["fault"][0] if case["fault"] and case["fault"][1] == "stop" else None
        while running and time.monotonic() - started < LIMIT:
            for process in list(running):
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
            if list(running.values()) == [stopped]:
                break
            time.sleep(0.02)
        seconds = time.monotonic() - started
        for process, rank in running.items():
            os.kill(process, signal.SIGKILL)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = [path.read_text() if path.exists() else "" for path in said]
    return {"seconds": seconds, "codes": [codes[rank] for rank in range(case["ranks"])], "said": texts}


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    print(json.dumps([run(case) for case in json.loads(Path(sys.argv[1]).read_text())]))
