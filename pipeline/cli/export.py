"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..storage.files import read_manifest
from .command import Run


def export(
    run: Run,
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="native|compressed-tensors|gptq|gptq-v1|gguf|mlx",
            help="native: rotoboa's own; compressed-tensors: transformers and vLLM; gptq: version 2; gptq-v1: its "
            "version 1, symmetric alone; gguf: llama.cpp, weights of 4 or 5 bits or symmetric ones of 8; mlx: mlx-lm.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write. (default RUN/exports/FORMAT)")
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The most of one tensor file, such as 500MB.")
    ] = "5GB",
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload to this hub repository; made where it is missing.")
    ] = None,
) -> None:
    """Write a finished run in a format that others read.

    Nothing is quantized again.
    """
    read_manifest(run)

    from .. import exporting

    size = exporting.shard_size(shard_size)
    target = exporting.export(run, format_name, output=output, shard_bytes=size, push=push)
    typer.echo(f"The export is in {target}" + (f" and in {push}" if push else ""))
