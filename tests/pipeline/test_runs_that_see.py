"""Models that see through whole runs: calibrated on text, loaded as the class they came with, given an image."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import rotoboa
from rotoboa.boa.online.attention import NAME
from rotoboa.errors import InputError
from rotoboa.export.formats.compressed_tensors_reader import inspect
from rotoboa.export.runtime.linear import QuantizedLinear
from rotoboa.models.checkpoint import Checkpoint
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES, family_for
from rotoboa.models.layout import split_tensors
from rotoboa.models.shape import Shape
from rotoboa.pipeline.estimate.plan import plan
from rotoboa.pipeline.exporting import export
from rotoboa.tests.seen import AT, LENGTH, inputs, llama4_runs  # noqa: F401 (a fixture)
from rotoboa.tests.small_families import SEEING, family_config, make_family

SMALL = {"calibration.samples": 4, "calibration.sequence_length": 40, "evaluation.windows": 3}
CLASSES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
# By recipe: its fields, and how far from full precision the logits may be, as a share of them.
RECIPES: dict[str, tuple[dict[str, Any], float]] = {
    "w8a8": ({"activations.bits": 16, "weights.method": "rtn", "evaluation.baseline": False}, 0.03),
    "w4a4kv4": ({}, 0.6),
}


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "w8a8") for name in SEEING), ("gemma3", "w4a4kv4"), ("qwen3_vl", "w4a4kv4")]
)
def test_it_sees_what_full_precision_sees(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path, name: str, recipe: str
) -> None:
    fields, limit = RECIPES[recipe]
    checkpoint, run = save_family(tmp_path / "model", name), tmp_path / "run"
    (checkpoint / "preprocessor_config.json").write_text('{"size": 16}')
    rotoboa.quantize(make_recipe(recipe, {"model": str(checkpoint), "output": run, **SMALL, **fields}))
    original, seen = make_family(name, attention="sdpa"), inputs(name)
    expected = original(**seen).logits
    blind = original(**{**seen, "pixel_values": torch.zeros_like(seen["pixel_values"])}).logits

    model, _ = rotoboa.load(run, dtype=torch.float32)
    assert type(model).__name__ == CLASSES[name.partition("-")[0]] == type(original).__name__
    logits = model(**seen).logits
    for part in (slice(0, AT.start), AT, slice(AT.stop, LENGTH)):
        assert 1e-4 < _error(logits[:, part], expected[:, part]) < limit
    if recipe == "w8a8":
        assert _error(logits, expected) < 0.1 * _error(blind, expected)
    generated = model.generate(**seen, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, LENGTH + 4)

    config = model.config
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == (NAME, "sdpa")
    decoder, packed = family_for(config, "it"), [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert packed and all(module.startswith(f"{decoder.layers}.") for module in packed)
    stored, own = load_file(run / "model" / "model.safetensors"), original.state_dict()
    assert decoder.sight is not None
    turned = {key for key in own if key.startswith(decoder.sight.prefixes) and not torch.equal(stored[key], own[key])}
    spec = json.loads((run / "model" / "config.json").read_text())["quantization_config"]
    merged = spec["r1"] and not spec["online_r1"]
    assert turned == {key for key in own if merged and decoder.sight.writes(key)}
    assert (run / "model" / "preprocessor_config.json").is_file()

    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert (again(**seen).logits - logits).abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", [*SEEING])
def test_names_on_disk_are_read(save_family: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Those that transformers writes, which are the hub's; blocks compute what the whole class does."""
    checkpoint = Checkpoint(save_family(tmp_path, name))
    decoder, outer = Decoder(checkpoint.config, attention=NAME), checkpoint.outer_layers()
    checkpoint.check(decoder.shapes)
    tied = {"lm_head.weight"} if decoder.tied else set()
    if not decoder.family.fused:
        assert set(decoder.shapes) - tied == set(checkpoint.names) - tied
    assert not checkpoint.notices(decoder.shapes)
    tokens = torch.randint(3, 90, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    hidden = decoder.embed(outer, tokens)
    for index in range(decoder.shape.blocks):
        hidden = decoder.run(decoder.block(index, checkpoint.block(index)), hidden)
    expected = make_family(name)(tokens, use_cache=False).logits
    torch.testing.assert_close(decoder.logits(outer)(hidden), expected, rtol=1e-4, atol=1e-4)


def test_fused_experts_are_read_either_way_round(
    save_family: Callable[..., Path], change_tensors: Callable[..., Path], tmp_path: Path
) -> None:
    """The hub's are (experts, in, out), and those that transformers makes and saves (experts, out, in)."""
    folder = save_family(tmp_path, "qwen3_vl_moe")
    checkpoint = Checkpoint(folder)
    shapes, block = Decoder(checkpoint.config).shapes, checkpoint.block(0)

    def turn(tensors: dict[str, Tensor]) -> None:
        tensors |= {key: tensor.mT.contiguous() for key, tensor in tensors.items() if ".experts." in key}

    turned = Checkpoint(change_tensors(folder, turn))
    turned.check(shapes)
    assert not turned.notices(shapes)
    found = turned.block(0)
    assert found.keys() == block.keys() and all(torch.equal(found[key], block[key]) for key in block)
    stem = "model.language_model.layers.0.mlp.experts"
    change_tensors(folder, lambda tensors: tensors.update({f"{stem}.down_proj": torch.zeros(4, 32, 47)}))
    with pytest.raises(InputError, match=r"down_proj has shape \(4, 32, 47\), and config.json asks for \(4, 32, 48\)"):
        Checkpoint(folder).check(shapes)


def test_experts_that_a_family_may_have_fused_are_read_both_ways(
    save_family: Callable[..., Path], change_tensors: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_family(tmp_path, "qwen3_5_moe")
    checkpoint = Checkpoint(folder)
    shapes, block = Decoder(checkpoint.config).shapes, checkpoint.block(1)

    def fuse(tensors: dict[str, Tensor]) -> None:
        for i in range(2):
            stem = f"model.language_model.layers.{i}.mlp.experts"
            parts = [
                [tensors.pop(f"{stem}.{n}.{part}_proj.weight") for part in ("gate", "up", "down")] for n in range(4)
            ]
            tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(part[:2]) for part in parts])
            tensors[f"{stem}.down_proj"] = torch.stack([part[2] for part in parts])

    fused = Checkpoint(change_tensors(folder, fuse))
    fused.check(shapes)
    found = fused.block(1)
    assert found.keys() == block.keys() and all(torch.equal(found[key], block[key]) for key in block)


def test_fused_experts_of_which_one_tensor_is_square() -> None:
    """Its shape says nothing of which way round it is; that of the other one does."""
    family, shape = FAMILIES["qwen3_vl_moe"], Shape(1, 8, 4, 2, 2, 4, 16, experts=2)
    family = replace(family, expert_count=shape.experts)
    draw = torch.Generator().manual_seed(0)
    both, down = torch.randn(2, 8, 8, generator=draw), torch.randn(2, 8, 4, generator=draw)
    names = [f"{family.experts}.{part}_proj" for part in ("gate_up", "down")]
    upright = split_tensors(dict(zip(names, (both, down), strict=True)), family, shape)
    turned = split_tensors(dict(zip(names, (both.mT, down.mT), strict=True)), family, shape)
    assert torch.equal(upright[f"{family.expert(1)[0]}.weight"], both[1, :4])
    assert all(torch.equal(turned[name], tensor) for name, tensor in upright.items())


@pytest.mark.parametrize("flat", [False, True])
def test_a_tied_model_that_is_turned_is_untied_wherever_its_config_says(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path, flat: bool
) -> None:
    """Older configs have the field in `text_config`, from where transformers takes it up again, or are flat."""
    folder = save_family(tmp_path / "model", "qwen2_5_vl")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["tie_word_embeddings"]
    config["text_config"]["tie_word_embeddings"] = True
    if flat:
        text = config.pop("text_config")
        del text["model_type"]
        config |= text
    file.write_text(json.dumps(config))
    fields, _ = RECIPES["w8a8"]
    rotoboa.quantize(make_recipe("w8a8", {"model": str(folder), "output": tmp_path / "run", **SMALL, **fields}))
    model, _ = rotoboa.load(tmp_path / "run", dtype=torch.float32)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    assert not torch.equal(head.weight, embedding.weight)
    original, seen = make_family("qwen2_5_vl", attention="sdpa"), inputs("qwen2_5_vl")
    with torch.no_grad():
        assert _error(model(**seen).logits, original(**seen).logits) < 0.03
    inspect(export(tmp_path / "run", "compressed-tensors"))


def test_the_plan_counts_the_decoder_and_the_files_all(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Layers of towers have the names that a decoder's have, and are not quantized."""
    folder, run = save_family(tmp_path / "model", "gemma3"), tmp_path / "run"
    recipe = make_recipe("w4a16", {"model": str(folder), "output": run, **SMALL, "weights.method": "rtn"})
    planned = plan(recipe)
    rotoboa.quantize(recipe)
    model, _ = rotoboa.load(run)
    decoder = Decoder(Checkpoint(folder).config)
    assert planned["model"]["parameters"] == sum(p.numel() for p in make_family("gemma3").parameters())
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert planned["model"]["quantized_parameters"] == sum(m.in_features * m.out_features for m in layers)
    assert len(layers) == 7 * decoder.shape.blocks
    held = sum(tensor.nbytes for tensor in load_file(run / "model" / "model.safetensors").values())
    assert planned["sizes"]["quantized"] == held


def test_online_rotations_are_refused_for_what_sees(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """vLLM finds the layers that they are for by how names end, and those of towers end so too."""
    folder, fields = save_family(tmp_path / "model", "qwen2_5_vl"), {"rotation.r4": True, "weights.method": "rtn"}
    rotoboa.quantize(make_recipe("w4a16", {"model": str(folder), "output": tmp_path / "run", **SMALL, **fields}))
    with pytest.raises(
        InputError, match=r"needs R4 \(an online rotation before down\), which compressed-tensors cannot"
    ):
        export(tmp_path / "run", "compressed-tensors")


def test_another_decoder_is_refused() -> None:
    config = family_config("mistral3")
    config.text_config = family_config("llama")
    with pytest.raises(InputError, match=r"'mistral3' model whose decoder is a 'llama', and mistral or ministral3 is"):
        family_for(config, "it")


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "qwen3_5"])
def test_stock_transformers_sees_what_native_does(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """In the compressed-tensors format, whose readers leave alone what sees; other formats are refused by name."""
    run, folder = tmp_path / "run", save_family(tmp_path / "model", name)
    settings = make_recipe("w4a16", {"model": str(folder), "output": run, **SMALL, "evaluation.baseline": False})
    rotoboa.quantize(settings)
    exported, seen = export(run, "compressed-tensors"), inputs(name)
    native, _ = rotoboa.load(run, dtype=torch.float32)
    stock: Any = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    assert type(stock) is type(native)
    expected = native(**seen).logits
    torch.testing.assert_close(stock(**seen).logits, expected, rtol=0, atol=0.01 * float(expected.std()))
    ignored = set(json.loads((exported / "config.json").read_text())["quantization_config"]["ignore"])
    assert sum(module.startswith("re:") for module in ignored) == (name == "qwen3_5"), (
        "what decides how long it remembers"
    )
    named = (module for module in ignored if not module.startswith("re:"))
    towers = {module for module in named if isinstance(native.get_submodule(module), nn.Linear)}
    assert len(towers) > 4 and not any("language_model" in module for module in towers)
    assert "AutoModelForImageTextToText.from_pretrained" in (exported / "README.md").read_text()
    for format_name, words in {"gptq": "'%s' sees: use", "mlx": "this is a '%s'", "gguf": "this is a '%s'"}.items():
        with pytest.raises(InputError) as caught:
            export(run, format_name)
        assert words % name in str(caught.value) or f"'{name}' has other parts" in str(caught.value)
