"""What a row is made of beside names: merged layers, variants by the config, what a model sees with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SITES = ("qkv", "output", "gate_up", "down")
"""The inputs of a block's linear layers: of Q, K and V; of the output projection; of gate and up; of down."""
ALL_SITES = (*SITES, "latent")
"""With those of layers that read what is compressed, which few families have."""
CAUSAL: Mapping[str, tuple[Any, ...] | str] = {"use_bidirectional_attention": (False, None)}
"""`Family.legal` of models that may be made to look ahead."""


@dataclass(frozen=True)
class Merged:
    """One linear layer of a block whose rows are several projections, and the `Shape` field that sizes each.

    A field is "" where `Family.measured` has the size.

    `groups`: the `Shape` field that says in how many equal groups the rows come, each with a piece of every projection;
    "" where a projection is whole.
    """

    name: str
    parts: Mapping[str, str]
    groups: str = ""


@dataclass(frozen=True)
class Variant:
    """Fields that a row has instead, where the config has these values; True and False are taken of any value."""

    config: Mapping[str, Any]
    fields: Mapping[str, Any]

    def holds(self, config: Any) -> bool:
        """Whether the config is one of this variant."""
        found = {name: getattr(config, name, None) for name in self.config}
        return all((bool(found[k]) if isinstance(v, bool) else found[k]) == v for k, v in self.config.items())


@dataclass(frozen=True)
class Sight:
    """What a model that sees has beside its decoder.

    Attributes:
        texts: the `model_type`s that its config may have in `text_config`.
        towers: modules that make embeddings of images; they stay as they are.
        writers: patterns of the linear layers in them whose output is added to the residual stream, or put in place of
            embeddings: they are rotated where the stream is.
    """

    texts: tuple[str, ...]
    towers: tuple[str, ...]
    writers: tuple[str, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """How the names of what the towers hold begin."""
        return tuple(f"{tower}." for tower in self.towers)

    def writes(self, name: str) -> bool:
        """Whether a tensor is of one of the writers."""
        return any(re.fullmatch(writer, name.rpartition(".")[0]) for writer in self.writers)
