"""The tokenizer of a GGUF file, as llama.cpp runs it."""

from __future__ import annotations

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType

from ...errors import InputError
from ...models.tokenizer import read_tokenizer
from ..finished import Finished

# The pattern that Llama 3's tokenizer splits text by, which llama.cpp knows by the name llama-bpe.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By what a tokenizer splits text with -> the name that llama.cpp has for it. Qwen 2 takes digits one by one.
_BY_REGEX = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
_USE = "use --format compressed-tensors or native"
_WHOLE = ""
_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def check(run: Finished) -> None:
    """Check that llama.cpp has the tokenizer of a run.

    Raises:
        InputError: it does not.
    """
    _pre_tokenizer(_tokenizer(run))


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
    """The name that llama.cpp has for how text is split: gpt-2, smollm, llama-bpe or qwen2; `_WHOLE` for not at all.

    Raises:
        InputError: it has none that is known here.
    """
    if data["model"].get("byte_fallback"):
        _prefixed(data)
        return _WHOLE
    outer = data.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    by_regex = kinds[-1] == "ByteLevel" and steps[-1].get("use_regex", True)
    if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and by_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits"):
            return "smollm"
        regex = steps[0].get("pattern", {}).get("Regex")
        if kinds == ["Split", "ByteLevel"] and not by_regex and regex in _BY_REGEX:
            return _BY_REGEX[regex]
    raise InputError(f"llama.cpp has no name that is known here for how this tokenizer splits text: {_USE}.")


def _prefixed(data: dict[str, Any]) -> bool:
    """Whether SentencePiece's tokenizer, as tokenizer.json has it, puts a space before a text.

    Raises:
        InputError: it does more to a text than to make its spaces visible.
    """
    outer, split = data.get("normalizer") or {}, data.get("pre_tokenizer")
    steps = outer.get("normalizers", [outer])
    kinds = [step.get("type") for step in steps]
    visible = steps[-1].get("pattern") == {"String": " "} and steps[-1].get("content") == _SPACE
    # A split at spaces splits nothing: there are none after the normalizer.
    whole = split is None or (split.get("type") == "Split" and split.get("pattern") == {"String": " "})
    if not whole or not visible or kinds not in (["Replace"], ["Prepend", "Replace"]):
        raise InputError(f"GGUF is written for tokenizers of bytes and of SentencePiece, and this is neither: {_USE}.")
    return kinds[0] == "Prepend"


def scores(data: dict[str, Any]) -> dict[str, float]:
    """What SentencePiece merges first: the later the first merge of a token is listed, the less its score."""
    found: dict[str, float] = {}
    for rank, merge in enumerate(data["model"]["merges"]):
        found.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank))
    return found


def _add_pieces(writer: GGUFWriter, data: dict[str, Any], size: int) -> None:
    """A tokenizer of SentencePiece: tokens, scores, and types that say which are bytes."""
    vocabulary, found = data["model"]["vocab"], scores(data)
    least = -float(len(data["model"]["merges"]))
    names, kinds = _tokens(data)
    for token, index in vocabulary.items():
        if token == data["model"].get("unk_token"):
            kinds[index] = TokenType.UNKNOWN
        elif _BYTE.fullmatch(token):
            kinds[index] = TokenType.BYTE
        elif kinds[index] == TokenType.USER_DEFINED and (token in found or len(token) == 1):
            kinds[index] = TokenType.NORMAL  # its merges make it, so it need not be looked for
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_scores([found.get(names.get(index, ""), least) for index in range(size)])
    writer.add_token_types([kinds.get(index, TokenType.UNUSED) for index in range(size)])
    writer.add_add_space_prefix(_prefixed(data))


def _tokens(data: dict[str, Any]) -> tuple[dict[int, str], dict[int, TokenType]]:
    """Tokens by index, and their types, as far as tokenizer.json says."""
    names = {index: token for token, index in data["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, TokenType.NORMAL)
    for added in data.get("added_tokens", []):
        names[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return names, kinds


def _add_bytes(writer: GGUFWriter, data: dict[str, Any], split: str, size: int) -> None:
    """A tokenizer of bytes: tokens, merges, and how text is split."""
    names, kinds = _tokens(data)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([kinds.get(index, TokenType.UNUSED) for index in range(size)])
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def add_tokenizer(writer: GGUFWriter, run: Finished) -> None:
    """Tokens, merges, special tokens and chat template; a vocabulary shorter than the embedding is filled up."""
    data, size = _tokenizer(run), run.shape.vocabulary
    split = _pre_tokenizer(data)
    if split == _WHOLE:
        _add_pieces(writer, data, size)
    else:
        _add_bytes(writer, data, split, size)
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
