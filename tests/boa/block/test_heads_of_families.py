"""H_out of queries and keys of every family, of one token alone, against autograd through transformers' own block.

Of one token nothing is averaged, so that the objective is exact: RoPE in halves, of neighbours or none, norms of heads
before it, after it, over all heads and without a weight, learned positions.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rotoboa.boa.online.attention import NAME
from rotoboa.boa.online.transforms import OnlineTransforms
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.models.decoder import Decoder
from rotoboa.tests.small_families import FAMILIES, MIXTURES

from ..small_block import Solved, block_tensors, run_block, seen_where

NAMES = [name for name in FAMILIES if name not in MIXTURES] + ["gpt_oss", "llama4_text"]
BOUND = Settings(bits=4, refine=1, starts=1, tabu=0, attention="bound")
POSITION = 5


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token at the first position would not be turned."""
    angles = Decoder._turning

    def at_position(self: Decoder, length: int, index: int = 0) -> tuple[Tensor, ...] | Tensor:
        found = angles(self, length + POSITION, index)
        return found[:, POSITION:] if isinstance(found, Tensor) else tuple(part[:, POSITION:] for part in found)

    monkeypatch.setattr(Decoder, "_turning", at_position)


@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_exact(family_model: Callable[..., Any], name: str, solved: Solved) -> None:
    model = family_model(name)
    decoder = Decoder(model.config, attention=NAME)
    family, shape = decoder.family, decoder.shape
    block = decoder.block(1, block_tensors(model, decoder, 1))
    hidden = torch.randn(1, 1, shape.hidden, generator=torch.Generator().manual_seed(5))
    seen = seen_where(decoder, block, hidden, family.query, torch.zeros(()))
    run_block(decoder, block, BOUND, OnlineTransforms(), (hidden.clone(), hidden.clone()))
    h_out = solved[0][1].h_out
    assert h_out is not None
    query, key, group = seen.query[0, :, 0], seen.key[0, :, 0], shape.query_heads // shape.key_heads
    costs = {"query": key[:, :, None] * key[:, None], "key": query[:, :, None] * query[:, None]}
    costs["query"] = costs["query"].repeat_interleave(group, 0)
    costs["key"] = costs["key"].unflatten(0, (-1, group)).sum(1)
    found = dict(zip(("query", "key"), h_out.split([shape.query_heads, shape.key_heads]), strict=True))
    for part, projection in (("query", family.query), ("key", family.key)):
        zero = torch.zeros(len(costs[part]) * shape.head_dim)

        def reached(by: Tensor, part: str = part, projection: str = projection) -> Tensor:
            return getattr(seen_where(decoder, block, hidden, projection, by), part)[0, :, 0].flatten()

        with torch.enable_grad():
            j = torch.autograd.functional.jacobian(reached, zero)
        whole = j.T @ torch.block_diag(*costs[part]) @ j
        size = shape.head_dim
        wanted = torch.stack([whole[i : i + size, i : i + size] for i in range(0, len(whole), size)])
        for mine, exact in zip(found[part], wanted, strict=True):
            torch.testing.assert_close(mine / mine.trace(), exact / exact.trace(), rtol=1e-3, atol=1e-4)
