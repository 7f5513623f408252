"""Tasks of a run: what default stands for, what the report holds, and what is added to it later."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rotoboa.errors import InputError
from rotoboa.eval.zeroshot import Score, Tasks
from rotoboa.models.tiny.tasks import items
from rotoboa.pipeline import stages
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.measure import evaluating, tasks
from rotoboa.pipeline.recipe.recipe_files import build_recipe


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be added to."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def asked(monkeypatch: pytest.MonkeyPatch, model: Path | str, **options: Any) -> tuple[str, ...]:
    monkeypatch.setattr(tasks, "load_tasks", lambda names, folders: Tasks(tuple(names), folders))
    job = prepare(build_recipe({"model": str(model)}))
    found = tasks.tasks_of(job, options.get("names"), options.get("folder"))
    return found.names if found is not None else ()


def test_default_is_by_the_model(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    assert asked(monkeypatch, "tiny", names=["default"]) == tasks.TINY_TASKS
    assert asked(monkeypatch, llama, names=["default", "mine"]) == (*tasks.PAPER_TASKS, "mine")
    assert asked(monkeypatch, "tiny") == ()
    monkeypatch.setattr(tasks, "task_names", lambda folder: ["a", "b"])
    assert asked(monkeypatch, "tiny", folder=Path("there")) == ("a", "b")
    with pytest.raises(InputError, match="task piqa is given twice"):
        asked(monkeypatch, llama, names=["default", "piqa"])


def test_real_items_through_every_model(run: Path) -> None:
    before = json.loads((run / "report.json").read_text())
    found = evaluating.evaluate(run, tasks="tiny_agreement,tiny_recall", limit=4).to_json()
    assert found["perplexity"] == {} and list(found["tasks"]) == ["tiny_agreement", "tiny_recall", "average"]
    for entry in found["tasks"].values():
        for model, stderr in (
            ("full_precision", "full_precision_stderr"),
            ("rtn", "rtn_stderr"),
            ("quantized", "stderr"),
        ):
            assert 0 <= entry[model] <= 1 and entry[stderr] >= 0
        assert entry["limit"] == 4
    means = [found["tasks"][name]["quantized"] for name in ("tiny_agreement", "tiny_recall")]
    assert found["tasks"]["average"]["quantized"] == sum(means) / 2
    assert {"tasks full precision", "tasks rtn", "tasks quantized"} <= set(found["seconds"])
    assert json.loads((run / "report.json").read_text()) == before  # a limit is no result


def test_what_is_measured_later_is_added_to_the_report(run: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"a": Score("acc", 0.5, 0.125), "b": Score("acc", 0.25, None)}
    monkeypatch.setattr(evaluating, "tasks_of", lambda job, names, folder: Tasks(tuple(names), None) if names else None)
    monkeypatch.setattr(
        tasks, "_models", lambda job, folder: iter([("full precision", _Model()), ("quantized", _Model())])
    )
    monkeypatch.setattr(tasks, "zero_shot", lambda model, tokenizer, asked, **_: {n: scores[n] for n in asked.names})
    before = json.loads((run / "report.json").read_text())
    evaluating.evaluate(run, tasks=["a", "b"])
    report = json.loads((run / "report.json").read_text())
    assert report["tasks"]["a"] == {
        **{"metric": "acc", "full_precision": 0.5, "full_precision_stderr": 0.125},
        **{"quantized": 0.5, "stderr": 0.125},
    }
    assert report["tasks"]["average"]["quantized"] == 0.375
    assert {name: part for name, part in report.items() if name != "tasks"} == before
    evaluating.evaluate(run, tasks="a")  # the average of both stands no more
    assert set(json.loads((run / "report.json").read_text())["tasks"]) == {"a", "b"}

    other = run / "other.txt"
    other.write_text(text.read_text()[:9000])
    found = evaluating.evaluate(run, dataset=f"{text},{other}").to_json()
    report = json.loads((run / "report.json").read_text())
    assert report["perplexity"] == before["perplexity"] | {str(other): found["perplexity"][str(other)]}
    assert set(report["divergence"]) == set(report["tokens"]["evaluation"]) == {str(text), str(other)}


class _Model:
    def eval(self) -> "_Model":
        return self


def test_a_wrong_task_stops_before_the_long_work(tmp_path: Path, make_recipe: Any, llama: Path) -> None:
    changes = {"model": str(llama), "output": tmp_path / "run", "evaluation.tasks_path": str(tmp_path)}
    with pytest.raises(InputError, match="holds no task"):
        stages.quantize(make_recipe("w4a16", changes))
    assert not (tmp_path / "run").exists()


def test_tasks_of_a_recipe_are_in_its_report(
    llama: Path, make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = items.agreement()[:6]
    monkeypatch.setattr(items, "agreement", lambda: made)
    changes = {"output": tmp_path / "run", "evaluation.tasks": "tiny_agreement", "evaluation.baseline": False}
    report = stages.quantize(make_recipe("w4a16", {"model": str(llama), **changes})).to_json()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["tasks"] == report["tasks"]
    (entry,) = report["tasks"].values()
    assert set(entry) == {"metric", "full_precision", "full_precision_stderr", "quantized", "stderr"}
