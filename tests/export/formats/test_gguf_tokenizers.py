"""Tokenizers in GGUF: llama.cpp's names of their first steps, and the scores of SentencePiece's."""

from typing import Any

import pytest
from gguf import GGUFWriter

from rotoboa.errors import InputError
from rotoboa.export.formats import gguf_tokenizer

LLAMA3 = gguf_tokenizer._LLAMA3
BYTES = {"type": "ByteLevel", "add_prefix_space": False}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{**BYTES, "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": LLAMA3}}, {**BYTES, "use_regex": False}], "llama-bpe"),
        (
            [{"type": "Split", "pattern": {"Regex": LLAMA3.replace("{1,3}", "")}}, {**BYTES, "use_regex": False}],
            "qwen2",
        ),
        ([{"type": "Split", "pattern": {"Regex": r"\s+"}}, {**BYTES, "use_regex": False}], None),
        ([{**BYTES, "use_regex": False}], None),
        ([{"type": "Metaspace"}], None),
    ],
)
def test_pre_tokenizers_have_the_names_of_llama_cpp(steps: list[dict[str, Any]], name: str | None) -> None:
    sequence = {"type": "Sequence", "pretokenizers": steps}
    for outer in [sequence] + steps * (len(steps) == 1):
        data = {"pre_tokenizer": outer, "model": {"type": "BPE"}}
        if name is None:
            with pytest.raises(InputError, match="tokenizer"):
                gguf_tokenizer._pre_tokenizer(data)
        else:
            assert gguf_tokenizer._pre_tokenizer(data) == name


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


@pytest.mark.parametrize(
    ("normalizer", "split", "prefixed"),
    [
        (SPACES, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}, False),  # Gemma
        ({"type": "Sequence", "normalizers": [{"type": "Prepend"}, SPACES]}, None, True),  # Mistral
        ({"type": "Sequence", "normalizers": [{"type": "NFKC"}, SPACES]}, None, None),
        (SPACES, {"type": "Metaspace"}, None),
        (None, None, None),
    ],
)
def test_tokenizers_of_sentencepiece(normalizer: Any, split: Any, prefixed: bool | None) -> None:
    """Scores in the order of merges, bytes by their type, and no merge that is looked for as a word of its own."""
    tokens = ["<unk>", "<s>", "<0x0A>", "a", "b", "\u2581", "ab", "\u2581ab", "\u2581\u2581", "<table>"]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": {t: i for i, t in enumerate(tokens)},
             "merges": [["a", "b"], "\u2581 ab", ["\u2581a", "b"], ["\u2581", "\u2581"]]}  # fmt: skip
    added = [{"id": 1, "content": "<s>", "special": True}]
    added += [{"id": i, "content": tokens[i], "special": False} for i in (8, 9)]
    data = {"model": model, "normalizer": normalizer, "pre_tokenizer": split, "added_tokens": added}
    if prefixed is None:
        with pytest.raises(InputError, match="tokenizers of bytes and of SentencePiece, and this is neither"):
            gguf_tokenizer._pre_tokenizer(data)
        return
    assert gguf_tokenizer._pre_tokenizer(data) == ""
    writer = GGUFWriter(None, "llama")
    gguf_tokenizer._add_pieces(writer, data, 11)
    found = {key.removeprefix("tokenizer.ggml."): field.value for key, field in writer.kv_data[0].items()}
    assert found["tokens"] == [*tokens, "[PAD10]"] and found["model"] == "llama"
    assert found["scores"] == [-4.0] * 6 + [0.0, -1.0, -3.0, -4.0, -4.0]
    assert found["token_type"] == [2, 3, 6, 1, 1, 1, 1, 1, 1, 4, 5] and found["add_space_prefix"] == prefixed
