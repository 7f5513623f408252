"""RotoBoA: large language models to 4 and 2 bits, by rotations and attention-aware error compensation.

    import rotoboa
    report = rotoboa.quantize("w4a16", model="tiny", output="runs/tiny")
    model, tokenizer = rotoboa.load("runs/tiny")

Importing it also registers the native format with transformers: `AutoModelForCausalLM.from_pretrained` then loads it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .pipeline.recipe.recipe import Recipe

__all__ = ["InputError", "Recipe", "RunError", "load", "quantize"]

# The command line loads torch only when a command computes. While `python -m rotoboa` imports this package,
# argv[0] is -m, as it is while `python -m other` imports a package that imports this one.
_PROGRAM = next(iter(sys.argv), "")
_COMMAND_LINE = Path(_PROGRAM).stem == "rotoboa" or (_PROGRAM == "-m" and "rotoboa" in sys.orig_argv)

if not _COMMAND_LINE:
    from .export.formats import native as _native  # noqa: F401  (registers with transformers)


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from .pipeline.recipe.recipe import Recipe

        return Recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def quantize(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    quiet: bool | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Run a recipe from checkpoint to a measured run folder; returns the report.

        rotoboa.quantize("w4a16", model="tiny")                                     # in runs/tiny-w4a16
        rotoboa.quantize(model="tiny", recipe="w2a16", weights={"group_size": 16})  # fields by section
        rotoboa.quantize(rotoboa.Recipe(model="tiny", output="runs/mine"))

    Args:
        recipe: the name of one (`rotoboa recipes` lists them), a .yaml file, or a recipe; None: w4a4kv4.
        device: "cpu", "cuda", ...; None: a GPU where there is one.
        quiet: whether to show no progress; None: it is shown in notebooks and on terminals.
        fields: `model`, `output` and all others of Recipe, which replace the recipe's own.

    Raises:
        InputError: something in the recipe cannot be used; nothing was written.
        RunError: the run failed; finished blocks are kept.
    """
    from .pipeline.recipe.recipe_files import recipe_from

    run = recipe_from(recipe, fields)

    from .pipeline import stages
    from .pipeline.console.progress import Progress, is_watched
    from .pipeline.ranks import launch

    silent = not is_watched() if quiet is None else quiet
    with Progress(quiet=silent or launch.rank() > 0) as progress:
        return stages.quantize(run, device=device, progress=progress).to_json()


def load(path: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a run folder, or of its `model` folder; `options` go to `from_pretrained`.

    Raises:
        InputError: the folder holds no finished model.
    """
    from .export.formats.native import load_native

    return load_native(Path(path), **options)
