"""Files that hold all experts of a block in a tensor of three dimensions, as numbers or in MXFP4."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..family import Family
from ..shape import Shape
from .mxfp4 import BLOCK, BLOCKS, SCALES, dequantized

_BOTH, _DOWN = "gate_up_proj", "down_proj"


def split_fused(tensors: Mapping[str, Tensor], family: Family, shape: Shape) -> dict[str, Tensor]:
    """The tensors of a block by their names inside it, with weight and bias of every expert's projections apart.

    Where each expert is by itself already, they are as they were.
    """
    result, whole = dict(tensors), dict[str, Tensor]()
    if not any(f"{family.experts}.{_DOWN}{end}" in result for end in ("", BLOCKS)):
        return result
    for name in (_BOTH, _DOWN):
        stem = f"{family.experts}.{name}"
        if stem + BLOCKS in result:  # (experts, out, in)
            whole[name] = dequantized(result.pop(stem + BLOCKS), result.pop(stem + SCALES))
            continue
        whole[name] = result.pop(stem)
    # The hub's are (experts, in, out), and those that transformers saves anew (experts, out, in), as it computes.
    if _turned(whole[_BOTH].shape, whole[_DOWN].shape, shape):
        whole = {name: tensor.mT for name, tensor in whole.items()}
    kinds = {"weight": whole}
    if family.expert_bias:
        kinds["bias"] = {name: result.pop(f"{family.experts}.{name}_bias") for name in (_BOTH, _DOWN)}
    for kind, parts in kinds.items():
        for i in range(shape.experts):
            both = parts[_BOTH][i]
            gate, up = (both[::2], both[1::2]) if family.interleaved else both.split(shape.ffn)
            for projection, part in zip(family.expert(i), (gate, up, parts[_DOWN][i]), strict=True):
                result[f"{projection}.{kind}"] = part.contiguous()
    return result


def on_disk(
    expected: Mapping[str, torch.Size], family: Family, shape: Shape, found: Callable[[str], tuple[int, ...]]
) -> Mapping[str, torch.Size]:
    """`layout.expected_shapes` as files have them, which may hold all experts of a block together, either way round.

    `found` gives the shape of a tensor in the files, () where there is none.
    """
    stems = [f"{family.layers}.{i}.{family.experts}" for i in range(shape.blocks) if family.at(i).experts]
    ends = ("", BLOCKS)
    if not family.fused or not any(found(f"{stem}.{_DOWN}{end}") for stem in stems for end in ends):
        return expected
    result = {name: size for name, size in expected.items() if f".{family.experts}." not in name}
    for stem in stems:
        result.update(_of_block(stem, family, shape, found))
    return result


def _of_block(
    stem: str, family: Family, shape: Shape, found: Callable[[str], tuple[int, ...]]
) -> Iterator[tuple[str, torch.Size]]:
    both, down = f"{stem}.{_BOTH}", f"{stem}.{_DOWN}"
    turned = _turned(found(both), found(down), shape)
    for name, (rows, columns) in zip((both, down), _sizes(shape), strict=True):
        if found(name + BLOCKS):
            yield name + BLOCKS, torch.Size((shape.experts, rows, columns // BLOCK, BLOCK // 2))
            yield name + SCALES, torch.Size((shape.experts, rows, columns // BLOCK))
        else:
            yield name, torch.Size((shape.experts, columns, rows) if turned else (shape.experts, rows, columns))
        if family.expert_bias:
            yield f"{name}_bias", torch.Size((shape.experts, rows))


def _sizes(shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Outputs and inputs of gate and up together, and of down."""
    return (2 * shape.ffn, shape.hidden), (shape.hidden, shape.ffn)


def _turned(both: tuple[int, ...], down: tuple[int, ...], shape: Shape) -> bool:
    """Whether fused experts are (experts, in, out): both tensors say it together, since one of them may be square."""
    return (tuple(both[:0:-1]), tuple(down[:0:-1])) == _sizes(shape)
