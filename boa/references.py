"""RTN and plain GPTQ on the objective of a run: how much of a layer's loss its own method has taken away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .objective import Objective
from .rounding import Quantized, Settings, quantize
from .stopwatch import stage

PLAIN = {"grid": "minmax", "alpha": 0.0, "refine": 0, "starts": 1, "act_order": False}
"""As published: full-range grids, columns in their order, no residual compensation, no refinement."""


@stage("references", whole=True)
def reference_losses(
    weight: Tensor, objective: Objective, settings: Settings, result: Quantized, heads: Sequence[int]
) -> list[dict[str, float]]:
    """The objective at the result, at plain GPTQ's and at RTN's, relative to that at a zero weight.

    It is tr(H_out E H_in E^T) with E = Q - W*, damped and its target shifted as the run's own method has it, whatever
    the reference itself goes by.

    Args:
        weight: (heads, r, c), projections stacked.
        objective: of all of them, as it was collected.
        settings: of the run.
        result: what the run made of them.
        heads: how many heads each projection has.

    Returns:
        For each projection `quantized`, `gptq` and `rtn`.
    """
    plain = replace(settings, **PLAIN)  # type: ignore[arg-type]
    found = {
        "quantized": result,
        "gptq": quantize(weight, objective, replace(plain, method="gptq")),
        "rtn": quantize(weight, None, replace(plain, method="rtn")),
    }
    damped = objective.damped(settings.damping)  # after what takes memory of its own
    target = damped.target(weight, settings.alpha)
    whole = damped.loss(target)
    losses = {name: damped.loss(part.dequantize() - target).clamp_min(0) for name, part in found.items()}
    return [
        {name: float(loss.sum() / zero.sum().clamp_min(torch.finfo(zero.dtype).tiny)) for name, loss in part.items()}
        for part, zero in zip(_split(losses, heads), whole.split(list(heads)), strict=True)
    ]


def _split(losses: dict[str, Tensor], heads: Sequence[int]) -> list[dict[str, Tensor]]:
    parts = {name: loss.split(list(heads)) for name, loss in losses.items()}
    return [{name: pieces[i] for name, pieces in parts.items()} for i in range(len(heads))]
