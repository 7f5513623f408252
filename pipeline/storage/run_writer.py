"""The run folder, to write: one process keeps what it finds out, and goes on with a run that was not finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ...errors import InputError
from ...export.record import checksum
from .atomic import remove_temporary, write_json, write_tensors, write_text
from .files import MANIFEST, read_manifest
from .manifest import MANIFEST_VERSION, BlockEntry, Identity, Manifest
from .run_folder import RunFolder

RECIPE, LOCK = "recipe.yaml", ".lock"
SAME_BYTES = ("recipe.memory", "recipe.timeout")  # what may differ when a run is gone on with


class FollowedRun(RunFolder):
    """A run at work, as it is known where nothing is written: on other ranks than the first."""

    def start(self, recipe: str, clock: Callable[[], dict[str, float]] = dict) -> None:
        """Begin to work; nothing is written here."""

    def close(self) -> None:
        """Stop working."""

    def note(self, **facts: Any) -> None:
        """Put facts into the manifest, which are written with the next ones that are kept."""
        self.manifest = self.manifest.including(**facts)

    def keep(self, **facts: Any) -> None:
        """Put facts that need not be found out again into the manifest."""
        self.note(**facts)

    def write_block(self, index: int, tensors: dict[str, Tensor], entry: BlockEntry) -> None:
        """A finished block, and what the manifest says of it."""
        self.note(blocks=(*self.manifest.blocks, entry.model_copy(update={"index": index})))


class RunWriter(FollowedRun):
    """One run on disk, to write. A folder that holds the same run, unfinished, is gone on with.

    Every file is written to a temporary name and renamed.

    Args:
        path: the folder; made when it is missing.
        identity: what makes two runs the same: the recipe without its output, versions; `identify` adds what takes
            longer to know.

    Attributes:
        manifest: what manifest.json holds, or will.

    Raises:
        InputError: the folder holds something else, another run, or this run finished.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        super().__init__(path, self._look(path, identity))
        self._lock = FileLock(path / LOCK)
        self._clock: Callable[[], dict[str, float]] = dict

    @staticmethod
    def _look(path: Path, identity: Identity) -> Manifest:
        """The manifest that is there, or a new one."""
        if not (path / MANIFEST).is_file():
            if path.exists() and (not path.is_dir() or any(map(_is_foreign, path.iterdir()))):
                raise InputError(f"{path} exists and is no run of rotoboa: give another --output.")
            return Manifest(version=MANIFEST_VERSION, identity=identity, blocks=())
        old = read_manifest(path)
        _compare(path, old.identity.to_json(), identity.to_json())
        if old.finished:
            raise InputError(f"{path} holds this very run, finished: see it with `rotoboa inspect {path}`.")
        return old

    @property
    def is_new(self) -> bool:
        """Whether nothing of this run has been computed before."""
        return not self.manifest.knows("parts")

    def identify(self, **sections: Any) -> None:
        """Add sections to the identity, or compare them where the run has them already.

        Raises:
            InputError: they differ, so this is another run.
        """
        known, given = self.manifest.identity.to_json(), Identity.model_validate(sections).to_json()
        _compare(self.path, known, {name: value for name, value in given.items() if name in known})
        self.note(identity=Identity.model_validate(known | given))

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

    def start(self, recipe: str, clock: Callable[[], dict[str, float]] = dict) -> None:
        """Lock the folder, clear away what a killed run left half written, write manifest and recipe.

        Args:
            recipe: the content of recipe.yaml.
            clock: seconds by stage up to now, asked whenever the manifest is written.

        Raises:
            InputError: the folder cannot be written to, or another process writes to it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            if (self.path / MANIFEST).is_file() and read_manifest(self.path).blocks != self.manifest.blocks:
                raise InputError(f"another process has written to {self.path} meanwhile: run the command again.")
            remove_temporary(self.path)
            self._clock = clock
            self.keep(parts=self.manifest.parts + 1)
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
        if seconds := self._clock():
            self.note(seconds=seconds)
        write_json(self.path / MANIFEST, self.manifest.to_json())

    def keep(self, **facts: Any) -> None:
        """Put facts that need not be found out again into the manifest, and write it."""
        self.note(**facts)
        self.save()

    def write_block(self, index: int, tensors: dict[str, Tensor], entry: BlockEntry) -> None:
        """A finished block, then its line in the manifest: a kill in between costs this block only."""
        write_tensors(self.block_path(index), tensors)
        super().write_block(index, tensors, entry.model_copy(update={"sha256": checksum(self.block_path(index))}))
        self.save()


def _compare(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = [d for name in sorted(new) for d in _differences(old.get(name), new[name], name)]
    if changed := [name for name in changed if name not in SAME_BYTES]:
        raise InputError(
            f"{path} holds another run, with other {', '.join(changed)}: give another --output, or remove the folder."
        )


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the leaves that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [d for name in names for d in _differences(old.get(name), new.get(name), f"{prefix}.{name}".strip("."))]
    return [] if old == new else [prefix]


def _is_foreign(file: Path) -> bool:
    """Whether it is none of the files that a run killed at its very beginning leaves."""
    return file.name not in (LOCK, f".{MANIFEST}.tmp")
