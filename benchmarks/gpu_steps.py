"""The steps of `gpu.py`: each measures one thing and returns its figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from gpu_bench import BLOCKS, Bench, fastest, now, peak
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rotoboa.boa.block import block as block_module
from rotoboa.boa.kernels import dispatch as kernels
from rotoboa.boa.kernels.compiled import COLUMNS
from rotoboa.boa.precision import quick_products
from rotoboa.boa.solver.tabu import WIDTH
from rotoboa.boa.stopwatch import STAGES
from rotoboa.pipeline.estimate.counting import whole
from rotoboa.pipeline.estimate.workload import Plan, Sizes
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

MOVES = 256  # of a tabu search that is timed
PLAIN_ROUNDING = {"weights.refine": 0, "weights.starts": 1, "weights.tabu": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "w2a16": ("w2a16", {}),
    "w2a16 without refinement": ("w2a16", PLAIN_ROUNDING),
    "w4a4kv4": ("w4a4kv4", {}),
}
"""A recipe, and changes to it."""
RUNS = 2  # blocks of a case: in the first one kernels are compiled and libraries loaded
SLOWEST = 25  # kernels that a profile names

Step = Callable[[Bench], Any]


def steps() -> list[tuple[str, Step]]:
    """All of them by name, those first that tell most: what time or a fault cuts off is the end."""

    def run(name: str) -> Step:
        return lambda bench: case(bench, name)

    first, second, *others = CASES
    return [
        ("triton", agreement),
        *((f"kernels/{name}", made) for name, made in KERNELS.items()),
        (f"cases/{first}", run(first)),
        (f"cases/{second}", run(second)),
        ("plain", plain),
        ("products", products),
        ("choices", choices),
        *((f"cases/{name}", run(name)) for name in others),
        ("precision", precision),
        ("profile/solver", lambda bench: profiled(bench, {}, bench.batch)),
        ("profile/streams", lambda bench: profiled(bench, PLAIN_ROUNDING, 2 * bench.batch)),
    ]


# -- kernels ----------------------------------------------------------------------------------------------------------


def _triton() -> Any:
    """Triton's kernels whether or not the quantizer takes them, or None where they have been ruled out."""
    if os.environ.get("ROTOBOA_TRITON") == "0":
        return None
    from rotoboa.boa.kernels import triton_kernels

    return triton_kernels


def agreement(bench: Bench) -> dict[str, Any] | None:
    """Whether the quantizer takes Triton's kernels, asked as it does, but so that the reason why not is seen."""
    if bench.device.type != "cuda" or (triton := _triton()) is None:
        return None
    start = now(bench.device)
    agrees = kernels._agrees(triton, bench.device)
    return {"agrees": agrees, "seconds": now(bench.device) - start}


def _gram(bench: Bench, batch: int, size: int) -> Tensor:
    x = bench.random(batch, 2 * size, size)
    return x.transpose(1, 2) @ x / (2 * size) + 0.1 * torch.eye(size, device=bench.device)


def _width(bench: Bench) -> int:
    return min(COLUMNS, bench.decoder.shape.hidden)


def _columns(bench: Bench, rows: int) -> dict[str, Any]:
    width = _width(bench)
    block = bench.random(1, rows, width)
    upper = torch.linalg.cholesky(_gram(bench, 1, width)).transpose(1, 2).contiguous()
    given = (block, upper, torch.full_like(block, 0.7), torch.full_like(block, 2.0), 3)
    triton = _triton() if block.is_cuda else None
    form = "Triton" if triton else "compiled" if kernels.is_compiled(block) else "torch"
    compiled = triton.round_block if triton else kernels.round_block
    return _compare(bench, form, compiled, kernels._round_in_torch, given)


def _descent(bench: Bench, heads: int, rows: int, *, tied: bool) -> dict[str, Any]:
    width = _width(bench)
    h_in, h_out = _gram(bench, 1, width), _gram(bench, heads, rows) if tied else None
    inner = bench.random(heads, rows, width) @ h_in * 0.5
    q, scale = torch.full_like(inner, 2.0), torch.full_like(inner, 0.7)
    curvature = h_in.diagonal(dim1=1, dim2=2)[:, None]
    if h_out is not None:
        curvature = curvature * h_out.diagonal(dim1=1, dim2=2)[..., None]
    given = (inner, q, scale, -1 / (scale * curvature), h_in, h_out, 3)
    triton = _triton() if inner.is_cuda else None
    compiled = triton.descend_block if triton else kernels._descend_in_torch
    return _compare(bench, "Triton" if triton else "torch", compiled, kernels._descend_in_torch, given)


def _search(bench: Bench) -> dict[str, Any]:
    """`MOVES` moves of as many rows as fill the device, of whole numbers: sums in another order are the same."""
    width = min(WIDTH, bench.decoder.shape.hidden)
    rows = (
        4 * torch.cuda.get_device_properties(bench.device).multi_processor_count if bench.device.type == "cuda" else 4
    )
    x = bench.random(1, 32, width).round()
    h_in = x.transpose(1, 2) @ x + torch.eye(width, device=bench.device)
    gradient = (4 * bench.random(1, rows, width)).round()
    given = (gradient, torch.full_like(gradient, 2.0), torch.ones_like(gradient), h_in, 3, MOVES)
    triton = _triton() if gradient.is_cuda else None

    def found(*arguments: Any) -> tuple[Tensor, Tensor]:
        q = triton.search_block(*arguments, kernels.REST) if triton else kernels.search_block(*arguments)
        return q, q

    def in_torch(*arguments: Any) -> tuple[Tensor, Tensor]:
        q = kernels._search_in_torch(*arguments)
        return q, q

    form = "Triton" if triton else "compiled" if kernels.is_compiled(gradient) else "torch"
    return _compare(bench, form, found, in_torch, given)


KERNELS: dict[str, Step] = {
    "columns, few rows": lambda b: _columns(b, 4 * (b.decoder.shape.query_heads + b.decoder.shape.key_heads)),
    "columns, many rows": lambda b: _columns(b, 2 * b.decoder.shape.ffn),
    "descent": lambda b: _descent(b, 1, 2 * b.decoder.shape.ffn, tied=False),
    "descent, rows tied by H_out": lambda b: _descent(
        b, b.decoder.shape.query_heads + b.decoder.shape.key_heads, b.decoder.shape.head_dim, tied=True
    ),
    "tabu search": _search,
}


def _compare(
    bench: Bench, form: str, compiled: Callable[..., Any], in_torch: Callable[..., Any], given: tuple[Any, ...]
) -> dict[str, Any]:
    (integers, values), (expected, expected_values) = compiled(*given), in_torch(*given)
    return {
        "shape": list(given[0].shape),
        "form": form,
        "equal integers": float((integers == expected).float().mean()),
        "equal to the last bit": bool(torch.equal(integers, expected) and torch.equal(values, expected_values)),
        "largest difference": float((values - expected_values).abs().max()),
        "seconds": fastest(lambda: compiled(*given), bench.device),
        "seconds in torch": fastest(lambda: in_torch(*given), bench.device, 1),
    }


# -- blocks -----------------------------------------------------------------------------------------------------------


def case(bench: Bench, name: str) -> None:
    """Blocks of one case; the last one's figures, extrapolated, are kept after each of them."""
    preset, changes = CASES[name]
    recipe = build_recipe(load_recipe(preset), {"calibration.samples": bench.samples, **changes})
    sizes = Sizes.of(bench.decoder)
    work = {
        name: (found.products + found.wide) / sizes.shape.blocks
        for name, found in whole(sizes, Plan.of(recipe, bench.length, None)).items()
    }
    blocks: list[dict[str, Any]] = []
    while len(blocks) < RUNS and (not blocks or bench.elapsed < bench.limit):
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(bench.device)
        last = bench.quantize(recipe, len(blocks), bench.samples)
        blocks.append(last)
        each = last["seconds"] + last["rotation"]
        stages = {"rotation": last["rotation"], **last["stages"]}
        stages = {stage: stages[stage] for stage in STAGES if stages.get(stage, 0.0) > 0}
        found = {
            "blocks": blocks,
            "seconds a block": each,
            f"seconds of {BLOCKS} blocks": BLOCKS * each,
            "stages": stages,
            "teraflops": {stage: work[stage] / seconds / 1e12 for stage, seconds in stages.items() if work.get(stage)},
            "peak_memory_bytes": peak(bench.device),
        }
        bench.keep(f"cases/{name}", found)


def precision(bench: Bench) -> dict[str, Any]:
    """Losses by projection with statistics and forward passes in TF32, and in IEEE float32."""
    recipe = build_recipe(load_recipe("w2a16"), PLAIN_ROUNDING)
    samples = max(bench.batch, bench.samples // 4)
    quick = bench.quantize(recipe, 0, samples)["losses"]
    with mock.patch.object(block_module, "quick_products", lambda device: nullcontext()):
        exact = bench.quantize(recipe, 0, samples)["losses"]
    return {name: {"tf32": quick[name], "float32": exact[name]} for name in quick}


def profiled(bench: Bench, changes: dict[str, Any], samples: int) -> list[dict[str, Any]]:
    """Where the time of a block of w2a16 on few sequences goes, by kernel of the device."""
    # A profile of many small steps takes longer to put together than they take.
    few = {"weights.starts": 1, "weights.tabu": 0, "weights.refine": 1} if bench.small else {}
    recipe = build_recipe(load_recipe("w2a16"), few | changes)
    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        bench.quantize(recipe, 0, samples)
        now(bench.device)
    kind = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = sorted(recorded.key_averages(), key=lambda event: getattr(event, kind), reverse=True)
    return [{"name": e.key[:120], "calls": e.count, "seconds": getattr(e, kind) / 1e6} for e in found[:SLOWEST]]


# -- what they are compared with --------------------------------------------------------------------------------------


def plain(bench: Bench) -> dict[str, float]:
    """One plain forward pass of all tokens through a block."""
    hidden, _ = bench.streams(bench.buffers(), bench.samples)
    block = bench.decoder.block(0, bench.tensors(0))

    def run() -> None:
        for part in hidden.split(bench.batch):
            part.copy_(bench.decoder.run(block, part.to(bench.device)))

    with torch.no_grad(), quick_products(bench.device):
        bench.decoder.run(block, hidden[: bench.batch].to(bench.device))
        seconds = fastest(run, bench.device, 1)
    return {"seconds a block": seconds, f"seconds of {BLOCKS} blocks": BLOCKS * seconds}


def products(bench: Bench) -> dict[str, float]:
    """TFLOP/s of square products by precision."""
    size = 256 if bench.small else 8192
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)):
        a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        found[name] = 2 * size**3 / fastest(lambda a=a, b=b: a @ b, bench.device) / 1e12  # type: ignore[misc]
        if dtype == torch.float32:
            with quick_products(bench.device):
                found["tf32"] = 2 * size**3 / fastest(lambda a=a, b=b: a @ b, bench.device) / 1e12  # type: ignore[misc]
    return found


def choices(bench: Bench) -> dict[str, float]:
    """Seconds of two ways to the same result, where the quantizer takes the one named first."""
    return {**_attentions(bench), **_factorizations(bench)}


def _attentions(bench: Bench) -> dict[str, float]:
    s = bench.decoder.shape
    query = bench.random(bench.batch, s.query_heads, bench.length, s.head_dim)
    key = bench.random(bench.batch, s.key_heads, bench.length, s.head_dim)
    attend = torch.nn.functional.scaled_dot_product_attention

    def repeated() -> Tensor:
        more = key.repeat_interleave(s.query_heads // s.key_heads, 1)
        return attend(query, more, more, is_causal=True)

    def grouped() -> Tensor:
        return attend(query, key, key, is_causal=True, enable_gqa=True)

    ways = {"attention, keys repeated": repeated, "attention, keys in groups": grouped}
    with torch.no_grad(), quick_products(bench.device):
        return {name: fastest(way, bench.device) for name, way in ways.items()}


def _factorizations(bench: Bench) -> dict[str, float]:
    h = _gram(bench, bench.decoder.shape.key_heads, bench.decoder.shape.hidden).double()
    ways: dict[str, Step] = {
        "Cholesky of all heads": lambda _: torch.linalg.cholesky_ex(h),
        "Cholesky of one head after another": lambda _: [torch.linalg.cholesky_ex(part) for part in h],
    }
    return {name: fastest(lambda way=way: way(bench), bench.device) for name, way in ways.items()}  # type: ignore[misc]
