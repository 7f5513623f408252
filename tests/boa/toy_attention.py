"""A small attention layer, what attention sees of it, and its probabilities and Hessians by explicit loops."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from rotoboa.boa.objective.statistics import AttentionStatistics, InputStatistics
from rotoboa.boa.online.attention import AttentionInputs

from .problems import random

KEY_HEADS, SIZE, WIDTH, LENGTH, SEQUENCES = 2, 4, 6, 7, 3
GROUPS = [1, 2, 4]  # query heads of a key head
SCALING = 0.5


def make_rope(length: int = LENGTH, size: int = SIZE, *, on: bool = True) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, size) of transformers' own embedding, which repeats each angle in both halves."""
    if not on:
        return torch.ones(length, size, dtype=torch.float64), torch.zeros(length, size, dtype=torch.float64)
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, head_dim=size)
    like = torch.zeros(1, dtype=torch.float64)
    cos, sin = LlamaRotaryEmbedding(config)(like, torch.arange(length)[None])
    return cos[0], sin[0]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over (batch, heads, length, size)."""
    turned, _ = apply_rotary_pos_emb(x, x, cos[None], sin[None])
    return turned


def rope_matrices(cos: Tensor, sin: Tensor) -> Tensor:
    """R_l, (length, size, size): transformers' RoPE of each unit vector, at each position."""
    length, size = cos.shape
    units = torch.eye(size, dtype=torch.float64)[None, :, None].expand(1, size, length, size)
    return rotated(units, cos, sin)[0].permute(1, 2, 0)  # column j is the image of unit vector j


def rope_mean(gram: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(1/L) sum over positions l of R_l^T G R_l, matrix by matrix."""
    return torch.stack([r.T @ gram @ r for r in rope_matrices(cos, sin)]).mean(0)


class Toy:
    """An attention layer without biases: inputs (sequences, length, width), weights, and what attention sees."""

    def __init__(
        self,
        group: int,
        *,
        rope: bool,
        sequences: int = SEQUENCES,
        length: int = LENGTH,
        width: int = WIDTH,
        key_heads: int = KEY_HEADS,
        seed: int = 0,
    ) -> None:
        self.group, self.key_heads, self.heads, self.length = group, key_heads, group * key_heads, length
        self.x = random(sequences, length, width, seed=seed) * torch.linspace(0.5, 2, width, dtype=torch.float64)
        scale = width**-0.5
        self.w_q = random(self.heads, SIZE, width, seed=seed + 1) * scale
        self.w_k = random(key_heads, SIZE, width, seed=seed + 2) * scale
        self.w_v = random(key_heads, SIZE, width, seed=seed + 3) * scale
        # Multiples of 1/4, so that their products are exact in float32 too.
        self.w_o = (4 * random(5, self.heads * SIZE, seed=seed + 4)).round() / 4
        self.cos, self.sin = make_rope(length, on=rope)

    def project(self, weight: Tensor) -> Tensor:
        """(sequences, heads, length, size) before RoPE."""
        return torch.einsum("btc,hrc->bhtr", self.x, weight)

    @property
    def query(self) -> Tensor:
        return rotated(self.project(self.w_q), self.cos, self.sin)

    @property
    def key(self) -> Tensor:
        return rotated(self.project(self.w_k), self.cos, self.sin)

    @property
    def seen(self) -> AttentionInputs:
        """What attention computes with, of all sequences."""
        return AttentionInputs(self.query, self.key, SCALING)

    def part(self, sequences: slice) -> AttentionInputs:
        """Of some."""
        seen = self.seen
        return AttentionInputs(seen.query[sequences], seen.key[sequences], SCALING)

    @property
    def attended(self) -> Tensor:
        """What attention gives, (sequences, length, heads * size)."""
        values = self.project(self.w_v).repeat_interleave(self.group, 1)
        a = torch.stack([torch.stack([dense(self, s, h) for h in range(self.heads)]) for s in range(len(self.x))])
        return (a @ values).transpose(1, 2).flatten(2)

    def output_of(self, head: int) -> Tensor:
        """W_O,h, (hidden, size)."""
        return self.w_o[:, head * SIZE : (head + 1) * SIZE]

    def query_heads(self, key_head: int) -> range:
        """The query heads that read a key head."""
        return range(key_head * self.group, (key_head + 1) * self.group)

    def grams(self) -> AttentionStatistics:
        """Collected one sequence, then all the others."""
        statistics = AttentionStatistics()
        for part in (slice(0, 1), slice(1, None)):
            if len(self.x[part]):
                statistics.add_grams(self.query[part], self.key[part])
        return statistics

    def h_in(self) -> Tensor:
        statistics = InputStatistics()
        statistics.add(self.x, self.x)
        return statistics.objective().h_in[0]


def softly(toy: Toy, sequence: int, head: int) -> Tensor:
    """Causal probabilities (length, length), number by number."""
    q, k = toy.query[sequence, head], toy.key[sequence, head // toy.group]
    a = torch.zeros(toy.length, toy.length, dtype=torch.float64)
    for i in range(toy.length):
        weights = [math.exp(float(q[i] @ k[j]) * SCALING) for j in range(i + 1)]
        a[i, : i + 1] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return a


def check_kronecker(function: Callable[[Tensor], Tensor], h_in: Tensor, h_out: Tensor) -> None:
    """The Hessian of `function` of dW (size, width) is 2 H_in kron H_out, to 1e-8 of its largest entry."""
    hessian = torch.autograd.functional.hessian(function, torch.zeros(SIZE, len(h_in), dtype=torch.float64))
    # vec stacks columns: index (c, r).
    stacked = hessian.permute(1, 0, 3, 2).reshape(h_in.numel() // len(h_in) * SIZE, -1)
    expected = 2 * torch.kron(h_in.double(), h_out.double())
    torch.testing.assert_close(stacked, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def dense(toy: Toy, sequence: int, head: int) -> Tensor:
    """As `softly`, fast."""
    logits = toy.query[sequence, head] @ toy.key[sequence, head // toy.group].T * SCALING
    return (logits + torch.full_like(logits, -math.inf).triu(1)).softmax(-1)


def attention_module(group: int, size: int = SIZE) -> Any:
    """What attention functions of transformers read of the module that calls them."""
    return SimpleNamespace(num_key_value_groups=group, head_dim=size, is_causal=True, training=False)
