"""The judge as make runs it: its cases are processes, its files stand beside it."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest


@pytest.mark.usefixtures("undrawn")
def test_a_case_is_a_process_of_its_own(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As make runs it, from a copy of the folder, so that its files are not written beside the committed ones.

    The program itself runs in this process, which has imported what takes it seconds.
    """
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for file in (Path(__file__).parents[2] / "benchmarks").glob("*.py"):
        shutil.copy(file, folder)
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    sizes = ["--samples", "2", "--windows", "2", "--length", "32"]
    command = [
        *(str(folder / "real.py"), "--model", str(llama), "--text", str(text), "--calibrate", str(text), "--quick"),
        *("--recipes", "w4a8", "--methods", "RTN", "--threads", "1", "--set", "weights.grid=minmax", *sizes),
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command[0], run_name="__main__")
    assert ended.value.code == 0
    assert "1 of 1, 0 min left: w4a8 | RTN | rotation | 0: perplexity" in capsys.readouterr().out
    assert {file.suffix for file in folder.glob("real-*")} == {".md", ".json", ".svg"}
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)
