"""The Python interface: recipes by name, fields by section, one sentence where something is wrong, and progress."""

import io
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import rotoboa
from rotoboa.errors import InputError
from rotoboa.pipeline import stages
from rotoboa.pipeline.console import progress
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.storage.run_report import Measured

ANYTHING: Any = 4


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, dict[str, Any]]]:
    """The recipes that would have run, and with what."""
    calls: list[tuple[Recipe, dict[str, Any]]] = []

    def record(recipe: Recipe, **options: Any) -> Measured:
        calls.append((recipe, options))
        return Measured()

    monkeypatch.setattr(stages, "quantize", record)
    return calls


@pytest.mark.parametrize(
    ("positional", "given"),
    [
        (("w3a16",), {"model": "org/some", "weights": {"group_size": 64}}),
        ((), {"recipe": "w3a16", "model": "org/some", "weights.group_size": "64"}),
        ((), {"recipe": {"weights": {"bits": 3}, "model": "org/some", "output": "o"}, "weights": {"group_size": 64}}),
        ((), {"recipe": Recipe(model="org/some", weights={"bits": 3}, output="o"), "weights": {"group_size": 64}}),
        ((Recipe(model="org/some", weights={"bits": 3, "group_size": 64}, output="o"),), {}),
    ],
    ids=["name", "dotted", "fields", "Recipe and fields", "Recipe"],
)
def test_a_recipe_in_every_form(asked: list[Any], positional: tuple[Any, ...], given: dict[str, Any]) -> None:
    rotoboa.quantize(*positional, device="cpu", **given)
    (recipe, options) = asked[0]
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.model) == (3, 64, "org/some")
    assert recipe.output == Path(
        "o" if positional != ("w3a16",) and given.get("recipe") != "w3a16" else "runs/some-w3a16"
    )
    assert options["device"] == "cpu" and options["progress"].quiet


def test_the_default_is_that_of_the_command(asked: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("weights: {bits: 5}\n")
    rotoboa.quantize()
    rotoboa.quantize(file, quiet=False)
    assert asked[0][0].cache.key_bits == 4 and asked[0][0].output == Path("runs/tiny-w4a4kv4")
    assert asked[1][0].weights.bits == 5 and asked[1][0].output == Path("runs/tiny-mine")
    assert not asked[1][1]["progress"].quiet


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rotoboa.Recipe(weights={"bits": 9}), "weights.bits is 9 but must be 2 to 8"),
        (lambda: rotoboa.Recipe(weights={"bitz": 4}), r"there is no field weights.bitz \(perhaps weights.bits\)"),
        (
            lambda: rotoboa.Recipe(bits=4),
            r"there is no field bits \(perhaps weights.bits or embedding.bits or .*activations.bits\)",
        ),
        (lambda: rotoboa.Recipe(weights=4), "weights must be a section with fields such as weights.bits"),
        (lambda: rotoboa.quantize("w4a16", weights={"bits": 9}), "weights.bits is 9 but must be 2 to 8"),
        (lambda: rotoboa.quantize("w4a16", bits=4), r"there is no field bits \(perhaps"),
        (lambda: rotoboa.quantize("w4a61"), "There is no recipe 'w4a61': perhaps w4a16"),
        (
            lambda: rotoboa.quantize(ANYTHING),
            "A recipe is a name such as w4a4kv4, a .yaml file or a rotoboa.Recipe, and 4",
        ),
        (lambda: rotoboa.quantize(Recipe(), bits=4), "there is no field bits"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(asked: list[Any], make: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and not asked


def test_a_name_runs(text: Path, llama: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "calibration": {"dataset": str(text), "samples": 2, "sequence_length": 32},
        "weights": {"method": "rtn"},
    }
    evaluation = {"dataset": str(text), "windows": 2, "baseline": False, "report": False}
    report = rotoboa.quantize("w4a16", model=str(llama), output=tmp_path / "run", evaluation=evaluation, **small)
    assert report["perplexity"] and (tmp_path / "run" / "model" / "config.json").is_file()


def test_bars_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich shows them through ipywidgets; without, it would warn and show nothing."""
    notebook = Console(force_jupyter=True, file=io.StringIO())
    found: dict[str, ModuleSpec | None] = {"ipywidgets": ModuleSpec("ipywidgets", None)}
    monkeypatch.setattr(progress, "find_spec", found.get)
    assert progress.is_watched(notebook) and progress.Progress(console=notebook)._bars is not None
    found.clear()
    assert not progress.is_watched(notebook) and progress.Progress(console=notebook)._bars is None
    assert not progress.is_watched(Console(file=io.StringIO()))
    assert progress.is_watched(Console(file=io.StringIO(), force_terminal=True))
