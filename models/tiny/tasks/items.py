"""Multiple-choice items made from the modules that the embedded model never saw.

Every task is a function that lm-eval calls for its data (`custom_dataset` in the YAML file beside it); nothing is
stored or downloaded. An item is a context, the choices to go on with, and which of them the module has. The same
Python gives the same items: places are drawn by a seed.
"""

from __future__ import annotations

import io
import random
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from keyword import kwlist, softkwlist
from typing import Any, NamedTuple

from .. import corpus

ITEMS = 400
SEED = 0

NEXT_LINE_CONTEXT = 6  # lines
RECALL_CONTEXT = 600  # characters, of which the embedded model's tokenizer puts some three in a token
RECALL_DISTANCE = 300
AGREEMENT_CONTEXT = 240
BRACKET_DISTANCE = 12
COMMON = frozenset({*kwlist, *softkwlist, "self"})
WORD = re.compile(r"\b[A-Za-z]\w{3,}")


class Item(NamedTuple):
    """A context, the choices to go on with, and the index of the right one."""

    context: str
    choices: list[str]
    answer: int


class Module(NamedTuple):
    """A module's source, its lines, the offset of each, the numbers of those that begin a statement, and its names."""

    text: str
    lines: list[str]
    offsets: list[int]
    statements: frozenset[int]
    brackets: list[tuple[int, int]]  # offsets of the opening and of the closing one
    names: list[str]


@cache
def modules() -> tuple[Module, ...]:
    """The held-out modules; one that this Python cannot tokenize is left out."""
    return tuple(module for text in corpus.evaluation_texts() for module in _parse(text))


def _parse(text: str) -> Iterator[Module]:
    lines = text.split("\n")
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line) + 1)
    statements, brackets, opened, fresh = set(), [], [], True
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            row, column = token.start[0] - 1, token.start[1]
            if token.type == tokenize.NEWLINE:
                fresh = True
            elif token.type in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
                continue
            elif fresh:
                fresh = False
                if token.type in (tokenize.NAME, tokenize.OP):  # no docstring
                    statements.add(row)
            if token.type == tokenize.OP and token.string in "([{":
                opened.append(offsets[row] + column)
            elif token.type == tokenize.OP and token.string in ")]}" and opened:
                brackets.append((opened.pop(), offsets[row] + column))
    except (tokenize.TokenError, SyntaxError):
        return
    yield Module(text, lines, offsets, frozenset(statements), brackets, sorted(set(WORD.findall(text)) - COMMON))


def next_line() -> list[Item]:
    """Which of four statements follows: the module's own, or one of three from other modules.

    All have the same indentation and about the same length; the right one alone has a name in common with the lines
    before it.
    """
    rng = random.Random(SEED)
    places = [(module, row) for module in modules() for row in sorted(module.statements)]
    rng.shuffle(places)
    alike: dict[tuple[int, int], list[tuple[Module, str]]] = {}
    for module, row in places:
        line = module.lines[row]
        alike.setdefault((_indentation(line), len(line.strip()) // 8), []).append((module, line))

    def items() -> Iterator[Item]:
        for module, row in places:
            line = module.lines[row]
            context = module.lines[max(0, row - NEXT_LINE_CONTEXT) : row]
            before = set(WORD.findall("\n".join(context))) - COMMON
            if row < NEXT_LINE_CONTEXT or len(line.strip()) < 12 or not before & set(WORD.findall(line)):
                continue
            others = alike[_indentation(line), len(line.strip()) // 8]
            drawn = rng.sample(others, min(20, len(others)))
            wrong = {other for source, other in drawn if source is not module and not before & set(WORD.findall(other))}
            if len(wrong) >= 3:
                yield _item(rng, "\n".join(context), f"\n{line}", [f"\n{w}" for w in rng.sample(sorted(wrong), 3)])

    return _first(items(), ITEMS)


def recall() -> list[Item]:
    """Which of two names goes on: one last seen long before, or another of the module that the context has not."""
    rng = random.Random(SEED)
    places = []
    for module in modules():
        seen: dict[str, int] = {}
        for match in WORD.finditer(module.text):
            word, start = match.group(), match.start()
            if word not in COMMON and RECALL_DISTANCE <= start - seen.get(word, start) <= RECALL_CONTEXT - len(word):
                places.append((module, start, word))
            seen[word] = start
    rng.shuffle(places)

    def items() -> Iterator[Item]:
        for module, start, word in places:
            context = module.text[max(0, start - RECALL_CONTEXT) : start]
            line = context.rpartition("\n")[2]
            if not line.strip() or any(mark in line for mark in "#\"'"):
                continue  # a name after nothing but indentation, in a comment or in a string is anybody's guess
            near = set(WORD.findall(context))
            others = {
                other
                for other in module.names
                if other not in near
                and abs(len(other) - len(word)) <= 2
                and other[0].isupper() == word[0].isupper()
                and not other.startswith(word)
                and not word.startswith(other)
            }
            if others:
                yield _item(rng, context, word, [rng.choice(sorted(others))])

    return _first(items(), ITEMS)


def agreement() -> list[Item]:
    """Which of two brackets closes what was opened, and whether the next line stays in the block or leaves it.

    A quarter each: round and square brackets, staying and leaving; so that no choice is right more often.
    """
    rng = random.Random(SEED)
    closing: dict[str, list[tuple[Module, int, int]]] = {")": [], "]": []}
    moves: dict[bool, list[tuple[Module, int]]] = {True: [], False: []}
    for module in modules():
        for start, end in module.brackets:
            if module.text[end] in closing and end - start >= BRACKET_DISTANCE:
                closing[module.text[end]].append((module, start, end))
        for row in sorted(module.statements):
            step = _indentation(module.lines[row]) - _indentation(module.lines[row - 1]) if row else -1
            # The line before must be a whole statement, or its indentation says nothing.
            if row - 1 in module.statements and step in (0, -4) and _indentation(module.lines[row]) >= 4:
                moves[step == -4].append((module, row))

    def brackets(right: str, wrong: str) -> Iterator[Item]:
        for module, start, end in closing[right]:
            first = module.text.rfind("\n", 0, max(0, end - AGREEMENT_CONTEXT)) + 1
            # After a letter or digit a bracket begins a token, so that context and choice are tokens of their own.
            if first <= start and module.text[end - 1].isalnum():
                rest = module.text[end + 1 : end + 13].partition("\n")[0]
                yield _item(rng, module.text[first:end], right + rest, [wrong + rest])

    def indentation(leaving: bool) -> Iterator[Item]:
        for module, row in moves[leaving]:
            end = module.offsets[row] - 1
            line, first = module.lines[row], module.text.rfind("\n", 0, max(0, end - AGREEMENT_CONTEXT)) + 1
            inside, outside = (" " * (_indentation(line) + step) for step in ((4, 0) if leaving else (0, -4)))
            start = line.strip()[:16]
            right, wrong = (outside, inside) if leaving else (inside, outside)
            yield _item(rng, module.text[first:end], f"\n{right}{start}", [f"\n{wrong}{start}"])

    for ends in closing.values():
        rng.shuffle(ends)
    for rows in moves.values():
        rng.shuffle(rows)
    kinds = (brackets(")", "]"), brackets("]", ")"), indentation(True), indentation(False))
    return [item for kind in kinds for item in _first(kind, ITEMS // 4)]


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _item(rng: random.Random, context: str, right: str, wrong: Iterable[str]) -> Item:
    choices = list(wrong)
    answer = rng.randrange(len(choices) + 1)
    return Item(context, [*choices[:answer], right, *choices[answer:]], answer)


def _first(items: Iterator[Item], count: int) -> list[Item]:
    return [item for item, _ in zip(items, range(count), strict=False)]


def _dataset(items: list[Item]) -> dict[str, Any]:
    from datasets import Dataset  # takes seconds

    random.Random(SEED).shuffle(items)  # so that the first few are of all kinds
    return {"test": Dataset.from_list([item._asdict() for item in items])}


def next_line_data(**options: Any) -> dict[str, Any]:
    """`next_line` as lm-eval takes it."""
    return _dataset(next_line())


def recall_data(**options: Any) -> dict[str, Any]:
    """`recall` as lm-eval takes it."""
    return _dataset(recall())


def agreement_data(**options: Any) -> dict[str, Any]:
    """`agreement` as lm-eval takes it."""
    return _dataset(agreement())
