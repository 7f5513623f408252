"""Reading ahead and writing behind: in order, once on the disk, and no error lost."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rotoboa
from rotoboa.errors import RunError
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.storage import buffers, prefetch
from rotoboa.pipeline.storage.buffers import Buffers
from rotoboa.pipeline.storage.manifest import BlockEntry, Identity
from rotoboa.pipeline.storage.prefetch import Prefetcher, for_rotation
from rotoboa.pipeline.storage.run_writer import RunWriter

CPU = torch.device("cpu")


class Source(Checkpoint):
    """Blocks that are counted as they are read."""

    def __init__(self, broken: int | None = None) -> None:
        self.read: list[tuple[int, str]] = []
        self.broken = broken

    def block(self, index: int) -> dict[str, Tensor]:
        self.read.append((index, threading.current_thread().name))
        if index == self.broken:
            raise RunError(f"block {index} is damaged")
        return {"weight": torch.full((4, 4), float(index))}


def blocks_of(folder: RunWriter) -> list[int]:
    manifest = json.loads((folder.path / "manifest.json").read_text())
    return [entry["index"] for entry in manifest["blocks"]]


def tensors(value: float) -> dict[str, Tensor]:
    return {"q": torch.full((3,), value)}


# -- reading ----------------------------------------------------------------------------------------------------------


def test_the_next_block_is_read_in_a_thread(tmp_path: Path) -> None:
    source = Source()
    with Prefetcher(source, RunWriter(tmp_path / "run", Identity()), 3, CPU) as beside:
        found = [float(beside.block(index)["weight"][0, 0]) for index in range(3)]
    assert found == [0, 1, 2]
    assert [index for index, _ in source.read] == [0, 1, 2]
    assert [name.startswith("rotoboa-read") for _, name in source.read] == [False, True, True]


def test_nothing_is_read_ahead_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "free_memory", lambda: prefetch.READ_SHARE * 64)  # exactly the size of a block
    source = Source()
    with Prefetcher(source, RunWriter(tmp_path / "run", Identity()), 3, CPU) as beside:
        beside.block(0)
        beside.block(1)
    assert [index for index, _ in source.read] == [0, 1]


def test_another_block_than_the_next_one(tmp_path: Path) -> None:
    with Prefetcher(Source(), RunWriter(tmp_path / "run", Identity()), 9, CPU) as beside:
        beside.block(0)
        assert float(beside.block(5)["weight"][0, 0]) == 5


def test_what_fails_while_reading_ahead_is_raised_where_it_is_needed(tmp_path: Path) -> None:
    with Prefetcher(Source(broken=1), RunWriter(tmp_path / "run", Identity()), 3, CPU) as beside:
        beside.block(0)
        with pytest.raises(RunError, match="block 1 is damaged"):
            beside.block(1)


def test_rotated_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"weight": torch.ones(4, 4)}
    assert for_rotation(block, CPU) is block
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(prefetch, "room_on", lambda device: prefetch.ROTATION_SHARE * 8 * 16 - 1)
    assert for_rotation(block, cuda) is block
    monkeypatch.setattr(prefetch, "room_on", lambda device: prefetch.ROTATION_SHARE * 8 * 16)
    moved: list[Any] = []
    monkeypatch.setattr(Tensor, "to", lambda tensor, device: moved.append(device))
    for_rotation(block, cuda)
    assert moved == [cuda]


# -- writing ----------------------------------------------------------------------------------------------------------


def test_blocks_are_written_behind_and_in_order(tmp_path: Path) -> None:
    folder = RunWriter(tmp_path / "run", Identity())
    folder.start("recipe")
    go, began = threading.Event(), threading.Event()

    def slow() -> dict[str, Tensor]:
        began.set()
        assert go.wait(30)
        return tensors(0)

    with Prefetcher(Source(), folder, 3, CPU) as beside:
        beside.write(0, slow, BlockEntry(index=0), peak_memory_bytes={"host": 7})
        assert began.wait(30)
        assert blocks_of(folder) == [] and not folder.block_path(0).exists()  # the caller goes on meanwhile
        second = threading.Thread(target=beside.write, args=(1, lambda: tensors(1), BlockEntry(index=1)))
        second.start()
        assert blocks_of(folder) == []  # it waits for the first
        go.set()
        second.join()
        assert blocks_of(folder)[:1] == [0]
        beside.finish()
        assert blocks_of(folder) == [0, 1]
        beside.write(2, lambda: tensors(2), BlockEntry(index=2))
    assert blocks_of(folder) == [0, 1, 2] and folder.finished_blocks() == 3
    assert float(load_file(folder.block_path(2))["q"][0]) == 2
    assert json.loads((folder.path / "manifest.json").read_text())["peak_memory_bytes"] == {"host": 7}
    folder.close()


@pytest.mark.parametrize("where", ["next write", "finish", "end"])
def test_what_fails_while_writing_is_raised(tmp_path: Path, where: str) -> None:
    folder = RunWriter(tmp_path / "run", Identity())
    folder.start("recipe")

    def full() -> dict[str, Tensor]:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"), Prefetcher(Source(), folder, 3, CPU) as beside:
        beside.write(0, full, BlockEntry(index=0))
        if where == "next write":
            beside.write(1, lambda: tensors(1), BlockEntry(index=1))
        elif where == "finish":
            beside.finish()
    assert blocks_of(folder) == []
    folder.close()


def test_a_finished_block_is_kept_whatever_comes_after(tmp_path: Path) -> None:
    folder = RunWriter(tmp_path / "run", Identity())
    folder.start("recipe")
    with pytest.raises(KeyboardInterrupt), Prefetcher(Source(), folder, 3, CPU) as beside:
        beside.write(0, lambda: tensors(0), BlockEntry(index=0))
        raise KeyboardInterrupt
    assert blocks_of(folder) == [0]
    with pytest.raises(ValueError, match="of its own") as caught, Prefetcher(Source(), folder, 3, CPU) as beside:
        beside.write(1, lambda: tensors(1) | {"q": torch.empty(2, device="meta")}, BlockEntry(index=1))
        raise ValueError("of its own")
    assert "The block before could not be written" in caught.value.__notes__[0]
    assert blocks_of(folder) == [0]
    folder.close()


def test_a_run_that_cannot_write_says_so_and_goes_on_later(
    llama: Path, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(name: str) -> Recipe:
        changes = {"model": str(llama), "output": tmp_path / name, "weights.method": "rtn"}
        return make_recipe("w4a16", changes | {"evaluation.baseline": False})

    rotoboa.quantize(recipe("whole"))
    write = RunWriter.write_block

    def full(self: RunWriter, index: int, *arguments: Any) -> None:
        if index == 1:
            raise OSError("No space left on device")
        write(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write_block", full)
        with pytest.raises(RunError, match="No space left on device; the same command goes on"):
            rotoboa.quantize(recipe("run"))
    rotoboa.quantize(recipe("run"))
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "run" / file.relative_to(tmp_path / "whole")).read_bytes()


# -- memory of a GPU --------------------------------------------------------------------------------------------------


def test_activations_stay_on_the_gpu_while_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    empty = torch.empty

    def record(size: Any, **options: Any) -> Tensor:
        made.append(options)
        return empty(size, dtype=options["dtype"])

    cuda = torch.device("cuda:0")
    held = Buffers(tmp_path, 10_000, cuda)
    monkeypatch.setattr(torch, "empty", record)
    monkeypatch.setattr(buffers, "room_on", lambda device: 1000)
    inside = held.empty(10, 25)
    assert made.pop()["device"] == cuda and held.held == 0
    outside = held.empty(10, 26)
    assert made.pop()["pin_memory"] and held.held == 2048  # pinned memory comes in powers of two
    in_a_file = held.empty(100, 50)
    assert made == [] and held.spilled == 20_000
    assert [tuple(tensor.shape) for tensor in (inside, outside, in_a_file)] == [(10, 25), (10, 26), (100, 50)]


def test_room_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert buffers.room_on(cuda) == 30 + 30 - 40
