"""Files of a run are whole or not there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rotoboa.export.record import checksum
from rotoboa.pipeline.storage.atomic import remove_temporary, write_json, write_tensors, write_text

TENSORS = {"a": torch.arange(6).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_written_files_are_whole_and_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "ä\n")
    write_json(tmp_path / "b.json", {"path": tmp_path, "x": 1})
    write_tensors(tmp_path / "blocks" / "c.safetensors", {"a": TENSORS["a"].T})
    assert set(files(tmp_path)) == {"deep/a.txt", "b.json", "blocks/c.safetensors"}
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "ä\n"
    assert json.loads((tmp_path / "b.json").read_text()) == {"path": str(tmp_path), "x": 1}
    assert torch.equal(load_file(tmp_path / "blocks" / "c.safetensors")["a"], TENSORS["a"].T)


def test_written_files_are_readable_like_any_other(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "")
    write_tensors(tmp_path / "b", TENSORS)
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "a").stat().st_mode


@pytest.mark.parametrize("kind", ["text", "json", "tensors"])
def test_a_write_that_is_killed_leaves_the_old_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"

    def write(number: int) -> None:
        if kind == "text":
            write_text(path, f"{number}")
        elif kind == "json":
            write_json(path, {"number": number})
        else:
            write_tensors(path, {"number": torch.tensor([number])})

    write(1)
    old = path.read_bytes()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(2)
    assert path.read_bytes() == old
    assert len(files(tmp_path)) == 2  # and the new one, under another name
    remove_temporary(tmp_path)
    assert files(tmp_path) == {"file": old}
    write(2)
    assert path.read_bytes() != old and len(files(tmp_path)) == 1


def test_checksum(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert checksum(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
