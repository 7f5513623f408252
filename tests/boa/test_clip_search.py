"""What the clip ratios of a block are chosen on: tokens and sequences of all of the stream, a batch at a time."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rotoboa.boa.activations import DynamicQuantizer
from rotoboa.boa.clipping import RATIOS, ClipCosts, clip_costs
from rotoboa.boa.workspace import Workspace

from .small_block import KEY_HEADS, LENGTH, LLAMA, QUANTIZED, QUICK, SEQUENCES, SIZE, Ran, make_streams, run_small

SITES = ("qkv", "key", "value", "output", "gate_up", "down")


class Search(NamedTuple):
    ran: Ran
    seen: dict[str, list[Tensor]]  # what was rounded for the choice, by site

    def tokens(self, site: str) -> int:
        return sum(x.shape[:-1].numel() for x in self.seen[site])


def search(monkeypatch: pytest.MonkeyPatch, *, tokens: int, batch: int, sink: int = 0) -> Search:
    """The small block with everything quantized, its clip ratios chosen on this many tokens."""
    groups: list[list[Tensor]] = []  # one for each search, in the order of the block
    search_all, add_one = Workspace._clip_costs, ClipCosts.add

    def clip_costs(self: Workspace, *args: Any, **options: Any) -> list[ClipCosts]:
        groups.append([])
        return search_all(self, *args, **options)

    def add(self: ClipCosts, quantizer: DynamicQuantizer, x: Tensor, metric: Tensor) -> None:
        groups[-1].append(x)
        add_one(self, quantizer, x, metric)

    transforms = replace(QUANTIZED, attention=replace(QUANTIZED.attention, sink=sink))
    with monkeypatch.context() as patch:
        patch.setattr("rotoboa.boa.clipping.TOKENS", tokens)
        patch.setattr(Workspace, "_clip_costs", clip_costs)
        patch.setattr(ClipCosts, "add", add)
        ran = run_small(QUICK, transforms, batch=batch, search_inputs=True, search_cache=True)
    qkv, cache, *others = groups
    return Search(ran, dict(zip(SITES, (qkv, cache[::2], cache[1::2], *others), strict=True)))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_tokens_of_every_sequence(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    found = search(monkeypatch, tokens=21, batch=batch)
    norm = found.ran.solver.full.get_submodule(LLAMA.attention_norm)
    with torch.no_grad():
        inputs = norm(make_streams()[1]).flatten(0, 1)
    assert torch.equal(torch.cat(found.seen["qkv"]), inputs[::3]), "60 tokens, of which 21 are to be seen"
    assert found.tokens("qkv") == found.tokens("gate_up") == found.tokens("down") == 20
    assert found.tokens("output") == 2 * LENGTH
    assert torch.cat(found.seen["key"]).shape == (2, KEY_HEADS, LENGTH, SIZE)


def test_the_cheapest_ratio_over_all_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(monkeypatch, tokens=1000, batch=2)
    chosen = found.ran.solver.transforms
    weight = torch.cat([found.ran.solver.full.get_parameter(f"{name}.weight").data for name in (LLAMA.gate, LLAMA.up)])
    quantizer = chosen.gate_up.quantizer
    assert quantizer is not None and found.tokens("gate_up") == SEQUENCES * LENGTH
    costs = sum(clip_costs(quantizer, x, weight.T @ weight) for x in found.seen["gate_up"])
    assert isinstance(costs, Tensor) and quantizer.clip == RATIOS[int(costs.argmin())]
    assert set(chosen.clips) == set(SITES)


def test_ratios_of_the_cache_know_no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are weighed within their own sequence."""
    found = [search(monkeypatch, tokens=1000, batch=batch).ran.solver.transforms.clips for batch in (1, 2, 3)]
    for site in ("key", "value"):
        assert len({clips[site] for clips in found}) == 1


@pytest.mark.parametrize("sink", [0, 3, LENGTH, 2 * LENGTH])
def test_positions_that_are_not_quantized_have_no_part(monkeypatch: pytest.MonkeyPatch, sink: int) -> None:
    found = search(monkeypatch, tokens=1000, batch=2, sink=sink)
    seen = SEQUENCES * KEY_HEADS * max(0, LENGTH - sink)
    assert found.tokens("key") == found.tokens("value") == seen
    assert found.ran.solver.transforms.attention.sink == sink
    if not seen:
        assert found.ran.solver.transforms.clips["key"] == RATIOS[0]
