"""The diagonal that balances a site: least noise, by its formula and as it is measured; what is dead, and who can."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.online.attention import NAME, set_attention
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES
from rotoboa.models.shape import Shape
from rotoboa.rotation.balance import BOUND, STORED, Moments, balance, balanced_sites, moments, scales
from rotoboa.rotation.channels import key_ties, scale_channels
from rotoboa.rotation.hadamard import Hadamard
from rotoboa.tests.boa.small_block import block_tensors
from rotoboa.tests.small_families import make_family

SHAPE = Shape(blocks=1, hidden=6, ffn=6, query_heads=4, key_heads=2, head_dim=8, vocabulary=9)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_no_other_diagonal_has_less_noise() -> None:
    energy, moment = random(24, seed=0).exp(), random(24, seed=1).exp()

    def noise(t: Tensor) -> float:
        return float((energy / t.square()).sum() * (moment * t.square()).sum())

    found = balance(energy, moment)
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-12), "of geometric mean 1"
    assert noise(found) == pytest.approx(float((energy * moment).sqrt().sum()) ** 2, rel=1e-12)  # Cauchy-Schwarz
    assert noise(found) < noise(torch.ones(24))
    for seed in range(20):
        assert noise(found * (0.1 * random(24, seed=2 + seed)).exp()) > noise(found)


def test_it_lowers_the_noise_of_rounded_inputs() -> None:
    """Four bits by token behind a Hadamard rotation: the error of the outputs, with the diagonal and without."""
    x, weight = random(500, 64, seed=0) * random(64, seed=1).exp(), random(48, 64, seed=2) * random(64, seed=3).exp()
    rotation = Hadamard.of(64)

    def error(t: Tensor) -> float:
        turned = rotation.apply(x * t)
        step = turned.abs().amax(-1, keepdim=True) / 7
        return float((((turned / step).round() * step - turned) @ rotation.apply(weight / t).T).square().sum())

    t = balance(weight.square().sum(0), x.square().mean(0))
    assert error(t) < 0.7 * error(torch.ones(64))


def test_dead_channels_stay_and_extremes_are_bounded() -> None:
    energy, moment = torch.tensor([1.0, 0, 1, 1e30, 1]).double(), torch.tensor([1.0, 1, 0, 1e-30, 1]).double()
    found = balance(energy, moment)
    assert found[1] == found[2] == 1 and found.min() >= 1 / BOUND and found.max() == BOUND
    assert torch.equal(balance(torch.zeros(3), torch.ones(3)), torch.ones(3))


def test_a_massive_token_counts_as_the_others() -> None:
    block = nn.Module()
    block.o = nn.Linear(6, 2)
    family = replace(FAMILIES["llama"], output="o")
    seen = Moments(family, block, ("output",), set_attention, centered=False)
    x = random(2, 5, 6, seed=0).float()
    x[0, 0] *= 1000
    for part in x:
        block.o(part[None])
    flat = x.double().flatten(0, 1)
    expected = sum(token.square() / token.square().mean() for token in flat) / len(flat)
    torch.testing.assert_close(seen.value()["output"], expected, rtol=1e-5, atol=1e-6)
    block.o(x[:1] * 0)  # looked at no longer
    torch.testing.assert_close(seen.value()["output"], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_input_of_experts_counts_once_for_each_that_reads_it() -> None:
    """As a loop over tokens sums them: its experts, and the shared one, which all tokens go to."""
    model = make_family("qwen2_moe")
    decoder = Decoder(model.config, attention=NAME)
    block, x = decoder.block(0, block_tensors(model, decoder, 0)), random(3, 9, 32, seed=0).float()
    family, routed = decoder.family_of(block), list[tuple[Tensor, Tensor]]()
    router = block.get_submodule(str(family.router))
    router.register_forward_hook(lambda _, args, out: routed.extend(zip(args[0], out[2], strict=True)))
    found = moments(decoder, block, x, ("gate_up",), 2, set_attention, centered=False)
    seen = []
    for token, experts in routed:
        seen += [token.double().square() / token.double().square().mean()] * (len(experts) + 1)
    assert len(seen) == 27 * 3
    torch.testing.assert_close(found["gate_up"], sum(seen) / len(seen), rtol=1e-5, atol=1e-6)


def test_which_sites_can_take_scales() -> None:
    none, relu, gelu = (SimpleNamespace(activation_function=name) for name in (None, "relu", "gelu"))
    llama, opt = FAMILIES["llama"], FAMILIES["opt"]
    assert balanced_sites(llama, none, folded=False) == ("qkv", "output", "gate_up", "down")
    assert balanced_sites(llama, none, folded=True) == ("output", "down")
    assert balanced_sites(llama, none, folded=True, keys=True) == ("output", "down", "keys", "queries")
    assert balanced_sites(opt, relu, folded=True) == ("output", "down")
    assert balanced_sites(opt, gelu, folded=False) == ("qkv", "output", "gate_up")
    mixtral = replace(FAMILIES["mixtral"], expert_count=2)
    downs = ("mlp.experts.0.down_proj", "mlp.experts.1.down_proj")
    assert balanced_sites(mixtral, none, folded=False) == ("qkv", "output", "gate_up", *downs)


def _heads(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of `x` (tokens, 6), (heads, tokens, 8), keys once for every query head."""
    q, k = (x @ tensors[f"self_attn.{name}_proj.weight"].T for name in "qk")
    return q.unflatten(-1, (4, 8)).transpose(0, 1), k.unflatten(-1, (2, 8)).transpose(0, 1).repeat_interleave(2, 0)


def test_balanced_keys_lose_less_and_logits_nothing() -> None:
    """Rounded to four bits a key, behind a Hadamard rotation; channels that RoPE turns together share a scale."""
    family, x, tie = FAMILIES["llama"], random(300, 6, seed=0), key_ties(8, 6)
    assert torch.equal(tie, torch.tensor([0, 1, 2, 0, 1, 2, 6, 7]))
    sizes = {
        name: (1.5 * random(heads, 8, seed=heads)[:, tie]).exp().view(-1, 1) for name, heads in (("q", 4), ("k", 2))
    }
    rows = {name: random(len(size), 6, seed=5) * size for name, size in sizes.items()}
    tensors = {f"self_attn.{name}_proj.weight": weight for name, weight in rows.items()}
    found = {
        "keys": (x @ rows["k"].T).square().mean(0).view(2, 8),
        "queries": (x @ rows["q"].T).square().mean(0).view(4, 8),
    }
    chosen = scales(tensors, family, SHAPE, found, rotary=6)
    for scale in (part for name in ("keys", "queries") for part in chosen[name].view(-1, 8)):
        assert torch.equal(scale[:3], scale[3:6]) and scale.unique().numel() == 5
    scaled = tensors
    for site in ("keys", "queries"):
        scaled = {**scaled, **scale_channels(scaled, family, SHAPE, site, chosen[site])}
    rotation = Hadamard.of(8)

    def lost(tensors: dict[str, Tensor]) -> Tensor:
        q, k = (rotation.apply(part) for part in _heads(tensors, x))
        step = k.abs().amax(-1, keepdim=True) / 7
        return (q @ ((k / step).round() * step - k).transpose(1, 2)).square().sum()

    (q, k), (q_scaled, k_scaled) = _heads(tensors, x), _heads(scaled, x)
    torch.testing.assert_close(q_scaled @ k_scaled.transpose(1, 2), q @ k.transpose(1, 2), rtol=1e-12, atol=1e-11)
    assert lost(scaled) < 0.7 * lost(tensors)


def test_norms_of_heads_take_scales_that_bfloat16_holds() -> None:
    """All heads share a norm, and so a scale; a pair that one of its four multipliers cannot store well has none."""
    family = FAMILIES["gemma3_text"]
    weights = {f"self_attn.{name}_norm.weight": random(8, seed=i) for i, name in enumerate("qk")}
    weights["self_attn.q_norm.weight"][:3] = torch.tensor([-0.999, 0.5, 2.0])  # 1 + w is nearly dead in the first
    norms = {name: weight.bfloat16().double() for name, weight in weights.items()}
    found = {"keys": random(1, 8, seed=2).exp(), "queries": random(1, 8, seed=3).exp()}
    chosen = scales(norms, family, SHAPE, found, rotary=8)
    keys, queries = chosen["keys"], chosen["queries"]
    assert keys.shape == queries.shape == (8,)
    assert keys[0] == keys[4] == queries[0] == queries[4] == 1, "a pair shares what it has"
    assert (keys[1:4] != 1).any()
    assert 0 < (keys * queries - 1).abs().max() < 2.01 * STORED, "nearly one over the other"
    assert (keys[:4] / keys[4:] - 1).abs().max() < 2.01 * STORED, "a pair has nearly one scale"
    for site in ("keys", "queries"):
        (taken,) = scale_channels(norms, family, SHAPE, site, chosen[site]).values()
        torch.testing.assert_close(taken, taken.bfloat16().double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_moments_of_queries_and_keys(centered: bool, shared: bool) -> None:
    """After RoPE, by head; of a token's key relative to the key, so that no massive one decides."""
    block = nn.Module()
    block.attention = nn.Module()
    family = replace(FAMILIES["llama"], attention="attention", key_norm="norm" if shared else None)
    recorders: list[Any] = []
    seen = Moments(
        family, block, ("keys", "queries"), lambda _, __, recorder: recorders.append(recorder), centered=centered
    )
    query, key = random(2, 4, 5, 8, seed=0), random(2, 2, 5, 8, seed=1) + 2 * random(2, 1, 8, seed=2)
    key[0, 0, 0] *= 1000
    for q, k in zip(query.float(), key.float(), strict=True):
        recorders[0](SimpleNamespace(query=q[None], key=k[None]))
    found = seen.value()
    assert recorders[1] is None and found.keys() == {"queries", "keys"}
    weight = 1 / key.square().mean(-1, keepdim=True)
    center = (weight * key).sum((0, 2)) / weight.sum((0, 2))
    left = key - center[:, None] if centered else key
    keys, queries = (weight * left.square()).mean((0, 2)), query.square().mean((0, 2))
    if shared:
        keys, queries = keys.mean(0, keepdim=True), queries.mean(0, keepdim=True)
    torch.testing.assert_close(found["queries"], queries, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["keys"], keys, rtol=1e-4, atol=1e-6)
