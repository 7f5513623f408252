"""H_out through RoPE of some channels and through the norm of a head, against autograd in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rotoboa.boa.objective.pull_back import (
    NormStatistics,
    norm_pull_back,
    positions_pull_back,
    rope_pull_back,
)

from ..problems import random, random_gram

D, HEADS, TOKENS, C = 8, 3, 40, 12


def _angles(positions: int, channels: int) -> tuple[Tensor, Tensor]:
    half = torch.arange(positions, dtype=torch.float64)[:, None] * 0.7 ** torch.arange(channels // 2)
    angles = torch.cat([half, half], 1)
    return 1.3 * angles.cos(), 1.3 * angles.sin()


def _rope(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(d,) at one position, by transformers' own function."""
    turned, _ = apply_rotary_pos_emb(u[None, None, None], u[None, None, None], cos[None, None], sin[None, None])
    return turned[0, 0, 0]


def _norm(u: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * u / (u.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("channels", [D, 6, 2])
def test_rope_of_some_channels(channels: int) -> None:
    gram, (cos, sin) = random_gram(HEADS, size=D), _angles(7, channels)
    expected = torch.zeros_like(gram)
    for position in range(7):
        r = torch.autograd.functional.jacobian(lambda u, p=position: _rope(u, cos[p], sin[p]), random(D))
        expected += r.T @ gram @ r / 7
    torch.testing.assert_close(positions_pull_back(gram, cos, sin), expected, rtol=0, atol=1e-11)


def _statistics(outputs: Tensor, eps: float) -> NormStatistics:
    statistics = NormStatistics(torch.ones(HEADS, dtype=torch.float64), eps)
    statistics.add(outputs[:, :15])
    statistics.add(outputs[:, 15:])
    return statistics


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_one_token_is_exact(eps: float) -> None:
    """With one token nothing is averaged: J^T R^T G R J of autograd, to rounding, after the token's own 1 / r^2."""
    weight, gram, (cos, sin) = 1 + 0.3 * random(D, seed=3), random_gram(HEADS, size=D), _angles(1, D)
    u = random(HEADS, D, seed=4)
    statistics = NormStatistics(torch.ones(HEADS, dtype=torch.float64), eps)
    w = statistics.add(u.flatten()[None])[0]
    found = norm_pull_back(positions_pull_back(gram, cos, sin), weight, statistics.moments)
    for head in range(HEADS):
        j = torch.autograd.functional.jacobian(lambda v: _rope(_norm(v, weight, eps), cos[0], sin[0]), u[head])
        torch.testing.assert_close(found[head] * w[head], j.T @ gram[head] @ j, rtol=0, atol=1e-10)


def test_the_loss_is_that_of_attention_inputs_to_first_order() -> None:
    """tr(H_out E H_in E^T) is the squared change of q behind the norm, where all tokens have one direction of u."""
    eps, step = 1e-6, 1e-6
    weight, gram = 1 + 0.3 * random(D, seed=3), random_gram(1, size=D)
    w, e = random(D, C, seed=5), random(D, C, seed=6)
    x = random(1, C, seed=7) * (1 + random(TOKENS, 1, seed=8).abs())  # tokens differ by their length alone
    outputs = x @ w.T
    statistics = NormStatistics(torch.ones(1, dtype=torch.float64), eps)
    weights = statistics.add(outputs)
    h_in = (x * weights).T @ x
    h_out = norm_pull_back(gram, weight, statistics.moments)[0]
    moved = (_norm(x @ (w + step * e).T, weight, eps) - _norm(outputs, weight, eps)) / step
    expected = ((moved @ gram[0]) * moved).sum()
    found = torch.trace(h_out @ e @ h_in @ e.T)
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_many_tokens_are_the_mean_of_independent_pairs() -> None:
    """B - N B - B N + tr(N B) N: both factors (I - m m^T) by the definition of each term, summed token by token."""
    eps, weight, gram = 1e-3, 1 + 0.3 * random(D, seed=3), random_gram(HEADS, size=D)
    outputs = random(2, TOKENS // 2, HEADS * D, seed=9)
    found = norm_pull_back(gram, weight, _statistics(outputs, eps).moments)
    u = outputs.reshape(TOKENS, HEADS, D)
    r = (u.square().mean(-1) + eps).sqrt()
    m, w = u / (D**0.5 * r[..., None]), r**-2
    w = w / w.sum(0)
    for head in range(HEADS):
        b = torch.diag(weight) @ gram[head] @ torch.diag(weight)
        expected = b.clone()
        for t in range(TOKENS):
            n = w[t, head] * torch.outer(m[t, head], m[t, head])
            expected -= n @ b + b @ n
            for s in range(TOKENS):  # m_t m_t^T B m_s m_s^T, paired so that t and s are independent of each other
                other = w[s, head] * torch.outer(m[s, head], m[s, head])
                expected += torch.trace(n @ b) * other
        torch.testing.assert_close(found[head], expected, rtol=0, atol=1e-10)


def test_is_semi_definite_and_blind_to_the_length() -> None:
    outputs = random(2, TOKENS // 2, HEADS * D, seed=9)
    found = norm_pull_back(
        random_gram(HEADS, size=D), torch.ones(D, dtype=torch.float64), _statistics(outputs, 1e-6).moments
    )
    assert torch.linalg.eigvalsh(found).min() > -1e-10
    u = random(HEADS, D, seed=4)
    alone = NormStatistics(torch.ones(HEADS, dtype=torch.float64), 0.0)
    alone.add(u.flatten()[None])
    blind = norm_pull_back(random_gram(HEADS, size=D), torch.ones(D, dtype=torch.float64), alone.moments)
    assert (blind @ u[..., None]).abs().max() < 1e-10, "an error along u is taken out by the norm"


@pytest.mark.parametrize(("norm", "eps"), [(Qwen3RMSNorm, 1e-6), (Gemma3RMSNorm, 1e-5)])
def test_scale_and_weights_of_real_norms(norm: Callable[..., nn.Module], eps: float) -> None:
    weight = random(HEADS * D, C, seed=5)
    statistics = NormStatistics.of(weight, HEADS, norm(D, eps=eps))
    assert statistics.eps == eps
    x = random(20000, C, seed=6)
    w = statistics.add(x @ weight.T)
    assert w.shape == (20000, HEADS)
    # c_h is the mean of r_h^2 over inputs without a direction.
    torch.testing.assert_close((1 / w).mean(0), torch.ones(HEADS, dtype=torch.float64), rtol=0.05, atol=0)


def test_all_channels_are_the_plain_pull_back() -> None:
    gram, (cos, sin) = random_gram(HEADS, size=D), _angles(9, D)
    assert torch.equal(positions_pull_back(gram, cos, sin), rope_pull_back(gram, cos, sin))
