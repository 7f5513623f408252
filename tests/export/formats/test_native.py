"""A finished run, loaded by transformers, computes what was measured."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rotoboa
from rotoboa.boa.online.attention import NAME
from rotoboa.export.runtime import linear
from rotoboa.export.runtime.linear import QuantizedLinear
from rotoboa.export.runtime.prepared import packed_block
from rotoboa.export.spec import Spec
from rotoboa.models.decoder import Decoder

# Name: recipe, and what it changes. The small Llama has hidden 64 and ffn 96, so groups of 8, 16 and 32 divide both.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a4kv4": ("w4a4kv4", {}),
    "w2a16g16": ("w2a16", {"weights.group_size": 16}),
    "w4a16 symmetric": ("w4a16", {"weights.symmetric": True}),
    "w3a8kv2 asymmetric g8": (
        "w4a4kv4",
        {
            "weights.bits": 3,
            "weights.group_size": 8,
            "activations.bits": 8,
            "activations.symmetric": False,
            "cache.key_bits": 2,
            "cache.value_bits": 3,
        },
    ),
    "w3g8 a4g32": (
        "w4a4kv4",
        {"weights.bits": 3, "weights.group_size": 8, "activations.group_size": 32, "activations.symmetric": True},
    ),
    "w4a4g16 kept": ("w4a4", {"activations.group_size": 16, "activations.directions": 5}),
    "w8a8 symmetric": (
        "w4a4",
        {"weights.bits": 8, "weights.symmetric": True, "activations.bits": 8, "activations.symmetric": True},
    ),
    "w8a16 unrotated": ("w4a16", {"weights.bits": 8, "rotation.r1": False, "rotation.r2": False}),
    "w4a16 biased": ("w4a16", {"rotation.r4": True, "rotation.r3": True}),
}
BIASES = {"attention_bias": True, "mlp_bias": True}

Runs = Callable[[str], Path]


@pytest.fixture
def runs(cheap_run: Callable[..., Path]) -> Runs:
    """runs(setting): a finished run of the small Llama. Not to be changed."""

    def run(setting: str) -> Path:
        return cheap_run(*SETTINGS[setting], BIASES if "biased" in setting else None)

    return run


def streamed_logits(run: Path, ids: Tensor) -> Tensor:
    """As the evaluation computes them: block by block, in float32, from the blocks of the run."""
    outer = load_file(run / "model" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    decoder = Decoder(model.config, attention=NAME)
    spec = Spec.from_dict(json.loads((run / "model" / "config.json").read_text())["quantization_config"])
    hidden = outer["model.embed_tokens.weight"][ids].float()
    with torch.no_grad():
        for index in range(decoder.shape.blocks):
            tensors = load_file(run / "blocks" / f"{index:05}.safetensors")
            hidden = decoder.run(packed_block(decoder, index, tensors, spec), hidden)
        return decoder.norm(outer["model.norm.weight"])(hidden) @ outer["lm_head.weight"].float().T


def load(run: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(run / "model", **{"dtype": torch.float32, **options})


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    result: Tensor = model(ids, **options).logits
    return result


def tokens(*shape: int, seed: int = 0, vocabulary: int = 2048) -> Tensor:
    return torch.randint(2, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("setting", SETTINGS)
def test_loaded_model_computes_what_was_measured(runs: Runs, setting: str) -> None:
    run, ids = runs(setting), tokens(3, 50)
    found, expected = logits(load(run), ids), streamed_logits(run, ids)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4


def test_embedded_model_computes_what_was_measured(tiny_run: Path) -> None:
    ids = tokens(2, 80)
    assert (logits(load(tiny_run), ids) - streamed_logits(tiny_run, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("setting", ["w4a4kv4", "w8a8 symmetric", "w3g8 a4g32"])
def test_integers_give_the_logits_of_the_simulation(runs: Runs, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer does to rounding (test_linear); an activation on the edge of two levels then moves a token more."""
    model, ids = load(runs(setting)), tokens(4, 60)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    monkeypatch.setattr(linear, "fast_integers", lambda device: True)
    monkeypatch.setattr(linear, "_COLUMNS", 8)
    assert all(layer.counts(layer.transform.quantizer, ids.device) for layer in layers)
    found = logits(model, ids)
    monkeypatch.setattr(QuantizedLinear, "counts", lambda *_: False)
    expected = logits(model, ids)
    change = (found - expected).abs().amax(-1) / expected.std()
    assert 0 < change.median() < 1e-4
    assert (change > 1e-4).float().mean() < 0.25


def test_quantizers_are_on_in_the_loaded_model(runs: Runs) -> None:
    model = load(runs("w4a4kv4"))
    ids = tokens(1, 40)
    with_all = logits(model, ids)
    attention = model.model.layers[0].self_attn
    assert attention.rotoboa_transform.key.bits == 4 and attention.rotoboa_transform.rotation is not None
    assert model.model.layers[1].mlp.down_proj.transform.rotation is not None
    quantizers = attention.rotoboa_transform.value, attention.q_proj.transform.quantizer
    assert all(quantizer.search for quantizer in quantizers)
    changed = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            assert module.transform.quantizer is not None and module.transform.quantizer.bits == 4
            module.transform = type(module.transform)(module.transform.rotation)
            changed += 1
    assert changed == 14
    assert (logits(model, ids) - with_all).abs().max() > 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
def test_left_padding_changes_nothing(runs: Runs, setting: str) -> None:
    model = load(runs(setting))
    short, long = tokens(1, 20, seed=1), tokens(1, 33, seed=2)  # of which no activation is at the edge of two levels
    batch = torch.cat([nn.functional.pad(short, (13, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = logits(model, batch, attention_mask=mask, position_ids=positions)
    assert found.isfinite().all()
    for row, alone in enumerate((short, long)):
        expected = logits(model, alone)[0]
        assert (found[row, -alone.shape[1] :] - expected).abs().max() < 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
def test_cache_gives_the_greedy_tokens_of_no_cache(runs: Runs, setting: str) -> None:
    model, prompt = load(runs(setting)), tokens(2, 12)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    plain = prompt
    for _ in range(16):
        plain = torch.cat([plain, logits(model, plain)[:, -1:].argmax(-1)], 1)
    assert cached.shape == (2, 28)
    assert torch.equal(cached, plain)


def test_generation_with_left_padding(runs: Runs) -> None:
    model = load(runs("w2a16g16"))
    prompt = tokens(1, 9)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    padded = torch.cat([nn.functional.pad(prompt, (5, 0)), tokens(1, 14, seed=3)])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    together = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together[0, 14:], alone[0, 9:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(runs: Runs, dtype: torch.dtype) -> None:
    run, ids = runs("w4a16 symmetric"), tokens(1, 30)
    model = load(run, dtype=dtype)
    assert model.dtype == dtype and model.model.layers[0].self_attn.q_proj.scale.dtype == torch.float16
    found, expected = logits(model, ids), logits(load(run), ids)
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_another_dtype_leaves_the_scales_alone(runs: Runs) -> None:
    model, ids = load(runs("w4a16 symmetric"), dtype=torch.bfloat16), tokens(1, 30)
    expected = logits(load(runs("w4a16 symmetric")), ids)
    layer = model.model.layers[0].self_attn.q_proj
    scale = layer.scale.clone()
    model.to(torch.float32)
    assert layer.scale.dtype == torch.float16 and torch.equal(layer.scale, scale)
    assert model.dtype == torch.float32 and layer.qweight.dtype == torch.int32 and layer.zero.dtype == torch.uint8
    assert (logits(model, ids) - expected).abs().max() < 1e-5


def test_dtype_is_that_of_the_checkpoint_by_default(runs: Runs) -> None:
    assert AutoModelForCausalLM.from_pretrained(runs("w4a4kv4") / "model").dtype == torch.bfloat16


@pytest.mark.parametrize(("setting", "bits", "group"), [("w2a16g16", 2, 16), ("w4a4kv4", 4, None)])
def test_size_on_disk_is_that_of_the_formula(runs: Runs, setting: str, bits: int, group: int | None) -> None:
    tensors = load_file(runs(setting) / "model" / "model.safetensors")
    outer = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    # (outputs, inputs) of q, k, v, o, gate, up, down; two blocks.
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]
    words = 2 * sum(out * -(-inputs * bits // 32) * 4 for out, inputs in shapes)
    scales = 2 * sum(out * (inputs // (group or inputs)) * (2 + 1) for out, inputs in shapes)
    norms = 2 * 2 * 64 * 2
    centers = 2 * 32 * 2 if setting == "w4a4kv4" else 0
    assert words == 2 * sum(out * inputs for out, inputs in shapes) * 2 * bits // 16  # bits/16 of bfloat16
    inside = {name: tensor for name, tensor in tensors.items() if name not in outer}
    assert sum(tensor.numel() * tensor.element_size() for tensor in inside.values()) == words + scales + norms + centers
    assert all(tensors[name].dtype == torch.bfloat16 for name in outer)
    assert tensors["lm_head.weight"].shape == tensors["model.embed_tokens.weight"].shape == (2048, 64)


def test_tiny_model_takes_a_quarter_of_its_blocks(tiny_run: Path) -> None:
    # 688 columns are 86 words at 4 bits: nothing is padded, so the ratio is 4/16 and scales.
    original = load_file(Path(rotoboa.__file__).parent / "models" / "tiny" / "model.safetensors")
    packed = load_file(tiny_run / "model" / "model.safetensors")
    projections = [name for name in original if name.endswith("_proj.weight")]
    before = sum(original[name].numel() * 2 for name in projections)
    after = sum(
        packed[name.replace("weight", part)].numel() * packed[name.replace("weight", part)].element_size()
        for name in projections
        for part in ("qweight", "scale", "zero")
    )
    rows = sum(original[name].shape[0] for name in projections)
    assert after == before // 4 + rows * 3


@pytest.mark.parametrize("setting", ["w4a4kv4", "w2a16g16", "w4a16 biased"])
def test_saved_again_it_computes_the_same(runs: Runs, setting: str, tmp_path: Path) -> None:
    model, ids = load(runs(setting)), tokens(1, 30)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.float32
    assert torch.equal(logits(again, ids), logits(model, ids))
    ours = json.loads((runs(setting) / "model" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == ours


def test_sharded_export_loads(runs: Runs, tmp_path: Path) -> None:
    model, ids = load(runs("w2a16g16")), tokens(1, 20)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_another_attention_is_not_taken(runs: Runs, attention: str) -> None:
    """Scripts ask for one by habit: the model says so, and runs."""
    ids, message = tokens(1, 20), f"runs with attn_implementation='rotoboa', .* '{attention}' is not used"
    with pytest.warns(UserWarning, match=message):
        model = load(runs("w4a4kv4"), attn_implementation=attention)
    with pytest.warns(UserWarning, match=message):
        model.set_attn_implementation(attention)
    assert model.config._attn_implementation == NAME
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = load(runs("w4a4kv4"), attn_implementation="rotoboa")
        plain.set_attn_implementation("rotoboa")
    assert torch.equal(logits(model, ids), logits(plain, ids))


def test_load_gives_model_and_tokenizer(runs: Runs) -> None:
    run = runs("w2a16g16")
    ids = tokens(1, 20)
    for folder in (run, run / "model", str(run)):
        model, tokenizer = rotoboa.load(folder, dtype=torch.float32)
        assert torch.equal(logits(model, ids), logits(load(run), ids))
        text = "def main() -> None:"
        assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(run / "model")(text)["input_ids"]
        assert not model.training
