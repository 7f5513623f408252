"""Help: commands and targets by what they are for, none cut short, and examples that can be typed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rotoboa.pipeline.cli.app import PANELS, app

ROOT = Path(__file__).parents[3]
GROUP: Any = typer.main.get_command(app)


def test_every_command_is_in_its_panel() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    names = [command.__name__ for commands in PANELS.values() for command in commands]
    assert sorted(names) == sorted(GROUP.commands) and len(set(names)) == len(names)
    for panel, commands in PANELS.items():
        section = shown[shown.index(f"\n{panel}:\n") :].partition("\n\n")[0].splitlines()[2:]
        assert [line.split()[0] for line in section] == [command.__name__ for command in commands]
        assert all(line.endswith(".") and not line.endswith("...") and len(line) <= 80 for line in section)
    assert shown.index("quantize  ") < shown.index("evaluate  ") < shown.index("models  ")


def test_three_examples_that_parse() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    lines = shown[shown.index("Examples:") :].splitlines()[1:]
    assert len(lines) == 3 and all(len(line) <= 80 for line in lines)
    for line in lines:
        program, name, *words = shlex.split(re.split(r"\s{3,}", line.strip())[0])
        assert program == "rotoboa" and GROUP.commands[name].make_context(name, words)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_help_lists_every_target() -> None:
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    listed = re.findall(r"^  ([a-z-]+) +\S", done.stdout, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = makefile[makefile.index(".PHONY:") :].replace("\\\n", " ").splitlines()[0].split()[1:]
    assert sorted(listed) == sorted(set(phony) - {"help"}) and listed[:2] == ["quantize", "evaluate"]
    assert re.findall(r"^\w.*:$", done.stdout, re.MULTILINE)[0] == "Quantize:"
