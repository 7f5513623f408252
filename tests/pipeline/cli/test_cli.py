import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import rotoboa.pipeline
from rotoboa.errors import InputError, RunError
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.console.progress import Progress
from rotoboa.pipeline.recipe.fields import field_paths
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import recipe_names
from rotoboa.pipeline.storage.run_report import Report

REPORT = {
    "model": "tiny",
    "recipe": Recipe().model_dump(mode="json"),
    "perplexity": {"stdlib": {"full_precision": 9.125, "rtn": 99.0, "quantized": 10.5}},
    "seconds": {"quantize": 12.0},
    "sizes": {"quantized": 2**20},
}


class Stages(ModuleType):
    """Stands in for the stages and for evaluating: remembers how it was called, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__("rotoboa.pipeline.stages")
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.error: BaseException | None = None

    def _call(self, subject: Any, **options: Any) -> Report:
        self.calls.append((subject, options))
        if self.error is not None:
            raise self.error
        return Report.model_validate(REPORT)

    quantize = evaluate = _call


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    fake = Stages()
    for room, name in ((rotoboa.pipeline, "stages"), (rotoboa.pipeline.measure, "evaluating")):
        monkeypatch.setitem(sys.modules, f"{room.__name__}.{name}", fake)
        monkeypatch.setattr(room, name, fake, raising=False)
    return fake


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def flat(text: str) -> str:
    return " ".join(text.split())


def fails(code: int, *arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def run_folder(folder: Path, report: bool = True) -> Path:
    manifest = {
        "identity": {
            "recipe": {"model": "tiny", "weights": {"bits": 4, "group_size": None}},
            "checkpoint": {"model.safetensors": "1"},
            "versions": {"torch": "2.13"},
        },
        "blocks": [{"index": 0, "seconds": 3.5, "layers": {"self_attn.q_proj": {"loss": 0.0625}}}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if report:
        (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


def test_every_field_of_a_recipe_is_an_option_with_its_description() -> None:
    result = call("quantize", "--help")
    assert result.exit_code == 0
    shown = flat(result.stdout)
    for field in field_paths():
        assert re.search(rf"--{re.escape(field.name)}(?![\w.])", shown), field.name
        if field.annotation is bool:
            assert f"--{field.name} / --no-{field.name} " in shown
        # Words may be broken at hyphens, so spaces do not count.
        assert field.description.replace(" ", "") in shown.replace(" ", "")


@pytest.mark.parametrize("arguments", [["-h"], ["quantize", "-h"], ["evaluate", "-h"], ["inspect", "-h"]])
def test_short_help(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 0 and result.stdout.startswith("Usage: ")


def test_version() -> None:
    assert re.fullmatch(r"rotoboa \d+\.\d+\.\d+\S*\n", call("--version").stdout)


def test_help_imports_neither_torch_nor_transformers() -> None:
    # Both ways to start the command; each import is a line on standard error.
    start = "import sys; sys.argv[0] = '/bin/rotoboa'; from rotoboa.pipeline.cli.app import main; main()"
    for program in (["-c", start], ["-m", "rotoboa"]):
        command = [sys.executable, "-X", "importtime", *program, "quantize", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "typer" in imported and not {"torch", "transformers", "datasets"} & imported


def test_a_package_run_with_m_that_imports_rotoboa_can_load_models(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    """What registers the native format is imported: here one that takes no time, and tests of formats load models."""
    native = "import sys; sys.modules['rotoboa.export.formats.native'] = type(sys)('native')\n"
    (tmp_path / "other" / "__init__.py").write_text(f"{native}import rotoboa\n")
    (tmp_path / "other" / "__main__.py").write_text("import rotoboa; print(rotoboa._native.__name__)\n")
    command = [sys.executable, "-m", "other"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "native\n"


def test_python_m_rotoboa() -> None:
    done = subprocess.run([sys.executable, "-m", "rotoboa", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: rotoboa ")


def test_quantize_builds_the_recipe_and_prints_the_report(stages: Stages) -> None:
    result = call(
        *("quantize", "--recipe", "w2a16", "--weights.bits", "3", "--rotation.r1", "online", "--no-rotation.r2"),
        *("--weights.group_size", "none", "--calibration.samples", "5", "--device", "cpu", "--quiet"),
    )
    assert result.exit_code == 0, result.output
    recipe, options = stages.calls[0]
    assert isinstance(recipe, Recipe) and isinstance(options["progress"], Progress)
    assert options["device"] == "cpu" and options["progress"].quiet
    assert (recipe.weights.bits, recipe.weights.group_size, recipe.calibration.samples) == (3, None, 5)
    assert recipe.rotation.r1 == "online" and not recipe.rotation.r2 and recipe.activations.bits == 16
    assert recipe.output == Path("runs/tiny-w2a16")
    for words in ("99.000", "10.500", "12.0 s", "1 MiB", "runs/tiny-w2a16"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ([], "runs/tiny-w4a4kv4"),
        (["--model", "org/name-1b"], "runs/name-1b-w4a4kv4"),
        (["--model", "some/folder/"], "runs/folder-w4a4kv4"),
        (["--output", "elsewhere"], "elsewhere"),
    ],
)
def test_output_folder(stages: Stages, arguments: list[str], output: str) -> None:
    assert call("quantize", *arguments).exit_code == 0
    recipe, options = stages.calls[0]
    assert recipe.output == Path(output) and options["device"] is None


def test_a_recipe_file_gives_its_name_and_its_output(stages: Stages, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("weights: {method: gptq}\n")
    assert call("quantize", "--recipe", str(file)).exit_code == 0
    file.write_text("output: there\n")
    assert call("quantize", "--recipe", str(file)).exit_code == 0
    assert [recipe.output for recipe, _ in stages.calls] == [Path("runs/tiny-mine"), Path("there")]
    assert stages.calls[0][0].weights.method == "gptq"


def test_illegal_values_are_one_sentence(stages: Stages, tmp_path: Path) -> None:
    message = fails(2, "quantize", "--weights.bits", "9", "--weights.method", "best")
    assert "weights.bits is 9 but must be 2 to 8" in message and "weights.method is best" in message
    assert "no recipe 'w4': perhaps w4a8" in fails(2, "quantize", "--recipe", "w4")
    (tmp_path / "bad.yaml").write_text("weights: {bit: 4}\n")
    assert "no field weights.bit (perhaps weights.bits)" in fails(2, "quantize", "--recipe", str(tmp_path / "bad.yaml"))
    assert stages.calls == []


def test_unknown_options_are_usage_errors() -> None:
    result = call("quantize", "--weights.bit", "4")
    assert result.exit_code == 2 and "--weights.bits" in result.stderr and result.stdout == ""
    assert call("evaluate").exit_code == 2
    assert call("nonsense").exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("No [such] model."), 2, "error: No [such] model."),
        (RunError("Block 3 gave NaN;\n lower it."), 1, "error: Block 3 gave NaN; lower it."),
        (ValueError("a\nb"), 1, "error: unexpected ValueError: a b; please report it, with the traceback that"),
        (ValueError(), 1, "error: unexpected ValueError; please report it"),
    ],
)
def test_errors_are_one_sentence(stages: Stages, error: Exception, code: int, words: str) -> None:
    stages.error = error
    assert words in fails(code, "quantize", "--quiet")


def test_debug_shows_the_traceback(stages: Stages) -> None:
    stages.error = ValueError("deep")
    result = call("--debug", "quantize", "--quiet")
    assert result.exit_code == 1 and "Traceback" in result.stderr and "error: unexpected ValueError" in result.stderr
    assert "Traceback" not in call("quantize", "--quiet").stderr


def test_an_interrupt_is_a_line(stages: Stages) -> None:
    stages.error = KeyboardInterrupt()
    result = call("quantize", "--quiet")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted; the same command goes on from here.\n"


def test_evaluate(stages: Stages, tmp_path: Path) -> None:
    run_folder(tmp_path)
    result = call("evaluate", str(tmp_path), "--dataset", "c4", "--windows", "7", "--sequence-length", "64", "--quiet")
    assert result.exit_code == 0 and "10.500" in result.stdout
    run, options = stages.calls[0]
    assert run == tmp_path and options.pop("progress").quiet
    assert {name: value for name, value in options.items() if value is not None} == {
        "dataset": "c4",
        "windows": 7,
        "sequence_length": 64,
        "batch": 8,
        "sources": False,
    }
    more = ("--tasks", "piqa,mine", "--tasks-path", str(tmp_path), "--limit", "5", "--batch-size", "2", "--quiet")
    assert call("evaluate", str(tmp_path), *more).exit_code == 0
    options = stages.calls[1][1]
    assert options["tasks"] == "piqa,mine" and options["tasks_path"] == tmp_path
    assert options["limit"] == 5 and options["batch"] == 2 and options["dataset"] is None
    assert call("evaluate", str(tmp_path), "--sources", "--quiet").exit_code == 0
    assert stages.calls[2][1]["sources"] is True
    assert call("evaluate", str(tmp_path), "--windows", "0").exit_code == 2


def test_inspect(tmp_path: Path) -> None:
    result = call("inspect", str(run_folder(tmp_path)))
    assert result.exit_code == 0
    words = ("weights.group_size", "2.13", "q_proj", "0.0625", "3.5", "10.500", "12.0 s", "1 MiB")
    for word in words:
        assert word in result.stdout


def test_inspect_an_unfinished_run(tmp_path: Path) -> None:
    result = call("inspect", str(run_folder(tmp_path, report=False)))
    assert result.exit_code == 0 and "not finished" in result.stdout and "0.0625" in result.stdout
    assert "weights.group_size" in result.stdout and "2.13" in result.stdout


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_no_run_folder(stages: Stages, tmp_path: Path, command: str) -> None:
    if command == "evaluate":  # what is no run may be a model to inspect
        assert "no folder of a run" in fails(2, command, str(tmp_path / "absent"))
        assert "no folder of a run" in fails(2, command, str(tmp_path))
    for damaged in ("{", "[]"):
        (tmp_path / "manifest.json").write_text(damaged)
        assert "manifest.json cannot be read" in fails(2, command, str(tmp_path))
    assert stages.calls == []


def test_recipes_and_models_are_listed() -> None:
    shown = call("recipes").stdout
    assert all(name in shown for name in recipe_names()) and "Everything in 4 bits" in shown
    shown = call("models").stdout
    assert "tiny" in shown and "embedded" in shown and "TinyLlama/TinyLlama_v1.1" in shown and "/home" not in shown
    assert "hunyuan_v1_dense" in shown and "any other causal decoder" in shown
