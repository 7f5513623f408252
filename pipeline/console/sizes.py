"""How large a model is, as people count it: blocks, embedding and head, and the bits of a weight in the whole file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.files import tensor_sizes
from .human import human_size

if TYPE_CHECKING:  # tables of a run are shown without torch
    from ...models.decoder import Decoder

BITS = {"bits_per_weight": "what is quantized", "bits_per_weight_of_file": "the whole file"}


def exported_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each tensor of a model folder, by its name.

    Raises:
        InputError: a file is damaged.
    """
    return {name: size for file in sorted(folder.glob("*.safetensors")) for name, size in tensor_sizes(file).items()}


def part_sizes(stored: Mapping[str, int], decoder: Decoder) -> dict[str, int]:
    """Bytes of `blocks` with the final norm, of `embedding` and of `head`, which is 0 where it is the embedding.

    What a rotated stream has before such a head is the final norm's weight, and counts with it.

    Args:
        stored: bytes of each tensor of the finished model, by its name.
        decoder: of the original one.
    """
    f = decoder.family
    turn = f"{f.head}.turn"  # `models.outer_layers.TURN`, which takes torch
    modules = {"embedding": [f.embedding, *([f.positions] if f.positions else [])], "head": [f.head]}
    found = {
        part: sum(size for name, size in stored.items() if name.rpartition(".")[0] in names and name != turn)
        for part, names in modules.items()
    }
    return {"blocks": sum(stored.values()) - sum(found.values()), **found}


def parameter_count(decoder: Decoder) -> int:
    """Parameters of the original model; what is tied counts once."""
    outer = decoder.shape.vocabulary * decoder.shape.hidden
    return sum(tensor.numel() for tensor in decoder.shapes.values()) - outer * was_tied(decoder)


def was_tied(decoder: Decoder) -> bool:
    """Whether embedding and head of the original model are one matrix."""
    return decoder.tied


def bits_of_file(stored: Mapping[str, int], decoder: Decoder) -> float:
    """Bits that the finished model takes for each parameter of the original one."""
    return 8 * sum(stored.values()) / parameter_count(decoder)


def size_rows(
    sizes: Mapping[str, int], bits: Mapping[str, float | None], was_tied: bool = False
) -> Iterator[tuple[str, str]]:
    """Rows of a table of sizes. What is not there has no row.

    Args:
        sizes: bytes: `original`, `quantized`, and `blocks`, `embedding` and `head` of it.
        bits: by the keys of `BITS`.
        was_tied: embedding and head of the original model were one matrix.
    """
    for name, size in sizes.items():
        label, shown = name.replace("_", " "), human_size(size)
        if name == "quantized" and sizes.get("original"):
            shown += f", {size / sizes['original']:.0%} of the original"
        elif name == "embedding" and not sizes.get("head", 1):
            label = "embedding, which is the head"
        elif name == "head" and not size:
            continue
        elif name == "head" and was_tied:
            label = "head, which was the embedding"
        yield ("  " if name in ("blocks", "embedding", "head") else "") + label, shown
    for name, of in BITS.items():
        if (width := bits.get(name)) is not None:
            yield f"bits per weight of {of}", f"{width:.3f}"
