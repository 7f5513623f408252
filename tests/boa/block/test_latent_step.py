"""Attention that compresses keys and values: what reads the latents, against transformers' own block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.block.forward_parts import capture
from rotoboa.boa.objective import statistics
from rotoboa.boa.online.attention import NAME
from rotoboa.boa.online.transforms import OnlineTransforms
from rotoboa.boa.scheme import QuantizationScheme
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.models.decoder import Decoder

from ..small_block import Solved, block_tensors, run_block, seen_where
from .test_block_families import SETTINGS, Setup

NAMES = ("deepseek_v3", "deepseek_v3-halves", "deepseek_v2", "deepseek_v2-lite")
BOUND = Settings(bits=4, refine=1, starts=1, tabu=0, attention="bound")
POSITION = 5


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token at the first position would not be turned."""
    angles = Decoder._turning

    def at_position(self: Decoder, length: int, index: int = 0) -> Any:
        found: Any = angles(self, length + POSITION, index)
        if isinstance(found, Tensor):
            return found[:, POSITION:]
        return tuple(part[:, POSITION:] for part in found)

    monkeypatch.setattr(Decoder, "_turning", at_position)


def _read(setup: Setup, name: str, hidden: Tensor) -> Tensor:
    """What a layer reads, (tokens, columns)."""
    return capture(setup.block.get_submodule(name), lambda: setup.decoder.run(setup.block, hidden)).flatten(0, -2)


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_exact(family_model: Callable[..., Any], name: str, solved: Solved) -> None:
    """H_out of queries and keys of one token alone, by autograd: RoPE of halves and of neighbours, on some channels."""
    model = family_model(name)
    decoder = Decoder(model.config, attention=NAME)
    family, shape = decoder.family, decoder.shape
    block = decoder.block(1, block_tensors(model, decoder, 1))
    hidden = torch.randn(1, 1, shape.hidden, generator=torch.Generator().manual_seed(5))
    seen = seen_where(decoder, block, hidden, family.query, torch.zeros(()))
    streams, schemes = (hidden.clone(), hidden.clone()), dict.fromkeys(family.at(1).compressions, QuantizationScheme())
    run_block(decoder, block, BOUND, OnlineTransforms(), streams, schemes=schemes)
    query, key = seen.query[0, :, 0], seen.key[0, :, 0]
    queries, keys, *_ = solved
    for part, layer, goal, other in (("query", family.query, queries, key), ("key", family.key, keys, query)):
        size = len(block.get_parameter(f"{layer}.weight"))

        def reached(by: Tensor, part: str = part, layer: str = layer) -> Tensor:
            return getattr(seen_where(decoder, block, hidden, layer, by), part)[0, :, 0].flatten()

        with torch.enable_grad():
            j = torch.autograd.functional.jacobian(reached, torch.zeros(size))
        whole = j.T @ torch.block_diag(*(other[:, :, None] * other[:, None])) @ j
        per = size // shape.query_heads
        wanted = torch.stack([whole[i : i + per, i : i + per] for i in range(0, size, per)])
        assert goal[1].h_out is not None
        for mine, exact in zip(goal[1].h_out, wanted, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_values(
    family_model: Callable[..., nn.Module], name: str, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    """H_in of what reads latents, and of values attention's mean of them; both streams are the same."""
    monkeypatch.setattr(statistics, "_has_bfloat16", lambda: False)
    setup = Setup(family_model(name))
    full, _ = setup.streams()
    hidden = full.clone()
    # Compressions are quantized before: as they are, what follows is what the full block has.
    schemes = dict.fromkeys(setup.decoder.family.at(1).compressions, QuantizationScheme())
    run_block(setup.decoder, setup.block, SETTINGS, setup.transforms, (full, full.clone()), schemes=schemes)
    family, shape = setup.decoder.family.at(1), setup.decoder.shape
    queries, keys, values, *_ = solved
    x, c = _read(setup, family.query, hidden), _read(setup, family.value, hidden)
    torch.testing.assert_close(queries[1].h_in[0], x.T @ x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(keys[1].h_in[0], c.T @ c, rtol=1e-3, atol=1e-3)
    seen = seen_where(setup.decoder, setup.block, hidden, family.query, torch.zeros(()))
    logits = seen.query @ seen.key.transpose(-1, -2) * seen.scaling
    a = (logits + torch.full(logits.shape[-2:], float("-inf")).triu(1)).softmax(-1)
    mixed = torch.einsum("bhlm,bmc->hblc", a, c.unflatten(0, hidden.shape[:2])).flatten(1, 2)
    torch.testing.assert_close(values[1].h_in, mixed.transpose(1, 2) @ mixed, rtol=1e-3, atol=1e-3)
    weight = setup.block.get_parameter(f"{family.output}.weight").unflatten(1, (shape.query_heads, -1))
    torch.testing.assert_close(values[1].h_out, torch.einsum("rhi,rhj->hij", weight, weight), rtol=1e-3, atol=1e-3)
    lost = values[1].drift
    assert lost is not None and lost.abs().max() < 1e-4 * values[1].h_in.abs().max()


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_methods_of_layers(family_model: Callable[..., nn.Module], solved: Solved, method: Any) -> None:
    setup = Setup(family_model(NAMES[0]))
    settings = Settings(bits=4, refine=1, starts=1, tabu=0, method=method, alpha=0)
    found = run_block(setup.decoder, setup.block, settings, setup.transforms, setup.streams()).found
    assert list(found.results) == list(setup.decoder.family.at(1).projections)
    assert all(goal.h_out is None for _, goal in solved if goal is not None)
