"""The run folder: manifest, finished blocks, the model. Every file is written to a temporary name and renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from ...errors import InputError
from ...export.record import checksum
from ...export.writing import save_tensors
from ..recipe.recipe import Recipe
from .files import absence

MANIFEST, REPORT, RECIPE, LOCK = "manifest.json", "report.json", "recipe.yaml", ".lock"
SAME_BYTES = ("recipe.memory", "recipe.timeout")  # what may differ when a run is gone on with


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _replace(temporary, path)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(data, indent=2, default=str) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_tensors(temporary, tensors)
    _replace(temporary, path)


def _replace(temporary: Path, path: Path) -> None:
    """Rename, once the content is on the disk: a power cut must not leave a whole name on half a file."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class RunFolder:
    """One run on disk. A folder that holds the same run, unfinished, is gone on with.

    Args:
        path: the folder; made when it is missing.
        identity: what makes two runs the same: the recipe without its output, versions; `identify` adds what takes
            longer to know.

    Attributes:
        manifest: what manifest.json holds, or will.
        clock: seconds by stage up to now, asked whenever the manifest is written.
        at_work: called after each file that is read whole.

    Raises:
        InputError: the folder holds something else, another run, or this run finished.
    """

    at_work: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.clock: Callable[[], dict[str, float]] | None = None
        self._lock = FileLock(path / LOCK)
        self.manifest = self._look(json.loads(json.dumps(identity, default=str)))

    def _look(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The manifest that is there, or a new one."""
        if not (self.path / MANIFEST).is_file():
            if self.path.exists() and (not self.path.is_dir() or any(map(_is_foreign, self.path.iterdir()))):
                raise InputError(f"{self.path} exists and is no run of rotoboa: give another --output.")
            return {"identity": identity, "blocks": []}
        old = read_manifest(self.path)
        self._compare(old["identity"], identity)
        if old.get("finished"):
            raise InputError(f"{self.path} holds this very run, finished: see it with `rotoboa inspect {self.path}`.")
        return old

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = [d for name in sorted(new) for d in _differences(old.get(name), new[name], name)]
        if changed := [name for name in changed if name not in SAME_BYTES]:
            raise InputError(
                f"{self.path} holds another run, with other {', '.join(changed)}: "
                "give another --output, or remove the folder."
            )

    @property
    def is_new(self) -> bool:
        """Whether nothing of this run has been computed before."""
        return "parts" not in self.manifest

    def identify(self, **sections: Any) -> None:
        """Add sections to the identity, or compare them where the run has them already.

        Raises:
            InputError: they differ, so this is another run.
        """
        known, given = self.manifest["identity"], json.loads(json.dumps(sections))
        self._compare(known, {name: value for name, value in given.items() if name in known})
        known.update(given)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A finished run, to read.

        Raises:
            InputError: it is no run, not finished, or one of its blocks is damaged.
        """
        folder = cls.__new__(cls)
        folder.path, folder.manifest = path, read_manifest(path)
        if not folder.manifest.get("finished"):
            raise InputError(f"{path} is not finished: run `rotoboa quantize` with the same recipe and output first.")
        folder.finished_blocks()
        return folder

    def need_space(self, size: int) -> None:
        """Check that `size` bytes fit on the disk of this folder.

        Raises:
            InputError: they do not.
        """
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(parent).free
        if free < size:
            raise InputError(
                f"the run needs about {size / 2**20:,.0f} MiB in {self.path} and {free / 2**20:,.0f} MiB are free: "
                "make room, or give another --output."
            )

    def start(self, recipe: str) -> None:
        """Lock the folder, clear away what a killed run left half written, write manifest and recipe.

        Raises:
            InputError: the folder cannot be written to, or another process writes to it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            before = self.manifest
            if (self.path / MANIFEST).is_file() and read_manifest(self.path)["blocks"] != before["blocks"]:
                raise InputError(f"another process has written to {self.path} meanwhile: run the command again.")
            remove_temporary(self.path)
            self.manifest["parts"] = self.manifest.get("parts", 0) + 1
            self.save()
            write_text(self.path / RECIPE, recipe)
        except Timeout as error:
            raise InputError(f"another process is writing to {self.path}: wait for it, or stop it.") from error
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}): give another --output.") from error

    def close(self) -> None:
        """Let another process write; what is temporary goes."""
        if self._lock.is_locked:
            remove_temporary(self.path)
            (self.path / LOCK).unlink(missing_ok=True)  # while it is held: who waits for it opens a new one
            self._lock.release()

    def save(self) -> None:
        """Write the manifest."""
        if self.clock is not None:
            self.manifest["seconds"] = self.clock()
        write_json(self.path / MANIFEST, self.manifest)

    def keep(self, **facts: Any) -> None:
        """Put facts that need not be found out again into the manifest."""
        self.manifest.update(facts)
        self.save()

    def model_files(self) -> dict[str, str]:
        """The checksum of each file of the exported model; empty where there is none."""
        folder, found = self.path / "model", {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            found[file.name] = checksum(file)
            self.at_work()
        return found

    def is_exported(self) -> bool:
        """Whether an earlier part of this run has written the model, and it is whole."""
        known: dict[str, str] = self.manifest.get("model", {})
        return bool(known) and known.items() <= self.model_files().items()

    def block_path(self, index: int) -> Path:
        """The file of a finished block."""
        return self.path / "blocks" / f"{index:05}.safetensors"

    def finished_blocks(self) -> int:
        """How many blocks are done, from the first one on, by the manifest.

        Raises:
            InputError: a finished block's file is missing or damaged.
        """
        for entry in self.manifest["blocks"]:
            file = self.block_path(entry["index"])
            if not file.is_file() or checksum(file) != entry["sha256"]:
                raise InputError(
                    f"{file} is missing or damaged (its checksum differs): remove {self.path} and start again."
                )
            self.at_work()
        return len(self.manifest["blocks"])

    def write_block(self, index: int, tensors: dict[str, Tensor], entry: Mapping[str, Any]) -> None:
        """A finished block, then its line in the manifest: a kill in between costs this block only."""
        write_tensors(self.block_path(index), tensors)
        self.manifest["blocks"].append({"index": index, **entry, "sha256": checksum(self.block_path(index))})
        self.save()

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block."""
        return load_file(self.block_path(index))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is no run folder: {absence(path, MANIFEST)}.") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path / MANIFEST} cannot be read ({error}).") from error
    if not isinstance(data, dict) or "identity" not in data:
        raise InputError(f"{path / MANIFEST} is no manifest of a run: it has no identity.")
    return data


def recipe_of(path: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        InputError: it is not one that this release reads.
    """
    manifest = read_manifest(path)
    try:
        return Recipe.model_validate(manifest["identity"]["recipe"])
    except (InputError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the recipe in {path / MANIFEST} is not one that this release of rotoboa reads: "
            "use the release that made the run, or run it again."
        ) from error


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the leaves that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [d for name in names for d in _differences(old.get(name), new.get(name), f"{prefix}.{name}".strip("."))]
    return [] if old == new else [prefix]


def _is_foreign(file: Path) -> bool:
    """Whether it is none of the files that a run killed at its very beginning leaves."""
    return file.name not in (LOCK, f".{MANIFEST}.tmp")


def remove_temporary(path: Path) -> None:
    """Clear what a killed run left half written."""
    for file in sorted(path.rglob(".*.tmp"), reverse=True):
        with contextlib.suppress(OSError):
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink()


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
