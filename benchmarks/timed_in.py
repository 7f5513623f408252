"""Times a model where it is served: `python timed_in.py RUNTIME FOLDER REQUEST ANSWER`. Knows nothing of rotoboa but by
the name of the runtime `native`; see `serving_speed`.

The answer has seconds of the processor, the least of some repeats: of the prompt with the first token, and of each one
after it. One thread, so whatever else runs on the machine does not count.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Timed = dict[str, Any]
clock = time.process_time
ENOUGH = 30.0
"""Seconds after which nothing is repeated."""


def least(generate: Callable[[list[int], int], tuple[float, float]], asked: dict[str, Any]) -> Timed:
    """Of `generate(prompt, new)`: seconds of the prompt, and of what follows it. Each time another prompt."""
    draw, times = random.Random(0), list[tuple[float, float]]()
    while len(times) < asked["repeats"] and sum(map(sum, times)) < ENOUGH:
        prompt = [draw.randrange(100, asked["vocabulary"]) for _ in range(asked["prompt"])]
        times.append(generate(prompt, asked["new"]))
    return {"prompt": min(first for first, _ in times), "token": min(after for _, after in times) / asked["new"]}


def vllm(folder: str, asked: dict[str, Any]) -> Timed:
    """The engine in this process, without prompts kept."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    length = asked["prompt"] + asked["new"] + 1
    engine = LLM(
        folder,
        dtype=asked["dtype"],
        max_model_len=length,
        max_num_batched_tokens=length,
        enable_prefix_caching=False,
        enforce_eager=asked["eager"],
        seed=0,
    )

    def seconds(prompt: list[int], new: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = clock()
        engine.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
        return clock() - start

    def generate(prompt: list[int], new: int) -> tuple[float, float]:
        first = seconds(prompt, 1)
        return first, seconds(prompt, new + 1) - first

    seconds(list(range(100, 140)), 3)
    return least(generate, asked) | {"versions": versions("vllm-cpu", "torch")}


def llama_cpp(folder: str, asked: dict[str, Any]) -> Timed:
    """A file of floats is turned to bfloat16 first, by llama.cpp."""
    import ctypes

    import llama_cpp as cpp

    (file,) = Path(folder).glob("*.gguf")
    if file.stem.endswith("-F32"):
        settings = cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = 32, 1  # LLAMA_FTYPE_MOSTLY_BF16
        dense = Path(folder) / "dense.bf16"
        if cpp.llama_model_quantize(str(file).encode(), str(dense).encode(), ctypes.byref(settings)):
            raise RuntimeError("llama.cpp cannot turn the file to bfloat16")
        file = dense
    size = asked["prompt"]
    model = cpp.Llama(
        str(file), n_ctx=size + asked["new"] + 1, n_batch=size, n_ubatch=size, n_threads=1, n_threads_batch=1,
        verbose=False,
    )  # fmt: skip

    def generate(prompt: list[int], new: int) -> tuple[float, float]:
        model.reset()
        start = clock()
        model.eval(prompt)
        first = clock() - start
        start = clock()
        for token in prompt[:new]:
            model.eval([token])
        return first, clock() - start

    return least(generate, asked) | {"versions": versions("llama-cpp-python"), "bytes": file.stat().st_size}


def mlx(folder: str, asked: dict[str, Any]) -> Timed:
    """On the processor."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, _ = load(folder)

    def generate(prompt: list[int], new: int) -> tuple[float, float]:
        start = clock()
        # A token more than are counted: it computes one ahead.
        steps = generate_step(mx.array(prompt), model, max_tokens=new + 2)
        next(steps)
        middle = clock()
        for _ in range(new):
            next(steps)
        return middle - start, clock() - middle

    return least(generate, asked) | {"versions": versions("mlx", "mlx-lm")}


def native(folder: str, asked: dict[str, Any]) -> Timed:
    """transformers, with rotoboa where the folder is of a run."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    if asked["packed"]:
        import rotoboa  # noqa: F401  # registers the format

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, asked["dtype"]))

    def generate(prompt: list[int], new: int) -> tuple[float, float]:
        cache, tokens = DynamicCache(), torch.tensor([prompt])
        start = clock()
        model(tokens, past_key_values=cache, logits_to_keep=1)
        middle = clock()
        for i in range(new):
            model(tokens[:, i : i + 1], past_key_values=cache)
        return middle - start, clock() - middle

    with torch.no_grad():
        generate(list(range(100, 140)), 2)
        return least(generate, asked) | {"versions": versions("transformers", "torch")}


def versions(*names: str) -> dict[str, str]:
    """Those of the packages."""
    return {name: version(name) for name in names}


if __name__ == "__main__":
    _, runtime, model, request, answer = sys.argv
    found = {"vllm": vllm, "llama.cpp": llama_cpp, "mlx": mlx, "native": native}[runtime](
        model, json.loads(Path(request).read_text(encoding="utf-8"))
    )
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
