"""What a person gets wrong is one sentence and exit code 2, and costs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from rotoboa.models.checkpoint import SINGLE

if TYPE_CHECKING:
    from rotoboa.tests.pipeline.conftest import User

Change = Callable[..., object]


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- the model --------------------------------------------------------------------------------------------------------


def test_unknown_model(user: User) -> None:
    assert "Model 'lama2-7b' is no known name" in user.refused(model="lama2-7b")
    assert "Model folder './absent' does not exist; check the path" in user.refused(model="./absent")
    assert "is a file; give the folder that holds config.json" in user.refused(model=user.text)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "owner/name is gated: accept its licence on its model page, then set HF_TOKEN"),
        (
            RepositoryNotFoundError,
            "there is no folder owner/name here, and the hub has no model owner/name that you may read",
        ),
        (
            LocalEntryNotFoundError,
            "owner/name is no folder here, could not be fetched from the hub and is not in the local cache",
        ),
    ],
)
def test_hub(user: User, error: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> str:
        if error is LocalEntryNotFoundError:
            raise error("offline\nreally")
        raise error("401\n\nClient Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("rotoboa.models.hub.snapshot_download", fail)
    assert words in user.refused(model="owner/name")


def test_id_that_the_hub_refuses(user: User) -> None:
    assert "owner/two--dashes is no id of a model on the hub" in user.refused(model="owner/two--dashes")


def test_folder_without_safetensors(user: User, copied: Path) -> None:
    (copied / SINGLE).unlink()
    assert "has no safetensors file: save it again" in user.refused()
    (copied / "pytorch_model.bin").write_bytes(b"pickle")
    assert "it has pytorch_model.bin, and pickle files are never opened" in user.refused()


def test_folder_without_a_model(user: User, tmp_path: Path) -> None:
    assert "has no config.json" in user.refused(model=tmp_path)


def test_folder_without_a_tokenizer(user: User, copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer that can be read: copy its files there" in user.refused()


def test_damaged_tokenizer(user: User, copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{")
    assert "has a tokenizer that cannot be read (Expecting property name" in user.refused()
    assert "copy its files there again" in user.refused()


def test_truncated_file(user: User, copied: Path) -> None:
    (copied / SINGLE).write_bytes((copied / SINGLE).read_bytes()[:-100])
    assert f"{SINGLE} is not a whole safetensors file" in user.refused()


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_missing_tensor(user: User, copied: Path, change_tensors: Change, name: str) -> None:
    change_tensors(copied, lambda tensors: tensors.pop(name))
    assert f"has no tensor {name}, which its config.json asks for" in user.refused()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "is a 'gpt2' model, which has no row of its own, and it is no list of blocks"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already: give the full-precision checkpoint"),
        ({"intermediate_size": 128}, "and config.json asks for"),
        ({"hidden_size": "many"}, "config.json cannot be read"),
        ({"rope_parameters": {"rope_type": "unheard"}}, "no model can be made of this config.json"),
    ],
)
def test_config(user: User, copied: Path, change_config: Change, changes: dict[str, Any], words: str) -> None:
    change_config(copied, **changes)
    assert words in user.refused()


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_group_size_that_does_not_divide(user: User) -> None:
    message = user.refused("--weights.group_size", "48")
    assert "weights.group_size 48 does not divide the hidden size 64" in message and message.endswith(
        "give one of 32, 16, 8."
    )
    assert "does not divide the ffn size 96" in user.refused("--weights.group_size", "64")
    assert "weights.group_size is 4 but must be an integer at least 8, or none" in user.refused(
        "--weights.group_size", "4"
    )
    message = user.refused("--activations.bits", "4", "--activations.group_size", "64")
    assert "activations.group_size 64 does not divide the ffn size 96" in message
    assert message.endswith("give one of 32, 16, 8.")
    assert "activations.group_size is 4 but must be an integer at least 8" in user.refused(
        "--activations.group_size", "4"
    )


@pytest.mark.parametrize("bits", ["1", "9", "16", "four", "4.5", "-4"])
def test_unsupported_bits(user: User, bits: str) -> None:
    assert f"weights.bits is {bits} but must be 2 to 8" in user.refused("--weights.bits", bits)
    if bits != "16":
        assert f"cache.key_bits is {bits} but must be 2 to 8, or 16" in user.refused("--cache.key_bits", bits)


def test_unknown_field(user: User, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("weights: {bit: 4}\n")
    assert "there is no field weights.bit (perhaps weights.bits)" in user.refused("--recipe", tmp_path / "mine.yaml")


def test_unknown_recipe(user: User) -> None:
    assert "There is no recipe 'w4a44'" in user.refused("--recipe", "w4a44")


def test_sequence_longer_than_the_positions(user: User) -> None:
    message = user.refused("--calibration.sequence_length", "257")
    assert "calibration.sequence_length 257 is more than the 256 positions of" in message
    assert message.endswith("give at most 256.")


# -- the text ---------------------------------------------------------------------------------------------------------


def test_text_that_is_too_short(user: User, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def f(): pass")
    message = user.refused("--calibration.dataset", tmp_path / "short.txt")
    assert "The calibration text gives" in message and "at least 33 are needed for windows of 32" in message
    assert "The evaluation text gives" in user.refused("--evaluation.dataset", tmp_path / "short.txt")


def test_text_that_is_not_there(user: User, tmp_path: Path) -> None:
    assert "absent.txt' does not exist" in user.refused("--calibration.dataset", tmp_path / "absent.txt")
    assert "Dataset 'wikitext' is unknown, and there is no such file or folder; use 'stdlib'" in user.refused(
        "--evaluation.dataset", "wikitext"
    )


def test_local_folder_without_a_text(user: User) -> None:
    message = user.refused("--calibration.dataset", "none")
    assert "is a local folder, which has no default text: give --calibration.dataset wikitext2" in message


def test_tokenizer_of_another_model(user: User, save_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", vocab_size=1000)
    assert "but the model's vocabulary ends at 999" in user.refused(model=model)


# -- the place --------------------------------------------------------------------------------------------------------


def test_output_that_holds_another_run(user: User) -> None:
    user.succeeds()
    before = files(user.output)
    message = user.fails(2, "--weights.bits", "3")
    assert "holds another run, with other recipe.weights.bits: give another --output, or remove the folder" in message
    assert "holds this very run, finished: see it with `rotoboa inspect" in user.fails(2)
    assert files(user.output) == before


def test_output_that_holds_something_else(user: User) -> None:
    user.output.mkdir()
    (user.output / "photo.jpg").write_bytes(b"x")
    assert "exists and is no run of rotoboa: give another --output" in user.fails(2)
    assert list(user.output.iterdir()) == [user.output / "photo.jpg"]


def test_output_that_cannot_be_made(user: User, tmp_path: Path) -> None:
    assert "cannot be written" in user.refused("--output", user.text / "run")


def test_no_space(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    message = user.refused()
    assert "the run needs about" in message and "1 MiB are free: make room, or give another --output" in message


def test_device(user: User) -> None:
    assert "device 'abacus' cannot be used (torch knows none of this name): give --device cpu" in user.refused(
        "--device", "abacus"
    )
    assert "device 'cuda:99' cannot be used (" in user.refused("--device", "cuda:99")


COMMANDS = """
import sys
from rotoboa.pipeline.cli.app import main
end = sys.argv.index("then")
for arguments in (sys.argv[1:end], sys.argv[end + 1 :]):
    sys.argv = ["rotoboa", *arguments]  # as the command line, which imports no more than it needs
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2, ended.code
"""


def test_nothing_but_the_sentence_reaches_standard_error(user: User, copied: Path, tmp_path: Path) -> None:
    """In a process of its own, where libraries may log; and whose locale has not the letters of a folder."""
    named = Path(shutil.copytree(copied, tmp_path / "é"))
    (copied / "tokenizer.json").unlink()
    ascii_only = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", COMMANDS, *user.arguments(), "then", *user.arguments(model=named)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ascii_only)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    first, second = done.stderr.splitlines()
    assert "has no tokenizer that can be read" in user.sentence(first)
    assert "has letters in its name that this locale (" in user.sentence(second)
    assert second.endswith("has not: set LC_ALL=C.UTF-8.")
    assert not user.output.exists()
