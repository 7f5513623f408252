"""H_in, H_out and drift of values against brute force in float64: explicit loops, and Hessians by autograd."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from rotoboa.boa.objective import statistics as module
from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.objective.statistics import AttentionStatistics, value_stride
from rotoboa.boa.online.attention import AttentionInputs, causal_probabilities

from ..problems import random
from ..toy_attention import GROUPS, KEY_HEADS, SCALING, SIZE, WIDTH, Toy, check_kronecker, dense, softly


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
    monkeypatch.setattr(module, "PROBABILITIES", 1)  # chunks of 64
    wide = Mock(side_effect=AttentionStatistics._add_wide)
    monkeypatch.setattr(AttentionStatistics, "_add_wide", lambda *given: wide(*given))
    full, quantized = (Toy(4, rope=True, sequences=5, length=130, width=width) for _ in range(2))
    quantized.x = full.x + 0.2 * random(*full.x.shape, seed=30)
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
                total = total + (softly(toy, s, head) @ x @ dw.T @ toy.output_of(head).T).square().sum()
            return total

        check_kronecker(output_error, objective.h_in[head], objective.h_out[head])


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
                        error = softly(toy, s, attending) @ x @ dw.T @ toy.output_of(read).T
                        total = total + error.square().sum()
            return total

        check_kronecker(relaxed, objective.h_in[head], objective.h_out[head])


def test_value_target_is_the_least_squares_solution() -> None:
    """min over Q of ||W X_f A_f^T - Q X_q A_q^T||: both streams have their own inputs and their own attention."""
    full, quantized = Toy(1, rope=True), Toy(1, rope=True)
    quantized.x = full.x + 0.2 * random(*full.x.shape, seed=30)
    quantized.w_q = full.w_q + 0.2 * random(*full.w_q.shape, seed=31)
    objective = _values(full, quantized).value_objective(full.w_o)
    target = Objective(objective.h_in, drift=objective.drift).target(full.w_v)
    for head in range(KEY_HEADS):
        y_full, y_quantized = (
            torch.cat([softly(toy, s, head) @ x for s, x in enumerate(toy.x)]) for toy in (full, quantized)
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
            y = dense(quantized, s, h) @ quantized.x[s]
            h_in[h // full.group] += y.T @ y
            residual[h // full.group] += (dense(full, s, h) @ full.x[s] - y).T @ y
    return h_in, full.w_v @ residual


# (query heads of a key head, key heads, length, width): forming A X first is cheaper for narrow inputs, the group's
# sum of A^T A for wide ones; long sequences are taken in several chunks of query positions.
SHAPES = [(2, 2, 7, 6), (4, 1, 5, 24), (4, 2, 300, 6), (8, 1, 300, 600), (1, 2, 80, 6), (1, 2, 5, 24)]


@pytest.mark.parametrize(("group", "key_heads", "length", "width"), SHAPES)
def test_both_orders_of_multiplication(group: int, key_heads: int, length: int, width: int) -> None:
    full, quantized = (
        Toy(group, rope=True, sequences=2, length=length, width=width, key_heads=key_heads) for _ in range(2)
    )
    quantized.x = full.x + 0.2 * random(*full.x.shape, seed=30)
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
    quantized.x = full.x + 0.2 * random(*full.x.shape, seed=30)
    # Channels as large models have them: outsized, and alike.
    quantized.x[..., :4] = 100 * (quantized.x[..., :1] + 0.01 * quantized.x[..., :4])
    seen = AttentionInputs(quantized.seen[0].float(), quantized.seen[1].float(), SCALING)
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


def test_a_torch_that_knows_no_capabilities_mixes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """2.9 and 2.10, which this package allows."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    module._has_bfloat16.cache_clear()
    assert module.mixing_dtype(torch.ones(1)) == torch.float32
    module._has_bfloat16.cache_clear()
