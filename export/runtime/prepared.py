"""Blocks and models of transformers made ready for packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...boa.online.attention import CENTER, NAME, set_attention
from ...boa.online.transforms import FOUND, InputTransform, OnlineTransforms, holder
from ...boa.scheme import QuantizationScheme
from ...models.decoder import Decoder
from ...models.families import Family
from ...models.layout import fold_layer_norms, give_norm_bias, split_modules
from ...models.shape import Shape
from ..spec import Spec
from .embedding import QuantizedEmbedding, TiedHead
from .linear import QuantizedLinear


def prepare_block(
    block: nn.Module, family: Family, schemes: Mapping[str, QuantizationScheme], transforms: OnlineTransforms
) -> nn.Module:
    """Replace a block's projections by packed layers and switch its attention's transforms on, in place.

    A projection whose `schemes` leave its weight in full precision stays, and what runs online comes before it.
    """
    attention = block if family.generic else block.get_submodule(family.attention)
    if transforms.attention.centered:
        attention.register_buffer(CENTER, torch.zeros_like(block.get_parameter(f"{family.key}.weight")[:, 0]))
    for name in transforms.attention.scale_names.values():
        attention.register_buffer(name, torch.ones(1, device=block.get_parameter(f"{family.key}.weight").device))
    for name, transform in transforms.by_projection(family).items():
        linear, first = block.get_submodule(name), holder(family, name)
        assert isinstance(linear, nn.Linear)
        args = schemes[name].weights
        held = None if first == name else block.get_submodule(first)
        if not args.quantizes:
            with linear.weight.device:
                transform.make_room(linear, held)
            if transform != InputTransform():
                linear.register_forward_pre_hook(partial(_transformed, transform))
            continue
        block.set_submodule(name, QuantizedLinear.in_place_of(linear, args, transform, held))
    set_attention(attention, transforms.attention)
    return block


def _transformed(transform: InputTransform, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (transform.of(module)(arguments[0]), *arguments[1:])


def prepare_model(model: nn.Module, family: Family, shape: Shape, spec: Spec) -> None:
    """Make a whole model of transformers, without weights, what a native checkpoint loads into, in place."""
    for index, block in enumerate(model.get_submodule(family.layers).children()):
        schemes, transforms = spec.schemes(family, index), spec.transforms(shape, family, index)
        split = split_modules(block, family.at(index), shape.at(index), NAME)
        prepare_block(split, family.at(index), schemes, transforms)
    if family.embedding_norm is not None:
        model.set_submodule(family.embedding_norm, nn.Identity())  # the embedding has it in its rows
    if family.layer_norm:
        give_norm_bias(model, family.final_norm)
    if family.layer_norm and spec.turned:
        fold_layer_norms(model, family)  # first: a packed head has the bias of the one that it replaces
    _prepare_outer(model, family, spec)


def _prepare_outer(model: nn.Module, family: Family, spec: Spec) -> None:
    """Make embedding and head packed layers, where they are; a model without this head has another or none."""
    args, embedding = spec.outer(family.embedding), model.get_submodule(family.embedding)
    if args.quantizes:
        assert isinstance(embedding, nn.Embedding)
        with embedding.weight.device:
            packed = QuantizedEmbedding(
                embedding.num_embeddings,
                embedding.embedding_dim,
                bits=args.num_bits,
                group_size=args.group_size,
                format=args.format,
                dtype=embedding.weight.dtype,
                factor=embedding.embedding_dim**0.5 if family.scaled_embedding else None,
            )
        model.set_submodule(family.embedding, packed)
    if "." not in family.head and not hasattr(model, family.head):
        return
    args, head = spec.outer(family.head), model.get_submodule(family.head)
    if spec.tied_head:
        found = model.get_submodule(family.embedding)
        assert isinstance(found, QuantizedEmbedding)
        with found.kind.device:
            model.set_submodule(family.head, TiedHead(found, turns=spec.turned))
    elif args.quantizes:
        assert isinstance(head, nn.Linear)
        model.set_submodule(family.head, QuantizedLinear.in_place_of(head, args))


def packed_block(decoder: Decoder, index: int, tensors: dict[str, Tensor], spec: Spec) -> nn.Module:
    """Block `index` made from the tensors of `pack_block`, ready to compute."""
    family = decoder.family.at(index)
    schemes, transforms = spec.schemes(family, index), spec.transforms(decoder.shape, family, index)
    module = prepare_block(decoder.empty_block(index), family, schemes, transforms)
    room = {name for name, _ in module.named_buffers()}
    left = {name for name in tensors if name.rpartition(".")[2] in FOUND and name not in room}  # out by `spec`
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left}
    return decoder.block(index, tensors, module)
