"""Checks a GGUF file of ours by its own words, before anything loads it."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader

from ...errors import InputError
from ..writing import is_tied

_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm")


def inspect(folder: Path) -> Path:
    """The one GGUF file of a folder, whole, with the tensors and shapes that its metadata asks for.

    Raises:
        InputError: there is none or more than one; it is damaged; its sizes contradict its tensors.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{folder} has {len(files)} GGUF files, where one is exported: export it again.")
    file = files[0]
    try:
        reader = GGUFReader(file)
        sizes = {key: _number(reader, f"llama.{key}") for key in _KEYS}
        found = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError, MemoryError) as error:
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{file} is not a whole GGUF file of a llama ({what}): copy or export it again.") from error
    expected = _expected(sizes)
    if is_tied(folder):
        del expected["output.weight"]
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{file} has no tensor {name}: copy or export it again.")
        if found[name] != shape:
            raise InputError(
                f"{file}: tensor {name} has shape {found[name]}, and its metadata ask for {shape}: they do not belong "
                "together, export the model again."
            )
    return file


_KEYS = (
    "block_count", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length",
)  # fmt: skip


def _number(reader: GGUFReader, key: str) -> int:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"it does not say {key}")
    return int(field.contents())


def _expected(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, vocabulary = (sizes[key] for key in ("embedding_length", "feed_forward_length", "vocab_size"))
    width = sizes["attention.key_length"]
    queries, keys = sizes["attention.head_count"] * width, sizes["attention.head_count_kv"] * width
    shapes: list[tuple[int, ...]] = [
        (queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries),
        (ffn, hidden), (ffn, hidden), (hidden, ffn), (hidden,), (hidden,),
    ]  # fmt: skip
    expected: dict[str, tuple[int, ...]] = {
        f"blk.{index}.{part}.weight": shape
        for index in range(sizes["block_count"])
        for part, shape in zip(_PARTS, shapes, strict=True)
    }
    outer = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    return {**expected, **outer, "output.weight": (vocabulary, hidden)}
