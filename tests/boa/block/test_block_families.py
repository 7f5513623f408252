"""One block of every family through the quantizer: shapes of the objectives, streams, experts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.block.context import BlockContext
from rotoboa.boa.block.forward_parts import capture
from rotoboa.boa.objective import statistics
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import NAME, AttentionTransform
from rotoboa.boa.online.transforms import InputTransform, OnlineTransforms
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.models.decoder import Decoder
from rotoboa.rotation.rotate import Rotations, before_output
from rotoboa.tests.small_families import FAMILIES, MIXTURES

from ..small_block import Ran, Solved, block_tensors, forward, run_block

NAMES = [name for name in FAMILIES if name not in ("llama-biases", *MIXTURES)]
SETTINGS = Settings(bits=4, refine=1, starts=1, tabu=0)
SEQUENCES, LENGTH, HIDDEN = 3, 24, 32
EVERYTHING = {"r1": True, "r2": True, "r3": True, "r4": True}
ROTATIONS = {"plain": {}, "rotated": EVERYTHING, "behind the norms": {**EVERYTHING, "online_r1": True, "heads": True}}


class Setup:
    """A block of a family, rotated or not, its transforms, and two streams."""

    def __init__(self, model: nn.Module, bits: int = 16, index: int = 1, **rotations: bool) -> None:
        self.decoder = Decoder(model.config, attention=NAME)
        family, shape = self.decoder.family.at(index), self.decoder.shape.at(index)
        tensors = block_tensors(model, self.decoder, index)
        chosen = {name: rotations.get(name, False) for name in EVERYTHING}
        online = rotations.get("online_r1", False) or family.post_norms
        self.rotations = Rotations.of(shape, **chosen, online_r1=online, heads=rotations.get("heads", False))
        self.block = self.decoder.block(index, self.rotations.rotate_block(tensors, family, index))
        quantizer = DynamicQuantizer.of(bits, True, 0.9)
        read = InputTransform(self.rotations.r1 if self.rotations.online_r1 else None, quantizer)
        self.transforms = OnlineTransforms(
            read,
            InputTransform(before_output(family, shape) if self.rotations.heads else None, quantizer),
            read,
            InputTransform(self.rotations.r4, quantizer),
            AttentionTransform(
                self.rotations.r3, DynamicQuantizer.of(bits, False, 0.95), DynamicQuantizer.of(bits, False, 0.95)
            ),
            self.rotations.r4_of(shape.shared_ffn) if shape.shared_ffn else None,
            InputTransform(quantizer=quantizer),
        )
        if family.compressions:  # whose cache is not quantized
            self.transforms = replace(self.transforms, attention=AttentionTransform())

    def streams(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        full = torch.randn(SEQUENCES, LENGTH, HIDDEN, generator=generator)
        if self.decoder.family.layer_norm:  # as a rotated stream is: without a mean
            full = full - full.mean(-1, keepdim=True)
        if self.rotations.r1 is not None and not self.rotations.online_r1:
            full = self.rotations.r1.apply(full)
        return full, full + 0.05 * torch.randn(full.shape, generator=generator)

    def forward(self, block: nn.Module, hidden: Tensor, *, exact: bool) -> Tensor:
        return forward(self.decoder, block, hidden, self.transforms, exact=exact)


def _run(setup: Setup, settings: Settings = SETTINGS, **options: Any) -> Ran:
    return run_block(setup.decoder, setup.block, settings, setup.transforms, setup.streams(), **options)


@pytest.mark.parametrize("rotated", ROTATIONS)
@pytest.mark.parametrize("name", NAMES + MIXTURES)
def test_streams_are_forward_passes(family_model: Callable[..., nn.Module], name: str, rotated: str) -> None:
    setup = Setup(family_model(name), 16 if rotated == "plain" else 4, **ROTATIONS[rotated])
    found, full, quantized, context = _run(setup)
    before_full, before_quantized = setup.streams()
    torch.testing.assert_close(full, setup.forward(setup.block, before_full, exact=True), rtol=0, atol=2e-5)
    expected = setup.forward(context.quantized, before_quantized, exact=False)
    far = ((quantized - expected).abs() > 1e-4).float().mean()
    assert far < 0.02, "a value at the edge of two levels may fall to either side, and no more"
    assert (full - quantized).abs().max() > 0.01
    assert list(found.results) == list(found.losses) == list(context.family.projections)


@pytest.mark.parametrize("name", NAMES + MIXTURES)
def test_going_on_gives_the_same(family_model: Callable[..., nn.Module], name: str) -> None:
    first, full, quantized, _ = _run(Setup(family_model(name), 4, **EVERYTHING))
    again, full_again, quantized_again, _ = _run(Setup(family_model(name), 4, **EVERYTHING), previous=first.results)
    assert torch.equal(full, full_again) and torch.equal(quantized, quantized_again)
    assert list(again.results) == list(first.results)


@pytest.mark.parametrize("name", [name for name in NAMES + MIXTURES if not name.startswith("deepseek")])
def test_shapes(family_model: Callable[..., nn.Module], name: str, solved: Solved) -> None:
    setup = Setup(family_model(name))
    _run(setup)
    s, f = setup.decoder.shape.at(1), setup.decoder.family.at(1)
    query_key, value, *rest = solved
    if f.attention_gate:
        (weight, goal), *rest = rest
        assert weight.shape == (s.query_heads, s.head_dim, HIDDEN) and goal.h_in.shape == (1, HIDDEN, HIDDEN)
        assert goal.h_out is not None and goal.h_out.shape == (s.query_heads, s.head_dim, s.head_dim)
    output, *mlp = rest
    d, both = s.head_dim, s.query_heads + s.key_heads
    assert query_key[0].shape == (both, d, HIDDEN)
    assert query_key[1].h_in.shape == (1, HIDDEN, HIDDEN)
    assert query_key[1].h_out is not None and query_key[1].h_out.shape == (both, d, d)
    assert value[0].shape == (s.key_heads, d, HIDDEN)
    assert value[1].h_in.shape == (s.key_heads, HIDDEN, HIDDEN)
    assert value[1].h_out is not None and value[1].h_out.shape == (s.key_heads, d, d)
    assert output[0].shape == (1, HIDDEN, s.query_heads * d)
    assert output[1].h_in.shape == (1, s.query_heads * d, s.query_heads * d) and output[1].h_out is None
    widths = [s.ffn] * max(s.experts, 1) + [s.shared_ffn] * bool(f.shared)
    for ffn, (inner, inner_goal), (down, down_goal) in zip(widths, mlp[::2], mlp[1::2], strict=True):
        assert inner.shape == ((1, ffn, HIDDEN) if f.activation else (2, ffn, HIDDEN))
        assert inner_goal.h_in.shape == (1, HIDDEN, HIDDEN) and inner_goal.h_out is None
        assert down.shape == (1, HIDDEN, ffn) and down_goal.h_in.shape == (1, ffn, ffn)
    for weight, goal in solved:
        assert torch.linalg.eigvalsh(goal.h_in.double()).min() > -1e-3 * goal.h_in.abs().max()
        if goal.h_out is not None:
            assert torch.linalg.eigvalsh(goal.h_out.double()).min() > -1e-4 * goal.h_out.abs().max()
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("name", ["qwen2", "opt", "gpt_oss"])
def test_a_bias_of_values_is_not_made_up_for(
    family_model: Callable[..., nn.Module], name: str, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    """Where both streams are the same, V has lost nothing; what its bias adds to every output is no part of that."""
    monkeypatch.setattr(statistics, "_has_bfloat16", lambda: False)
    setup = Setup(family_model(name))
    bias = setup.block.get_submodule(setup.decoder.family.value).bias
    assert isinstance(bias, Tensor)
    bias.data = torch.linspace(-3, 3, len(bias))
    full, _ = setup.streams()
    run_block(setup.decoder, setup.block, SETTINGS, setup.transforms, (full, full.clone()))
    weight, goal = solved[1]
    assert goal.drift is not None
    assert goal.drift.abs().max() < 1e-4 * (weight @ goal.h_in).abs().max()


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_what_a_post_norm_divides_by_weighs_tokens(
    family_model: Callable[..., nn.Module], name: str, solved: Solved
) -> None:
    setup = Setup(family_model(name))
    context = _run(setup, SETTINGS).context
    full, quantized = setup.streams()
    family = setup.decoder.family
    x = [
        capture(block.get_submodule(family.output), partial(setup.decoder.run, block, hidden))
        for block, hidden in ((setup.block, full), (context.quantized, quantized))
    ]
    y = torch.nn.functional.linear(x[0], setup.block.get_parameter(f"{family.output}.weight"))
    weighted = (x[1] / y.square().mean(-1, keepdim=True).sqrt()).flatten(0, 1)
    torch.testing.assert_close(solved[2][1].h_in[0], weighted.T @ weighted, rtol=1e-3, atol=1e-3)


# -- experts ---


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_is_calibrated_on_its_tokens(
    family_model: Callable[..., nn.Module], name: str, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    monkeypatch.setattr(Setup, "streams", _many(Setup.streams))
    setup = Setup(family_model(name))
    found, *_, context = _run(setup, SETTINGS)
    family, shape = context.family, setup.decoder.shape
    assert not found.fallbacks
    x, weights, index = _routed(setup, context)
    counts = torch.bincount(index.flatten(), minlength=shape.experts)
    assert counts.min() >= shape.hidden and int(counts.sum()) == 2 * len(x)
    for i in range(shape.experts):
        p = (weights * (index == i)).sum(-1, keepdim=True)
        goal = solved[len(solved) - 2 * len(family.all_experts) + 2 * i][1]
        torch.testing.assert_close(goal.h_in[0], (x * p).T @ (x * p), rtol=1e-3, atol=1e-3)
    assert family.expert_count == shape.experts == 4
    if family.shared:  # every token goes there
        p = setup.block.get_submodule(family.shared_gate)(x).sigmoid() if family.shared_gate else torch.ones(len(x), 1)
        torch.testing.assert_close(solved[-2][1].h_in[0], (x * p).T @ (x * p), rtol=1e-3, atol=1e-3)


def _routed(setup: Setup, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
    """What the quantized block gives to its MLP, (tokens, hidden), as transformers runs it; weights and experts."""
    block, (_, quantized), family = context.quantized, setup.streams(), context.family
    x = capture(block.get_submodule(family.mlp), lambda: setup.decoder.run(block, quantized)).flatten(0, 1)
    chosen: list[tuple[Tensor, ...]] = []
    experts = setup.block.get_submodule(str(family.experts))
    handle = experts.register_forward_pre_hook(lambda _, args: chosen.append(args))
    setup.block.get_submodule(family.mlp)(x[None])
    handle.remove()
    if family.scores_inputs:  # which are given to each expert, those of other experts as zeros
        p = (chosen[0][0].unflatten(0, (-1, len(x))) * x).sum(-1) / x.square().sum(-1)
        return x, *p.T.topk(2)
    return x, chosen[0][2], chosen[0][1]


def _many(streams: Callable[[Setup], tuple[Tensor, Tensor]]) -> Callable[[Setup], tuple[Tensor, Tensor]]:
    """More and more varied tokens, so that every expert has enough."""

    def longer(self: Setup) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(6)
        full = torch.randn(12, LENGTH, HIDDEN, generator=generator)
        return full, full + 0.05 * torch.randn(full.shape, generator=generator)

    return longer


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_with_few_tokens_falls_back(
    family_model: Callable[..., nn.Module], name: str, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    """A text of 24 tokens gives no expert 32 of them: each is calibrated on all, and named with its number."""
    monkeypatch.setattr(Setup, "streams", _first(Setup.streams))
    setup = Setup(family_model(name))
    found, _, quantized, context = _run(setup, SETTINGS)
    x, _, index = _routed(setup, context)
    counts = torch.bincount(index.flatten(), minlength=4).tolist()
    family = context.family
    assert found.fallbacks == {projection: counts[i] for i in range(4) for projection in family.expert(i)}
    first = len(solved) - 2 * len(family.all_experts)
    for i in range(4):
        torch.testing.assert_close(solved[first + 2 * i][1].h_in[0], x.T @ x, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(quantized).all() and max(found.losses.values()) < 0.2


def _first(streams: Callable[[Setup], tuple[Tensor, Tensor]]) -> Callable[[Setup], tuple[Tensor, Tensor]]:
    def shorter(self: Setup) -> tuple[Tensor, Tensor]:
        full, quantized = streams(self)
        return full[:1], quantized[:1]

    return shorter


# -- numerics ---


@pytest.mark.parametrize(
    ("name", "tensor"), [("phi3", "mlp.gate_up_proj.up"), ("mixtral", "mlp.experts.2.down_proj"), ("opt", "fc1")]
)
def test_nan_in_a_weight_is_named(family_model: Callable[..., nn.Module], name: str, tensor: str) -> None:
    setup = Setup(family_model(name))
    setup.block.get_parameter(f"{tensor}.weight").data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"^{tensor}: its weight holds NaN or Inf$"):
        _run(setup)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("opt", "fc2.bias", "fc2: what it should put out holds NaN or Inf"),
        ("gemma2", "post_feedforward_layernorm.weight", "mlp.down_proj: the full-precision stream after it"),
        ("gemma2", "post_attention_layernorm.weight", "self_attn.o_proj: the full-precision stream after it"),
        ("qwen2", "self_attn.k_proj.bias", "self_attn.q_proj, self_attn.k_proj: "),
    ],
)
def test_inf_is_named_where_it_arises(
    family_model: Callable[..., nn.Module], name: str, tensor: str, message: str
) -> None:
    setup = Setup(family_model(name))
    setup.block.get_parameter(tensor).data[0] = float("inf")
    with pytest.raises(ValueError, match=f"^{message}"):
        _run(setup)
