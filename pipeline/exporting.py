"""Writes a finished run in another format, with all that a hub repository needs, and uploads it."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..errors import InputError, RunError
from ..export.finished import Finished
from ..export.formats import compressed_tensors, gguf, gptq, mlx
from ..export.formats.card import licence_of, write_card
from ..export.formats.card_facts import Base, Figures
from ..export.record import RECORD, digest, write_record
from ..export.scheme_layers import divided, scheme_layers
from ..export.spec import METHOD
from ..export.writing import SHARD_BYTES, write_checkpoint
from ..models.aliases import HUB_ID, resolve_model
from ..models.seeing.whole_model import auto_class
from .recipe.recipe import Recipe
from .recipe.recipe_files import recipe_to_yaml
from .storage.atomic import write_json, write_text
from .storage.files import REPORT, read_report
from .storage.run_folder import RunFolder, recipe_of
from .storage.run_report import Report
from .storage.run_writer import RECIPE

logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """How a format is checked and written; `check` raises InputError where it cannot hold a run, `warning` is what a
    user should know of an export.
    """

    check: Callable[[Finished], None]
    write: Callable[..., None]
    warning: Callable[[Finished], str | None] = lambda run: None


def _write_native(run: Finished, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    config = {**run.config, "quantization_config": {"quant_method": METHOD, **run.spec.to_dict()}}
    write_checkpoint(folder, run.folder, config, run.groups(), shard_bytes=shard_bytes)


FORMATS: Mapping[str, Format] = {
    "native": Format(lambda run: None, _write_native),
    "compressed-tensors": Format(compressed_tensors.check, compressed_tensors.write, compressed_tensors.warning),
    "gptq": Format(gptq.check, gptq.write, gptq.warning),
    "gptq-v1": Format(partial(gptq.check, version=gptq.V1), partial(gptq.write, version=gptq.V1), gptq.warning),
    "gguf": Format(gguf.check, gguf.write, gguf.warning),
    "mlx": Format(mlx.check, mlx.write, mlx.warning),
}


def export(
    run: Path,
    format_name: str,
    *,
    output: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    push: str | None = None,
) -> Path:
    """Write a finished run in a format, without quantizing again; returns the folder.

    Args:
        run: folder of the run.
        format_name: a key of `FORMATS`.
        output: the folder to write, appearing whole or not at all; None is RUN/exports/FORMAT. An export that is there
            already is replaced, anything else is not.
        shard_bytes: the most bytes of a tensor file.
        push: hub repository to upload to, made where it is missing.

    Raises:
        InputError: the run is not finished, the format cannot hold it, or the output is something else.
        RunError: the upload failed; the export is kept.
    """
    if format_name not in FORMATS:
        raise InputError(f"there is no format '{format_name}': use one of {', '.join(FORMATS)}.")
    if push is not None:
        _check_push(push)
    folder = RunFolder.open(run)
    finished = open_finished(folder)
    FORMATS[format_name].check(finished)
    target = output or run / "exports" / format_name
    if target.exists() and not (target / RECORD).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is no export of rotoboa: give another --output.")
    temporary = target.absolute().parent / f".{target.absolute().name}.tmp"
    try:
        FORMATS[format_name].write(finished, temporary, shard_bytes=shard_bytes)
        describe(folder, finished, format_name, temporary, target)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
        if warned := FORMATS[format_name].warning(finished):
            logger.warning("%s", warned)
    except OSError as error:
        what = error.strerror or str(error)
        raise InputError(f"{target} cannot be written ({what}): make room, or give another --output.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if push is not None:
        upload(target, push)
    return target


def open_finished(folder: RunFolder) -> Finished:
    """A run as exports read it."""
    blocks = [folder.block_path(index) for index in range(len(folder.manifest.blocks))]
    return Finished.open(folder.path / "model", blocks)


def blocks_digest(folder: RunFolder) -> str:
    """Which run it is, by the checksums of its blocks."""
    return digest([entry.sha256 for entry in folder.manifest.blocks])


def describe(folder: RunFolder, finished: Finished, format_name: str, where: Path, final: Path) -> None:
    """Write model card, recipe, report and export.json into `where`, which will be at `final`."""
    recipe = _public(recipe_of(folder.path))
    report = read_report(folder.path)
    base = report.base or Base(recipe.model, False, None)
    public, yaml = _public_report(report, recipe, base), recipe_to_yaml(recipe)
    write_text(where / RECIPE, yaml)
    write_json(where / REPORT, public)
    weights = sorted((*where.glob("*.safetensors"), *where.glob("*.gguf")))
    files = {file.name: file.stat().st_size for file in weights}
    figures = Figures(public["perplexity"], public["tokens"]["evaluation"], report.bos, report.sizes.original)
    layers = scheme_layers(finished)
    split = divided(finished)
    told: dict[str, Any] = {"layers": layers, "divided": split, "loader": auto_class(finished.family).__name__}
    write_card(where, format_name, finished.spec, figures, yaml, base=base, files=files, **told)
    write_record(where, format_name, folder.path, final, blocks_digest(folder))


def base_of(name: str, checkpoint: Path) -> Base:
    """What a model card says of the base model: hub id or name, and its licence."""
    model = resolve_model(name)
    called = Path(name).name or name if model.is_local else model.source
    return Base(called, not model.is_local, licence_of(checkpoint))


def _public(recipe: Recipe) -> Recipe:
    """A recipe without the paths of the machine that ran it: local folders and files become their names."""
    calibration, evaluation = recipe.calibration, recipe.evaluation
    sections = {
        "calibration": calibration.model_copy(update={"dataset": calibration.dataset and _name(calibration.dataset)}),
        "evaluation": evaluation.model_copy(
            update={"dataset": evaluation.dataset and tuple(map(_name, evaluation.dataset))}
        ),
    }
    return recipe.model_copy(update={"model": _name(recipe.model), "output": None, **sections})


def _name(value: str) -> str:
    """The last part of a path; other names, hub ids among them, as they are."""
    return value if HUB_ID.fullmatch(value) and not Path(value).exists() else Path(value).name or value


def _public_report(report: Report, recipe: Recipe, base: Base) -> dict[str, Any]:
    """What a report says of the model, without the machine that made it: no times, no memory, no paths."""
    found = report.to_json()
    public: dict[str, Any] = {key: found[key] for key in ("sizes", "versions", "seeds", "bos") if key in found}
    measured = {
        key: {_name(dataset): values for dataset, values in found.get(key, {}).items()}
        for key in ("perplexity", "divergence")
    }
    tokens = dict(found.get("tokens", {}))
    tokens["evaluation"] = {_name(dataset): shape for dataset, shape in tokens.get("evaluation", {}).items()}
    return {"base": asdict(base), **measured, "tokens": tokens, **public, "recipe": recipe.model_dump(mode="json")}


def shard_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 300KB.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMG".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise InputError(f"--shard-size is {text} but must be a size such as 5GB or 500MB.")
    return size


def _check_push(repository: str) -> None:
    if not HUB_ID.fullmatch(repository):
        raise InputError(f"--push is {repository} but must be a hub repository, owner/name.")
    if huggingface_hub.get_token() is None:
        raise InputError("--push needs a token that may write: set HF_TOKEN or run `hf auth login`.")


def upload(folder: Path, repository: str) -> None:
    """Upload a folder to a hub repository, made where it is missing.

    Raises:
        RunError: the hub refused it or is out of reach.
    """
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a model quantized with RotoBoA"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise RunError(f"{folder} is written, but {repository} did not take it ({what}): push it again.") from error
