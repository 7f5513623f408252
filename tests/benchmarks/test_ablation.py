"""The ablation's cases and its table; the runs themselves are the benchmark's."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from rotoboa.pipeline.recipe.recipe_files import build_recipe, load_recipe


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("ablation")
    for name in ("ablation", "common"):
        sys.modules.pop(name, None)


def test_every_case_differs_from_the_default_by_its_lever(ablation: Any) -> None:
    for recipe in ablation.RECIPES:
        default = build_recipe(load_recipe(recipe))
        for name, changes in ablation.cases(recipe).items():
            changed = build_recipe(load_recipe(recipe), changes)
            assert (changed == default) == (name == ablation.DEFAULT)
            if name != ablation.DEFAULT:
                side = 1 if ablation.is_on(recipe, name) else 0
                assert changes == {field: values[side] for field, values in ablation.LEVERS[name].items()}


def test_differences_are_paired_by_seed_and_signed_by_the_lever(ablation: Any) -> None:
    def figures(kl: float) -> dict[str, float]:
        return {"kl": kl, "perplexity": 10 * kl, "full_precision": 1.0}

    results = {
        "w2a16 | default | 0": figures(0.1),
        "w2a16 | default | 1": figures(0.3),
        "w2a16 | act order | 0": figures(0.2),  # on by default: off is worse by 0.1, 0.2
        "w2a16 | act order | 1": figures(0.5),
        "w2a16 | best of 8 rotations | 1": figures(0.1),  # off by default: on is better by 0.2
    }
    lines = ablation.table("w2a16", results)
    assert "| act order | on | 2 | 0.2000 | 0.3500 | +0.1500 ± 0.0707 | +1.500 ± 0.707 |" in lines
    assert "| best of 8 rotations | off | 1 | 0.1000 | 0.3000 | +0.2000 | +2.000 |" in lines
    assert len([line for line in lines if line.startswith("| ")]) == 3  # the head, and these two
    assert ablation.table("w3a16", results) == []


def test_a_case_of_other_defaults_is_another_case(ablation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ablation.cases("w2a16")
    setting = ablation.setting_of("w2a16", "tiny", None, None)
    prints = {name: ablation.print_of("w2a16", setting, changes) for name, changes in cases.items()}
    assert len(set(prints.values())) == len(cases)
    base = load_recipe("w2a16")
    base["weights"]["drift"] = False
    monkeypatch.setattr(ablation, "load_recipe", lambda name: base)
    assert ablation.print_of("w2a16", setting, {}) == prints["drift of the residual stream"]


def test_another_model_has_its_texts_its_setting_and_its_files(
    ablation: Any, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = ablation.setting_of("w2a16", str(llama), str(text), str(text))
    assert setting["calibration.samples"] == 8 and setting["evaluation.dataset"] == str(text)
    with pytest.raises(Exception, match="give both --text and --calibrate"):
        ablation.setting_of("w2a16", str(llama), str(text), None)
    other = tmp_path / "text.txt"
    prints = []
    for words in (text.read_text(), "other words"):
        other.write_text(words)
        changed = {**setting, "evaluation.dataset": str(other), "calibration.dataset": str(other)}
        prints.append(ablation.print_of("w2a16", changed, {}))
    assert prints[0] == ablation.print_of("w2a16", setting, {}) != prints[1], "the text counts, not where it lies"
    measured: list[Any] = []

    def one(functions: Any, missing: dict[str, Any], jobs: int, *, alone: bool) -> Any:
        for key, value in missing.items():
            measured.append(value)
            yield key, {"kl": 0.1, "perplexity": 2.0, "full_precision": 1.0}, ""

    monkeypatch.setattr(ablation, "side_by_side", one)
    monkeypatch.setattr(ablation, "HERE", tmp_path)
    for _ in range(2):
        ablation.main(seeds=1, model=str(llama), text=str(text), calibrate=str(text), recipes="w2a16", name=None)
    assert len(measured) == len(ablation.cases("w2a16")) and measured[0][1] == setting
    page = (tmp_path / f"ablation-{llama.name}.md").read_text(encoding="utf-8")
    assert f"MODEL={llama.name} TEXT=text.txt CALIBRATE=text.txt`" in page and str(llama) not in page
    assert "calibration.sequence_length 1024" in page and "w2a16 8." in page
