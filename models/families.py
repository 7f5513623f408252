"""Where each architecture keeps its parts: the rows of `rows/`, found by the config of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .family import Family
from .rows import hybrid_rows, latent_rows, layer_norm_rows, llama_rows, mixture_rows, post_norm_rows
from .rows.row_parts import ALL_SITES, SITES, Merged
from .rows.seeing_rows import rows_that_see

__all__ = [
    "ALL_SITES",
    "FAMILIES",
    "SITES",
    "Family",
    "Merged",
    "check_type",
    "family_for",
    "family_of",
    "has_row",
    "variant_of",
]

_TABLES = (llama_rows, post_norm_rows, layer_norm_rows, mixture_rows, hybrid_rows, latent_rows)
FAMILIES: dict[str, Family] = {row.model_type: row for table in _TABLES for row in table.ROWS}
FAMILIES |= rows_that_see(FAMILIES)


def check_type(model_type: str, source: str) -> None:
    """Check that there is a row of `model_type`, or a decoder of transformers; `source` names the model in the error.

    Raises:
        InputError: there is neither.
    """
    from .generic.generic_family import is_causal_type  # a recipe's fields are read without torch

    if not is_causal_type(model_type):
        family_of(model_type, source)


def family_of(model_type: str, source: str) -> Family:
    """The row of `model_type`; `source` names the model in the error.

    Raises:
        InputError: no row has this type.
    """
    if model_type not in FAMILIES:
        raise InputError(
            f"{source} is a '{model_type}' model, which is not supported; supported architectures: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def has_row(config: Any) -> bool:
    """Whether a model of this config is one that its type's row describes."""
    row = FAMILIES.get(getattr(config, "model_type", ""))
    if row is None or not row.otherwise_generic:
        return row is not None
    config = row.text(config)
    return not any(_illegal(variant_of(row, config), config))


def _illegal(family: Family, config: Any) -> Iterator[tuple[str, Any, str]]:
    """Fields of a config that a family is not supported with, their values, and what it is supported with."""
    for field, legal in (family.legal or {}).items():
        value = getattr(config, field, None)
        values = (getattr(config, legal, None),) if isinstance(legal, str) else legal
        if value not in values:
            yield field, value, f"{legal} ({values[0]})" if isinstance(legal, str) else str(values[0])


def variant_of(row: Family, config: Any) -> Family:
    """A row as the config of a model of its type has it."""
    for variant in row.variants:
        if variant.holds(config):
            row = replace(row, **variant.fields)
    return row


def family_for(config: Any, source: str) -> Family:
    """The row of a transformers config with what the config adds to it; `source` names the model in errors.

    Where there is no row it is found by running the model: see `generic_family`.

    Raises:
        InputError: the model is not supported, or the config asks for a variant that is not supported.
    """
    from .generic.generic_family import generic_family, is_causal_type

    if not has_row(config) and is_causal_type(config.model_type):
        return generic_family(config, source)
    row = family_of(config.model_type, source)
    config = row.text(config)
    if row.sight and config.model_type not in row.sight.texts:
        raise InputError(
            f"{source} is a '{row.model_type}' model whose decoder is a '{config.model_type}', and "
            f"{' or '.join(row.sight.texts)} is supported: choose another model."
        )
    family = variant_of(row, config)
    for field, value, wanted in _illegal(family, config):
        raise InputError(
            f"{source} has {field} {value} in its config.json, and '{family.model_type}' models are supported "
            f"with {wanted} alone: choose another model of the family."
        )
    count = int(getattr(config, family.experts_field)) if family.experts_field else 0
    sizes = None if family.measured is None else family.measured(config)
    family = replace(family, expert_count=count, sizes=sizes)
    return replace(family, blocks=_blocks(family, config))


def _blocks(family: Family, config: Any) -> tuple[Family, ...]:
    """That of each block, where there are several kinds."""
    dense, made = dense_blocks(family, config), dict[tuple[Any, bool], Family]()
    if not dense and not family.kinds:
        return ()
    kinds = getattr(config, family.kind_field) if family.kinds else [""] * config.num_hidden_layers
    keys = [(kinds[index], index in dense) for index in range(config.num_hidden_layers)]
    for kind, is_dense in dict.fromkeys(keys):
        block = replace(family, kinds=None, **(family.kinds or {}).get(kind, {}))
        made[kind, is_dense] = _without_experts(block) if is_dense else block
    return tuple(made[key] for key in keys)


def _without_experts(block: Family) -> Family:
    """That of a dense block of a mixture, which has an MLP alone."""
    names = {part: getattr(block, part).replace(".experts.{}", "") for part in ("gate", "up", "down")}
    none: dict[str, Any] = {"experts": None, "router": None, "shared": "", "shared_gate": "", "expert_count": 0}
    return replace(block, **none, **names)


def dense_blocks(family: Family, config: Any) -> frozenset[int]:
    """The blocks of a mixture that have one MLP in place of experts."""
    if family.dense is None:
        return frozenset()
    return frozenset(index for index in range(config.num_hidden_layers) if family.dense(config, index))
