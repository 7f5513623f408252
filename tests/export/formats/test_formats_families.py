"""Other formats than native: written for families whose readers find every part, refused for the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.errors import InputError
from rotoboa.export.finished import has_joined_layout, has_plain_layout
from rotoboa.export.formats.compressed_tensors_reader import inspect
from rotoboa.models.families import FAMILIES
from rotoboa.pipeline.exporting import export

JOINED = [
    name for name, row in FAMILIES.items() if has_joined_layout(row) and not has_plain_layout(row) and not row.sight
]
SMALL: dict[str, Any] = {"calibration.sequence_length": 40, "evaluation.windows": 1, "evaluation.baseline": False}
SMALL |= {"weights.method": "rtn"}


@pytest.fixture
def make_run(save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **changes: Any) -> Path:
        model = save_family(tmp_path / "model", name)
        rotoboa.quantize(make_recipe("w4a16", {"model": str(model), "output": tmp_path / "run", **SMALL, **changes}))
        return tmp_path / "run"

    return make


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        *("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma", "seed_oss", "ministral3", "smollm3"),
        *("granite", "olmo2", "exaone4", "ernie4_5", "hunyuan_v1_dense"),
    ],
)
def test_stock_transformers_computes_what_native_does(make_run: Callable[..., Path], name: str) -> None:
    """Windows, biases and QK-norm among them; the norms of Gemma's branches keep R1 out of the weights."""
    run = make_run(name)
    folder = export(run, "compressed-tensors")
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    native, _ = rotoboa.load(run, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = native(ids).logits
    # The stock reader rounds a weight to float16 as it multiplies by the scale.
    torch.testing.assert_close(stock(ids).logits, expected, rtol=0, atol=0.01 * float(expected.std()))


@torch.no_grad()
@pytest.mark.parametrize(("name", "symmetric"), [*((name, True) for name in JOINED), ("phi3", False)])
def test_stock_transformers_joins_what_is_in_parts(make_run: Callable[..., Path], name: str, symmetric: bool) -> None:
    """Merged layers, by head among them, experts by the hub's names, and what stands in place of attention."""
    run = make_run(name, **{"weights.symmetric": symmetric})
    folder = export(run, "compressed-tensors")
    inspect(folder)
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1))
    native, _ = rotoboa.load(run, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = native(ids).logits
    torch.testing.assert_close(stock(ids).logits, expected, rtol=0, atol=0.01 * float(expected.std()))


def test_parts_in_several_schemes_are_not_joined(make_run: Callable[..., Path]) -> None:
    run = make_run("phi3", overrides=[{"layers": "*.up", "weights": {"bits": 8}}])
    with pytest.raises(InputError, match=r"has mlp.gate_up_proj of block 0 as one layer, and its parts have several"):
        export(run, "compressed-tensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights.symmetric": False}, "unpacked by transformers as symmetric integers of one scheme"),
        (
            {"overrides": [{"layers": "*.down_proj", "weights": {"bits": 16}}]},
            "unpacked by transformers as symmetric integers",
        ),
        ({"activations.bits": 8}, "needs 8-bit activations, which compressed-tensors cannot hold"),
        ({"rotation.r4": True}, r"needs R4 \(an online rotation before down\), which compressed-tensors cannot"),
    ],
)
def test_experts_that_transformers_would_not_unpack_are_refused(
    make_run: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    run = make_run("mixtral", **{"weights.symmetric": True, **changes})
    with pytest.raises(InputError, match=words):
        export(run, "compressed-tensors")


@pytest.mark.parametrize(
    ("name", "format_names"),
    [("phi3", ["gptq"]), ("opt", ["compressed-tensors", "gptq"]), ("gpt_oss", ["compressed-tensors", "gptq"])],
)
def test_others_are_refused(make_run: Callable[..., Path], name: str, format_names: list[str]) -> None:
    run = make_run(name)
    for format_name in format_names:
        with pytest.raises(InputError, match=f"and '{name}' has other parts: use --format native"):
            export(run, format_name)
        assert not (run / "exports").exists()


def test_r1_behind_the_norms_is_refused_by_gptq(make_run: Callable[..., Path]) -> None:
    run = make_run("qwen2", **{"rotation.r1": "online"})
    with pytest.raises(InputError, match=r"needs R1 online \(a rotation before q, k, v, gate and up\), which GPTQ"):
        export(run, "gptq")
    assert not (run / "exports").exists()
