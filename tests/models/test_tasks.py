"""The items made for the embedded model: enough of them, the same each time, fair, and true to the modules."""

import ast
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.models.tiny import corpus
from rotoboa.models.tiny.tasks import items
from rotoboa.models.tiny.tasks.items import Item

MAKERS = {"next_line": items.next_line, "recall": items.recall, "agreement": items.agreement}
Maker = Callable[[], list[Item]]
kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


@kinds
def test_at_least_400_the_same_each_time_and_no_position_is_right_more_often(make: Maker) -> None:
    made = make()
    assert len(made) >= 400 and made == make()
    counts = Counter(item.answer for item in made)
    choices = len(made[0].choices)
    assert sorted(counts) == list(range(choices))
    assert all(abs(count - len(made) / choices) < 4 * (len(made) / choices) ** 0.5 for count in counts.values())


@kinds
def test_the_right_choice_is_what_a_held_out_module_has_and_the_others_are_not(make: Maker) -> None:
    text = "\0".join(corpus.evaluation_texts())
    for item in make():
        assert len(set(item.choices)) == len(item.choices)
        whole = [item.context + choice in text for choice in item.choices]
        assert whole[item.answer] and sum(whole) == 1


@kinds
def test_choices_begin_where_a_token_begins(make: Maker, tokenizer: Any) -> None:
    for item in make():
        context = item.context.rstrip()  # lm-eval moves the space to the choice
        before = tokenizer(context)["input_ids"]
        for choice in item.choices:
            whole = tokenizer(item.context + choice)["input_ids"]
            assert len(whole) > len(before)
            assert tokenizer.decode(whole[: len(before)]) in (context, context[: len(context)])
            assert len(whole) < 512


def test_next_line_gives_nothing_away_by_its_indentation() -> None:
    for item in items.next_line():
        assert len(item.choices) == 4
        assert len({re.match(r"\n *", choice).group() for choice in item.choices}) == 1  # type: ignore[union-attr]


def test_recall_is_of_a_name_far_back_and_of_none_that_the_context_has() -> None:
    for item in items.recall():
        word, other = item.choices[item.answer], item.choices[1 - item.answer]
        last = max(match.start() for match in re.finditer(rf"\b{word}\b", item.context))
        assert len(item.context) - last >= items.RECALL_DISTANCE
        assert not re.search(rf"\b{other}\b", item.context)


def test_agreement_is_balanced() -> None:
    right = Counter(item.choices[item.answer][0] for item in items.agreement())
    assert right == {")": 100, "]": 100, "\n": 200}
    lines = [item for item in items.agreement() if item.choices[0][0] == "\n"]
    deeper = sum(len(i.choices[i.answer]) > len(i.choices[1 - i.answer]) for i in lines)
    assert deeper == 100


def test_a_module_that_cannot_be_tokenized_is_left_out() -> None:
    assert not list(items._parse("def f(:\n  '''"))
    (module,) = items._parse('"""Text."""\nx = f(a[1],\n      2)\n')
    assert module.statements == {1} and module.names == ["Text"]
    assert [module.text[start : end + 1] for start, end in module.brackets] == ["[1]", "f(a[1],\n      2)"[1:]]
    assert ast.parse(module.text)
