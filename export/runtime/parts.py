"""Where a model of transformers keeps its decoder: with a head for text, with another head, or with none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ...errors import InputError
from ...models.families import Family

_NAMES = ("embedding", "layers", "rotary", "final_norm", "positions", "embedding_norm")


def base_prefix(model: nn.Module) -> str:
    """What the names of a whole model begin with and those of this one, a decoder without a head, do not; else ""."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    return f"{prefix}." if prefix and not hasattr(model, prefix) else ""


def family_in(model: nn.Module, family: Family) -> Family:
    """The family with the names that its parts have in `model`.

    Raises:
        InputError: the model keeps its decoder elsewhere.
    """
    prefix = base_prefix(model)
    names: Mapping[str, Any] = {
        name: value.removeprefix(prefix) for name in _NAMES if (value := getattr(family, name)) is not None
    }
    found = replace(family, **names)
    try:
        model.get_submodule(found.layers)
    except AttributeError as error:
        raise InputError(
            f"a run cannot be loaded as {type(model).__name__}: use AutoModelForCausalLM, AutoModel, "
            "AutoModelForSequenceClassification or AutoModelForTokenClassification."
        ) from error
    return found


def is_new_head(name: str, model: nn.Module, family: Family) -> bool:
    """Whether a tensor of `model` is of a head that the run has not, which transformers makes and the user trains."""
    return not base_prefix(model) and not name.startswith((f"{model.base_model_prefix}.", f"{family.head}."))
