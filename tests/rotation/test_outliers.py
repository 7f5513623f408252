"""Outlier figures against their formulas, and the inputs of real blocks before and after rotation."""

import math

import pytest
import torch
from transformers import LlamaConfig

from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES
from rotoboa.rotation.outliers import (
    GRID,
    PICTURES,
    SITES,
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
