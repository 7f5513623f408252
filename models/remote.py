"""A checkpoint on the hub, known by its config and by the headers of its files: no tensor is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import file_exists, get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from ..errors import InputError
from . import adapters
from .experts.fused_experts import on_disk
from .families import Family, family_for
from .hub import WANTED, hub_errors
from .names import left_out, left_out_notice, misfit, renamed
from .running import read_config
from .shape import Shape

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Remote:
    """What `Checkpoint` says of a checkpoint, from its config and the headers of its files on the hub.

    Args:
        source: hub id.

    Raises:
        InputError: as `fetch`, there is an adapter, or the architecture is not supported.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        with hub_errors(source):
            folder = Path(hf_hub_download(source, "config.json")).parent
            headers = get_safetensors_metadata(source)
            if file_exists(source, adapters.CONFIG):
                raise InputError(adapters.both(source))
        self.config = read_config(folder)
        self.family: Family = family_for(self.config, source)
        self._found = {
            renamed(name, self.family): tensor
            for file in headers.files_metadata.values()
            for name, tensor in file.tensors.items()
        }

    @classmethod
    def of(cls, source: str) -> Remote | None:
        """None where the whole checkpoint is in the local cache already."""
        try:
            snapshot_download(source, allow_patterns=list(WANTED), local_files_only=True)
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return cls(source)
        return None

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in self._found.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return DTYPES.get(self._found[f"{self.family.embedding}.weight"].dtype, torch.float32)

    def check(self, expected: Mapping[str, torch.Size]) -> None:
        """As `Checkpoint.check`, but for tensors that are not expected."""
        expected = self._on_disk(expected)
        tied = f"{self.family.head}.weight" if self.config.tie_word_embeddings else None
        for name, shape in expected.items():
            if name not in self._found and name != tied:
                raise InputError(f"{self.source} {misfit(self._found, name, self.family, self.config.architectures)}.")
            if name in self._found and tuple(self._found[name].shape) != tuple(shape):
                raise InputError(
                    f"{self.source}: tensor {name} has shape {tuple(self._found[name].shape)}, and config.json asks "
                    f"for {tuple(shape)}: they do not belong together."
                )

    def _on_disk(self, expected: Mapping[str, torch.Size]) -> Mapping[str, torch.Size]:
        found = {name: tuple(tensor.shape) for name, tensor in self._found.items()}
        return on_disk(expected, self.family, Shape.of(self.config), lambda name: found.get(name, ()))

    def notices(self, expected: Mapping[str, torch.Size]) -> list[str]:
        """As `Checkpoint.notices`, of the tensors alone."""
        names = left_out(self._found, self._on_disk(expected), self.family)
        return [left_out_notice(names, self.family)] if names else []
