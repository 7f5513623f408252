"""Whether a recipe and a model go together: group size, positions, channel scales, BOS."""

from __future__ import annotations

from itertools import product

from transformers import PreTrainedTokenizerBase

from ...boa.online.served_cache import BITS, BLOCK, OWN
from ...boa.scheme import FULL
from ...errors import InputError
from ...models.aliases import ResolvedModel
from ...models.decoder import Decoder
from ...models.families import SITES
from ...rotation.channels import obstacle
from ..recipe.fields import given_fields
from ..recipe.layers import choice_args, end_args, whole_scheme
from ..recipe.recipe import Embedding, Head, Recipe
from ..recipe.settings import is_r1_online, rotations_of, serving
from ..recipe.values import BLOCKS


def check_sizes(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    """Check that the sizes of a recipe and of a model go together.

    Raises:
        InputError: they do not.
    """
    shape = decoder.shape
    widths = {f"{name}'s inputs": columns for name, (_, columns) in (decoder.family.sizes or {}).items()}
    if not decoder.family.generic:
        attention = {"hidden size": shape.hidden, "attention width": shape.query_width}
        widths = {**attention, **shape.ffn_sizes, **widths}
    check_formats(recipe)
    check_cache(recipe, shape.head_dim, model)
    check_latents(recipe, decoder, model)
    groups = {
        "weights.group_size": (recipe.weights.group_size, "channel"),
        "activations.group_size": (recipe.activations.group_size, "token"),
    }
    scheme = whole_scheme(recipe)
    formats = [("weights.format", scheme.weights), ("activations.format", scheme.input_activations)]
    if recipe.weights.budget is not None or recipe.weights.size is not None:
        formats += [("weights.choices", args) for args in choice_args(recipe).values()]
    for (field, args), (name, width) in product(formats, widths.items()):
        if args.format != "int" and width % args.unit:
            instead = "leave it out" if field == "weights.choices" else f"give --{field} int"
            raise InputError(
                f"{field} {args.format} has groups of {args.unit}, which do not divide the {name} {width} of "
                f"{model.name}: {instead}."
            )
    for (field, (group, whole)), (name, width) in product(groups.items(), widths.items()):
        if group and width % group:
            fitting = [g for g in (32, 64, 128, 16, 8) if all(w % g == 0 for w in widths.values())]
            hint = f"one of {', '.join(map(str, fitting))}" if fitting else f"none (one scale per {whole})"
            raise InputError(f"{field} {group} does not divide the {name} {width} of {model.name}: give {hint}.")
    check_blocks(recipe, decoder, model)
    check_length(length_of(recipe, model, decoder), decoder, model, "calibration.sequence_length")
    check_zfold(recipe, decoder, model)


def check_blocks(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    """Check that the blocks of rotations divide the widths that they are of; R2's are cut to the width of a head.

    Raises:
        InputError: they do not.
    """
    rotation, shape = recipe.rotation, decoder.shape
    blocks = rotation.blocks or 1
    turned = {"hidden size": shape.hidden} if rotations_of(recipe, decoder).r1 is not None else {}
    turned |= shape.ffn_sizes if rotation.r4 else {}
    for name, width in turned.items():
        if width % blocks:
            fitting = [size for size in BLOCKS if all(w % size == 0 for w in turned.values())]
            hint = f"one of {', '.join(map(str, fitting))}" if fitting else "none"
            raise InputError(
                f"rotation.blocks {blocks} does not divide the {name} {width} of {model.name}: give {hint}."
            )


def check_cache(recipe: Recipe, head_dim: int, model: ResolvedModel) -> None:
    """Check that who is to keep the cache has it in the recipe's bits, and takes heads of this width.

    Raises:
        InputError: it does not.
    """
    server, found = serving(recipe), (recipe.cache.key_bits, recipe.cache.value_bits)
    if recipe.cache.format == "fp8" and min(found) < FULL:
        _check_float_cache(server, found)
        return
    if server == OWN:
        return
    if any(bits not in (*BITS[server], FULL) for bits in found) or (server == "vllm" and found[0] != found[1]):
        both = ", the same for both" if server == "vllm" else " or 16"
        raise InputError(
            f"cache.served_by {server} has keys and values in {', '.join(map(str, BITS[server]))} bits{both}, and "
            f"cache.key_bits and cache.value_bits are {found[0]} and {found[1]}: give such, or --cache.served_by {OWN}."
        )
    if head_dim % (BLOCK if server == "llama.cpp" else 2):
        raise InputError(
            f"cache.served_by {server} needs heads of multiples of {BLOCK if server == 'llama.cpp' else 2}, and those "
            f"of {model.name} are {head_dim} wide: give --cache.served_by {OWN}, or 16 bits."
        )


def check_latents(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    """Check that keys and values stay as they are where a model caches what they are compressed to.

    Raises:
        InputError: they do not.
    """
    if not decoder.family.compressions:
        return
    cached = min(recipe.cache.key_bits, recipe.cache.value_bits) < FULL
    if cached or recipe.rotation.r3:
        what = "a quantized cache" if cached else "R3, which is for a quantized cache,"
        raise InputError(
            f"{what} is not for {model.name}, whose cache holds what its keys and values are compressed to: give "
            "--cache.key_bits 16 --cache.value_bits 16 --rotation.r3 false, or a recipe such as w4a4 or w4a16."
        )


def _check_float_cache(server: str, found: tuple[int, int]) -> None:
    if server == "llama.cpp":
        raise InputError("cache.format fp8 is not in llama.cpp: give --cache.served_by vllm, or --cache.format int.")
    if found != (8, 8):
        raise InputError(
            f"cache.format fp8 has keys and values in 8 bits, and cache.key_bits and cache.value_bits are {found[0]} "
            f"and {found[1]}: give 8 for both, or --cache.format int."
        )


def check_formats(recipe: Recipe) -> None:
    """Check that what a recipe says beside a format of floating point goes with it.

    Raises:
        InputError: it does not.
    """
    weights, inputs, scheme = recipe.weights, recipe.activations, whole_scheme(recipe)
    for section, part, args in (
        ("weights", weights, scheme.weights),
        ("activations", inputs, scheme.input_activations),
        ("embedding", recipe.embedding, end_args(recipe.embedding)),
        ("head", recipe.head, end_args(recipe.head)),
    ):
        if args.format == "int":
            continue
        of_format = isinstance(part, Embedding | Head) and f"{section}.bits" not in given_fields(recipe)
        wrong = {
            "bits": part.bits != args.num_bits and not of_format,
            "group_size": part.group_size not in (None, args.group_size),
            "symmetric": part.symmetric != args.symmetric and f"{section}.symmetric" in given_fields(recipe),
        }
        if field := next((field for field, is_wrong in wrong.items() if is_wrong), ""):
            needed = field == "bits" and args.num_bits != 4 and section in ("weights", "activations")
            out = f"give --{section}.bits {args.num_bits}" if needed else "leave it out"
            raise InputError(
                f"{section}.format {args.format} has {args.in_words}, and {section}.{field} is "
                f"{str(getattr(part, field)).lower()}: {out}, or give --{section}.format int."
            )
    budgeted = weights.budget is not None or weights.size is not None
    if budgeted and weights.format != "int":
        raise InputError(
            f"weights.budget and weights.size choose from weights.choices, and weights.format is {weights.format}: "
            f"leave it out, and give formats as --weights.choices {weights.format}."
        )
    chosen = [choice for choice in weights.choices if isinstance(choice, str)] if budgeted else []
    if {weights.format, *chosen, *(override.weights.format for override in recipe.overrides)} - {"int", None}:
        refused = {
            f"weights.method {weights.method}": weights.method in ("adaround", "aespa", "brecq"),
            "weights.zfold": bool(weights.zfold),
        }
        if what := next((what for what, is_on in refused.items() if is_on), ""):
            raise InputError(f"{what} is for format int alone, and weights have another: leave one of both out.")
    if recipe.head.format != "int" and weights.method in ("adaround", "aespa"):
        raise InputError(
            f"weights.method {weights.method} is for format int alone, and head.format is {recipe.head.format}: leave "
            "one of both out."
        )


def check_zfold(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    """Check that there is a layer to take the channel scales of every site that weights.zfold names.

    Raises:
        InputError: there is none, or the method has no objective to find them by.
    """
    sites, rotation, family = recipe.weights.zfold or (), recipe.rotation, decoder.family
    if sites and recipe.weights.method == "rtn":
        raise InputError("weights.zfold finds its scales by an objective, and method rtn has none: choose another.")
    on = {"online_r1": is_r1_online(recipe, family), "heads": rotation.heads, "r4": rotation.r4}
    reasons = {site: obstacle(family, decoder.config, site, **on) for site in SITES}
    stopped = {site: reasons[site] for site in sites if reasons[site]}
    if stopped:
        can = ",".join(site for site in sites if site not in stopped)
        change = [f"turn rotation.{r} off" for r in ("r1", "r4") if any(r.upper() in why for why in stopped.values())]
        change.append(f"give --weights.zfold {can}" if can else "leave weights.zfold out")
        raise InputError(
            f"weights.zfold: nothing before {' and '.join(stopped)} of {model.name} can take a scale a channel, since "
            f"{' and '.join(stopped.values())}: {' or '.join(change)}."
        )


def check_length(length: int, decoder: Decoder, model: ResolvedModel, option: str) -> None:
    """Check that a model has `length` positions; `option` is what the user would change.

    Raises:
        InputError: it has fewer.
    """
    most = getattr(decoder.config, "max_position_embeddings", None)
    if most and length > most:
        raise InputError(f"{option} {length} is more than the {most} positions of {model.name}: give at most {most}.")


def check_bos(recipe: Recipe, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, model: ResolvedModel) -> None:
    """Check that there is a BOS where windows of text begin with one.

    Raises:
        InputError: the tokenizer has none.
    """
    if bos_of(recipe, decoder) and tokenizer.bos_token_id is None:
        why = "bos is true" if recipe.bos else f"{decoder.family.model_type} models begin text with BOS"
        raise InputError(f"{why}, and the tokenizer of {model.name} has none: give --no-bos, or name its bos_token.")


def bos_of(recipe: Recipe, decoder: Decoder) -> bool:
    """Whether windows of text begin with BOS: as the recipe says, else as the family does."""
    return decoder.family.bos if recipe.bos is None else recipe.bos


def length_of(recipe: Recipe, model: ResolvedModel, decoder: Decoder) -> int:
    """The recipe's sequence length, else the model's default, cut to the positions that it has."""
    if recipe.calibration.sequence_length:
        return recipe.calibration.sequence_length
    most = getattr(decoder.config, "max_position_embeddings", None) or model.sequence_length
    return min(model.sequence_length, most)
