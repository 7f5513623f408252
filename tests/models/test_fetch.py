"""Checkpoints of the hub: what is downloaded, and its errors are one sentence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from rotoboa.errors import InputError
from rotoboa.models.hub import fetch

# The part of a response that the hub's errors read, whichever HTTP library made it.
RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            GatedRepoError("403", response=RESPONSE),
            "is gated: accept its licence on its model page, then set HF_TOKEN",
        ),
        (RepositoryNotFoundError("404", response=RESPONSE), "the hub has no model owner/name that you may read"),
        (HfHubHTTPError("500", response=RESPONSE), r"could not be fetched .* \(HfHubHTTPError\): check"),
        (LocalEntryNotFoundError("offline"), r"is not in the local cache \(LocalEntryNotFoundError\): check"),
        (OfflineModeIsEnabled("offline"), r"is not in the local cache \(OfflineModeIsEnabled\): check"),
        (ConnectionError("no route"), r"could not be fetched .* \(ConnectionError\): check the connection"),
    ],
)
def test_errors_of_the_hub_are_one_sentence(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr("rotoboa.models.hub.snapshot_download", fail)
    with pytest.raises(InputError, match=words) as caught:
        fetch("owner/name", is_local=False)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["owner/two--dashes", "owner/ends.", f"owner/{'n' * 100}"])
def test_names_that_the_hub_refuses(name: str) -> None:
    with pytest.raises(InputError, match="is no id of a model on the hub"):
        fetch(name, is_local=False)


def test_a_local_folder_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr("rotoboa.models.hub.snapshot_download")
    assert fetch(str(tmp_path), is_local=True) == tmp_path


def test_only_wanted_files_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(source: str, **options: Any) -> str:
        asked.update(options, source=source)
        return str(tmp_path)

    monkeypatch.setattr("rotoboa.models.hub.snapshot_download", download)
    assert fetch("owner/name", is_local=False) == tmp_path
    assert asked["source"] == "owner/name" and "*.bin" not in asked["allow_patterns"]
