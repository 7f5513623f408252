from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rotoboa.boa.scheme import GROUPS
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.errors import InputError
from rotoboa.pipeline.recipe.fields import field_paths
from rotoboa.pipeline.recipe.recipe import Recipe, Weights
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe, recipe_names, recipe_to_yaml

LEAVES = {path.name for path in field_paths()}


def complaint(base: Any, overrides: Any = None) -> str:
    with pytest.raises(InputError) as caught:
        build_recipe(base, overrides)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize(
    "name",
    [
        *("w4a4kv4", "w4a4", "w4a4-vllm", "w4a8", "w4a8-cpu", "w8a8", "w4a16", "w3a16", "w2a16", "w2a4kv4"),
        *("nvfp4a16", "mxfp4a16", "nvfp4", "nvfp4-kv8", "mxfp4", "fp8"),
    ],
)
def test_recipes_of_the_package_are_what_their_names_say(name: str) -> None:
    assert name in recipe_names()
    recipe = build_recipe(load_recipe(name))
    kind, whole = recipe.weights.format, f"w{recipe.weights.bits}a{recipe.activations.bits}"
    if kind != "int":
        whole = kind if recipe.activations.format == kind else f"{kind}a{recipe.activations.bits}"
    assert name.startswith(whole)
    cache = 4 if "kv4" in name else 8 if "kv8" in name else 16
    assert (recipe.cache.key_bits, recipe.cache.value_bits) == (cache, cache)
    # Online rotations are worth their cost only where what they smooth is quantized, and other readers have none.
    own = recipe.activations.convention == "rotoboa" and recipe.activations.format != "fp8"
    online = recipe.activations.bits < 16 and own
    assert recipe.rotation.r1 == ("online" if online else "auto") and recipe.rotation.r2
    assert recipe.rotation.scale == online and recipe.rotation.heads == (online and kind == "int")
    assert recipe.rotation.blocks == (GROUPS[kind] if online and kind in GROUPS else None)  # which divides what it can
    assert recipe.rotation.r3 == (cache == 4) and recipe.rotation.r4 == online


def test_every_recipe_file_has_a_comment_and_only_known_fields() -> None:
    folder = Path(__file__).parents[3] / "recipes"
    files = sorted(folder.glob("*.yaml"), key=lambda file: file.stem)
    assert [file.stem for file in files] == recipe_names()
    for file in files:
        assert file.read_text().startswith("# ")
        build_recipe(load_recipe(str(file)))


def test_overrides_win_and_text_becomes_numbers() -> None:
    recipe = build_recipe(
        {"weights": {"bits": 3, "rows": 2}, "evaluation": None, "cache.clip": 1},
        {"weights.bits": "2", "weights.damping": "1e-2", "rotation.r1": False, "output": "a/b", "model": "x/y"},
    )
    assert (recipe.weights.bits, recipe.weights.rows, recipe.weights.damping) == (2, 2, 0.01)
    assert recipe.output == Path("a/b") and recipe.model == "x/y" and recipe.rotation.r1 == "none"
    assert recipe.cache.clip == 1 and recipe.evaluation.baseline


def test_none_as_text_unsets_optional_fields_alone() -> None:
    recipe = build_recipe(
        {"weights": {"group_size": 64}}, {"weights.group_size": "none", "calibration.dataset": "None"}
    )
    assert recipe.weights.group_size is None and recipe.calibration.dataset is None
    assert "weights.bits is none" in complaint({}, {"weights.bits": "none"})


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("weights.bits", 9, "2 to 8."),
        ("weights.bits", 16, "2 to 8."),
        ("weights.bits", "four", "2 to 8."),
        ("activations.bits", 1, "2 to 8, or 16 for no quantization"),
        ("cache.key_bits", 9, "2 to 8, or 16 for no quantization"),
        ("weights.group_size", 7, "an integer at least 8, or none"),
        ("weights.method", "adam", "one of rtn, gptq, boa, adaround, aespa, brecq"),
        ("weights.iterations", 0, "an integer at least 1"),
        ("weights.learning_rate", 0, "a number above 0"),
        ("weights.regulariser", -1, "a number at least 0"),
        ("weights.grid", "mse", "one of auto, minmax, diagonal, hessian"),
        ("weights.rows", True, "an integer at least 1"),
        ("weights.damping", 0, "a number above 0 and below 1"),
        ("weights.damping", float("nan"), "a number above 0 and below 1"),
        ("weights.alpha", 1.5, "a number at least 0 and at most 1"),
        ("cache.clip", 0, "a number above 0 and at most 1"),
        ("cache.sink", -1, "an integer at least 0"),
        ("calibration.samples", 1.5, "an integer at least 1"),
        ("calibration.sequence_length", 1, "an integer at least 2, or none"),
        ("weights.starts", 0, "an integer at least 1"),
        ("rotation.r1", "perhaps", "one of auto, merged, online, none"),
        ("rotation.r2", "perhaps", "true or false"),
        ("rotation.seed", 2**32, "an integer at least 0 and below 4294967296"),
        ("model", "", "text"),
        ("output", "", "a path, or none"),
        ("weights.bits", {"q": 4}, "2 to 8"),
    ],
)
def test_illegal_values_are_named_with_the_legal_ones(name: str, value: object, legal: str) -> None:
    message = complaint({}, {name: value})
    assert f"{name} is" in message and f"must be {legal}" in message
    assert (str(value) or "''") in message


def test_names_are_a_list_or_have_commas() -> None:
    for given in ("wikitext2, c4", ["wikitext2", "c4"]):
        assert build_recipe({"evaluation": {"dataset": given}}).evaluation.dataset == ("wikitext2", "c4")
    assert build_recipe({"evaluation": {"dataset": ["a,b.txt"]}}).evaluation.dataset == ("a,b.txt",)
    for wrong in ("a,,b", "a,a", [], ["a", ""]):
        with pytest.raises(InputError, match=r"evaluation\.dataset is .* but must be a name, or several with commas"):
            build_recipe({"evaluation": {"dataset": wrong}})


def test_unknown_fields_are_named_with_the_closest_one() -> None:
    message = complaint({"weights": {"bit": 4}, "samples": 2, "cache": 4, "qqq": 1, 7: 1}, {"weights.bits": 1})
    assert "weights.bit (perhaps weights.bits)" in message
    assert "samples (perhaps calibration.samples)" in message
    assert "cache must be a section with fields such as cache.key_bits" in message
    assert "qqq (`rotoboa quantize --help`" in message and "no field 7" in message
    assert "weights.bits is 1" in message  # all of it at once


def test_the_section_weights_is_what_the_solver_takes() -> None:
    solver, recipe = Settings(bits=4).model_dump(), Weights().model_dump()
    assert recipe.keys() - solver.keys() == {"head", "budget", "size", "choices"} and not solver.keys() - recipe.keys()
    differing = {name for name in solver if solver[name] != recipe[name]}
    assert differing == {"grid", "zfold"}  # auto, and what it stands for; None and no sites


def test_a_field_written_in_two_ways_is_given_twice() -> None:
    for base in (
        {"weights.bits": 3, "weights": {"bits": 2}},
        {"weights": {"bits": 2, "rows": 4}, "weights.bits": 3},
    ):
        assert "weights.bits is given twice, with its section and within it" in complaint(base, {})


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = build_recipe({}, {"output": tmp_path, "weights.group_size": 32, "weights.alpha": 0.1, "model": "ünï/x"})
    text = recipe_to_yaml(recipe)
    assert build_recipe(yaml.safe_load(text)) == recipe
    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    assert build_recipe(load_recipe(str(tmp_path / "again.yaml"))) == recipe


def test_recipe_is_frozen_and_has_the_documented_defaults() -> None:
    recipe: Any = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.weights.bits = 3
    for path in field_paths():
        value = recipe
        for part in path.name.split("."):
            value = getattr(value, part)
        assert value == path.default
        assert path.description.count("default") >= 1 and path.description[0].isprintable()
    assert {"model", "output", "rotation.r1", "weights.bits", "weights.drift"} <= LEAVES
    assert build_recipe(yaml.safe_load(recipe_to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weights: {bits: 4\nmodel: x\n", "line 2"),
        ("model: a\n\tx: 1\n", "line 2"),
        ("- a\n", "not a list"),
        ("tiny\n", "not a str"),
        ("weights:\n  bits: 4\nweights:\n  rows: 1\n", "line 3, is not valid YAML: weights is given twice"),
        ("model: !!python/object/apply:os.getcwd []\n", "line 1"),
        ("model: \x00\n", "not valid YAML"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(str(file))
    assert "bad.yaml" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_recipes(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no recipe 'w4a4kv': perhaps w4a4kv4; use one of fp8, .*w2a16, .* or a \.yaml file"
    ):
        load_recipe("w4a4kv")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_recipe(str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="UTF-8"):
        load_recipe(str(tmp_path / "binary.yaml"))


def test_an_empty_file_and_a_file_of_any_name_are_recipes(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# all as it comes\n")
    assert build_recipe(load_recipe(str(tmp_path / "empty.yaml"))) == Recipe()
    (tmp_path / "mine").write_text("weights.bits: 3\n")
    assert build_recipe(load_recipe(str(tmp_path / "mine"))).weights.bits == 3
