"""The text of the embedded model: three parts that share no module, in an order that never changes."""

import random
from pathlib import Path

import pytest

from rotoboa.errors import InputError
from rotoboa.models.tiny import corpus


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file its name is read: the library has thousands."""
    monkeypatch.setattr(corpus, "read", str)


@pytest.mark.usefixtures("unread")
def test_parts_follow_the_protocol() -> None:
    training = corpus.stdlib_files(False)
    random.Random(0).shuffle(training)
    assert corpus.calibration_texts() == [corpus.read(path) for path in training[:120]]
    assert corpus.validation_texts() == [corpus.read(path) for path in training[120:]]
    held_out = corpus.stdlib_files(True)
    assert held_out == sorted(held_out)
    assert corpus.evaluation_texts() == [corpus.read(path) for path in held_out]


def test_held_out_and_training_modules_are_apart() -> None:
    training, held_out = corpus.stdlib_files(False), corpus.stdlib_files(True)
    assert not set(training) & set(held_out)
    assert "argparse.py" in {path.name for path in held_out}
    assert not any(corpus.SKIP & set(path.parts) - {"testing"} for path in training + held_out)


@pytest.mark.usefixtures("unread")
def test_same_text_twice() -> None:
    assert corpus.calibration_texts() == corpus.calibration_texts()


def test_a_small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["b.py", "a.py", "json/decoder.py", "csv.py", "test/x.py", "re/tests/y.py", "data.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# {name} \xff".encode("latin-1"))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert [path.name for path in corpus.stdlib_files(False)] == ["a.py", "b.py"]
    assert corpus.evaluation_texts() == ["# csv.py ", "# json/decoder.py "]
    assert sorted(corpus.calibration_texts()) == ["# a.py ", "# b.py "]
    assert corpus.validation_texts() == []


@pytest.mark.parametrize("folder", ["empty", "missing.zip"])
def test_no_library(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / folder))
    for texts in (corpus.calibration_texts, corpus.validation_texts, corpus.evaluation_texts):
        with pytest.raises(InputError, match=r"'stdlib' is empty: this Python has no standard-library \.py files"):
            texts()
