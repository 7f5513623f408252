"""A Hugging Face checkpoint on disk, read one tensor at a time, never the whole model. safetensors only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from .adapters import MERGE, TENSOR, refuse_adapter
from .experts.fused_experts import on_disk
from .experts.mxfp4 import BLOCKS, SCALES
from .families import Family, family_for
from .layout import split_tensors
from .matrices import Matrix, NormedMatrix, StoredMatrix, check_finite, check_slice, spans
from .names import give_causal, left_out, left_out_notice, listed, misfit, renamed, task_of
from .outer_layers import OuterLayers
from .running import read_config
from .shape import Shape
from .stored import block_fp8
from .tokenizer import is_pointer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors, config and family of one checkpoint folder.

    Args:
        folder: holds config.json and safetensors files, one or sharded with an index.

    Raises:
        InputError: the folder is no checkpoint, its architecture is not supported, or its files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint.")
        self.config = read_config(folder)
        self.family: Family = family_for(self.config, str(folder))
        self._stored = {renamed(stored, self.family): (file, stored) for stored, file in self._locate().items()}
        self._scales = block_fp8.take_scales(self._stored) if self.family.packed == block_fp8.METHOD else {}
        self._untied = self._settle_head()

    def _settle_head(self) -> bool:
        """Where embedding and head are to be one, do as transformers does: either may be the one that is stored.

        Returns:
            Whether both are stored and differ: they stay two, whatever config.json says.
        """
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        if not self.config.tie_word_embeddings or head not in self._stored:
            return False
        self._stored.setdefault(embedding, self._stored[head])
        one, other = (self.matrix(name) for name in (embedding, head))
        if one.shape != other.shape or all(torch.equal(one[r], other[r].to(one[r].dtype)) for r in spans(one)):
            return False
        self.config.tie_word_embeddings = False
        return True

    def _locate(self) -> dict[str, Path]:
        """Stored tensor name -> the file that holds it."""
        index = self.folder / INDEX
        if index.is_file() and not (self.folder / SINGLE).is_file():  # in the order that transformers looks
            try:
                mapping = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                if not all(isinstance(file, str) for file in mapping.values()):
                    raise TypeError("a name of a file in it is no text")
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index} is not a valid index ({error}): download it again.") from error
            for file in sorted(set(mapping.values())):
                if not (self.folder / file).is_file():
                    raise InputError(f"{self.folder} lacks the shard {file} that its index names: download it again.")
            return {name: self.folder / file for name, file in mapping.items()}
        files = (
            [self.folder / SINGLE] if (self.folder / SINGLE).is_file() else sorted(self.folder.glob("*.safetensors"))
        )
        if not files:
            pickled = sorted(p.name for p in self.folder.glob("*.bin")) + sorted(
                p.name for p in self.folder.glob("*.pth")
            )
            hint = f" (it has {pickled[0]}, and pickle files are never opened)" if pickled else ""
            raise InputError(
                f"{self.folder} has no safetensors file{hint}: save it again with `save_pretrained`, which writes them."
            )
        where = {}
        for file in files:
            with self._open(file) as reader:
                where.update(dict.fromkeys(reader.keys(), file))
        return where

    @staticmethod
    def _open(file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            if is_pointer(file):
                raise InputError(f"{file} is a pointer of Git LFS: run `git lfs pull` in its folder.") from error
            raise InputError(f"{file} is not a whole safetensors file ({error}): download it again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return sorted(self._stored)

    @property
    def bytes(self) -> int:
        """Size of the tensor files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def files(self) -> list[Path]:
        """The tensor files."""
        return sorted({file for file, _ in (*self._stored.values(), *self._scales.values())})

    def tensor(self, name: str) -> Tensor:
        """One tensor, as stored, on the CPU; in float32 where a scale for each block is beside it.

        Raises:
            InputError: the checkpoint has no such tensor, or its file is damaged.
            RunError: it holds NaN or Inf.
        """
        if name not in self._stored:
            raise InputError(f"{self.folder} has no tensor {name}, which its architecture needs: download it again.")
        file, stored = self._stored[name]
        tensor = self._read(file, stored, name)
        if name in self._scales:
            tensor = block_fp8.dequantized(tensor, self._read(*self._scales[name], name))
        check_finite(file, name, tensor)
        return tensor

    def _read(self, file: Path, stored: str, name: str) -> Tensor:
        try:
            with self._open(file) as reader:
                tensor: Tensor = reader.get_tensor(stored)
        except SafetensorError as error:
            raise InputError(f"{file}: tensor {name} cannot be read ({error}): download it again.") from error
        return tensor

    def matrix(self, name: str) -> StoredMatrix:
        """One matrix, whose rows are read when they are asked for: embedding and head are a model's largest tensors.

        Raises:
            InputError: there is no such tensor.
        """
        file, stored = self._stored.get(name, (self.folder, ""))
        return StoredMatrix(file, stored, torch.Size(self.shape(name)), name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header of its file.

        Raises:
            InputError: there is no such tensor.
        """
        if name not in self._stored:
            raise InputError(f"{self.folder} has no tensor {name}, which its architecture needs: download it again.")
        file, stored = self._stored[name]
        with self._open(file) as reader:
            return tuple(reader.get_slice(stored).get_shape())

    def check(self, expected: Mapping[str, torch.Size]) -> None:
        """Check the headers of all files: every tensor of `expected` is there, floating-point, of its shape.

        Raises:
            InputError: one is not, or a block has tensors that are not expected.
        """
        expected = self._on_disk(expected)
        tied = f"{self.family.head}.weight" if self.config.tie_word_embeddings else None
        for name in expected:
            if name not in self._stored and name != tied:
                raise InputError(f"{self.folder} {misfit(self._stored, name, self.family, self.config.architectures)}.")
        task = task_of(self.config.architectures, self.family)
        if task and (extra := left_out(self._stored, expected, self.family)):
            raise InputError(f"{self.folder} is a {task}, with {listed(extra)}: {give_causal(self.family)}.")
        count, layers = Shape.of(self.config).blocks, re.escape(self.family.layers)
        indices = [int(found[1]) for name in self._stored if (found := re.match(rf"{layers}\.(\d+)\.", name))]
        further = getattr(self.config, self.family.further_blocks, None) if self.family.further_blocks else 0
        if max(indices, default=0) >= count + int(further or 0):
            raise InputError(
                f"{self.folder} holds block {max(indices)}, and num_hidden_layers of its config.json is {count}: "
                "they do not belong together."
            )
        blocks = tuple(f"{self.family.layers}.{index}." for index in range(count))
        for file in self.files:
            with self._open(file) as reader:
                stored = set(reader.keys())
                for name, original in ((name, own) for name, (where, own) in self._stored.items() if where == file):
                    if original not in stored:
                        raise InputError(
                            f"{file} has no tensor {name}, which the index says it has: download it again."
                        )
                    if name in expected:
                        self._check_slice(name, reader.get_slice(original), expected[name])
                    elif name.startswith(blocks) and not name.endswith(self.family.ignored):
                        what = f"{file}: tensor {name} is unknown to the '{self.family.model_type}' architecture"
                        if TENSOR.search(name):
                            raise InputError(f"{what}, and is an adapter's: {MERGE}.")
                        raise InputError(f"{what}: give a full-precision checkpoint as transformers saves it.")

    def _check_slice(self, name: str, found: Any, expected: torch.Size) -> None:
        what = f"{self._stored[name][0]}: tensor {name}"
        bytes_of = "U8" if self.family.packed and name.endswith((BLOCKS, SCALES)) else ""
        check_slice(what, found, expected, block_fp8.DTYPE if name in self._scales else bytes_of)
        if name in self._scales:
            file, stored = self._scales[name]
            with self._open(file) as reader:
                block_fp8.check_scale(what, tuple(reader.get_slice(stored).get_shape()), expected)

    def notices(self, expected: Mapping[str, torch.Size]) -> list[str]:
        """A sentence on each kind of thing in the folder that has no part in the model whose tensors are `expected`."""
        expected = self._on_disk(expected)
        notices, unread = [], sorted(set(self.folder.glob("*.safetensors")) - set(self.files))
        if names := left_out(self._stored, expected, self.family):
            notices.append(left_out_notice(names, self.family))
        if unread:
            notices.append(
                f"Left out: {listed(file.name for file in unread)}, which transformers does not read either."
            )
        if self._untied:
            notices.append(
                "The output layer is stored beside the embedding and differs from it: the two are used as they are, as "
                "transformers does, though config.json says that they are one."
            )
        return notices

    def _on_disk(self, expected: Mapping[str, torch.Size]) -> Mapping[str, torch.Size]:
        return on_disk(expected, self.family, Shape.of(self.config), lambda n: self.shape(n) if n in self else ())

    def block(self, index: int) -> dict[str, Tensor]:
        """The tensors of decoder block `index`, by their names inside the block, each projection by itself."""
        prefix = f"{self.family.layers}.{index}."
        inside = [name.removeprefix(prefix) for name in self._stored if name.startswith(prefix)]
        tensors = {name: self.tensor(prefix + name) for name in inside if name not in self.family.ignored}
        return split_tensors(tensors, self.family.at(index), Shape.of(self.config).at(index))

    def towers(self) -> Iterator[tuple[str, Tensor]]:
        """What a model that sees has beside its decoder, by full names, a tensor at a time."""
        prefixes = self.family.sight.prefixes if self.family.sight else ()
        return ((name, self.tensor(name)) for name in self.names if name.startswith(prefixes))

    def embedding(self) -> StoredMatrix:
        """(vocabulary, hidden)."""
        return self.matrix(f"{self.family.embedding}.weight")

    def final_norm(self) -> Tensor:
        """(hidden,)."""
        return self.tensor(f"{self.family.final_norm}.weight")

    def head(self) -> StoredMatrix:
        """(vocabulary, hidden): the output layer; the embedding where the two are tied."""
        name = f"{self.family.head}.weight"
        return self.embedding() if self.config.tie_word_embeddings or name not in self else self.matrix(name)

    def outer_layers(self) -> OuterLayers:
        """All that is outside the blocks, embedding and head not read yet."""
        family, embedding, head, norm = self.family, self.embedding(), self.head(), self.final_norm()
        none = torch.zeros_like(norm) if family.layer_norm else None
        return OuterLayers(
            self._normed(embedding),
            norm,
            embedding if head == embedding else head,
            positions=self.tensor(f"{family.positions}.weight") if family.positions else None,
            norm_bias=self._further("final_norm", family.layer_norm, none),
            head_bias=self._further("head", self.family.head_bias),
            others={name: self.tensor(name) for name in family.others},
        )

    def _normed(self, embedding: StoredMatrix) -> Matrix:
        if (norm := self.family.embedding_norm) is None:
            return embedding
        weight, bias = (self.tensor(f"{norm}.{part}") for part in ("weight", "bias"))
        return NormedMatrix(embedding, weight, bias, float(getattr(self.config, self.family.embedding_epsilon)))

    def _further(self, part: str, has: bool, otherwise: Tensor | None = None) -> Tensor | None:
        """The bias of a part that `has` one, or of which no row says whether it does."""
        name = f"{getattr(self.family, part)}.bias"
        return self.tensor(name) if (has or self.family.generic) and name in self else otherwise

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weights are stored in, as the embedding has it."""
        file, stored = self._stored[f"{self.family.embedding}.weight"]
        with self._open(file) as reader:
            return reader.get_slice(stored)[:1].dtype
