"""Every H_in and H_out of BoA's table against brute force in float64: explicit loops, and Hessians by autograd."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from rotoboa.boa import statistics
from rotoboa.boa import statistics as module
from rotoboa.boa.attention import Seen, attention_forward, causal_probabilities, set_attention
from rotoboa.boa.objective import Objective
from rotoboa.boa.statistics import (
    AttentionStatistics,
    InputStatistics,
    add_gram,
    mirrored,
    rope_pull_back,
    value_stride,
)
from rotoboa.rotation.hadamard import Hadamard

KEY_HEADS, SIZE, WIDTH, LENGTH, SEQUENCES = 2, 4, 6, 7, 3
GROUPS = [1, 2, 4]  # query heads of a key head
SCALING = 0.5


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _rope(length: int = LENGTH, size: int = SIZE, *, on: bool = True) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, size) of transformers' own embedding, which repeats each angle in both halves."""
    if not on:
        return torch.ones(length, size, dtype=torch.float64), torch.zeros(length, size, dtype=torch.float64)
    config = LlamaConfig(hidden_size=size, num_attention_heads=1, head_dim=size)
    like = torch.zeros(1, dtype=torch.float64)
    cos, sin = LlamaRotaryEmbedding(config)(like, torch.arange(length)[None])
    return cos[0], sin[0]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over (batch, heads, length, size)."""
    turned, _ = apply_rotary_pos_emb(x, x, cos[None], sin[None])
    return turned


def _matrices(cos: Tensor, sin: Tensor) -> Tensor:
    """R_l, (length, size, size): transformers' RoPE of each unit vector, at each position."""
    length, size = cos.shape
    units = torch.eye(size, dtype=torch.float64)[None, :, None].expand(1, size, length, size)
    return _rotated(units, cos, sin)[0].permute(1, 2, 0)  # column j is the image of unit vector j


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
        self.x = _random(sequences, length, width, seed=seed) * torch.linspace(0.5, 2, width, dtype=torch.float64)
        scale = width**-0.5
        self.w_q = _random(self.heads, SIZE, width, seed=seed + 1) * scale
        self.w_k = _random(key_heads, SIZE, width, seed=seed + 2) * scale
        self.w_v = _random(key_heads, SIZE, width, seed=seed + 3) * scale
        # Multiples of 1/4, so that their products are exact in float32 too.
        self.w_o = (4 * _random(5, self.heads * SIZE, seed=seed + 4)).round() / 4
        self.cos, self.sin = _rope(length, on=rope)

    def project(self, weight: Tensor) -> Tensor:
        """(sequences, heads, length, size) before RoPE."""
        return torch.einsum("btc,hrc->bhtr", self.x, weight)

    @property
    def query(self) -> Tensor:
        return _rotated(self.project(self.w_q), self.cos, self.sin)

    @property
    def key(self) -> Tensor:
        return _rotated(self.project(self.w_k), self.cos, self.sin)

    @property
    def seen(self) -> Seen:
        """What attention computes with, of all sequences."""
        return Seen(self.query, self.key, self.project(self.w_v), SCALING)

    def part(self, sequences: slice) -> Seen:
        """Of some."""
        seen = self.seen
        return Seen(seen.query[sequences], seen.key[sequences], seen.value[sequences], SCALING)

    @property
    def attended(self) -> Tensor:
        """What attention gives, (sequences, length, heads * size)."""
        values = self.project(self.w_v).repeat_interleave(self.group, 1)
        a = torch.stack([torch.stack([_dense(self, s, h) for h in range(self.heads)]) for s in range(len(self.x))])
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


def _softly(toy: Toy, sequence: int, head: int) -> Tensor:
    """Causal probabilities (length, length), number by number."""
    q, k = toy.query[sequence, head], toy.key[sequence, head // toy.group]
    a = torch.zeros(toy.length, toy.length, dtype=torch.float64)
    for i in range(toy.length):
        weights = [math.exp(float(q[i] @ k[j]) * SCALING) for j in range(i + 1)]
        a[i, : i + 1] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return a


def _kronecker(function: Callable[[Tensor], Tensor], h_in: Tensor, h_out: Tensor) -> None:
    """The Hessian of `function` of dW (size, width) is 2 H_in kron H_out, to 1e-8 of its largest entry."""
    hessian = torch.autograd.functional.hessian(function, torch.zeros(SIZE, len(h_in), dtype=torch.float64))
    # vec stacks columns: index (c, r).
    stacked = hessian.permute(1, 0, 3, 2).reshape(h_in.numel() // len(h_in) * SIZE, -1)
    expected = 2 * torch.kron(h_in.double(), h_out.double())
    torch.testing.assert_close(stacked, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


# queries and keys


@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize("group", GROUPS)
def test_queries(group: int, rope: bool) -> None:
    """(1/L) sum over positions l and all tokens x of ||K~_h R_l dW x||^2, with the keys of every sequence."""
    toy = Toy(group, rope=rope)
    keys, _ = toy.grams().grams()
    h_out = rope_pull_back(keys, toy.cos, toy.sin)
    tokens = toy.x.flatten(0, 1)
    for head in range(toy.heads):
        met = toy.key[:, head // group].flatten(0, 1)

        def relaxed(dw: Tensor, met: Tensor = met) -> Tensor:
            moved = (tokens @ dw.T)[:, None, None].expand(-1, 1, toy.length, SIZE)
            return (_rotated(moved, toy.cos, toy.sin) @ met.T).square().sum() / toy.length

        _kronecker(relaxed, toy.h_in(), h_out[head // group])


@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize("group", GROUPS)
def test_keys(group: int, rope: bool) -> None:
    """The mirror of the above, summed over the query heads of the key head."""
    toy = Toy(group, rope=rope)
    _, queries = toy.grams().grams()
    h_out = rope_pull_back(queries, toy.cos, toy.sin)
    tokens = toy.x.flatten(0, 1)
    for head in range(KEY_HEADS):

        def relaxed(dw: Tensor, head: int = head) -> Tensor:
            moved = (tokens @ dw.T)[:, None, None].expand(-1, 1, toy.length, SIZE)
            turned = _rotated(moved, toy.cos, toy.sin)
            total = torch.zeros((), dtype=torch.float64)
            for h in toy.query_heads(head):
                total = total + (turned @ toy.query[:, h].flatten(0, 1).T).square().sum()
            return total / toy.length

        _kronecker(relaxed, toy.h_in(), h_out[head])


@pytest.mark.parametrize("group", GROUPS)
def test_without_rope_it_is_the_error_of_the_logits(group: int) -> None:
    """Of one sequence, exactly: Q K^T before the softmax."""
    toy = Toy(group, rope=False, sequences=1)
    keys, queries = (rope_pull_back(gram, toy.cos, toy.sin) for gram in toy.grams().grams())
    e_q, e_k = 0.1 * _random(*toy.w_q.shape, seed=20), 0.1 * _random(*toy.w_k.shape, seed=21)
    x, h_in = toy.x[0], toy.h_in()[None]
    for h in range(toy.heads):
        error = x @ e_q[h].T @ toy.key[0, h // group].T
        loss = Objective(h_in, keys[h // group, None]).loss(e_q[None, h])
        torch.testing.assert_close(loss[0], error.square().sum(), rtol=1e-12, atol=0)
    for g in range(KEY_HEADS):
        errors = [toy.query[0, h] @ (x @ e_k[g].T).T for h in toy.query_heads(g)]
        loss = Objective(h_in, queries[g, None]).loss(e_k[None, g])
        torch.testing.assert_close(loss[0], torch.stack(errors).square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_rope_pull_back(size: int) -> None:
    cos, sin = _rope(11, size)
    x = _random(3, 20, size, seed=5)
    gram = x.transpose(1, 2) @ x
    expected = torch.zeros_like(gram)
    for r in _matrices(cos, sin):
        torch.testing.assert_close(r @ r.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)  # cos is float32's
        expected += r.T @ gram @ r / 11
    pulled = rope_pull_back(gram, cos, sin)
    torch.testing.assert_close(pulled, expected, rtol=0, atol=1e-11)
    assert (pulled - gram).abs().max() > 0.1
    torch.testing.assert_close(rope_pull_back(gram.float(), cos, sin), expected.float(), rtol=1e-5, atol=1e-5)


def test_rope_pull_back_of_scaled_embeddings() -> None:
    """Some families scale cosine and sine, and need not repeat angles in both halves: R_l is what it is."""
    cos, sin = 1.3 * _random(9, 6, seed=1).cos(), 1.3 * _random(9, 6, seed=2).sin()
    gram = _random(1, 6, 30, seed=3)
    gram = gram @ gram.transpose(1, 2)
    expected = torch.stack([r.T @ gram[0] @ r for r in _matrices(cos, sin)]).mean(0)
    torch.testing.assert_close(rope_pull_back(gram, cos, sin)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [4, 12])
def test_r3_is_taken_out_of_the_grams(size: int) -> None:
    """12 is Paley's matrix, which is not symmetric."""
    rotation = Hadamard.of(size)
    query, key = _random(2, 4, 9, size, seed=1), _random(2, 2, 9, size, seed=2)
    plain, rotated = AttentionStatistics(), AttentionStatistics(rotation)
    for i in range(2):
        plain.add_grams(query[i : i + 1], key[i : i + 1])
        rotated.add_grams(rotation.apply(query[i : i + 1]), rotation.apply(key[i : i + 1]))
    for one, other in zip(plain.grams(), rotated.grams(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


# values


def _values(full: Toy, quantized: Toy) -> AttentionStatistics:
    """Collected one sequence, then all the others."""
    statistics = quantized.grams()
    for part in (slice(0, 1), slice(1, None)):
        if len(full.x[part]):
            statistics.add_values(quantized.x[part], full.attended[part], quantized.part(part), full.w_v.flatten(0, 1))
    return statistics


@pytest.mark.parametrize(("width", "stride"), [(WIDTH, 2), (WIDTH, 3), (WIDTH, 50), (300, 2), (300, 3)])
def test_values_of_every_nth_query(width: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against A X with the other queries left out; batches of any size, chunks that end anywhere."""
    monkeypatch.setattr(statistics, "PROBABILITIES", 1)  # chunks of 64
    wide = Mock(side_effect=AttentionStatistics._add_wide)
    monkeypatch.setattr(AttentionStatistics, "_add_wide", lambda *given: wide(*given))
    full, quantized = (Toy(4, rope=True, sequences=5, length=130, width=width) for _ in range(2))
    quantized.x = full.x + 0.2 * _random(*full.x.shape, seed=30)
    weight = full.w_v.flatten(0, 1)
    found = quantized.grams()
    for part in (slice(0, 2), slice(2, 5)):
        given = (quantized.x[part], full.attended[part], quantized.part(part), weight)
        found.add_values(*given, stride=stride, first=7 + part.start)
    goal = found.value_objective(quantized.w_o)
    h_in = torch.zeros(KEY_HEADS, width, width, dtype=torch.float64)
    drift = torch.zeros(KEY_HEADS, SIZE, width, dtype=torch.float64)
    for s, x in enumerate(quantized.x):
        a = causal_probabilities(quantized.seen, s, 0, 130).unflatten(1, (4, 130))[:, :, (7 + s) % stride :: stride]
        wanted = full.attended[s].unflatten(-1, (KEY_HEADS, 4, SIZE)).permute(1, 2, 0, 3)
        mixed = (a @ x).flatten(1, 2)
        lacking = wanted[:, :, (7 + s) % stride :: stride].flatten(1, 2) - mixed @ full.w_v.transpose(1, 2)
        h_in += mixed.transpose(1, 2) @ mixed
        drift += lacking.transpose(1, 2) @ mixed
    assert goal.drift is not None and wide.call_count == (5 if width > WIDTH else 0)
    for one, other in ((goal.h_in, h_in), (goal.drift, drift)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(other.abs().max()))


def test_how_many_queries_are_left_out() -> None:
    """As many as leave so many rows of A X, of all heads of the group, for each input channel."""
    assert value_stride(128 * 512, 2, 256, 128) == 4
    assert value_stride(128 * 512, 2, 256, 129) == 3  # what is left over is kept
    assert value_stride(8 * 512, 2, 256, 128) == value_stride(128 * 512, 2, 256, 0) == 1


@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
def test_values_of_one_query_head_each_are_exact(rope: bool) -> None:
    """The squared error of the attention layer's output, of all sequences."""
    toy = Toy(1, rope=rope)
    objective = _values(toy, toy).value_objective(toy.w_o)
    assert objective.h_out is not None
    for head in range(KEY_HEADS):

        def output_error(dw: Tensor, head: int = head) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for s, x in enumerate(toy.x):
                total = total + (_softly(toy, s, head) @ x @ dw.T @ toy.output_of(head).T).square().sum()
            return total

        _kronecker(output_error, objective.h_in[head], objective.h_out[head])


@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize("group", GROUPS)
def test_values_of_groups(group: int, rope: bool) -> None:
    """H_in and H_out each sum over the query heads: every head's output weight meets every head's attention."""
    toy = Toy(group, rope=rope)
    objective = _values(toy, toy).value_objective(toy.w_o)
    assert objective.h_out is not None
    for head in range(KEY_HEADS):

        def relaxed(dw: Tensor, head: int = head) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for attending in toy.query_heads(head):
                for read in toy.query_heads(head):
                    for s, x in enumerate(toy.x):
                        error = _softly(toy, s, attending) @ x @ dw.T @ toy.output_of(read).T
                        total = total + error.square().sum()
            return total

        _kronecker(relaxed, objective.h_in[head], objective.h_out[head])


def test_value_target_is_the_least_squares_solution() -> None:
    """min over Q of ||W X_f A_f^T - Q X_q A_q^T||: both streams have their own inputs and their own attention."""
    full, quantized = Toy(1, rope=True), Toy(1, rope=True)
    quantized.x = full.x + 0.2 * _random(*full.x.shape, seed=30)
    quantized.w_q = full.w_q + 0.2 * _random(*full.w_q.shape, seed=31)
    objective = _values(full, quantized).value_objective(full.w_o)
    target = Objective(objective.h_in, drift=objective.drift).target(full.w_v)
    for head in range(KEY_HEADS):
        y_full, y_quantized = (
            torch.cat([_softly(toy, s, head) @ x for s, x in enumerate(toy.x)]) for toy in (full, quantized)
        )
        expected = torch.linalg.lstsq(y_quantized, y_full @ full.w_v[head].T).solution.T
        torch.testing.assert_close(target[head], expected, rtol=0, atol=1e-10)
        assert (expected - full.w_v[head]).abs().max() > 0.01


def _literally(full: Toy, quantized: Toy) -> tuple[Tensor, Tensor]:
    """X_q A_q^T A_q X_q^T and W (X_f A_f^T - X_q A_q^T) A_q X_q^T, summed over sequences and a group's query heads."""
    width = full.x.shape[-1]
    h_in, residual = torch.zeros(2, full.key_heads, width, width, dtype=torch.float64)
    for s in range(len(full.x)):
        for h in range(full.heads):
            y = _dense(quantized, s, h) @ quantized.x[s]
            h_in[h // full.group] += y.T @ y
            residual[h // full.group] += (_dense(full, s, h) @ full.x[s] - y).T @ y
    return h_in, full.w_v @ residual


def _dense(toy: Toy, sequence: int, head: int) -> Tensor:
    """As `_softly`, fast."""
    logits = toy.query[sequence, head] @ toy.key[sequence, head // toy.group].T * SCALING
    return (logits + torch.full_like(logits, -math.inf).triu(1)).softmax(-1)


# (query heads of a key head, key heads, length, width): forming A X first is cheaper for narrow inputs, the group's
# sum of A^T A for wide ones; long sequences are taken in several chunks of query positions.
SHAPES = [(2, 2, 7, 6), (4, 1, 5, 24), (4, 2, 300, 6), (8, 1, 300, 600), (1, 2, 80, 6), (1, 2, 5, 24)]


@pytest.mark.parametrize(("group", "key_heads", "length", "width"), SHAPES)
def test_both_orders_of_multiplication(group: int, key_heads: int, length: int, width: int) -> None:
    full, quantized = (
        Toy(group, rope=True, sequences=2, length=length, width=width, key_heads=key_heads) for _ in range(2)
    )
    quantized.x = full.x + 0.2 * _random(*full.x.shape, seed=30)
    statistics = _values(full, quantized)
    h_in, drift = _literally(full, quantized)
    objective = statistics.value_objective(full.w_o)
    torch.testing.assert_close(objective.h_in, h_in, rtol=0, atol=1e-12 * float(h_in.abs().max()))
    assert objective.drift is not None
    torch.testing.assert_close(objective.drift, drift, rtol=0, atol=1e-12 * float(h_in.abs().max()))


def test_the_same_stream_twice_has_lost_nothing() -> None:
    toy = Toy(2, rope=True)
    objective = _values(toy, toy).value_objective(toy.w_o)
    assert objective.drift is not None
    assert objective.drift.abs().max() < 1e-11


def test_narrow_and_wide_agree() -> None:
    """Channels of zeros make the same input a wide one: another order of multiplication, the same numbers."""
    toy, other = Toy(4, rope=True, length=40, key_heads=2), Toy(4, rope=True, length=40, key_heads=2)
    other.x = 0.9 * toy.x
    narrow = _values(toy, other)
    wide = AttentionStatistics()
    padded, weight = (torch.nn.functional.pad(part, (0, 194)) for part in (other.x, toy.w_v.flatten(0, 1)))
    wide.add_values(padded, toy.attended, other.seen, weight)
    wide.add_grams(other.query, other.key)
    one, two = narrow.value_objective(toy.w_o), wide.value_objective(toy.w_o)
    assert one.drift is not None and two.drift is not None
    for narrower, wider in ((one.h_in, two.h_in[:, :WIDTH]), (one.drift, two.drift)):
        scale = float(narrower.abs().max())
        torch.testing.assert_close(wider[..., :WIDTH], narrower, rtol=0, atol=1e-12 * scale)
    assert two.h_in[:, WIDTH:].abs().max() == 0 and two.drift[:, :, WIDTH:].abs().max() == 0


@pytest.mark.parametrize(("bfloat16", "tolerance"), [(False, 1e-5), (True, 5e-3)])
def test_products_in_single_and_half_precision(
    bfloat16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, on the same inputs: bfloat16 is off by its rounding, and nothing more."""
    monkeypatch.setattr(module, "_has_bfloat16", lambda: bfloat16)
    full, quantized = (Toy(2, rope=True, sequences=4, length=80, width=24) for _ in range(2))
    quantized.x = full.x + 0.2 * _random(*full.x.shape, seed=30)
    # Channels as large models have them: outsized, and alike.
    quantized.x[..., :4] = 100 * (quantized.x[..., :1] + 0.01 * quantized.x[..., :4])
    seen = Seen(*(part.float() for part in quantized.seen[:3]), SCALING)
    statistics = AttentionStatistics()
    statistics.add_grams(seen.query, seen.key)
    statistics.add_values(quantized.x.float(), full.attended.float(), seen, full.w_v.flatten(0, 1).float())
    found = statistics.value_objective(full.w_o.float())
    assert found.h_in.dtype == torch.float32
    h_in, drift = _literally(full, quantized)
    assert found.drift is not None
    assert float((found.h_in - h_in).norm() / h_in.norm()) < tolerance
    # A difference of two outputs that are alike: what counts is its error beside the outputs themselves.
    assert float((found.drift - drift).norm() / (full.w_v @ h_in).norm()) < tolerance
    # Of inputs that are rounded it is still a Gram.
    assert float(torch.linalg.eigvalsh(found.h_in.double()).min() / found.h_in.diagonal(dim1=1, dim2=2).max()) > -1e-5


@pytest.mark.parametrize("columns", [3, 64, 65, 300])
def test_grams_by_half(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MIRROR", 50)
    x = _random(2, 9, columns)
    total = torch.zeros(2, columns, columns, dtype=torch.float64)
    for part in x.split(4, 1):
        add_gram(total, part)
    torch.testing.assert_close(mirrored(total), x.transpose(1, 2) @ x, rtol=0, atol=1e-12)


# attention


def _module(group: int, key_heads: int = KEY_HEADS) -> Any:
    return SimpleNamespace(num_key_value_groups=group, is_causal=True, training=False)


@pytest.mark.parametrize("group", GROUPS)
def test_causal_probabilities(group: int) -> None:
    toy = Toy(group, rope=True)
    for s in range(SEQUENCES):
        a = causal_probabilities(toy.seen, s, 0, LENGTH).view(KEY_HEADS, group, LENGTH, LENGTH).flatten(0, 1)
        for h in range(toy.heads):
            torch.testing.assert_close(a[h], _softly(toy, s, h), rtol=0, atol=1e-14)
        assert a.triu(1).abs().max() == 0, "a query attends to what comes after it"


@pytest.mark.parametrize("group", GROUPS)
def test_causal_probabilities_in_parts(group: int) -> None:
    """Query positions start .. stop - 1 over the keys before stop: rows of the whole."""
    toy = Toy(group, rope=True)
    whole = causal_probabilities(toy.seen, 1, 0, LENGTH).unflatten(1, (group, LENGTH))
    for start, stop in ((0, 3), (3, 5), (5, LENGTH), (6, 7)):
        part = causal_probabilities(toy.seen, 1, start, stop)
        assert part.shape == (KEY_HEADS, group * (stop - start), stop)
        part = part.unflatten(1, (group, -1))
        torch.testing.assert_close(part, whole[:, :, start:stop, :stop], rtol=0, atol=1e-15)
        assert whole[:, :, start:stop, stop:].abs().sum() == 0


@pytest.mark.parametrize("group", GROUPS)
def test_causal_probabilities_are_those_of_transformers(group: int) -> None:
    """Its eager attention, whose softmax is float32's: 1e-6."""
    toy = Toy(group, rope=True)
    mask = torch.full((LENGTH, LENGTH), -math.inf, dtype=torch.float64).triu(1)[None, None]
    value = toy.project(toy.w_v)
    module = _module(group)
    output, expected = eager_attention_forward(module, toy.query, toy.key, value, mask, SCALING)
    for s in range(SEQUENCES):
        a = causal_probabilities(toy.seen, s, 0, LENGTH).view(toy.heads, LENGTH, LENGTH)
        torch.testing.assert_close(a, expected[s], rtol=0, atol=1e-6)
        attended = (a @ value[s].repeat_interleave(group, 0)).transpose(0, 1)
        torch.testing.assert_close(attended, output[s], rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_causal_probabilities_are_those_that_attention_uses(group: int) -> None:
    """The registered function, through SDPA in float64; and what its recorder sees is what it computes with."""
    toy = Toy(group, rope=True)
    value = toy.project(toy.w_v)
    recorded: list[Seen] = []
    module = _module(group)
    set_attention(module, None, recorded.append)
    output, _ = attention_forward(module, toy.query, toy.key, value, None, scaling=SCALING)
    for s in range(SEQUENCES):
        a = causal_probabilities(recorded[0], s, 0, LENGTH).view(toy.heads, LENGTH, LENGTH)
        attended = (a @ value[s].repeat_interleave(group, 0)).transpose(0, 1)
        torch.testing.assert_close(output[s], attended, rtol=0, atol=1e-13)


# linear inputs


def test_input_statistics() -> None:
    """X_q X_q^T, (X_f - X_q) X_q^T and (Y - W X_q) X_q^T, token by token, in batches of any shape."""
    full, quantized, wanted = _random(3, 4, 5, seed=1), _random(3, 4, 5, seed=2), _random(3, 4, 2, seed=3)
    weight = _random(2, 5, seed=4)
    h_in, residual = torch.zeros(2, 5, 5, dtype=torch.float64)
    drift = torch.zeros(2, 5, dtype=torch.float64)
    for s in range(3):
        for t in range(4):
            h_in += torch.outer(quantized[s, t], quantized[s, t])
            residual += torch.outer(full[s, t] - quantized[s, t], quantized[s, t])
            drift += torch.outer(wanted[s, t] - weight @ quantized[s, t], quantized[s, t])
    statistics = InputStatistics()
    statistics.add(full[:2], quantized[:2], wanted[:2])
    statistics.add(full[2], quantized[2], wanted[2])
    objective = statistics.objective(weight)
    assert objective.residual is not None and objective.drift is not None and objective.h_out is None
    for found, expected in ((objective.h_in, h_in), (objective.residual, residual), (objective.drift, drift)):
        torch.testing.assert_close(found, expected[None], rtol=0, atol=1e-13)


def test_tokens_count_by_the_norm_that_reads_them() -> None:
    """By one over the mean square of the residual stream, in all three sums; a token of zeros does no harm."""
    full, quantized, wanted = _random(3, 4, 5, seed=1), _random(3, 4, 5, seed=2), _random(3, 4, 2, seed=3)
    weight = _random(2, 5, seed=5)
    stream = _random(3, 4, 7, seed=4) * torch.logspace(-2, 2, 4, dtype=torch.float64)[:, None]
    sums = [torch.zeros(5, 5).double(), torch.zeros(5, 5).double(), torch.zeros(2, 5).double()]
    for s in range(3):
        for t in range(4):
            counts = 7 / float(stream[s, t] @ stream[s, t])
            lost = wanted - quantized @ weight.T
            for total, left in zip(sums, (quantized, full - quantized, lost), strict=True):
                total += counts * torch.outer(left[s, t], quantized[s, t])
    statistics = InputStatistics()
    statistics.add(full[:2], quantized[:2], wanted[:2], stream=stream[:2])
    statistics.add(full[2], quantized[2], wanted[2], stream=stream[2])
    objective = statistics.objective(weight)
    for found, expected in zip((objective.h_in, objective.residual, objective.drift), sums, strict=True):
        assert found is not None
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    statistics.add(zeros, zeros, zeros[:, :2], stream=torch.zeros(2, 7, dtype=torch.float64))
    assert torch.equal(statistics.objective(weight).h_in, objective.h_in)


def test_input_statistics_without_drift() -> None:
    statistics = InputStatistics()
    statistics.add(_random(3, 5), _random(3, 5))
    assert statistics.objective().drift is None


def test_adding_does_not_write_to_what_was_given() -> None:
    toy = Toy(2, rope=True)
    seen = toy.seen
    copies = [tensor.clone() for tensor in (toy.x, seen.query, seen.key)]
    attended, weight = toy.attended, toy.w_v.flatten(0, 1)
    copies += [attended.clone(), weight.clone()]
    statistics, inputs = AttentionStatistics(), InputStatistics()
    for _ in range(2):
        statistics.add_grams(seen.query, seen.key)
        statistics.add_values(toy.x, attended, seen, weight)
        inputs.add(toy.x, toy.x)
    given = (toy.x, seen.query, seen.key, attended, weight)
    assert all(torch.equal(a, b) for a, b in zip(copies, given, strict=True))


def test_nothing_seen() -> None:
    with pytest.raises(ValueError, match="no calibration tokens"):
        InputStatistics().objective()
    with pytest.raises(ValueError, match="no calibration tokens"):
        AttentionStatistics().grams()
    with pytest.raises(ValueError, match="no calibration tokens"):
        AttentionStatistics().value_objective(_random(5, 8))


def test_wanted_outputs_need_the_weight() -> None:
    statistics = InputStatistics()
    statistics.add(None, _random(3, 5), _random(3, 2))
    with pytest.raises(ValueError, match="weight is not given"):
        statistics.objective()
