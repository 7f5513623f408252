"""LoRA on a loaded run: it learns through rotations and quantizers, is saved, loaded again, and generates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rotoboa
from rotoboa.export.runtime.linear import QuantizedLinear

peft = pytest.importorskip("peft")

Run = Callable[..., Path]
IDS = torch.randint(2, 2048, (4, 16), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}


def _config(**changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_alpha": 8, **changes})


def _loss(model: nn.Module, **options: Any) -> Tensor:
    result: Tensor = model(IDS, labels=IDS, **options).loss
    return result


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("recipe", ["w4a4kv4", "w4a16"])
def test_an_adapter_learns_is_saved_and_loaded(cheap_run: Run, recipe: str, use_cache: bool, tmp_path: Path) -> None:
    run = cheap_run(recipe)
    model = peft.get_peft_model(rotoboa.load(run, dtype=torch.float32)[0], _config())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, rotoboa.load(run, dtype=torch.float32)[0](IDS).logits)
    trained = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 14, "two matrices at each of seven layers of two blocks"
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    model.train()
    for _ in range(6):
        loss = _loss(model, use_cache=use_cache)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    model.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(rotoboa.load(run, dtype=torch.float32)[0], tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY).shape == (4, 20)


def test_the_gradient_is_that_of_the_weights(cheap_run: Run) -> None:
    model, _ = rotoboa.load(cheap_run("w4a4kv4"), dtype=torch.float64)
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantizedLinear) and layer.transform.rotation is not None
    x = torch.randn(3, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = layer(x)
    assert torch.equal(y, layer(x.detach()))
    (found,) = torch.autograd.grad(y.sum(), x)
    plain = x.detach().requires_grad_()
    exact = layer.transform.rotate(plain) @ layer.dequantize(torch.float64).T
    torch.testing.assert_close(found, torch.autograd.grad(exact.sum(), plain)[0])


def test_gradients_reach_keys_and_values(cheap_run: Run) -> None:
    """With the cache, which packs them, and without it they are the same, to a sum's order."""
    model = peft.get_peft_model(
        rotoboa.load(cheap_run("w4a4kv4"), dtype=torch.float64)[0], _config(init_lora_weights=False)
    )
    names = [name for name, _ in model.named_parameters() if "k_proj.lora_A" in name or "v_proj.lora_A" in name]
    weights = [model.get_parameter(name) for name in names]
    found, expected = (torch.autograd.grad(_loss(model, use_cache=cache), weights) for cache in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error"), [({"use_dora": True}, RuntimeError), ({"init_lora_weights": "pissa"}, TypeError)]
)
def test_what_needs_the_weights_fails(cheap_run: Run, change: dict[str, Any], error: type[Exception]) -> None:
    model, _ = rotoboa.load(cheap_run("w4a16"))
    with pytest.raises(error):
        peft.get_peft_model(model, _config(**change))


def test_merging_is_refused(cheap_run: Run) -> None:
    model = peft.get_peft_model(rotoboa.load(cheap_run("w4a16"))[0], _config(target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="must match the size"):
        model.merge_and_unload()
