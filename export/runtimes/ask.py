"""Starts a runtime in a process and an interpreter of its own, since what runtimes need clashes, and asks it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError, RunError


class Runtime(NamedTuple):
    """Who serves a model: the program that asks it, the formats that it reads, and the dtype it computes in."""

    name: str
    program: str
    formats: tuple[str, ...]
    dtype: str


DTYPES = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.1}
"""What runtimes compute in, and what a log-probability may be off by then: readers may round weights to 16 bits."""

RUNTIMES: dict[str, Runtime] = {
    "vllm": Runtime("vLLM", "in_vllm.py", ("compressed-tensors", "gptq-v1", "gptq"), "float16"),
    "gptqmodel": Runtime("GPTQModel", "in_transformers.py", ("gptq", "gptq-v1"), "float16"),
    "mlx": Runtime("mlx-lm", "in_mlx.py", ("mlx",), "float32"),
    "llama.cpp": Runtime("llama.cpp", "in_llama_cpp.py", ("gguf",), "float32"),
    "transformers": Runtime("transformers", "in_transformers.py", ("compressed-tensors", "gguf"), "float32"),
}


@dataclass(frozen=True)
class Answer:
    """What a runtime says of a prompt of n tokens.

    Attributes:
        versions: of the packages that computed it.
        kernels: the classes that computed the linear layers.
        log_probabilities: n - 1, of each token of the prompt but the first.
        top: the most likely token after each of the first n - 1 tokens, or of all.
        greedy: the tokens that follow, each the most likely one.
    """

    versions: Mapping[str, str]
    kernels: Sequence[str]
    log_probabilities: Sequence[float]
    top: Sequence[int]
    greedy: Sequence[int]


def interpreter(runtime: str, given: Path | None) -> Path:
    """The Python that has a runtime: the one given, else of `.venv-<runtime>` here; transformers is in our own.

    Raises:
        InputError: there is none.
    """
    found = given or (Path(sys.executable) if runtime == "transformers" else Path(f".venv-{runtime}/bin/python"))
    if not found.is_file():
        raise InputError(
            f"there is no Python for {RUNTIMES[runtime].name} at {found}: `make runtimes` makes one, or give --python."
        )
    return found.absolute()  # a link to another Python is followed by no one: what it has lies beside the link


def ask(
    runtime: str,
    folder: Path,
    ids: Sequence[int],
    *,
    python: Path,
    dtype: str,
    new_tokens: int = 16,
    logits: Path | None = None,
    cache: tuple[int, int] | None = None,
) -> Answer:
    """What `runtime` computes of the export in `folder` for the prompt `ids`.

    Args:
        runtime: a key of `RUNTIMES`.
        folder: of an export, or of a dense checkpoint.
        ids: of the prompt.
        python: the interpreter that has the runtime.
        dtype: one of `DTYPES`.
        new_tokens: how many follow the prompt.
        logits: the safetensors file that they are left in, (1, n, vocabulary) float32; transformers and llama.cpp.
        cache: bits of keys and of values, rounded by the runtime itself; None is its usual cache. vLLM and llama.cpp.

    Raises:
        RunError: it cannot run the export.
    """
    name, program = RUNTIMES[runtime].name, Path(__file__).parent / RUNTIMES[runtime].program
    asked = {"ids": list(ids), "new_tokens": new_tokens, "dtype": dtype, "logits": str(logits or "")}
    asked |= {"cache": cache}
    with tempfile.TemporaryDirectory() as directory:
        request, answer = Path(directory) / "request.json", Path(directory) / "answer.json"
        request.write_text(json.dumps(asked), encoding="utf-8")
        # -I: nothing of this folder or of the caller's paths is imported there.
        command = [str(python), "-I", str(program), str(folder.resolve()), str(request), str(answer)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment, check=False)
        if done.returncode or not answer.is_file():
            raise RunError(f"{name} cannot run {folder} ({_last_line(done)}).")
        return Answer(**json.loads(answer.read_text(encoding="utf-8")))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Of what a failed program printed, the line that names the error."""
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in done.stderr.splitlines()]
    lines = [line for line in lines if line]
    named = [i for i, line in enumerate(lines) if line.split(":")[0].endswith(("Error", "Exception"))]
    if not named:
        return (lines or [f"exit code {done.returncode}"])[-1].rstrip(".")
    last = lines[named[-1]]  # which may only announce the reason
    return (f"{last} {lines[named[-1] + 1]}" if last.endswith(":") and named[-1] + 1 < len(lines) else last).rstrip(".")
