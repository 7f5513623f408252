"""H_out of queries and keys through what lies between their projection and attention: RoPE, and the norm of a head.

BoA's H_out is a Gram G of vectors after RoPE. The projection's error comes before it, and, in families with QK-norm
(Qwen 3, Gemma 3), before an RMSNorm of each head too. With u = W x the projection's output for one token and head,
d its size, g the norm's weight, r = sqrt(mean(u^2) + eps) and R the token's RoPE, attention sees

    q = R D_g u / r .

An error e = E x of u moves it, to first order, by J e with

    J = R D_g (I - m m^T) / r ,   m = u / (sqrt(d) r) ,

since the gradient of 1/r is -u / (d r^3). The loss is sum over tokens of e^T J^T G J e. Three steps bring that into
the form tr(H_out E H_in E^T):
- 1/r^2 weighs tokens, and goes into the statistics: into H_in = sum x x^T / r^2 and into the means that follow.
- R^T G R becomes its mean over positions, as BoA has it; with D_g around it that is B.
- (I - m m^T) B (I - m m^T) becomes its mean over tokens, with N = sum(m m^T / r^2) / sum(1 / r^2) for m m^T, as if
  those on both sides were independent: H_out = B - N B - B N + tr(N B) N. It is positive semi-definite: for B = b b^T,
  v^T H_out v >= (v^T b)^2 - 2 |v^T b| s + s^2 with s^2 = (b^T N b) (v^T N v), by Cauchy-Schwarz.
Leaving N out takes r for a constant; with N, an error along u, which the norm takes out again, costs nothing.

H_in is shared by all heads, each with an r of its own: a token weighs by the mean of w_h = c_h / r_h^2, where
c_h = |W_h|^2 / d is what r_h^2 is for inputs without a direction. H_out of a head has its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def rope_pull_back(gram: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(1/L) sum over positions l of R_l^T G R_l, BoA's H_out before RoPE.

    Args:
        gram: (heads, d, d), of vectors after RoPE.
        cos, sin: (L, d), as the model's rotary embedding gives them; R_l x = cos_l * x + sin_l * J x, where J maps
            (x1, x2) to (-x2, x1), halves of x.

    With D_c, D_s the diagonals, R_l = D_c + D_s J: the mean over l needs only the means of c c^T, c s^T and s s^T.
    """
    length, size = cos.shape
    half = size // 2
    j = torch.zeros(size, size, dtype=gram.dtype, device=gram.device)
    j[:half, half:] = -torch.eye(half, dtype=gram.dtype, device=gram.device)
    j[half:, :half] = torch.eye(half, dtype=gram.dtype, device=gram.device)
    cos, sin = cos.to(gram.dtype), sin.to(gram.dtype)
    cc, cs, ss = cos.T @ cos / length, cos.T @ sin / length, sin.T @ sin / length
    cross = (gram * cs) @ j
    return gram * cc + cross + cross.transpose(-1, -2) + j.T @ (gram * ss) @ j


def positions_pull_back(gram: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False) -> Tensor:
    """`rope_pull_back` of `gram` (heads, d, d) where RoPE turns only the first channels, those of cos, sin (L, r).

    `neighbours`: it turns 2 j with 2 j + 1, by the angle that cos and sin have at j.
    """
    size = cos.shape[-1]
    if neighbours:
        order = neighbours_first(gram.shape[-1], size).to(gram.device)
        back = order.argsort()
        return positions_pull_back(gram[:, order][..., order], cos, sin)[:, back][..., back]
    if size == gram.shape[-1]:
        return rope_pull_back(gram, cos, sin)
    pulled = gram.clone()
    pulled[:, :size, :size] = rope_pull_back(gram[:, :size, :size], cos, sin)
    # With R = D_c + D_s J on these channels and I on the others, the mean of R^T C needs the means of c and s.
    half, cross = size // 2, gram[:, :size, size:]
    c, s = (part.to(gram.dtype).mean(0)[:, None] for part in (cos, sin))
    first, second = (s * cross).split(half, 1)
    pulled[:, :size, size:] = c * cross + torch.cat([second, -first], 1)  # J^T maps (y1, y2) to (y2, -y1)
    pulled[:, size:, :size] = pulled[:, :size, size:].transpose(1, 2)
    return pulled


def neighbours_first(size: int, rotary: int) -> Tensor:
    """(size,) the channels in the order that halves have, where RoPE turns neighbours among the first `rotary`."""
    channels = torch.arange(size)
    return torch.cat([channels[0:rotary:2], channels[1:rotary:2], channels[rotary:]])


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False) -> Tensor:
    """R x of `x` (batch, L, heads, d), by cos and sin (L, r) as `positions_pull_back` has them."""
    order = neighbours_first(x.shape[-1], cos.shape[-1]) if neighbours else torch.arange(x.shape[-1])
    first, rest = x[..., order.to(x.device)].split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], -1)
    a, b = first.chunk(2, -1)
    moved = first * cos[:, None].to(x) + torch.cat([-b, a], -1) * sin[:, None].to(x)
    return torch.cat([moved, rest], -1)[..., order.argsort().to(x.device)]


def norm_pull_back(gram: Tensor, weight: Tensor, moments: Tensor, *, whole: bool = False) -> Tensor:
    """H_out = B - N B - B N + tr(N B) N of the module's docstring.

    Args:
        gram: (heads, d, d), R^T G R or its mean.
        weight: (d,), g: what the norm multiplies by; or (heads * d,).
        moments: (heads, d, d), N.
        whole: one norm over all heads. These are then the blocks of each head, where the trace is over all of them.
    """
    g = weight.view(-1, gram.shape[-1])
    b = gram * (g[:, :, None] * g[:, None]).to(gram.dtype)
    n = moments.to(gram.dtype)
    nb = n @ b
    trace = nb.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    return b - nb - nb.transpose(-1, -2) + (trace.sum(0, keepdim=True) if whole else trace) * n


@dataclass
class NormStatistics:
    """N and the token weights of the heads of one projection, over all batches.

    Args:
        scale: (heads,), c_h = |W_h|^2 / d.
        eps: of the norm.
        whole: the norm is over all heads together: r is theirs, and m is a head's part of the whole.
    """

    scale: Tensor
    eps: float
    whole: bool = False
    total: Tensor | None = None
    summed: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, heads: int, norm: torch.nn.Module, whole: bool = False) -> NormStatistics:
        """Of a projection's weight (heads * d, c) and the norm that follows it."""
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        scale = weight.unflatten(0, (heads, -1)).square().sum((1, 2)) * heads / len(weight)
        return cls(scale.mean().expand(heads) if whole else scale, float(eps), whole)  # type: ignore[arg-type]

    def add(self, outputs: Tensor) -> Tensor:
        """One batch of u, (..., heads * d); returns w_h, (..., heads)."""
        u = outputs.unflatten(-1, (len(self.scale), -1)).flatten(0, -3)
        squares = u.square().mean(-1)
        squares = (squares.mean(-1, keepdim=True).expand_as(squares) if self.whole else squares) + self.eps
        width = u.shape[-1] * (u.shape[-2] if self.whole else 1)
        m = u.transpose(0, 1) / (width * squares.T[..., None]).sqrt()  # of r^2, (tokens, heads)
        weighted = m / squares.T[..., None]
        summed, total = weighted.transpose(1, 2) @ m, squares.reciprocal().sum(0)
        self.summed = summed if self.summed is None else self.summed + summed
        self.total = total if self.total is None else self.total + total
        return (self.scale / squares).unflatten(0, outputs.shape[:-1])

    def sums(self) -> dict[str, list[Tensor]]:
        """As `totals.Statistics` has it."""
        return {name: [part] for name in ("total", "summed") if (part := getattr(self, name)) is not None}

    @property
    def moments(self) -> Tensor:
        """N, (heads, d, d)."""
        if self.summed is None or self.total is None:
            raise ValueError("no calibration tokens were seen")
        return self.summed / self.total[:, None, None]
