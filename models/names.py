"""Names of the tensors in a checkpoint: prefixes, what a model has no place for, and what a misnamed checkpoint is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from .adapters import MERGE, TENSOR
from .families import Family

SHOWN = 3
_PACKED = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|absmax)$")
_WRAPPERS = {
    "base_model.model.": "PEFT",
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "pretrained_model.": "a value head of TRL",
}


def renamed(stored: str, family: Family) -> str:
    """The name that a tensor has here, of the one in a file.

    As in transformers the prefix of the model without its head may be missing, or stand before a name that has none.
    """
    for pattern, replacement in family.renamed:
        stored = re.sub(pattern, replacement, stored)
    base, roots = family.embedding.partition(".")[0], _roots(family)
    if not stored.startswith(roots):
        for name in (stored.removeprefix(f"{base}."), f"{base}.{stored}"):
            if name.startswith(roots):
                return name
    return stored


def _roots(family: Family) -> tuple[str, ...]:
    """How the names of all tensors of a model begin."""
    around = (family.positions, family.rotary, family.embedding_norm)
    parts = (family.embedding, family.layers, family.final_norm, family.head, *around)
    others = (name.rpartition(".")[0] for name in family.others)
    towers = family.sight.towers if family.sight else ()
    return tuple(f"{part}." for part in (*parts, *others, *towers) if part)


def left_out(names: Iterable[str], expected: Collection[str], family: Family) -> list[str]:
    """The tensors of a checkpoint that its model has no place for, without what follows from the config."""
    head = f"{family.head}.weight"  # where it is not expected, it is the embedding
    return sorted(n for n in names if n not in expected and n != head and not n.endswith("rotary_emb.inv_freq"))


def left_out_notice(names: Sequence[str], family: Family) -> str:
    """A sentence on tensors that `left_out` found."""
    tensors = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
    return (
        f"Left out: {tensors} of the checkpoint that '{family.model_type}' models have no place for ({listed(names)})."
    )


def listed(names: Iterable[str]) -> str:
    """Some of the names, those of different blocks as one: 'mtp.layers.*.norm.weight, mtp.fc.weight and 4 more'."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
    return ", ".join(kinds[:SHOWN]) + more


def task_of(architectures: Sequence[str] | None, family: Family) -> str | None:
    """The class of a config's `architectures` that has another head than a language model's; None where none has."""
    named = (name for name in architectures or () if "For" in name and _model_for(family) not in name)
    return next(named, None)


def _model_for(family: Family) -> str:
    """How the classes are called that have a language model's head."""
    return "ForConditionalGeneration" if family.sight else "ForCausalLM"


def give_causal(family: Family) -> str:
    """What to do with another."""
    return f"give a model that predicts text (a ...{_model_for(family)})"


def misfit(names: Collection[str], missing: str, family: Family, architectures: Sequence[str] | None) -> str:
    """What a checkpoint without the tensor `missing` is, and what to do: the end of a sentence that begins with it."""
    if found := first(names, TENSOR):
        return f"holds an adapter beside its weights ({found}): {MERGE}"
    if found := first(names, _PACKED):
        return f"holds quantized weights ({found}): give the full-precision checkpoint"
    if task := task_of(architectures, family):
        return f"is a {task}, which has no {missing}: {give_causal(family)}"
    if prefix := _prefix(names, family):
        by = f", as {_WRAPPERS[prefix]} leaves it" if prefix in _WRAPPERS else ""
        return (
            f"has names of tensors that begin with '{prefix}'{by}: save the model inside with `save_pretrained`, or "
            f"take '{prefix}' off the names"
        )
    if missing == f"{family.head}.weight" and architectures and _model_for(family) not in architectures[0]:
        return (
            f"is a {architectures[0]}, without the output layer {missing}, and its config.json does not tie that to "
            f"the embedding: save the whole model (a ...{_model_for(family)})"
        )
    if not any(name.startswith(f"{family.layers}.0.") and name.endswith("norm.weight") for name in names):
        return (
            f"has other names of tensors ({listed(sorted(names))}) than '{family.model_type}' models of transformers, "
            f"which have {missing}: save it again with `save_pretrained`"
        )
    return f"has no tensor {missing}, which its config.json asks for: download it again"


def _prefix(names: Collection[str], family: Family) -> str | None:
    """What stands before the name of the embedding, and has no meaning to transformers."""
    whole = f"{family.embedding}.weight"
    if whole in names:
        return None
    for known in (whole, whole.partition(".")[2]):
        if found := first(names, re.compile(rf"\.{re.escape(known)}$")):
            return found.removesuffix(known)
    return None


def first(names: Iterable[str], pattern: re.Pattern[str]) -> str | None:
    """The first of the names that has the pattern."""
    return next((name for name in sorted(names) if pattern.search(name)), None)
