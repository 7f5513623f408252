"""How this process was started: by itself, or as one of the ranks of torchrun. Needs no torch."""

from __future__ import annotations

import os
import socket


def rank() -> int:
    """The number of this process among all; 0 where it is by itself."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def world() -> int:
    """How many processes there are, on all machines."""
    given = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return int(given) if given.isdigit() else 1


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


def local_world() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()
