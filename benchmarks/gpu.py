"""Seconds of the quantizer on a GPU for blocks of the shape of Llama-3-8B: random weights, 128 x 2048 tokens.

    python benchmarks/gpu.py                      on the GPU, under nine minutes: gpu.json and gpu.md beside this file
    python benchmarks/gpu.py --device cpu --small --output FOLDER       the same steps in seconds, to see that they work

Nothing is downloaded. Results are written after each step, so what a time limit cuts off loses only what comes after.

| step | what it measures |
|---|---|
| products | TFLOP/s of plain matrix products, by precision: what the stages are compared with |
| kernels | the compiled columns of a block against torch operations: whether integers are equal, and the time of both |
| plain | one plain forward pass through a block |
| blocks | the quantizer on two blocks by stage and projection, all levers on, without refinement, and in W4A4KV4 |
| precision | losses of all projections with statistics in TF32 and in IEEE float32, on some of the sequences |
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor
from transformers import LlamaConfig

from rotoboa.boa import block as block_module
from rotoboa.boa import kernels
from rotoboa.boa.attention import NAME
from rotoboa.boa.block import BlockQuantizer
from rotoboa.boa.precision import quick_products
from rotoboa.boa.stopwatch import Stopwatch
from rotoboa.export.native import pack_block
from rotoboa.export.spec import Spec
from rotoboa.models.decoder import Decoder
from rotoboa.pipeline.buffers import Buffers
from rotoboa.pipeline.counting import Sizes
from rotoboa.pipeline.counting_run import Plan
from rotoboa.pipeline.counting_run import block as counted
from rotoboa.pipeline.job import settings_of
from rotoboa.pipeline.progress import peak_resident
from rotoboa.pipeline.recipe import Recipe
from rotoboa.pipeline.recipe_files import build_recipe, load_recipe
from rotoboa.rotation.rotate import Rotations

HERE = Path(__file__).resolve().parent
BLOCKS = 32  # that seconds are extrapolated to
LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLAIN_ROUNDING = {"weights.refine": 0, "weights.starts": 1}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "w2a16": ("w2a16", {}, 2),
    "w2a16 without refinement": ("w2a16", PLAIN_ROUNDING, 2),
    "w4a4kv4": ("w4a4kv4", {}, 1),
}
"""A recipe, changes to it, and the blocks that are run."""


class Timed(BlockQuantizer):
    """Also adds up the seconds of the solver by projection, in `solved`."""

    solved: dict[str, float]

    def _solve(self, *problems: Any) -> None:
        if len(problems) > 1:
            super()._solve(*problems)
            return
        start = now(self.decoder.device)
        super()._solve(*problems)
        name = ", ".join(name.rpartition(".")[2] for name in problems[0].names)
        self.solved[name] = self.solved.get(name, 0.0) + now(self.decoder.device) - start


class Bench:
    """What the steps share.

    Args:
        device: where blocks compute.
        small: a tiny shape, to see that everything works.
        output: the folder of gpu.json and gpu.md.
        limit: seconds after which no further step is begun.
    """

    def __init__(self, device: torch.device, small: bool, output: Path, limit: float) -> None:
        self.device, self.small, self.output, self.limit = device, small, output, limit
        self.samples, self.length, self.batch = (6, 32, 2) if small else (128, 2048, 8)
        config = LlamaConfig(
            **(SMALL if small else LARGE), vocab_size=64, num_hidden_layers=2, max_position_embeddings=self.length
        )
        self.decoder = Decoder(config, attention=NAME, device=device)
        self.started = time.perf_counter()
        self.figures: dict[str, Any] = {"machine": machine(device), "shape": config_of(self), "skipped": []}

    def step(self, name: str, run: Callable[[], Any]) -> None:
        """Run one step and write what is known so far; a step that fails is told, and the others go on."""
        spent = time.perf_counter() - self.started
        if spent > self.limit:
            self.figures["skipped"].append(f"{name}: {spent:.0f} s had passed")
            return
        print(f"{spent:5.0f} s  {name} ...", file=sys.stderr, flush=True)
        try:
            place, *rest = name.split("/", 1)
            found = run()
            if rest:
                self.figures.setdefault(place, {})[rest[0]] = found
            else:
                self.figures[place] = found
        except (RuntimeError, ValueError) as error:
            self.figures["skipped"].append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            print(f"         {self.figures['skipped'][-1]}", file=sys.stderr, flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.figures["elapsed"] = time.perf_counter() - self.started
        self.write()

    def write(self) -> None:
        """gpu.json and gpu.md."""
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "gpu.json").write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        (self.output / "gpu.md").write_text(markdown(self.figures), encoding="utf-8")

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The weights of a block as a checkpoint has them: random, in bfloat16."""
        generator = torch.Generator(device=self.device).manual_seed(index)

        def tensor(name: str, shape: torch.Size) -> Tensor:
            if "norm" in name:
                return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
            noise = torch.randn(shape, generator=generator, device=self.device)
            return (noise / shape[-1] ** 0.5).bfloat16()

        return {name: tensor(name, t.shape) for name, t in self.decoder.empty_block(index).state_dict().items()}

    def streams(self, buffers: Buffers, samples: int) -> tuple[Tensor, Tensor]:
        """Hidden states with a direction that all tokens share, so that no Hessian is a multiple of I."""
        hidden = self.decoder.shape.hidden
        full, quantized = (buffers.empty(samples, self.length, hidden) for _ in range(2))
        generator = torch.Generator(device=self.device).manual_seed(7)
        common = torch.randn(hidden, generator=generator, device=self.device)
        for part, other in zip(full.split(self.batch), quantized.split(self.batch), strict=True):
            noise = torch.randn(part.shape, generator=generator, device=self.device)
            part.copy_(noise.mul_(torch.linspace(0.5, 2, hidden, device=self.device)).add_(common, alpha=0.5))
            other.copy_(part)
        return full, quantized

    # -- steps ----------------------------------------------------------------------------------------------------

    def products(self) -> dict[str, float]:
        """TFLOP/s of square products by precision."""
        size = 256 if self.small else 8192
        found = {}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)):
            a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
            found[name] = 2 * size**3 / fastest(lambda a=a, b=b: a @ b, self.device) / 1e12  # type: ignore[misc]
            if dtype == torch.float32:
                with quick_products(self.device):
                    found["tf32"] = 2 * size**3 / fastest(lambda a=a, b=b: a @ b, self.device) / 1e12  # type: ignore[misc]
        return found

    def kernels(self) -> list[dict[str, Any]]:
        """The columns of a block, compiled and in torch operations."""
        s, width = self.decoder.shape, min(128, self.decoder.shape.hidden)
        heads = s.query_heads + s.key_heads
        rows = {"columns, few rows": 4 * heads, "columns, many rows": 2 * s.ffn}
        found = [self._compare(name, self._round_case(count, width)) for name, count in rows.items()]
        for name, shape, tied in (
            ("descent", (1, 2 * s.ffn), False),
            ("descent, rows tied by H_out", (heads, s.head_dim), True),
        ):
            found.append(self._compare(name, self._descend_case(shape[0], shape[1], width, tied)))
        return found

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator(device=self.device).manual_seed(3), device=self.device)

    def _gram(self, batch: int, size: int) -> Tensor:
        x = self._random(batch, 2 * size, size)
        return x.transpose(1, 2) @ x / (2 * size) + 0.1 * torch.eye(size, device=self.device)

    def _round_case(self, rows: int, width: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
        block = self._random(1, rows, width)
        upper = torch.linalg.cholesky(self._gram(1, width)).transpose(1, 2).contiguous()
        scale, zero = torch.full_like(block, 0.7), torch.full_like(block, 2.0)
        return kernels.round_block, kernels._round_in_torch, (block, upper, scale, zero, 3)

    def _descend_case(
        self, heads: int, rows: int, width: int, tied: bool
    ) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
        h_in, h_out = self._gram(1, width), self._gram(heads, rows) if tied else None
        inner = self._random(heads, rows, width) @ h_in * 0.5
        q, scale = torch.full_like(inner, 2.0), torch.full_like(inner, 0.7)

        def in_torch(inner: Tensor, q: Tensor, scale: Tensor, h_in: Tensor, h_out: Tensor | None, top: int) -> Any:
            curvature = h_in.diagonal(dim1=1, dim2=2)[:, None]
            if h_out is not None:
                curvature = curvature * h_out.diagonal(dim1=1, dim2=2)[..., None]
            return kernels._descend_in_torch(inner, q, scale, -1 / (scale * curvature), h_in, h_out, top)

        return kernels.descend_block, in_torch, (inner, q, scale, h_in, h_out, 3)

    def _compare(self, name: str, case: tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]) -> Any:
        compiled, in_torch, given = case
        (integers, values), (expected, expected_values) = compiled(*given), in_torch(*given)
        own = compiled is kernels.round_block and kernels.is_compiled(given[0])
        return {
            "name": name,
            "shape": list(given[0].shape),
            "form": "Triton" if kernels._triton_for(given[0]) else "compiled" if own else "torch",
            "equal integers": float((integers == expected).float().mean()),
            "equal to the last bit": bool(torch.equal(integers, expected) and torch.equal(values, expected_values)),
            "seconds": fastest(lambda: compiled(*given), self.device),
            "seconds in torch": fastest(lambda: in_torch(*given), self.device, 1),
        }

    def plain(self) -> dict[str, float]:
        """One plain forward pass of all tokens through a block."""
        buffers = Buffers(self.output / "buffers", None, self.device)
        hidden, _ = self.streams(buffers, self.samples)
        block = self.decoder.block(0, self.tensors(0))

        def run() -> None:
            for part in hidden.split(self.batch):
                part.copy_(self.decoder.run(block, part.to(self.device)))

        with torch.no_grad(), quick_products(self.device):
            self.decoder.run(block, hidden[: self.batch].to(self.device))
            seconds = fastest(run, self.device, 1)
        return {"seconds a block": seconds, f"seconds of {BLOCKS} blocks": BLOCKS * seconds}

    def quantizer(self, recipe: Recipe, index: int, samples: int) -> tuple[Timed, dict[str, Any]]:
        """One block, and what it took."""
        rotation, decoder = recipe.rotation, self.decoder
        start, watch = now(self.device), Stopwatch(self.device)
        rotations = Rotations.of(
            decoder.shape, r1=rotation.r1, r2=rotation.r2, r3=rotation.r3, r4=rotation.r4, seed=rotation.seed
        )
        rotated = rotations.rotate_block(self.tensors(index), decoder.family, index)
        block = decoder.block(index, rotated)
        projections = {f"{name}.weight" for name in decoder.family.projections}
        others = {name: tensor for name, tensor in rotated.items() if name not in projections}
        del rotated
        rotated_after = now(self.device)
        buffers = Buffers(self.output / "buffers", None, self.device)
        full, quantized = self.streams(buffers, samples)
        began = now(self.device)
        solver = Timed(
            decoder, block, settings_of(recipe), spec_of(recipe).transforms(decoder.shape),
            batch=self.batch, search_inputs=recipe.activations.search, search_cache=recipe.cache.search,
            empty=buffers.empty, release=buffers.release,
        )  # fmt: skip
        solver.solved = {}
        with watch:
            solver.run(full, quantized)
        ended = now(self.device)
        pack_block(solver.results, others, recipe.weights.bits, torch.bfloat16)
        found = {
            "seconds": ended - began,
            "rotation": rotated_after - start,
            "packing": now(self.device) - ended,
            "stages": watch.seconds(),
            "solver by projection": solver.solved,
            "losses": solver.losses,
            "streams on": full.device.type,
        }
        return solver, found

    def case(self, name: str) -> dict[str, Any]:
        """Blocks of one case, extrapolated."""
        preset, changes, count = CASES[name]
        recipe = build_recipe(load_recipe(preset), {"calibration.samples": self.samples, **changes})
        self.quantizer(recipe, 0, self.batch)  # kernels are compiled, libraries loaded
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        blocks = [self.quantizer(recipe, index, self.samples)[1] for index in range(count)]
        each = sum(block["seconds"] + block["rotation"] for block in blocks) / count
        sizes = Sizes.of(self.decoder)
        work = counted(sizes, Plan.of(recipe, self.length, None))
        stages = {stage: sum(block["stages"].get(stage, 0.0) for block in blocks) / count for stage in work}
        stages["rotation"] = sum(block["rotation"] for block in blocks) / count
        stages = {stage: seconds for stage, seconds in stages.items() if seconds > 0}
        return {
            "blocks": blocks,
            "seconds a block": each,
            f"seconds of {BLOCKS} blocks": BLOCKS * each,
            "stages": stages,
            "teraflops": {
                stage: (work[stage].products + work[stage].wide) / seconds / 1e12
                for stage, seconds in stages.items()
                if work[stage].products + work[stage].wide > 0
            },
            "peak_memory_bytes": peak(self.device),
        }

    def precision(self) -> dict[str, Any]:
        """Losses by projection with statistics and forward passes in TF32, and in IEEE float32."""
        recipe = build_recipe(load_recipe("w2a16"), PLAIN_ROUNDING)
        samples = max(self.batch, self.samples // 4)
        quick = self.quantizer(recipe, 0, samples)[0].losses
        with mock.patch.object(block_module, "quick_products", lambda device: nullcontext()):
            exact = self.quantizer(recipe, 0, samples)[0].losses
        return {name: {"tf32": quick[name], "float32": exact[name]} for name in quick}


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(run: Callable[[], Any], device: torch.device, times: int = 3) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    if times > 1:
        run()
    found = []
    for _ in range(times):
        start = now(device)
        run()
        found.append(now(device) - start)
    return min(found)


def peak(device: torch.device) -> int:
    """The most bytes held: on the GPU since it was last asked to forget, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident() or 0


def spec_of(recipe: Recipe) -> Spec:
    """What runs online."""
    weights, rotation, cache = recipe.weights, recipe.rotation, recipe.cache
    return Spec(
        bits=weights.bits, r3=rotation.r3, r4=rotation.r4, activation_bits=recipe.activations.bits,
        activation_symmetric=recipe.activations.symmetric, activation_clip=recipe.activations.clip,
        key_bits=cache.key_bits, value_bits=cache.value_bits, cache_clip=cache.clip,
    )  # fmt: skip


def config_of(bench: Bench) -> dict[str, Any]:
    """Sizes of blocks and text."""
    s = bench.decoder.shape
    names = ("hidden", "ffn", "query_heads", "key_heads", "head_dim")
    text = {"samples": bench.samples, "length": bench.length, "batch": bench.batch}
    return {**{name: getattr(s, name) for name in names}, **text}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    memory = None
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    return {
        "name": name,
        "memory_bytes": memory,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


# -- the page ---------------------------------------------------------------------------------------------------------


def markdown(figures: dict[str, Any]) -> str:
    """The figures so far as a page."""
    return "\n".join([*_head(figures), *_kernels(figures), *_cases(figures), *_precision(figures), *_skipped(figures)])


def _head(figures: dict[str, Any]) -> Iterator[str]:
    m, s = figures["machine"], figures["shape"]
    memory = f", {m['memory_bytes'] / 2**30:.0f} GiB" if m["memory_bytes"] else ""
    yield "# Speed on a GPU"
    yield ""
    yield f"Made by `python benchmarks/gpu.py` on: {m['name']}{memory}. torch {m['torch']}, Triton {m['triton']}."
    yield (
        f"Blocks of random weights, hidden {s['hidden']}, ffn {s['ffn']}, {s['query_heads']} query and "
        f"{s['key_heads']} key heads of {s['head_dim']}; {s['samples']} x {s['length']} tokens."
    )
    yield f"Seconds of {BLOCKS} blocks are those of a block times {BLOCKS}: reading and writing files are not in them."
    yield ""
    if "products" in figures:
        yield "| product | TFLOP/s |\n|---|---:|"
        yield from (f"| {name} | {value:.3g} |" for name, value in figures["products"].items())
        yield ""
    if "plain" in figures:
        yield "One plain forward pass: " + ", ".join(f"{v:.3g} {name}" for name, v in figures["plain"].items()) + "."
        yield ""


def _kernels(figures: dict[str, Any]) -> Iterator[str]:
    if "kernels" not in figures:
        return
    yield "## Columns of a block\n"
    yield "| kernel | shape | form | equal integers | all bits | ms | ms in torch operations |"
    yield "|---|---|---|---:|---|---:|---:|"
    for found in figures["kernels"]:
        shape = " x ".join(map(str, found["shape"]))
        yield (
            f"| {found['name']} | {shape} | {found['form']} | {found['equal integers']:.4%} | "
            f"{'yes' if found['equal to the last bit'] else 'no'} | {1000 * found['seconds']:.3g} | "
            f"{1000 * found['seconds in torch']:.3g} |"
        )
    yield ""


def _cases(figures: dict[str, Any]) -> Iterator[str]:
    cases = figures.get("cases", {})
    if not cases:
        return
    yield "## A block by stage: seconds, and TFLOP/s of the products that it needs\n"
    yield "| | " + " | ".join(cases) + " |"
    yield "|---|" + "---:|" * len(cases)
    stages = dict.fromkeys(stage for found in cases.values() for stage in found["stages"])
    for stage in stages:
        cells = []
        for found in cases.values():
            rate = found["teraflops"].get(stage)
            cells.append(f"{found['stages'].get(stage, 0.0):.3f}" + (f" ({rate:.3g})" if rate else ""))
        yield f"| {stage} | " + " | ".join(cells) + " |"
    solved = dict.fromkeys(name for c in cases.values() for b in c["blocks"] for name in b["solver by projection"])
    for name in solved:
        means = [
            sum(b["solver by projection"].get(name, 0.0) for b in found["blocks"]) / len(found["blocks"])
            for found in cases.values()
        ]
        yield f"| solving {name} | " + " | ".join(f"{value:.3f}" for value in means) + " |"
    for title, key in (("**a block**", "seconds a block"), (f"**{BLOCKS} blocks**", f"seconds of {BLOCKS} blocks")):
        yield f"| {title} | " + " | ".join(f"{found[key]:.2f}" for found in cases.values()) + " |"
    memory = (f"{found['peak_memory_bytes'] / 2**30:.1f} GiB" for found in cases.values())
    yield "| peak memory | " + " | ".join(memory) + " |"
    yield ""


def _precision(figures: dict[str, Any]) -> Iterator[str]:
    if "precision" not in figures:
        return
    yield "## Relative loss, statistics in TF32 and in float32\n"
    yield "| projection | TF32 | float32 |\n|---|---:|---:|"
    for name, found in figures["precision"].items():
        yield f"| {name} | {found['tf32']:.6g} | {found['float32']:.6g} |"
    yield ""


def _skipped(figures: dict[str, Any]) -> Iterator[str]:
    yield from (f"Not measured: {text}.\n" for text in figures["skipped"])


def main(
    device: Annotated[str | None, typer.Option(help="Where to compute. (default CUDA where it is)")] = None,
    small: Annotated[bool, typer.Option(help="A tiny shape: seconds on a CPU.")] = False,
    output: Annotated[Path, typer.Option(help="The folder of gpu.json and gpu.md.")] = HERE,
    limit: Annotated[float, typer.Option(help="Seconds after which no further step is begun.")] = 400.0,
) -> None:
    """Measure, and write gpu.json and gpu.md."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", 0)
    if chosen.type == "cpu" and not small:
        raise typer.BadParameter("without a GPU only --small can be measured")
    bench = Bench(chosen, small, output, limit)
    bench.step("products", bench.products)
    bench.step("kernels", bench.kernels)
    bench.step("plain", bench.plain)
    for name in CASES:
        bench.step(f"cases/{name}", lambda name=name: bench.case(name))  # type: ignore[misc]
    bench.step("precision", bench.precision)
    print(markdown(bench.figures))


if __name__ == "__main__":
    typer.run(main)
