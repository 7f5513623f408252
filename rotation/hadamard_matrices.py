"""Hadamard matrices: square, of +-1, with orthogonal rows; computed, none of them stored in this file.

Constructions of order m, tried in this order:
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
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Ints = npt.NDArray[np.int64]
_MAX_BASE = 1024  # above this the dense product with the base matrix is no longer a small one
_MAX_ORBITS = 15  # 2^14 candidate rows: what is searched takes well under a second


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


def _paley(m: int) -> tuple[_Ints, str] | None:
    """Paley I or II of order m and its name, or None."""
    if (m - 1) % 4 == 3 and (power := _prime_power(m - 1)):
        return _conference(*power) + np.eye(m, dtype=np.int64), f"Paley I of order {m} over GF({m - 1})"
    if (m // 2 - 1) % 4 == 1 and (power := _prime_power(m // 2 - 1)):
        diagonal = np.kron(np.eye(m // 2, dtype=np.int64), [[1, -1], [-1, -1]])
        matrix = np.kron(_conference(*power), [[1, 1], [1, -1]]) + diagonal
        return matrix, f"Paley II of order {m} over GF({m // 2 - 1})"
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


def _goethals_seidel(w: int) -> tuple[_Ints, str] | None:
    """Hadamard matrix of order 4 w (w odd) from four circulants and its name, or None."""
    rows = _four_rows(w)
    if rows is None:
        return None
    shifts = (np.arange(w) - np.arange(w)[:, None]) % w
    a, b, c, d = (row[shifts] for row in rows)
    br, cr, dr, btr, ctr, dtr = (x[:, ::-1] for x in (b, c, d, b.T, c.T, d.T))
    matrix = np.block([[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]])
    return matrix, f"Goethals-Seidel of order {4 * w}"


@cache
def _construct(m: int) -> tuple[_Ints, str] | None:
    """Hadamard matrix of order m, checked, and its name; None where no construction here reaches m."""
    if m == 1:
        return np.ones((1, 1), dtype=np.int64), "Sylvester of order 1"
    if (m > 2 and m % 4) or m < 1 or m > _MAX_BASE:
        return None
    half = _construct(m // 2) if m in (2, 4) or m % 8 == 0 else None
    found = (np.kron([[1, 1], [1, -1]], half[0]), f"{half[1]} x Sylvester of order 2") if half else _paley(m)
    if found is None and m % 8:
        found = _goethals_seidel(m // 4)
    if found is None:
        return None
    matrix = found[0]
    exact = matrix.astype(np.float64)
    if np.any(np.abs(matrix) != 1) or np.any(exact @ exact.T != m * np.eye(m)):
        raise ArithmeticError(f"the matrix constructed for order {m} is not a Hadamard matrix")
    return found


def is_constructible(m: int) -> bool:
    """Whether a construction of this module reaches order m; m up to 1024 is tried."""
    return _construct(m) is not None


def construction(m: int) -> str:
    """How `base_matrix(m)` is made, such as "Paley I of order 12 over GF(11)"; raises as it does."""
    return _reached(m)[1]


def base_matrix(m: int) -> Tensor:
    """Hadamard matrix of order m: int8, shape (m, m), entries +-1, H H^T = m I. Not symmetric in general.

    Raises:
        ValueError: no construction of this module reaches m (m up to 1024 is tried).
        ArithmeticError: the constructed matrix fails the check; a bug.
    """
    return torch.from_numpy(_reached(m)[0].astype(np.int8))


def _reached(m: int) -> tuple[_Ints, str]:
    found = _construct(m)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {m} can be constructed here")
    return found
