from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import pytest
import torch

from rotoboa.rotation import hadamard_matrices
from rotoboa.rotation.hadamard_matrices import base_matrix

ORDERS = [1, 2, 4, 8, 12, 20, 28, 36, 40, 44, 52, 60, 68, 76, 84, 92, 100, 108, 116, 140, 148, 156, 172, 180, 924]

# Pinned: a change here makes the exported models that rotate at run time unreadable.
DIGESTS = {
    12: "db7478025ce74776",
    28: "75a65a7aa5dd6380",
    36: "1a7aed2f42a8c71d",
    52: "7aad05503190a3c5",
    92: "d0550a489f3a086c",
    116: "aa8b4dd94b182e17",
    156: "c431c35abee68b4e",
    172: "1b6415e6ebb113be",
}


@pytest.mark.parametrize("order", ORDERS)
def test_base_matrix_is_hadamard(order: int) -> None:
    hadamard_matrices._construct.cache_clear()
    start = time.process_time()
    matrix = base_matrix(order)
    assert time.process_time() - start < 2
    assert matrix.dtype == torch.int8 and matrix.shape == (order, order)
    wide = matrix.long()
    assert torch.equal(wide.abs(), torch.ones_like(wide))
    assert torch.equal(wide @ wide.T, order * torch.eye(order, dtype=torch.long))


def test_base_matrix_is_a_copy() -> None:
    base_matrix(12).zero_()
    assert base_matrix(12).abs().min() == 1


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 188, 1028])
def test_base_matrix_out_of_reach(order: int) -> None:
    with pytest.raises(ValueError, match=str(order)):
        base_matrix(order)


def test_matrices_never_change() -> None:
    """An exported model stores the size of its online rotation, not the matrix."""
    found = {m: hashlib.sha256(base_matrix(m).numpy().tobytes()).hexdigest()[:16] for m in DIGESTS}
    assert found == DIGESTS


def test_wrong_construction_is_caught(monkeypatch: pytest.MonkeyPatch, fresh_cache: None) -> None:
    monkeypatch.setattr(hadamard_matrices, "_paley", lambda m: (2 * torch.eye(m).long().numpy() - 1, "wrong"))
    with pytest.raises(ArithmeticError, match="order 12"):
        base_matrix(12)


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    hadamard_matrices._construct.cache_clear()
    yield
    hadamard_matrices._construct.cache_clear()
