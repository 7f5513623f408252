"""What runs beside the arithmetic of a block: the next one is read, the last one is packed and written.

One thread each. Both mostly wait, for a disk or for a GPU, and torch lets go of the interpreter while it packs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ...models.checkpoint import Checkpoint
from .buffers import free_memory, room_on
from .manifest import BlockEntry
from .run_writer import FollowedRun

READ_SHARE = 8  # a block is read ahead where at least so many of its size fit into free memory
ROTATION_SHARE = 6  # and goes to a GPU to be rotated where so many of its size in float64 fit there


class Prefetcher:
    """Reads and writes the blocks of a run beside the work on them; a context manager.

    A block is in the manifest when its file is on the disk, in the order of blocks, and no more than one of them is on
    its way. Bytes are those of a run that does one thing at a time; a kill costs at most the block that is being
    written and the one that is being worked on. What fails in a thread is raised by the next call, or at the end.

    Args:
        checkpoint: where blocks are read.
        folder: where they are written. While a block is on its way, its manifest is not to be changed.
        count: how many blocks there are.
        device: where blocks are rotated and compute.
    """

    def __init__(self, checkpoint: Checkpoint, folder: FollowedRun, count: int, device: torch.device) -> None:
        self.checkpoint, self.folder, self.count, self.device = checkpoint, folder, count, device
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rotoboa-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rotoboa-write")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._written: Future[None] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()  # the last block that was finished is kept, whatever came after it
        if error is None:
            self.finish()
        elif self._written is not None and (failed := self._written.exception()) is not None:
            error.add_note(f"The block before could not be written: {failed}")

    def block(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` of the checkpoint, as of `for_rotation`; the next one is read from now on.

        Raises:
            InputError, RunError: as `Checkpoint.tensor`.
        """
        ahead, self._ahead = self._ahead, None
        tensors = ahead[1].result() if ahead is not None and ahead[0] == index else self.checkpoint.block(index)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if index + 1 < self.count and READ_SHARE * size < free_memory():
            self._ahead = index + 1, self._reader.submit(self.checkpoint.block, index + 1)
        return for_rotation(tensors, self.device)

    def write(self, index: int, pack: Callable[[], dict[str, Tensor]], entry: BlockEntry, **facts: Any) -> None:
        """Write a finished block as soon as the one before is written.

        Args:
            index: which block.
            pack: makes the tensors of its file; called in the thread that writes.
            entry: its line in the manifest.
            facts: what goes into the manifest beside it.

        Raises:
            OSError, ...: the block before could not be written.
        """
        self.finish()
        self._written = self._writer.submit(self._write, index, pack, entry, facts)

    def _write(
        self, index: int, pack: Callable[[], dict[str, Tensor]], entry: BlockEntry, facts: dict[str, Any]
    ) -> None:
        tensors = pack()
        self.folder.note(**facts)
        self.folder.write_block(index, tensors, entry)

    def finish(self) -> None:
        """Wait until the last block is written.

        Raises:
            OSError, ...: it could not be.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()


def for_rotation(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a block where they are rotated: on the GPU that blocks compute on, if there is room.

    Rotations are in float64, and would take a processor about as long as a GPU takes to quantize the block.
    """
    wide = 8 * sum(tensor.numel() for tensor in tensors.values())
    if device.type != "cuda" or ROTATION_SHARE * wide > room_on(device):
        return tensors
    return {name: tensor.to(device) for name, tensor in tensors.items()}
