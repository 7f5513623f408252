"""Which inputs of a run are balanced by what their leading directions leave of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import rotoboa
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.rotating import balancing


def test_inputs_with_directions_are_balanced_by_what_these_leave(
    llama: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a block whose inputs are in 4 bits, and of one where O's are in 8, which has no directions."""
    seen, scales = list[tuple[dict[str, int], int]](), balancing.scales

    def look(tensors: Any, family: Any, shape: Any, found: dict[str, Tensor], rotary: int, directions: int) -> Any:
        seen.append(({site: moment.dim() for site, moment in found.items()}, directions))
        return scales(tensors, family, shape, found, rotary, directions)

    monkeypatch.setattr(balancing, "scales", look)
    fields = {"model": str(llama), "output": tmp_path / "run", "weights.method": "rtn", "activations.directions": 8}
    eight = [{"layers": "*.1.*.o_proj", "activations": {"bits": 8}}]
    rotoboa.quantize(make_recipe("w4a4kv4", {**fields, "overrides": eight, "evaluation.windows": 1}))
    first, second = ({site: dims[site] for site in ("qkv", "output", "gate_up", "down")} for dims, _ in seen)
    assert first == {"qkv": 2, "output": 2, "gate_up": 2, "down": 1} and second == first | {"output": 1}
    assert [count for _, count in seen] == [8, 8]
