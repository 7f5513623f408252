"""The MLP of a block: gate and up, or up alone; down."""

from __future__ import annotations

from torch import Tensor, nn

from ..objective.statistics import InputStatistics
from .workspace import Pending, Workspace, capture, layer_objective


class MlpHalf(Workspace):
    """Gate and up, then down."""

    def _mlp_half(self, full: Tensor, quantized: Tensor) -> None:
        f = self.family
        norm = self.full.get_submodule(f.mlp_norm)
        readers = list(f.mlp_inputs)
        t = self.transforms
        inputs, downs = self._total(InputStatistics), self._total(InputStatistics)
        if self.previous is None:
            for span, hf, hq in self._batches(full, quantized):
                xf, xq = t.gate_up.rotate(norm(hf)), t.gate_up(norm(hq))
                inputs.at(self._number(span)).add(xf, xq)
        self._solve(Pending(readers, layer_objective(inputs), [1] * len(readers)))
        given = self.empty(*full.shape[:2], self.shape.ffn, dtype=full.dtype)
        for span, hf, hq in self._batches(full, quantized):
            exact = t.down.rotate(self._mlp_hidden(self.full, t.gate_up.rotate(norm(hf))))
            given[span] = x = t.down(self._mlp_hidden(self.quantized, t.gate_up(norm(hq))))
            self._write(f.down, downs, self._number(span), full[span], hf, hq, exact, x, f.mlp_post_norm)
        self._solve(Pending([f.down], layer_objective(downs, self._weight(f.down)), [1]))
        self._add(f.down, quantized, given, f.mlp_post_norm)

    def _mlp_hidden(self, block: nn.Module, x: Tensor) -> Tensor:
        """The input of the down projection, before R4, (batch, length, ffn)."""
        if self.family.activation:
            hidden: Tensor = block.get_submodule(self.family.activation)(block.get_submodule(self.family.up)(x))
            return hidden
        mlp = block.get_submodule(self.family.mlp)
        return capture(block.get_submodule(self.family.down), lambda: mlp(x))
