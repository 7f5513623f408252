"""The benchmark for GPUs, in small and on the CPU: every step works, and the page says what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_step(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--small", "--output"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["skipped"] == []
    assert set(figures["products"]) == {"float32", "tf32", "bfloat16", "float64"}
    assert all(found["equal to the last bit"] and found["seconds"] > 0 for found in figures["kernels"])
    assert set(figures["cases"]) == {"w2a16", "w2a16 without refinement", "w4a4kv4"}
    full, plain = figures["cases"]["w2a16"], figures["cases"]["w2a16 without refinement"]
    assert full["seconds of 32 blocks"] == 32 * full["seconds a block"] > 0
    assert "refinement" in full["stages"] and "refinement" not in plain["stages"]
    first = full["blocks"][0]
    assert set(first["solver by projection"]) == {
        *("q_proj, k_proj", "v_proj", "o_proj", "gate_proj, up_proj", "down_proj")
    }
    assert sum(first["stages"].values()) <= 1.05 * first["seconds"]
    assert set(figures["precision"]) == set(first["losses"])
    page = (tmp_path / "gpu.md").read_text()
    assert page == done.stdout[:-1] and figures["machine"]["name"] in page
    for row in (
        "| input statistics |",
        "| solving down_proj |",
        "| **32 blocks** |",
        "| descent, rows tied by H_out |",
    ):
        assert row in page


def test_what_a_time_limit_cuts_off_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--small", "--limit", "-1"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Not measured: products: " in done.stdout and "Not measured: precision: " in done.stdout
