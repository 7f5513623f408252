"""The run folder: nothing is ever half written, and nobody else's folder is touched."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rotoboa.errors import InputError
from rotoboa.pipeline.recipe.recipe import Recipe
from rotoboa.pipeline.storage.atomic import write_json, write_tensors
from rotoboa.pipeline.storage.files import read_manifest
from rotoboa.pipeline.storage.manifest import BlockEntry, Identity, Manifest
from rotoboa.pipeline.storage.run_folder import RunFolder, checksum, device_of, recipe_of
from rotoboa.pipeline.storage.run_writer import FollowedRun, RunWriter

IDENTITY = Identity(
    recipe=Recipe().model_dump(mode="json", exclude={"output"}),
    checkpoint={"model.safetensors": "100"},
    versions={"torch": "2.13"},
)
BLOCK = {"a": torch.arange(6).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


def started(path: Path, blocks: int = 0, identity: Identity = IDENTITY) -> RunWriter:
    folder = RunWriter(path, identity)
    folder.start("model: tiny\n")
    for index in range(blocks):
        folder.write_block(index, BLOCK, BlockEntry(index=index, seconds=1.0))
    folder.close()
    return folder


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refusal(path: Path, identity: Identity = IDENTITY) -> str:
    before = files(path) if path.is_dir() else {}
    with pytest.raises(InputError) as caught:
        RunWriter(path, identity)
    assert (files(path) if path.is_dir() else {}) == before
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    return message


# -- the same run, and others -----------------------------------------------------------------------------------------


def test_looking_writes_nothing(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", IDENTITY).need_space(1)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    started(tmp_path / "run", blocks=2)
    again = RunWriter(tmp_path / "run", Identity.model_validate(json.loads(json.dumps(IDENTITY.to_json()))))
    assert again.finished_blocks() == 2
    assert all(torch.equal(tensor, BLOCK[name]) for name, tensor in again.read_block(1).items())
    entry = again.manifest.blocks[1]
    assert (entry.index, entry.seconds, entry.sha256) == (1, 1.0, checksum(again.block_path(1)))


def test_an_existing_empty_folder_is_used(tmp_path: Path) -> None:
    started(tmp_path, blocks=1)
    assert set(files(tmp_path)) == {"manifest.json", "recipe.yaml", "blocks/00000.safetensors"}


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path: Path) -> None:
    started(tmp_path, blocks=1)
    (tmp_path / "blocks" / ".00001.safetensors.tmp").write_bytes(b"half")
    (tmp_path / ".manifest.json.tmp").write_bytes(b"{")
    started(tmp_path)
    assert set(files(tmp_path)) == {"manifest.json", "recipe.yaml", "blocks/00000.safetensors"}


def test_a_block_without_its_line_is_written_again(tmp_path: Path) -> None:
    folder = started(tmp_path, blocks=1)
    write_tensors(folder.block_path(1), {"other": torch.zeros(1)})  # killed before the manifest
    again = RunWriter(tmp_path, IDENTITY)
    assert again.finished_blocks() == 1
    again.write_block(1, BLOCK, BlockEntry(index=1))
    assert RunWriter(tmp_path, IDENTITY).finished_blocks() == 2


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe.weights.bits", 3),
        ("recipe.model", "other"),
        ("checkpoint.model.safetensors", "101"),
        ("versions.torch", "2.14"),
        ("versions.new", "1"),
    ],
)
def test_another_run_is_named_by_what_differs(tmp_path: Path, path: str, value: object) -> None:
    started(tmp_path, blocks=1)
    identity = IDENTITY.model_dump(mode="json", exclude_unset=True)
    section, _, rest = path.partition(".")
    target = identity[section]
    if section == "recipe" and "." in rest:
        inner, _, rest = rest.partition(".")
        target = target[inner]
    target[rest] = value
    assert f"holds another run, with other {path}: give another --output, or remove the folder" in refusal(
        tmp_path, Identity.model_validate(identity)
    )


def test_all_that_differs_is_named(tmp_path: Path) -> None:
    started(tmp_path)
    changed = Identity(recipe=Recipe(model="x").model_dump(mode="json", exclude={"output"}), checkpoint={})
    message = refusal(tmp_path, changed)
    assert "with other checkpoint.model.safetensors, recipe.model: " in message


def test_what_takes_long_to_know_is_compared_later(tmp_path: Path) -> None:
    early = Identity(recipe=IDENTITY.recipe)
    folder = RunWriter(tmp_path, early)
    folder.identify(text={"calibration": "a"})
    folder.start("model: tiny\n")
    folder.close()
    again = RunWriter(tmp_path, early)
    again.identify(text={"calibration": "a"}, versions={})
    with pytest.raises(InputError, match=r"holds another run, with other text\.calibration: give another --output"):
        again.identify(text={"calibration": "b"})
    assert read_manifest(tmp_path).identity.to_json() == early.to_json() | {"text": {"calibration": "a"}}


# -- one process at a time --------------------------------------------------------------------------------------------


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    first, second = RunWriter(tmp_path / "run", IDENTITY), RunWriter(tmp_path / "run", IDENTITY)
    first.start("model: tiny\n")
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"another process is writing to .*run: wait for it, or stop it\."):
        second.start("model: tiny\n")
    second.close()
    assert files(tmp_path) == before
    first.write_block(0, BLOCK, BlockEntry(index=0))
    first.close()
    assert not (tmp_path / "run" / ".lock").exists()
    with pytest.raises(InputError, match=r"another process has written to .*run meanwhile: run the command again"):
        second.start("model: tiny\n")
    second.close()
    started(tmp_path / "run")


def test_a_lock_that_a_killed_process_left_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".manifest.json.tmp").write_text("{")
    started(tmp_path, blocks=1)
    assert set(files(tmp_path)) == {"manifest.json", "recipe.yaml", "blocks/00000.safetensors"}


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    folder = started(tmp_path, blocks=1)
    folder.keep(finished=True)
    assert f"holds this very run, finished: see it with `rotoboa inspect {tmp_path}`" in refusal(tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    assert "exists and is no run of rotoboa: give another --output" in refusal(tmp_path)
    assert "exists and is no run of rotoboa" in refusal(tmp_path / "photo.jpg")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", "\xff"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    assert "manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_block_is_named(tmp_path: Path, damage: str) -> None:
    started(tmp_path, blocks=3)
    file = tmp_path / "blocks" / "00001.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"00001\.safetensors is missing or damaged .*: remove .* and start again"):
        RunWriter(tmp_path, IDENTITY).finished_blocks()


def test_only_a_finished_run_is_opened(tmp_path: Path) -> None:
    folder = started(tmp_path, blocks=1)
    with pytest.raises(InputError, match="is not finished: run `rotoboa quantize` with the same recipe"):
        RunFolder.open(tmp_path)
    folder.keep(finished=True)
    assert RunFolder.open(tmp_path).read_block(0).keys() == BLOCK.keys()
    folder.block_path(0).write_bytes(b"")
    with pytest.raises(InputError, match=r"00000\.safetensors is missing or damaged"):
        RunFolder.open(tmp_path)
    with pytest.raises(InputError, match="is no folder of a run: it does not exist"):
        RunFolder.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no folder of a run: it has no manifest"):
        RunFolder.open(tmp_path / "empty")


def test_the_recipe_of_a_run(tmp_path: Path) -> None:
    started(tmp_path)
    assert recipe_of(tmp_path) == Recipe()
    assert read_manifest(tmp_path).identity == IDENTITY
    other = IDENTITY.to_json()
    other["recipe"]["weights"]["token_weights"] = False
    write_json(tmp_path / "manifest.json", {"identity": other})
    assert recipe_of(tmp_path) == Recipe()
    other["recipe"]["weights"]["token_weights"] = True
    write_json(tmp_path / "manifest.json", {"identity": other})
    with pytest.raises(InputError, match="is not one that this release of rotoboa reads"):
        recipe_of(tmp_path)
    other = IDENTITY.to_json()
    other["recipe"]["weights"]["of_the_future"] = 1
    write_json(tmp_path / "manifest.json", {"identity": other})
    with pytest.raises(InputError, match="is not one that this release of rotoboa reads"):
        recipe_of(tmp_path)
    with pytest.raises(InputError, match=r"holds another run, with other recipe\.weights\.of_the_future: give another"):
        RunWriter(tmp_path, IDENTITY)


def test_other_ranks_know_what_is_found_and_write_nothing(tmp_path: Path) -> None:
    folder = FollowedRun(tmp_path / "run", Manifest(identity=IDENTITY))
    folder.start("model: tiny\n")
    folder.keep(rotation_seed=3)
    folder.write_block(0, BLOCK, BlockEntry(index=0, seconds=1.0))
    folder.close()
    assert folder.manifest.rotation_seed == 3 and folder.manifest.blocks == (BlockEntry(index=0, seconds=1.0),)
    assert not (tmp_path / "run").exists()


def test_none_is_known_where_it_was_found() -> None:
    manifest = Manifest(identity=IDENTITY)
    assert manifest.r1_noise is None and not manifest.knows("r1_noise")
    found = manifest.including(r1_noise=None)
    assert found.knows("r1_noise") and not manifest.knows("r1_noise")
    assert "r1_noise" in found.to_json() and "r1_noise" not in manifest.to_json()
    with pytest.raises(ValidationError, match="rotation_seed"):
        manifest.including(rotation_seed="the best")


# -- disk and device --------------------------------------------------------------------------------------------------


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=3 * 2**20)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    folder = RunWriter(tmp_path / "deep" / "run", IDENTITY)
    folder.need_space(3 * 2**20)
    with pytest.raises(InputError, match=r"needs about 2,048 MiB in .*run and 3 MiB are free: make room"):
        folder.need_space(2**31)
    assert asked == [tmp_path, tmp_path] and not (tmp_path / "deep").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run cannot be written \(.*\): give another --output\."):
        started(tmp_path / "file" / "run")


def test_devices() -> None:
    assert device_of("cpu") == torch.device("cpu")
    assert device_of(None).type in ("cpu", "cuda")
    for name in ("abacus", "cuda:99", "meta"):
        with pytest.raises(InputError, match=rf"device '{name}' cannot be used \(.*\): give --device cpu"):
            device_of(name)
