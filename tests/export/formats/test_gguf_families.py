"""GGUF of other architectures than llama: stock transformers, or our reader where it has none, computes the run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

import rotoboa
from rotoboa.boa.scheme import QuantizationArgs, QuantizationScheme
from rotoboa.errors import InputError
from rotoboa.export.finished import Finished
from rotoboa.export.formats import gguf, gguf_reader
from rotoboa.export.formats.gguf_architectures import ARCHITECTURES, context
from rotoboa.export.ggml.gguf_types import stored_in
from rotoboa.export.runtimes.in_transformers import load
from rotoboa.models.aliases import TINY_FOLDER
from rotoboa.pipeline.verifying import run_logits

SIZES = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4}
# What llama.cpp does not compute otherwise, or what this project's tests of the families have of their own.
OTHERWISE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "mixtral": {"sliding_window": None},
    "qwen2": {"sliding_window": 64, "head_dim": 16},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 64},
    "qwen2_moe": {"mlp_only_layers": [], "num_hidden_layers": 2, "moe_intermediate_size": 64, "sliding_window": 64},
    "olmoe": {"num_key_value_heads": 4, "norm_topk_prob": False},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 0.5},
    "opt": {},
}
SYMMETRIC = {"weights.symmetric": True, "weights.bits": 8}
GROUPS = {"weights.bits": 4, "weights.group_size": 32}


@pytest.fixture
def make_run(
    save_family: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> Callable[..., Finished]:
    """make_run("gemma2", {"weights.bits": 4}, head_dim=32): a run rounded to nearest, with a byte-level tokenizer."""

    def make(name: str, changes: dict[str, Any], **config: Any) -> Finished:
        model = save_family(tmp_path / "model", name, torch.bfloat16, **(SIZES | OTHERWISE[name] | config))
        AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(model)
        fixed = {"model": str(model), "output": tmp_path / "run", "weights.method": "rtn", "evaluation.baseline": False}
        rotoboa.quantize(make_recipe("w4a16", fixed | {"calibration.sequence_length": 32} | changes))
        return Finished.open(tmp_path / "run" / "model", sorted((tmp_path / "run" / "blocks").iterdir()))

    return make


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_readers_compute_what_was_run(make_run: Callable[..., Finished], tmp_path: Path, name: str) -> None:
    """With biases, windows, soft caps, QK-norm, merged parts and experts; an odd width where weights have no groups."""
    symmetric = name in ("llama", "mixtral", "qwen3", "gemma2", "phi3")
    run = make_run(name, SYMMETRIC if symmetric else GROUPS, **({} if symmetric else {"intermediate_size": 96}))
    folder = tmp_path / "export"
    gguf.write(run, folder)
    gguf_reader.inspect(folder)
    ids = torch.randint(3, 2048, (1, min(40, context(run))), generator=torch.Generator().manual_seed(1))
    expected = run_logits(run, ids, plain=True)
    models = {"ours": gguf_reader.read(folder)}
    if gguf_reader.is_stock(folder):
        models["transformers"], _ = load(str(folder), torch.float32)
    assert len(models) == (1 if name in ("mixtral", "olmoe") else 2)
    for reader, model in models.items():
        difference = float((model(ids).logits - expected).abs().max() / expected.std())
        assert difference < (1e-5 if symmetric else 0.02), reader


def test_what_the_file_says(make_run: Callable[..., Finished], tmp_path: Path) -> None:
    run = make_run("gemma3_text", SYMMETRIC)
    gguf.write(run, tmp_path / "export")
    reader = GGUFReader(gguf_reader.inspect(tmp_path / "export"))
    expected = {
        "attention.sliding_window": 9, "attention.sliding_window_pattern": [True, False, True],
        "rope.freq_base": 5000.0, "rope.freq_base_swa": 100.0,
        "rope.scaling.factor": 4.0, "rope.scaling.type": "linear", "context_length": 256,
    }  # fmt: skip
    for key, value in expected.items():
        field = reader.get_field(f"gemma3.{key}")
        assert field is not None and field.contents() == value, key
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    norm = run.block(1)["pre_feedforward_layernorm.weight"].float()
    assert torch.equal(stored["blk.1.ffn_norm.weight"], norm + 1)


def test_a_window_that_the_reader_lacks_ends_the_context(make_run: Callable[..., Finished], tmp_path: Path) -> None:
    run = make_run("mistral", SYMMETRIC, sliding_window=48)
    gguf.write(run, tmp_path / "export")
    field = GGUFReader(gguf_reader.inspect(tmp_path / "export")).get_field("llama.context_length")
    assert field is not None and field.contents() == 48
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 48)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        (
            "gemma2",
            {"query_pre_attn_scalar": 24},
            "computes with query_pre_attn_scalar 16, and this model has 24",
        ),
        ("gemma2", {"tie_word_embeddings": False}, "gemma2 takes the embedding for the head"),
        ("qwen3", {"attention_bias": True}, "qwen3 computes with attention_bias False, and this model has True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob True, and this model has False: use --format native"),
        ("olmoe", {"num_key_value_heads": 2}, "olmoe computes with num_key_value_heads 4, and this model has 2: use"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "has experts in every block, and this model has not: use --format nat"),
        (
            "opt",
            {"word_embed_proj_dim": 64},
            "GGUF is written for llama, .*phi3, and this is a 'opt': use --form",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    make_run: Callable[..., Finished], tmp_path: Path, name: str, config: dict[str, Any], words: str
) -> None:
    run = make_run(name, SYMMETRIC, **config)
    with pytest.raises(InputError, match=words):
        gguf.write(run, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "phi3"])
def test_parts_of_one_tensor_have_one_type(make_run: Callable[..., Finished], tmp_path: Path, name: str) -> None:
    """Experts and merged projections: blocks in 16 bits beside others are right, parts that differ are refused."""
    run = make_run(name, SYMMETRIC | {"overrides": "blocks 0: weights.bits=16"})
    gguf.write(run, tmp_path / "export")
    ids = torch.randint(3, 2048, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = run_logits(run, ids, plain=True)
    difference = (gguf_reader.read(tmp_path / "export")(ids).logits - expected).abs().max()
    assert difference < 1e-4 * expected.std()
    part = next(part for part in run.family.projections if stored_in(run.family, part) != part)
    scheme = QuantizationScheme(QuantizationArgs(4, None, True))
    layers = {**run.spec.layers, f"{run.family.layers}.1.{part}": scheme}
    mixed = replace(run, spec=replace(run.spec, layers=layers))
    with pytest.raises(InputError, match="of block 1 in one tensor, of one type"):
        gguf.check(mixed)
