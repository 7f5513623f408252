"""Counts against brute force: loops over every multiplication, and the products that torch really runs."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from rotoboa.boa.block.block import quantize_block
from rotoboa.boa.block.context import BlockContext, Share, Streams, shared_copy
from rotoboa.boa.online.attention import NAME
from rotoboa.boa.online.transforms import OnlineTransforms
from rotoboa.boa.ranks import Ranks
from rotoboa.boa.solver.rounding import Settings
from rotoboa.boa.stopwatch import STAGES, Stopwatch
from rotoboa.models.decoder import Decoder
from rotoboa.models.shape import Shape
from rotoboa.pipeline.estimate import counting, counting_run, counting_solver
from rotoboa.pipeline.estimate.counting import Online, Sizes, Work
from rotoboa.pipeline.estimate.counting_run import Plan
from rotoboa.pipeline.estimate.counting_solver import Problem, problems
from rotoboa.rotation.hadamard import Hadamard

SMALL = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
LLAMA_8B = Sizes(Shape(32, 4096, 14336, 32, 8, 128, 128256))


def counter() -> FlopCounterMode:
    """It knows no product that is added in place."""

    def added(total: Any, a: tuple[int, ...], b: tuple[int, ...], **_: Any) -> int:
        return 2 * math.prod(a) * b[-1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added})


def small() -> tuple[Decoder, nn.Module]:
    decoder = Decoder(LlamaConfig(**SMALL), attention=NAME)
    torch.manual_seed(0)
    tensors = {
        name.removeprefix("model.layers.0."): torch.ones(size) if len(size) == 1 else torch.randn(size) * 0.05
        for name, size in decoder.shapes.items()
        if ".layers.0." in name
    }
    return decoder, decoder.block(0, tensors)


class Products(Stopwatch):
    """Counts operations of matrix products in place of seconds."""

    def __init__(self, mode: FlopCounterMode) -> None:
        super().__init__()
        self.mode, self.at = mode, 0

    def _mark(self, following: str | None) -> None:
        now = self.mode.get_total_flops()
        if self._stages:
            name = self._stages[-1][0]
            self._seconds[name] = self._seconds.get(name, 0) + now - self.at
        self.at = now


def real(settings: Settings, samples: int, length: int) -> tuple[Sizes, dict[str, float]]:
    """Products of a block that is quantized for real, by stage."""
    decoder, block = small()
    full = torch.randn(samples, length, 256)
    quantized = full + 0.01 * torch.randn(full.shape)
    with counter() as mode:
        watch = Products(mode)
        with watch:
            share = Share.of(Ranks(), samples, batch=2)
            context = BlockContext(
                decoder, block, shared_copy(block), settings, OnlineTransforms(), share, references=True
            )
            quantize_block(context, Streams(full, quantized))
    return Sizes.of(decoder), watch.seconds()


# -- against what torch runs ------------------------------------------------------------------------------------------


def test_a_plain_pass_is_counted_exactly() -> None:
    decoder, block = small()
    hidden = torch.randn(2, 48, 256)
    with counter() as mode:
        decoder.run(block, hidden)
    counted = counting.forward(Sizes.of(decoder), 2, 48)
    attention = 2 * 4 * 256 * sum(at + 1 for at in range(48))  # SDPA on the CPU is not in torch's count
    assert counted.products == mode.get_total_flops() + attention


@pytest.mark.parametrize("length", [64, 256])
def test_stages_are_counted_as_they_run(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotoboa.boa.solver.refine.is_compiled", lambda tensor: False)  # where sweeps are products
    settings = Settings(3, starts=3, refine=4)
    sizes, found = real(settings, 2, length)
    counted = counting_run.block(sizes, Plan(settings, 2, length, 2, Online(), references=True))
    assert found.keys() == counted.keys() - {"rotation"}
    attention = 2 * 2 * 4 * 256 * counting.pairs(length)
    exact = {name: round(counted[name].products) for name in found}
    assert found["forward"] == exact["forward"] - attention
    for name in ("head statistics", "factors", "grid search", "columns"):
        assert found[name] == exact[name], name
    # Half a symmetric product is run in blocks of columns: a little more than half. Of causal attention all is run
    # where one chunk of rows holds the sequence.
    assert exact["input statistics"] <= found["input statistics"] <= 1.1 * exact["input statistics"]
    assert exact["value statistics"] <= found["value statistics"] <= 2 * exact["value statistics"]
    solves = 4 * 15 * 4 * 256 * (6 + 2)  # n^2 c of a triangular solve, which torch does not count
    assert found["rows"] == exact["rows"] - solves
    # Rounds in which nothing moves are left out; W_O^T W_O and the pull-back of H_out are not counted. In torch's form
    # of a sweep the sums over tied rows, counted as elements, are products.
    assert 0.8 * exact["refinement"] <= found["refinement"] <= 1.1 * exact["refinement"]
    assert 0.8 * exact["search"] <= found["search"] <= 1.1 * exact["search"]
    assert 0.8 * exact["starts"] <= found["starts"] <= 1.1 * exact["starts"]
    assert exact["losses"] <= found["losses"] <= 1.1 * exact["losses"]
    assert found["references"] == pytest.approx(exact["references"], rel=0.01)


def test_fewer_levers_are_counted_less() -> None:
    settings = Settings(3, starts=1, tabu=0, refine=0, method="gptq", alpha=0.0, group_size=32)
    sizes, found = real(settings, 2, 32)
    counted = counting_run.block(sizes, Plan(settings, 2, 32, 2, Online(), references=True))
    for name in ("refinement", "starts", "search"):
        assert found.get(name, 0) == counted[name].products == 0
    assert found["columns"] == counted["columns"].products
    assert found["factors"] == counted["factors"].products > 0 < counted["factors"].wide


# -- against loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 20)])
def test_pairs(length: int, window: int | None) -> None:
    seen = [(at, k) for at in range(length) for k in range(at + 1) if window is None or at - k < window]
    assert counting.pairs(length, window) == len(seen)


@pytest.mark.parametrize(("length", "window"), [(6, None), (6, 2)])
def test_values(length: int, window: int | None) -> None:
    """One multiplication and one addition for each pair of indices that a sum goes over."""
    s = Shape(1, 5, 4, 4, 2, 3, 8)
    keys = [[k for k in range(at + 1) if window is None or at - k < window] for at in range(length)]
    seen = sum(map(len, keys))
    grams = sum(1 for row in keys for i, j in itertools.product(row, row) if i >= j)
    grouped = 2 * 4 * grams + 2 * 2 * (length * length * 5 + length * 5 * 5)
    by_head = 2 * 4 * seen * 5 + 2 * 4 * sum(1 for _ in range(length) for i in range(5) for j in range(i + 1))
    grouped += 4 * 4 * 3 * seen + 2 * 2 * 2 * 3 * length * 5
    by_head += 2 * 2 * 4 * 3 * length * 5
    counted = counting.value_statistics(s, 3, length, window)
    fewer = counting.value_statistics(s, 3, length, window, stride=3)
    assert fewer.elements == counted.elements / 3 and counted.products / 3 <= fewer.products < counted.products
    assert counted.products == 3 * (2 * 4 * 3 * seen + min(grouped, by_head))
    assert counted.elements == 3 * counting.SOFTMAX * 4 * seen


@pytest.mark.parametrize("columns", [1, 5, 8, 12, 29])
@pytest.mark.parametrize("width", [1, 4, 8])
def test_lazy_blocks(columns: int, width: int) -> None:
    after = sum(1 for i in range(columns) for j in range(columns) if j // width > i // width)
    assert counting_solver.lazy(columns, width) == after


@pytest.mark.parametrize("size", [2, 12, 64, 128, 688, 4096, 14336])
def test_the_fast_transform(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    with counter() as mode:
        Hadamard.of(size).apply(x)
    assert counting.hadamard(3, size, wide=True).wide == mode.get_total_flops()


def test_gram() -> None:
    products = sum(1 for _ in range(11) for i in range(6) for j in range(i + 1))
    assert counting.gram(11, 6).products == 2 * products


# -- models -----------------------------------------------------------------------------------------------------------


def test_weights_of_a_large_model() -> None:
    assert LLAMA_8B.block_weights * 32 == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096  # the published parameters
    passes = counting.plain(LLAMA_8B, 128, 2048).products
    assert passes == 128 * 2048 * 2 * LLAMA_8B.block_weights * 32 + 32 * 128 * 4 * 4096 * counting.pairs(2048)


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"])
def test_every_family(name: str, family_model: Callable[..., nn.Module]) -> None:
    model: Any = family_model(name)
    decoder = Decoder(copy.deepcopy(model.config), attention=NAME)  # it sets the attention of the config
    sizes = Sizes.of(decoder)
    linears = {n.removesuffix(".weight"): s for n, s in decoder.shapes.items() if len(s) == 2 and ".layers.0." in n}
    projections = [size for n, size in linears.items() if n.endswith(decoder.family.projections)]
    if not decoder.family.merged:
        assert sizes.block_weights == sum(map(math.prod, projections))
    assert sum(p.all_rows * p.columns * p.count for p in problems(sizes)) == sizes.block_weights
    run = Plan(Settings(4), 4, 16, 2, Online(True, True, True, True, True, True), references=True, windows=2)
    found = counting_run.block(sizes, run, decoder.window(0))
    assert found.keys() == STAGES.keys()
    assert all(work.operations > 0 and work.bytes > 0 for work in found.values())
    layer = model.get_submodule(decoder.family.layers)[0]
    with counter() as mode, torch.no_grad():
        layer(torch.randn(2, 16, 32), **(decoder.arguments(layer, 16) | {"attention_mask": None}))
    more = 2 * 4 * sizes.shape.query_width * (16 * 16 - counting.pairs(16))  # eager attention computes all pairs
    assert counting.forward(sizes, 2, 16).products == mode.get_total_flops() - more


def test_experts_share_the_tokens() -> None:
    dense, sparse = Sizes(Shape(1, 64, 96, 4, 2, 16, 100)), Sizes(Shape(1, 64, 96, 4, 2, 16, 100, 8), routed=2)
    one, two = (counting.parts_of_block(sizes, 4, 256) for sizes in (dense, sparse))
    assert two["down"].products == 2 * one["down"].products
    assert sparse.block_weights - dense.block_weights == 7 * 3 * 64 * 96
    # 256 tokens each are more than 64 channels: no expert falls back on a pool.
    grams = counting.input_statistics(sparse, 4, 256, 4).products, counting.input_statistics(dense, 4, 256, 4).products
    assert grams[0] < 2 * grams[1]


def test_kinds_add_up() -> None:
    work = 2 * Work(1, 2, 3, 4) + Work(1)
    assert work == Work(3, 4, 6, 8) and work.operations == 13
    tied = Problem("", 3, 8, 16, tied=True)
    settings = Settings(4, rows=3)
    free = counting_solver.rows(replace(tied, tied=False), settings)
    assert free.products == 0 < counting_solver.rows(tied, settings).products
