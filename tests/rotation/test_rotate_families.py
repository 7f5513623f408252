"""Rotations of every family: whole models of the real classes in float64, before and after."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.online.attention import NAME, AttentionTransform, set_attention
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES, SITES, family_for
from rotoboa.models.layout import split_modules
from rotoboa.models.outer_layers import OuterLayers
from rotoboa.rotation import channels
from rotoboa.rotation.balance import balanced_sites, moments, scales
from rotoboa.rotation.channels import absorbable, obstacle, readers, scale_channels
from rotoboa.rotation.rotate import Rotations, before_output
from rotoboa.tests.small_families import FAMILIES as SMALL
from rotoboa.tests.small_families import SEEING, make_family

EXACT = 1e-9  # logits are of order 1 to 10
NAMES = [*SMALL]
NONE = {"r1": False, "r2": False, "r3": False, "r4": False}
ALL = {"r1": True, "r2": True, "r3": True, "r4": True}
CHOICES = [*({**NONE, name: True} for name in NONE), ALL]
LENGTH = 24


def _named(choice: dict[str, bool]) -> str:
    return "+".join(name for name, on in choice.items() if on) or "none"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers casts to float32 inside norms and routers, and hides an error up to 1e-7: here it does not."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    # Norms take scales that bfloat16 holds. Those of queries and keys are then not quite each other's inverse.
    monkeypatch.setattr(channels, "_bfloat16", lambda x: x)


@functools.cache
def _tokens() -> Tensor:
    return torch.randint(3, 100, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@functools.cache
def _model(name: str) -> Any:
    """Not to be changed."""
    return make_family(name, attention=NAME).double()


@functools.cache
def _parts(model: Any) -> tuple[Decoder, Mapping[str, Tensor]]:
    """Its decoder and its tensors, one a projection."""
    decoder = Decoder(model.config, attention=NAME, dtype=torch.float64)
    return decoder, MappingProxyType(split_modules_state(model, decoder))


@functools.cache
@torch.no_grad()
def _expected(model: Any) -> Tensor:
    logits: Tensor = model(_tokens()).logits
    return logits


@torch.no_grad()
def _logits(
    model: Any,
    choice: dict[str, bool],
    *,
    online: bool = True,
    scale: bool = False,
    fold: Callable[[dict[str, Tensor], int], dict[str, Tensor]] = lambda tensors, index: tensors,
) -> Tensor:
    """After rotation, block by block; `online` False leaves out what runs online, `fold` changes a block."""
    decoder, state = _parts(model)
    config, family, shape = model.config, decoder.family, decoder.shape
    rotations = Rotations.of(shape, **{"online_r1": family.post_norms, **choice}, seed=3)
    outer = rotations.rotate_outer_layers(OuterLayers.of(family, state), family)
    hidden, plain = (decoder.embed(part, _tokens()) for part in (outer, OuterLayers.of(family, state)))
    found: list[dict[str, Tensor]] = []
    if scale:
        rotations = replace(rotations, scales=found)
    for index in range(shape.blocks):
        prefix = f"{family.layers}.{index}."
        tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        original, own = decoder.block(index, tensors), family.at(index)
        names = balanced_sites(own, config, folded=rotations.turned, keys=True)
        rotary = decoder.position_embeddings(1, index)[0].shape[-1]
        seen = moments(decoder, original, plain, names, 1, set_attention, centered=True)
        found.append(scales(tensors, own, shape.at(index), seen, rotary))
        assert all(float((t - 1).abs().max()) > 0.05 for t in found[-1].values()) and set(found[-1]) <= set(names)
        plain = decoder.run(original, plain)
        block = decoder.block(index, fold(rotations.rotate_block(tensors, family, index), index))
        if online:
            r3 = None if own.compressions else rotations.r3  # which such a cache has no use for
            set_attention(block.get_submodule(own.attention), AttentionTransform(r3))
            sites = {"output": before_output(own, shape) if rotations.heads else None}
            if rotations.online_r1:
                sites |= {"qkv": rotations.r1, "gate_up": rotations.r1}
            for name, site in own.sites.items():
                layer, width = block.get_submodule(name), block.get_parameter(f"{name}.weight").shape[1]
                if (r := rotations.r4_of(width) if site == "down" else sites.get(site)) is not None:
                    layer.register_forward_pre_hook(lambda _, args, r=r: r.apply(args[0]))
        hidden = decoder.run(block, hidden)
    return decoder.logits(outer)(hidden)


def split_modules_state(model: nn.Module, decoder: Decoder) -> dict[str, Tensor]:
    """The state of a whole model, one tensor a projection, from transformers' own tensors by plain slicing."""
    shape = decoder.shape
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def upright(fused: Tensor) -> Tensor:
        return fused.mT if decoder.family.scores_inputs else fused  # Llama 4's are (experts, in, out)

    for name in list(state):
        if "experts." in name and decoder.family.interleaved:  # (experts, in, out), gates and ups alternate
            fused, (stem, _, last) = state.pop(name), name.rpartition(".")
            kind, rows = ("bias", fused) if last.endswith("_bias") else ("weight", fused.mT)
            for i, part in enumerate(rows):
                if last.startswith("gate_up"):
                    state |= {f"{stem}.{i}.gate_proj.{kind}": part[::2], f"{stem}.{i}.up_proj.{kind}": part[1::2]}
                else:
                    state[f"{stem}.{i}.down_proj.{kind}"] = part
        elif name.endswith("experts.gate_up_proj"):
            fused, stem = upright(state.pop(name)), name.removesuffix("gate_up_proj")
            for i in range(shape.experts):
                state[f"{stem}{i}.gate_proj.weight"] = fused[i, : shape.ffn]
                state[f"{stem}{i}.up_proj.weight"] = fused[i, shape.ffn :]
        elif name.endswith("experts.down_proj"):
            fused, stem = upright(state.pop(name)), name.removesuffix("down_proj")
            state |= {f"{stem}{i}.down_proj.weight": fused[i] for i in range(shape.experts)}
        elif name.endswith("qkv_proj.weight"):
            fused, stem = state.pop(name), name.removesuffix("weight")
            q, k = shape.query_heads * shape.head_dim, shape.key_heads * shape.head_dim
            parts = {"query": fused[:q], "key": fused[q : q + k], "value": fused[q + k :]}
            state |= {f"{stem}{part}.weight": tensor for part, tensor in parts.items()}
        elif name.endswith("gate_up_proj.weight"):
            fused, stem = state.pop(name), name.removesuffix("weight")
            state |= {f"{stem}gate.weight": fused[: shape.ffn], f"{stem}up.weight": fused[shape.ffn :]}
        elif name.endswith("q_proj.weight") and decoder.family.attention_gate:  # of each head the query, the gate
            fused, stem = state.pop(name).unflatten(0, (shape.query_heads, 2, -1)), name.removesuffix("weight")
            state |= {f"{stem}{part}.weight": fused[:, i].flatten(0, 1) for i, part in enumerate(("query", "gate"))}
        elif name.endswith("shared_mlp.input_linear.weight"):
            fused, stem = state.pop(name), name.removesuffix("weight")
            state |= {f"{stem}{part}.weight": half for part, half in zip(("gate", "up"), fused.chunk(2), strict=True)}
        elif name.endswith("mamba.in_proj.weight"):  # steps in time last, one a head
            fused, stem = state.pop(name), name.removesuffix("weight")
            state |= {f"{stem}mixed.weight": fused[:-4], f"{stem}time.weight": fused[-4:]}
        elif name.endswith("kv_b_proj.weight"):  # of each head the key, the value
            fused, stem = state.pop(name).unflatten(0, (shape.query_heads, -1)), name.removesuffix("weight")
            parts = {"key": fused[:, : -shape.head_dim], "value": fused[:, -shape.head_dim :]}
            state |= {f"{stem}{part}.weight": tensor.flatten(0, 1) for part, tensor in parts.items()}
        elif "query_key_value." in name:  # for each key head its queries, the key, the value
            fused, (stem, _, kind) = state.pop(name), name.rpartition(".")
            heads, size = fused.chunk(shape.key_heads), shape.head_dim
            parts = {"query": slice(-2 * size), "key": slice(-2 * size, -size), "value": slice(-size, None)}
            state |= {f"{stem}.{part}.{kind}": torch.cat([head[s] for head in heads]) for part, s in parts.items()}
    if decoder.family.embedding_norm:
        norm, name = decoder.family.embedding_norm, f"{decoder.family.embedding}.weight"
        weight, bias = state.pop(f"{norm}.weight"), state.pop(f"{norm}.bias")
        state[name] = nn.functional.layer_norm(state[name], (shape.hidden,), weight, bias, 1e-5)
    if decoder.family.layer_norm:  # each norm has a bias, and each layer that reads one
        family = decoder.family
        biased = [name for norm, readers in family.norm_readers.items() for name in (norm, *readers)]
        for name in [family.final_norm, *(f"{family.layers}.{i}.{n}" for i in range(shape.blocks) for n in biased)]:
            state.setdefault(f"{name}.bias", torch.zeros(len(state[f"{name}.weight"])).double())
    return state


ONLINE = {**ALL, "online_r1": True, "heads": True}


@pytest.mark.parametrize(
    ("choice", "scale"),
    [
        ({**NONE, "r1": True, "online_r1": True}, False),
        ({**NONE, "heads": True}, False),
        (NONE, True),
        ({**ALL, "heads": True}, True),
        (ONLINE, True),
        ({**ONLINE, "blocks": 4}, False),
    ],
    ids=["online", "heads", "scale", "merged", "all", "blocks"],
)
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_behind_the_norms(name: str, choice: dict[str, bool], scale: bool) -> None:
    model = _model(name)
    expected = _expected(model)
    assert (_logits(model, choice, scale=scale) - expected).abs().max() < EXACT
    if choice["r1"]:  # what runs online is needed
        assert (_logits(model, choice, scale=scale, online=False) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("choice", CHOICES, ids=_named)
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay(name: str, choice: dict[str, bool]) -> None:
    model = _model(name)
    expected = _expected(model)
    assert expected.std() > 0.3
    assert (_logits(model, choice) - expected).abs().max() < EXACT


@pytest.mark.parametrize("name", NAMES)
def test_every_rotation_does_something(name: str) -> None:
    """The folded half without the online half must show: R4 everywhere, R1 where there are post norms."""
    model = _model(name)
    expected, family = _expected(model), family_for(model.config, "it")
    assert (_logits(model, {**NONE, "r4": True}, online=False) - expected).abs().max() > 1e-3
    alone = (_logits(model, {**NONE, "r1": True}, online=False) - expected).abs().max()
    assert alone > 1e-3 if family.post_norms else alone < EXACT


def test_a_rotated_opt_has_no_mean() -> None:
    """The mean over channels is gone before the rotation: every tensor that writes to the stream has none."""
    decoder, state = _parts(_model("opt"))
    family = decoder.family
    rotations = Rotations.of(decoder.shape, **{**NONE, "r1": True})
    assert rotations.r1 is not None
    outer = OuterLayers.of(family, state)
    assert outer.embedding[:].mean(-1).abs().min() > 1e-3
    rotated = rotations.rotate_outer_layers(outer, family)
    assert rotated.positions is not None and rotated.head_bias is not None and rotated.norm_bias is None
    for tensor in (rotated.embedding[:], rotated.positions):
        assert rotations.r1.apply_transposed(tensor).mean(-1).abs().max() < 1e-12
    assert (rotated.head_bias - state["lm_head.weight"] @ state[f"{family.final_norm}.bias"]).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_the_mean_of_other_embeddings_stays(name: str) -> None:
    decoder, state = _parts(_model(name))
    rotations = Rotations.of(decoder.shape, **ALL)
    assert rotations.r1 is not None
    outer = OuterLayers.of(decoder.family, state)
    rotated = rotations.rotate_outer_layers(outer, decoder.family)
    assert (rotations.r1.apply_transposed(rotated.embedding[:]) - outer.embedding[:]).abs().max() < 1e-12


@pytest.mark.parametrize("choice", [NONE, {**ALL, "r4": False}, ALL], ids=_named)
@pytest.mark.parametrize("name", NAMES)
def test_channel_scales_change_nothing(name: str, choice: dict[str, bool]) -> None:
    """Every site that can take them, all at once; without what the layer before has taken, the logits are others."""
    model = _model(name)
    decoder, _ = _parts(model)
    family, shape = decoder.family, decoder.shape
    on = {"online_r1": choice["r1"] and family.post_norms, "heads": False, "r4": choice["r4"]}
    reasons = {site: obstacle(family, model.config, site, **on) for site in SITES}
    stopped = {site for site, reason in reasons.items() if reason}
    if family.hybrid or family.compressions:
        assert stopped == set(SITES)
        return
    online_r1 = {"qkv", "gate_up"} if (family.post_norms and choice["r1"]) or not family.pre_norms else set()
    nonlinear = not family.gate and channels.activation_of(model.config) != "relu"
    downs = {"gate_up", "down"} if family.experts else {"down"} if choice["r4"] or nonlinear else set()
    shared = {"gate_up"} if family.shared_norm else set()
    assert stopped == online_r1 | downs | shared
    widths = {"qkv": shape.hidden, "output": shape.key_width, "gate_up": shape.hidden, "down": shape.ffn}

    def fold(tensors: dict[str, Tensor], index: int, halves: bool = False) -> dict[str, Tensor]:
        for i, site in enumerate(sorted(set(SITES) - stopped)):
            generator = torch.Generator().manual_seed(10 * index + i)
            zeta = torch.randn(widths[site], generator=generator, dtype=torch.float64).mul(0.5).exp()
            zeta = absorbable(tensors, family, site, zeta)
            assert zeta.log().std() > 0.3
            own = family.at(index)
            changed = scale_channels(tensors, own, shape, site, zeta)
            keep = {f"{reader}.weight" for reader in readers(own, site)}
            assert keep < set(changed)
            tensors = tensors | {name: t for name, t in changed.items() if not halves or name in keep}
        return tensors

    expected = _expected(model)
    assert (_logits(model, choice, fold=fold) - expected).abs().max() < EXACT
    halved = _logits(model, choice, fold=functools.partial(fold, halves=True))
    assert (halved - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi3", "mixtral", "qwen3_moe", "qwen2_moe"])
def test_split_blocks_compute_the_same(name: str) -> None:
    model = _model(name)
    decoder, state = _parts(model)
    x = torch.randn(2, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prefix = f"{decoder.family.layers}.1."
    block = decoder.block(1, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    whole = model.get_submodule(f"{decoder.family.layers}.1")
    arguments = decoder.arguments(whole, LENGTH)
    assert (block(x, **arguments) - whole(x, **arguments)).abs().max() < 1e-12
    assert split_modules(decoder.skeleton.get_submodule(f"{decoder.family.layers}.0"), decoder.family, decoder.shape)


def test_all_families_are_tested() -> None:
    assert {name.partition("-")[0] for name in (*NAMES, *SEEING)} == set(FAMILIES)
