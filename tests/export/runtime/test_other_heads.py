"""A run loaded without its head, with another one, and where accelerate places it."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rotoboa.errors import InputError
from rotoboa.export.runtime.cache import PackedLayer

Run = Callable[..., Path]
IDS = torch.randint(2, 2048, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_without_the_head(cheap_run: Run) -> None:
    run = cheap_run("w4a4kv4") / "model"
    whole = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = AutoModel.from_pretrained(run, dtype=torch.float32)
    found, expected = model(IDS), whole(IDS, output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, expected.hidden_states[-1])
    assert all(type(layer) is PackedLayer for layer in found.past_key_values.layers)


def test_states_that_are_rotated_are_named(cheap_run: Run) -> None:
    run = cheap_run("w4a16", {"rotation.r1": "merged"}) / "model"
    with pytest.warns(UserWarning, match="hidden states of this run are rotated.*--rotation.r1 online or none"):
        AutoModel.from_pretrained(run)


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_another_head_is_new_and_can_be_trained(cheap_run: Run, tmp_path: Path, kind: type) -> None:
    run = cheap_run("w4a4kv4") / "model"
    model = kind.from_pretrained(run, num_labels=3, dtype=torch.float32, pad_token_id=0)  # type: ignore[attr-defined]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("score.") for name in trained)
    logits = model(IDS).logits
    assert logits.shape[-1] == 3 and logits.std() > 0
    logits.square().sum().backward()
    assert model.score.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert torch.equal(again(IDS).logits, logits)


def test_a_head_that_keeps_the_decoder_elsewhere_is_refused(cheap_run: Run) -> None:
    with pytest.raises(InputError, match="cannot be loaded as LlamaForQuestionAnswering: use AutoModelForCausalLM"):
        AutoModelForQuestionAnswering.from_pretrained(cheap_run("w4a4kv4") / "model")


@torch.no_grad()
@pytest.mark.parametrize("place", ["auto", "cpu", {"": "cpu"}])
def test_where_accelerate_places_it(cheap_run: Run, place: str | dict[str, str]) -> None:
    run = cheap_run("w4a4kv4") / "model"
    expected = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)(IDS).logits
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32, device_map=place)
    assert torch.allclose(model(IDS.to(model.device)).logits.cpu(), expected, atol=1e-4)
