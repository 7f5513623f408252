"""Recipes of four-bit floating point: what they mean, what goes with them, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from rotoboa.boa.scheme import QuantizationArgs, QuantizationScheme
from rotoboa.errors import InputError
from rotoboa.export.spec import Spec
from rotoboa.models.aliases import resolve_model
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.pipeline.job.checks import check_blocks, check_formats
from rotoboa.pipeline.recipe.layers import overridden, whole_scheme
from rotoboa.pipeline.recipe.overrides import OverriddenArgs
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe
from rotoboa.pipeline.recipe.settings import settings_of

NVFP4 = QuantizationArgs(4, 16, True, "float")
MXFP4 = QuantizationArgs(4, 32, True, "float")
FP8 = QuantizationArgs(8, None, True, "float")


def test_a_format_says_bits_groups_and_symmetry() -> None:
    recipe = Recipe(weights={"format": "nvfp4"}, activations={"bits": 4, "format": "mxfp4"})
    check_formats(recipe)
    whole = whole_scheme(recipe)
    assert whole == QuantizationScheme(NVFP4, MXFP4)
    assert (whole.weights.format, whole.input_activations.format, whole.shown) == ("nvfp4", "mxfp4", "W4A4 nvfp4")
    settings = settings_of(recipe)
    assert (settings.group_size, settings.symmetric, settings.grid_settings.levels) == (16, True, 24)
    assert whole_scheme(Recipe(activations={"format": "nvfp4"})).input_activations == QuantizationArgs(16, None, True)


def test_eight_bits() -> None:
    recipe = build_recipe(load_recipe("fp8"), {})
    check_formats(recipe)
    assert whole_scheme(recipe) == QuantizationScheme(FP8, FP8) and whole_scheme(recipe).shown == "W8A8 fp8"
    with pytest.raises(
        InputError, match=r"fp8 has 8 bits, no groups .* weights\.bits is 4: give --weights\.bits 8, or"
    ):
        check_formats(Recipe(weights={"format": "fp8"}))
    with pytest.raises(InputError, match=r"fp8 has 8 bits, no groups .* activations\.group_size is 32: leave it out"):
        check_formats(Recipe(activations={"bits": 8, "format": "fp8", "group_size": 32}))
    spec = Spec(8, None, True, type="float", activation_bits=8, activation_type="float")
    assert Spec.from_dict(spec.to_dict()) == spec and spec.scheme == QuantizationScheme(FP8, FP8)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"weights": {"bits": 3}},
            "weights.format nvfp4 has 4 bits, groups of 16 and no zero .* weights.bits is 3",
        ),
        ({"weights": {"group_size": 32}}, "weights.group_size is 32: leave it out, or give --weights.format int"),
        ({"weights": {"symmetric": False}}, "weights.symmetric is false"),
        ({"activations": {"bits": 8, "format": "mxfp4"}}, "activations.bits is 8: leave it out"),
        ({"weights": {"method": "aespa"}}, "weights.method aespa is for format int alone"),
        ({"weights": {"zfold": True}}, "weights.zfold is for format int alone"),
        (
            {"embedding": {"format": "q4_k", "bits": 8}},
            "embedding.format q4_k has 4 bits, .* embedding.bits is 8: leave it out",
        ),
        ({"embedding": {"format": "q4_k", "bits": 16}}, "embedding.bits is 16: leave it out, or give --embedding.form"),
        ({"head": {"format": "q6_k", "group_size": 32}}, "head.group_size is 32: leave it out"),
        ({"head": {"format": "q6_k", "symmetric": False}}, "head.symmetric is false"),
        (
            {"head": {"format": "q6_k"}, "weights": {"method": "aespa", "format": "int"}},
            "weights.method aespa is for format int alone, and head.format is q6_k",
        ),
        ({"weights": {"budget": 3}}, "choose from weights.choices, and weights.format is nvfp4: leave it out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_formats(Recipe(**{**sections, "weights": {"format": "nvfp4", **sections.get("weights", {})}}))


def test_overrides() -> None:
    def of(args: QuantizationArgs, **fields: Any) -> QuantizationArgs:
        return overridden(args, OverriddenArgs(**fields), "weights of x")

    assert of(NVFP4, bits=16) == QuantizationArgs()
    assert of(NVFP4, format="int", bits=8, group_size=32) == QuantizationArgs(8, 32)
    assert of(QuantizationArgs(3, 64), format="mxfp4") == MXFP4 == of(NVFP4, format="mxfp4", bits=4)
    assert of(NVFP4, format="fp8") == FP8 == of(QuantizationArgs(3), format="fp8", bits=8)
    with pytest.raises(InputError, match=r"weights of x are nvfp4, which has 4 bits, groups of 16.*: leave bits out"):
        of(NVFP4, bits=8)


def test_a_spec_is_read_back_and_a_damaged_one_refused() -> None:
    spec = Spec(4, 16, True, type="float", activation_bits=4, activation_group=32, activation_type="float")
    assert Spec.from_dict(spec.to_dict()) == spec and "type" not in Spec(4).to_dict()
    assert spec.scheme == QuantizationScheme(NVFP4, MXFP4)
    with pytest.raises(InputError, match="type is 'float'"):
        Spec.from_dict({**spec.to_dict(), "group_size": 64})


def test_blocks_of_rotations_divide_what_they_turn(llama: Path) -> None:
    decoder, model = Decoder(Checkpoint(llama).config), resolve_model(str(llama))  # hidden 64, ffn 96

    def check(blocks: int, **rotation: Any) -> None:
        check_blocks(Recipe(rotation={"r1": "merged", "blocks": blocks, **rotation}), decoder, model)

    check(32, r4=True)
    check(64)
    check(64, r1="none")
    with pytest.raises(
        InputError, match=r"rotation\.blocks 64 does not divide the ffn size 96 of .*: give one of 16, 32"
    ):
        check(64, r4=True)
    with pytest.raises(InputError, match=r"rotation\.blocks 128 does not divide the hidden size 64"):
        check(128)
    with pytest.raises(InputError, match=r"rotation\.blocks is 48 but must be 16, 32, 64 or 128, or none"):
        Recipe(rotation={"blocks": 48})
