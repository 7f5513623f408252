"""The command `quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import InputError
from ..console.progress import Progress, cost_table, result_table, source_table, task_table
from ..ranks import launch
from ..recipe.fields import value_of
from ..recipe.recipe import Recipe
from ..recipe.recipe_files import DEFAULT_RECIPE, build_recipe, default_output, load_recipe
from ..storage.files import read_manifest
from .command import Device, Quiet, print_tables
from .options import RecipeName, overrides, with_recipe_options


@with_recipe_options(after="resume")
def quantize(
    *,
    recipe: RecipeName = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with the unfinished run in this folder, by its recipe."),
    ] = None,
    device: Device = None,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Quantize a model and measure its perplexity.

    A recipe says how; each option below replaces one of its fields. The defaults are for where the recipe is silent.
    A run that was interrupted goes on when the same command is given again, or by --resume.
    """
    if resume is not None:
        run = _resumed(resume, recipe, overrides(given))
    else:
        recipe = recipe or DEFAULT_RECIPE
        run = build_recipe(load_recipe(recipe), overrides(given))
        if run.output is None:
            run = run.model_copy(update={"output": default_output(run.model, recipe)})

    from .. import stages

    with Progress(quiet=quiet or launch.rank() > 0) as progress:
        report = stages.quantize(run, device=device, progress=progress)
    if launch.rank() > 0:
        return
    print_tables(result_table(report), task_table(report), source_table(report), cost_table(report))
    typer.echo(f"The run is in {run.output}")


def _resumed(run: Path, recipe: str | None, changes: dict[str, Any]) -> Recipe:
    """The recipe of an unfinished run; InputError where options ask for another one."""
    if recipe is not None:
        raise InputError(f"--resume takes the recipe of {run}: leave out --recipe, or leave out --resume.")
    folder = read_manifest(run).checkpoint_folder

    from ...models.aliases import resolves_to_folder
    from ..storage.run_folder import recipe_of
    from ..storage.run_writer import SAME_BYTES

    kept = recipe_of(run).model_copy(update={"output": run})
    if folder is not None and not resolves_to_folder(kept.model):
        raise InputError(
            f"the model of {run} is the folder '{kept.model}', which is not there from here (it was {folder}): "
            "resume where the run was started, or bring the folder back."
        )
    wanted = build_recipe(kept.model_dump(mode="json"), changes)
    changed = sorted(
        name
        for name in changes
        if f"recipe.{name}" not in SAME_BYTES and value_of(kept, name) != value_of(wanted, name)
    )
    if changed:
        raise InputError(
            f"--resume goes on with the recipe of {run}, which has another {', '.join(changed)}: leave "
            f"{'it' if len(changed) == 1 else 'them'} out, or start a new run in another --output."
        )
    return wanted
