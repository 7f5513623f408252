"""Speed and memory of exported models against the original in float32 and bfloat16, on this machine.

    python benchmarks/runtime.py                  as large as the embedded model, and as wide as Llama-3.2-1B
    python benchmarks/runtime.py --threads 1      with so many threads

Speed and memory do not depend on what the weights are: they are random here, written in the native format and loaded as
any export is. Nothing is compared with a baseline: these are figures to look at.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from rotoboa.boa.online.attention import NAME
from rotoboa.export.runtime.cache import cache_bytes
from rotoboa.export.runtime.memory import model_bytes
from rotoboa.export.runtime.prepared import prepare_block
from rotoboa.export.spec import METHOD, Spec
from rotoboa.export.writing import save_tensors
from rotoboa.models.families import family_of
from rotoboa.models.shape import Shape

MODELS: dict[str, dict[str, Any]] = {
    "embedded": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "two blocks of Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
SPECS: dict[str, dict[str, Any]] = {
    "w4a4kv4": {"bits": 4, "r3": True, "r4": True, "activation_bits": 4, "key_bits": 4, "value_bits": 4},
    "w4a4kv4 without R4": {"bits": 4, "r3": True, "activation_bits": 4, "key_bits": 4, "value_bits": 4},
    "w4a4kv4 and 32 directions": {
        "bits": 4,
        "r3": True,
        "r4": True,
        "activation_bits": 4,
        "activation_directions": 32,
        "key_bits": 4,
        "value_bits": 4,
    },
    "w4a8kv4": {"bits": 4, "r3": True, "r4": True, "activation_bits": 8, "key_bits": 4, "value_bits": 4},
    "w4a16": {"bits": 4},
    "w4a16 in groups": {"bits": 4, "group_size": 128},
    "w3a16": {"bits": 3},
    "w2a16": {"bits": 2},
}


def export(folder: Path, config: LlamaConfig, spec: Spec) -> None:
    """A checkpoint in the native format with random integers."""
    family, shape = family_of(config.model_type, "the benchmark"), Shape.of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.bfloat16)
    for block in model.get_submodule(family.layers).children():
        prepare_block(block, family, spec.schemes(family, 0), spec.transforms(shape, family))
    folder.mkdir()
    save_tensors(folder / "model.safetensors", {name: fill(t, spec) for name, t in model.state_dict().items()})
    quantization = {"quant_method": METHOD, **spec.to_dict()}
    fields = {**config.to_dict(), "dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def fill(like: Tensor, spec: Spec) -> Tensor:
    """Words, zero points, scales or weights of the size of `like`, such that activations stay finite."""
    if like.dtype == torch.int32:
        return torch.randint(-(2**31), 2**31, like.shape, dtype=torch.int32)
    if like.dtype == torch.uint8:
        return torch.full(like.shape, 2 ** (spec.bits - 1), dtype=torch.uint8)
    if like.dtype == torch.float16:
        return torch.full(like.shape, 0.1 / 2**spec.bits, dtype=torch.float16)
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    return torch.randn(like.shape, dtype=like.dtype) / len(like) ** 0.5


@torch.no_grad()
def measure(model: PreTrainedModel, prompt: int, new: int, repeats: int) -> list[str]:
    """Tokens a second of the prompt and of generation after it, the best of `repeats`; MiB of model, KiB of cache."""
    # Of one thread, the processor's time: whatever else runs on the machine does not count.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    tokens = torch.randint(2, 2048, (1, prompt + new))
    prefill, decode = float("inf"), float("inf")
    for _ in range(repeats):
        cache = DynamicCache()
        start = clock()
        model(tokens[:, :prompt], past_key_values=cache, logits_to_keep=1)
        prefill = min(prefill, clock() - start)
        start = clock()
        for i in range(prompt, prompt + new):
            model(tokens[:, i : i + 1], past_key_values=cache)
        decode = min(decode, clock() - start)
    memory = (model_bytes(model) / 2**20, cache_bytes(cache) / (prompt + new) / 2**10)
    return [f"{prompt / prefill:,.0f}", f"{new / decode:,.1f}", *(f"{size:,.2f}" for size in memory)]


def main(
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens generated after it.")] = 32,
    repeats: Annotated[int, typer.Option(help="The best of so many is shown.")] = 3,
    threads: Annotated[int | None, typer.Option(help="Of torch; its own choice by default.")] = None,
) -> None:
    """Print a table for each model."""
    if threads is not None:
        torch.set_num_threads(threads)
    for title, sizes in MODELS.items():
        config = LlamaConfig(vocab_size=2048, max_position_embeddings=8192, tie_word_embeddings=False, **sizes)
        table = Table("", "prompt tokens/s", "generated tokens/s", "model MiB", "cache KiB/token", title=title)
        for dtype in (torch.float32, torch.bfloat16):
            plain = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            table.add_row(str(dtype).removeprefix("torch."), *measure(plain, prompt, new, repeats))
            del plain
        for name, fields in SPECS.items():
            print(f"{title}, {name} ...", file=sys.stderr, flush=True)
            if sizes["intermediate_size"] % fields.get("group_size", 1):
                continue
            with tempfile.TemporaryDirectory() as folder:
                export(Path(folder) / "model", config, Spec(**fields))
                packed = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
            table.add_row(name, *measure(packed, prompt, new, repeats))
            del packed
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    typer.run(main)
