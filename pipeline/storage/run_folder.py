"""The run folder, to read: manifest, finished blocks, the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...errors import InputError
from ...export.record import checksum
from ..recipe.fields import kept_recipe
from ..recipe.recipe import Recipe
from .files import MANIFEST, read_manifest
from .manifest import Manifest


class RunFolder:
    """One run on disk, to read.

    Attributes:
        path: the folder.
        manifest: what manifest.json holds.
        at_work: called after each file that is read whole.
    """

    at_work: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A finished run.

        Raises:
            InputError: it is no run, not finished, or one of its blocks is damaged.
        """
        folder = RunFolder(path, read_manifest(path))
        if not folder.manifest.finished:
            raise InputError(f"{path} is not finished: run `rotoboa quantize` with the same recipe and output first.")
        folder.finished_blocks()
        return folder

    def model_files(self) -> dict[str, str]:
        """The checksum of each file of the exported model; empty where there is none."""
        folder, found = self.path / "model", {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            found[file.name] = checksum(file)
            self.at_work()
        return found

    def is_exported(self) -> bool:
        """Whether an earlier part of this run has written the model, and it is whole."""
        known = self.manifest.model
        return bool(known) and known.items() <= self.model_files().items()

    def block_path(self, index: int) -> Path:
        """The file of a finished block."""
        return self.path / "blocks" / f"{index:05}.safetensors"

    def finished_blocks(self) -> int:
        """How many blocks are done, from the first one on, by the manifest.

        Raises:
            InputError: a finished block's file is missing or damaged.
        """
        for entry in self.manifest.blocks:
            file = self.block_path(entry.index)
            if not file.is_file() or checksum(file) != entry.sha256:
                raise InputError(
                    f"{file} is missing or damaged (its checksum differs): remove {self.path} and start again."
                )
            self.at_work()
        return len(self.manifest.blocks)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block."""
        return load_file(self.block_path(index))


GONE = {("weights", "token_weights"): False, ("weights", "sequential"): False}
"""Fields that recipes had once, and the value at which they did nothing: runs that have it are read."""


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        InputError: it is not one that this release reads.
    """
    recipe = read_manifest(path).identity.recipe
    try:
        for section, name in (field for field, off in GONE.items() if recipe[field[0]].get(field[1]) == off):
            recipe = {**recipe, section: {key: value for key, value in recipe[section].items() if key != name}}
        return kept_recipe(recipe)
    except (InputError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the recipe in {path / MANIFEST} is not one that this release of rotoboa reads: "
            "use the release that made the run, or run it again."
        ) from error


def device_of(name: str | None) -> torch.device:
    """The device to compute on: the named one, else CUDA where it is, else the CPU.

    Raises:
        InputError: there is no such device.
    """
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(chosen)
        torch.empty(1, device=device).item()  # the meta device cannot
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].rstrip(".")
        reason = "torch knows none of this name" if first.startswith("Expected one of") else first
        raise InputError(f"device '{chosen}' cannot be used ({reason}): give --device cpu, cuda or cuda:N.") from error
    return device
