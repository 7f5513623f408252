"""What a GGUF file says besides its tensors: sizes, RoPE, and the tokenizer as llama.cpp runs it."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType, TokenType
from torch import Tensor

from ...errors import InputError
from ...models.tokenizer import read_tokenizer
from ..finished import Finished

# The pattern that Llama 3's tokenizer splits text by, which llama.cpp knows by the name llama-bpe.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_USE = "use --format compressed-tensors"


def check(run: Finished) -> None:
    """Check that llama.cpp has the activation, RoPE and tokenizer of a run.

    Raises:
        InputError: it does not.
    """
    if run.config.get("hidden_act", "silu") != "silu":
        raise InputError(f"GGUF's llama has the activation silu, and this model {run.config['hidden_act']}: {_USE}.")
    kind = _rope(run).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"GGUF is written with RoPE of type default, linear or llama3, and this is {kind}: {_USE}.")
    _pre_tokenizer(_tokenizer(run))


def _rope(run: Finished) -> dict[str, Any]:
    return dict(getattr(run.transformers_config(), "rope_parameters", None) or {})


def add_sizes(writer: GGUFWriter, run: Finished, ffn: int) -> None:
    """Everything that llama.cpp needs to build the decoder."""
    s, config, rope = run.shape, run.transformers_config(), _rope(run)
    writer.add_name(str(run.config.get("_name_or_path") or "model"))
    writer.add_block_count(s.blocks)
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(s.query_heads)
    writer.add_head_count_kv(s.key_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(s.vocabulary)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(run: Finished) -> Tensor | None:
    """What Llama 3.1's RoPE divides each frequency by, (head_dim / 2,) float32; None for other kinds.

    Wavelengths below `original_max_position_embeddings / high_freq_factor` stay, those above `... / low_freq_factor`
    are stretched by `factor`, and between the two the share changes linearly.
    """
    rope = _rope(run)
    if rope.get("rope_type") != "llama3":
        return None
    dim, factor = run.shape.head_dim, float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    share = ((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / factor + share)).float()


def _tokenizer(run: Finished) -> dict[str, Any]:
    try:
        data = json.loads((run.folder / "tokenizer.json").read_text(encoding="utf-8"))
        if data["model"]["type"] != "BPE":
            raise ValueError(f"it is a {data['model']['type']} tokenizer, and BPE is supported")
        return dict(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"GGUF needs the tokenizer.json of a BPE tokenizer ({what}): {_USE}.") from error


def _pre_tokenizer(data: dict[str, Any]) -> str:
    """The name that llama.cpp has for how text is split: gpt-2, smollm or llama-bpe.

    Raises:
        InputError: it has none that is known here.
    """
    outer = data.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    by_regex = kinds[-1] == "ByteLevel" and steps[-1].get("use_regex", True)
    if data["model"].get("byte_fallback") or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise InputError(f"GGUF is written for byte-level BPE tokenizers, and this one is of another kind: {_USE}.")
    if kinds == ["ByteLevel"] and by_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not by_regex and steps[0].get("pattern", {}).get("Regex") == _LLAMA3:
        return "llama-bpe"
    raise InputError(f"llama.cpp has no name that is known here for how this tokenizer splits text: {_USE}.")


def add_tokenizer(writer: GGUFWriter, run: Finished) -> None:
    """Tokens, merges, special tokens and chat template; a vocabulary shorter than the embedding is filled up."""
    data = _tokenizer(run)
    names = {index: token for token, index in data["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, TokenType.NORMAL)
    for added in data.get("added_tokens", []):
        names[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(data))
    size = run.shape.vocabulary
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([kinds.get(index, TokenType.UNUSED) for index in range(size)])
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    tokenizer = read_tokenizer(run.folder)
    eos = run.config.get("eos_token_id")
    for index, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if isinstance(index, int) and index < size:
            add(index)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
