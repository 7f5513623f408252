"""The texts of a run as tokens: those of its recipe, else the default of its model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import InputError
from ...models.aliases import ResolvedModel
from .calibration import PAPER_WINDOWS, Split, calibration_tokens, evaluation_tokens, load_texts
from .job import Job


def dataset_of(given: str | None, model: ResolvedModel, option: str) -> str:
    """The text that was given, else the model's default; `option` is where the user would give it.

    Raises:
        InputError: the model has no default.
    """
    dataset = given or model.dataset
    if dataset is None:
        raise InputError(
            f"{model.name} is a local folder, which has no default text: "
            f"give {option} wikitext2 (a download), or a text file."
        )
    return dataset


def evaluation_sets(given: Sequence[str] | None, model: ResolvedModel, option: str) -> tuple[str, ...]:
    """The texts that were given, else the model's default alone; errors as of `dataset_of`."""
    return tuple(given) if given else (dataset_of(None, model, option),)


def calibration_windows(job: Job, dataset: str, length: int) -> Tensor:
    """(samples, length) tokens, by the recipe's number and seed."""
    chosen = job.recipe.calibration
    texts, vocabulary = load_texts(dataset, "calibration"), job.decoder.shape.vocabulary
    return calibration_tokens(job.tokenizer, texts, chosen.samples, length, chosen.seed, vocabulary, bos=job.bos)


def evaluation_windows(job: Job, dataset: str, split: Split, length: int, windows: int | None) -> Tensor:
    """(windows, length) tokens; `windows` None is the model's default number, else that of the papers."""
    texts = load_texts(dataset, split)
    limit = windows or job.model.windows or PAPER_WINDOWS.get(dataset)
    return evaluation_tokens(job.tokenizer, texts, length, limit, job.decoder.shape.vocabulary, bos=job.bos)
