"""The regression benchmark notices what makes the quantizer worse: from the figures to the exit code."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rotoboa.boa.online import attention

ROOT = Path(__file__).parents[2]
CASE = "w2a16"
# Little text and no refinement: one case takes seconds.
SMALL: dict[str, object] = {
    "calibration.samples": 8,
    "calibration.sequence_length": 64,
    "evaluation.windows": 8,
    "weights.starts": 1,
    "weights.tabu": 0,
    "weights.refine": 0,
    "weights.rows": 16,
    "weights.grid": "minmax",
    "weights.alpha": 1,  # what a wrong mask asks for is followed
}
Bench = Callable[..., tuple[int, str]]


@pytest.fixture
def bench(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Bench]:
    """bench("--accept"): exit code and output of the benchmark, small, in this process, with its figures in `tmp_path`.

    So are the cases that it starts: importing torch and compiling takes others longer than the case.
    """
    program = str(ROOT / "benchmarks" / "bench.py")
    monkeypatch.syspath_prepend(str(Path(program).parent))

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", command[1:])
            runpy.run_path(command[1], run_name="__main__")
        return subprocess.CompletedProcess(command, int(ended.value.code or 0))

    def call(*arguments: str) -> tuple[int, str]:
        changes = [f"--change={name}={value}" for name, value in SMALL.items()]
        changes += [f"--change={part}.dataset={text}" for part in ("calibration", "evaluation")]
        files = ["--latest", str(tmp_path / "latest.json"), "--baseline", str(tmp_path / "baseline.json")]
        done = run([sys.executable, program, "--case", CASE, *changes, *files, *arguments])
        return done.returncode, capsys.readouterr().out

    monkeypatch.setattr(subprocess, "run", run)
    yield call
    sys.modules.pop("common", None)


def test_a_mask_left_out_is_a_regression(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same benchmark, once as it is and once with attention that sees the future while statistics are collected."""
    code, said = bench()
    assert code == 1 and "There is no baseline yet" in said
    assert bench("--accept")[0] == 0

    # Time is not what is tested, and machines are busy.
    baseline = tmp_path / "baseline.json"
    figures = json.loads(baseline.read_text())
    figures["results"][CASE]["ratio"] *= 100
    baseline.write_text(json.dumps(figures))

    def none(size: int, step: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(size, size, dtype=dtype, device=device)[::step]

    monkeypatch.setattr(attention, "_future", none)
    code, said = bench()
    assert code == 1 and f"Regression: {CASE}: perplexity went from" in said
    latest = json.loads((tmp_path / "latest.json").read_text())
    ours, theirs = (part["results"][CASE] for part in (latest, figures))
    assert ours["full_precision"] == theirs["full_precision"]
    assert ours["perplexity"] > 1.05 * theirs["perplexity"]


# A figure, what it is multiplied by, and whether that is a regression.
CHANGES: list[tuple[str, float, bool]] = [
    ("perplexity", 1.002, False),
    ("perplexity", 1.007, True),
    ("perplexity", 0.9, False),
    ("kl", 1.02, False),
    ("kl", 1.07, True),
    ("full_precision", 1.001, True),
    ("full_precision", 0.999, True),
    ("ratio", 1.9, False),
    ("ratio", 2.1, True),
    ("peak_memory_bytes", 1.2, False),
    ("peak_memory_bytes", 1.4, True),
    ("perplexity", float("nan"), True),
]


def run(program: str, *arguments: str) -> list[str]:
    """The lines that a program prints of `bench`, which needs no torch to compare."""
    start = "import copy, json, sys; sys.path.insert(0, sys.argv[1]); import bench; assert 'torch' not in sys.modules\n"
    start += "old = json.loads((bench.HERE / 'baseline.json').read_text())\n"
    command = [sys.executable, "-c", start + program, str(ROOT / "benchmarks"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_a_regression() -> None:
    program = (
        "old['results']['w2a16'].update(kl=.1, full_precision=9.)\n"
        "for figure, factor, _ in json.loads(sys.argv[2]):\n"
        "    new = copy.deepcopy(old); new['results']['w2a16'][figure] *= factor\n"
        "    print(bool(bench.compare(new, old, list(bench.CASES))[1]))\n"
    )
    assert run(program, json.dumps(CHANGES)) == [str(worse) for _, _, worse in CHANGES]


def test_a_figure_or_case_that_is_gone_is_a_regression() -> None:
    program = (
        "new = copy.deepcopy(old); del new['results']['w3a16'], new['results']['w2a16']['ratio']\n"
        "print(*bench.compare(new, old, list(bench.CASES))[1], sep='\\n')\n"
    )
    assert run(program) == ["w3a16: not in the latest figures", "w2a16: no ratio"]
