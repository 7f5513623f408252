"""Z-Fold inside a block: the full stream stays, what is stored is what runs, a finished block finds it again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.block.context import BlockResult
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import AttentionTransform
from rotoboa.boa.online.transforms import InputTransform, OnlineTransforms
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import SITES

from ..small_block import PLAIN, Ran, make_decoder, run_block

HIDDEN, SEQUENCES, LENGTH = 16, 6, 40
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 8},
    "opt": {"ffn_dim": 24, "num_key_value_heads": 2, "word_embed_proj_dim": HIDDEN, "dropout": 0.0},
    "gemma2": {"head_dim": 8, "sliding_window": 9},
}
QUICK = Settings(bits=2, refine=1, starts=1, tabu=0, zfold=SITES)


def _decoder(name: str) -> Decoder:
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_decoder(name, **(sizes | CONFIGS[name]))


def _block(decoder: Decoder) -> nn.Module:
    """Random tensors, input channels of very different size; norms and biases that are no 1 and no 0."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, like in decoder.empty_block(0).state_dict().items():
        noise = torch.randn(like.shape, generator=generator)
        if like.ndim == 1:
            start = 0.0 if "norm" not in name or name.endswith("bias") else 1.0 - decoder.family.norm_offset
            tensors[name] = start + 0.3 * noise
        else:
            sizes = (0.6 * torch.randn(like.shape[1], generator=generator)).exp()
            tensors[name] = 1.3 * noise * sizes / like.shape[1] ** 0.5
    return decoder.block(0, tensors)


def _streams() -> tuple[Tensor, Tensor]:
    full = torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(5))
    return full, full + 0.05


def _run(name: str, settings: Settings = QUICK, transforms: OnlineTransforms = PLAIN, **options: Any) -> Ran:
    decoder = _decoder(name)
    return run_block(decoder, _block(decoder), settings, transforms, _streams(), batch=4, **options)


def _relative(found: BlockResult) -> float:
    return sum(found.losses.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_full_stream_stays_and_losses_fall(name: str) -> None:
    plain, folded = _run(name, QUICK.but(zfold=())), _run(name)
    torch.testing.assert_close(folded.full, plain.full, rtol=0, atol=1e-4)
    assert list(folded.found.channel_scales) == list(SITES) and not plain.found.channel_scales
    assert all(found.loss <= found.without for found in folded.found.channel_scales.values())
    assert _relative(folded.found) < (0.97 if name == "opt" else 0.9) * _relative(plain.found)
    family, folds = folded.context.family, folded.found.folded
    expected = {f"{family.attention_norm}.weight", f"{family.mlp_norm}.weight"}
    assert expected <= set(folds)
    assert (f"{family.value}.bias" in folds, f"{family.up}.bias" in folds) == ((name in ("llama", "opt"),) * 2)
    assert not {f"{projection}.weight" for projection in family.projections} & set(folds)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_what_is_stored_is_what_runs(name: str) -> None:
    """A block made of the results and of `folded`, the rest as it was, gives the quantized stream."""
    ran, decoder = _run(name, QUICK.but(group_size=8)), _decoder(name)
    tensors = dict(_block(decoder).state_dict()) | ran.found.folded
    tensors |= {f"{projection}.weight": result.dequantize() for projection, result in ran.found.results.items()}
    _, quantized = _streams()
    block = decoder.block(0, tensors)
    with torch.no_grad():
        torch.testing.assert_close(decoder.run(block, quantized), ran.quantized, rtol=1e-5, atol=1e-5)
    for norm in (decoder.family.attention_norm, decoder.family.mlp_norm):
        stored = ran.found.folded[f"{norm}.weight"]
        torch.testing.assert_close(stored, stored.bfloat16().float(), rtol=1e-6, atol=0)


def test_a_finished_block_finds_its_scales_again() -> None:
    first = _run("llama")
    again = _run("llama", previous=first.found.results)
    assert torch.equal(again.full, first.full) and torch.equal(again.quantized, first.quantized)
    assert not again.found.losses


@pytest.mark.parametrize("site", SITES)
def test_a_site_alone(site: str) -> None:
    """The others keep their norms and biases."""
    ran = _run("llama", QUICK.but(zfold=(site,)))
    f = ran.context.family
    owners = {"qkv": f.attention_norm, "output": f.value, "gate_up": f.mlp_norm, "down": f.up}
    kind = "weight" if site in ("qkv", "gate_up") else "bias"
    assert list(ran.found.channel_scales) == [site] and list(ran.found.folded) == [f"{owners[site]}.{kind}"]


def test_methods_and_activations() -> None:
    """gptq has no H_out; learned rounding goes on from there; 4-bit activations and cache see the scaled channels."""
    plain = _relative(_run("llama", QUICK.but(method="gptq", zfold=())).found)
    found = {method: _run("llama", QUICK.but(method=method, iterations=20)).found for method in ("gptq", "adaround")}
    assert _relative(found["gptq"]) < plain and _relative(found["adaround"]) < plain
    for name in ("q_proj", "k_proj", "v_proj"):  # those after them are solved for other inputs
        first, learned = (found[method].losses[f"self_attn.{name}"] for method in ("gptq", "adaround"))
        assert learned <= first * (1 + 1e-6)
    scales = [one.channel_scales["qkv"].zeta for one in found.values()]
    assert torch.equal(*scales) and not torch.equal(scales[0], _run("llama").found.channel_scales["qkv"].zeta)
    tokens, cache = InputTransform(quantizer=DynamicQuantizer(4)), DynamicQuantizer(4, False)
    quantized = OnlineTransforms(tokens, tokens, tokens, tokens, AttentionTransform(None, cache, cache))
    unfolded, folded = _run("llama", QUICK.but(zfold=()), quantized), _run("llama", QUICK, quantized)
    torch.testing.assert_close(folded.full, unfolded.full, rtol=0, atol=1e-4)
    assert _relative(folded.found) < _relative(unfolded.found)


def test_values_that_are_not_finite_are_named() -> None:
    decoder = _decoder("llama")
    block = _block(decoder)
    block.get_parameter(f"{decoder.family.value}.weight").data *= 1e25
    full = torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(5))
    with pytest.raises(ValueError, match=r"^self_attn\.o_proj: its input in the .* holds NaN or Inf"):
        run_block(decoder, block, QUICK.but(zfold=("output",)), PLAIN, (full, full.clone()), batch=8)
