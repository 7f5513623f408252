"""Seconds of the quantizer on a GPU for blocks of the shape of Llama-3-8B: random weights, 128 x 2048 tokens.

    python benchmarks/gpu.py                      on the GPU, some five minutes: gpu.json and gpu.md beside this file
    python benchmarks/gpu.py --device cpu --small --output FOLDER       the same steps in seconds, to see that they work

Nothing is downloaded. Results are written after each step, so what a time limit cuts off loses only what comes after.
A step that fails leaves its traceback, and the next one begins; where it has spoilt the device, in a new process
without Triton.

| step | what it measures |
|---|---|
| triton | whether Triton's kernels compile and agree with torch: else they are not used |
| kernels | the compiled columns of a block against torch operations: whether integers are equal, and the time of both |
| cases | two blocks by stage and projection: all levers on; without refinement; in W4A4KV4 |
| plain | one plain forward pass through a block |
| products | TFLOP/s of plain matrix products, by precision: what the stages are compared with |
| choices | two ways to the same result: attention's groups of heads, Cholesky factors of many heads |
| precision | losses of all projections with statistics in TF32 and in IEEE float32, on some of the sequences |
| profile | the kernels of the device that take most of the time, in the solver and in the streams |
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu_bench import Bench
from gpu_page import markdown
from gpu_steps import steps

HERE = Path(__file__).resolve().parent


def main(
    device: Annotated[str | None, typer.Option(help="Where to compute. (default CUDA where it is)")] = None,
    small: Annotated[bool, typer.Option(help="A tiny shape: seconds on a CPU.")] = False,
    output: Annotated[Path, typer.Option(help="The folder of gpu.json and gpu.md.")] = HERE,
    limit: Annotated[float, typer.Option(help="Seconds after which no further step is begun.")] = 300.0,
    go_on: Annotated[bool, typer.Option(help="Only the steps that gpu.json in the folder has not.")] = False,
) -> None:
    """Measure, and write gpu.json and gpu.md."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", 0)
    if chosen.type == "cpu" and not small:
        raise typer.BadParameter("without a GPU only --small can be measured")
    earlier = json.loads((output / "gpu.json").read_text(encoding="utf-8")) if go_on else None
    bench = Bench(chosen, small, output, limit, earlier)
    faulthandler.dump_traceback_later(max(limit, 0) + 60, file=2)  # where it hangs, if it does
    for name, run in steps():
        if not bench.step(name, run):
            start_anew()
    faulthandler.cancel_dump_traceback_later()
    print(markdown(bench.figures))


def start_anew() -> None:
    """This program again in the place of this process, for the steps that are left, and without Triton."""
    os.environ["ROTOBOA_TRITON"] = "0"
    sys.stderr.flush()
    os.closerange(3, 4096)  # with the device's files its memory is given back
    os.execv(sys.executable, [sys.executable, *sys.argv, *(["--go-on"] if "--go-on" not in sys.argv else [])])


if __name__ == "__main__":
    typer.run(main)
