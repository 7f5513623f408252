"""What the tests of whole runs stand on: one that is finished, one that is interrupted, and a person who runs it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rotoboa
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.recipe.recipe import Recipe

QUICK = ["--weights.grid", "minmax", "--weights.refine", "0", "--weights.starts", "1", "--weights.rows", "8"]
SMALL = [
    *("--calibration.samples", "2", "--calibration.sequence_length", "32", "--evaluation.windows", "2"),
    "--no-evaluation.report",
]


@pytest.fixture(scope="session")
def finished(
    llama: Path, make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Recipe, dict[str, Any]]:
    """Folder, recipe and report of a finished w4a4kv4 run of the small Llama. Not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "run"
    recipe = make_recipe("w4a4kv4", {"model": str(llama), "output": output})
    return output, recipe, rotoboa.quantize(recipe)


@pytest.fixture(scope="session")
def model_files() -> Callable[[Path], dict[str, bytes]]:
    """model_files(run): what a run computed, the blocks and the model folder, by path."""

    def files(run: Path) -> dict[str, bytes]:
        found = (file for folder in ("blocks", "model") for file in (run / folder).iterdir())
        return {str(file.relative_to(run)): file.read_bytes() for file in found}

    return files


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """interrupted(recipe, stages, "write_native"): the folder of a run that ended, as by Ctrl-C, when it called that.

    With `call=2` at the second call; with `when=...` of the arguments, at the first call that is so.
    """

    def run(recipe: Recipe, owner: Any, name: str, *, call: int = 1, when: Callable[..., bool] | None = None) -> Path:
        original, calls = getattr(owner, name), 0

        def interrupt(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += when is None or when(*arguments, **options)
            if calls >= call:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                rotoboa.quantize(recipe)
        assert recipe.output is not None
        return recipe.output

    return run


class User:
    """At the command line, with a small Llama, a text and an output folder that does not exist yet."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.model, self.text, self.output = model, text, folder / "run"

    def arguments(self, *more: str | Path, model: str | Path | None = None) -> list[str]:
        given: list[str | Path] = [
            *("quantize", "--model", model or self.model, "--output", self.output, *SMALL, *QUICK),
            *("--calibration.dataset", self.text, "--evaluation.dataset", self.text, *more),
        ]
        return [str(argument) for argument in given]

    def fails(self, code: int, *more: str | Path, model: str | Path | None = None) -> str:
        """The one sentence on standard error."""
        result = CliRunner().invoke(app, self.arguments(*more, model=model))
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        return self.sentence(result.stderr)

    def refused(self, *more: str | Path, model: str | Path | None = None) -> str:
        """The sentence, where nothing may be written."""
        message = self.fails(2, *more, model=model)
        assert not self.output.exists()
        return message

    @staticmethod
    def sentence(stderr: str) -> str:
        """What is on standard error but for notices of the work before: one sentence."""
        notices = ("Calibration has ", "The tokenizer has ")
        lines = [line for line in stderr.splitlines() if not line.startswith(notices)]
        assert len(lines) == 1, stderr
        assert lines[0].startswith("error: ") and lines[0].endswith("."), stderr
        assert "Traceback" not in stderr and "unexpected" not in stderr
        return lines[0]

    def succeeds(self, *more: str | Path) -> None:
        result = CliRunner().invoke(app, self.arguments(*more, "--quiet"))
        assert result.exit_code == 0, result.output


@pytest.fixture
def user(llama: Path, text: Path, tmp_path: Path) -> User:
    return User(llama, text, tmp_path)


@pytest.fixture
def copied(user: User, tmp_path: Path) -> Path:
    """The user's own copy of the model, to be damaged."""
    user.model = Path(shutil.copytree(user.model, tmp_path / "model"))
    return user.model
