"""Memory for activations: that of a GPU while there is room, host memory, and files on the disk beyond a budget."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ...errors import RunError

CGROUP = Path("/sys/fs/cgroup")
SOLVER = 0.5  # part of a GPU's memory that activations leave to objectives and to rows with several starts


class Buffers:
    """Makes the tensors that grow with the number of tokens, or are too large to be held for long.

    Those beyond the budget are shared mappings of files without a name: the system writes them out and reads them back,
    whoever uses them sees tensors, and they are gone with the process, however it ends.

    Where blocks compute on CUDA, tensors come first of all from that device, as long as they leave it the `SOLVER` part
    of its memory: each pass over a stream would otherwise cross the bus, which takes longer than the arithmetic. Those
    that must stay on the host are then pinned.

    Args:
        folder: where the files lie; made when it is missing.
        budget: bytes of ordinary memory; None is half of what is free now.
        device: where blocks compute.
        processes: how many on this machine have a part of the budget each.
    """

    def __init__(
        self, folder: Path, budget: int | None = None, device: torch.device | None = None, processes: int = 1
    ) -> None:
        self.folder = folder
        self.device = device if device is not None and device.type == "cuda" else None
        self.budget = (free_memory() // 2 if budget is None else budget) // processes
        self.held = self.spilled = self.peak = 0
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of any content, on the GPU or in memory while the room there lasts, else in a file.

        Raises:
            RunError: the disk is full.
        """
        count = torch.Size(size).numel() * dtype.itemsize
        if self.device is not None:
            if count <= room_on(self.device):
                return torch.empty(size, dtype=dtype, device=self.device)
            count = 1 << (count - 1).bit_length()  # what torch takes for a pinned tensor
        if self.held + count > self.budget:
            return self.file(*size, dtype=dtype)
        tensor = torch.empty(size, dtype=dtype, pin_memory=self.device is not None)
        self.held += count
        weakref.finalize(tensor, self._freed, count)
        return tensor

    def file(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of any content that lies in a file.

        Raises:
            RunError: the disk is full.
        """
        count = max(torch.Size(size).numel() * dtype.itemsize, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                _reserve(file.fileno(), count)
            except OSError as error:
                raise RunError(
                    f"{count / 2**20:,.0f} MiB of activations do not fit on the disk of {self.folder} "
                    f"({error.strerror}): make room, or give fewer --calibration.samples or more --memory."
                ) from error
            mapped = mmap.mmap(file.fileno(), count)
        self._maps.add(mapped)
        self.spilled += count
        self.peak = max(self.peak, self.spilled)
        weakref.finalize(mapped, self._unmapped, count)
        return torch.frombuffer(mapped, dtype=dtype, count=torch.Size(size).numel()).view(size)

    def release(self) -> None:
        """Let the system take back the memory of all files; their content stays."""
        for mapped in list(self._maps):
            mapped.madvise(mmap.MADV_DONTNEED)

    def _freed(self, count: int) -> None:
        self.held -= count

    def _unmapped(self, count: int) -> None:
        self.spilled -= count


def trim() -> None:
    """Give the system back what was freed, a block after the other.

    glibc cuts tensors of less than 32 MiB from one heap. What a block leaves free there is in pieces, often too short
    for the next one's tensors: the heap grows, by 2 to 3 MiB a block at a hidden size of 512.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _reserve(file: int, count: int) -> None:
    """Make a file of `count` bytes that are really there: writing to a mapping without room would be fatal."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, count)
    else:
        os.truncate(file, count)


def room_on(device: torch.device) -> int:
    """Bytes of a CUDA device that are free, or held by torch without use, beyond the `SOLVER` part of its memory."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused - SOLVER * total)


def free_memory() -> int:
    """Bytes that this process may take: what is available, and no more than a container leaves."""
    free = [psutil.virtual_memory().available]
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free += [int(limit) - int(used)] if limit != "max" else []
    except (OSError, ValueError):
        pass  # there is no container, or one of another kind
    return max(min(free), 0)
