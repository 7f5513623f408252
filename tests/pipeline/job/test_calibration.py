"""Datasets become texts, texts become windows of tokens, and each wrong input one sentence."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from rotoboa.errors import InputError
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.models.tiny import corpus
from rotoboa.pipeline.job import calibration
from rotoboa.pipeline.job.calibration import calibration_tokens, evaluation_tokens, load_texts
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.job.texts import evaluation_windows
from rotoboa.pipeline.storage.run_folder import recipe_of


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


class Hub:
    """Stands in for datasets.load_dataset: small real datasets, and a record of what was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def __call__(self, *arguments: str, **options: Any) -> datasets.Dataset:
        self.calls.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["", " = Title = \n", options["split"]]})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub)
    return hub


SPLITS: tuple[calibration.Split, ...] = ("calibration", "validation", "evaluation")


# Datasets


def test_stdlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "read", str)  # of a file its name: the library has thousands
    assert load_texts("stdlib", "calibration") == corpus.calibration_texts()
    assert load_texts("stdlib", "validation") == corpus.validation_texts()
    assert load_texts("stdlib", "evaluation") == corpus.evaluation_texts()


def test_wikitext2_is_one_text_joined_by_blank_lines(hub: Hub) -> None:
    texts = [load_texts("wikitext2", split) for split in SPLITS]
    assert texts == [[f"\n\n = Title = \n\n\n{name}"] for name in ("train", "validation", "test")]
    assert {arguments for arguments, _ in hub.calls} == {("Salesforce/wikitext", "wikitext-2-raw-v1")}


def test_c4_shards(hub: Hub) -> None:
    train, validation, evaluation = (load_texts("c4", split) for split in SPLITS)
    assert train == ["", " = Title = \n", "train[:16384]"]
    assert validation == ["  = Title = \n train[1100:2200]"]
    assert evaluation == ["  = Title = \n train[:1100]"]
    assert [options["data_files"]["train"] for _, options in hub.calls] == [
        "en/c4-train.00000-of-01024.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
    ]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub\nmore lines"),
        datasets.exceptions.DatasetNotFoundError("Dataset is gated"),
        datasets.exceptions.DatasetGenerationError("An error occurred"),
        ValueError("Couldn't find cache"),
        RuntimeError("Data processing error: CAS service error"),
        TimeoutError(),
    ],
)
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_download_fails(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"could not be had from the hub \(.+\).*local text file") as caught:
        load_texts(name, "calibration")
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


# Tokens


def stream(tokenizer: Any, texts: list[str]) -> list[int]:
    return [i for text in texts for i in [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]]


TEXTS = ["import os\n" * 20, "def f(x):\n    return x\n" * 30, "class A:\n    pass\n" * 25]


def test_c4_is_256_windows_as_in_the_papers(
    hub: Hub, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = prepare(recipe_of(tiny_run))
    job = replace(job, model=replace(job.model, windows=None))  # as a model of the hub
    words = datasets.Dataset.from_dict({"text": ["word " * 4000]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: words)
    assert len(evaluation_windows(job, "c4", "evaluation", 8, None)) == 256
    assert len(evaluation_windows(job, "c4", "evaluation", 8, 300)) == 300
    assert len(evaluation_windows(job, "wikitext2", "evaluation", 8, None)) > 300


def test_calibration_windows_are_drawn_by_the_seed(tokenizer: Any) -> None:
    tokens = calibration_tokens(tokenizer, TEXTS, samples=7, sequence_length=32, seed=3)
    everything, rng = stream(tokenizer, TEXTS), random.Random(3)
    offsets = [rng.randint(0, len(everything) - 33) for _ in range(7)]
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [everything[offset : offset + 32] for offset in offsets]
    assert not torch.equal(tokens, calibration_tokens(tokenizer, TEXTS, 7, 32, seed=4))


def test_evaluation_windows_follow_each_other(tokenizer: Any) -> None:
    everything = stream(tokenizer, TEXTS)
    tokens = evaluation_tokens(tokenizer, TEXTS, sequence_length=32)
    assert tokens.shape == (len(everything) // 32, 32)
    assert tokens.flatten().tolist() == everything[: tokens.numel()]
    assert torch.equal(evaluation_tokens(tokenizer, TEXTS, 32, limit=2), tokens[:2])
    assert torch.equal(evaluation_tokens(tokenizer, TEXTS, 32, limit=10_000), tokens)


def test_batches_of_texts_join_without_a_seam(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluation_tokens(tokenizer, TEXTS, 32)
    monkeypatch.setattr(calibration, "TOKENIZER_BATCH", 2)
    assert torch.equal(evaluation_tokens(tokenizer, TEXTS, 32), whole)


def test_windows_that_begin_with_bos(tokenizer: Any) -> None:
    everything, bos = stream(tokenizer, TEXTS), tokenizer.bos_token_id
    heads = [i for i, token in enumerate(everything) if token == bos]
    tokens = evaluation_tokens(tokenizer, TEXTS, 32, bos=True)
    assert set(tokens[:, 0].tolist()) == {bos}
    # Of one text nothing is lost but its incomplete end, and its own bos is not doubled.
    one = evaluation_tokens(tokenizer, TEXTS[:1], 32, bos=True)
    assert one[:, 1:].flatten().tolist() == stream(tokenizer, TEXTS[:1])[1:][: 31 * len(one)]
    # Between documents a bos stays, and no two follow each other.
    assert int((tokens == bos).sum()) > len(tokens) and not bool(
        ((tokens[:, 1:] == bos) & (tokens[:, :-1] == bos)).any()
    )
    assert torch.equal(evaluation_tokens(tokenizer, TEXTS, 32, limit=3, bos=True), tokens[:3])
    second = heads[1]  # a window that begins where a text does
    assert evaluation_tokens(tokenizer, TEXTS, second, limit=2, bos=True)[:, 0].tolist() == [bos] * 2
    assert evaluation_tokens(tokenizer, TEXTS, second, limit=2, bos=True)[1].tolist() == everything[second : 2 * second]


def test_calibration_windows_that_begin_with_bos_have_the_same_offsets(tokenizer: Any) -> None:
    plain = calibration_tokens(tokenizer, ["a b\n"] * 400, 40, 32, seed=3)
    tokens = calibration_tokens(tokenizer, ["a b\n"] * 400, 40, 32, seed=3, bos=True)
    own = plain[:, 0] == tokenizer.bos_token_id
    assert own.any() and not own.all()
    assert torch.equal(tokens[own], plain[own])
    assert torch.equal(tokens[~own][:, 1:], plain[~own][:, :-1])
    assert set(tokens[:, 0].tolist()) == {tokenizer.bos_token_id}


def test_tokenizer_without_bos() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER, bos_token=None)
    tokens = evaluation_tokens(tokenizer, TEXTS[:1], sequence_length=8)
    assert tokens[0].tolist() == tokenizer.encode(TEXTS[0], add_special_tokens=False)[:8]


def test_long_texts_give_no_warning(capfd: pytest.CaptureFixture[str]) -> None:
    fresh = AutoTokenizer.from_pretrained(TINY_FOLDER)  # it warns once in its life
    evaluation_tokens(fresh, ["a b c d e f\n" * 2000], 512)
    assert "longer than the specified maximum" not in "".join(capfd.readouterr())


def test_exactly_enough_calibration_text(tokenizer: Any) -> None:
    count = len(stream(tokenizer, TEXTS))
    assert calibration_tokens(tokenizer, TEXTS, 2, count - 1, seed=0).shape == (2, count - 1)
    with pytest.raises(InputError, match=f"gives {count} tokens, and at least {count + 1} are needed.*longer text"):
        calibration_tokens(tokenizer, TEXTS, 2, count, seed=0)


def test_exactly_enough_evaluation_text(tokenizer: Any) -> None:
    count = len(stream(tokenizer, TEXTS))
    assert evaluation_tokens(tokenizer, TEXTS, count).shape == (1, count)
    with pytest.raises(InputError, match=f"gives {count} tokens, and at least {count + 1} are needed.*longer text"):
        evaluation_tokens(tokenizer, TEXTS, count + 1)


def test_no_text_at_all(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="gives 0 tokens"):
        calibration_tokens(tokenizer, [], 1, 8, seed=0, vocab_size=2048)
    with pytest.raises(InputError, match="gives 0 tokens"):
        evaluation_tokens(tokenizer, [], 8, vocab_size=2048)


def test_tokenizer_of_another_model(tokenizer: Any) -> None:
    assert calibration_tokens(tokenizer, TEXTS, 1, 8, seed=0, vocab_size=2048).max() < 2048
    message = r"gives token id \d+ \(.+\), but the model's vocabulary ends at 99; use the tokenizer"
    with pytest.raises(InputError, match=message):
        calibration_tokens(tokenizer, TEXTS, 1, 8, seed=0, vocab_size=100)
    with pytest.raises(InputError, match=message):
        evaluation_tokens(tokenizer, TEXTS, 8, vocab_size=100)
