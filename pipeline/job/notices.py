"""What is said of a recipe before any work: given fields that cannot do anything, and too little calibration text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...boa.objective.objective import FEW_TOKENS
from ...boa.online.activations import OWN, SEARCHED
from ...boa.online.directions import KEPT
from ...boa.solver.rounding_settings import LAYERWISE
from ...models.decoder import Decoder
from ...rotation.rotate import Rotations
from ..recipe.fields import given_fields
from ..recipe.layers import end_args
from ..recipe.recipe import Recipe
from ..recipe.settings import (
    finds_scales,
    has_inputs_in,
    most_directions,
    rotations_of,
    serving,
    stays_tied,
    takes_directions,
)


@dataclass(frozen=True)
class _Case:
    """What decides whether a field can do anything."""

    recipe: Recipe
    decoder: Decoder
    rotations: Rotations

    @property
    def method(self) -> str:
        return self.recipe.weights.method

    @property
    def is_seeded(self) -> bool:
        """Whether a rotation has random signs: those that run online have none."""
        return self.rotations.turned or self.rotations.r2


_Why = Callable[[_Case], str | None]


def _of_method(*methods: str) -> _Why:
    """A field that these methods do not read."""
    return lambda case: f"weights.method is {case.method}" if case.method in methods else None


def _drift(case: _Case) -> str | None:
    if case.method == "rtn":
        return "weights.method is rtn"
    if case.recipe.weights.alpha == 0:
        return "weights.alpha is 0"
    if case.decoder.family.post_norms:
        return f"{case.decoder.family.model_type} has norms after attention and MLP"
    return None


def _grid(case: _Case) -> str | None:
    """Without a Hessian both searches weigh all errors alike."""
    return _RTN(case) if case.recipe.weights.grid in ("diagonal", "hessian") else None


def _learned(case: _Case) -> str | None:
    return None if case.method in ("adaround", "aespa", "brecq") else f"weights.method is {case.method}"


def _seed(case: _Case) -> str | None:
    return None if case.is_seeded else "only R1 merged and R2 are random, and both are off"


def _blocks(case: _Case) -> str | None:
    rotation = case.recipe.rotation
    is_on = case.rotations.r1 is not None or rotation.r2 or rotation.r4
    return None if is_on else "R1, R2 and R4 are off"


def _r4_blocks(case: _Case) -> str | None:
    rotation = case.recipe.rotation
    return "rotation.r4 is off" if not rotation.r4 else "rotation.blocks says it" if rotation.blocks else None


def _text(case: _Case, *, reads_some: bool = False) -> str | None:
    """Calibration text, that the weights are not rounded by; `reads_some`: but the first of it places R1."""
    rotation = case.recipe.rotation
    cache = case.recipe.cache
    centered = cache.center and cache.key_bits < 16 and _served(case) is None
    read = rotation.scale or (rotation.seeds > 1 and case.is_seeded) or centered or finds_scales(case.recipe)
    read = read or (reads_some and rotation.r1 == "auto" and case.rotations.turned)
    return None if read else _RTN(case)


def _activations(case: _Case) -> str | None:
    return "activations.bits is 16" if case.recipe.activations.bits == 16 else None


def _activation_search(case: _Case) -> str | None:
    found = case.recipe.activations
    other = {"format": (found.format, "int"), "convention": (found.convention, OWN)}
    changed = (f"activations.{name} is {value}" for name, (value, plain) in other.items() if value != plain)
    return _activations(case) or next(changed, None)


def _dynamic(case: _Case) -> str | None:
    return None if has_inputs_in("fp8", case.recipe) else _activations(case) or "no input is in fp8"


def _directions(case: _Case) -> str | None:
    if case.decoder.family.generic:
        return "models without a family of their own have none"
    few = takes_directions(case.recipe)
    return None if few else _activations(case) or f"no input is of integers of fewer than {KEPT} bits"


def _convention(case: _Case) -> str | None:
    found = case.recipe.activations.format
    return _activations(case) or (None if found == "int" else f"activations.format is {found}")


def _activation_clip(case: _Case) -> str | None:
    found = case.recipe.activations
    return _activation_search(case) or _searched("activations", found.search, found.bits)


def _cache(case: _Case) -> str | None:
    stays = {case.recipe.cache.key_bits, case.recipe.cache.value_bits} == {16}
    return "cache.key_bits and cache.value_bits are 16" if stays else None


def _served(case: _Case) -> str | None:
    found = serving(case.recipe)
    return None if found == OWN else f"cache.served_by is {found}, which turns and rounds keys and values by itself"


def _own_cache(case: _Case) -> str | None:
    return _cache(case) or _served(case)


def _cache_search(case: _Case) -> str | None:
    return _own_cache(case) or ("cache.format is fp8" if case.recipe.cache.format == "fp8" else None)


def _center(case: _Case) -> str | None:
    return "cache.key_bits is 16" if case.recipe.cache.key_bits == 16 else _served(case)


def _cache_clip(case: _Case) -> str | None:
    found = case.recipe.cache
    return _cache_search(case) or _searched("cache", found.search, min(found.key_bits, found.value_bits))


def _searched(section: str, search: bool, bits: int) -> str | None:
    if not search:
        return None
    return f"{section}.search is on, which " + (
        "chooses it each time" if bits <= SEARCHED else f"clips nothing at more than {SEARCHED} bits"
    )


def _budgeted(case: _Case) -> str | None:
    weights = case.recipe.weights
    return None if weights.budget is weights.size is None else "a budget chooses the bits"


def _tied(case: _Case) -> str | None:
    tied = stays_tied(case.recipe, case.rotations, case.decoder)
    return "the head is the embedding, and has its bits" if tied else None


def _embedding(case: _Case) -> str | None:
    return None if end_args(case.recipe.embedding).quantizes else "embedding.bits is 16"


def _head(case: _Case) -> str | None:
    return _tied(case) if end_args(case.recipe.head).quantizes else "head.bits is 16"


_RTN = _of_method("rtn")
_BY_LAYER = _of_method(*LAYERWISE)

IDLE: dict[str, _Why] = {
    "embedding.group_size": _embedding,
    "head.bits": _tied,
    "embedding.symmetric": _embedding,
    "head.format": _tied,
    "head.group_size": _head,
    "rotation.blocks": _blocks,
    "head.symmetric": _head,
    "rotation.r3": _served,
    "rotation.r4_blocks": _r4_blocks,
    "rotation.seed": _seed,
    "rotation.seeds": _seed,
    "weights.bits": _budgeted,
    "weights.choices": lambda case: None if _budgeted(case) else "there is no weights.budget or weights.size",
    "weights.budget": lambda case: "weights.size says it" if case.recipe.weights.size is not None else None,
    "weights.rows": _BY_LAYER,
    "weights.act_order": _RTN,
    "weights.grid": _grid,
    "weights.damping": _RTN,
    "weights.alpha": _RTN,
    "weights.refine": _RTN,
    "weights.starts": _RTN,
    "weights.tabu": _RTN,
    "weights.drift": _drift,
    "weights.head": _RTN,
    "weights.attention": _BY_LAYER,
    "weights.value_rows": _BY_LAYER,
    "weights.value_output": _BY_LAYER,
    "weights.iterations": _learned,
    "weights.learning_rate": _learned,
    "weights.regulariser": _learned,
    "activations.group_size": _activations,
    "activations.symmetric": _activations,
    "activations.clip": _activation_clip,
    "activations.search": _activation_search,
    "activations.convention": _convention,
    "activations.format": _activations,
    "activations.dynamic": _dynamic,
    "activations.directions": _directions,
    "cache.clip": _cache_clip,
    "cache.search": _cache_search,
    "cache.center": _center,
    "cache.sink": _own_cache,
    "cache.served_by": _cache,
    "cache.format": _cache,
    "calibration.samples": _text,
    "calibration.seed": lambda case: _text(case, reads_some=True),
}
"""Fields that can be without effect: why such a field is so in a recipe, else None. A result is then the same, byte for
byte, whatever the field is; what is written down of the run is not. All other fields always have a part in it."""


def idle_fields(recipe: Recipe, decoder: Decoder) -> dict[str, str]:
    """The fields that were given and have no effect in this recipe, and why. Packaged recipes are nobody's wish."""
    case = _Case(recipe, decoder, rotations_of(recipe, decoder))
    reasons = {name: why(case) for name, why in IDLE.items() if name in given_fields(recipe)}
    return {name: reason for name, reason in reasons.items() if reason}


def early_notices(recipe: Recipe, decoder: Decoder, length: int) -> list[str]:
    """What a user should know of a recipe, with sequences of `length`, before any work, a sentence each."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in idle_fields(recipe, decoder).items():
        by_reason.setdefault(reason, []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
    notices = [f"Without effect in this recipe: {'; '.join(parts)}."] if parts else []
    return notices + _too_many_directions(recipe, decoder) + _too_little_text(recipe, decoder, length)


def _too_many_directions(recipe: Recipe, decoder: Decoder) -> list[str]:
    """A sentence where the user asked for more directions of an input than are kept."""
    name, asked, most = "activations.directions", recipe.activations.directions, most_directions(decoder)
    if asked <= most or name not in given_fields(recipe) or name in idle_fields(recipe, decoder):
        return []
    return [f"{name} {asked} is more than a quarter of the channels that some layer reads: {most} are kept."]


def _too_little_text(recipe: Recipe, decoder: Decoder, length: int) -> list[str]:
    """A sentence where layers have more input channels than there are calibration tokens."""
    samples, shape, family = recipe.calibration.samples, decoder.shape, decoder.family
    tokens = samples * length
    widths = {"q, k, v, gate and up": shape.hidden, "O": shape.query_width, "down": max(shape.ffn_sizes.values())}
    few = {name: width for name, width in widths.items() if tokens < width}
    if recipe.weights.method == "rtn" or not few:
        return []
    inputs = ", ".join(f"{width:,} of {name}" for name, width in few.items())
    times = max(few.values()) / tokens
    enough = -(-FEW_TOKENS * max(few.values()) // length)
    of_experts = ", and of each expert's own" if family.experts else ""
    return [
        f"Calibration has {tokens:,} tokens ({samples} x {length:,}), fewer than some layers have input channels "
        f"({inputs}: {times:.1f} times as many): their Hessians are shrunk, and little is left of what rounding by "
        f"them gains. At least {FEW_TOKENS} tokens a channel are needed{of_experts}: give --calibration.samples "
        f"{enough:,} or more."
    ]
