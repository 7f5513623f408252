"""The command line. Slow imports (torch, transformers) are inside the commands, so that help is quick."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .cli_command import Command
from .cli_exports import export, verify
from .cli_inspect import inspect
from .cli_lists import models, recipes
from .cli_quantize import quantize
from .cli_runs import compare, evaluate, report

app = typer.Typer(
    help="Large language models to 4 and 2 bits: Hadamard rotations and attention-aware error compensation.",
    epilog="Start with `rotoboa quantize`: it quantizes and measures the embedded model, without a download.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help cuts long option names off at 80 columns
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rotoboa {version('rotoboa')}")
        raise typer.Exit()


@app.callback()
def _global_options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where to compute, such as cpu or cuda:1. (default cuda, else cpu)")
]
_RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help=f"A name (see `rotoboa recipes`) or file. (default {DEFAULT_RECIPE})",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def _recipe_options() -> dict[str, inspect.Parameter]:
    """An option for each field of Recipe, by its dotted name; without it the field is as the recipe says."""
    options = {}
    for field in field_paths():
        section = field.name.rpartition(".")[0]
        kind = next(part for part in (*get_args(field.annotation), field.annotation) if part is not NoneType)
        flag = field.annotation is bool
        if get_origin(field.annotation) is Literal:
            metavar = "|".join(get_args(field.annotation))
        else:
            metavar = {int: "INT", float: "FLOAT", Path: "DIR"}.get(kind, "TEXT")
        option = typer.Option(
            None,
            f"--{field.name}/--no-{field.name}" if flag else f"--{field.name}",
            help=field.description,
            metavar=None if flag else metavar,
            show_default=False,
            rich_help_panel=(SECTIONS[section].__doc__ or "").rstrip(".") if section else None,
        )
        options[field.name] = inspect.Parameter(
            field.name.replace(".", "__"),
            inspect.Parameter.KEYWORD_ONLY,
            default=option,
            # Values stay text here: Recipe alone reads and checks them, for YAML and command line alike.
            annotation=bool | None if flag else str | None,
        )
    return options


RECIPE_OPTIONS = _recipe_options()


def _overrides(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that were given as options, by their dotted names."""
    names = {parameter.name: name for name, parameter in RECIPE_OPTIONS.items()}
    return {names[key]: value for key, value in given.items() if value is not None}


def _quantize(*, recipe: str | None, resume: Path | None, device: str | None, quiet: bool, **given: Any) -> None:
    """Quantize a model and measure its perplexity.

    A recipe says how; each option below replaces one of its fields. The defaults are for where the recipe is silent.
    A run that was interrupted goes on when the same command is given again, or by --resume.
    """
    if resume is not None:
        run = _resumed(resume, recipe, _overrides(given))
    else:
        recipe = recipe or DEFAULT_RECIPE
        run = build_recipe(load_recipe(recipe), _overrides(given))
        if run.output is None:
            model = Path(run.model).name or Path(run.model).resolve().name or "model"
            run = run.model_copy(update={"output": Path("runs") / f"{model}-{Path(recipe).stem}"})

    from . import stages

    with Progress(quiet=quiet or launch.rank() > 0) as progress:
        report = stages.quantize(run, device=device, progress=progress)
    if launch.rank() > 0:
        return
    _print(result_table(report), task_table(report), cost_table(report))
    typer.echo(f"The run is in {run.output}")


def _resumed(run: Path, recipe: str | None, overrides: dict[str, Any]) -> Recipe:
    """The recipe of an unfinished run; InputError where options ask for another one."""
    if recipe is not None:
        raise InputError(f"--resume takes the recipe of {run}: leave out --recipe, or leave out --resume.")
    manifest = _read_json(run, "manifest.json")

    from ..models.aliases import resolves_to_folder
    from .run import recipe_of

    kept = recipe_of(run).model_copy(update={"output": run})
    folder = manifest.get("checkpoint_folder")
    if folder is not None and not resolves_to_folder(kept.model):
        raise InputError(
            f"the model of {run} is the folder '{kept.model}', which is not there from here (it was {folder}): "
            "resume where the run was started, or bring the folder back."
        )
    wanted = build_recipe(kept.model_dump(mode="json"), overrides)
    changed = sorted(name for name in overrides if name not in FREE and value_of(kept, name) != value_of(wanted, name))
    if changed:
        raise InputError(
            f"--resume goes on with the recipe of {run}, which has another {', '.join(changed)}: leave "
            f"{'it' if len(changed) == 1 else 'them'} out, or start a new run in another --output."
        )
    return wanted


def _quantize_signature() -> inspect.Signature:
    resume = Annotated[
        Path | None,
        typer.Option("--resume", metavar="RUN", help="Go on with the unfinished run in this folder, by its recipe."),
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter("recipe", keyword, default=None, annotation=_RecipeName),
            inspect.Parameter("resume", keyword, default=None, annotation=resume),
            *RECIPE_OPTIONS.values(),
            inspect.Parameter("device", keyword, default=None, annotation=Device),
            inspect.Parameter("quiet", keyword, default=False, annotation=Quiet),
        ]
    )


_quantize.__signature__ = _quantize_signature()  # type: ignore[attr-defined]
_quantize.__annotations__ = {}  # typer would read the annotations above in place of the signature's
app.command("quantize", cls=_Command)(_quantize)


Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN", show_default=False)]


@app.command(cls=_Command)
def evaluate(
    run: Run,
    dataset: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Data sets, with commas. (default those of the run)")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, metavar="INT", help="Windows of text. (default as in the run)")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, metavar="INT", help="Tokens of a window. (default as in the run)")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Zero-shot tasks by lm-eval's names, with commas; 'default': the eight of the BoA paper, or the three "
            "of the embedded model. Text is then measured only where --dataset is given.",
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of task files that --tasks may name; else all of them.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="INT", help="Items of a task. (default all)")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="INT", help="Sequences of a task at a time.")] = 8,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Measure a finished run again: perplexity and divergence from full precision on texts, or zero-shot tasks."""
    _read_json(run, "manifest.json")

    from . import evaluating

    with Progress(quiet=quiet or launch.rank() > 0) as progress:
        report = evaluating.evaluate(
            run,
            dataset=dataset,
            windows=windows,
            sequence_length=sequence_length,
            tasks=tasks,
            tasks_path=tasks_path,
            limit=limit,
            batch=batch_size,
            device=device,
            progress=progress,
        )
    if launch.rank() > 0:
        return
    _print(result_table(report), task_table(report))


def _inspect(
    *,
    subject: str,
    recipe: str | None,
    device: str | None,
    gpus: int | None,
    gpu: str,
    network: str,
    tf32: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what a run is, or what a run of a model would be, before any work.

    Of a run: recipe, versions, sizes, loss of each layer, perplexity. Of a model, by a recipe and the options below:
    parameters, rotations, bytes before and after, calibration, memory and time; with --gpus also an estimate for so
    many GPUs, from their published rates.
    """
    if (Path(subject) / "manifest.json").is_file():
        if recipe is not None or _overrides(given) or device is not None or gpus is not None:
            raise InputError(f"{subject} is a run, which has its recipe: leave out the other options.")
        _inspect_run(Path(subject), as_json)
        return
    if given.get("model") is not None:
        raise InputError("the model is given twice: leave out --model.")
    wanted = build_recipe(load_recipe(recipe or DEFAULT_RECIPE), {**_overrides(given), "model": subject})

    from .plan import Cluster, plan
    from .plan_table import plan_tables

    found = plan(wanted, device, None if gpus is None else Cluster(gpus, gpu, network, tf32))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(*plan_tables(found))


def _inspect_signature() -> inspect.Signature:
    subject = Annotated[
        str, typer.Argument(help="Folder of a run, or a model as for --model.", metavar="RUN|MODEL", show_default=False)
    ]
    as_json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
    several = {
        "gpus": (None, int | None, typer.Option(min=1, metavar="INT", help="Estimate a run on so many GPUs too.")),
        "gpu": ("h100", str, typer.Option(metavar="NAME", help="a100, h100, h200, b200 or l40s. (default h100)")),
        "network": (
            "ndr",
            str,
            typer.Option(
                metavar="NAME",
                help="Between nodes of eight: ndr, hdr, ethernet-100, ethernet-25 or ethernet-10. (default ndr)",
            ),
        ),
        "tf32": (False, bool, typer.Option("--tf32", help="Estimate matrix products in TF32.")),
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter("subject", keyword, annotation=subject),
            inspect.Parameter("recipe", keyword, default=None, annotation=_RecipeName),
            *RECIPE_OPTIONS.values(),
            inspect.Parameter("device", keyword, default=None, annotation=Device),
            *(
                inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, option])
                for name, (default, kind, option) in several.items()
            ),
            inspect.Parameter("as_json", keyword, default=False, annotation=as_json),
        ]
    )


_inspect.__signature__ = _inspect_signature()  # type: ignore[attr-defined]
_inspect.__annotations__ = {}
app.command("inspect", cls=_Command)(_inspect)


def _inspect_run(run: Path, as_json: bool) -> None:
    manifest = _read_json(run, "manifest.json")
    report = _read_json(run, "report.json") if (run / "report.json").exists() else {}
    if as_json:
        typer.echo(json.dumps({"manifest": manifest, "report": report}, indent=2))
        return
    facts = {**report, **(manifest.get("identity") or {})}
    for key in ("recipe", "versions"):
        value = facts.get(key)
        if value is not None:
            _print(_facts(key, value))
    if manifest.get("blocks"):
        _print(loss_table(manifest["blocks"]))
    if not report:
        typer.echo("There is no report: the run is not finished.")
        return
    _print(result_table(report), task_table(report), cost_table(report))
    if raised := report.get("raised_damping"):
        _print(_facts("raised damping", raised))


@app.command(cls=_Command)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN...", show_default=False)],
    form: Annotated[
        Literal["markdown", "csv", "json"] | None,
        typer.Option("--format", metavar="markdown|csv|json", help="(default by --output's name, else markdown)"),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a file. (default to the screen)")] = None,
) -> None:
    """Compare runs in one table: bits, size, perplexities, tasks, seconds, memory.

    What makes a run's figures others than those of the first, another model or text, is in its notes.
    """
    from .compare import comparison, format_of, render
    from .files import read_report

    form = form or format_of(output)
    text = render(comparison([(run, read_report(run)) for run in runs]), form)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): give another --output.") from error


@app.command(cls=_Command)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN...", show_default=False)],
) -> None:
    """Make report.html of each run again, beside the other runs given, or beside those in the same folder.

    What has changed since: other runs, or their figures. What a run measured of itself stays as it is.
    """
    from .pages import siblings, write_page

    for run in runs:
        others = [other for other in runs if other.resolve() != run.resolve()] or siblings(run)
        typer.echo(write_page(run, others))


@app.command(cls=_Command)
def models() -> None:
    """List the short names of models. Any folder with a checkpoint or Hugging Face id works as well."""
    from ..models.aliases import ALIASES

    table = Table("name", "source", "data set", "sequence length")
    for alias in ALIASES:
        source = "embedded, no download" if Path(alias.source).is_absolute() else alias.source
        table.add_row(alias.name, source, alias.dataset, str(alias.sequence_length))
    _print(table)


@app.command(cls=_Command)
def recipes() -> None:
    """List the recipes that come with the package. Any YAML file with the same fields works as well."""
    table = Table("name", "what it is for")
    for name in recipe_names():
        table.add_row(name, recipe_text(name).partition("\n")[0].lstrip("# "))
    _print(table)


def _print(*tables: Table) -> None:
    """Prints tables; as wide as they need where the output is a file or a pipe, which has no width."""
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    for table in tables:
        if table.rows:
            console.print(table)


def _facts(title: str, value: Any) -> Table:
    """A table of names and values; nested mappings get dotted names."""
    table = Table(title=title.capitalize(), title_justify="left", show_header=False)

    def add(name: str, item: Any) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                add(f"{name}.{key}" if name else str(key), inner)
        else:
            table.add_row(name or title, Text("none" if item is None else str(item)))

    add("", value)
    return table


def main() -> None:
    """Entry point of the command `rotoboa`."""
    app(prog_name="rotoboa")
