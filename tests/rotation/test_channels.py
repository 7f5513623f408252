"""Scales of input channels: which sites can have them, and which values; that they are exact is a test of families."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rotoboa.models.families import FAMILIES, SITES, Family
from rotoboa.models.shape import Shape
from rotoboa.rotation.channels import absorbable, obstacle, readers, scale_channels, ties

LLAMA, OPT, GEMMA = (FAMILIES[name] for name in ("llama", "opt", "gemma2"))
SHAPE = Shape(blocks=1, hidden=8, ffn=6, query_heads=4, key_heads=2, head_dim=2, vocabulary=10)


def test_a_value_channel_has_one_scale_for_its_group() -> None:
    """Channels of O: heads 0 and 1 read value head 0, heads 2 and 3 value head 1."""
    tie = ties(SHAPE, "output")
    assert tie is not None and tie.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert all(ties(SHAPE, site) is None for site in SITES if site != "output")
    plain = ties(replace(SHAPE, key_heads=4), "output")
    assert plain is not None and plain.tolist() == list(range(8))


def test_worked_example() -> None:
    tensors = {
        "input_layernorm.weight": torch.tensor([1.0, 2.0]),
        **{f"self_attn.{name}_proj.weight": torch.tensor([[6.0, 8.0]]) for name in "qkv"},
        "self_attn.v_proj.bias": torch.tensor([5.0]),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    changed = scale_channels(tensors, LLAMA, SHAPE, "qkv", torch.tensor([2.0, 0.5]))
    assert {name: tensor.tolist() for name, tensor in changed.items()} == {
        "input_layernorm.weight": [2.0, 1.0],
        **{f"self_attn.{name}_proj.weight": [[3.0, 16.0]] for name in "qkv"},
    }
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize("family", [LLAMA, GEMMA], ids=lambda family: family.model_type)
def test_a_norm_takes_what_bfloat16_holds(family: Family) -> None:
    offset = family.norm_offset
    generator = torch.Generator().manual_seed(0)
    name = "input_layernorm.weight"
    stored = torch.randn(64, generator=generator) * 0.2 + 1 - offset  # of a float32 checkpoint: bfloat16 holds none
    stored[3] = -offset  # a dead channel
    zeta = (0.3 * torch.randn(64, generator=generator)).exp()
    found = absorbable({name: stored}, family, "qkv", zeta)
    assert found[3] == 1 and (found > 0).all()
    alive = torch.arange(64) != 3
    assert ((found / zeta)[alive].log().abs() < (2**-6 if offset else 2**-8)).all()
    new = ((stored + offset) * found - offset)[alive]
    assert ((new - new.bfloat16().float()).abs() < 1e-6).all()
    assert torch.equal(absorbable({name: stored}, family, "output", zeta), zeta)


def test_what_stands_in_between_is_named() -> None:
    relu, gelu = SimpleNamespace(activation_function="relu"), SimpleNamespace(activation_function="gelu")
    off = {"online_r1": False, "heads": False, "r4": False}
    on, behind = {**off, "r4": True}, {**off, "online_r1": True}
    assert [site for site in SITES if obstacle(LLAMA, SimpleNamespace(), site, **off)] == []
    assert obstacle(LLAMA, SimpleNamespace(), "down", **on) == "R4 runs online between mlp.up_proj and mlp.down_proj"
    assert [site for site in SITES if obstacle(OPT, relu, site, **off)] == []
    assert obstacle(OPT, gelu, "down", **off).startswith("gelu stands between fc1 and fc2")
    assert [site for site in SITES if obstacle(GEMMA, SimpleNamespace(), site, **behind)] == ["qkv", "gate_up"]
    assert "R1 runs online" in obstacle(GEMMA, SimpleNamespace(), "gate_up", **behind)
    assert "all heads" in obstacle(LLAMA, SimpleNamespace(), "output", **{**off, "heads": True})
    mixtral = replace(FAMILIES["mixtral"], expert_count=2)
    assert [site for site in SITES if obstacle(mixtral, SimpleNamespace(), site, **off)] == ["gate_up", "down"]
    assert readers(OPT, "gate_up") == ("fc1",)
    assert readers(mixtral, "gate_up")[-1] == mixtral.router
