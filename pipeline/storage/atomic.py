"""Writing files whole: each is written to a temporary name and renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...export.writing import save_tensors


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


def remove_temporary(path: Path) -> None:
    """Clear what a killed run left half written."""
    for file in sorted(path.rglob(".*.tmp"), reverse=True):
        with contextlib.suppress(OSError):
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink()
