"""A function of many cases in a process of its own: a case that hangs or ends the process costs itself alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

START = 300.0
"""Seconds for a process to import what it needs."""


def watched(
    function: Callable[[Any], Any], cases: Iterable[Any], seconds: float
) -> Iterator[tuple[Any, Any, str | None]]:
    """Each case, what `function` gives for it, and None; or the case, None and why there is nothing.

    Args:
        function: a function of a module; what it raises is a reason too.
        cases: what a process can be sent.
        seconds: that one case may take; then the process is ended, and the next case has a new one.
    """
    process: BaseProcess | None = None
    pipe: Connection | None = None
    try:
        for case in cases:
            if process is None or pipe is None:
                process, pipe = _started(function)
            pipe.send(case)
            try:
                if not pipe.poll(seconds):
                    raise TimeoutError(f"it took more than {seconds:g} s")
                result, reason = pipe.recv()
            except (EOFError, ConnectionError, TimeoutError) as error:
                result, reason = None, str(error) if isinstance(error, TimeoutError) else "its process ended"
                _end(process)
                process = None
            yield case, result, reason
    finally:
        if process is not None:
            _end(process)


def _started(function: Callable[[Any], Any]) -> tuple[BaseProcess, Connection]:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(function, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process ends the pipe
    if not here.poll(START):
        _end(process)
        raise TimeoutError(f"a process did not start within {START:g} s")
    here.recv()
    return process, here


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    pipe.send("ready")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        answer: tuple[Any, str | None]
        try:
            answer = (function(case), None)
        except Exception as error:
            answer = (None, f"{type(error).__name__}: {error}")
        pipe.send(answer)


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()
