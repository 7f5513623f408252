"""H_in and H_out of queries and keys against brute force in float64: explicit loops, and Hessians by autograd."""

from functools import partial

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.objective.pull_back import rope_pull_back
from rotoboa.boa.objective.statistics import AttentionStatistics
from rotoboa.rotation.hadamard import Hadamard

from ..problems import random
from ..toy_attention import GROUPS, KEY_HEADS, SIZE, Toy, check_kronecker, make_rope, rope_matrices, rope_mean, rotated


def _squares(toy: Toy, dw: Tensor, met: Tensor) -> Tensor:
    """(1/L) sum over positions l and all tokens x of ||met R_l dW x||^2, `met` (vectors, size)."""
    moved = (toy.x.flatten(0, 1) @ dw.T)[:, None, None].expand(-1, 1, toy.length, SIZE)
    return (rotated(moved, toy.cos, toy.sin) @ met.T).square().sum() / toy.length


@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize("group", GROUPS)
def test_queries(group: int, rope: bool) -> None:
    """(1/L) sum over positions l and all tokens x of ||K~_h R_l dW x||^2, with the keys of every sequence."""
    toy = Toy(group, rope=rope)
    keys, _ = toy.grams().grams()
    h_out = rope_pull_back(keys, toy.cos, toy.sin)
    for head in range(toy.heads):
        relaxed = partial(_squares, toy, met=toy.key[:, head // group].flatten(0, 1))
        check_kronecker(relaxed, toy.h_in(), h_out[head // group])


@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize("group", GROUPS)
def test_keys(group: int, rope: bool) -> None:
    """The mirror of the above, summed over the query heads of the key head."""
    toy = Toy(group, rope=rope)
    _, queries = toy.grams().grams()
    h_out = rope_pull_back(queries, toy.cos, toy.sin)
    for head in range(KEY_HEADS):

        def relaxed(dw: Tensor, head: int = head) -> Tensor:
            met = [toy.query[:, h].flatten(0, 1) for h in toy.query_heads(head)]
            return torch.stack([_squares(toy, dw, queries) for queries in met]).sum()

        check_kronecker(relaxed, toy.h_in(), h_out[head])


@pytest.mark.parametrize("group", GROUPS)
def test_without_rope_it_is_the_error_of_the_logits(group: int) -> None:
    """Of one sequence, exactly: Q K^T before the softmax."""
    toy = Toy(group, rope=False, sequences=1)
    keys, queries = (rope_pull_back(gram, toy.cos, toy.sin) for gram in toy.grams().grams())
    e_q, e_k = 0.1 * random(*toy.w_q.shape, seed=20), 0.1 * random(*toy.w_k.shape, seed=21)
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
    cos, sin = make_rope(11, size)
    x = random(3, 20, size, seed=5)
    gram = x.transpose(1, 2) @ x
    for r in rope_matrices(cos, sin):
        torch.testing.assert_close(r @ r.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)  # cos is float32's
    expected = rope_mean(gram, cos, sin)
    pulled = rope_pull_back(gram, cos, sin)
    torch.testing.assert_close(pulled, expected, rtol=0, atol=1e-11)
    assert (pulled - gram).abs().max() > 0.1
    torch.testing.assert_close(rope_pull_back(gram.float(), cos, sin), expected.float(), rtol=1e-5, atol=1e-5)


def test_rope_pull_back_of_scaled_embeddings() -> None:
    """Some families scale cosine and sine, and need not repeat angles in both halves: R_l is what it is."""
    cos, sin = 1.3 * random(9, 6, seed=1).cos(), 1.3 * random(9, 6, seed=2).sin()
    gram = random(1, 6, 30, seed=3)
    gram = gram @ gram.transpose(1, 2)
    expected = rope_mean(gram[0], cos, sin)
    torch.testing.assert_close(rope_pull_back(gram, cos, sin)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [4, 12])
def test_r3_is_taken_out_of_the_grams(size: int) -> None:
    """12 is Paley's matrix, which is not symmetric."""
    rotation = Hadamard.of(size)
    query, key = random(2, 4, 9, size, seed=1), random(2, 2, 9, size, seed=2)
    plain, rotated = AttentionStatistics(), AttentionStatistics(rotation)
    for i in range(2):
        plain.add_grams(query[i : i + 1], key[i : i + 1])
        rotated.add_grams(rotation.apply(query[i : i + 1]), rotation.apply(key[i : i + 1]))
    for one, other in zip(plain.grams(), rotated.grams(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
