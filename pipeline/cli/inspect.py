"""The command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...boa.scheme import FULL
from ...errors import InputError
from ..console.progress import cost_table, loss_table, result_table, source_table, task_table
from ..recipe.recipe_files import DEFAULT_RECIPE, build_recipe, load_recipe
from ..storage.files import MANIFEST, REPORT, read_manifest, read_report, runs_in
from ..storage.manifest import Manifest
from .command import Device, facts_table, print_tables
from .options import RecipeName, overrides, with_recipe_options


@with_recipe_options(after="recipe")
def inspect(
    *,
    subject: Annotated[
        str, typer.Argument(help="Folder of a run, or a model as for --model.", metavar="RUN|MODEL", show_default=False)
    ],
    recipe: RecipeName = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **given: Any,
) -> None:
    """Show what a run is, or plan the run of a model.

    Of a run: recipe, versions, sizes, loss of each layer, perplexity. Of a model, by a recipe and the options below:
    parameters, rotations, bytes before and after, calibration, memory and time.
    """
    if (Path(subject) / MANIFEST).is_file():
        if recipe is not None or overrides(given) or device is not None:
            raise InputError(f"{subject} is a run, which has its recipe: leave out the other options.")
        _inspect_run(Path(subject), as_json)
        return
    if _is_path_of_a_run(subject):
        read_manifest(Path(subject))  # which says that it is not there
    if given.get("model") is not None:
        raise InputError("the model is given twice: leave out --model.")
    wanted = build_recipe(load_recipe(recipe or DEFAULT_RECIPE), {**overrides(given), "model": subject})

    from ..console.plan_table import plan_tables
    from ..estimate.plan import plan

    found = plan(wanted, device)
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


def _schemes(run: Path, manifest: Manifest) -> dict[str, Any] | None:
    """The schemes of layers, where a run may have several: others are shown without torch."""
    recipe = manifest.identity.recipe
    ends = [recipe.get(section, {}).get("bits", FULL) for section in ("embedding", "head")]
    if manifest.budget is None and not recipe.get("overrides") and min(ends) == FULL:
        return None
    from ..estimate.schemes import schemes_of_run

    return schemes_of_run(run, manifest)


def _directions(run: Path, manifest: Manifest) -> dict[str, Any] | None:
    """What directions of inputs cost, where the recipe asks for any: other runs are shown without torch."""
    if not manifest.identity.recipe.get("activations", {}).get("directions"):
        return None
    from ..estimate.direction_costs import direction_costs_of_run

    return direction_costs_of_run(run, manifest)


def _inspect_run(run: Path, as_json: bool) -> None:
    manifest = read_manifest(run)
    report = read_report(run) if (run / REPORT).exists() else None
    schemes, directions = _schemes(run, manifest), _directions(run, manifest)
    if as_json:
        found = {"manifest": manifest.to_json(), "report": {} if report is None else report.to_json()}
        found |= {} if schemes is None else {"schemes": schemes}
        found |= {} if directions is None else {"directions": directions}
        typer.echo(json.dumps(found, indent=2))
        return
    print_tables(facts_table("recipe", manifest.identity.recipe), facts_table("versions", manifest.identity.versions))
    if schemes is not None:
        from ..console.plan_table import scheme_table

        print_tables(scheme_table(schemes))
    if directions is not None:
        from ..console.plan_table import directions_table

        print_tables(directions_table(directions))
    if manifest.blocks:
        print_tables(loss_table(manifest.blocks))
    if report is None:
        typer.echo("There is no report: the run is not finished.")
        return
    print_tables(result_table(report), task_table(report), source_table(report), cost_table(report))
    if report.raised_damping:
        print_tables(facts_table("raised damping", report.raised_damping))
