"""Tensors in memory and in files: where they lie is seen by nobody but the disk."""

import errno
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

import rotoboa
from rotoboa.errors import RunError
from rotoboa.pipeline import stages
from rotoboa.pipeline.estimate.footprint import activation_bytes
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.recipe.recipe_files import build_recipe
from rotoboa.pipeline.storage import buffers as module
from rotoboa.pipeline.storage.buffers import Buffers, free_memory, trim


def test_files_begin_where_the_budget_ends(tmp_path: Path) -> None:
    buffers = Buffers(tmp_path, 1000)
    small = buffers.empty(10, 20)
    assert (buffers.held, buffers.spilled) == (800, 0)
    large = buffers.empty(10, 20, dtype=torch.float64)
    assert (buffers.held, buffers.spilled, buffers.peak) == (800, 1600, 1600)
    del small
    gc.collect()
    assert buffers.held == 0
    again = buffers.empty(5, 5)
    assert (buffers.held, buffers.spilled) == (100, 1600) and again.shape == (5, 5)
    part = large[3:]
    del large
    gc.collect()
    assert buffers.spilled == 1600  # a part of it is in use
    del part
    gc.collect()
    assert (buffers.spilled, buffers.peak) == (0, 1600)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_content_outlives_release(tmp_path: Path, dtype: torch.dtype) -> None:
    buffers = Buffers(tmp_path, 0)
    tensor = buffers.empty(50, 300, dtype=dtype)
    expected = torch.randn(50, 300).to(dtype)
    for part, source in zip(tensor.split(8), expected.split(8), strict=True):
        part.copy_(source)
        part += 1
        buffers.release()
    assert torch.equal(tensor, expected + 1)


def test_files_have_no_name_and_leave_nothing(tmp_path: Path) -> None:
    buffers = Buffers(tmp_path / "deep", 0)
    tensor = buffers.empty(1000)
    assert list((tmp_path / "deep").iterdir()) == [] and tensor.numel() == 1000


def test_memory_of_a_pass_is_bounded(tmp_path: Path) -> None:
    """128 MiB are written and read in a process whose resident memory grows by a fraction of them."""
    code = (
        "import resource, sys, torch\n"
        "sys.argv[0] = 'rotoboa'\n"  # as the command line, which imports no more than it needs
        "from pathlib import Path\n"
        "from rotoboa.pipeline.storage.buffers import Buffers\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "buffers = Buffers(Path(sys.argv[1]), 0)\n"
        "before = peak()\n"
        "tensor = buffers.empty(128, 2**18)\n"
        "for part in tensor.split(4):\n"
        "    part.fill_(2)\n"
        "    buffers.release()\n"
        "total = 0.0\n"
        "for part in tensor.split(4):\n"
        "    total += float(part.sum())\n"
        "    buffers.release()\n"
        "print(peak() - before, total)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, total = done.stdout.split()
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 2**25 and float(total) == 2**26


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_reserve", full)
    with pytest.raises(
        RunError, match=r"4 MiB of activations do not fit on the disk of .* \(No space left on device\)"
    ):
        Buffers(tmp_path, 0).empty(2**20)


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory() <= page
    assert Buffers(tmp_path).budget == pytest.approx(free_memory() / 2, rel=0.5)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    assert free_memory() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 2000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_trim_gives_back_what_lies_in_the_middle_of_the_heap() -> None:
    process = psutil.Process()
    parts = [bytearray(2**16) for _ in range(1024)]
    last = bytearray(2**16)  # above them, so that the heap cannot get shorter
    held = process.memory_info().rss
    parts.clear()
    trim()
    assert held - process.memory_info().rss > 50 * 2**20
    assert len(last) == 2**16


@pytest.mark.parametrize(("text", "size"), [("12GiB", 12 * 2**30), ("500 MB", 5 * 10**8), (4096, 4096), ("none", None)])
def test_memory_in_a_recipe(text: object, size: int | None) -> None:
    recipe = build_recipe({}, {"memory": text})
    assert recipe.memory == size
    assert build_recipe(recipe.model_dump(mode="json")) == recipe


def test_a_run_in_files_ends_with_the_same_bytes(
    llama: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    reports = {}
    for name, memory in (("held", None), ("spilled", "1KiB")):
        changes = {"model": str(llama), "output": tmp_path / name, "memory": memory, "weights.head": 0.5}
        changes |= {"rotation.r1": "merged", "rotation.scale": False}
        reports[name] = rotoboa.quantize(make_recipe("w4a4kv4", changes))
    assert reports["held"]["perplexity"] == reports["spilled"]["perplexity"]
    outer = 2 * 2048 * 64 * 2  # embedding and head, in bfloat16, which always lie in files
    spilled = {name: report["peak_memory_bytes"]["spilled"] for name, report in reports.items()}
    assert spilled["held"] == outer
    assert spilled["spilled"] == outer + 4 * 64 * 4 * (2 * 64 + max(2 * 64, 96))  # streams; attended and given, or down
    for file in (tmp_path / "held").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "spilled" / file.relative_to(tmp_path / "held")).read_bytes()
    assert {file.name for file in (tmp_path / "spilled").iterdir()} == {
        *("blocks", "model", "manifest.json", "recipe.yaml", "report.json")
    }


def test_experts_in_files_end_with_the_same_bytes(
    save_family: Callable[..., Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    model = save_family(tmp_path / "model", "mixtral", torch.bfloat16)
    reports = {}
    for name, memory in (("held", None), ("spilled", "1KiB")):
        changes = {"model": str(model), "output": tmp_path / name, "memory": memory}
        reports[name] = rotoboa.quantize(make_recipe("w4a4kv4", changes))
    job = prepare(build_recipe({}, {"model": str(model)}))
    shape, tokens = job.decoder.shape, 4 * 64
    expected = sum(activation_bytes(shape, tokens, "boa").values())
    assert expected == 4 * tokens * (2 * shape.hidden + max(2 * shape.query_width, 2 * shape.hidden))
    spilled = {name: report["peak_memory_bytes"]["spilled"] for name, report in reports.items()}
    assert spilled["spilled"] - spilled["held"] == expected
    for file in (tmp_path / "held").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "spilled" / file.relative_to(tmp_path / "held")).read_bytes()


def test_unfinished_runs_go_on_with_other_memory(
    llama: Path, make_recipe: Callable[..., Recipe], interrupted: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = make_recipe("w4a16", {"model": str(llama), "output": tmp_path / "run"})
    interrupted(recipe, stages, "write_native")
    rotoboa.quantize(recipe.model_copy(update={"memory": 0}))
    assert json.loads((tmp_path / "run" / "report.json").read_text())["parts"] == 2
