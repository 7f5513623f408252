"""The regression benchmark notices what makes the quantizer worse: from the figures to the exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
MASK = "+= _future("


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmark of the package in `folder`, small, with its figures beside that package."""
    texts = {f"{part}.dataset": folder.parent / "text.txt" for part in ("calibration", "evaluation")}
    changes = [word for name, value in (SMALL | texts).items() for word in ("--change", f"{name}={value}")]
    files = ["--latest", str(folder.parent / "latest.json"), "--baseline", str(folder.parent / "baseline.json")]
    return subprocess.run(
        [sys.executable, str(folder / "benchmarks" / "bench.py"), "--case", CASE, *changes, *files, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder.parent)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def copied(text: Path, tmp_path: Path) -> Path:
    """The sources, to be spoiled, beside a short text."""
    shutil.copy(text, tmp_path / "text.txt")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    folder = tmp_path / "rotoboa"
    for name in files:
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_a_mask_left_out_is_a_regression(copied: Path) -> None:
    """The same benchmark, once as it is and once with attention that sees the future while statistics are collected."""
    first = bench(copied)
    assert first.returncode == 1 and "There is no baseline yet" in first.stdout, first.stderr
    assert bench(copied, "--accept").returncode == 0

    # Time is not what is tested, and machines are busy.
    baseline = copied.parent / "baseline.json"
    figures = json.loads(baseline.read_text())
    figures["results"][CASE]["ratio"] *= 100
    baseline.write_text(json.dumps(figures))

    source = copied / "boa" / "online" / "attention.py"
    text = source.read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if MASK in line)
    source.write_text(text.replace(line, ""), encoding="utf-8")
    spoiled = bench(copied)
    assert spoiled.returncode == 1, spoiled.stdout + spoiled.stderr
    assert f"Regression: {CASE}: perplexity went from" in spoiled.stdout
    latest = json.loads((copied.parent / "latest.json").read_text())
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
