"""What a decoder has before its first block and after its last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .families import Family
from .matrices import Matrix, PartedMatrix, ProductMatrix

TURN = "turn"
"""The last part of the name of `OuterLayers.before_head`."""


@dataclass(frozen=True)
class OuterLayers:
    """The tensors outside the blocks.

    Attributes:
        embedding: (vocabulary, hidden); like `head` a tensor, or rows that are read when they are asked for.
        norm: (hidden,), the final norm's stored weight.
        head: (vocabulary, hidden); the embedding itself where the two are tied.
        positions: (positions + offset, hidden), learned ones, as stored; None with RoPE.
        norm_bias: (hidden,), of a LayerNorm.
        head_bias: (vocabulary,), of the head, and what the final norm's bias becomes when it is folded into that.
        before_head: (hidden, hidden), symmetric, by which the norm's output is multiplied before the head reads it,
            where the head is the embedding of a rotated stream; see `Rotations.before_head`.
        others: of a family without a row, what else there is, by full names.
    """

    embedding: Matrix
    norm: Tensor
    head: Matrix
    positions: Tensor | None = None
    norm_bias: Tensor | None = None
    head_bias: Tensor | None = None
    before_head: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix, which is stored once."""
        return self.head is self.embedding

    def untied(self) -> OuterLayers:
        """The same with a head of its own, where the embedding with a matrix before it is the head."""
        if self.before_head is None:
            return self
        return replace(self, head=ProductMatrix(self.embedding, self.before_head), before_head=None)

    def map(self, function: Callable[[Tensor], Tensor]) -> OuterLayers:
        """The same with `function` of every tensor that is there, whole."""
        others = {name: function(tensor) for name, tensor in self.others.items()}
        named = {name: tensor for name, tensor in vars(self).items() if tensor is not None and name != "others"}
        return OuterLayers(**{name: function(tensor[:]) for name, tensor in named.items()}, others=others)

    def rows(self, index: slice | Tensor) -> OuterLayers:
        """Those of some tokens: the rows `index` of embedding, head and its bias, and the rest as it is."""
        bias = None if self.head_bias is None else self.head_bias[index]
        return replace(self, embedding=self.embedding[index], head=self.head[index], head_bias=bias)

    def named(self, family: Family) -> dict[str, Tensor]:
        """Those that are there, whole, by their full names in a checkpoint, which has no tied head."""
        return {**self.before(family), **self.after(family)}

    def before(self, family: Family) -> dict[str, Tensor]:
        """Of `named` what comes before the blocks."""
        return self._named(family, ("embedding", "positions")) | dict(self.others)

    def after(self, family: Family) -> dict[str, Tensor]:
        """Of `named` what comes after the blocks."""
        return self._named(family, ("norm", "norm_bias", *([] if self.tied else ["head"]), "head_bias", "before_head"))

    def _named(self, family: Family, fields: Sequence[str]) -> dict[str, Tensor]:
        names, found = _names(family), dict[str, Tensor]()
        for part in fields:
            matrix = getattr(self, part)
            if isinstance(matrix, PartedMatrix):
                module = names[part].removesuffix(".weight")
                found |= {f"{module}.{name}": tensor for name, tensor in matrix.parts().items()}
            elif matrix is not None:
                found[names[part]] = matrix[:]
        return found

    @classmethod
    def missing(
        cls, family: Family, found: Mapping[str, object], *, tied: bool = False, turned: bool = False
    ) -> list[str]:
        """Full names of the tensors that every model of the family has, and `found` has not.

        Args:
            family: of the model.
            found: tensors by their full names.
            tied: without a head.
            turned: with a matrix before it.
        """
        fields = ["embedding", "norm", *([] if tied else ["head"]), *(["positions"] if family.positions else [])]
        fields += ["before_head"] if turned else []
        fields += ["head_bias"] if family.head_bias else []
        return [name for field, name in _names(family).items() if field in fields and name not in found]

    @classmethod
    def of(cls, family: Family, found: Mapping[str, Any]) -> OuterLayers:
        """From tensors by their full names; see `missing`. Where there is no head, it is the embedding."""
        fields = {field: found[name] for field, name in _names(family).items() if name in found}
        others = {name: found[name] for name in family.others if name in found}
        return cls(**{"head": fields["embedding"], **fields}, others=others)

    @staticmethod
    def names(family: Family) -> list[str]:
        """Full names of all that a model of the family can have."""
        return [*_names(family).values(), *family.others]


def _names(family: Family) -> dict[str, str]:
    names = {
        "embedding": f"{family.embedding}.weight",
        "positions": f"{family.positions}.weight",
        "norm": f"{family.final_norm}.weight",
        "norm_bias": f"{family.final_norm}.bias",
        "head": f"{family.head}.weight",
        "head_bias": f"{family.head}.bias",
        "before_head": f"{family.head}.{TURN}",
    }
    if family.positions is None:
        del names["positions"]
    return names
