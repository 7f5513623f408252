"""The benchmark for GPUs, in small and on the CPU: every step works, and the page says what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # type: ignore[import-not-found]  # noqa: E402
from gpu_bench import Bench  # type: ignore[import-not-found]  # noqa: E402

# The benchmark as a program; and what importing it has imported.
RUN = """
import runpy, sys, gpu
print("PACKAGES", *{"datasets", "compressed_tensors", "gguf", "lm_eval"} & set(sys.modules), file=sys.stderr)
sys.argv[0] = gpu.__file__
runpy.run_path(gpu.__file__, run_name="__main__")
"""


def test_every_step(tmp_path: Path) -> None:
    """With no package for data sets or exports: machines that are lent have torch, transformers and little else."""
    command = [sys.executable, "-c", RUN, "--device", "cpu", "--small", "--output"]
    paths = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "PACKAGES\n" in done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert (figures["skipped"], figures["failed"]) == ([], {})
    assert set(figures["products"]) == {"float32", "tf32", "bfloat16", "float64"}
    assert len(figures["kernels"]) == 5
    assert all(found["equal to the last bit"] and found["seconds"] > 0 for found in figures["kernels"].values())
    assert set(figures["cases"]) == {"w2a16", "w2a16 without refinement", "w4a4kv4"}
    full, plain = figures["cases"]["w2a16"], figures["cases"]["w2a16 without refinement"]
    assert full["seconds of 32 blocks"] == 32 * full["seconds a block"] > 0
    assert "refinement" in full["stages"] and "refinement" not in plain["stages"]
    first, last = full["blocks"]
    assert set(first["solver by projection"]) == {
        *("q_proj, k_proj", "v_proj", "o_proj", "gate_proj, up_proj", "down_proj")
    }
    assert sum(first["stages"].values()) <= 1.05 * first["seconds"]
    assert full["seconds a block"] == last["seconds"] + last["rotation"]
    assert set(figures["precision"]) == set(first["losses"])
    assert all(kernel["seconds"] >= 0 for found in figures["profile"].values() for kernel in found)
    assert len(figures["choices"]) == 4
    page = (tmp_path / "gpu.md").read_text()
    assert page == done.stdout[:-1] and figures["machine"]["name"] in page
    for row in (
        "| input statistics |",
        "| solving down_proj |",
        "| **32 blocks** |",
        "| descent, rows tied by H_out |",
        "time: solver",
    ):
        assert row in page


def test_what_a_time_limit_cuts_off_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main("cpu", True, tmp_path, -1.0, False)
    page = capsys.readouterr().out
    assert "Not measured: products: " in page and "Not measured: precision: " in page


def _fail(bench: Any) -> None:
    raise KeyError("deep inside")


def test_a_step_that_fails_leaves_its_traceback_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "steps", lambda: [("bad", _fail), ("plain", lambda bench: {"seconds a block": 7.5})])
    gpu.main("cpu", True, tmp_path, 100.0, False)
    page = capsys.readouterr().out
    assert "7.5 seconds a block" in page
    assert "Failed: bad." in page and "in _fail" in page and "KeyError: 'deep inside'" in page


def test_a_device_that_is_spoilt_costs_only_the_step_that_did_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps that are left run in a new process, without Triton, and what was measured before stays."""
    before = {"plain": lambda bench: {"seconds a block": 7.5}, "bad": _fail}
    monkeypatch.setattr(gpu, "steps", lambda: [*before.items(), ("products", lambda bench: {"float32": 2.5})])
    monkeypatch.setattr(Bench, "_recover", lambda bench: "bad" not in bench.figures["failed"])
    monkeypatch.setattr(os, "closerange", lambda first, last: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small"])
    monkeypatch.setenv("ROTOBOA_TRITON", "1")
    started: list[list[str]] = []

    def replace(program: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execv", replace)
    with pytest.raises(SystemExit):
        gpu.main("cpu", True, tmp_path, 100.0, False)
    assert started == [[sys.executable, "gpu.py", "--small", "--go-on"]] and os.environ["ROTOBOA_TRITON"] == "0"
    monkeypatch.setattr(Bench, "_recover", lambda bench: True)
    before["plain"] = _fail  # which is not asked again
    capsys.readouterr()
    gpu.main("cpu", True, tmp_path, 100.0, True)
    page = capsys.readouterr().out
    assert "7.5 seconds a block" in page and "| float32 | 2.5 |" in page and page.count("Failed: ") == 1


def test_steps_on_cuda_take_triton_even_where_the_quantizer_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what differs can be seen; but not once it was ruled out."""
    steps = sys.modules["gpu_steps"]
    pytest.importorskip("triton")
    monkeypatch.delenv("ROTOBOA_TRITON", raising=False)
    assert steps._triton().MOST_TIED_ROWS > 0
    monkeypatch.setenv("ROTOBOA_TRITON", "0")
    assert steps._triton() is None
