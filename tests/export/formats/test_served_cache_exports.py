"""Runs that follow another runtime's cache: what R3 becomes, who takes them, what the card says, the native loader."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rotoboa
from rotoboa.boa.online.served_cache import ServedQuantizer
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import gguf, gptq
from rotoboa.export.formats.card import served_cache
from rotoboa.export.spec import Spec
from rotoboa.pipeline.exporting import export
from rotoboa.pipeline.job.job import prepare
from rotoboa.pipeline.verifying import run_logits

FOUR = {"cache.key_bits": 4, "cache.value_bits": 4, "weights.symmetric": True}
VLLM = {**FOUR, "cache.served_by": "vllm"}


@torch.no_grad()
def test_a_run_follows_the_cache_and_leaves_r3_to_it(cheap_run: Callable[..., Path], opened_run: Any) -> None:
    """The native loader computes what was measured, a token at a time too; no rotation is done twice."""
    changes = {**VLLM, "rotation.r3": True, "cache.sink": 1}
    run = opened_run("w4a16", changes)
    assert not run.spec.r3 and run.spec.cache_sink == 0 and not run.spec.cache_center
    assert Spec.from_dict(run.spec.to_dict()) == run.spec and "cache_served_by" not in Spec(4).to_dict()
    attention = run.spec.transforms(run.shape, run.family).attention
    assert attention.rotation is None and attention.key == ServedQuantizer("vllm", 4, 16, True)
    ids = torch.randint(2, 2048, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = run_logits(run, ids)
    model, _ = rotoboa.load(cheap_run("w4a16", changes), dtype=torch.float32)
    assert (model(ids).logits - expected).abs().max() < 1e-3 * expected.std()
    past = model(ids[:, :20], use_cache=True).past_key_values
    steps = [model(ids[:, i : i + 1], past_key_values=past).logits[:, 0] for i in range(20, 24)]
    assert (torch.stack(steps, 1) - expected[:, 20:]).abs().max() < 1e-3 * expected.std()


def test_who_takes_such_a_run(
    opened_run: Callable[..., Finished], cheap_run: Callable[..., Path], tmp_path: Path
) -> None:
    gptq.check(opened_run("w4a16", VLLM))
    with pytest.raises(InputError, match="4-bit values, as vllm keeps it, which GGUF cannot hold"):
        gguf.check(opened_run("w4a16", VLLM))
    with pytest.raises(InputError, match="4-bit values, which GPTQ cannot hold"):
        gptq.check(opened_run("w4a16", FOUR))
    card = (export(cheap_run("w4a16", VLLM), "compressed-tensors", output=tmp_path / "x") / "README.md").read_text()
    assert "serve it with `--kv-cache-dtype int4_per_token_head`" in card and "\n\n\n" not in card
    llama = Spec(4, key_bits=8, value_bits=5, cache_served_by="llama.cpp")
    assert "--flash-attn on --cache-type-k q8_0 --cache-type-v q5_0`" in served_cache(llama)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache.key_bits": 4, "cache.served_by": "vllm"}, "4, 8 bits, the same for both, and .* are 4 and 16"),
        ({"cache.key_bits": 3, "cache.served_by": "llama.cpp"}, "4, 5, 8 bits or 16, and .* are 3 and 16"),
        (
            {"cache.key_bits": 4, "cache.served_by": "llama.cpp"},
            "needs heads of multiples of 32, and those of .* are 16",
        ),
    ],
)
def test_what_a_cache_has_not_is_refused(
    make_recipe: Callable[..., Any], llama: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        prepare(make_recipe("w4a16", {"model": str(llama), **changes}))


def test_gptq_says_what_vllm_refuses(opened_run: Callable[..., Finished]) -> None:
    assert gptq.warning(opened_run("w4a16", {"weights.symmetric": True})) is None
    said = str(gptq.warning(opened_run("w2a16")))
    assert "refuses this one, with asymmetric ones of 2" in said and "--recipe w4a16 --weights.symmetric" in said
