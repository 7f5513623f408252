"""Other formats than native: written for families whose readers find every part, refused for the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rotoboa
from rotoboa.errors import InputError
from rotoboa.pipeline.exporting import export

SMALL = {
    **{"calibration.sequence_length": 40, "evaluation.windows": 2, "evaluation.baseline": False},
    "weights.method": "rtn",  # what a format holds does not depend on how it was rounded
}


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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("phi3", "and 'phi3' has other parts: use --format native"),
        ("opt", "and 'opt' has other parts: use --format native"),
        ("mixtral", "and 'mixtral' has other parts: use --format native"),
    ],
)
def test_others_are_refused(make_run: Callable[..., Path], name: str, words: str) -> None:
    run = make_run(name)
    for format_name in ("compressed-tensors", "gptq"):
        with pytest.raises(InputError) as caught:
            export(run, format_name)
        assert words in str(caught.value)
        assert not (run / "exports").exists()


def test_r1_behind_the_norms_is_refused_by_gptq(make_run: Callable[..., Path]) -> None:
    run = make_run("qwen2", **{"rotation.r1": "online"})
    with pytest.raises(InputError, match=r"needs R1 online \(a rotation before q, k, v, gate and up\), which GPTQ"):
        export(run, "gptq")
    assert not (run / "exports").exists()
