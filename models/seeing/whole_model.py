"""The class that a model comes with, and the attention that its decoder has in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ..family import Family


def auto_class(family: Family) -> Any:
    """The class of transformers that makes and loads whole models of the family."""
    return AutoModelForCausalLM if family.sight is None else AutoModelForImageTextToText


def attention_in(family: Family, name: str) -> str | dict[str, str]:
    """`attn_implementation` of a whole model whose decoder shall have the attention `name`: a tower keeps its own.

    A class that has attention inside itself knows no other name than its own; ours then takes the module's place.
    """
    name = family.own_attention or name
    return name if family.sight is None else {"text_config": name}


def linears_beside(config: Any, family: Family) -> list[str]:
    """The linear layers of a whole model that are in its towers, by full names."""
    if family.sight is None:
        return []
    with torch.device("meta"):
        model = auto_class(family).from_config(config)
    modules = model.named_modules()
    return [
        name for name, module in modules if isinstance(module, nn.Linear) and name.startswith(family.sight.prefixes)
    ]
