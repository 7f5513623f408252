"""An embedding that stays packed in memory, and the output layer that shares its matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..packing import dequantize_rows, packed_width

ROWS = 1 << 12  # of the matrix that become floats at a time, as an output layer


class QuantizedEmbedding(nn.Module):
    """Rows of a packed matrix as floats of `dtype`, times `factor` where the family scales its embedding.

    Buffers, as in the files: `qweight` (tokens, words) int32, `scale` (tokens, groups) float16, `zero` (tokens, groups)
    uint8; see `QuantizedLinear`.
    """

    qweight: Tensor
    scale: Tensor
    zero: Tensor
    kind: Tensor

    def __init__(
        self,
        tokens: int,
        width: int,
        *,
        bits: int,
        group_size: int | None,
        dtype: torch.dtype,
        factor: float | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits, self.factor = tokens, width, bits, factor
        groups = width // (group_size or width)
        self.register_buffer("qweight", torch.zeros(tokens, packed_width(width, bits), dtype=torch.int32))
        self.register_buffer("scale", torch.ones(tokens, groups, dtype=torch.float16))
        self.register_buffer("zero", torch.zeros(tokens, groups, dtype=torch.uint8))
        self.register_buffer("kind", torch.empty(0, dtype=dtype), persistent=False)  # follows `model.to(dtype)`

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        # As of `QuantizedLinear`: scales stay float16.
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    @property
    def weight(self) -> Tensor:
        """The packed words, for those who ask a layer for its device."""
        return self.qweight

    def rows(self, index: slice | Tensor) -> Tensor:
        """Some rows, in the model's dtype."""
        parts = self.qweight[index], self.scale[index], self.zero[index]
        return dequantize_rows(*parts, self.bits, self.embedding_dim).to(self.kind.dtype)

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
