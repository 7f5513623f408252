"""What the arithmetic of a run needs, stage by stage, and what many GPUs would make of it: limits.md and scaling.md.

    python benchmarks/limits.py        writes both, and factors.json; nothing is run: speed.json was measured

Counts are those of `rotoboa.pipeline.estimate.counting`, of the recipe `w2a16` with every lever on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rotoboa.models.shape import Shape
from rotoboa.pipeline.estimate.counting import Sizes, Work, total
from rotoboa.pipeline.estimate.counting_run import Plan, whole
from rotoboa.pipeline.estimate.machines import ACHIEVED, GPUS, NETWORKS, Machine, published
from rotoboa.pipeline.estimate.scaling import device_memory, estimate
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

HERE = Path(__file__).resolve().parent
# blocks, hidden, ffn, query heads, key heads, head_dim, vocabulary: as their config.json has them.
SHAPES = {
    "the embedded model": Shape(4, 256, 688, 8, 4, 32, 2048),
    "Llama-3-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "Llama-3-70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
    "Llama-3.1-405B": Shape(126, 16384, 53248, 128, 8, 128, 128256),
}
RECIPE, GPU = "w2a16", "h100"
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


def run_of(shape: Shape, samples: int, length: int) -> Plan:
    """The recipe as `make speed` runs it: without the report's references, and nothing evaluated."""
    recipe = load(RECIPE, {"evaluation.references": False, "calibration.samples": samples})
    return Plan.of(recipe, length, None)


def page(title: str, text: Iterable[str]) -> str:
    """A page with paragraphs and tables."""
    return "\n\n".join([f"# {title}", *text]) + "\n"


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """1.2e+09, and nothing for 0."""
    return f"{value:.2e}" if value else ""


def counts(shape: Shape, samples: int, length: int) -> dict[str, Work]:
    """Of a whole run by stage."""
    found = whole(Sizes(shape), run_of(shape, samples, length))
    return {name: work for name, work in found.items() if work != Work()}


def peaks(tf32: bool) -> Machine:
    """The GPU at its published peaks; columns in float32 without fused additions."""
    gpu = GPUS[GPU]
    return Machine(gpu.title, gpu.tf32 if tf32 else gpu.float32, gpu.float64, gpu.float32 / 2, gpu.bandwidth)


def large(shape: Shape) -> str:
    """The counts, and the least seconds on one GPU."""
    found = counts(shape, 128, 2048)
    everything = total(found.values())
    plain, tensor = peaks(False), peaks(True)
    rows = []
    for name, work in [*found.items(), ("all", everything)]:
        each = [work] if name != "all" else list(found.values())
        seconds = [f"{sum(machine.seconds(part) for part in each):,.1f}" for machine in (plain, tensor)]
        share = f"{work.operations / everything.operations:.1%}"
        rows.append([name, *map(number, (work.products, work.wide, work.elements, work.bytes)), share, *seconds])
    header = ["stage", "float32 products", "float64", "in cache", "bytes", "of all operations", "s, float32", "s, TF32"]
    return markdown(header, rows)


def small(shape: Shape, speed: Mapping[str, Any]) -> str:
    """The counts of the embedded model beside what `make speed` measured."""
    result = speed["results"][RECIPE]
    samples, length = result["calibration"]
    found = counts(shape, samples, length)
    seconds = {"plain forward pass": result["plain forward pass"], **result["stages"]}
    quantized = {name: work for name, work in found.items() if name != "plain forward pass"}
    operations = total(quantized.values()).operations
    machine = Machine("", **result["rates"])
    rows = []
    for name, work in found.items():
        shares = ["", ""]
        if name in quantized:
            shares = [f"{work.operations / operations:.1%}"]
            shares.append(f"{seconds[name] / result['quantize']:.1%}" if name in seconds else "")
        spent = seconds.get(name)
        rate = f"{work.operations / spent / 1e9:.1f}" if spent else ""
        cells = [name, *map(number, (work.products, work.wide, work.elements, work.bytes))]
        factor = f"{spent / machine.seconds(work):.2f}" if spent else ""
        rows.append([*cells, shares[0], f"{spent:.2f}" if spent else "", shares[1], rate, factor])
    header = [
        "stage",
        "float32 products",
        "float64",
        "in cache",
        "bytes",
        "counted",
        "s",
        "measured",
        "GFLOP/s",
        "factor",
    ]
    return markdown(header, rows)


def limits(speed: Mapping[str, Any]) -> str:
    """limits.md."""
    machine, (samples, length) = speed["machine"], speed["results"][RECIPE]["calibration"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    text = [
        f"Made by `make limits`, from sizes: operations and bytes of a whole run of `{RECIPE}` with every lever on, "
        "without evaluation and without the report's references. A multiplication and an addition are two operations; "
        "how each stage is counted is in the docstrings in `pipeline/estimate/` (counting.py, counting_solver.py), "
        "and a test holds the counts against the products that torch runs. Refinement and starts are counted as if "
        "every round of every row were taken: rounds and rows in which nothing moves are left out when they run.",
        "## The embedded model",
        f"{samples} sequences of {length} tokens. Seconds are those of `make speed`: {machine['processor']} "
        f"({machine['capability']}), {threads}, {machine['clock']}. Shares are of the quantization, "
        "factors how many times as long a stage takes as its counts do at what this machine does of large products "
        "({products}), of float64 ones ({wide}), of sums in cache ({elements}) and of copies ({bandwidth}).".format(
            **{kind: f"{rate / 1e9:.0f} G/s" for kind, rate in speed["results"][RECIPE]["rates"].items()}
        ),
        small(SHAPES["the embedded model"], speed),
    ]
    least = (
        f"128 sequences of 2,048 tokens. Seconds are the least that one {GPUS[GPU].title} could take at its published "
        "peaks, with matrix products in float32 and in TF32: arithmetic or memory, whichever is longer in each stage."
    )
    for name in ("Llama-3-8B", "Llama-3-70B"):
        text += [f"## {name}", least, large(SHAPES[name])]
    return page("Limits", text)


def factors(speed: Mapping[str, Any]) -> dict[str, float]:
    """How many times as long as its counts each stage took, the median over recipes; "" is all of a run together."""
    found: dict[str, list[float]] = {}
    for recipe, result in speed["results"].items():
        (samples, length), machine = result["calibration"], Machine("", **result["rates"])
        changes = {"evaluation.references": False, "calibration.samples": samples}
        counted = whole(Sizes(SHAPES["the embedded model"]), Plan.of(load(recipe, changes), length, None))
        seconds = {"plain forward pass": result["plain forward pass"], **result["stages"]}
        measured = {name: taken for name, taken in seconds.items() if taken and name in counted}
        for name, taken in measured.items():
            found.setdefault(name, []).append(taken / machine.seconds(counted[name]))
        together = sum(machine.seconds(counted[name]) for name in measured)
        found.setdefault("", []).append(sum(measured.values()) / together)
    return {name: round(median(values), 2) for name, values in found.items()}


def load(recipe: str, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with changes."""
    return build_recipe(load_recipe(recipe), changes)


def duration(seconds: float) -> str:
    """Minutes below two hours, else hours."""
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def scaling(tf32: bool) -> str:
    """Time, memory and bytes on the wire by model and number of GPUs."""
    rows = []
    for name in ("Llama-3-8B", "Llama-3-70B", "Llama-3.1-405B"):
        sizes, run = Sizes(SHAPES[name]), run_of(SHAPES[name], 128, 2048)
        first = 0.0
        for ranks in GPU_COUNTS:
            stages = estimate(sizes, run, published(GPU, tf32=tf32), ranks)
            seconds = sum(stage.total for stage in stages.values())
            first = first or seconds
            slow = estimate(sizes, run, published(GPU, "ethernet-100", tf32=tf32), ranks)
            wire = sum(stage.wire for stage in stages.values())
            memory = device_memory(sizes, run, ranks)
            fits = "" if memory <= GPUS[GPU].memory else " (too much)"
            rows.append([
                name if ranks == 1 else "",
                str(ranks),
                duration(seconds),
                f"{first / seconds:.1f}",
                f"{sum(stage.transfer for stage in stages.values()) / seconds:.0%}" if ranks > 1 else "",
                duration(sum(stage.total for stage in slow.values())) if ranks > 8 else "",
                f"{wire / 1e9:,.0f}" if ranks > 1 else "",
                f"{memory / 1e9:.0f}{fits}",
            ])  # fmt: skip
    header = [
        "model",
        "GPUs",
        "time",
        "speed-up",
        "on the wire",
        "time, 100 Gb/s Ethernet",
        "GB sent a GPU",
        "GB a GPU",
    ]
    return markdown(header, rows)


def summary() -> str:
    """Times of the three models by number of GPUs, products in float32 and in TF32: the table of the README."""
    rows = []
    for name in ("Llama-3-8B", "Llama-3-70B", "Llama-3.1-405B"):
        sizes, run = Sizes(SHAPES[name]), run_of(SHAPES[name], 128, 2048)
        for tf32 in (False, True):
            times = []
            for ranks in GPU_COUNTS:
                stages = estimate(sizes, run, published(GPU, tf32=tf32), ranks)
                too_much = device_memory(sizes, run, ranks) > GPUS[GPU].memory
                times.append(duration(sum(stage.total for stage in stages.values())) + "\\*" * too_much)
            rows.append([f"{name}, {'TF32' if tf32 else 'float32'}", *times])
    return markdown(["GPUs", *map(str, GPU_COUNTS)], rows)


def scaling_page() -> str:
    """scaling.md."""
    fractions = ", ".join(f"{value:.0%} of {name}" for name, value in ACHIEVED.items())
    text = (
        f"Made by `make limits`; nothing here was measured. `{RECIPE}` with every lever on, 128 sequences of 2,048 "
        f"tokens, {GPUS[GPU].title} (SXM), eight to a node over NVLink, nodes by eight ports of 400 Gb/s InfiniBand. "
        f"Counted operations and bytes over published peaks, of which it is assumed to reach {fractions}. "
        f"A ring over several nodes goes at the speed of the network, {NETWORKS['ndr'] / 1e9:.0f} GB/s of a node. "
        "Reading the checkpoint, evaluation and waiting are not in it. What is shared out and what is not is in "
        "`pipeline/estimate/scaling.py`; the same for any model: `rotoboa inspect MODEL --gpus N`."
    )
    note = "Time by number of GPUs; \\* is more than the memory of this GPU holds."
    parts = [note, summary(), "## Products in float32", scaling(False), "## Products in TF32", scaling(True)]
    return page("Scaling, an estimate", [text, *parts])


def main() -> None:
    """Write both pages and the factors."""
    speed = json.loads((HERE / "speed.json").read_text(encoding="utf-8"))
    (HERE / "limits.md").write_text(limits(speed), encoding="utf-8")
    target = HERE.parent / "pipeline" / "estimate" / "factors.json"
    target.write_text(json.dumps(factors(speed), indent=2) + "\n", encoding="utf-8")
    (HERE / "scaling.md").write_text(scaling_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
