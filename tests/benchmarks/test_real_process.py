"""The judge as make runs it: its cases are processes, its files stand beside it."""

import shutil
import subprocess
import sys
from pathlib import Path


def test_a_case_is_a_process_of_its_own(llama: Path, text: Path, tmp_path: Path) -> None:
    """As make runs it, from a copy of the folder, so that its files are not written beside the committed ones."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for file in (Path(__file__).parents[2] / "benchmarks").glob("*.py"):
        shutil.copy(file, folder)
    sizes = ["--samples", "2", "--windows", "2", "--length", "32"]
    command = [
        *(sys.executable, str(folder / "real.py"), "--model", str(llama), "--text", str(text)),
        *("--calibrate", str(text), "--quick", "--recipes", "w4a8", "--methods", "RTN", "--threads", "1", *sizes),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 of 1, 0 min left: w4a8 | RTN | rotation | 0: perplexity" in done.stdout
    assert {file.suffix for file in folder.glob("real-*")} == {".md", ".json", ".svg"}
