"""Tokens a second of exports where people serve them, beside bfloat16 of the same runtime: serving_speed.md.

    python benchmarks/serving_speed.py --model path/to/smollm2-135m      in .venv-vllm, .venv-mlx, .venv-llama.cpp

Weights are rounded to the nearest: speed does not depend on them. One thread everywhere. Runs, exports and what was
timed are kept in `--work`, so that the program goes on where it was stopped; `--again vllm` times a runtime anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from common import HERE, OFF

import rotoboa
from rotoboa.export.formats import gguf
from rotoboa.export.runtimes.ask import interpreter
from rotoboa.pipeline.exporting import export, open_finished
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.storage.atomic import write_json
from rotoboa.pipeline.storage.run_folder import RunFolder

PAGE = HERE / "serving_speed.md"
DENSE = "bfloat16"
NAMES = {"vllm": "vLLM", "llama.cpp": "llama.cpp", "mlx": "mlx-lm", "native": "transformers with rotoboa"}
FORMATS = {"vllm": "compressed-tensors", "llama.cpp": "gguf", "mlx": "mlx", "native": "native"}
CHEAP: dict[str, Any] = {
    **OFF,
    "rotation.r1": "none",
    "weights.method": "rtn",
    "weights.grid": "minmax",
    "calibration.dataset": "stdlib",
    "calibration.samples": 1,
    "calibration.sequence_length": 64,
    "evaluation.dataset": "stdlib",
    "evaluation.windows": 1,
}
GROUPS = {"weights.symmetric": True, "weights.group_size": 32}
ENDS = {"embedding.bits": 8, "embedding.symmetric": True, "embedding.group_size": 32}


class Case(NamedTuple):
    """What a row has: a recipe with changes, and who runs it."""

    recipe: str
    changes: Mapping[str, Any]
    runtimes: tuple[str, ...]


CASES = {
    "W4A16, groups of 32": Case("w4a16", GROUPS, ("vllm", "llama.cpp", "mlx", "native")),
    "W4A4, cache in 4 bits": Case("w4a4kv4", {}, ("native",)),
    "W8A8": Case("w8a8", {"activations.convention": "vllm"}, ("vllm",)),
    "W4A16, embedding in 8 bits": Case("w4a16", {**GROUPS, **ENDS}, ("llama.cpp", "mlx")),
    "W8A16, groups of 32": Case("w4a16", {**GROUPS, "weights.bits": 8}, ("llama.cpp",)),
    "W2A16, groups of 64": Case("w4a16", {**GROUPS, "weights.bits": 2, "weights.group_size": 64}, ("llama.cpp",)),
    "W4A8, inputs with zero points": Case("w4a8-cpu", {}, ("vllm",)),
}


def main(
    model: Annotated[Path, typer.Option(help="A checkpoint's folder.")],
    work: Annotated[Path, typer.Option(help="What was made and timed so far.")] = Path("runs/serving-speed"),
    runtimes: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(NAMES),
    again: Annotated[str, typer.Option(help="Runtimes to time again.")] = "",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens that follow it.")] = 64,
    repeats: Annotated[int, typer.Option(help="The least time of so many.")] = 3,
    compiled: Annotated[bool, typer.Option(help="Let vLLM compile the model.")] = False,
    name: Annotated[str, typer.Option(help="Of the model, in the page.")] = "",
    only_page: Annotated[bool, typer.Option("--only-page", help="Write the page of what was timed.")] = False,
) -> None:
    """Quantize, export and time what is not timed yet, and write the page."""
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "timed.json"
    timed: dict[str, dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    wanted = (key for key, row in timed.items() if "failed" not in row)
    timed = {key: timed[key] for key in wanted if key.partition(": ")[0] not in again.split(",")}
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    asked = {"prompt": prompt, "new": new, "repeats": repeats, "vocabulary": config["vocab_size"]}
    asked |= {"dtype": DENSE, "eager": not compiled}
    for case in (DENSE, *CASES):
        for runtime in runtimes.split(","):
            key = f"{runtime}: {case}"
            if only_page or key in timed or (case != DENSE and runtime not in CASES[case].runtimes):
                continue
            folder = made(model, work, runtime, case)
            row = time_it(runtime, folder, {**asked, "packed": case != DENSE}, work)
            timed[key] = {"bytes": size(folder), "repeats": repeats, **row}
            write_json(kept, timed)
            print(key, {k: v for k, v in timed[key].items() if k != "versions"}, flush=True)
    PAGE.write_text(page(timed, name or model.name, prompt, new), encoding="utf-8")


def made(model: Path, work: Path, runtime: str, case: str) -> Path:
    """The folder that a runtime reads, made where it is missing."""
    recipe, changes, _ = CASES["W4A16, groups of 32" if case == DENSE else case]
    run = work / "runs" / "".join(c if c.isalnum() else "-" for c in (recipe + str(sorted(changes.items()))))[:120]
    if case == DENSE and runtime != "llama.cpp":
        return model
    if not (run / "model").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        given = {**CHEAP, **changes, "model": str(model), "output": run}
        rotoboa.quantize(build_recipe(load_recipe(recipe), given), quiet=True)
    if case == DENSE:
        dense = work / "dense"
        if not dense.is_dir():
            gguf.write(open_finished(RunFolder.open(run)), dense, dense=True)
        return dense
    if runtime == "native":
        return run / "model"
    target = run / "exports" / FORMATS[runtime]
    return target if target.is_dir() else export(run, FORMATS[runtime])


def time_it(runtime: str, folder: Path, asked: dict[str, Any], work: Path) -> dict[str, Any]:
    """What `timed_in.py` says, or why it cannot be said."""
    python = Path(sys.executable) if runtime == "native" else interpreter(runtime, None)
    request, answer = work / "request.json", work / "answer.json"
    answer.unlink(missing_ok=True)
    request.write_text(json.dumps(asked), encoding="utf-8")
    one = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    isolated = [] if runtime == "native" else ["-I"]
    paths = [path.resolve() for path in (HERE / "timed_in.py", folder, request, answer)]
    command = [str(python), *isolated, str(paths[0]), runtime, *map(str, paths[1:])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **one})
    if done.returncode or not answer.is_file():
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1].replace(str(folder.resolve()), folder.name)}
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def size(folder: Path) -> int:
    """Bytes of the weights."""
    return sum(file.stat().st_size for kind in ("*.safetensors", "*.gguf") for file in folder.glob(kind))


def page(timed: dict[str, dict[str, Any]], name: str, prompt: int, new: int) -> str:
    """Markdown."""
    least = sorted({row.get("repeats", 1) for row in timed.values()})
    often = " to ".join(map(str, dict.fromkeys((least[0], least[-1]))))
    lines = [
        "# Speed where exports are served",
        "",
        f"Made by `python benchmarks/serving_speed.py --model {name}`: {name}, a prompt of {prompt} tokens and {new}",
        f"after it, of processor time, the least of {often}, one thread of {processor()}. Beside it, times the",
        "same runtime's bfloat16. Weights are rounded to the nearest, which changes no speed.",
        "",
        "| runtime | model | file, MB | prompt, tokens/s | generated, tokens/s | times bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    for runtime, called in NAMES.items():
        dense = timed.get(f"{runtime}: {DENSE}", {})
        for case in (DENSE, *CASES):
            row = timed.get(f"{runtime}: {case}")
            if row is None:
                continue
            head = f"| {called} | {case} | {row['bytes'] / 1e6:.0f} |"
            if "failed" in row:
                lines.append(f"{head} not seen: {row['failed']} | | |")
                continue
            rates = prompt / row["prompt"], 1 / row["token"]
            times = [dense[part] / row[part] for part in ("prompt", "token")] if "token" in dense else []
            beside = ", ".join(f"{value:.2f}" for value in times) if case != DENSE else ""
            lines.append(f"{head} {rates[0]:,.0f} | {rates[1]:,.1f} | {beside} |")
    found = {
        called: next(
            (row["versions"] for key, row in timed.items() if key.startswith(f"{runtime}: ") and "versions" in row),
            None,
        )
        for runtime, called in NAMES.items()
    }
    lines += ["", *(f"- {called}: {', '.join(map(' '.join, have.items()))}" for called, have in found.items() if have)]
    return "\n".join([*lines, ""])


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wide = "avx512_bf16" in found.get("flags", "")
    return f"{found.get('model name', 'an unknown processor')}{' with AVX-512 BF16' if wide else ''}"


if __name__ == "__main__":
    typer.run(main)
