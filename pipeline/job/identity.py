"""What makes two runs the same: recipe, versions, and checksums of the checkpoint and of the texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from ...export.record import checksum
from ...export.writing import copied_files
from ..console.progress import Progress
from ..storage.manifest import FileState, Identity
from .job import Job

VERSIONED = ("rotoboa", "torch", "transformers", "safetensors", "tokenizers", "numpy")
LONG_READ = 2**31  # bytes that take long enough to be shown


@cache
def _version(name: str) -> str:
    return version(name)


def identity(job: Job) -> Identity:
    """What must be the same for a run to go on and is known at once: the recipe, and the versions that compute."""
    return Identity(
        recipe=job.recipe.model_dump(mode="json", exclude={"output"}),
        versions={name: _version(name) for name in VERSIONED},
    )


def checkpoint_checksums(job: Job, known: Mapping[str, FileState], progress: Progress) -> dict[str, FileState]:
    """For each file of the checkpoint that has a part in the result its SHA-256, and by what it is known unchanged.

    `known` is what this returned for an earlier part of the run: a file with the same size and times is not read again.
    """
    folder = job.checkpoint.folder

    def of(file: Path) -> FileState:
        stat = file.stat()
        state, old = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns), known.get(file.name)
        return old if old is not None and old.state == state else FileState(sha256=checksum(file), state=state)

    files = sorted({*job.checkpoint.files, folder / "config.json", *copied_files(folder)})
    found = {}
    if sum(file.stat().st_size for file in files) > LONG_READ:
        progress.stage("checksums", len(files))
    with ThreadPoolExecutor(4) as pool:
        for file, entry in zip(files, pool.map(of, files), strict=True):
            found[file.name] = entry
            progress.advance()
            job.ranks.tick()
    return found


def tokens_checksum(tokens: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
