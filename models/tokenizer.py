"""The tokenizer of a checkpoint: why it cannot be read, and what it has that the model has not."""

from __future__ import annotations

import locale
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import InputError

_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
LFS = b"version https://git-lfs"


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; no code of its own is run.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return tokenizer
    except Exception as error:  # of a damaged file tokenizers raises just that, and transformers whatever comes
        raise InputError(f"{folder} {_trouble(folder, error)}.") from error


def _trouble(folder: Path, error: Exception) -> str:
    """Why a tokenizer cannot be read, and what to do."""
    what = " ".join(str(error).strip().partition("\n")[0].split()).rstrip(".") or type(error).__name__
    whole = folder / "tokenizer.json"
    if not any(file for pattern in _FILES for file in folder.glob(pattern)):
        return "has no tokenizer that can be read: copy its files there"
    if isinstance(error, UnicodeError) and not _is_unicode(str(folder)):
        return f"has letters in its name that this locale ({locale.getencoding()}) has not: set LC_ALL=C.UTF-8"
    if is_pointer(whole):
        return "has a pointer of Git LFS in place of tokenizer.json: run `git lfs pull` there"
    if "trust_remote_code" in str(error):
        return "has a tokenizer with code of its own, which is never run: add a tokenizer.json that needs none"
    if not whole.is_file():
        return f"has a tokenizer that cannot be read without more ({what}): install that, or add a tokenizer.json"
    return f"has a tokenizer that cannot be read ({what}): copy its files there again"


def _is_unicode(name: str) -> bool:
    """Whether Python could decode a name that the system gave it."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_pointer(file: Path) -> bool:
    """Whether Git LFS has left a few lines in place of the file."""
    try:
        with file.open("rb") as reader:
            return reader.read(len(LFS)) == LFS
    except OSError:
        return False


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[int]:
    """The ids that a tokenizer can give and that an embedding of `vocabulary` rows has no row for."""
    return sorted({token for token in tokenizer.get_vocab().values() if token >= vocabulary})


def named(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as messages have it."""
    return f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})"


def size_notices(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[str]:
    """A sentence where a tokenizer is larger than the embedding."""
    if not (beyond := tokens_beyond(tokenizer, vocabulary)):
        return []
    some = ", ".join(named(tokenizer, token) for token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    tokens = "a token" if len(beyond) == 1 else f"{len(beyond):,} tokens"
    return [
        f"The tokenizer has {tokens} beyond the {vocabulary:,} rows of the embedding: {some}. The model cannot read "
        "text that has them: enlarge its embedding first (`resize_token_embeddings`), or use its own tokenizer."
    ]
