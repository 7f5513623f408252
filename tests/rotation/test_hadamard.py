from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rotoboa.rotation import hadamard
from rotoboa.rotation.hadamard import Hadamard
from rotoboa.rotation.hadamard_matrices import base_matrix

# FFN and hidden sizes of published models -> base order. Each is one block; none of them needs the fallback.
MODEL_SIZES = {
    64: 1,
    128: 1,
    688: 172,
    1536: 12,
    2048: 1,
    2560: 20,
    2816: 44,
    3072: 12,
    3584: 28,
    4096: 1,
    4864: 76,
    5120: 20,
    5632: 44,
    6912: 108,
    8192: 1,
    8960: 140,
    9728: 76,
    11008: 172,
    13824: 108,
    14336: 28,
    17920: 140,
    18944: 148,
    27648: 108,
    28672: 28,
    29568: 924,
}

# What no construction reaches: size -> (blocks, order). 27392 = 107 * 256 is Qwen1.5-32B's FFN; 428 is out of reach.
FALLBACK_SIZES = {3: (3, 1), 6: (3, 2), 47 * 4: (47, 4), 27392: (107, 256)}

# All paths of the transform: one column, few, many; one Sylvester step, two, three; symmetric bases and others; blocks.
SIZES = [1, 2, 6, 12, 32, 36, 40, 64, 92, 128, 172, 344, 576, 688, 736, 896, 2752, 8192]


def _noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("size", "base"), MODEL_SIZES.items())
def test_model_sizes_are_one_block(size: int, base: int, caplog: pytest.LogCaptureFixture) -> None:
    rotation = Hadamard.of(size)
    assert (rotation.blocks, rotation.order, rotation.base) == (1, size, base)
    assert not caplog.records
    x = _noise(2, size, dtype=torch.float32)
    y = rotation.apply(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotation.apply_transposed(y), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "expected"), FALLBACK_SIZES.items())
def test_fallback_to_blocks(size: int, expected: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rotation = Hadamard.of(size, seed=3)
    assert (rotation.blocks, rotation.order) == expected
    assert len(caplog.records) == 1 and str(size) in caplog.text
    x = _noise(2, size)
    back = rotation.apply_transposed(rotation.apply(x))
    assert len(caplog.records) == 1
    torch.testing.assert_close(back, x, atol=1e-12, rtol=0)
    if size < 1000:
        dense = rotation.matrix()
        torch.testing.assert_close(dense @ dense.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("size", [size for size in SIZES if size < 1000])
def test_equals_the_dense_matrix(size: int, seed: int | None) -> None:
    rotation = Hadamard.of(size, seed)
    dense, x = rotation.matrix(), _noise(2, 3, size)
    kept = x.clone()
    assert (dense @ dense.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12
    assert (rotation.apply(x) - x @ dense).abs().max() < 1e-12
    assert (rotation.apply_transposed(x) - x @ dense.T).abs().max() < 1e-12
    assert torch.equal(x, kept)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("size", SIZES)
def test_transposed_inverts(size: int, seed: int | None) -> None:
    rotation, x = Hadamard.of(size, seed), _noise(3, size)
    assert (rotation.apply_transposed(rotation.apply(x)) - x).abs().max() < 1e-12
    assert (rotation.apply(rotation.apply_transposed(x)) - x).abs().max() < 1e-12


def test_definition() -> None:
    """Q = diag(signs) (H_base kron H_{2^k}) / sqrt(order), from its parts."""
    rotation = Hadamard.of(24, seed=1)
    plain = torch.kron(base_matrix(12), torch.tensor([[1, 1], [1, -1]])).double() / 24**0.5
    signs = rotation.signs()
    assert set(signs.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(rotation.matrix(), signs[:, None] * plain)
    torch.testing.assert_close(Hadamard.of(24).matrix(), plain)
    assert not torch.equal(base_matrix(12), base_matrix(12).T)  # so the transposed tests mean something


@pytest.mark.parametrize("size", [8192, 11008, 14336, 29568])
def test_definition_of_large_sizes(size: int) -> None:
    """Single rows and columns of Q: entry (i, j) of H_{2^k} is -1 to the number of ones in i & j."""
    rotation = Hadamard.of(size)
    columns = size // rotation.base
    base = base_matrix(rotation.base).double()
    for index in (0, size // 3, size - 1):
        one = torch.zeros(size, dtype=torch.float64)
        one[index] = size**0.5
        sylvester = torch.tensor([(-1.0) ** (index % columns & j).bit_count() for j in range(columns)]).double()
        row, column = base[index // columns], base[:, index // columns]
        assert (rotation.apply(one) - torch.kron(row, sylvester)).abs().max() < 1e-12
        assert (rotation.apply_transposed(one) - torch.kron(column, sylvester)).abs().max() < 1e-12


def test_signs_never_change() -> None:
    """An exported model stores the seed of its online rotation, not the signs."""
    signs = Hadamard.of(688, seed=1).signs().to(torch.int8)
    assert hashlib.sha256(signs.numpy().tobytes()).hexdigest()[:16] == "0dc0f50e2dcede4b"


def test_seeds() -> None:
    first, again, other = (Hadamard.of(688, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert torch.equal(first.matrix(), again.matrix())
    assert not torch.equal(first.matrix(), other.matrix())
    assert torch.equal(Hadamard.of(688).signs(), torch.ones(688, dtype=torch.float64))
    first.signs().zero_()
    assert first.signs().abs().min() == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("size", [32, 688, 1792])
def test_half_precision_is_rounded_once(size: int, dtype: torch.dtype, tolerance: float) -> None:
    rotation, x = Hadamard.of(size, seed=5), _noise(4, size, dtype=dtype)
    for fast in (rotation.apply, rotation.apply_transposed):
        y, exact = fast(x), fast(x.double())
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= tolerance * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("size", [64, 688, 1792])
def test_strided_and_empty_inputs(size: int) -> None:
    rotation = Hadamard.of(size, seed=5)
    x = _noise(size, 3, 2).transpose(0, 2)
    assert torch.equal(rotation.apply(x), rotation.apply(x.contiguous()))
    assert rotation.apply(x[:0]).shape == (0, 3, size)
    assert rotation.apply(x[0, 0]).shape == (size,)


def test_cache_survives_its_first_caller() -> None:
    """The first call may come from inference mode, from autocast or while a model is laid out on the meta device."""
    hadamard._factor.cache_clear()
    hadamard._signs.cache_clear()
    rotation, x = Hadamard.of(1792, seed=5), _noise(2, 1792, dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        early = rotation.apply(x)
    leaf = x.clone().requires_grad_()
    late = rotation.apply(leaf)
    assert torch.equal(early, late.detach())
    late.backward(x)
    torch.testing.assert_close(leaf.grad, rotation.apply_transposed(x))


def _kernel(x: Tensor, scale: float) -> Tensor:
    return x @ Hadamard.of(x.shape[-1]).matrix(torch.float32, x.device) * x.shape[-1] ** 0.5 * scale


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kernel", [None, _kernel])
@pytest.mark.parametrize("size", [64, 688, 1792, 4096])
def test_cuda(size: int, kernel: Callable[[Tensor, float], Tensor] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hadamard, "_fast_transform", lambda: kernel)
    rotation, x = Hadamard.of(size, seed=5), _noise(4, size)
    for fast in (rotation.apply, rotation.apply_transposed):
        torch.testing.assert_close(fast(x.cuda()).cpu(), fast(x), atol=1e-12, rtol=0)
        torch.testing.assert_close(fast(x.float().cuda()).cpu(), fast(x.float()), atol=1e-5, rtol=0)
        assert fast(x.bfloat16().cuda()).dtype == torch.bfloat16


def test_kernel_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    hadamard._fast_transform.cache_clear()
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", None)  # import raises ImportError
    assert hadamard._fast_transform() is None
    hadamard._fast_transform.cache_clear()
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", SimpleNamespace(hadamard_transform=_kernel))
    assert hadamard._fast_transform() is _kernel
    hadamard._fast_transform.cache_clear()


@pytest.mark.parametrize("size", [0, -8])
def test_size_below_one(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Hadamard.of(size)


@pytest.mark.parametrize(("size", "block", "order"), [(96, 32, 32), (128, 16, 16), (48, 64, 16), (64, 64, 64)])
@pytest.mark.parametrize("seed", [None, 5])
def test_blocks_of_a_size(size: int, block: int, order: int, seed: int | None) -> None:
    """diag(signs) of the whole, and Sylvester's matrix along the diagonal; a size that it does not divide has less."""
    rotation = Hadamard.of(size, seed, block=block)
    assert (rotation.order, rotation.blocks) == (order, size // order)
    dense = torch.block_diag(*[Hadamard.of(order).matrix()] * (size // order))
    dense = rotation.signs()[:, None] * dense
    x = _noise(3, size)
    torch.testing.assert_close(rotation.apply(x), x @ dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.apply_transposed(x), x @ dense.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("x", [torch.ones(2, 32), torch.ones(2, 64, dtype=torch.int32), torch.tensor(1.0)])
def test_wrong_input(x: Tensor) -> None:
    rotation = Hadamard.of(64)
    for fast in (rotation.apply, rotation.apply_transposed):
        with pytest.raises(ValueError, match="64"):
            fast(x)


@pytest.mark.parametrize(("size", "order"), [(688, 16), (96, 32), (128, 128), (3, 1)])
def test_blocks_of_powers_of_two(size: int, order: int) -> None:
    """Also where a construction reaches all of it: Sylvester's matrix along the diagonal, orthogonal."""
    rotation = Hadamard.of(size, powers=True)
    assert (rotation.order, rotation.base, rotation.blocks) == (order, 1, size // order)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    block = Hadamard.of(order).matrix()
    torch.testing.assert_close(matrix, torch.block_diag(*[block] * (size // order)), rtol=0, atol=0)
    x = torch.randn(2, size, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ matrix, rtol=0, atol=1e-12)
