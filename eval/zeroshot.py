"""Zero-shot tasks, by lm-eval: its own tasks by name, or those of a local folder of YAML files.

lm-eval is imported inside the functions: that takes seconds, and most runs have no tasks.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError, RunError
from ..models.tokenizer import named, tokens_beyond

PAPER_TASKS = (
    "arc_challenge",
    "arc_easy",
    "boolq",
    "hellaswag",
    "lambada_openai",
    "openbookqa",
    "piqa",
    "winogrande",
)
"""The eight tasks of the BoA paper."""

FEWSHOT_SEED = 1234
METRICS = ("acc_norm", "acc")
"""What is reported of a task, the first that it has: QuaRot's choice, and what others of the field do."""


class Ranks(Protocol):
    """Processes that share the items of tasks."""

    rank: int
    size: int

    def tick(self) -> None:
        """Say that this one is at work."""


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data, ready for any number of models.

    Attributes:
        names: of the tasks and groups to report.
        loaded: lm-eval's, as its `TaskManager.load` gives them.
    """

    names: tuple[str, ...]
    loaded: Any


@dataclass(frozen=True)
class Score:
    """What a model reaches on a task.

    Attributes:
        metric: name of the metric; accuracies are parts of one.
        value: its mean over the items.
        stderr: standard error of that mean; None where lm-eval gives none.
    """

    metric: str
    value: float
    stderr: float | None


def task_names(folder: Path) -> list[str]:
    """The tasks that a folder of YAML files describes.

    Raises:
        InputError: it is no folder, its files cannot be read, or there are none of tasks.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder of tasks {folder}: check the path.")
    with _quiet():
        names: list[str] = _index([folder], defaults=False).all_subtasks
    if not names:
        raise InputError(f"{folder} holds no task: an lm-eval task is a YAML file with the field `task`.")
    return names


def load_tasks(names: Sequence[str], folders: Sequence[Path] = ()) -> Tasks:
    """Tasks, groups and tags of lm-eval, with their data: what `zero_shot` takes.

    Args:
        names: tasks, groups or tags, of lm-eval or of `folders`.
        folders: hold YAML files of tasks. Functions that they name with `!function` are run.

    Raises:
        InputError: a task is unknown, its data cannot be had, or lm-eval is not installed.
    """
    with _quiet():
        manager = _index(folders, defaults=False)
        if not set(names) <= set(manager.all_tasks):  # lm-eval's own are thousands of files, which take a while
            manager = _index(folders, defaults=True)
        for name in names:
            if name not in manager.all_tasks:
                close = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = f"perhaps {' or '.join(close)}" if close else "`lm-eval ls tasks` lists lm-eval's"
                raise InputError(f"there is no task '{name}' ({hint}): give another name, or the folder that has it.")
        parts = [part for name in names for part in _load(manager, name)]
        try:
            loaded = manager.load(parts)
        except ValueError as error:
            raise InputError(f"two of {', '.join(names)} hold the same task ({_first_line(error)}).") from error
        for task in loaded["tasks"].values():  # the defaults of lm-eval's own command
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return Tasks(tuple(_name(part) for part in parts), loaded)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch: int = 8,
    ranks: Ranks | None = None,
    bos: bool = False,
) -> dict[str, Score]:
    """What a model reaches on tasks, without examples in its prompt but those that a task itself has.

    Args:
        model: on the device to compute on.
        tokenizer: the model's.
        tasks: of `load_tasks`; they can be used again with another model.
        limit: items of each task, from the first; None: all.
        batch: sequences computed at a time.
        ranks: processes of torch.distributed that call this together; lm-eval gives each its part of the items.
        bos: begin every prompt with BOS, once; else as the tokenizer does by itself.

    Returns:
        A score for each task, by its name; a group has one where lm-eval aggregates it, else each of its tasks has.
        Of several ranks only the first gets them.

    Raises:
        RunError: a task has a token that the model has no embedding for.
    """
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        if bos:
            tokenizer = _with_bos(tokenizer)
        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, add_bos_token=bos or None)
        if ranks is not None and ranks.size > 1:
            _share(runner, ranks)
        # Not simple_evaluate, whose rest gathers facts about the machine and its packages: a minute on a slow one.
        with _only_known_tokens(model, tokenizer):
            found = lm_eval.evaluate(runner, task_dict=tasks.loaded, limit=limit, log_samples=False)
    if found is None:
        return {}  # they are on the first process
    results = {name: score for name, entry in found["results"].items() if (score := _score(entry)) is not None}
    scores: dict[str, Score] = {}
    for name in tasks.names:
        group = tasks.loaded.get("groups", {}).get(name)
        members = [] if group is None or name in results else [task.task_name for task in group.get_all_tasks()]
        scores |= {part: results[part] for part in members or [name] if part in results}
    return scores


def _with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself where it begins text with BOS, else a copy that does: lm-eval leaves this to it."""
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return tokenizer
    other = copy.deepcopy(tokenizer)
    other.add_bos_token = True
    return other


@contextlib.contextmanager
def _only_known_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Look at the tokens that a model is given, where its tokenizer has some that it has no embedding for."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    if not tokens_beyond(tokenizer, vocabulary):
        yield
        return

    def check(_: Any, arguments: tuple[Any, ...]) -> None:
        if (largest := int(arguments[0].max())) >= vocabulary:
            raise RunError(
                f"a task has the token {named(tokenizer, largest)}, and the model's vocabulary ends at "
                f"{vocabulary - 1}: use the tokenizer that belongs to the model, or another task."
            )

    handle = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _share(runner: Any, ranks: Ranks) -> None:
    """Make a model of lm-eval one of several that its data-parallel evaluation gives items to.

    lm-eval shards by the rank that the model has, and gathers through accelerate, which finds the processes of
    torch.distributed as they are. What it gathers of a rank are lists of numbers.
    """
    from accelerate import Accelerator

    runner.accelerator = Accelerator(cpu=runner.device.type == "cpu")
    runner._rank, runner._world_size = ranks.rank, ranks.size
    model = runner.model
    model.register_forward_pre_hook(lambda *_: ranks.tick())


def average(scores: Sequence[Score]) -> Score | None:
    """Mean of accuracies, as tables of papers have it; None where there are fewer than two, or other metrics."""
    if len(scores) < 2 or any(score.metric not in METRICS for score in scores):
        return None
    errors = [score.stderr for score in scores]
    known = [error for error in errors if error is not None]
    stderr = sum(error**2 for error in known) ** 0.5 / len(errors) if len(known) == len(errors) else None
    return Score("average", sum(score.value for score in scores) / len(scores), stderr)


def _index(folders: Sequence[Path], *, defaults: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"zero-shot tasks need lm-eval, which cannot be imported ({error}): pip install 'lm-eval[hf]'."
        ) from error
    try:
        return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=defaults)
    except Exception as error:  # whatever is wrong with somebody's YAML
        where = ", ".join(str(folder) for folder in folders)
        raise InputError(f"the tasks in {where} cannot be read ({_first_line(error)}): correct their YAML.") from error


def _load(manager: Any, name: str) -> list[Any]:
    """The task or group of a name, or the tasks of a tag."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # data sets are had by way of many libraries, with as many kinds of errors
        raise InputError(
            f"the data of task {name} could not be had ({_first_line(error)}): check the connection and the task, or "
            "give a task with local data."
        ) from error
    group = loaded.get("groups", {}).get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _name(part: Any) -> str:
    return str(part.name if hasattr(part, "get_all_tasks") else part.task_name)


def _score(entry: dict[str, Any]) -> Score | None:
    """The metric to report of lm-eval's results for a task, whose keys are 'metric,filter'."""
    values = {
        key.partition(",")[0]: (key, value)
        for key, value in reversed(entry.items())  # the first filter counts, where there are several
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    metric = next((name for name in METRICS if name in values), next(reversed(values), None))
    if metric is None:
        return None
    key, value = values[metric]
    stderr = entry.get(key.replace(",", "_stderr,", 1))
    return Score(metric, float(value), float(stderr) if isinstance(stderr, int | float) else None)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's bars, notes and warnings; its errors pass."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
