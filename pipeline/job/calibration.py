"""From the name of a dataset to batches of tokens.

- ``stdlib``: the standard library of the running Python, see `models.tiny.corpus`. Nothing is downloaded.
- ``wikitext2``: the splits train, validation and test, each one text, its rows joined by blank lines.
- ``c4``: calibration, the documents of the first training shard; evaluation, the first 1,100 documents of the first
  validation shard joined by spaces into one text; validation, the 1,100 documents after those, likewise.
- a local file or folder, see `text_files`; several names with commas: their texts one after the other.

The texts of wikitext2, and those c4 is evaluated on, are GPTQ's (https://github.com/IST-DASLab/gptq, `datautils.py`),
the protocol of the figures that QuaRot, BoA and TurboBoA report.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...errors import InputError
from ...models.tiny import corpus
from ...models.tokenizer import named
from .text_files import read_texts

Split = Literal["calibration", "validation", "evaluation"]

TOKENIZER_BATCH = 16

WIKITEXT2_SPLITS = {"calibration": "train", "validation": "validation", "evaluation": "test"}
# A shard holds 356,317 documents; the first 16,384 are some 8 M tokens, far more than any calibration draws.
C4_SPLITS = {
    "calibration": ("en/c4-train.00000-of-01024.json.gz", "train[:16384]"),
    "validation": ("en/c4-validation.00000-of-00008.json.gz", "train[1100:2200]"),
    "evaluation": ("en/c4-validation.00000-of-00008.json.gz", "train[:1100]"),
}
# GPTQ's code, and what came after it, evaluates on all windows of WikiText-2 and on the first 256 of C4.
PAPER_WINDOWS = {"c4": 256}


def load_texts(dataset: str, split: Split) -> list[str]:
    """Return the texts of one split of a dataset, in a fixed order.

    Args:
        dataset: 'stdlib', 'wikitext2', 'c4', or the path of a local file or folder; several with commas.
        split: 'calibration' for statistics, 'validation' for choosing settings, 'evaluation' for the reported figure.

    Raises:
        InputError: the dataset is unknown, cannot be downloaded, or its file cannot be read.
    """
    if "," in dataset and not Path(dataset).exists():
        names = (name.strip() for name in dataset.split(","))
        return [text for name in names if name for text in load_texts(name, split)]
    if dataset == "stdlib":
        parts = {
            "calibration": corpus.calibration_texts,
            "validation": corpus.validation_texts,
            "evaluation": corpus.evaluation_texts,
        }
        return parts[split]()
    if dataset == "wikitext2":
        return ["\n\n".join(_download("Salesforce/wikitext", "wikitext-2-raw-v1", split=WIKITEXT2_SPLITS[split]))]
    if dataset == "c4":
        # One shard of 1,024, so its size is not the size that the dataset's card states: no checks.
        shard, part = C4_SPLITS[split]
        texts = _download("allenai/c4", data_files={"train": shard}, split=part, verification_mode="no_checks")
        return texts if split == "calibration" else [" ".join(texts)]
    return read_texts(dataset, split)


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    samples: int,
    sequence_length: int,
    seed: int,
    vocab_size: int | None = None,
    *,
    bos: bool = False,
) -> torch.Tensor:
    """Cut windows at random offsets from the texts laid end to end.

    The offsets come from ``random.Random(seed)``, one ``randint`` per window, as in GPTQ. Windows may overlap.

    Args:
        tokenizer: the model's tokenizer; its bos token, where it has one, is put before each text.
        texts: as `load_texts` returns them.
        samples: how many windows.
        sequence_length: tokens per window.
        seed: of the offsets.
        vocab_size: rows of the model's embedding; given, token ids are checked against it.
        bos: begin each window with bos, and one token of text less; one that begins at a text has its bos already.

    Returns:
        int64 (samples, sequence_length).

    Raises:
        InputError: the texts give no more than `sequence_length` tokens, or a token id is `vocab_size` or above.
    """
    tokens = _encode(tokenizer, texts, vocab_size)
    if len(tokens) <= sequence_length:
        raise InputError(
            f"The calibration text gives {len(tokens)} tokens, and at least {sequence_length + 1} are needed for "
            f"windows of {sequence_length}; give a longer text or a smaller sequence length."
        )
    rng = random.Random(seed)
    offsets = [rng.randint(0, len(tokens) - sequence_length - 1) for _ in range(samples)]
    first = tokenizer.bos_token_id if bos else None
    return torch.stack([_window(tokens, offset, sequence_length, first)[0] for offset in offsets])


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    sequence_length: int,
    limit: int | None = None,
    vocab_size: int | None = None,
    *,
    bos: bool = False,
) -> torch.Tensor:
    """Cut the texts laid end to end into windows that do not overlap; the incomplete last one is dropped.

    Args:
        tokenizer: the model's tokenizer; its bos token, where it has one, is put before each text.
        texts: as `load_texts` returns them.
        sequence_length: tokens per window.
        limit: how many windows to keep, from the first; None keeps all.
        vocab_size: rows of the model's embedding; given, token ids are checked against it.
        bos: begin each window with bos, and one token of text less; one that begins at a text has its bos already.

    Returns:
        int64 (windows, sequence_length).

    Raises:
        InputError: the texts give less than one window, or a token id is `vocab_size` or above.
    """
    enough = None if limit is None else limit * sequence_length
    tokens = _encode(tokenizer, texts, vocab_size, enough)
    if len(tokens) < sequence_length:
        raise InputError(
            f"The evaluation text gives {len(tokens)} tokens, and at least {sequence_length} are needed for one "
            "window; give a longer text or a smaller sequence length."
        )
    windows: list[torch.Tensor] = []
    start, first = 0, tokenizer.bos_token_id if bos else None
    while len(windows) != limit:
        window, start = _window(tokens, start, sequence_length, first)
        if len(window) < sequence_length:
            break
        windows.append(window)
    return torch.stack(windows)


def _window(tokens: torch.Tensor, start: int, length: int, bos: int | None) -> tuple[torch.Tensor, int]:
    """The window of tokens (n,) from `start` on, less than `length` where they end, and where the next one starts.

    Given `bos` it begins with that: its own, where a text begins there, else one before `length` - 1 tokens.
    """
    window = tokens[start : start + length]
    if bos is None or window[:1].tolist() == [bos]:
        return window, start + length
    return torch.cat([torch.tensor([bos]), window[: length - 1]]), start + length - 1


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], vocab_size: int | None, enough: int | None = None
) -> torch.Tensor:
    """Return the tokens of all texts, int64 (n,), bos before each text when the tokenizer has one.

    Given `enough`, texts after that many tokens may be left out.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pieces = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(texts), TOKENIZER_BATCH):
        if enough is not None and sum(map(len, pieces)) >= enough:
            break
        # verbose=False: texts are longer than the model's positions by design, and are cut into windows afterwards.
        batch = tokenizer(texts[start : start + TOKENIZER_BATCH], add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [np.array([*bos, *ids], dtype=np.int64) for ids in batch]
    tokens = np.concatenate(pieces)
    if vocab_size is not None and len(tokens) and (largest := int(tokens.max())) >= vocab_size:
        raise InputError(
            f"The tokenizer gives token id {named(tokenizer, largest)}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer that belongs to the model, or text without such tokens."
        )
    return torch.from_numpy(tokens)


def _download(path: str, *arguments: str, **options: object) -> list[str]:
    """Return the column 'text' of a hub dataset, from the local cache when it is there."""
    # Imported here: they take seconds, and most runs need neither.
    import datasets
    from huggingface_hub.errors import HTTPError

    try:
        return list(datasets.load_dataset(path, *arguments, **options)["text"])
    # OSError: ConnectionError and the hub's errors; ValueError: offline and not in the cache; RuntimeError: hf-xet.
    except (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(
            f"The dataset {path} could not be had from the hub ({reason}); check the connection, or give a local "
            "text file as the dataset."
        ) from error
