"""Counts against the products that torch runs, and against loops over every multiplication."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from rotoboa.boa.block.block import quantize_block
from rotoboa.boa.block.context import BlockContext, Share, Streams, shared_copy
from rotoboa.boa.kernels.dispatch import descend_rows
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import NAME
from rotoboa.boa.online.directions import LeadingDirections
from rotoboa.boa.online.transforms import InputTransform, OnlineTransforms
from rotoboa.boa.ranks import Ranks
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.boa.stopwatch import STAGES, Stopwatch
from rotoboa.export.finished import numbers_in_blocks
from rotoboa.models.decoder import Decoder
from rotoboa.models.shape import Shape
from rotoboa.pipeline.estimate import counting
from rotoboa.pipeline.estimate.counting import ROUNDING
from rotoboa.pipeline.estimate.workload import Plan, Sizes, problems

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


def real(
    settings: Settings, samples: int, length: int, transforms: OnlineTransforms | None = None
) -> tuple[Sizes, dict[str, float]]:
    """Products of a block that is quantized for real, by stage."""
    decoder, block = small()
    full = torch.randn(samples, length, 256)
    quantized = full + 0.01 * torch.randn(full.shape)
    with counter() as mode:
        watch = Products(mode)
        with watch:
            share = Share.of(Ranks(), samples, batch=2)
            context = BlockContext(
                decoder, block, shared_copy(block), settings, transforms or OnlineTransforms(), share, references=True
            )
            quantize_block(context, Streams(full, quantized))
    found = watch.seconds()
    return Sizes.of(decoder), {**found, "rounding": sum(found.get(name, 0) for name in ROUNDING)}


def descend_block(
    inner: Tensor, integers: Tensor, scale: Tensor, h_in: Tensor, h_out: Tensor | None, levels: int
) -> tuple[Tensor, Tensor]:
    """The steps of `kernels.descend_block` in a block of columns, compiled: they are not counted, and torch is slow."""
    found = integers.clone()
    descend_rows(inner.clone(), found, scale, h_in.contiguous(), h_out, levels)
    return found, (found - integers) * scale


# -- against what torch runs ------------------------------------------------------------------------------------------


def test_a_plain_pass_is_counted_exactly() -> None:
    decoder, block = small()
    with counter() as mode:
        decoder.run(block, torch.randn(2, 48, 256))
    attention = 2 * 4 * 256 * sum(at + 1 for at in range(48))  # SDPA on the CPU is not in torch's count
    assert 2 * 48 * counting.token(Sizes.of(decoder), 48) == mode.get_total_flops() + attention


@pytest.mark.parametrize("length", [64, 256])
def test_stages_are_counted_as_they_run(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotoboa.boa.solver.refine.is_compiled", lambda tensor: False)  # where sweeps are products
    monkeypatch.setattr("rotoboa.boa.solver.refine.descend_block", descend_block)
    settings = Settings(bits=3, starts=2, refine=2)
    sizes, found = real(settings, 2, length)
    run = Plan(settings, 2, length, 2, references=True)
    counted = {name: work.products for name, work in counting.whole(sizes, run).items()}
    assert STAGES.keys() - {*ROUNDING, "rotation"} <= counted.keys()
    attention = 2 * 2 * length * 4 * 256 * counting.keys(sizes, length)
    assert found["forward"] == pytest.approx(counted["forward"] - attention, rel=0.25)  # queries and keys once more
    assert found["head statistics"] == counted["head statistics"]
    # Half a symmetric product is run in blocks of columns: a little more than half. Of causal attention all is run
    # where one chunk of rows holds the sequence.
    assert counted["input statistics"] <= found["input statistics"] <= 1.1 * counted["input statistics"]
    assert 0.5 * counted["value statistics"] <= found["value statistics"] <= 2 * counted["value statistics"]
    # Of columns only those after a block are products, and what is left of a sweep is in cache.
    assert 0.5 * counted["rounding"] <= found["rounding"] <= 1.5 * counted["rounding"]


def test_looking_for_directions_is_counted() -> None:
    """Without what they cost as the block runs; a Gram of 256 columns is run in blocks, a quarter more than half."""
    settings, length = Settings(bits=3, starts=1, refine=0), 64
    few = InputTransform(quantizer=LeadingDirections.of(DynamicQuantizer(4), 256, 4))
    sizes, plain = real(settings, 2, length)
    _, found = real(settings, 2, length, OnlineTransforms(qkv=few, output=few, gate_up=few))
    none, some = (counting.whole(sizes, Plan(settings, 2, length, 2, directions=on)) for on in (False, True))
    statistics = some["input statistics"].products - none["input statistics"].products
    assert statistics <= found["input statistics"] - plain["input statistics"] <= 1.26 * statistics
    forward = some["forward"].products - none["forward"].products
    assert forward == pytest.approx(found["forward"] - plain["forward"], rel=0.15)


# -- against loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 20)])
def test_keys_that_are_seen(length: int, window: int | None) -> None:
    seen = [(at, k) for at in range(length) for k in range(at + 1) if window is None or at - k < window]
    sizes = Sizes(Shape(2, 8, 8, 2, 1, 4, 8), windows=(window, None))
    both = len(seen) + length * (length + 1) / 2
    assert counting.keys(sizes, length) == pytest.approx(both / 2 / length)


def test_factors() -> None:
    """A Cholesky factor, an inverse of it, and two triangular solves, one multiplication and one addition each."""
    value = next(p for p in problems(Sizes(Shape(1, 12, 8, 4, 2, 3, 8))) if p.name == "value")
    cholesky = sum(1 for i in range(12) for j in range(i + 1) for _ in range(j)) * 2
    shifted, plain = (counting.factors(value, Plan(Settings(bits=2, alpha=alpha), 1, 1, 1)) for alpha in (1.0, 0.0))
    assert plain == pytest.approx(4 * 2 * cholesky, rel=0.2)  # of 2 heads, up to terms in c^2
    assert shifted - plain == 2 * 6 * 12 * 12


# -- models -----------------------------------------------------------------------------------------------------------


def test_weights_of_a_large_model() -> None:
    assert LLAMA_8B.block_weights * 32 == 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096  # the published parameters
    assert counting.token(LLAMA_8B, 2048) == 2 * LLAMA_8B.block_weights * 32 + 32 * 4 * 4096 * 2049 / 2


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "phi3", "opt", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "qwen2_moe", "llama4_text", "lfm2"),
        *("granitemoehybrid-experts", "qwen3_next", "deepseek_v3", "deepseek_v2-lite"),
    ],
)
def test_every_family(name: str, family_model: Callable[..., nn.Module]) -> None:
    model: Any = family_model(name)
    decoder = Decoder(copy.deepcopy(model.config), attention=NAME)  # it sets the attention of the config
    sizes = Sizes.of(decoder)
    linears = {n.removesuffix(".weight"): s for n, s in decoder.shapes.items() if len(s) == 2 and ".layers.0." in n}
    projections = [size for n, size in linears.items() if n.endswith(decoder.family.projections)]
    if not decoder.family.merged and not decoder.family.blocks:
        assert sizes.block_weights == sum(map(math.prod, projections))
    by_problems = [sum(p.all_rows * p.columns * p.count for p in problems(kind)) for kind in sizes.kinds()]
    assert max(by_problems) == sizes.block_weights
    counts = [kind.shape.blocks for kind in sizes.kinds()]
    assert sum(map(math.prod, zip(counts, by_problems, strict=True))) == numbers_in_blocks(decoder.family, sizes.shape)
    found = counting.whole(sizes, Plan(Settings(bits=4), 4, 16, 2, 6, 6, references=True, windows=2))
    assert all(work.operations > 0 or work.bytes > 0 for work in found.values())


def test_experts_share_the_tokens() -> None:
    dense, sparse = Sizes(Shape(1, 64, 96, 4, 2, 16, 100)), Sizes(Shape(1, 64, 96, 4, 2, 16, 100, 8), routed=2)
    one, two = (counting.token(sizes, 256) for sizes in (dense, sparse))
    assert two - one == 2 * 3 * 64 * 96
    assert sparse.block_weights - dense.block_weights == 7 * 3 * 64 * 96
    # 256 tokens each are more than 64 channels: no expert falls back on a pool.
    grams = counting.input_statistics(sparse, 1024), counting.input_statistics(dense, 1024)
    assert grams[0] < 2 * grams[1]
