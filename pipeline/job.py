"""A job: everything that a run stands on, resolved and checked before any long work."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..boa.attention import NAME
from ..boa.ranks import Ranks
from ..boa.rounding import Settings
from ..errors import InputError
from ..export.checkpoint import copied_files
from ..export.spec import Spec
from ..models.aliases import ResolvedModel, resolve_model
from ..models.checkpoint import Checkpoint, fetch
from ..models.decoder import Decoder
from ..models.shape import Shape
from ..rotation.channels import SITES, obstacle
from ..rotation.rotate import Rotations
from . import launch
from .buffers import Buffers
from .calibration import PAPER_WINDOWS, Split, evaluation_tokens, load_texts
from .distributed import device_name
from .progress import Progress
from .recipe import Recipe
from .run import checksum, device_of

VERSIONED = ("rotoboa", "torch", "transformers", "safetensors", "tokenizers", "numpy")
LONG_READ = 2**31  # bytes that take long enough to be shown


@dataclass
class Job:
    """Everything that a run stands on, checked before any long work."""

    recipe: Recipe
    model: ResolvedModel
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    rotations: Rotations
    spec: Spec
    buffers: Buffers
    ranks: Ranks = field(default_factory=Ranks)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    _running: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """Of the rounding, as the recipe has them."""
        return settings_of(self.recipe)

    @property
    def notices(self) -> list[str]:
        """What a user should know of how the recipe was carried out, a sentence each."""
        if not self.rotations.online_r1:
            return []
        return [
            f"The norms after attention and MLP of {self.decoder.family.model_type} keep R1 from being folded into the "
            "weights: it runs as a Hadamard transform at the inputs of q, k, v, gate and up."
        ]

    def release(self) -> None:
        """Called after each batch: what lies in files need not stay in memory, and this rank is at work."""
        self.buffers.release()
        self.ranks.tick()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a stage to `seconds`."""
        self._running[stage] = time.perf_counter()
        try:
            yield
        finally:
            if self.decoder.device.type == "cuda":
                torch.cuda.synchronize(self.decoder.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - self._running.pop(stage)

    def go_on(self, seconds: Mapping[str, float]) -> None:
        """Count on from what earlier parts of the run have spent, as `spent` gave it."""
        earlier = dict(seconds)
        self.started -= earlier.pop("total", 0.0)
        self.seconds = {name: earlier.get(name, 0.0) + self.seconds.get(name, 0.0) for name in earlier | self.seconds}

    def spent(self) -> dict[str, float]:
        """Seconds by stage, those of the running ones up to now, and in total."""
        now = time.perf_counter()
        running = {name: self.seconds.get(name, 0.0) + now - start for name, start in self._running.items()}
        return {**self.seconds, **running, "total": now - self.started}


def settings_of(recipe: Recipe) -> Settings:
    """Of the rounding, as a recipe has them."""
    grid = recipe.weights.grid
    if grid == "auto":
        grid = "diagonal" if recipe.rotation.r1 else "hessian"
    fields = recipe.weights.model_dump(exclude={"head", "grid", "zfold"})
    return Settings(**fields, grid=grid, zfold=recipe.weights.zfold or ())


def prepare(recipe: Recipe, device: str | None = None, ranks: Ranks | None = None) -> Job:
    """Resolve and check a recipe; `ranks` are those that the run is shared by.

    Raises:
        InputError: the model, its files, the sizes or the device do not fit the recipe.
    """
    target = device_of(device_name(device))
    model = resolve_model(recipe.model)
    checkpoint = Checkpoint(fetch(model.source, model.is_local))
    decoder = Decoder(checkpoint.config, attention=NAME, device=target)
    checkpoint.check(decoder.shapes)
    check_sizes(recipe, decoder, model)
    if recipe.weights.method == "brecq" and ranks is not None and ranks.size > 1:
        raise InputError("weights.method brecq learns a block in one process: start it without torchrun.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint.folder} has no tokenizer that can be read: copy its files there.") from error
    rotation = recipe.rotation
    rotations = Rotations.of(
        decoder.shape,
        r1=rotation.r1,
        r2=rotation.r2,
        r3=rotation.r3,
        r4=rotation.r4,
        r4_blocks=rotation.r4_blocks,
        seed=rotation.seed,
        online_r1=decoder.family.post_norms,
    )
    spec = Spec(
        bits=recipe.weights.bits,
        group_size=recipe.weights.group_size,
        symmetric=recipe.weights.symmetric,
        r1=rotation.r1,
        r2=rotation.r2,
        r3=rotation.r3,
        r4=rotation.r4,
        r4_blocks=rotation.r4_blocks,
        activation_bits=recipe.activations.bits,
        activation_symmetric=recipe.activations.symmetric,
        activation_clip=recipe.activations.clip,
        key_bits=recipe.cache.key_bits,
        value_bits=recipe.cache.value_bits,
        cache_clip=recipe.cache.clip,
        online_r1=rotations.online_r1,
    )
    buffers = Buffers(recipe.output or Path(tempfile.gettempdir()), recipe.memory, target, launch.local_world())
    return Job(recipe, model, checkpoint, tokenizer, decoder, rotations, spec, buffers, ranks or Ranks())


def check_sizes(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    """Check that the sizes of a recipe and of a model go together.

    Raises:
        InputError: they do not.
    """
    shape, group = decoder.shape, recipe.weights.group_size
    widths = {"hidden size": shape.hidden, "attention width": shape.query_heads * shape.head_dim, "ffn size": shape.ffn}
    for name, width in widths.items():
        if group and width % group:
            fitting = [g for g in (32, 64, 128, 16, 8) if all(w % g == 0 for w in widths.values())]
            hint = f"one of {', '.join(map(str, fitting))}" if fitting else "none (one scale per channel)"
            raise InputError(
                f"weights.group_size {group} does not divide the {name} {width} of {model.name}: give {hint}."
            )
    check_length(length_of(recipe, model, decoder), decoder, model, "calibration.sequence_length")
    check_zfold(recipe, decoder, model)


def check_zfold(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    """Check that there is a layer to take the channel scales of every site that weights.zfold names.

    Raises:
        InputError: there is none, or the method has no objective to find them by.
    """
    sites, rotation = recipe.weights.zfold or (), recipe.rotation
    if sites and recipe.weights.method == "rtn":
        raise InputError("weights.zfold finds its scales by an objective, and method rtn has none: choose another.")
    reasons = {site: obstacle(decoder.family, decoder.config, site, r1=rotation.r1, r4=rotation.r4) for site in SITES}
    stopped = {site: reasons[site] for site in sites if reasons[site]}
    if stopped:
        can = ",".join(site for site in sites if site not in stopped)
        change = [f"turn rotation.{r} off" for r in ("r1", "r4") if any(r.upper() in why for why in stopped.values())]
        change.append(f"give --weights.zfold {can}" if can else "leave weights.zfold out")
        raise InputError(
            f"weights.zfold: nothing before {' and '.join(stopped)} of {model.name} can take a scale a channel, since "
            f"{' and '.join(stopped.values())}: {' or '.join(change)}."
        )


def check_length(length: int, decoder: Decoder, model: ResolvedModel, option: str) -> None:
    """Check that a model has `length` positions; `option` is what the user would change.

    Raises:
        InputError: it has fewer.
    """
    most = getattr(decoder.config, "max_position_embeddings", None)
    if most and length > most:
        raise InputError(f"{option} {length} is more than the {most} positions of {model.name}: give at most {most}.")


def length_of(recipe: Recipe, model: ResolvedModel, decoder: Decoder) -> int:
    """The recipe's sequence length, else the model's default, cut to the positions that it has."""
    if recipe.calibration.sequence_length:
        return recipe.calibration.sequence_length
    most = getattr(decoder.config, "max_position_embeddings", None) or model.sequence_length
    return min(model.sequence_length, most)


def dataset_of(given: str | None, model: ResolvedModel, option: str) -> str:
    """The text that was given, else the model's default; `option` is where the user would give it.

    Raises:
        InputError: the model has no default.
    """
    dataset = given or model.dataset
    if dataset is None:
        raise InputError(
            f"{model.name} is a local folder, which has no default text: "
            f"give {option} wikitext2 (a download), or a .txt or .jsonl file."
        )
    return dataset


def evaluation_sets(given: Sequence[str] | None, model: ResolvedModel, option: str) -> tuple[str, ...]:
    """The texts that were given, else the model's default alone; errors as of `dataset_of`."""
    return tuple(given) if given else (dataset_of(None, model, option),)


def evaluation_windows(job: Job, dataset: str, split: Split, length: int, windows: int | None) -> Tensor:
    """(windows, length) tokens; `windows` None is the model's default number, else that of the papers."""
    texts = load_texts(dataset, split)
    limit = windows or job.model.windows or PAPER_WINDOWS.get(dataset)
    return evaluation_tokens(job.tokenizer, texts, length, limit, job.decoder.shape.vocabulary)


def identity(job: Job) -> dict[str, Any]:
    """What must be the same for a run to go on and is known at once: the recipe, and the versions that compute."""
    return {
        "recipe": job.recipe.model_dump(mode="json", exclude={"output"}),
        "versions": {name: version(name) for name in VERSIONED},
    }


def checkpoint_checksums(job: Job, known: Mapping[str, Any], progress: Progress) -> dict[str, dict[str, Any]]:
    """For each file of the checkpoint that has a part in the result its SHA-256, and by what it is known unchanged.

    `known` is what this returned for an earlier part of the run: a file with the same size and times is not read again.
    """
    folder = job.checkpoint.folder

    def of(file: Path) -> dict[str, Any]:
        stat = file.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        old = known.get(file.name, {})
        return {"sha256": old["sha256"] if old.get("state") == state else checksum(file), "state": state}

    files = sorted({*job.checkpoint.files, folder / "config.json", *copied_files(folder)})
    found = {}
    if sum(file.stat().st_size for file in files) > LONG_READ:
        progress.stage("checksums", len(files))
    with ThreadPoolExecutor(4) as pool:
        for file, entry in zip(files, pool.map(of, files), strict=True):
            found[file.name] = entry
            progress.advance()
            job.ranks.tick()
    return found


def tokens_checksum(tokens: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def exported_bytes(job: Job) -> int:
    """An upper estimate of the model folder."""
    s = job.decoder.shape
    weights = s.hidden * (2 * s.query_width + 2 * s.key_width + 3 * s.ffn * max(s.experts, 1))
    scales = 3 * weights // (job.spec.group_size or min(s.hidden, s.ffn, s.query_heads * s.head_dim))
    return (
        s.blocks * (weights * job.spec.bits // 8 + scales) + 2 * s.vocabulary * s.hidden * job.checkpoint.dtype.itemsize
    )


def activation_bytes(shape: Shape, tokens: int, method: str) -> dict[str, int]:
    """Bytes of both streams, twice for brecq, and of what a block holds for all tokens at once, in float32."""
    query = shape.query_heads * shape.head_dim
    mlp = 2 * shape.hidden if shape.experts else shape.ffn  # what experts add to both streams; what down is given
    streams = 4 if method == "brecq" else 2
    return {"streams": streams * 4 * tokens * shape.hidden, "block": 4 * tokens * max(2 * query, mlp)}


def spilled_bytes(job: Job, tokens: int) -> int:
    """What lies in files while a run works: activations beyond the budget, embedding and head."""
    shape = job.decoder.shape
    beyond = sum(activation_bytes(shape, tokens, job.recipe.weights.method).values()) - job.buffers.budget
    return max(0, beyond) + 2 * shape.vocabulary * shape.hidden * job.checkpoint.dtype.itemsize
