"""The figures of `gpu.py` as a page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BLOCKS = 32  # that seconds are extrapolated to
SLOWEST = 12  # kernels of a profile that are shown


def markdown(figures: dict[str, Any]) -> str:
    """The figures so far as a page."""
    parts = (_head, _kernels, _cases, _precision, _profiles, _troubles)
    return "\n".join(line for part in parts for line in part(figures))


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
    if "choices" in figures:
        yield "| two ways to the same, the first is taken | ms |\n|---|---:|"
        yield from (f"| {name} | {1000 * value:.3g} |" for name, value in figures["choices"].items())
        yield ""


def _kernels(figures: dict[str, Any]) -> Iterator[str]:
    if "triton" in figures:
        found = figures["triton"]
        yield f"Triton agrees with torch: {'yes' if found['agrees'] else 'NO'}; compiled in {found['seconds']:.1f} s.\n"
    if "kernels" not in figures:
        return
    yield "## Columns of a block\n"
    yield "| kernel | shape | form | equal integers | all bits | ms | ms in torch operations |"
    yield "|---|---|---|---:|---|---:|---:|"
    for name, found in figures["kernels"].items():
        shape = " x ".join(map(str, found["shape"]))
        yield (
            f"| {name} | {shape} | {found['form']} | {found['equal integers']:.4%} | "
            f"{'yes' if found['equal to the last bit'] else 'no'} | {1000 * found['seconds']:.3g} | "
            f"{1000 * found['seconds in torch']:.3g} |"
        )
    yield ""


def _cases(figures: dict[str, Any]) -> Iterator[str]:
    cases = figures.get("cases", {})
    if not cases:
        return
    yield "## A block by stage: seconds, and TFLOP/s of the products that it needs\n"
    yield "Of the last block of each case: for the first one kernels are compiled and libraries loaded.\n"
    yield "| | " + " | ".join(cases) + " |"
    yield "|---|" + "---:|" * len(cases)
    stages = dict.fromkeys(stage for found in cases.values() for stage in found["stages"])
    for stage in stages:
        cells = []
        for found in cases.values():
            rate = found["teraflops"].get(stage)
            cells.append(f"{found['stages'].get(stage, 0.0):.3f}" + (f" ({rate:.3g})" if rate else ""))
        yield f"| {stage} | " + " | ".join(cells) + " |"
    last = {name: found["blocks"][-1] for name, found in cases.items()}
    solved = dict.fromkeys(name for block in last.values() for name in block["solver by projection"])
    for name in solved:
        seconds = (f"{block['solver by projection'].get(name, 0.0):.3f}" for block in last.values())
        yield f"| solving {name} | " + " | ".join(seconds) + " |"
    each = (", ".join(f"{b['seconds'] + b['rotation']:.2f}" for b in found["blocks"]) for found in cases.values())
    yield "| blocks, in order | " + " | ".join(each) + " |"
    yield (
        f"| **{BLOCKS} blocks** | "
        + " | ".join(f"{c[f'seconds of {BLOCKS} blocks']:.2f}" for c in cases.values())
        + " |"
    )
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


def _profiles(figures: dict[str, Any]) -> Iterator[str]:
    for name, found in figures.get("profile", {}).items():
        yield f"## Kernels that take most of the time: {name}\n"
        yield "| kernel | calls | ms |\n|---|---:|---:|"
        for kernel in found[:SLOWEST]:
            text = kernel["name"].replace("|", " ")[:80]
            yield f"| {text} | {kernel['calls']} | {1000 * kernel['seconds']:.1f} |"
        yield ""


def _troubles(figures: dict[str, Any]) -> Iterator[str]:
    yield from (f"Warning: {text}.\n" for text in figures["warnings"])
    yield from (f"Not measured: {text}.\n" for text in figures["skipped"])
    for name, text in figures["failed"].items():
        yield f"Failed: {name}.\n\n```\n{text.strip()[-2000:]}\n```\n"
