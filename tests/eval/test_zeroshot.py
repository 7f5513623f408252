"""Scores of lm-eval's tasks against log-likelihoods by hand, and wrong names and missing data as one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rotoboa.errors import InputError, RunError
from rotoboa.eval import zeroshot
from rotoboa.eval.zeroshot import PAPER_TASKS, Score, average, load_tasks, task_names, zero_shot

ITEMS = [
    {"context": "import", "choices": [" os", " sys.path", " json as j"], "answer": 0},
    {"context": "def f(x):\n    return", "choices": [" x", " None", " lambda y: y"], "answer": 2},
    {"context": "for i in range(10):", "choices": ["\n    print(i)", "\n    pass", "\nx"], "answer": 1},
    {"context": "class A:", "choices": ["\n    pass", " pass", "\n\n"], "answer": 0},
    {"context": "while True:", "choices": ["\n    break", " continue", "\n    x = 1"], "answer": 1},
]


def write_task(folder: Path, name: str, data: str | None = None, **fields: Any) -> None:
    if data is None:
        data = str(folder / f"{name}.jsonl")
        Path(data).write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "mine")
    write_task(folder, "mine_plain", metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}])
    group = {"group": "ours", "task": ["mine", "mine_plain"]}
    (folder / "ours.yaml").write_text(json.dumps(group))
    write_task(folder, "lost", data=str(folder / "absent.jsonl"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any) -> dict[str, list[bool]]:
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for item in ITEMS:
        start = len(tokenizer(item["context"])["input_ids"])
        scores = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            ids = torch.tensor([tokenizer(item["context"] + choice)["input_ids"]])
            logits = model(ids).logits[0].double().log_softmax(-1)
            scores.append(float(sum(logits[i - 1, ids[0, i]] for i in range(start, ids.shape[1]))))
        normed = [s / len(c) for s, c in zip(scores, item["choices"], strict=True)]  # type: ignore[call-overload]
        for name, values in (("acc", scores), ("acc_norm", normed)):
            right[name].append(max(range(3), key=values.__getitem__) == item["answer"])
    return right


@pytest.mark.parametrize("batch", [1, 4])
def test_accuracy_is_that_of_log_likelihoods(llama: Path, folder: Path, batch: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    right = by_hand(model, tokenizer)
    found = zero_shot(model, tokenizer, load_tasks(["mine_plain", "mine"], [folder]), batch=batch)
    assert list(found) == ["mine_plain", "mine"]
    for name, metric in (("mine_plain", "acc"), ("mine", "acc_norm")):
        value = sum(right[metric]) / 5
        stderr = (value * (1 - value) / 4) ** 0.5  # of a mean of zeros and ones, with n - 1
        assert found[name].metric == metric
        assert (found[name].value, found[name].stderr) == pytest.approx((value, stderr))
    few = zero_shot(model, tokenizer, load_tasks(["mine_plain"], [folder]), limit=2)
    assert few["mine_plain"].value == sum(right["acc"][:2]) / 2


def test_prompts_begin_with_bos_once(llama: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        AutoTokenizer.from_pretrained(llama),
    )
    seen: list[torch.Tensor] = []
    forward = model.forward

    def watched(ids: torch.Tensor, **rest: Any) -> Any:
        seen.append(ids)
        return forward(ids, **rest)

    monkeypatch.setattr(model, "forward", watched)

    def prompts(**options: Any) -> tuple[set[bool], int]:
        seen.clear()
        zero_shot(model, tokenizer, load_tasks(["mine_plain"], [folder]), batch=1, **options)
        return {int(ids[0, 0]) == 0 for ids in seen}, max(int((ids == 0).sum()) for ids in seen)

    tokenizer.add_bos_token = False
    assert prompts() == ({False}, 0)
    assert prompts(bos=True) == ({True}, 1)
    assert tokenizer("import")["input_ids"][0] != 0, "the tokenizer of the run stays as it is"
    tokenizer.add_bos_token = True
    assert prompts(bos=True) == ({True}, 1)


def test_a_group_without_a_score_of_its_own_has_those_of_its_tasks(llama: Path, folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    assert set(zero_shot(model, tokenizer, load_tasks(["ours"], [folder]))) == {"mine", "mine_plain"}


def test_names_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert set(task_names(folder)) == {"mine", "mine_plain", "lost"}
    with pytest.raises(InputError, match="holds no task: an lm-eval task is a YAML file"):
        task_names(tmp_path)
    with pytest.raises(InputError, match="there is no folder of tasks"):
        task_names(tmp_path / "absent")


def test_missing_data_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"the data of task lost could not be had \(.*absent"):
        load_tasks(["mine", "lost"], [folder])


def test_unknown_tasks_are_named_with_the_closest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = zeroshot._index
    monkeypatch.setattr(zeroshot, "_index", lambda folders, defaults: index(folders, defaults=False))  # seconds
    with pytest.raises(InputError, match=r"there is no task 'mine_plan' \(perhaps mine_plain or mine\)"):
        load_tasks(["mine", "mine_plan"], [folder])


def test_two_names_for_one_task(folder: Path) -> None:
    with pytest.raises(InputError, match="hold the same task"):
        load_tasks(["mine", "ours"], [folder])


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"zero-shot tasks need lm-eval, .*pip install 'lm-eval\[hf\]'"):
        load_tasks(["mine"], [folder])


def test_the_score_of_lm_evals_results() -> None:
    entry = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75, "acc_norm_stderr,none": 0.2}
    assert zeroshot._score(entry) == Score("acc_norm", 0.75, 0.2)
    assert zeroshot._score({"perplexity,none": 5.0, "perplexity_stderr,none": "N/A"}) == Score("perplexity", 5.0, None)
    strict = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.01, "exact_match,flexible": 0.5}
    assert zeroshot._score(strict) == Score("exact_match", 0.25, 0.01)
    assert zeroshot._score({"alias": "group"}) is None


def test_average() -> None:
    scores = [Score("acc", 0.5, 0.375), Score("acc_norm", 0.75, 0.5)]
    assert average(scores) == Score("average", 0.625, 0.3125)
    assert average(scores[:1]) is None and average([*scores, Score("perplexity", 9.0, None)]) is None
    assert average([*scores, Score("acc", 0.25, None)]) == Score("average", 0.5, None)


def test_the_eight_tasks_of_the_paper() -> None:
    assert len(PAPER_TASKS) == 8 and list(PAPER_TASKS) == sorted(PAPER_TASKS)


def test_a_task_with_a_token_that_the_model_has_not(llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    write_task(tmp_path, "sound")
    write_task(tmp_path, "chat", doc_to_text="{{context}}<|im_end|>")
    assert zero_shot(model, tokenizer, load_tasks(["sound"], [tmp_path]))["sound"].value >= 0
    with pytest.raises(
        RunError, match=r"has the token 2048 \('<\|im_end\|>'\), and the model's vocabulary ends at 2047"
    ):
        zero_shot(model, tokenizer, load_tasks(["chat"], [tmp_path]))
    assert not model.get_input_embeddings()._forward_pre_hooks
