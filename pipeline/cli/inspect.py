"""The command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import InputError
from ..console.progress import cost_table, loss_table, result_table, source_table, task_table
from ..recipe.recipe_files import DEFAULT_RECIPE, build_recipe, load_recipe
from ..storage.files import read_json, runs_in
from .command import Device, facts_table, print_tables, say_idle
from .options import RecipeName, overrides, with_recipe_options


@with_recipe_options(after="recipe")
def inspect(
    *,
    subject: Annotated[
        str, typer.Argument(help="Folder of a run, or a model as for --model.", metavar="RUN|MODEL", show_default=False)
    ],
    recipe: RecipeName = None,
    device: Device = None,
    gpus: Annotated[int | None, typer.Option(min=1, metavar="INT", help="Estimate a run on so many GPUs too.")] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="a100, h100, h200, b200 or l40s. (default h100)")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Between nodes of eight: ndr, hdr, ethernet-100, ethernet-25 or ethernet-10. (default ndr)",
        ),
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Estimate matrix products in TF32.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **given: Any,
) -> None:
    """Show what a run is, or plan the run of a model.

    Of a run: recipe, versions, sizes, loss of each layer, perplexity. Of a model, by a recipe and the options below:
    parameters, rotations, bytes before and after, calibration, memory and time; with --gpus also an estimate for so
    many GPUs, from their published rates.
    """
    if (Path(subject) / "manifest.json").is_file():
        if recipe is not None or overrides(given) or device is not None or gpus is not None:
            raise InputError(f"{subject} is a run, which has its recipe: leave out the other options.")
        _inspect_run(Path(subject), as_json)
        return
    if _is_path_of_a_run(subject):
        read_json(Path(subject), "manifest.json")  # which says that it is not there
    if given.get("model") is not None:
        raise InputError("the model is given twice: leave out --model.")
    wanted = build_recipe(load_recipe(recipe or DEFAULT_RECIPE), {**overrides(given), "model": subject})

    if gpus is None:
        say_idle("--gpus is not given", gpu=gpu, network=network, tf32=tf32)

    from ..console.plan_table import plan_tables
    from ..estimate.plan import Cluster, plan

    found = plan(wanted, device, None if gpus is None else Cluster(gpus, gpu or "h100", network or "ndr", tf32))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_tables(*plan_tables(found))
        for notice in found["notices"]:
            typer.echo(notice)


def _is_path_of_a_run(subject: str) -> bool:
    """Whether what is no folder was meant as one, though it looks like the id of a model on the hub."""
    path = Path(subject)
    return not path.exists() and len(path.parts) > 1 and (path.parts[0] == "runs" or bool(runs_in(path.parent)))


def _inspect_run(run: Path, as_json: bool) -> None:
    manifest = read_json(run, "manifest.json")
    report = read_json(run, "report.json") if (run / "report.json").exists() else {}
    if as_json:
        typer.echo(json.dumps({"manifest": manifest, "report": report}, indent=2))
        return
    facts = {**report, **(manifest.get("identity") or {})}
    for key in ("recipe", "versions"):
        value = facts.get(key)
        if value is not None:
            print_tables(facts_table(key, value))
    if manifest.get("blocks"):
        print_tables(loss_table(manifest["blocks"]))
    if not report:
        typer.echo("There is no report: the run is not finished.")
        return
    print_tables(result_table(report), task_table(report), source_table(report), cost_table(report))
    if raised := report.get("raised_damping"):
        print_tables(facts_table("raised damping", raised))
