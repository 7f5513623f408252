"""One rank against several on this machine: seconds by stage, bytes on the wire, and whether the answer is the same.

    python benchmarks/ranks.py                          # one and two ranks, the embedded model by w2a16
    python benchmarks/ranks.py --ranks 1,2,4 --recipe w4a4kv4 --samples 32

Every rank is a process with one thread, as torchrun starts it, whatever their number. Seconds are those of the first
rank, waiting among them. Writes benchmarks/ranks.md.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import HERE, perplexity
from safetensors.torch import load_file

from rotoboa.export.packing import unpack
from rotoboa.pipeline.storage.files import read_report

TABLE = HERE / "ranks.md"
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


def run(count: int, recipe: str, samples: int, folder: Path) -> dict[str, Any]:
    """The report of a run on `count` ranks, and the bytes that crossed the loopback interface meanwhile."""
    output = folder / f"{count}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    options = ["--model", "tiny", "--recipe", recipe, "--output", str(output), "--calibration.samples", str(samples)]
    off = ["--no-evaluation.baseline", "--no-evaluation.references", "--no-evaluation.report", "--quiet"]
    before = int(LOOPBACK.read_text()) if LOOPBACK.exists() else 0
    subprocess.run(
        [sys.executable, *launch, "-m", "rotoboa", "quantize", *options, *off],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    crossed = int(LOOPBACK.read_text()) - before if LOOPBACK.exists() and count > 1 else 0
    report = read_report(output).to_json()
    return {"report": report, "loopback": crossed, "integers": integers(output, report["recipe"]["weights"]["bits"])}


def integers(folder: Path, bits: int) -> torch.Tensor:
    """All of a run's, one after another."""
    found = []
    for file in sorted((folder / "blocks").iterdir()):
        tensors = load_file(file)
        words = [tensors[name] for name in sorted(tensors) if name.endswith("qweight")]
        found += [unpack(word, bits, word.shape[1] * word.element_size() * 8 // bits).flatten() for word in words]
    return torch.cat(found)


def table(found: dict[int, dict[str, Any]], recipe: str, samples: int) -> str:
    """Markdown: what each count of ranks took."""
    counts, reports = list(found), {count: one["report"] for count, one in found.items()}
    first = reports[counts[0]]
    length = first["tokens"]["calibration"][1]
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, measured: dict[int, str]) -> None:
        rows.append((name, [measured[n] for n in counts]))

    add("plain forward pass, s", {n: f"{reports[n]['plain_forward_seconds']:.1f}" for n in counts})
    add("**quantize, s**", {n: f"**{reports[n]['seconds']['quantize']:.1f}**" for n in counts})
    for name in first["stages"]:
        add(f"· {name}", {n: f"{reports[n]['stages'].get(name, 0.0):.1f}" for n in counts})
    ranks = {n: reports[n].get("ranks", {}).get("bytes", {}) for n in counts}
    share = {n: 2 * (n - 1) / n for n in counts}
    add(
        "summed by all-reduce, MB sent by each rank",
        {n: f"{share[n] * ranks[n].get('sum', 0) / 1e6:.1f}" for n in counts},
    )
    add(
        "broadcast (results of the solver, tokens, the model for evaluation), MB",
        {n: f"{ranks[n].get('broadcast', 0) / 1e6:.1f}" for n in counts},
    )
    add("facts (JSON), MB", {n: f"{ranks[n].get('values', 0) / 1e6:.2f}" for n in counts})
    add("crossed the loopback interface, MB", {n: f"{found[n]['loopback'] / 1e6:.1f}" for n in counts})
    alone = found[counts[0]]["integers"]
    changed = {n: float((found[n]["integers"] != alone).double().mean()) for n in counts}
    add("integers that differ from one rank's", {n: f"{part:.4%}" for n, part in changed.items()})
    add("perplexity", {n: f"{perplexity(reports[n]):.4f}" for n in counts})
    lines = [
        f"# {' and '.join(map(str, counts))} ranks, each a process with one thread",
        "",
        f"The embedded model by `{recipe}`, {samples} sequences of {length} tokens, gloo, "
        f"{platform.machine()} with {os.cpu_count()} cores, torch {torch.__version__}. "
        "`make ranks` writes this file. Seconds are those of the first rank, what it waited for the others among "
        "them. An all-reduce of S bytes on n ranks sends 2 (n - 1) / n S from each; broadcasts are counted as given.",
        "",
        "| | " + " | ".join(f"{n} rank{'s' if n > 1 else ''}" for n in counts) + " |",
        "|---|" + "---|" * len(counts),
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows),
    ]
    return "\n".join(lines) + "\n"


def main(
    ranks: Annotated[str, typer.Option(help="How many ranks, with commas.")] = "1,2",
    recipe: Annotated[str, typer.Option(help="A recipe of the package.")] = "w2a16",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
) -> None:
    """Measure, and write the table."""
    with tempfile.TemporaryDirectory() as folder:
        found = {int(count): run(int(count), recipe, samples, Path(folder)) for count in ranks.split(",")}
    text = table(found, recipe, samples)
    TABLE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
