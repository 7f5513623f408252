"""The judge: what it measures, keeps and measures again, on a small model; its page and its picture."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe

SIZES = {"samples": 2, "windows": 2, "length": 32}
OFF = ["weights.refine=0", "weights.starts=1", "weights.tabu=0", "weights.grid=minmax"]


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("real")
    monkeypatch.setattr(module, "HERE", tmp_path)
    yield module
    for name in ("real", "real_page", "methods", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def judged(real: Any, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """judged(recipes="w2a16"): measures in this process; returns the keys that were measured, and what is kept."""

    def here(function: Any, missing: dict[str, Any], jobs: int) -> Any:
        for key, arguments in missing.items():
            keys.append(key)
            yield key, function(*arguments), ""

    monkeypatch.setattr(real, "side_by_side", here)
    keys: list[str] = []

    def judge(**options: Any) -> tuple[list[str], dict[str, Any]]:
        keys.clear()
        given = {
            **{"model": str(llama), "text": str(text), "calibrate": str(text), "quick": True, **SIZES},
            **{"seeds": 1, "recipes": "w2a16", "methods": "RTN,default", "transforms": "rotation", "change": OFF},
            **{"jobs": 1, "threads": 1, "name": None, "fresh": False},
        }
        real.main(**{**given, **options})
        return list(keys), json.loads((tmp_path / f"real-{llama.name}-quick.json").read_text(encoding="utf-8"))

    threads = torch.get_num_threads()
    yield judge
    torch.set_num_threads(threads)


def test_every_cell_is_a_recipe_of_its_own(real: Any) -> None:
    cases = real.cases(real.DEFAULT, real.NAMES, ["rotation"], 1)
    assert len(cases) == 10 * 6
    subject = real.Subject("tiny", "a", "b", dict(real.REPORTED))
    assert len(set(subject.prints(cases).values())) == 60
    floats = real.cases(["nvfp4", "w4a4-g16"], ["GPTQ"], ["bare", "full", "blocks-16", "blocks-32"], 1)
    assert len(set(subject.prints(floats).values())) == 8
    for label, (name, changes) in real.DEFAULT.items():
        recipe = build_recipe(load_recipe(name), changes)
        bits = f"w{recipe.weights.bits}a{recipe.activations.bits}" + ("kv4" if recipe.cache.key_bits == 4 else "")
        group = recipe.weights.group_size or recipe.activations.group_size
        assert label == bits + (f"-g{group}" if group else "")
    recipe = build_recipe({}, subject.changes(real.Case("w4a16", "default", "rotation", 0)))
    assert (recipe.calibration.samples, recipe.calibration.sequence_length, recipe.evaluation.windows) == (16, 2048, 20)
    assert recipe.calibration.seed == 0 and recipe.evaluation.dataset == ("a",)


def test_a_curve_of_sizes(real: Any) -> None:
    subject = real.Subject("tiny", "a", "b", dict(real.REPORTED))
    curve = [name for name in real.RECIPES if name.startswith("budget-") or name.endswith("-e8")]
    assert (
        len(curve) == 3 + 6 and len(set(subject.prints(real.cases(curve, ["default"], ["rotation"], 1)).values())) == 9
    )
    cell = {"perplexity": 20.0, "kl": 0.5, "seconds": 1.0, "memory": 1.0}
    found = {
        f"{name} | default | rotation | 0": cell | {"size": (index + 1) * 2**20}
        for index, name in enumerate(("w2a16", "w3a16", "budget-2.5-e8"))
    }
    drawn = real.sizes_picture(found, "tiny")
    assert all(f"{name}: 0.5000" in drawn for name in ("w2a16", "w3a16", "budget-2.5-e8"))
    assert real.sizes_picture(dict(list(found.items())[:2]), "tiny") is None


def test_it_measures_and_goes_on(judged: Any, llama: Path, text: Path, tmp_path: Path) -> None:
    keys, found = judged()
    assert keys == ["w2a16 | RTN | rotation | 0", "w2a16 | default | rotation | 0"]
    assert [cell["case"] for cell in found.values()] == keys
    for cell in found.values():
        assert cell["perplexity"] > 1 and cell["kl"] > 0 and cell["seconds"] > 0
        assert 2**15 < cell["size"] < sum(file.stat().st_size for file in llama.glob("*.safetensors"))
    assert judged() == ([], found), "nothing is measured again"
    keys, more = judged(methods="RTN", recipes="w2a16,w4a8")
    assert keys == ["w4a8 | RTN | rotation | 0"] and len(more) == 3
    page = (tmp_path / f"real-{llama.name}-quick.md").read_text(encoding="utf-8")
    assert str(llama) not in page and f"TEXT={text.name}" in page and "windows begin without BOS" in page
    assert "2 sequences of 32 tokens" in page and "weights.tabu 0" in page and "Full precision: perplexity" in page
    (kl,) = [cell["kl"] for cell in found.values() if "RTN" in cell["case"]]
    head, _, *rows = [line for line in page.splitlines() if line.startswith("|")][:4]
    assert head == "| KL | w2a16 | w4a8 |" and rows[0].startswith("| RTN | ")
    assert rows[1].startswith("| default |") and rows[1].endswith("|  |"), "the other was not measured"
    root = ElementTree.fromstring((tmp_path / f"real-{llama.name}-quick.svg").read_text(encoding="utf-8"))
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert f"w2a16, RTN: {kl:.4f}" in titles and len(titles) == 3
    assert "| recipe | weights | all together |" in page, "where the loss of the default comes from"
    assert f"![KL by source](real-{llama.name}-quick-sources.svg)" in page
    assert (tmp_path / f"real-{llama.name}-quick-sources.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.usefixtures("undrawn")
def test_other_settings_are_other_cases(judged: Any, text: Path, tmp_path: Path) -> None:
    _, first = judged(methods="RTN")
    keys, found = judged(methods="RTN", change=[*OFF, "weights.damping=0.02"])
    assert len(keys) == 1 and first.items() < found.items(), "what was measured before is not lost"
    other = Path(shutil.copy(text, tmp_path / "elsewhere.txt"))
    assert judged(methods="RTN", text=str(other))[0] == [], "the same text in another place"
    other.write_text(other.read_text(encoding="utf-8") + "more", encoding="utf-8")
    assert len(judged(methods="RTN", text=str(other))[0]) == 1
    assert len(judged(methods="RTN", fresh=True)[0]) == 1


@pytest.mark.usefixtures("undrawn")
def test_a_case_that_cannot_be_does_not_stop_the_others(
    judged: Any, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception) as stopped:  # its ffn of 96 is no multiple of 64
        judged(recipes="w2a16,w2a16-g64", methods="RTN")
    assert getattr(stopped.value, "exit_code", None) == 1
    assert "w2a16-g64 | RTN | rotation | 0: weights.group_size 64 does not divide" in capsys.readouterr().err
    found = json.loads((tmp_path / f"real-{llama.name}-quick.json").read_text(encoding="utf-8"))
    assert [cell["case"] for cell in found.values()] == ["w2a16 | RTN | rotation | 0"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"text": ""},
            "give a model and its texts: make real MODEL=<folder or hub name> TEXT=<test> CALIBRATE=<text>.",
        ),
        ({"text": "absent.txt"}, "Dataset file 'absent.txt' does not exist"),
        ({"recipes": "w5a5"}, "--recipes w5a5: there are w4a16, w3a16"),
        ({"methods": "RTN,SmoothQuant"}, "--methods SmoothQuant: there are RTN, GPTQ"),
        ({"change": ["weights.bits"]}, "--set weights.bits has no value"),
        ({"change": ["weights.bit=3"]}, "there is no field weights.bit"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    judged: Any, options: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception) as stopped:
        judged(**options)
    error = capsys.readouterr().err
    assert getattr(stopped.value, "exit_code", None) == 2
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
