"""What README.md and docs/ tell people to type exists, links lead somewhere, figures are those that were measured."""

from __future__ import annotations

import doctest
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rotoboa.export.ggml.gguf_blocks import TYPES
from rotoboa.export.ggml.gguf_types import file_name
from rotoboa.pipeline.cli.app import app
from rotoboa.pipeline.cli.options import RECIPE_OPTIONS, overrides
from rotoboa.pipeline.recipe.fields import field_paths
from rotoboa.pipeline.recipe.recipe_files import DEFAULT_RECIPE, build_recipe, load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
GROUP: Any = typer.main.get_command(app)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+\.\d+")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def shell_lines(text: str) -> Iterator[str]:
    """Lines of sh blocks without comments; continued ones are one line."""
    for body in blocks(text, "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            if line := re.sub(r"(^|\s)#.*", "", line).strip():
                yield line


def inline(text: str) -> list[str]:
    """What stands between backticks outside of blocks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands(text: str) -> list[list[str]]:
    """The words behind `rotoboa` of every call; a recipe with options in backticks is one too."""
    found = []
    for line in shell_lines(text):
        found += [shlex.split(call) for call in re.findall(r"(?:^|&&\s*|-m )rotoboa((?: [^\"&;|]*)?)", line)]
    for code in inline(text):
        words = shlex.split(code) if code.startswith(("rotoboa ", *recipe_names())) else []
        if words[:1] == ["rotoboa"]:
            found.append(words[1:])
        elif words and words[0] in recipe_names():
            found.append(["quantize", "--recipe", *words])
    return found


def parse(words: list[str]) -> None:
    """Parse a call as the program does, without running it; a recipe and its fields are checked too."""
    if words[0].startswith("-"):
        assert words[0] in {name for option in GROUP.params for name in option.opts} | {"--help"}
        return
    assert words[0] in GROUP.commands, f"there is no command {words[0]}"
    if len(words) == 1:
        return  # it is named, not called
    given = [word for word in words[1:] if word != "--help"]
    if given == words[1:]:
        found = GROUP.commands[words[0]].make_context(words[0], given).params
        fields = overrides({key: found.get(key) for key in (option.name for option in RECIPE_OPTIONS.values())})
        if "recipe" in found and not (found["recipe"] or "").isupper():
            build_recipe(load_recipe(found["recipe"] or DEFAULT_RECIPE), fields)


def check_make(words: list[str]) -> None:
    """Targets and variables exist, and so do the options in ARGS of what the target runs."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    for name in given:
        assert re.search(rf"^{name}\s*\?=", MAKEFILE, re.MULTILINE), f"make has no {name}"
    for target in targets:
        rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
        assert rule or target == "setup", f"there is no target {target}"
        options = shlex.split(given.get("ARGS", ""))
        if target in ("quantize", "evaluate"):
            parse([target, *(["RUN"] if target == "evaluate" else []), *options])
        elif target == "test":
            assert all((ROOT / option).exists() for option in options if option.startswith("tests/"))
        elif options and rule:
            (script,) = re.findall(r"benchmarks/\w+\.py", rule[1])
            for option in (option for option in options if option.startswith("--")):
                assert option.strip("-").replace("-", "_") in text_of(ROOT / script), f"{script} has no {option}"


def slugs(text: str) -> list[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    text = text_of(path)
    for words in commands(text):
        parse(words)
    for line in [*shell_lines(text), *inline(text)]:
        if line.startswith("make "):
            check_make(shlex.split(line)[1:])


def test_commands_are_found() -> None:
    found = commands(text_of(ROOT / "README.md"))
    assert len(found) > 12 and {words[0] for words in found} >= {"quantize", "export", "verify", "evaluate"}
    sh = 'ssh m "cd x && torchrun -m rotoboa quantize \\\n  --model a" & # rotoboa no\nrotoboa --help'
    sh = f"```sh\n{sh}\n```\nand `w2a16 --x 1`"
    assert commands(sh) == [["quantize", "--model", "a"], ["--help"], ["quantize", "--recipe", "w2a16", "--x", "1"]]


@pytest.mark.parametrize(
    "words",
    [
        ["quantise"],
        ["quantize", "--weights.bit", "4"],
        ["quantize", "--weights.bits", "9"],
        ["quantize", "--recipe", "w5a5"],
        ["export", "run", "--form", "gguf"],
    ],
)
def test_what_does_not_exist_is_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"no command|No such option|must be|There is no recipe"):
        parse(words)
    for line in (["quantise"], ["quantize", "MODELL=x"], ["speed", "ARGS=--thread 1 --nothing"]):
        with pytest.raises(AssertionError, match="no"):
            check_make(line)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_in_prose_exist(path: Path) -> None:
    options = [option for command in (GROUP, *GROUP.commands.values()) for option in command.params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    for code in inline(text_of(path)):
        if code.startswith("--"):
            assert {word for word in code.split() if word.startswith("--")} <= known, code


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in slugs(text_of(target)), f"{path.name}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_headings_are_told_apart(path: Path) -> None:
    assert path.name == "CHANGELOG.md" or max(Counter(slugs(text_of(path))).values()) == 1


def test_defaults_say_why() -> None:
    links = [link for field in field_paths() for link in re.findall(r"(docs/\w+\.md)#([\w-]+)", field.description)]
    assert len(links) >= 5
    for page, anchor in links:
        assert anchor in slugs(text_of(ROOT / page)), f"{page}#{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_can_be_read(path: Path) -> None:
    for code in blocks(text_of(path), "python"):
        compile(code, path.name, "exec")
    for code in blocks(text_of(path), "yaml"):
        build_recipe(yaml.safe_load(code))


def test_readme_is_short() -> None:
    text = text_of(ROOT / "README.md")
    assert len(text.splitlines()) <= 150
    assert f"exports/gguf/{file_name(TYPES[4, True])}" in text


def test_worked_example() -> None:
    """The lines in docs/methods.md give what they say, and the text beside them has the same figures."""
    text = text_of(ROOT / "docs" / "methods.md")
    example = doctest.DocTestParser().get_doctest(text, {}, "methods.md", "docs/methods.md", 0)
    assert len(example.examples) >= 8 and doctest.DocTestRunner().run(example).failed == 0
    prose = text[text.index("## A worked example") : text.index("The same by this program")]
    for figure in re.findall(r"^    (?:.*, )?(\d\.\d+)\)?$", text, re.MULTILINE):
        assert figure in prose


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    results = NUMBER.findall(text_of(ROOT / "docs" / "results.md"))
    text = text_of(ROOT / "README.md")
    rows = [line.rsplit("|", 3)[1:3] for line in text.splitlines() if re.match(r"\|.*\| (2|4|16), \d+, \d+ \|", line)]
    figures = [figure for row in rows for figure in NUMBER.findall(" ".join(row))]
    assert len(figures) > 15
    for figure in figures:
        digits = len(figure.partition(".")[2])
        assert any(f"{float(found) + 1e-9:.{digits}f}" == figure for found in results), figure


def test_results_of_the_real_model_are_those_of_its_page() -> None:
    page = set(NUMBER.findall(text_of(ROOT / "benchmarks" / "real-smollm2-135m.md")))
    text = text_of(ROOT / "docs" / "results.md")
    section = text[text.index("### SmolLM2-135M") : text.index("### Gemma")]
    old = ("that commit", "earlier commit")
    lines = (line for line in section.splitlines() if line.startswith("| ") and not any(words in line for words in old))
    rows = [figures for line in lines if (figures := NUMBER.findall(line))]
    assert len(rows) == 7 and all(len(figures) == 2 and set(figures) <= page for figures in rows)


def test_the_version_is_one() -> None:
    wanted = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["version"]
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert citation["version"] == wanted and citation["cff-version"] == "1.2.0" and citation["authors"]
    assert re.findall(r"^## (\S+)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)[0] == wanted
    cited = {part["url"].rpartition("/")[2] for part in citation["references"]}
    assert cited == {"2406.13474", "2404.00456"} and all(number in text_of(ROOT / "README.md") for number in cited)


def test_every_room_is_in_the_tree() -> None:
    (tree,) = blocks(text_of(ROOT / "docs" / "development.md"), "")
    shown, part = set(), ""
    for line in tree.splitlines():
        name = line.split()[0].rstrip("/")
        part = part if line.startswith(" ") else name
        shown.add(f"{part}.{name}" if line.startswith(" ") else name)
    packages = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["setuptools"]["packages"]
    rooms = {name.removeprefix("rotoboa.") for name in packages} - {"rotoboa", "models.tiny.tasks"}
    assert shown == rooms | {"benchmarks", "examples", "docs", "tests"}
