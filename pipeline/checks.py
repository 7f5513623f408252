"""Whether a recipe and a model go together: group size, positions, channel scales."""

from __future__ import annotations

from ..errors import InputError
from ..models.aliases import ResolvedModel
from ..models.decoder import Decoder
from ..rotation.channels import SITES, obstacle
from .recipe import Recipe


def check_sizes(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    """Check that the sizes of a recipe and of a model go together.

    Raises:
        InputError: they do not.
    """
    shape, group = decoder.shape, recipe.weights.group_size
    widths = {"hidden size": shape.hidden, "attention width": shape.query_heads * shape.head_dim, "ffn size": shape.ffn}
    for name, width in widths.items():
        if group and width % group:
            fitting = [g for g in (32, 64, 128, 16, 8) if all(w % g == 0 for w in widths.values())]
            hint = f"one of {', '.join(map(str, fitting))}" if fitting else "none (one scale per channel)"
            raise InputError(
                f"weights.group_size {group} does not divide the {name} {width} of {model.name}: give {hint}."
            )
    check_length(length_of(recipe, model, decoder), decoder, model, "calibration.sequence_length")
    check_zfold(recipe, decoder, model)


def check_zfold(recipe: Recipe, decoder: Decoder, model: ResolvedModel) -> None:
    """Check that there is a layer to take the channel scales of every site that weights.zfold names.

    Raises:
        InputError: there is none, or the method has no objective to find them by.
    """
    sites, rotation, family = recipe.weights.zfold or (), recipe.rotation, decoder.family
    if sites and recipe.weights.method == "rtn":
        raise InputError("weights.zfold finds its scales by an objective, and method rtn has none: choose another.")
    online = rotation.r1 == "online" or (rotation.r1 == "merged" and family.post_norms)
    on = {"online_r1": online, "heads": rotation.heads, "r4": rotation.r4}
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


def length_of(recipe: Recipe, model: ResolvedModel, decoder: Decoder) -> int:
    """The recipe's sequence length, else the model's default, cut to the positions that it has."""
    if recipe.calibration.sequence_length:
        return recipe.calibration.sequence_length
    most = getattr(decoder.config, "max_position_embeddings", None) or model.sequence_length
    return min(model.sequence_length, most)
