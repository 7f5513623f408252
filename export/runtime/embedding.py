"""An embedding that stays packed in memory, and the output layer that shares its matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..packing import dequantize_rows
from .packed_weight import PackedWeight

ROWS = 1 << 12  # of the matrix that become floats at a time, as an output layer


class QuantizedEmbedding(PackedWeight):
    """Rows of a packed matrix as floats of `dtype`, times `factor` where the family scales its embedding.

    Its buffers are those of `PackedWeight`, a row a token.
    """

    kind: Tensor

    def __init__(
        self,
        tokens: int,
        width: int,
        *,
        bits: int,
        group_size: int | None,
        dtype: torch.dtype,
        format: str = "int",
        factor: float | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.factor = tokens, width, factor
        self.make_room(tokens, width, bits, group_size, format)
        self.register_buffer("kind", torch.empty(0, dtype=dtype), persistent=False)  # follows `model.to(dtype)`

    def rows(self, index: slice | Tensor) -> Tensor:
        """Some rows, in the model's dtype."""
        found = dequantize_rows(self.qweight[index], *self.grid(index), self.bits, self.embedding_dim)
        return found.to(self.kind.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids -> (..., width)."""
        found = self.rows(ids)
        return found if self.factor is None else found * torch.tensor(self.factor).to(found)


class TiedHead(nn.Module):
    """Logits by the matrix of a packed embedding, which stays where it is.

    Where the stream is rotated, the buffer `turn` (width, width) is what the input is multiplied by first; see
    `OuterLayers.before_head`.
    """

    turn: Tensor | None

    def __init__(self, embedding: QuantizedEmbedding, *, turns: bool = False) -> None:
        super().__init__()
        width = embedding.embedding_dim
        self.register_buffer("turn", embedding.kind.new_zeros(width, width) if turns else None)
        self.embedding = (embedding,)  # in a tuple it is no module of this one, and is stored once
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def weight(self) -> Tensor:
        """As of the embedding."""
        return self.embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., tokens)."""
        (embedding,) = self.embedding
        x = x if self.turn is None else x @ self.turn.to(x.dtype)
        spans = [slice(start, start + ROWS) for start in range(0, self.out_features, ROWS)]
        return torch.cat([nn.functional.linear(x, embedding.rows(span).to(x.dtype)) for span in spans], -1)
