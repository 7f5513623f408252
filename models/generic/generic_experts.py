"""Experts of a decoder without a row: where they are, and what files call them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from ..experts.expert_layers import Experts, is_plain, split_experts


class UnfitError(Exception):
    """Says what a model is that it should not be, or has."""


def renamed_in(model: Any) -> tuple[tuple[str, str], ...]:
    """(pattern, replacement) from names on disk to those of the modules, as transformers has them.

    Experts that are each by itself on disk have the names that `split_experts` gives them.
    """
    found: list[tuple[str, str]] = []
    for one in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(one, WeightConverter):
            found += _of_experts(one)
        elif isinstance(one, WeightRenaming):
            found += zip(one.source_patterns, one.target_patterns, strict=True)
        else:
            raise UnfitError("its tensors are not on disk as it computes with them")
    return tuple(found)


def _of_experts(change: WeightConverter) -> list[tuple[str, str]]:
    """The names of one projection of each expert, or of two that are laid end to end in one tensor of all."""
    (target, *more), sources = change.target_patterns, change.source_patterns
    stem, _, last = target.removesuffix("$").rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last, ())
    known = all(isinstance(step, MergeModulelist | Concatenate) for step in change.operations)
    alone = all(source.count("*") == 1 for source in sources)
    if more or not known or not alone or len(sources) != len(parts):
        raise UnfitError("its tensors are not on disk as it computes with them")
    patterns = (re.escape(source.removesuffix("$")).replace(r"\*", r"(\d+)") for source in sources)
    return [(f"{p}$", rf"{stem}.\1.{part}.weight") for p, part in zip(patterns, parts, strict=True)]


def split_all(model: nn.Module) -> list[str]:
    """Give experts that are held together linear layers of their own, in place; the names of what had them."""
    names = [name for name, module in model.named_modules() if is_plain(module)]
    for name in names:
        fused: Any = model.get_submodule(name)
        _, hidden, ffn = fused.down_proj.shape
        model.set_submodule(name, split_experts(fused, hidden, ffn, bias=False))
    return names


def experts_of_blocks(blocks: nn.ModuleList, names: list[str]) -> dict[str, Any]:
    """What a family says of the experts of its blocks, of which each has one mixture or none."""
    inside = [name for name, module in blocks[0].named_modules() if isinstance(module, Experts)]
    if len(inside) != (len(names) > 0) or len(names) not in (0, len(blocks)):
        raise UnfitError("its blocks have experts in several places, or not all of them have")
    if not inside:
        return {}
    parts = {part: f"{inside[0]}.{{}}.{part}_proj" for part in ("gate", "up", "down")}
    count = len(list(blocks[0].get_submodule(inside[0]).children()))
    return {"experts": inside[0], "fused": True, "expert_count": count, **parts}
