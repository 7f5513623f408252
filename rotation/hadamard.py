"""Orthogonal Hadamard rotations: matrices of +-1 that are computed, and the fast transform that applies them.

Matrices of order m, tried in this order (`base_matrix`), none of them stored in this file:
- Sylvester (1867): order 2 m from order m;
- Paley (1933) I: q = m - 1 a prime power, 3 modulo 4; II: q = m / 2 - 1 a prime power, 1 modulo 4;
- Goethals and Seidel (1967): four circulants of order w = m / 4 with A A^T + B B^T + C C^T + D D^T = 4 w I, found by
  search. Rows that are constant on the orbits of a group of multipliers of Z_w leave few candidates; symmetric rows
  (multiplier -1) are Williamson's. This is what gives 92, 116, 156 and 172.
Every matrix is checked by H H^T = m I. The search is deterministic, because an exported model that rotates
activations at run time needs the very matrix its weights were rotated with: do not change which matrix is found.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_Ints = npt.NDArray[np.int64]
_MAX_BASE = 1024  # above this the dense product with the base matrix is no longer a small one
_MAX_ORBITS = 15  # 2^14 candidate rows: what is searched takes well under a second
_RADIX_BITS = 6  # a step multiplies by Sylvester's matrix of at most 64: measured fastest of 8 ... 512 on CPU
_NARROW = 16  # with fewer columns a batched product is up to ten times slower than one over a transposed copy
_FAST_LIMIT = 32768  # the longest row that fast_hadamard_transform takes


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _quadratic_character(p: int, k: int) -> _Ints:
    """chi of GF(p^k), shape (p^k,): 1 for squares, -1 for the others, 0 for 0.

    The element sum_j d_j x^j has index sum_j d_j p^j. x is made a generator by trying the polynomials
    x^k = sum_j taps_j x^j; then the even powers of x are the squares.
    """
    for taps in itertools.product(range(p), repeat=k):
        if taps[0] == 0:
            continue
        chi = np.zeros(p**k, dtype=np.int64)
        element = [1] + [0] * (k - 1)
        for power in range(p**k - 1):
            index = sum(digit * p**j for j, digit in enumerate(element))
            if chi[index]:
                break  # the powers of x came round early: not a generator
            chi[index] = 1 - 2 * (power % 2)
            shifted = [0, *element[:-1]]
            element = [(low + element[-1] * tap) % p for low, tap in zip(shifted, taps, strict=True)]
        else:
            return chi
    raise ArithmeticError(f"no generator of GF({p}^{k})")


def _conference(p: int, k: int) -> _Ints:
    """Paley's matrix C of order q + 1, q = p^k: zero diagonal, C C^T = q I; symmetric if q = 1 mod 4, else skew."""
    q = p**k
    places = p ** np.arange(k)
    digits = np.arange(q)[:, None] // places % p
    matrix = np.zeros((q + 1, q + 1), dtype=np.int64)
    matrix[1:, 1:] = _quadratic_character(p, k)[(digits[:, None] - digits) % p @ places]
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if q % 4 == 1 else -1
    return matrix


def _paley(m: int) -> _Ints | None:
    """Paley I or II of order m, or None."""
    if (m - 1) % 4 == 3 and (power := _prime_power(m - 1)):
        return _conference(*power) + np.eye(m, dtype=np.int64)
    if (m // 2 - 1) % 4 == 1 and (power := _prime_power(m // 2 - 1)):
        diagonal = np.kron(np.eye(m // 2, dtype=np.int64), [[1, -1], [-1, -1]])
        return np.kron(_conference(*power), [[1, 1], [1, -1]]) + diagonal
    return None


def _orbit_partitions(w: int) -> Iterator[_Ints]:
    """Labels (w,) of the orbits of Z_w under the multiplier groups <u> and <u, -1>, fewest orbits first."""
    groups = set()
    for u in (u for u in range(1, w) if math.gcd(u, w) == 1):
        cycle = [1]
        while (following := cycle[-1] * u % w) != 1:
            cycle.append(following)
        groups.add(tuple(sorted(cycle)))
        groups.add(tuple(sorted({*cycle, *(-v % w for v in cycle)})))
    partitions = {tuple(min(i * u % w for u in group) for i in range(w)) for group in groups}
    for smallest in sorted(partitions, key=lambda labels: (len(set(labels)), labels)):
        yield np.unique(smallest, return_inverse=True)[1]


def _match(rows: _Ints, keys: _Ints) -> _Ints | None:
    """Four of `rows` (n, w) whose `keys` (n,) add to 0, shape (4, w), or None.

    Their sums satisfy a^2 + b^2 + c^2 + d^2 = 4 w, which leaves few pairs to form.
    """
    w = rows.shape[1]
    sums = np.abs(rows.sum(axis=1))
    for a, b, c in itertools.combinations_with_replacement(range(1, math.isqrt(4 * w) + 1, 2), 3):
        d = math.isqrt(max(0, 4 * w - a * a - b * b - c * c))
        if d < c or a * a + b * b + c * c + d * d != 4 * w:
            continue
        one, two, three, four = (np.flatnonzero(sums == s) for s in (a, d, b, c))  # few with many: both lists short
        left = (keys[one][:, None] + keys[two]).ravel()
        right = -(keys[three][:, None] + keys[four]).ravel()
        _, i, j = np.intersect1d(left, right, return_indices=True)
        if i.size:
            index = [one[i[0] // two.size], two[i[0] % two.size], three[j[0] // four.size], four[j[0] % four.size]]
            return rows[index]
    return None


def _four_rows(w: int) -> _Ints | None:
    """First rows (4, w) of +-1 of circulants A, B, C, D with A A^T + ... + D D^T = 4 w I, or None if none is found."""
    # Row and complement are matched by one linear 64-bit key of the autocorrelations; overflow is meant to wrap.
    weights = np.array([pow(0x9E3779B97F4A7C15, s, 2**64) for s in range(1, w // 2 + 1)], dtype=np.uint64)
    for labels in _orbit_partitions(w):
        count = int(labels.max()) + 1
        if count > _MAX_ORBITS:
            return None
        signs = 1 - 2 * (np.arange(2 ** (count - 1))[:, None] >> np.arange(count) & 1)  # up to the sign of a row
        rows = signs[:, labels]
        spectra = np.abs(np.fft.rfft(rows)) ** 2
        fits = (spectra <= 4 * w + 1e-6).all(axis=1)  # the four spectra add to 4 w at every frequency
        autocorrelations = np.rint(np.fft.irfft(spectra[fits], w)).astype(np.int64)[:, 1 : w // 2 + 1]
        keys, first = np.unique(autocorrelations @ weights.view(np.int64), return_index=True)
        found = _match(rows[fits][first], keys)
        if found is not None:
            return found
    return None


def _goethals_seidel(w: int) -> _Ints | None:
    """Hadamard matrix of order 4 w (w odd) from four circulants, or None."""
    rows = _four_rows(w)
    if rows is None:
        return None
    shifts = (np.arange(w) - np.arange(w)[:, None]) % w
    a, b, c, d = (row[shifts] for row in rows)
    br, cr, dr, btr, ctr, dtr = (x[:, ::-1] for x in (b, c, d, b.T, c.T, d.T))
    return np.block([[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]])


@cache
def _construct(m: int) -> _Ints | None:
    """Hadamard matrix of order m, checked, or None where no construction here reaches m."""
    if m == 1:
        return np.ones((1, 1), dtype=np.int64)
    if (m > 2 and m % 4) or m < 1 or m > _MAX_BASE:
        return None
    half = _construct(m // 2) if m in (2, 4) or m % 8 == 0 else None
    matrix = np.kron([[1, 1], [1, -1]], half) if half is not None else _paley(m)
    if matrix is None and m % 8:
        matrix = _goethals_seidel(m // 4)
    if matrix is None:
        return None
    exact = matrix.astype(np.float64)
    if np.any(np.abs(matrix) != 1) or np.any(exact @ exact.T != m * np.eye(m)):
        raise ArithmeticError(f"the matrix constructed for order {m} is not a Hadamard matrix")
    return matrix


def base_matrix(m: int) -> Tensor:
    """Hadamard matrix of order m: int8, shape (m, m), entries +-1, H H^T = m I. Not symmetric in general.

    Raises:
        ValueError: no construction of this module reaches m (m up to 1024 is tried).
        ArithmeticError: the constructed matrix fails the check; a bug.
    """
    matrix = _construct(m)
    if matrix is None:
        raise ValueError(f"no Hadamard matrix of order {m} can be constructed here")
    return torch.from_numpy(matrix.astype(np.int8))


@lru_cache(maxsize=256)
def _factor(m: int, scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """scale * H_m, cached: read only."""
    with torch.inference_mode(False):  # a cached inference tensor would break a later caller that needs gradients
        return (base_matrix(m).to(torch.float64) * scale).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
def _signs(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random +-1 of shape (size,), cached: read only."""
    with torch.inference_mode(False):
        # On the CPU whatever the device, so that one seed is one rotation everywhere.
        generator = torch.Generator(device="cpu").manual_seed(seed)
        bits = torch.randint(0, 2, (size,), generator=generator, device="cpu")
        return (1 - 2 * bits).to(device=device, dtype=dtype)


@lru_cache(maxsize=1)
def _fast_transform() -> Callable[[Tensor, float], Tensor] | None:
    """The CUDA kernel of the optional package fast-hadamard-transform, or None where it is not installed."""
    try:
        from fast_hadamard_transform import hadamard_transform
    except ImportError:
        return None
    return hadamard_transform


def _sylvester(x: Tensor, scale: float) -> Tensor:
    """scale * x @ H_{2^k} along the last dimension of a contiguous x, Sylvester's order, in steps of radix up to 64."""
    length = x.shape[-1]
    bits = length.bit_length() - 1
    steps = -(-bits // _RADIX_BITS)
    if x.is_cuda and steps > 1 and length <= _FAST_LIMIT and x.dtype == torch.float32 and (fast := _fast_transform()):
        return fast(x, scale)
    y, stride = x, 1
    for step in range(steps):
        radix = 2 ** (bits // steps + (step < bits % steps))
        factor = _factor(radix, scale if step == 0 else 1.0, x.dtype, x.device)
        # H_{2^k} is the Kronecker product of the factors, each symmetric, so left and right products are the same.
        y = y.reshape(-1, radix) @ factor if stride == 1 else factor @ y.reshape(-1, radix, stride)
        stride *= radix
    return y.reshape(x.shape)


@cache
def _plan(size: int, powers: bool) -> tuple[int, int]:
    """(order, base): the smallest constructible base with base * 2^k = size, else a power of two and 1."""
    power = size & -size
    base = size // power
    while base <= size and not powers:
        if _construct(base) is not None:
            return size, base
        base *= 2
    return power, 1


@dataclass(frozen=True)
class Hadamard:
    """The orthogonal matrix Q = diag(signs) blockdiag(H, ..., H) / sqrt(order) with H = H_base kron H_{2^k}.

    Made by `Hadamard.of`. Example: Hadamard.of(2) is [[1, 1], [1, -1]] / sqrt(2); Hadamard.of(688) has base 172 and
    k = 2, one block.
    """

    size: int
    """Rows and columns of Q."""
    order: int
    """Rows and columns of one block: base * 2^k."""
    base: int
    """Order of the base matrix; 1 for a power of two."""
    seed: int | None = None
    """Seed of the random signs of the rows; None for no signs."""

    @classmethod
    def of(cls, size: int, seed: int | None = None, *, powers: bool = False) -> Hadamard:
        """The rotation of `size`: one block where a construction reaches it, else equal blocks, with a warning.

        The blocks are then of the largest power of two that divides size, as they are wherever `powers` asks for it;
        seed randomises the signs of the rows.

        Raises:
            ValueError: size < 1.
        """
        if size < 1:
            raise ValueError(f"a rotation needs a size of at least 1, got {size}")
        order, base = _plan(size, powers)
        if order < size and not powers:
            text = "no Hadamard matrix of order %d can be constructed: rotating in %d blocks of %d, each for itself"
            _log.warning(text, size, size // order, order)
        return cls(size, order, base, seed)

    @property
    def blocks(self) -> int:
        """Number of equal diagonal blocks; 1 unless no construction reaches `size`."""
        return self.size // self.order

    def signs(self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
        """The +-1 that multiply the rows of Q, shape (size,); ones if seed is None. On the CPU by default."""
        where = torch.device(device or "cpu")
        if self.seed is None:
            return torch.ones(self.size, dtype=dtype, device=where)
        return _signs(self.size, self.seed, dtype, where).clone()

    def matrix(self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
        """Q as a dense matrix, shape (size, size): for tests and small sizes."""
        where = torch.device(device or "cpu")
        block = base_matrix(self.base).to(device=where, dtype=dtype)
        while block.shape[0] < self.order:
            block = torch.kron(block, _factor(2, 1.0, dtype, where))
        dense = torch.kron(torch.eye(self.blocks, dtype=dtype, device=where), block / math.sqrt(self.order))
        return self.signs(dtype, where)[:, None] * dense

    def apply(self, x: Tensor) -> Tensor:
        """The product x @ Q along the last dimension: shape (..., size), a new tensor of x's dtype and device.

        bfloat16 and float16 are computed in float32.

        Raises:
            ValueError: the last dimension is not `size`, or x is not of a floating dtype.
        """
        return self._transform(x, transposed=False)

    def apply_transposed(self, x: Tensor) -> Tensor:
        """The product x @ Q^T along the last dimension, the inverse of `apply`: shapes, dtypes and errors as there."""
        return self._transform(x, transposed=True)

    def _transform(self, x: Tensor, transposed: bool) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.size or not x.is_floating_point():
            raise ValueError(f"expected floats of shape (..., {self.size}), got {x.dtype} of shape {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            y = x if x.dtype == torch.float64 else x.float()
            signs = None if self.seed is None else _signs(self.size, self.seed, y.dtype, x.device)
            if signs is not None and not transposed:
                y = y * signs
            y = self._blocks_times(y, transposed).reshape(x.shape)
            if signs is not None and transposed:
                y = y * signs
            return y.to(x.dtype)

    def _blocks_times(self, x: Tensor, transposed: bool) -> Tensor:
        """The product x @ H / sqrt(order), or H^T, block by block: (..., size) to (-1, base, 2^k)."""
        scale, columns = 1 / math.sqrt(self.order), self.order // self.base
        y = x.reshape(-1, self.base, columns)
        if self.base == 1 and columns > 1:
            return _sylvester(y, scale)
        factor = _factor(self.base, scale, y.dtype, y.device)
        if columns < _NARROW:
            y = _factor(columns, 1.0, y.dtype, y.device) @ y.permute(2, 0, 1).reshape(columns, -1)
            y = y.view(-1, self.base) @ (factor.T if transposed else factor)
            return y.view(columns, -1, self.base).permute(1, 2, 0)
        return (factor if transposed else factor.T) @ _sylvester(y, 1.0)
