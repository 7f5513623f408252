"""Peak memory of whole runs on checkpoints made here, of random weights: it must not grow with the number of blocks.

    python benchmarks/memory.py                 # a model of 4 blocks and one of 32
    python benchmarks/memory.py --large         # also the first two blocks of a model of the shape of Llama-3-8B

Every run is a process of its own, and its peak is the most resident memory that the system counted for it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rotoboa.export.shards import write_shards
from rotoboa.models.aliases import TINY_FOLDER

SMALL: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LARGE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
CHEAP = {
    "weights.refine": 0,
    "weights.starts": 1,
    "weights.tabu": 0,
    "weights.grid": "minmax",
    "activations.search": False,
    "cache.search": False,
    "evaluation.windows": 2,
    "evaluation.references": False,
    "calibration.batch": 2,
}
GROWTH, LIMIT = 1.10, 12 * 2**30
RUN = """
import json, sys
import rotoboa
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
recipe, changes = json.loads(sys.argv[1])
report = rotoboa.quantize(build_recipe(load_recipe(recipe), changes))
print(json.dumps({"peak": report["peak_memory_bytes"]["host"], "seconds": report["seconds"]}))
"""


def make_checkpoint(folder: Path, blocks: int, sizes: dict[str, Any]) -> Path:
    """A Llama of random bfloat16 weights in shards, made block by block, with the embedded model's tokenizer."""
    config = LlamaConfig(**sizes, num_hidden_layers=blocks, max_position_embeddings=2048, tie_word_embeddings=False)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str) -> Tensor:
        if "norm" in name:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    def groups() -> Iterator[dict[str, Tensor]]:
        for name in shapes:
            yield {name: tensor(name)}

    folder.mkdir(parents=True)
    shards = write_shards(folder, groups(), 2**30)
    weight_map: dict[str, str] = {}
    for index, (file, names, _) in enumerate(shards):
        final = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (folder / file).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    for tokenizer in TINY_FOLDER.glob("tokenizer*"):
        shutil.copy(tokenizer, folder)
    return folder


def measure(folder: Path, blocks: int, sizes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes and seconds by stage of a w4a4kv4 run in a process of its own; `folder` is removed after it."""
    model = make_checkpoint(folder / "model", blocks, sizes)
    shutil.copy(argparse.__file__, folder / "text.txt")  # any text does
    text = dict.fromkeys(("calibration.dataset", "evaluation.dataset"), str(folder / "text.txt"))
    given = {"model": str(model), "output": str(folder / "run"), **CHEAP, **text, **changes}
    command = [sys.executable, "-c", RUN, json.dumps(["w4a4kv4", given])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(
    large: Annotated[bool, typer.Option(help="Also the model of the shape of Llama-3-8B: many minutes.")] = False,
    only_large: Annotated[bool, typer.Option(help="That model alone.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Where checkpoints and runs lie for a while.")] = None,
) -> None:
    """Print peak memory, and fail where it grows with the blocks, or is above 12 GiB for the large model."""
    table = Table("model", "blocks run", "calibration", "peak memory", "minutes")
    wrong = []

    def row(name: str, blocks: int, found: dict[str, Any], tokens: str) -> None:
        total = found["seconds"]["total"] / 60
        table.add_row(name, str(blocks), tokens, f"{found['peak'] / 2**30:.2f} GiB", f"{total:.1f}")
        print(name, blocks, json.dumps(found), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=scratch) as base:
        if not only_large:
            peaks = {}
            for blocks in (4, 32):
                tokens = {"calibration.samples": 8, "calibration.sequence_length": 256}
                found = measure(Path(base) / str(blocks), blocks, SMALL, tokens)
                row("hidden 512", blocks, found, "8 x 256")
                peaks[blocks] = found["peak"]
            if peaks[32] > GROWTH * peaks[4]:
                wrong.append(f"32 blocks take {peaks[32] / peaks[4]:.2f} times the memory of 4")
        if large or only_large:
            tokens = {"calibration.samples": 4, "calibration.sequence_length": 256, "evaluation.baseline": False}
            found = measure(Path(base) / "large", 2, LARGE, {**tokens, "weights.rows": 128})
            row("shape of Llama-3-8B", 2, found, "4 x 256")
            if found["peak"] > LIMIT:
                wrong.append(f"the large model takes {found['peak'] / 2**30:.1f} GiB")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if wrong:
        sys.exit("; ".join(wrong))


if __name__ == "__main__":
    typer.run(main)
