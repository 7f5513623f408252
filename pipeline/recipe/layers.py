"""The schemes of layers that a recipe's overrides make other than those of the whole model."""

from __future__ import annotations

from dataclasses import replace

from ...boa.scheme import FULL, QuantizationArgs, QuantizationScheme
from ...errors import InputError
from ...export.finished import projection_columns
from ...models.decoder import Decoder
from .overrides import OverriddenArgs, chosen, nearest
from .recipe import Embedding, Head, Recipe
from .values import bits_of

_WORDS = {"num_bits": "bits"}


def whole_scheme(recipe: Recipe) -> QuantizationScheme:
    """Of every layer that nothing is overridden of."""
    weights, inputs = recipe.weights, recipe.activations
    return QuantizationScheme(
        QuantizationArgs.of(weights.format, weights.bits, weights.group_size, weights.symmetric),
        QuantizationArgs.of(inputs.format, inputs.bits, inputs.group_size, inputs.symmetric),
    )


def choice_args(recipe: Recipe) -> dict[int, QuantizationArgs]:
    """By bits, rising, what a budget chooses the weights of a layer from."""
    whole = whole_scheme(recipe).weights
    return {
        bits_of(choice): replace(whole, num_bits=choice)
        if isinstance(choice, int)
        else QuantizationArgs.of(choice, bits_of(choice), None, True)
        for choice in recipe.weights.choices
    }


def layer_schemes(recipe: Recipe, decoder: Decoder) -> dict[str, QuantizationScheme]:
    """By the full names of modules, those that differ from the whole model's; of several overrides the last counts.

    Raises:
        InputError: a pattern names no layer, a group does not divide a layer's width, or layers that read one input
            are to have it quantized in two ways.
    """
    family, blocks = decoder.family, decoder.shape.blocks
    names = family.layer_names(blocks)
    outer = {family.embedding: "--embedding.bits", family.head: "--head.bits"}  # which have sections of their own
    whole = whole_scheme(recipe)
    found: dict[str, QuantizationScheme] = {}
    for override in recipe.overrides:
        for pattern in override.layers:
            layers = chosen(pattern, names, family.layers, blocks)
            if not layers:
                near = chosen(pattern, outer, family.layers, blocks) or nearest(pattern, names)
                near = [outer.get(name, name) for name in near]
                hint = f"perhaps {' or '.join(near)}" if near else f"give a glob on names such as {names[0]}"
                raise InputError(f"overrides: '{pattern}' names no layer that is quantized: {hint}.")
            for name in layers:
                scheme = found.get(name, whole)
                found[name] = QuantizationScheme(
                    overridden(scheme.weights, override.weights, f"weights of {name}"),
                    overridden(scheme.input_activations, override.activations, f"activations of {name}"),
                )
    found = {name: found[name] for name in names if name in found and found[name] != whole}
    _check(found, whole, decoder)
    return found


def overridden(args: QuantizationArgs, changes: OverriddenArgs, what: str) -> QuantizationArgs:
    """With what is given changed.

    Raises:
        InputError: floating point is to have bits, groups or symmetry that it has not.
    """
    given = changes.given()
    name = given.pop("format", "int" if given.get("num_bits") == FULL else args.format)
    if name == "int":
        plain = args if args.type == "int" else QuantizationArgs(args.num_bits)  # groups are of the format
        return replace(plain, **given)
    found = QuantizationArgs.of(name, 4, None, True)
    wrong = {field: value for field, value in given.items() if value != getattr(found, field)}
    if wrong:
        raise InputError(
            f"overrides: the {what} are {name}, which has {found.in_words}: "
            f"leave {' and '.join(_WORDS.get(field, field) for field in wrong)} out, or give format=int too."
        )
    return found


def end_args(end: Embedding | Head) -> QuantizationArgs:
    """What a recipe asks of the weights of embedding or head; a format says its bits, groups and symmetry itself."""
    if end.format == "int":
        return QuantizationArgs(end.bits, end.group_size, end.symmetric)
    return QuantizationArgs.of(end.format, bits_of(end.format), None, True)


def outer_schemes(recipe: Recipe, decoder: Decoder, *, tied: bool) -> dict[str, QuantizationScheme]:
    """Those of embedding and head, where they are quantized; a head that stays `tied` is the embedding.

    Raises:
        InputError: a group does not divide the hidden size.
    """
    hidden = decoder.shape.hidden
    sections: dict[str, tuple[Embedding | Head, str]] = {"embedding": (recipe.embedding, decoder.family.embedding)}
    if not tied:
        sections["head"] = (recipe.head, decoder.family.head)
    found = {}
    for section, (wanted, name) in sections.items():
        args = end_args(wanted)
        if args.type == "int" and args.group_size and hidden % args.group_size:
            raise InputError(
                f"{section}.group_size {args.group_size} does not divide the hidden size {hidden}: give one that does, "
                "or none."
            )
        if args.type != "int" and hidden % args.unit:
            raise InputError(
                f"{section}.format {args.format} has rows in parts of {args.unit} weights, which do not divide the "
                f"hidden size {hidden}: give --{section}.format int, and --{section}.bits."
            )
        if args.quantizes:
            found[name] = QuantizationScheme(args)
    return found


def _check(found: dict[str, QuantizationScheme], whole: QuantizationScheme, decoder: Decoder) -> None:
    family = decoder.family
    for name, scheme in found.items():
        index, inside = _inside(name, decoder)
        width = projection_columns(family, decoder.shape, index)[inside]
        for field, args in (("weights", scheme.weights), ("activations", scheme.input_activations)):
            if args.quantizes and width % args.unit:
                raise InputError(
                    f"overrides: {field}.group_size {args.unit} does not divide the {width} inputs of {name}: "
                    "give one that does, or none."
                )
    for index in range(decoder.shape.blocks):
        by_site: dict[str, tuple[str, QuantizationArgs]] = {}
        for name, site in family.at(index).sites.items():
            inputs = found.get(f"{family.layers}.{index}.{name}", whole).input_activations
            first, expected = by_site.setdefault(site, (name, inputs))
            if inputs != expected:
                raise InputError(
                    f"overrides: {first} and {name} of block {index} read one input, and are to have it in "
                    f"{expected.num_bits} and {inputs.num_bits} bits or other groups: override activations of both."
                )


def _inside(name: str, decoder: Decoder) -> tuple[int, str]:
    """The block of a projection, and its name inside that."""
    index, _, inside = name.removeprefix(f"{decoder.family.layers}.").partition(".")
    return int(index), inside
