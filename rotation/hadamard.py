"""Orthogonal Hadamard rotations, and the fast transform that applies them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from .hadamard_matrices import base_matrix, is_constructible

_log = logging.getLogger(__name__)

_RADIX_BITS = 6  # a step multiplies by Sylvester's matrix of at most 64: measured fastest of 8 ... 512 on CPU
_NARROW = 16  # with fewer columns a batched product is up to ten times slower than one over a transposed copy
_FAST_LIMIT = 32768  # the longest row that fast_hadamard_transform takes


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


def _radices(length: int) -> list[int]:
    """Powers of two up to 64, the larger first, whose product is `length`, itself a power of two."""
    bits = length.bit_length() - 1
    steps = -(-bits // _RADIX_BITS)
    return [2 ** (bits // steps + (step < bits % steps)) for step in range(steps)]


def _sylvester(x: Tensor, scale: float) -> Tensor:
    """scale * x @ H_{2^k} along the last dimension of a contiguous x, Sylvester's order, in steps of radix up to 64."""
    length = x.shape[-1]
    radices = _radices(length)
    steps = len(radices)
    if x.is_cuda and steps > 1 and length <= _FAST_LIMIT and x.dtype == torch.float32 and (fast := _fast_transform()):
        return fast(x, scale)
    y, stride = x, 1
    for step, radix in enumerate(radices):
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
        if is_constructible(base):
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
    width: int = 1
    """Neighbours that move together: H stands for H kron I_width, which mixes vectors of `width` (heads)."""

    @classmethod
    def of(cls, size: int, seed: int | None = None, *, powers: bool = False, block: int | None = None) -> Hadamard:
        """The rotation of `size`: one block where a construction reaches it, else equal blocks, with a warning.

        The blocks are then of the largest power of two that divides size, as they are wherever `powers` asks for it;
        with `block`, a power of two, of so many channels, or the largest power of two below that divides size. `seed`
        randomises the signs of the rows.

        Raises:
            ValueError: size < 1.
        """
        if size < 1:
            raise ValueError(f"a rotation needs a size of at least 1, got {size}")
        if block is not None:
            return cls(size, math.gcd(size, block), 1, seed)
        order, base = _plan(size, powers)
        if order < size and not powers:
            text = "no Hadamard matrix of order %d can be constructed: rotating in %d blocks of %d, each for itself"
            _log.warning(text, size, size // order, order)
        return cls(size, order, base, seed)

    @classmethod
    def across(cls, heads: int, head_dim: int) -> Hadamard:
        """The rotation that mixes `heads` vectors of `head_dim` laid end to end (QuaRot, arXiv 2404.00456, section 4).

        H_heads kron I_head_dim where a construction reaches the number of heads; else the Hadamard matrix of the whole
        width, which mixes the channels of a head too, and exists for numbers of heads such as 9 or 14.
        """
        order, base = _plan(heads, False)
        if order < heads:
            return cls.of(heads * head_dim)
        return cls(heads * head_dim, order, base, width=head_dim)

    @property
    def blocks(self) -> int:
        """Number of equal diagonal blocks; 1 unless no construction reaches `size`, or blocks were asked for."""
        return self.size // (self.order * self.width)

    @property
    def factors(self) -> list[int]:
        """Orders of the matrices that `apply` multiplies each vector by in turn, where no kernel takes their place."""
        columns = self.order // self.base
        if self.base == 1:
            return _radices(columns)
        return [columns, self.base] if columns < _NARROW else [*_radices(columns), self.base]

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
        dense = torch.kron(dense, torch.eye(self.width, dtype=dtype, device=where))
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
            if self.width > 1:
                y = y.reshape(-1, self.size // self.width, self.width).transpose(1, 2).contiguous()
            y = self._blocks_times(y, transposed)
            if self.width > 1:
                y = y.reshape(-1, self.width, self.size // self.width).transpose(1, 2)
            y = y.reshape(x.shape)
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
