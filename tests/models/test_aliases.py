"""Names of models become sources, and wrong names one helpful sentence."""

from pathlib import Path

import pytest

from rotoboa.errors import InputError
from rotoboa.models.aliases import ALIASES, TINY_FOLDER, resolve_model


def test_names_are_unique_and_resolve_to_their_rows() -> None:
    assert len({alias.name for alias in ALIASES}) == len(ALIASES)
    for alias in ALIASES:
        found = resolve_model(alias.name)
        assert (found.source, found.dataset) == (alias.source, alias.dataset)
        assert (found.sequence_length, found.windows) == (alias.sequence_length, alias.windows)
        assert found.is_local == (alias.name == "tiny")


def test_tiny_is_the_folder_in_the_package() -> None:
    found = resolve_model("tiny")
    assert (Path(found.source) / "model.safetensors").is_file()
    assert (found.dataset, found.sequence_length, found.windows) == ("stdlib", 512, 200)
    by_path = resolve_model(str(TINY_FOLDER))
    assert (by_path.source, by_path.dataset, by_path.sequence_length) == (found.source, "stdlib", 512)
    assert by_path.windows == 200


def test_alias_defaults_are_those_of_the_papers() -> None:
    found = resolve_model("llama2-7b")
    assert found.source == "meta-llama/Llama-2-7b-hf"
    assert (found.dataset, found.sequence_length, found.is_local) == ("wikitext2", 2048, False)
    assert found.windows is None


def test_local_folder_has_no_default_text_that_would_be_downloaded(tmp_path: Path) -> None:
    found = resolve_model(str(tmp_path))
    assert (found.source, found.is_local, found.dataset) == (str(tmp_path), True, None)
    assert found.windows is None


def test_relative_folder_goes_before_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name").is_local
    assert resolve_model("tiny").source == str(TINY_FOLDER)
    assert resolve_model("./tiny").source == "tiny"


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model").source == str(tmp_path / "model")


def test_hub_id() -> None:
    found = resolve_model("someone/Llama-x_1.0")
    assert (found.source, found.is_local, found.dataset) == ("someone/Llama-x_1.0", False, "wikitext2")


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere", "~nobody/model"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        resolve_model(name)


def test_file_instead_of_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(InputError, match="is a file; give the folder"):
        resolve_model(str(path))


def test_unknown_name_lists_close_matches() -> None:
    with pytest.raises(InputError, match=r"use llama2-7b or .*`rotoboa models`"):
        resolve_model("Lama2-7b")


@pytest.mark.parametrize("name", ["", "zzzz", "a/b/c", "owner/", "owner/na me"])
def test_unknown_name_without_close_matches(name: str) -> None:
    with pytest.raises(InputError, match=r"; use a folder or a hub id, or a name listed by `rotoboa models`"):
        resolve_model(name)
