"""What a file can take whose bits a budget chooses, before anything is measured."""

from __future__ import annotations

from dataclasses import replace

from ...boa.scheme import QuantizationArgs
from ...errors import InputError
from ...export.finished import numbers_in_blocks
from ...export.spec import Spec
from ...export.stored_sizes import projection_bytes, stored_bytes
from ...models.decoder import Decoder
from ..console.human import human_size
from ..recipe.layers import choice_args
from ..recipe.recipe import Recipe


def budgeted_files(recipe: Recipe, spec: Spec, decoder: Decoder, itemsize: int, *, tied: bool) -> dict[str, int] | None:
    """The least and the most bytes of the tensors of a run, where a budget chooses the bits of layers; else None.

    The least is with the fewest bits everywhere, the most is what the budget allows, or the most bits take.

    Raises:
        InputError: there is no room for the fewest bits.
    """
    weights = recipe.weights
    if weights.budget is None and weights.size is None:
        return None

    def taken(args: QuantizationArgs) -> tuple[int, int]:
        """Bytes of the blocks' layers, and of all tensors."""
        layers = {
            name: replace(one, weights=args) if one.weights == spec.scheme.weights else one
            for name, one in spec.layers.items()
        }
        uniform = replace(spec, bits=args.num_bits, group_size=args.group_size, symmetric=args.symmetric)
        uniform = replace(uniform, type=args.type, layers=layers)
        file = sum(stored_bytes(decoder, uniform, itemsize, tied=tied).values())
        return sum(projection_bytes(decoder, uniform, itemsize).values()), file

    sizes = {bits: taken(args) for bits, args in choice_args(recipe).items()}
    fewest = min(sizes, key=lambda bits: sizes[bits])
    (least_of_blocks, least), (_, most) = sizes[fewest], max(sizes.values())
    if weights.size is not None:
        allowed = int(weights.size)
    else:
        assert weights.budget is not None
        numbers = numbers_in_blocks(decoder.family, decoder.shape)
        allowed = least - least_of_blocks + int(weights.budget * numbers / 8)
    if allowed < least:
        field = "weights.size" if weights.size is not None else "weights.budget"
        raise InputError(
            f"{field} leaves {human_size(allowed)} for a file that takes {human_size(least)} with "
            f"{fewest} bits everywhere: give more, fewer bits in --weights.choices, or larger groups."
        )
    return {"least": least, "most": min(allowed, most)}
