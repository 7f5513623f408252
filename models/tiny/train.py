"""Train the embedded model: a small Llama over Python source code.

    python -m rotoboa.models.tiny.train OUT_DIR --minutes 60

The text is what every machine that installs the project already holds: the Python standard library (see `corpus`) and
the packages torch, transformers and numpy. Nothing is downloaded.
"""

from __future__ import annotations

import math
import random
import sysconfig
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ...errors import InputError
from .corpus import SKIP, evaluation_texts, read, stdlib_files

Tokens = npt.NDArray[np.uint16]

SEQUENCE_LENGTH = 512
VOCABULARY = 2048
EVALUATION_WINDOWS = 200
TOKENIZER_FILES = 1200
WARMUP_STEPS = 200
STEADY = 0.6  # the part of the time after which the learning rate falls
PACKAGE_SHARES = (("torch", 0.45), ("transformers", 0.4), ("numpy", 0.15))
# Large language models carry a few residual channels of outsized magnitude; small ones don't.
# Planting them before training gives the model the outliers that rotations exist to remove.
OUTLIER_CHANNELS = {37: 4.0, 101: -4.0, 173: 4.0, 229: -4.0}


def package_files(limit_bytes: int, rng: random.Random) -> list[Path]:
    """Draw about `limit_bytes` bytes of source files from the packages of `PACKAGE_SHARES`, each its share."""
    root = Path(sysconfig.get_path("purelib"))
    files = []
    for package, share in PACKAGE_SHARES:
        found = [p for p in sorted((root / package).rglob("*.py")) if not SKIP & set(p.relative_to(root).parts)]
        rng.shuffle(found)
        taken = 0
        for path in found:
            size = path.stat().st_size
            if size < 1500 or size > 150_000:
                continue
            if taken > share * limit_bytes:
                break
            files.append(path)
            taken += size
    return files


def training_texts(megabytes: float, rng: random.Random) -> list[str]:
    """Return the training files in shuffled order: the standard library twice, and `megabytes` MB of packages."""
    paths = stdlib_files(held_out=False) * 2 + package_files(int(megabytes * 1e6), rng)
    texts = [read(path) for path in paths]
    rng.shuffle(texts)
    return texts


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCABULARY` entries, ``<s>`` (0) and ``</s>`` (1) among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=1024)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tokens:
    """Return the tokens of all texts as one array (n,), ``<s>`` before each text."""
    pieces = []
    for i in range(0, len(texts), 256):
        for ids in tokenizer(texts[i : i + 256], add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.array([tokenizer.bos_token_id, *ids], dtype=np.uint16))
    return np.concatenate(pieces)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model in float32, its outlier channels planted in the embedding."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for channel, value in OUTLIER_CHANNELS.items():
            model.model.embed_tokens.weight[:, channel] += value
    return model


def build_optimizer(model: LlamaForCausalLM, peak: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the blocks' matrices alone, not on norms, embedding and head."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.shape[0] != VOCABULARY]
    others = [p for p in model.parameters() if p.ndim != 2 or p.shape[0] == VOCABULARY]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Return the rate at `step` when `progress` (0 to 1) of the time is over: warm-up, steady, linear fall to 2 %."""
    fall = 1.0 if progress < STEADY else max(0.02, (1 - progress) / (1 - STEADY))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * fall


def draw_batch(tokens: Tokens, count: int, device: str) -> torch.Tensor:
    """Return `count` windows at random offsets: int64 (count, `SEQUENCE_LENGTH`)."""
    starts = np.random.randint(0, len(tokens) - SEQUENCE_LENGTH - 1, count)
    windows = np.stack([tokens[s : s + SEQUENCE_LENGTH].astype(np.int64) for s in starts])
    return torch.from_numpy(windows).to(device)


def fit(
    model: LlamaForCausalLM, tokens: Tokens, out: Path, minutes: float, batch: int, peak: float, seed: int = 0
) -> None:
    """Train `model` in place for `minutes` of wall-clock time, saving it to `out` every 2,000 steps.

    `seed` is of the order of the windows: training that goes on must not see the same ones again.
    """
    device = model.device.type
    forward = torch.compile(model)  # twice the speed of eager mode on a CPU
    optimizer = build_optimizer(model, peak)
    np.random.seed(seed)
    start, step, seen, running = time.time(), 0, 0, 0.0
    budget = minutes * 60
    while (elapsed := time.time() - start) < budget:
        rate = learning_rate(peak, step, elapsed / budget)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = draw_batch(tokens, batch, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            progress = f"step {step} {elapsed / 60:.1f} min {seen / 1e6:.2f} M tokens"
            print(f"{progress} loss {running:.3f} lr {rate:.1e}", flush=True)
        if step % 2000 == 0:
            model.to(torch.float32).save_pretrained(out)


@torch.no_grad()
def held_out_perplexity(model: LlamaForCausalLM, tokens: Tokens) -> tuple[float, int]:
    """Return the perplexity over non-overlapping windows of `tokens`, and how many windows that were."""
    total, count = 0.0, 0
    for i in range(0, min(len(tokens), EVALUATION_WINDOWS * SEQUENCE_LENGTH) - SEQUENCE_LENGTH, SEQUENCE_LENGTH):
        ids = torch.from_numpy(tokens[i : i + SEQUENCE_LENGTH].astype(np.int64))[None].to(model.device)
        total += model(input_ids=ids, labels=ids).loss.item()
        count += 1
    return math.exp(total / count), count


def train(
    out: Path, minutes: float = 70, batch: int = 8, lr: float = 2e-3, megabytes: float = 60, start: Path | None = None
) -> None:
    """Train tokenizer and model and write both to `out`, the weights in bfloat16.

    Args:
        out: the folder to write, made when it is missing.
        minutes: wall-clock time of the training loop.
        batch: sequences of `SEQUENCE_LENGTH` tokens per step.
        lr: peak learning rate.
        megabytes: source text taken from the installed packages, in MB.
        start: a folder that an earlier training wrote: its tokenizer is kept and its model trained on.

    Raises:
        InputError: this interpreter's standard library has no ``.py`` files.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    texts = training_texts(megabytes, rng)
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} M characters", flush=True)
    if start is None:
        tokenizer = train_tokenizer(rng.sample(texts, min(TOKENIZER_FILES, len(texts))))
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    tokenizer.save_pretrained(out)
    tokens = encode(tokenizer, texts)
    held = encode(tokenizer, evaluation_texts())
    print(f"{len(tokens) / 1e6:.1f} M training tokens, {len(held) / 1e6:.2f} M held out", flush=True)

    if start is None:
        model = build_model(tokenizer).to(device)
    else:
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    fit(model, tokens, out, minutes, batch, lr, seed=0 if start is None else 1)

    model.eval()
    model = model.to(torch.bfloat16).float()  # the figure is that of the weights as they are saved
    perplexity, count = held_out_perplexity(model, held)
    print(f"held-out perplexity {perplexity:.4f} over {count} sequences of {SEQUENCE_LENGTH}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write the tokenizer and the model to.", file_okay=False)],
    minutes: Annotated[float, typer.Option(help="Wall-clock minutes of training.")] = 70,
    batch: Annotated[int, typer.Option(help=f"Sequences of {SEQUENCE_LENGTH} tokens per step.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    megabytes: Annotated[float, typer.Option(help="MB of source text from the installed packages.")] = 60,
    start: Annotated[
        Path | None, typer.Option(help="Folder of an earlier training to go on from.", exists=True, file_okay=False)
    ] = None,
) -> None:
    """Train the embedded model again, from what is installed on this machine."""
    try:
        train(out, minutes, batch, lr, megabytes, start)
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
