"""RTN and plain GPTQ on the objective of a run: how much of a layer's loss its own method has taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..objective.objective import Objective
from ..stopwatch import stage
from .rounding import Quantized, quantize
from .rounding_settings import Settings

NAMES = ("quantized", "gptq", "rtn")
PLAIN: dict[str, Any] = {"grid": "minmax", "alpha": 0.0, "refine": 0, "starts": 1, "tabu": 0.0, "act_order": False}
"""As published: full-range grids, columns in their order, no residual compensation, no refinement."""


@stage("references", whole=True)
def reference_sums(
    weight: Tensor, objective: Objective, settings: Settings, result: Quantized, *, by_rows: bool = False
) -> dict[str, Tensor]:
    """The objective at the result, at plain GPTQ's, at RTN's and at a zero weight.

    It is tr(H_out E H_in E^T) with E = Q - W*, damped and its target shifted as the run's own method has it, whatever
    the reference itself goes by. What it does not see, channels that are never active, counts for none of them.

    Args:
        weight: (heads, r, c), projections stacked.
        objective: of all of them, as it was collected.
        settings: of the run.
        result: what the run made of them.
        by_rows: of one head whose rows are independent, by row.

    Returns:
        `NAMES` and, of a zero weight, `whole`: (heads,), or (r,) of the only head.
    """
    plain = settings.but(**PLAIN)
    found = {
        "quantized": result,
        "gptq": quantize(weight, objective, plain.but(method="gptq")),
        "rtn": quantize(weight, None, plain.but(method="rtn")),
    }
    damped = objective.damped(settings.damping)  # after what takes memory of its own
    # Errors of channels and rows that the objective does not see count nothing; once damped, it would see them.
    unseen, unread = objective.dead[:, None], objective.unread
    if unread is not None:
        unseen = unseen | unread[..., None]
    target = damped.target(weight, settings.alpha).masked_fill(unseen, 0)  # a copy: it may be the weight itself

    def loss(error: Tensor) -> Tensor:
        error.masked_fill_(unseen, 0)
        return (damped.gradient(error) * error).sum(-1)[0] if by_rows else damped.loss(error)

    return {**{name: loss(part.dequantize() - target) for name, part in found.items()}, "whole": loss(target)}


def relative_losses(sums: Mapping[str, Tensor], heads: Sequence[int]) -> list[dict[str, float]]:
    """For each projection, of `heads` heads, each of `NAMES` relative to `whole`; `sums` are (heads,)."""
    parts = {name: sums[name].split(list(heads)) for name in (*NAMES, "whole")}
    tiny = torch.finfo(sums["whole"].dtype).tiny
    return [
        {name: float(parts[name][i].clamp_min(0).sum() / parts["whole"][i].sum().clamp_min(tiny)) for name in NAMES}
        for i in range(len(heads))
    ]
