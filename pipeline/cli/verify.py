"""The command `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ...errors import InputError, RunError
from .command import print_tables


def verify(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an export, or of a run.", metavar="EXPORT", show_default=False)
    ],
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="Its run. (default where the export says)")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="The largest difference of a logit allowed. (default 1 % of their standard deviation, 20 % with "
            "quantized activations or cache; with --runtime of a log-probability, three times a dense model's)",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="vllm|gptqmodel|mlx|llama.cpp|transformers",
            help="Run the export in this runtime, in a process of its own, and compare log-probabilities.",
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The Python that has the runtime. (default .venv-RUNTIME/bin/python)"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|float16|bfloat16", help="What the runtime computes in. (default its usual one)"),
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="With the runtime's own cache in few bits, if the run follows it. (default on)",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compare what an export computes with its run.

    The export is loaded with its stock reader, or run where it is served (--runtime).
    """
    if runtime is not None:
        _in_runtime(folder, runtime, run=run, tolerance=tolerance, python=python, dtype=dtype, cache=cache is not False)
        return
    for option, given in {"--python": python, "--dtype": dtype, "--cache": cache}.items():
        if given is not None:
            raise InputError(f"{option} says nothing without --runtime: give both.")

    from .. import verifying

    results = verifying.verify(folder, run=run, tolerance=tolerance)
    table = Table("format", "reader", "largest difference", "std of logits", "same top token", "tolerance", "")
    for r in results:
        limit = "none" if r.tolerance is None else f"{r.tolerance:.3g}"
        row = (f"{r.difference:.3g}", f"{r.deviation:.3g}", f"{r.agreement:.1%}", limit)
        table.add_row(r.format, r.reader, *row, "shown" if r.tolerance is None else "ok" if r.passed else "TOO LARGE")
    print_tables(table)
    if failed := [r for r in results if not r.passed]:
        worst = failed[0]
        raise RunError(
            f"{folder} differs from its run by {worst.difference:.3g} in a logit, above {worst.tolerance:.3g}: "
            "export it again, or give the --tolerance you can live with."
        )


def _in_runtime(folder: Path, runtime: str, **options: Any) -> None:
    from .. import serving

    found = serving.serve(folder, runtime, **options)
    table = Table(show_header=False)
    table.add_row("format", found.format)
    table.add_row("runtime", f"{found.runtime} ({', '.join(map(' '.join, found.versions.items()))})")
    table.add_row("kernels", "\n".join(found.kernels))
    table.add_row("computes in", found.dtype)
    table.add_row("largest difference of a log-probability", f"{found.difference:.3g} of at most {found.tolerance:.3g}")
    if found.cache is not None:
        table.add_row("its own cache", f"{found.cache[0]}-bit keys, {found.cache[1]}-bit values")
    what = "activations" if found.cache is None else "activations and cache"
    if found.unquantized is not None:
        table.add_row(f"to the run with {what} in 16 bits", f"{found.unquantized:.3g}")
    if found.control is not None:
        table.add_row("of a dense model there", f"{found.control:.3g}")
    table.add_row("same most likely token", f"{found.agreement:.1%}")
    table.add_row("generated tokens that the run would choose too", f"{found.greedy:.1%}")
    print_tables(table)
    if found.in_16_bits:
        raise RunError(
            f"{found.runtime} computes {folder} with {what} in 16 bits, which the run does not: serve it "
            f"elsewhere, or measure a run with {what} in 16 bits."
        )
    if not found.passed:
        raise RunError(
            f"{found.runtime} differs from the run of {folder} by {found.difference:.3g} in a log-probability, above "
            f"{found.tolerance:.3g}: export it again, or give the --tolerance you can live with."
        )
