"""Fields that a recipe gives and that cannot do anything: they are named before the work, and do nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import rotoboa
from rotoboa.boa.online.attention import NAME
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.job.notices import IDLE, early_notices, idle_fields
from rotoboa.pipeline.recipe.fields import LEAVES, value_of
from rotoboa.pipeline.recipe.recipe import Recipe, Weights
from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe, recipe_names, recipe_to_yaml
from rotoboa.pipeline.recipe.settings import rotations_of, spec_of
from rotoboa.pipeline.storage.run_report import Measured

MakeRecipe = Callable[..., Recipe]

BY_LAYER = ("rows", "attention", "value_rows", "value_output")
LEARNED = ("iterations", "learning_rate", "regulariser")
SOLVER = ("act_order", "damping", "alpha", "refine", "starts", "tabu", "drift", "head")
ALWAYS = {
    "model", "output", "bos", "memory", "deterministic", "timeout", "rotation.r1", "rotation.r2",
    "rotation.r4", "rotation.heads", "rotation.scale", "weights.group_size", "weights.symmetric",
    "overrides", "embedding.bits", "embedding.format", "weights.size", "weights.method", "weights.format",
    "weights.zfold", "activations.bits", "cache.key_bits", "cache.value_bits", "calibration.dataset",
    "calibration.sequence_length", "calibration.batch",
}  # fmt: skip
"""Fields that always have a part in the result or in what it takes; zfold is refused where it has none, and a model of
the user's own needs a data set in any case."""
OTHER = {
    "rotation.blocks": 16, "rotation.r4_blocks": True, "rotation.seed": 7, "rotation.seeds": 2, "weights.rows": 2,
    "weights.act_order": False,
    "weights.grid": "diagonal", "weights.damping": 0.3, "weights.alpha": 0.75, "weights.refine": 2,
    "weights.starts": 2, "weights.tabu": 1, "weights.drift": False, "weights.head": 0.5,
    "weights.attention": "bound", "weights.bits": 3, "weights.budget": 3, "weights.choices": (2, 8),
    "weights.value_rows": 2,
    "embedding.group_size": 8, "embedding.symmetric": True, "head.bits": 8, "head.format": "q4_k",
    "head.group_size": 8,
    "head.symmetric": True,
    "weights.value_output": False, "weights.iterations": 3, "weights.learning_rate": 0.5,
    "weights.regulariser": 0, "activations.group_size": 16, "activations.format": "nvfp4",
    "activations.symmetric": False, "activations.clip": 0.6, "activations.search": False,
    "activations.convention": "vllm", "activations.dynamic": False, "activations.directions": 4,
    "cache.clip": 0.6, "cache.format": "fp8",
    "cache.search": False, "cache.center": False, "cache.sink": 4, "cache.served_by": "vllm",
    "rotation.r3": True, "calibration.samples": 5, "calibration.seed": 1,
}  # fmt: skip
"""Of each field a value that is neither its default nor that of the runs here."""
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "rtn": (
        {"weights.method": "rtn", "weights.grid": "hessian", "rotation.r1": "none", "rotation.r2": False},
        {f"weights.{name}" for name in (*BY_LAYER, *SOLVER, *LEARNED, "grid")}
        | {f"rotation.{name}" for name in ("seed", "seeds", "r4_blocks", "blocks")}
        | {"calibration.samples", "calibration.seed"}
        | {f"activations.{name}" for name in ("group_size", "symmetric", "clip", "search", "convention")}
        | {"activations.dynamic", "activations.directions"}
        | {f"cache.{name}" for name in ("clip", "search", "center", "sink", "served_by", "format")},
    ),
    "a cache served by vLLM": (
        {"weights.method": "rtn", "cache.key_bits": 4, "cache.value_bits": 4, "cache.served_by": "vllm"},
        {"rotation.r3", "cache.clip", "cache.search", "cache.center", "cache.sink"},
    ),
    "a cache in FP8": (
        {"cache.key_bits": 8, "cache.value_bits": 8, "cache.format": "fp8", "activations.bits": 8},
        {"cache.clip", "cache.search", "activations.dynamic"},
    ),
    "rtn, R1 placed": ({"weights.method": "rtn"}, {"calibration.samples"}),
    "gptq": (
        {"weights.method": "gptq", "activations.bits": 4, "cache.key_bits": 4, "rotation.r1": "online",
         "rotation.r2": False},
        {f"weights.{name}" for name in (*BY_LAYER, *LEARNED)}
        | {"activations.clip", "cache.clip", "rotation.seed", "rotation.seeds"},
    ),
    "a budget": ({"weights.size": "10MB"}, {"weights.bits", "weights.budget"}),
    "boa without alpha": (
        {"weights.alpha": 0, "activations.bits": 8, "cache.key_bits": 5, "cache.value_bits": 5, "rotation.r4": True},
        {"weights.drift", "activations.clip", "cache.clip", "embedding.group_size", "head.group_size",
         "embedding.symmetric", "head.symmetric", "weights.choices",
         *(f"weights.{name}" for name in LEARNED)},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block whose ffn (96) R4 can transform as a whole or in blocks."""
    return save_llama(tmp_path_factory.mktemp("small") / "llama", num_hidden_layers=1, hidden_size=32)


@pytest.fixture(scope="module")
def wide(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that K types fit."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    return save_llama(folder, num_hidden_layers=1, hidden_size=256, intermediate_size=32)


def decoder_of(folder: Path) -> Decoder:
    return Decoder(Checkpoint(folder).config, attention=NAME, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def result(
    small: Path, make_recipe: MakeRecipe, model_files: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """result({field: value}): all tensors of a run, and its perplexities; and the notices of its report."""

    def run(changes: dict[str, Any]) -> tuple[Any, list[str]]:
        output = tmp_path_factory.mktemp("runs") / "run"
        fixed = {"model": str(small), "output": output, "evaluation.baseline": False}
        report = rotoboa.quantize(make_recipe("w4a16", fixed | changes))
        files = {name: data for name, data in model_files(output).items() if name.endswith(".safetensors")}
        return (files, report["perplexity"]), report["notices"]

    return run


def test_every_field_is_in_the_table_or_always_has_a_part() -> None:
    evaluation = {name for name in LEAVES if name.startswith("evaluation.")}  # what is measured, not what is made
    assert LEAVES.keys() == IDLE.keys() | ALWAYS | evaluation and not IDLE.keys() & (ALWAYS | evaluation)
    assert OTHER.keys() == IDLE.keys()


@pytest.mark.parametrize("case", CASES)
def test_what_is_named_leaves_every_byte_as_it_is(case: str, result: Callable[..., Any]) -> None:
    setting, idle = CASES[case]
    plain, _ = result(setting)
    changed, notices = result(setting | {name: OTHER[name] for name in idle})
    assert changed == plain
    (notice,) = [notice for notice in notices if notice.startswith("Without effect in this recipe: ")]
    named = {name for name in LEAVES if f" {name}, " in notice or f" {name} (" in notice}
    assert named >= idle, notice


ALIVE = {
    "weights.method": "boa", "activations.bits": 4, "cache.key_bits": 2, "cache.value_bits": 2, "rotation.r4": True,
    "activations.search": False, "cache.search": False,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OTHER.keys() - {f"weights.{name}" for name in LEARNED}))
def test_what_is_not_named_has_an_effect(
    name: str, result: Callable[..., Any], alive: Any, small: Path, wide: Path, make_recipe: MakeRecipe
) -> None:
    setting = ALIVE | ({"activations.clip": 1, "cache.clip": 1} if name.endswith(".search") else {})
    setting |= {"weights.budget": 3} if name == "weights.choices" else {}
    setting |= {"cache.key_bits": 4, "cache.value_bits": 4} if name == "cache.served_by" else {}
    setting |= {"cache.key_bits": 8, "cache.value_bits": 8} if name == "cache.format" else {}
    setting |= {"activations.bits": 8, "activations.format": "fp8"} if name == "activations.dynamic" else {}
    setting |= {"model": str(wide)} if name == "head.format" else {}
    setting |= (
        {"embedding.bits": 4, "head.bits": 4} if name.startswith(("embedding.", "head.group", "head.symmetric")) else {}
    )
    value = True if name.endswith(".search") else OTHER[name]
    recipe = make_recipe("w4a16", {"model": str(small), **setting, name: value})
    assert name not in idle_fields(recipe, decoder_of(small))
    assert result(setting | {name: value})[0] != alive(setting)


@pytest.fixture(scope="module")
def alive(result: Callable[..., Any]) -> Callable[..., Any]:
    """alive(setting): the result, made once."""
    made: dict[str, Any] = {}

    def of(setting: dict[str, Any]) -> Any:
        key = repr(setting)
        if key not in made:
            made[key] = result(setting)[0]
        return made[key]

    return of


@pytest.mark.parametrize("name", [f"weights.{name}" for name in LEARNED])
def test_learned_rounding_reads_its_fields(name: str, result: Callable[..., Any], alive: Any) -> None:
    setting = {"weights.method": "adaround", "weights.bits": 2, "weights.refine": 0, "weights.iterations": 200}
    assert result(setting | {name: OTHER[name]})[0] != alive(setting)


def test_only_what_the_user_gave_is_named(small: Path, tmp_path: Path) -> None:
    decoder = decoder_of(small)

    def named(recipe: Recipe) -> set[str]:
        return set(idle_fields(recipe, decoder))

    for name in recipe_names():
        assert not named(build_recipe(load_recipe(name), {"model": str(small)})), name
    # Not what the package's recipe holds, but what stands beside it.
    given = {"weights.method": "rtn", "weights.drift": "false"}
    assert named(build_recipe(load_recipe("w4a4"), given)) == {"weights.drift"}
    # A file of his own: what is not the default, since a run's recipe.yaml holds every field.
    file = tmp_path / "mine.yaml"
    file.write_text(recipe_to_yaml(build_recipe({"weights": {"method": "gptq", "rows": 2}})))
    assert named(build_recipe(load_recipe(str(file)))) == {"weights.rows"}
    assert named(build_recipe(load_recipe(str(file)), {"weights.value_rows": "128"})) == {
        "weights.rows",
        "weights.value_rows",
    }
    assert named(Recipe(weights=Weights(method="gptq", rows=4))) == {"weights.rows"}
    assert named(Recipe(weights=Weights(rows=4))) == set()


def test_of_directions_a_quarter_is_kept(small: Path) -> None:
    decoder = decoder_of(small)
    most, packaged = decoder.shape.hidden // 4, build_recipe(load_recipe("w4a4"), {"model": str(small)})
    rotations = rotations_of(packaged, decoder)
    assert spec_of(packaged, rotations, decoder).activation_directions == min(32, most)
    assert not early_notices(packaged, decoder, 10_000)
    given = build_recipe(load_recipe("w4a4"), {"model": str(small), "activations.directions": most + 1})
    assert spec_of(given, rotations, decoder).activation_directions == most
    (notice,) = early_notices(given, decoder, 10_000)
    assert f"activations.directions {most + 1} is more than a quarter" in notice and f"{most} are kept" in notice
    fewer = build_recipe(load_recipe("w4a4"), {"model": str(small), "activations.directions": most})
    assert not early_notices(fewer, decoder, 10_000)


def test_a_family_can_make_a_field_idle(save_family: Callable[..., Path], tmp_path: Path) -> None:
    decoder = decoder_of(save_family(tmp_path, "gemma2", torch.bfloat16))
    recipe = build_recipe({}, {"weights.drift": False, "rotation.seed": 1, "rotation.r2": False})
    (notice,) = early_notices(recipe, decoder, 512)
    assert "weights.drift (gemma2 has norms after attention and MLP)" in notice and "rotation.seed (only" in notice


def test_the_notice_comes_before_the_work_and_once(user: Any) -> None:
    arguments = user.arguments("--recipe", "w4a16", "--weights.iterations", "5", "--activations.clip", "0.8")
    shown = CliRunner().invoke(app, arguments).stderr
    words = "Without effect in this recipe: weights.iterations (weights.method is boa); activations.clip (activations"
    assert shown.startswith(words) and shown.count("Without effect") == 1


@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
def test_too_little_text_is_said_before_the_work(small: Path, method: str) -> None:
    decoder = decoder_of(small)  # 32 hidden channels, 96 of down

    def notices(samples: int) -> list[str]:
        recipe = build_recipe(load_recipe("w4a16"), {"calibration.samples": samples, "weights.method": method})
        return [notice for notice in early_notices(recipe, decoder, 16) if notice.startswith("Calibration")]

    assert not notices(6)
    if method == "rtn":  # reads none
        assert not notices(1)
        return
    (few,) = notices(5)
    assert few.startswith("Calibration has 80 tokens (5 x 16), fewer than some layers have input channels (96 of down:")
    assert "1.2 times as many" in few and few.endswith("give --calibration.samples 24 or more.")
    assert "32 of q, k, v, gate and up, 32 of O, 96 of down: 6.0 times" in notices(1)[0]


def test_inspect_names_them_too(small: Path) -> None:
    arguments = ["inspect", str(small), "--recipe", "w4a16", "--cache.clip", "0.8"]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "Without effect in this recipe: cache.clip (cache.key_bits and cache.value_bits are 16)." in shown


def test_evaluate_names_what_it_does_not_read(tiny_run: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*arguments: str) -> str:
        return CliRunner().invoke(app, ["evaluate", str(tiny_run), *arguments]).stderr

    monkeypatch.setattr("rotoboa.pipeline.measure.evaluating.evaluate", lambda *arguments, **options: Measured())
    assert shown("--limit", "3") == "Without effect here: --limit (no tasks are measured).\n"
    words = "Without effect here: --windows (no text is measured).\n"
    assert shown("--windows", "2", "--tasks", "default") == words
    assert shown("--windows", "2", "--tasks", "default", "--dataset", str(text), "--limit", "3") == ""


def test_a_run_that_goes_on_keeps_what_was_said(
    llama: Path, make_recipe: MakeRecipe, interrupted: Callable[..., Path], tmp_path: Path
) -> None:
    from rotoboa.pipeline import stages
    from rotoboa.pipeline.storage.run_folder import recipe_of

    changes = {"model": str(llama), "output": tmp_path / "run", "weights.method": "gptq", "weights.value_output": False}
    run = interrupted(make_recipe("w4a16", changes), stages, "write_native")
    kept = recipe_of(run).model_copy(update={"output": run})
    assert not value_of(kept, "weights.value_output")
    notices = [notice for notice in rotoboa.quantize(kept)["notices"] if "Without effect" in notice]
    # QUICK gives rows, too; the recipe of the manifest, which has every field, is not what was given.
    assert notices == ["Without effect in this recipe: weights.rows, weights.value_output (weights.method is gptq)."]
