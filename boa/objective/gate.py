"""What errors before a gated output projection cost: of the gate, and of the values that it lets through.

With attention's output o and a gate g = sigmoid(z), both by token and channel, the block reads W_O (o * g). An error dz
of the gate costs |W_O (o * g' * dz)|^2 with g' = g (1 - g), one of o, do, |W_O (g * do)|^2. With M = W_O,h^T W_O,h of a
head these are quadratics with M * (s s^T), s = o * g', and with M * (g g^T), which change from token to token. As H_out
and H_in have to be apart, what depends on tokens in them is replaced by its mean: H_out is M * E[s s^T], or
M * E[g g^T].
"""

from __future__ import annotations

from torch import Tensor

from ..stopwatch import stage


class GateStatistics:
    """Of one block's gate.

    Attributes:
        gates, slopes: sums over tokens of g g^T and s s^T, (heads, head_dim, head_dim).
        tokens: how many, (1,).
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.tokens: Tensor | None = None
        self.gates: Tensor | None = None
        self.slopes: Tensor | None = None

    @stage("head statistics")
    def add(self, output: Tensor, gate: Tensor) -> None:
        """o and g of one batch in the full-precision stream, (batch, length, heads * head_dim)."""
        count = gate.new_full((1,), gate.shape[:-1].numel())
        self.tokens = count if self.tokens is None else self.tokens.add_(count)
        for name, part in (("gates", gate), ("slopes", output * gate * (1 - gate))):
            x = part.flatten(0, -2).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            gram, before = x.transpose(1, 2) @ x, getattr(self, name)
            setattr(self, name, gram if before is None else before.add_(gram))

    def sums(self) -> dict[str, list[Tensor]]:
        """As `totals.Statistics` has it."""
        return {n: [part] for n in ("gates", "slopes", "tokens") if (part := getattr(self, n)) is not None}

    def of_values(self, read: Tensor, key_heads: int) -> Tensor:
        """H_out of the values, (key heads, head_dim, head_dim), of `read`, M by query head."""
        return (read * self._mean(self.gates)).unflatten(0, (key_heads, -1)).sum(1)

    def of_gate(self, read: Tensor) -> Tensor:
        """H_out of the gate, (heads, head_dim, head_dim), of `read`, M by query head."""
        return read * self._mean(self.slopes)

    def _mean(self, total: Tensor | None) -> Tensor:
        if total is None or self.tokens is None:
            raise ValueError("no calibration tokens were seen")
        return total / self.tokens
