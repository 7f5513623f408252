"""What makes two runs the same: recipe, versions, and checksums of the checkpoint and of the texts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ...export.record import checksum
from ...export.writing import copied_files
from ..console.progress import Progress
from .job import Job

VERSIONED = ("rotoboa", "torch", "transformers", "safetensors", "tokenizers", "numpy")
LONG_READ = 2**31  # bytes that take long enough to be shown


def identity(job: Job) -> dict[str, Any]:
    """What must be the same for a run to go on and is known at once: the recipe, and the versions that compute."""
    return {
        "recipe": job.recipe.model_dump(mode="json", exclude={"output"}),
        "versions": {name: version(name) for name in VERSIONED},
    }


def checkpoint_checksums(job: Job, known: Mapping[str, Any], progress: Progress) -> dict[str, dict[str, Any]]:
    """For each file of the checkpoint that has a part in the result its SHA-256, and by what it is known unchanged.

    `known` is what this returned for an earlier part of the run: a file with the same size and times is not read again.
    """
    folder = job.checkpoint.folder

    def of(file: Path) -> dict[str, Any]:
        stat = file.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        old = known.get(file.name, {})
        return {"sha256": old["sha256"] if old.get("state") == state else checksum(file), "state": state}

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
