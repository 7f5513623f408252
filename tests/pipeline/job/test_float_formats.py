"""Recipes of four-bit floating point: what they mean, what goes with them, and what is refused by name."""

from typing import Any

import pytest

from rotoboa.boa.scheme import QuantizationArgs, QuantizationScheme
from rotoboa.errors import InputError
from rotoboa.export.spec import Spec
from rotoboa.pipeline.job.checks import check_formats
from rotoboa.pipeline.recipe.layers import overridden, whole_scheme
from rotoboa.pipeline.recipe.overrides import OverriddenArgs
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.settings import settings_of

NVFP4 = QuantizationArgs(4, 16, True, "float")
MXFP4 = QuantizationArgs(4, 32, True, "float")


def test_a_format_says_bits_groups_and_symmetry() -> None:
    recipe = Recipe(weights={"format": "nvfp4"}, activations={"bits": 4, "format": "mxfp4"})
    check_formats(recipe)
    whole = whole_scheme(recipe)
    assert whole == QuantizationScheme(NVFP4, MXFP4)
    assert (whole.weights.format, whole.input_activations.format, whole.shown) == ("nvfp4", "mxfp4", "W4A4 nvfp4")
    settings = settings_of(recipe)
    assert (settings.group_size, settings.symmetric, settings.grid_settings.levels) == (16, True, 24)
    assert whole_scheme(Recipe(activations={"format": "nvfp4"})).input_activations == QuantizationArgs(16, None, True)


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
        ({"weights": {"budget": 3}}, "weights.budget or weights.size is for format int alone"),
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
    with pytest.raises(InputError, match=r"weights of x are nvfp4, which has 4 bits, groups of 16.*: leave bits out"):
        of(NVFP4, bits=8)


def test_a_spec_is_read_back_and_a_damaged_one_refused() -> None:
    spec = Spec(4, 16, True, type="float", activation_bits=4, activation_group=32, activation_type="float")
    assert Spec.from_dict(spec.to_dict()) == spec and "type" not in Spec(4).to_dict()
    assert spec.scheme == QuantizationScheme(NVFP4, MXFP4)
    with pytest.raises(InputError, match="type is 'float'"):
        Spec.from_dict({**spec.to_dict(), "group_size": 64})
