"""Runs a recipe once in peace, and once in child processes that are killed, again and again, until one ends by itself.

    python kills.py RECIPE WHOLE KILLED SEED KILLS

Children are forked from a process that has run it once, since importing torch and what a first run loads takes longer
than the run. A child dies at a random time within that of the whole run, or around a random one of its renames, which
is where files come to be. After KILLS kills it is left to end.
Prints one line: kills, finished runs.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.stages import quantize


def die_around_rename(number: int, before: bool) -> None:
    """Kill this process at its `number`-th rename."""
    rename, calls = Path.replace, 0

    def replace(self: Path, target: Any) -> Path:
        nonlocal calls
        calls += 1
        if calls == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = rename(self, target)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace  # type: ignore[method-assign,assignment]


def child(recipe: str, output: Path, rename: int | None, before: bool) -> int:
    """Start a run; the process id."""
    process = os.fork()
    if process:
        return process
    try:
        if rename is not None:
            die_around_rename(rename, before)
        quantize(build_recipe(load_recipe(recipe), {"output": output}))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(process: int) -> int:
    """Wait for a child; its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def is_finished(output: Path) -> bool:
    """Whether the manifest says so."""
    manifest = output / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("finished", False)


def main(recipe: str, whole: Path, output: Path, seed: int, kills: int) -> None:
    """Kill until `kills` are reached; whatever finishes before that starts anew."""
    torch.set_num_threads(1)  # threads do not survive a fork
    quantize(build_recipe(load_recipe(recipe), {"output": whole}))
    shutil.rmtree(whole)
    start = time.monotonic()
    if ended(child(recipe, whole, None, False)):
        sys.exit("the run in peace failed")
    seconds = time.monotonic() - start
    rng = random.Random(seed)
    killed = finished = 0
    while True:
        last, at_rename = killed >= kills, rng.random() < 0.5
        rename = rng.randint(1, 8) if at_rename and not last else None
        process = child(recipe, output, rename, rng.random() < 0.5)
        if not last and rename is None:
            time.sleep(rng.uniform(0, seconds))
            os.kill(process, signal.SIGKILL)
        code = ended(process)
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"the run failed after {killed} kills")
        killed += code != 0
        if last:
            break
        if is_finished(output):  # also where the kill came when all was done
            finished += 1
            shutil.rmtree(output)
    print(killed, finished)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
