"""What the experts of a mixture are asked to make up for, where the weights of a token need not sum to 1."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rotoboa.boa.block import experts_step
from rotoboa.boa.block.context import BlockContext
from rotoboa.boa.block.experts_step import choose, expert_of
from rotoboa.boa.block.forward_parts import capture
from rotoboa.models.decoder import Decoder

from ..small_block import PLAIN, QUICK, Solved, make_decoder, run_block

HIDDEN, FFN, EXPERTS = 16, 12, 4


class Mixture(NamedTuple):
    decoder: Decoder
    block: nn.Module

    def streams(self, sequences: int) -> tuple[Tensor, Tensor]:
        full = torch.randn(sequences, 24, HIDDEN, generator=torch.Generator().manual_seed(6))
        return full, full + 0.2 * torch.randn(full.shape, generator=torch.Generator().manual_seed(7))


_QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": False, "mlp_only_layers": []}
_SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_QWEN, "moe_intermediate_size": FFN, "head_dim": 8},
    "qwen2_moe": {**_QWEN, "moe_intermediate_size": FFN, "shared_expert_intermediate_size": 2 * FFN},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": FFN,
        "moe_layer_start_index": 0,
        "use_bias": True,
    },
    "gpt_oss": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": FFN, "head_dim": 8},
    "granitemoehybrid": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "intermediate_size": FFN,
        "shared_intermediate_size": 2 * FFN,
        "layer_types": ["full_attention"],
        "mamba_n_heads": 4,
        "residual_multiplier": 0.4,
    },
    "llama4_text": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": FFN, "head_dim": 8},
}


@pytest.fixture(params=_SIZES)
def mixture(request: pytest.FixtureRequest) -> Mixture:
    """A block with two of four experts for each token. Qwen's weights are not made to sum to 1, Qwen2 and Ernie have a
    shared one, which has biases in Ernie, as all have in gpt-oss; Granite multiplies what all put out; in Llama 4
    weights multiply what experts read.
    """
    decoder = make_decoder(request.param, hidden_size=HIDDEN, **_SIZES[request.param])
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, like in decoder.empty_block(0).state_dict().items():
        noise = torch.randn(like.shape, generator=generator)
        tensors[name] = ("norm" in name) + 0.3 * noise if like.ndim == 1 else noise / like.shape[1] ** 0.5
        if name.endswith(decoder.family.exact):
            tensors[name] *= 0.1
    return Mixture(decoder, decoder.block(0, tensors))


def _down_goals(mixture: Mixture, sequences: int, solved: Solved) -> list[tuple[Tensor, Tensor]]:
    """Run, and of each expert's down projection: Y X^T that was asked for, and that of the formula."""
    decoder, block = mixture
    found, *_, context = run_block(decoder, block, QUICK, PLAIN, mixture.streams(sequences))
    family = decoder.family
    hf, hq = (
        capture(part.get_submodule(family.mlp_norm), partial(decoder.run, part, h)).flatten(0, 1)
        for part, h in zip((block, context.quantized), mixture.streams(sequences), strict=True)
    )
    norm = block.get_submodule(family.mlp_norm)
    index, weights = experts_step.choose(context, norm(hq))
    assert index.shape[1] == 2 + bool(family.shared)
    total = weights.sum(-1, keepdim=True)
    goals = []
    for i in family.all_experts:
        p = (weights * (index == i)).sum(-1, keepdim=True)
        share = torch.where(total > 0, p / total, 0)
        if family.expert(i)[0] in found.fallbacks:
            p = share = torch.ones_like(p)
        full, quantized = (expert_of(family, part, i) for part in (block, context.quantized))
        before, p = (p, torch.ones_like(p)) if family.scores_inputs else (1.0, p)
        y, x = full.inside(norm(hf) * before) @ full.down_proj.weight.T, quantized.inside(norm(hq) * before) * p
        weight, goal = solved[3 + 2 * i + 1]
        assert goal.drift is not None
        goals.append(
            (goal.drift[0] + weight[0] @ goal.h_in[0], (p * y + share * (hf - hq) / decoder.branch_factor).T @ x)
        )
    return goals


@pytest.mark.parametrize("sequences", [12, 1], ids=["own tokens", "fallback"])
def test_experts_of_a_token_make_up_for_all_of_the_drift(mixture: Mixture, sequences: int, solved: Solved) -> None:
    """An expert's output counts by its p, and what the p y lack of the full-precision stream is shared out by p."""
    for asked, expected in _down_goals(mixture, sequences, solved):
        torch.testing.assert_close(asked, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("least", [0.0, 1e-42])
def test_a_token_that_hardly_goes_anywhere(
    mixture: Mixture, least: float, solved: Solved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that vanish, or whose sum cannot be divided by, ask for nothing that is not finite."""

    def hardly(context: BlockContext, x: Tensor) -> tuple[Tensor, Tensor]:
        index, weights = choose(context, x)
        return index, torch.where((torch.arange(len(x)) % 3 == 0)[:, None], least * weights, weights)

    monkeypatch.setattr(experts_step, "choose", hardly)
    for asked, expected in _down_goals(mixture, 12, solved):
        torch.testing.assert_close(asked, expected, rtol=1e-3, atol=1e-3)
