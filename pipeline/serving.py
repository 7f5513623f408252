"""An export in the runtime that serves it, against its run."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..boa.online.transforms import FOUND
from ..errors import InputError
from ..export.finished import Finished
from ..export.formats import gguf
from ..export.record import check_files, read_record
from ..export.runtimes.ask import DTYPES, RUNTIMES, Answer, ask, interpreter
from ..export.writing import write_checkpoint
from .verifying import run_logits, run_of, sample

CONTROLS = 3.0  # times a dense model's difference: integers and their scales are rounded in other places
WORST = 0.5  # of the logits' standard deviation: what a cache may be off by, though dense weights are off by it too


@dataclass(frozen=True)
class Served:
    """What a runtime computes of an export, beside what its run does.

    Attributes:
        format, runtime: of the export, and the name of what ran it.
        dtype: that it computed in.
        versions: of its packages.
        kernels: the classes that computed the linear layers.
        difference: the largest difference of the log-probability of a token of the prompt.
        control: that of a dense model of the run's weights, in the same runtime and dtype, with its own computation in
            float32; None where online rotations or the format leave none to make.
        cache: bits of keys and of values, where the run follows the runtime's own cache, and it was asked for.
        unquantized: the difference to the run with activations and cache in 16 bits, where it has fewer.
        agreement: share of positions with the same most likely token.
        greedy: share of the tokens it generated that the run finds most likely after the same ones.
        tolerance: the difference that is allowed.
    """

    format: str
    runtime: str
    dtype: str
    versions: dict[str, str]
    kernels: tuple[str, ...]
    difference: float
    control: float | None
    unquantized: float | None
    agreement: float
    greedy: float
    tolerance: float
    cache: tuple[int, int] | None = None

    @property
    def in_16_bits(self) -> bool:
        """Whether it is the run with activations and cache in 16 bits, as near as a dense model is to its own
        computation: the runtime then leaves their quantizers out. Without a dense model, whether it is nearer to that
        than to the run.
        """
        if self.unquantized is None:
            return False
        near = self.difference if self.control is None else max(CONTROLS * self.control, DTYPES[self.dtype])
        return self.unquantized < min(near, self.difference)

    @property
    def passed(self) -> bool:
        """Whether the runtime computes what was measured (NaN is not)."""
        return self.difference <= self.tolerance and not self.in_16_bits


def serve(
    export: Path,
    runtime: str,
    *,
    run: Path | None = None,
    python: Path | None = None,
    dtype: str | None = None,
    tolerance: float | None = None,
    cache: bool = True,
) -> Served:
    """Run an export in a runtime, and compare its log-probabilities with those of its run.

    Args:
        export: folder of an export.
        runtime: a key of `RUNTIMES`.
        run: folder of the run; None is where the export says it was.
        python: the interpreter that has the runtime; None is that of `make runtimes`.
        dtype: in which the runtime computes; None is its usual one.
        tolerance: the largest difference allowed; None is three times the control's, at least that of `DTYPES`;
            with quantized activations, in llama.cpp, which rounds its inputs to 8 bits, and without a control, 20 % of
            the standard deviation of the run's logits; with its cache the larger of both, at most 50 %.
        cache: with the runtime's own cache in few bits, where the run follows it.

    Raises:
        InputError: the export is damaged, its run is not found, or the runtime does not read the format.
        RunError: the runtime failed.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"there is no runtime '{runtime}': use one of {', '.join(RUNTIMES)}.")
    record = read_record(export)
    check_files(export, record)
    known = RUNTIMES[runtime]
    dtype = dtype or known.dtype
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype} but must be one of {', '.join(DTYPES)}.")
    if record.format not in known.formats:
        raise InputError(
            f"{known.name} does not read the format {record.format}: export the run with --format "
            f"{' or '.join(known.formats)}."
        )
    finished, where = run_of(export, record, run), interpreter(runtime, python)
    spec = finished.spec
    own_cache = cache and spec.quantizes_cache and spec.cache_format == "int" and spec.cache_served_by == runtime
    bits = (spec.key_bits, spec.value_bits) if own_cache else None
    if spec.cache_format == "int" and not own_cache:  # of FP8 alone the file tells them to quantize it
        finished = replace(finished, spec=spec.without_cache)
    ids = sample(finished)
    prompt = ids[0].tolist()
    answer = ask(runtime, export, prompt, python=where, dtype=dtype, cache=bits)
    reduced = finished.spec.quantizes_inputs or finished.spec.quantizes_cache
    wide = replace(finished, spec=finished.spec.without_inputs.without_cache)
    expected = run_logits(finished, ids, plain=True)[0]
    in_16_bits = run_logits(wide, ids, plain=True)[0] if reduced else expected
    if own_cache:
        wide = replace(finished, spec=finished.spec.without_inputs)
        control = _control(runtime, wide, run_logits(wide, ids, plain=True)[0], prompt, where, dtype, bits)
    else:
        control = _control(runtime, wide, in_16_bits, prompt, where, dtype, None)
    difference = _difference(answer, expected, ids)
    limit = tolerance if tolerance is not None else float(0.2 * expected.std())
    if tolerance is None and control is not None and not reduced and runtime != "llama.cpp":  # which rounds its inputs
        limit = max(CONTROLS * control, DTYPES[dtype])
    elif tolerance is None and control is not None and own_cache:  # in deep models roundings that fall elsewhere add up
        limit = min(max(CONTROLS * control, limit), WORST * float(expected.std()))
    top = expected.argmax(-1).tolist()[: len(answer.top)]
    after = torch.cat([ids, torch.tensor([answer.greedy], dtype=ids.dtype)], 1)
    likeliest = run_logits(finished, after[:, :-1], plain=True)[0, len(prompt) - 1 :].argmax(-1).tolist()
    return Served(
        record.format,
        known.name,
        dtype,
        dict(answer.versions),
        tuple(answer.kernels),
        difference,
        control,
        _difference(answer, in_16_bits, ids) if reduced else None,
        sum(a == b for a, b in zip(answer.top, top, strict=True)) / len(top),
        sum(a == b for a, b in zip(answer.greedy, likeliest, strict=True)) / len(likeliest),
        limit,
        bits,
    )


def _difference(answer: Answer, logits: Tensor, ids: Tensor) -> float:
    """The largest difference of a token's log-probability, of those that both know."""
    expected = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float((torch.tensor(answer.log_probabilities) - expected).abs().max())


def _control(
    runtime: str,
    run: Finished,
    expected: Tensor,
    ids: list[int],
    python: Path,
    dtype: str,
    cache: tuple[int, int] | None,
) -> float | None:
    """How far the runtime is off with the run's weights as a dense model of `dtype`; None where none can be made."""
    spec = run.spec
    if spec.r3 or spec.r4 or spec.online_r1 or spec.heads or spec.activation_directions:
        return None
    kind = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "dense"
        if runtime == "llama.cpp":
            gguf.write(run, folder, dense=True)
            return _difference(
                ask(runtime, folder, ids, python=python, dtype=dtype, cache=cache), expected, torch.tensor([ids])
            )
        groups = (
            {name: tensor.to(kind) for name, tensor in group.items() if name.rpartition(".")[2] not in FOUND}
            for group in run.groups(lambda result, _: {"weight": result.dequantize()})
        )
        config = {key: value for key, value in run.config.items() if key != "torch_dtype"}
        write_checkpoint(folder, run.folder, {**config, "dtype": dtype, "tie_word_embeddings": run.tied}, groups)
        return _difference(
            ask(runtime, folder, ids, python=python, dtype=dtype, cache=cache), expected, torch.tensor([ids])
        )
