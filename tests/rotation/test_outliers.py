"""Outlier figures against their formulas, and the inputs of real blocks before and after rotation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES, SITES
from rotoboa.models.layout import split_tensors
from rotoboa.rotation.outliers import (
    GRID,
    PICTURES,
    Outliers,
    kurtosis,
    magnitudes,
    peak,
    pictured_blocks,
    site_inputs,
)
from rotoboa.rotation.rotate import Rotations

LLAMA = FAMILIES["llama"]
HIDDEN, FFN, HEADS, SIZE = 32, 24, 4, 8


def test_kurtosis_and_peak_by_their_formulas() -> None:
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    x[0, 0, 7] = 50
    for i in range(3):
        for j in range(5):
            values = x[i, j].double().tolist()
            mean = math.fsum(values) / 40
            moments = [math.fsum((v - mean) ** power for v in values) / 40 for power in (2, 4)]
            assert float(kurtosis(x)[i, j]) == pytest.approx(moments[1] / moments[0] ** 2, rel=1e-6)
            rms = math.sqrt(math.fsum(v * v for v in values) / 40)
            assert float(peak(x)[i, j]) == pytest.approx(max(map(abs, values)) / rms, rel=1e-9)
    assert float(kurtosis(x)[0, 0]) > 30


def test_of_a_gaussian_and_of_nothing() -> None:
    x = torch.randn(4, 200_000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kurtosis(x), torch.full((4,), 3.0, dtype=torch.float64), atol=0.1, rtol=0)
    zero = torch.zeros(2, 8)
    assert kurtosis(zero).tolist() == peak(zero).tolist() == [0, 0]


def test_a_picture_keeps_every_spike() -> None:
    x = torch.zeros(200, 700)
    x[150, 333] = -9
    found = magnitudes(x)
    assert found.shape == GRID and float(found.max()) == 9
    token, channel = divmod(int(found.argmax()), GRID[1])
    assert token == 150 * GRID[0] // 200 and channel == 333 * GRID[1] // 700
    assert magnitudes(torch.ones(3, 5)).shape == (3, 5)


@pytest.mark.parametrize("blocks", [1, 4, PICTURES, 9, 80])
def test_pictured_blocks(blocks: int) -> None:
    found = pictured_blocks(blocks)
    assert len(found) == len(set(found)) == min(blocks, PICTURES)
    assert found[0] == 0 and found[-1] == blocks - 1 and found == sorted(found)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = LlamaConfig(
        vocab_size=16, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=2, head_dim=SIZE,
    )  # fmt: skip
    return Decoder(config, dtype=torch.float64)


@pytest.mark.parametrize("r4", [False, True])
@pytest.mark.parametrize("r2", [False, True])
def test_inputs_after_rotation_are_the_rotated_inputs(decoder: Decoder, r2: bool, r4: bool) -> None:
    """Of the same function (norms are float32): qkv and gate_up by R1, norm folded, O by R2 per head, down by R4."""
    torch.manual_seed(0)
    block = {
        name: torch.randn(t.shape, dtype=torch.float64) * 0.3 for name, t in decoder.empty_block(0).state_dict().items()
    }
    rotations = Rotations.of(decoder.shape, r1=True, r2=r2, r3=False, r4=r4, seed=3)
    assert rotations.r1 is not None
    hidden = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    before = site_inputs(decoder, decoder.block(0, block), hidden)
    rotated = decoder.block(0, rotations.rotate_block(block, LLAMA, 0))
    after = site_inputs(decoder, rotated, rotations.r1.apply(hidden), rotations)
    assert set(before) == set(after) == set(SITES)
    for site, norm in (("qkv", LLAMA.attention_norm), ("gate_up", LLAMA.mlp_norm)):
        plain = before[site] / block[f"{norm}.weight"]
        torch.testing.assert_close(after[site], rotations.r1.apply(plain), atol=1e-5, rtol=1e-5)
    values = rotations.values(0)
    heads = before["output"].unflatten(-1, (HEADS, SIZE))
    expected = heads if values is None else values.apply(heads)
    torch.testing.assert_close(after["output"].unflatten(-1, (HEADS, SIZE)), expected, atol=1e-5, rtol=1e-5)
    down = before["down"] if rotations.r4 is None else rotations.r4.apply(before["down"])
    torch.testing.assert_close(after["down"], down, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, fields in FAMILIES.items() for i in range(1 + (name == "lfm2"))]
)
def test_every_family_is_looked_at_as_it_runs(family_model: Callable[..., nn.Module], name: str, index: int) -> None:
    """Q and gate see the plain norm rotated, behind R1 online the whole norm; O's heads R2, down R4."""
    model: Any = family_model(name)
    decoder = Decoder(model.config, attention="eager", dtype=torch.float64)
    family, shape = decoder.family.at(index), decoder.shape.at(index)
    prefix = f"{family.layers}.{index}."
    state = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    if family.experts and not family.fused:  # by expert on disk
        fused, down = (state.pop(f"{family.experts}.{part}_proj") for part in ("gate_up", "down"))
        for i in range(shape.experts):
            parts = (fused[i, : shape.ffn], fused[i, shape.ffn :], down[i])
            state |= {f"{p}.weight": part for p, part in zip(family.expert(i), parts, strict=True)}
    tensors = split_tensors({k: v.double() for k, v in state.items()}, family, shape)
    rotations = Rotations.of(shape, r1=True, r2=True, r3=False, r4=True, seed=3, online_r1=family.post_norms)
    r1, r2, r4 = rotations.r1, rotations.values(index), rotations.r4
    assert r1 is not None and r2 is not None and r4 is not None
    hidden = torch.randn(2, 6, shape.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    before = site_inputs(decoder, decoder.block(index, tensors), hidden)
    rotated = decoder.block(index, rotations.rotate_block(tensors, family, index))
    after = site_inputs(decoder, rotated, rotations.rotate_stream(hidden, family), rotations)
    assert set(before) == set(after) == set(SITES[:2] if family.experts else SITES)
    for site, norm in (("qkv", family.attention_norm), ("gate_up", family.mlp_norm)):
        if site in before:
            assert before[site].shape == hidden.shape
            plain = before[site]
            if not rotations.online_r1:
                plain = (plain - tensors.get(f"{norm}.bias", 0)) / (tensors[f"{norm}.weight"] + family.norm_offset)
            torch.testing.assert_close(after[site], r1.apply(plain), atol=1e-5, rtol=1e-4)
    heads = [part["output"].unflatten(-1, (-1, shape.head_dim)) for part in (before, after)]
    torch.testing.assert_close(heads[1], r2.apply(heads[0]) if family.has_values else heads[0], atol=1e-5, rtol=1e-4)
    if "down" in before:
        torch.testing.assert_close(after["down"], r4.apply(before["down"]), atol=1e-5, rtol=1e-4)


def test_collected_figures(decoder: Decoder) -> None:
    found = Outliers(2)
    inputs = {site: torch.randn(3, 7, 20) for site in SITES[:3]}
    found.add(1, inputs)
    tensors = found.tensors("before")
    for column, site in enumerate(SITES[:3]):
        mean = float(kurtosis(inputs[site]).mean())
        assert float(tensors["before.kurtosis"][1, column]) == pytest.approx(mean, rel=1e-5)
        torch.testing.assert_close(
            tensors[f"before.picture.{site}.1"].float(), inputs[site][0].abs(), atol=0, rtol=1e-3
        )
        assert tensors[f"before.size.{site}"].tolist() == [7, 20]
    assert tensors["before.peak"][1, 3].isnan() and tensors["before.peak"][0].isnan().all()
