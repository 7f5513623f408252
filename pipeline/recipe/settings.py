"""What a recipe asks of the quantizer: settings of the rounding, rotations, and what runs online."""

from __future__ import annotations

from ...boa.online.directions import KEPT
from ...boa.online.served_cache import OWN
from ...boa.scheme import FULL
from ...boa.solver.rounding_settings import Settings
from ...export.spec import Spec
from ...models.decoder import Decoder
from ...models.families import Family
from ...rotation.rotate import Rotations, input_width
from .layers import end_args, layer_schemes, outer_schemes, whole_scheme
from .recipe import Recipe


def settings_of(recipe: Recipe, rotations: Rotations | None = None) -> Settings:
    """Of the rounding; `rotations` where they are known, else R1 is where the recipe has it."""
    grid = recipe.weights.grid
    if grid == "auto":
        has_r1 = recipe.rotation.r1 != "none" if rotations is None else rotations.r1 is not None
        grid = "diagonal" if has_r1 else "hessian"
    fields = recipe.weights.model_dump(exclude={"head", "grid", "zfold", "budget", "size", "choices"})
    settings = Settings(**fields, grid=grid, zfold=recipe.weights.zfold or ())
    return settings if settings.format == "int" else settings.of(whole_scheme(recipe).weights)


def is_r1_online(recipe: Recipe, family: Family) -> bool:
    """Whether R1 stands behind the norms; families with post norms cannot have it merged."""
    return recipe.rotation.r1 == "online" or (recipe.rotation.r1 == "merged" and family.post_norms)


def rotations_of(recipe: Recipe, decoder: Decoder) -> Rotations:
    """Those of a decoder; R1 is merged where the recipe leaves it to the model, and the family does not forbid it."""
    rotation = recipe.rotation
    off = rotation.r1 == "none" or (rotation.r1 == "auto" and decoder.family.post_norms)
    return Rotations.of(
        decoder.shape,
        r1=not off,
        r2=rotation.r2,
        r3=rotation.r3 and serving(recipe) == OWN,
        r4=rotation.r4,
        r4_blocks=rotation.r4_blocks,
        blocks=rotation.blocks,
        seed=rotation.seed,
        online_r1=is_r1_online(recipe, decoder.family),
        heads=rotation.heads,
    )


def serving(recipe: Recipe) -> str:
    """Who keeps quantized keys and values; rotoboa where nothing is quantized."""
    return recipe.cache.served_by if min(recipe.cache.key_bits, recipe.cache.value_bits) < FULL else OWN


def has_inputs_in(name: str, recipe: Recipe) -> bool:
    """Whether the input of any layer is to be in this format."""
    whole = recipe.activations.format == name and recipe.activations.bits < FULL
    return whole or any(override.activations.format == name for override in recipe.overrides)


def takes_directions(recipe: Recipe) -> bool:
    """Whether any input is of integers of fewer bits than leading directions are kept in."""
    whole = {"bits": recipe.activations.bits, "format": recipe.activations.format}
    given = [whole, *(whole | override.activations.model_dump(exclude_none=True) for override in recipe.overrides)]
    return any(args["format"] == "int" and args["bits"] < KEPT for args in given)


def has_directions(recipe: Recipe) -> bool:
    """Whether calibration looks for such directions of inputs, in models with a family of their own."""
    return recipe.activations.directions > 0 and takes_directions(recipe)


def most_directions(decoder: Decoder) -> int:
    """Of an input, a quarter of its channels."""
    family, shape = decoder.family, decoder.shape
    widths = (input_width(family.at(index), shape.at(index)) for index in range(shape.blocks))
    return min(shape.hidden, *widths) // 4


def finds_scales(recipe: Recipe) -> bool:
    """Whether calibration finds something of inputs or of the cache, whatever rounds the weights."""
    cached = recipe.cache.format == "fp8" and min(recipe.cache.key_bits, recipe.cache.value_bits) < FULL
    static = not recipe.activations.dynamic and has_inputs_in("fp8", recipe)
    return cached or static or has_inputs_in("nvfp4", recipe) or has_directions(recipe)


def moves_head(recipe: Recipe) -> bool:
    """Whether the output layer is moved to make up for errors."""
    return recipe.weights.head > 0 and recipe.weights.method != "rtn"


def stays_tied(recipe: Recipe, rotations: Rotations, decoder: Decoder) -> bool:
    """Whether embedding and head of the finished model are one matrix: they were, and the head alone is not changed.

    A rotated stream takes a matrix (hidden, hidden) before such a head: where the embedding is packed, and the final
    norm has no bias, that is worth it. An embedding that has taken in a norm is another than the head.
    """
    if not decoder.tied or moves_head(recipe) or decoder.family.embedding_norm:
        return False
    if rotations.turned:
        return end_args(recipe.embedding).quantizes and not decoder.family.layer_norm
    return not end_args(recipe.head).quantizes or end_args(recipe.embedding).quantizes


def changed_outer_layers(recipe: Recipe, rotations: Rotations, decoder: Decoder) -> int:
    """How many of embedding and head are changed, and lie in files while a run works."""
    if rotations.turned:
        return 1 if stays_tied(recipe, rotations, decoder) else 2
    return int(moves_head(recipe))


def spec_of(recipe: Recipe, rotations: Rotations, decoder: Decoder) -> Spec:
    """What the loader of the quantized model has to know, clip ratios that are searched for left out."""
    rotation, tied, server = recipe.rotation, stays_tied(recipe, rotations, decoder), serving(recipe)
    directed = has_directions(recipe) and not decoder.family.generic
    ours = server == OWN  # who else keeps the cache turns and rounds it by itself
    whole = whole_scheme(recipe)
    weights, inputs = whole.weights, whole.input_activations
    return Spec(
        bits=weights.num_bits,
        group_size=weights.group_size,
        symmetric=weights.symmetric,
        type=weights.type,
        r1=rotations.r1 is not None,
        r2=rotation.r2 and any(kind.has_values for kind in decoder.family.all_kinds),
        r3=rotation.r3 and ours,
        r4=rotation.r4,
        r4_blocks=rotation.r4_blocks,
        blocks=rotation.blocks,
        heads=rotation.heads,
        activation_bits=inputs.num_bits,
        activation_symmetric=inputs.symmetric,
        activation_type=inputs.type,
        activation_clip=recipe.activations.clip,
        activation_group=inputs.group_size,
        activation_search=recipe.activations.search,
        activation_convention=recipe.activations.convention,
        activation_dynamic=recipe.activations.dynamic or not has_inputs_in("fp8", recipe),
        activation_directions=min(recipe.activations.directions, most_directions(decoder)) * directed,
        key_bits=recipe.cache.key_bits,
        value_bits=recipe.cache.value_bits,
        cache_clip=recipe.cache.clip if ours else 1.0,
        cache_search=recipe.cache.search and ours,
        cache_sink=recipe.cache.sink if ours else 0,
        cache_center=recipe.cache.center and recipe.cache.key_bits < 16 and ours,
        cache_served_by=server,
        cache_format=recipe.cache.format if min(recipe.cache.key_bits, recipe.cache.value_bits) < FULL else "int",
        online_r1=rotations.online_r1,
        layers=layer_schemes(recipe, decoder) | outer_schemes(recipe, decoder, tied=tied),
        tied_head=tied and end_args(recipe.embedding).quantizes,
    )
