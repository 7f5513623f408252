"""The caches of vLLM and llama.cpp, against slow float64 references; and vLLM's own kernels, where it is installed."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rotoboa.boa.online.attention import AttentionTransform
from rotoboa.boa.online.served_cache import ServedQuantizer, _signs
from rotoboa.export.formats import gguf

ROOT = Path(__file__).parents[3]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Vectors of several magnitudes, one with outliers, one of zeros."""
    x = torch.randn(12, 2, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 12)[:, None, None]
    x[1, 0, 7], x[2] = 50, 0
    return x


def walsh(order: int) -> Tensor:
    """Sylvester's matrix by its definition: the sign of the bits that row and column share."""
    bits = [[(-1.0) ** bin(row & column).count("1") for column in range(order)] for row in range(order)]
    return torch.tensor(bits, dtype=torch.float64) / order**0.5


def blocks(matrix: Tensor, width: int) -> Tensor:
    return torch.block_diag(*[matrix] * (width // len(matrix)))


def away(value: float) -> int:
    """The nearest integer, halves away from zero."""
    return int(value + 0.5) if value >= 0 else -int(-value + 0.5)


def slow_vllm(x: list[float]) -> list[float]:
    low, high = min(x), max(x)
    scale = max((high - low) / 15, 1e-6 / 8)
    zero = min(max(away(-low / scale), 0), 15)
    return [(min(max(away(v / scale + zero), 0), 15) - zero) * scale for v in x]


def slow_llama(x: list[float], bits: int) -> list[float]:
    found: list[float] = []
    for start in range(0, len(x), 32):
        part = x[start : start + 32]
        largest = max(part, key=abs)
        middle = 2 ** (bits - 1)
        scale = abs(largest) / 127 if bits == 8 else largest / -middle
        stored = float(torch.tensor(scale).half())
        for v in part:
            if not scale:
                found.append(0.0)
            elif bits == 8:
                found.append(away(v / scale) * stored)
            else:
                found.append((min(2 * middle - 1, int(v / scale + middle + 0.5)) - middle) * stored)
    return found


@pytest.mark.parametrize("width", [64, 192])
def test_vllm_turns_and_rounds(x: Tensor, width: int) -> None:
    """Heads of 192 are turned in three blocks of 64, with the same signs."""
    x = x[..., :width].double()
    turn = blocks(torch.diag(_signs(64).double()) @ walsh(64), width)
    slow = (
        torch.tensor([slow_vllm(v) for v in (x @ turn).flatten(0, 1).tolist()], dtype=torch.float64).view_as(x) @ turn.T
    )
    found = ServedQuantizer("vllm", 4, width, True)(x)
    assert (found - slow).abs().max() <= 1e-9 and (found - x).abs().max() > 1e-3
    eight = ServedQuantizer("vllm", 8, width, False)(x)
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6)
    assert (eight - (x / scale).round() * scale).abs().max() <= 1e-9  # not turned


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize(("width", "keys", "values"), [(128, 128, 64), (192, 64, 64), (96, None, None)])
def test_llama_cpp_turns_and_rounds(x: Tensor, bits: int, width: int, keys: int | None, values: int | None) -> None:
    """Keys in the largest power of two that divides a head, values in 64; heads of no multiple of 64 are not turned."""
    x = x[..., :width].double()
    for of_keys, order in ((True, keys), (False, values)):
        turn = torch.eye(width, dtype=torch.float64) if order is None else blocks(walsh(order), width)
        slow = (
            torch.tensor([slow_llama(v, bits) for v in (x @ turn).flatten(0, 1).tolist()], dtype=torch.float64).view_as(
                x
            )
            @ turn.T
        )
        found = ServedQuantizer("llama.cpp", bits, width, of_keys)(x)
        assert (found - slow).abs().max() <= 1e-9 and (found - x).abs().max() > 1e-3


@pytest.mark.parametrize("width", [64, 96])
def test_keys_lie_in_the_order_of_the_file(x: Tensor, width: int) -> None:
    """Where RoPE turns neighbours in llama.cpp, rows of keys are reordered in the file, and so what is rounded."""
    x = x[..., :width].double()
    order = gguf.permute(torch.arange(width), 1)
    plain = ServedQuantizer("llama.cpp", 4, width, True)(x[..., order])
    found = ServedQuantizer("llama.cpp", 4, width, True, neighbours=True)(x)
    assert (found[..., order] - plain).abs().max() <= 1e-12 * plain.abs().max()
    assert (found - ServedQuantizer("llama.cpp", 4, width, True)(x)).abs().max() > 1e-3


def test_queries_stay_and_products_are_those_of_turned_keys(x: Tensor) -> None:
    """Keys turned back meet queries as they are: the same as both turned, which is what runtimes compute."""
    quantizer = ServedQuantizer("vllm", 4, 64, True)
    query, key = x[None, :, 0, None, :64].double(), x[None, :, 1, None, :64].double()
    q, k, v = AttentionTransform(key=quantizer, value=quantizer)(query, key, key)
    assert torch.equal(q, query) and torch.equal(k, v)
    theirs = quantizer.turned(query) @ quantizer._rounded(quantizer.turned(key)).transpose(-1, -2)
    assert (q @ k.transpose(-1, -2) - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.skipif(not VLLM.is_file(), reason="vLLM is not installed: `make runtimes` makes its environment")
@pytest.mark.parametrize("width", [64, 192])
def test_vllms_own_kernels_store_the_same(x: Tensor, tmp_path: Path, width: int) -> None:
    """But for the last four bits of a scale, where vLLM keeps the zero point, and ties that float32 turns."""
    x = x[..., :width].contiguous()
    save_file({"x": x}, tmp_path / "x")
    program = [str(VLLM), "-I", str(ROOT / "benchmarks" / "vllm_cache.py"), str(tmp_path / "x"), str(tmp_path / "y")]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "y")
    for bits in (4, 8):
        ours, size = ServedQuantizer("vllm", bits, width, True)(x), x.abs().amax(-1, keepdim=True).clamp_min(1e-9)
        off = ((ours - theirs[f"int{bits}"]).abs() / size).amax(-1)
        assert off.median() < 1e-5 and (off > 1e-4).float().mean() < 0.1
