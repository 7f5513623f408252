"""The hub: a checkpoint's snapshot, and what to do where the hub does not give it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
)

from ..errors import InputError

WANTED = (
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "merges.txt",
    "vocab.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "README.md",
)


def fetch(source: str, is_local: bool) -> Path:
    """The folder of a checkpoint: `source` itself, or the hub's snapshot of it (downloaded where it is missing).

    Raises:
        InputError: the repository is unknown, gated, or out of reach.
    """
    if is_local:
        return Path(source)
    with hub_errors(source):
        return Path(snapshot_download(source, allow_patterns=list(WANTED)))


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Say in one sentence why the hub does not give `source`.

    Raises:
        InputError: the repository is unknown, gated, or out of reach.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of every attempt, and the last one's error is told here
    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"{source} is gated: accept its licence on its model page, then set HF_TOKEN or run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no folder {source} here, and the hub has no model {source} that you may read: check its "
            "spelling, or set HF_TOKEN when it is private; a local folder works without the hub."
        ) from error
    except HFValidationError as error:
        raise InputError(f"{source} is no id of a model on the hub: {str(error).rstrip('.')}.") from error
    except NotASafetensorsRepoError as error:
        raise InputError(f"{source} has no safetensors files: choose another repository.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(f"{source} has no config.json: choose another repository.") from error
        raise InputError(
            f"{source} is no folder here, could not be fetched from the hub and is not in the local cache "
            f"({type(error).__name__}): "
            "check the connection, or give the folder of a downloaded checkpoint."
        ) from error
    finally:
        logger.setLevel(level)
