"""What a person gets wrong is one sentence and exit code 2, and costs nothing; a run that fails is one and code 1."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from rotoboa.boa.block import BlockQuantizer
from rotoboa.models.checkpoint import SINGLE
from rotoboa.pipeline.cli import app

QUICK = ["--weights.grid", "minmax", "--weights.refine", "0", "--weights.starts", "1", "--weights.rows", "8"]
SMALL = [
    "--calibration.samples",
    "2",
    "--calibration.sequence_length",
    "32",
    "--evaluation.windows",
    "2",
    "--no-evaluation.report",
]

Arguments = list[str | Path]


class User:
    """At the command line, with a small Llama, a text and an output folder that does not exist yet."""

    def __init__(self, model: Path, text: Path, folder: Path) -> None:
        self.model, self.text, self.output = model, text, folder / "run"

    def arguments(self, *more: str | Path, model: str | Path | None = None) -> list[str]:
        given: Arguments = [
            *("quantize", "--model", model or self.model, "--output", self.output, *SMALL, *QUICK),
            *("--calibration.dataset", self.text, "--evaluation.dataset", self.text, *more),
        ]
        return [str(argument) for argument in given]

    def fails(self, code: int, *more: str | Path, model: str | Path | None = None) -> str:
        """The one sentence on standard error."""
        result = CliRunner().invoke(app, self.arguments(*more, model=model))
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        return sentence(result.stderr)

    def refused(self, *more: str | Path, model: str | Path | None = None) -> str:
        """The sentence, where nothing may be written."""
        message = self.fails(2, *more, model=model)
        assert not self.output.exists()
        return message

    def succeeds(self, *more: str | Path) -> None:
        result = CliRunner().invoke(app, self.arguments(*more, "--quiet"))
        assert result.exit_code == 0, result.output


def sentence(stderr: str) -> str:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ") and lines[0].endswith("."), stderr
    assert "Traceback" not in stderr and "unexpected" not in stderr
    return lines[0]


def files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def user(llama: Path, text: Path, tmp_path: Path) -> User:
    return User(llama, text, tmp_path)


@pytest.fixture
def copied(user: User, tmp_path: Path) -> Path:
    """The user's own copy of the model, to be damaged."""
    user.model = Path(shutil.copytree(user.model, tmp_path / "model"))
    return user.model


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# -- the model --------------------------------------------------------------------------------------------------------


def test_unknown_model(user: User) -> None:
    assert "Model 'lama2-7b' is no known name" in user.refused(model="lama2-7b")
    assert "Model folder './absent' does not exist; check the path" in user.refused(model="./absent")
    assert "is a file; give the folder that holds config.json" in user.refused(model=user.text)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError, "owner/name is gated: accept its licence on its model page, then set HF_TOKEN"),
        (RepositoryNotFoundError, "the hub has no model owner/name that you may read"),
        (LocalEntryNotFoundError, "owner/name could not be fetched and is not in the local cache"),
    ],
)
def test_hub(user: User, error: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> str:
        if error is LocalEntryNotFoundError:
            raise error("offline\nreally")
        raise error("401\n\nClient Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("rotoboa.models.checkpoint.snapshot_download", fail)
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
    assert "has no tokenizer that can be read: copy its files there" in user.refused()


def test_truncated_file(user: User, copied: Path) -> None:
    (copied / SINGLE).write_bytes((copied / SINGLE).read_bytes()[:-100])
    assert f"{SINGLE} is not a whole safetensors file" in user.refused()


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_missing_tensor(user: User, copied: Path, name: str) -> None:
    change_tensors(copied, lambda tensors: tensors.pop(name))
    assert f"has no tensor {name}, which its config.json asks for" in user.refused()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "is a 'gpt2' model, which is not supported; supported architectures: gemma2, "),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already: give the full-precision checkpoint"),
        ({"intermediate_size": 128}, "and config.json asks for"),
        ({"hidden_size": "many"}, "config.json cannot be read"),
        ({"rope_parameters": {"rope_type": "unheard"}}, "no model can be made of this config.json"),
    ],
)
def test_config(user: User, copied: Path, changes: dict[str, Any], words: str) -> None:
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
    assert "Dataset 'wikitext' is unknown; use 'stdlib'" in user.refused("--evaluation.dataset", "wikitext")


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


def test_nothing_but_the_sentence_reaches_standard_error(user: User, copied: Path) -> None:
    # In a process of its own, where libraries may log.
    (copied / "tokenizer.json").unlink()
    command = [sys.executable, "-m", "rotoboa", *user.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "has no tokenizer that can be read" in sentence(done.stderr)
    assert not user.output.exists()


# -- runs that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        *("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        "model.layers.1.input_layernorm.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_tensor_is_named(user: User, copied: Path, name: str, value: float) -> None:
    change_tensors(copied, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    assert f"{SINGLE}: tensor {name} holds NaN or Inf" in user.fails(1, "--quiet")


def test_a_block_that_overflows_is_named_and_the_finished_ones_stay(user: User, copied: Path) -> None:
    # Finite, but its products are not.
    name = "model.layers.1.self_attn.q_proj.weight"
    change_tensors(copied, lambda tensors: tensors[name].fill_(3e38))
    message = user.fails(1, "--quiet", "--no-rotation.r1", "--no-rotation.r2")
    assert "block 1, self_attn.q_proj, self_attn.k_proj: what weighs its outputs holds NaN or Inf" in message
    assert "look for NaN, Inf or huge values in the checkpoint" in message
    manifest = json.loads((user.output / "manifest.json").read_text())
    assert [block["index"] for block in manifest["blocks"]] == [0] and "finished" not in manifest
    assert (user.output / "blocks" / "00000.safetensors").is_file()


def test_a_run_that_fails_goes_on_once_the_cause_is_gone(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BlockQuantizer.run
    calls = []

    def failing(self: BlockQuantizer, full: Tensor, quantized: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        run(self, full, quantized)

    with monkeypatch.context() as patch:
        patch.setattr(BlockQuantizer, "run", failing)
        message = user.fails(1, "--quiet")
    assert (
        f"the run in {user.output} failed: CUDA out of memory. Tried to allocate; the same command goes on" in message
    )
    first = (user.output / "blocks" / "00000.safetensors").stat().st_mtime_ns
    user.succeeds()
    assert (user.output / "blocks" / "00000.safetensors").stat().st_mtime_ns == first


def test_a_full_disk_while_it_runs(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rotoboa.pipeline.run.write_tensors", full)
    assert "failed: [Errno 28] No space left on device; the same command goes on" in user.fails(1, "--quiet")


def test_a_damaged_block_of_an_unfinished_run(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr("rotoboa.pipeline.stages.write_native")
        result = CliRunner().invoke(app, user.arguments("--quiet"))
    assert result.exit_code == 1
    (user.output / "blocks" / "00001.safetensors").write_bytes(b"")
    message = user.fails(2, "--quiet")
    assert (
        f"00001.safetensors is missing or damaged (its checksum differs): remove {user.output} and start again"
        in message
    )
