"""Tasks of a model and its runs side by side: what is done is kept, and the page says what was measured."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rotoboa.models.aliases import TINY_FOLDER

TASKS = TINY_FOLDER / "tasks"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("real_tasks")
    for name in ("real_tasks", "common"):
        sys.modules.pop(name, None)


def test_what_is_done_is_kept(
    tasks: Any, llama: Path, cheap_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cheap_run("w4a16")
    subjects = {tasks.FULL: llama, "mine": run / "model"}
    given = (["tiny_recall"], TASKS, 4, 4, tmp_path / "kept.json")
    found = tasks.measure(subjects, *given)
    assert [(one["subject"], one["task"]) for one in found.values()] == [
        (tasks.FULL, "tiny_recall"),
        ("mine", "tiny_recall"),
    ]
    monkeypatch.setattr(tasks, "loaded", lambda *_, **__: pytest.fail("measured again"))
    assert tasks.measure(subjects, *given) == found
    assert tasks.mark(llama, "tiny_recall", 4) != tasks.mark(llama, "tiny_recall", 5)
    page = tasks.document(found, {"mine": tasks.divergence(run)}, "llama", 4)
    assert "the first 4 items" in page and page.count("| mine |") == 1 and f"{tasks.divergence(run):.4f}" in page


def test_what_holds_no_model_is_refused(
    tasks: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["real_tasks.py", "--model", str(llama), "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        tasks.typer.run(tasks.main)
    assert ended.value.code == 2 and "holds no safetensors" in capsys.readouterr().err
