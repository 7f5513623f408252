"""Overrides of a recipe: how they are written, read again, and what schemes the layers have by them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig

from rotoboa.boa.online.attention import NAME
from rotoboa.boa.scheme import FULL, QuantizationArgs, QuantizationScheme
from rotoboa.errors import InputError
from rotoboa.models.decoder import Decoder
from rotoboa.pipeline.recipe.layers import layer_schemes
from rotoboa.pipeline.recipe.overrides import chosen, nearest
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe, recipe_to_yaml

BLOCKS, INSIDE = 4, ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
NAMES = [f"model.layers.{index}.{name}" for index in range(BLOCKS) for name in INSIDE]
AS_LIST: list[dict[str, Any]] = [
    {"layers": ["*.down_proj", "*.o_proj"], "weights": {"bits": 3, "group_size": 16}},
    {"layers": "blocks 0, -1", "weights": {"group_size": None}, "activations": {"bits": 8, "symmetric": False}},
]
AS_TEXT = (
    "*.down_proj, *.o_proj: weights.bits=3 weights.group_size=16;"
    "blocks 0, -1: weights.group_size=none activations.bits=8 activations.symmetric=false"
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=16, num_hidden_layers=BLOCKS, **sizes)
    return Decoder(config, attention=NAME)


def schemes(decoder: Decoder, overrides: Any, **fields: Any) -> dict[str, QuantizationScheme]:
    changes = {key.replace("__", "."): value for key, value in fields.items()}
    return layer_schemes(build_recipe({"overrides": overrides}, changes), decoder)


def bits(found: dict[str, QuantizationScheme], index: int, name: str) -> int:
    """-1 where the layer is as the whole model."""
    scheme = found.get(f"model.layers.{index}.{name}")
    return -1 if scheme is None else scheme.weights.num_bits


def test_text_and_yaml_say_the_same() -> None:
    recipe = build_recipe({"overrides": AS_LIST})
    assert recipe.overrides == build_recipe({}, {"overrides": AS_TEXT}).overrides
    assert recipe.overrides[0].layers == ("*.down_proj", "*.o_proj") and recipe.overrides[1].layers == ("blocks 0, -1",)
    assert recipe.overrides[0].weights.given() == {"num_bits": 3, "group_size": 16}
    assert recipe.overrides[1].weights.given() == {"group_size": None}, "none was given, and is no gap"
    assert recipe.overrides[1].activations.given() == {"num_bits": 8, "symmetric": False}
    assert build_recipe({"overrides": None}).overrides == build_recipe({}, {"overrides": "none"}).overrides == ()


def test_there_and_back_again() -> None:
    recipe = build_recipe({"overrides": AS_LIST})
    read = build_recipe(yaml.safe_load(recipe_to_yaml(recipe)))
    assert read == recipe and [one.weights.given() for one in read.overrides] == [
        one.weights.given() for one in recipe.overrides
    ]
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert "symmetric" not in str(recipe.model_dump()["overrides"][0]), "what was not given is not written"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.down_proj", NAMES[2::3]),
        ("*q_proj", NAMES[0::3]),
        ("model.layers.1.*", NAMES[3:6]),
        ("model.layers.[02].mlp.*", [NAMES[2], NAMES[8]]),
        ("blocks 0", NAMES[:3]),
        ("block 1", NAMES[3:6]),
        ("blocks 0, 3", NAMES[:3] + NAMES[9:]),
        ("blocks 1-2", NAMES[3:9]),
        ("blocks 0-1,-1", NAMES[:6] + NAMES[9:]),
        ("blocks -4", NAMES[:3]),
        ("blocks 4", []),
        ("blocks -", []),
        ("*.DOWN_PROJ", []),
        ("down_proj", []),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    assert chosen(pattern, NAMES, "model.layers", BLOCKS) == expected


def test_block_1_is_not_block_10() -> None:
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(12)]
    assert chosen("blocks 1", names, "model.layers", 12) == [names[1]]
    assert chosen("blocks 9-11", names, "model.layers", 12) == names[9:]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("down_proj", r"perhaps \*\.down_proj"),
        ("*.dwn_proj", r"perhaps \*\.down_proj"),
        ("model.layers.9.mlp.up_proj", r"perhaps \*\.up_proj"),
        ("blocks 4", r"give a glob on names such as model\.layers\.0\."),
        ("*lm_head", r"perhaps --head\.bits\."),
        ("zzz", r"give a glob on names such as model\.layers\.0\."),
    ],
)
def test_a_pattern_that_names_nothing(decoder: Decoder, pattern: str, hint: str) -> None:
    with pytest.raises(InputError, match=rf"overrides: '.*' names no layer that is quantized: {hint}"):
        schemes(decoder, [{"layers": pattern, "weights": {"bits": 8}}])
    assert nearest("down_proj", NAMES) == ["*.down_proj"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([{"layers": "*", "weights": {"bits": 9}}], "overrides, entry 1, weights.bits: "),
        ([AS_LIST[0], {"layers": "*", "weights": {"bits": True}}], "overrides, entry 2, weights.bits: "),
        ([{"layers": "*", "weights": {"group_size": 4}}], "overrides, entry 1, weights.group_size: "),
        ([{"layers": "*", "weights": {"symmetric": 1}}], "overrides, entry 1, weights.symmetric: "),
        ([{"layers": "*", "weights": {"bit": 4}}], "overrides, entry 1, weights.bit: "),
        ([{"layers": "*", "cache": {"bits": 4}}], "overrides, entry 1, cache: "),
        ([{"layers": "*"}], "overrides, entry 1: nothing is overridden"),
        ([{"weights": {"bits": 4}}], "overrides, entry 1, layers: "),
        ([{"layers": " , ", "weights": {"bits": 4}}], "overrides, entry 1, layers: no pattern"),
        ("*.down_proj weights.bits=4", "overrides is "),
        ("*.down_proj: weights.bits=many", "overrides, entry 1, weights.bits: "),
        ("*.down_proj: weights.bits", "overrides, entry 1, weights.bits: "),
        ("*.down_proj: bits=4", "overrides, entry 1, bits"),
        (7, "overrides is 7"),
    ],
)
def test_what_is_wrong_is_named_with_its_entry(overrides: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        build_recipe({"overrides": overrides})
    message = str(caught.value)
    assert message.startswith(f"The recipe cannot be used: {said}") and message.endswith(".") and "\n" not in message
    assert "PATTERN: weights.bits=4" in message


def test_later_ones_win_field_by_field(decoder: Decoder) -> None:
    overrides = [
        {"layers": "*.down_proj", "weights": {"bits": 8, "group_size": 16}},
        {"layers": "blocks 1-2", "weights": {"bits": 3}},
        {"layers": "model.layers.2.*", "weights": {"bits": 4, "group_size": None}},
    ]
    found = schemes(decoder, overrides, weights__bits=4)
    assert [bits(found, index, "mlp.down_proj") for index in range(BLOCKS)] == [8, 3, -1, 8]
    assert [bits(found, index, "mlp.up_proj") for index in range(BLOCKS)] == [-1, 3, -1, -1], "2 is as the whole again"
    groups = [scheme.weights.group_size for name, scheme in found.items() if name.endswith("down_proj")]
    assert groups == [16, 16, 16]
    assert found["model.layers.1.mlp.up_proj"].weights == QuantizationArgs(3)


def test_layers_of_one_input_agree(decoder: Decoder) -> None:
    eight = {"activations": {"bits": 8}}
    with pytest.raises(InputError, match=r"self_attn\.q_proj and self_attn\.k_proj of block 0 read one input.*of both"):
        schemes(decoder, [{"layers": "*.q_proj", **eight}], activations__bits=4)
    found = schemes(decoder, [{"layers": "*.gate_proj,*.up_proj,*.down_proj", **eight}], activations__bits=4)
    assert len(found) == 3 * BLOCKS
    assert all(scheme.input_activations.num_bits == 8 and scheme.weights.num_bits == 4 for scheme in found.values())


@pytest.mark.parametrize("field", ["weights", "activations"])
def test_groups_divide_the_width(decoder: Decoder, field: str) -> None:
    wrong = rf"{field}\.group_size 24 does not divide the 32 inputs of model\.layers\.0\."
    with pytest.raises(InputError, match=wrong):
        schemes(decoder, [{"layers": "blocks 0", field: {"bits": 8, "group_size": 24}}])
    assert len(schemes(decoder, [{"layers": "*.down_proj", field: {"bits": 8, "group_size": 24}}])) == BLOCKS


@torch.no_grad()
def test_16_bits_leave_weights_as_they_are_rotated(
    llama: Path, make_recipe: Callable[..., Recipe], cheap_run: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file

    from rotoboa.pipeline.job.job import prepare

    changes = {"overrides": "*.q_proj, blocks 1: weights.bits=16; *.v_proj: weights.bits=8", "rotation.r1": "merged"}
    run = cheap_run("w4a16", changes)
    job = prepare(make_recipe("w4a16", {"model": str(llama), **changes}))
    assert job.spec.layers["model.layers.0.self_attn.q_proj"].weights.num_bits == FULL
    for index, kept in ((0, 1), (1, 6)):
        stored = load_file(run / "blocks" / f"{index:05}.safetensors")
        exact = job.rotations.rotate_block(job.checkpoint.block(index), job.decoder.family, index)
        whole = [name for name in job.decoder.family.projections if f"{name}.weight" in stored]
        assert len(whole) == kept
        assert all(torch.equal(stored[f"{name}.weight"], exact[f"{name}.weight"].to(torch.bfloat16)) for name in whole)
        assert f"{job.decoder.family.value}.qweight" in stored, "the later one"
