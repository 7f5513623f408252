"""A tokenizer that cannot be read is called what it is; one that is larger than the embedding is told of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rotoboa.errors import InputError
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.tokenizer import read_tokenizer, size_notices, tokens_beyond
from rotoboa.pipeline.job.calibration import calibration_tokens, evaluation_tokens
from rotoboa.pipeline.job.job import prepare

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model's tokenizer, to be damaged."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_FOLDER / name, tmp_path / name)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_tokenizer(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and message.endswith(".") and "\n" not in message
    return message


def test_it_is_that_of_transformers(folder: Path) -> None:
    text = "def f(x): return x"
    assert read_tokenizer(folder)(text)["input_ids"] == AutoTokenizer.from_pretrained(TINY_FOLDER)(text)["input_ids"]


def test_without_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer that can be read: copy its files there." in refusal(folder)


@pytest.mark.parametrize("content", ["{", "", "[]", '{"a": 1}', '{"added_tokens": [], "model": {"type": "new"}}'])
def test_damaged(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert "has a tokenizer that cannot be read (" in refusal(folder)
    assert refusal(folder).endswith("): copy its files there again.")


def test_code_of_its_own(folder: Path) -> None:
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    assert "has a tokenizer with code of its own, which is never run: add a tokenizer.json" in refusal(folder)


def test_a_library_that_is_not_there(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    found = refusal(folder)
    assert "has a tokenizer that cannot be read without more (" in found and "add a tokenizer.json" in found


def test_pointers_of_git_lfs(folder: Path, llama: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)
    assert "has a pointer of Git LFS in place of tokenizer.json: run `git lfs pull` there." in refusal(folder)
    shutil.copy(llama / "config.json", folder)
    (folder / "model.safetensors").write_text(POINTER)
    with pytest.raises(InputError, match=r"model\.safetensors is a pointer of Git LFS: run `git lfs pull`"):
        Checkpoint(folder)


# -- larger than the embedding ----------------------------------------------------------------------------------------


@pytest.fixture
def larger(llama: Path, tmp_path: Path) -> Path:
    """The small Llama with a tokenizer of two tokens more than it has rows."""
    folder = Path(shutil.copytree(llama, tmp_path / "larger"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_notice_when_it_is_read(larger: Path, llama: Path, make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    changes = {"output": tmp_path / "run", "model": str(larger)}
    (found,) = prepare(make_recipe("w4a16", changes)).notices
    assert "The tokenizer has 2 tokens beyond the 2,048 rows of the embedding: 2048 ('<|im_start|>'), 2049 (" in found
    assert prepare(make_recipe("w4a16", changes | {"model": str(llama)})).notices == []


def test_padding_rows_are_no_fault() -> None:
    tokenizer = read_tokenizer(TINY_FOLDER)
    assert size_notices(tokenizer, 4096) == [] == tokens_beyond(tokenizer, 2048)
    assert (
        "1 token" not in size_notices(tokenizer, 2047)[0]
        and "a token beyond the 2,047 rows" in size_notices(tokenizer, 2047)[0]
    )
    assert "2048 tokens" not in size_notices(tokenizer, 1048)[0] and "1,000 tokens" in size_notices(tokenizer, 1048)[0]


def test_text_that_has_such_a_token(larger: Path) -> None:
    tokenizer, texts = read_tokenizer(larger), ["def f(x): return x\n" * 20 + "<|im_end|>"]
    words = r"gives token id 2049 \('<\|im_end\|>'\), but the model's vocabulary ends at 2047; use the tokenizer"
    with pytest.raises(InputError, match=words):
        calibration_tokens(tokenizer, texts, 1, 8, seed=0, vocab_size=2048)
    with pytest.raises(InputError, match=words):
        evaluation_tokens(tokenizer, texts, 8, vocab_size=2048)
    assert len(evaluation_tokens(tokenizer, ["x = 1\n" * 20], 8, vocab_size=2048))  # it is only text that matters
