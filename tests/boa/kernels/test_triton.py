"""The Triton kernels against the torch form: on a GPU where there is one, else in Triton's interpreter, on the CPU."""

import logging
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rotoboa.boa.kernels import dispatch as kernels
from rotoboa.boa.objective.objective import inverse_factor

from ..problems import damped_gram, random

pytest.importorskip("triton")
from rotoboa.boa.kernels import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _random(*shape: int, seed: int) -> Tensor:
    return random(*shape, seed=seed, dtype=torch.float32).to(DEVICE)


def _gram(batch: int, size: int, seed: int) -> Tensor:
    return damped_gram(batch, size, seed).to(DEVICE)


def _part_of(larger: Tensor) -> Tensor:
    """What is in the middle of a larger tensor: its rows do not follow one another in memory."""
    shape = [size + 3 for size in larger.shape]
    inside = tuple(slice(1, size + 1) for size in larger.shape)
    whole = torch.full(shape, torch.nan, device=larger.device)
    whole[inside] = larger
    return whole[inside]


@pytest.mark.parametrize(("batch", "rows", "width"), [(1, 1, 1), (1, 6, 40), (3, 5, 17), (1, 1, 260)])
def test_rounding_is_the_same_to_the_last_bit(batch: int, rows: int, width: int) -> None:
    block = _part_of(4 * _random(batch, rows, width, seed=1))
    upper = _part_of(inverse_factor(_gram(batch, width, 2)).float())
    scale = _random(batch, rows, width, seed=3).abs() * 0.2 + 0.3
    zero = _random(batch, rows, width, seed=4).round().clamp(-1, 1) + 2
    given = (block, upper, scale, zero, 3)
    (found, errors), (expected, expected_errors) = triton_kernels.round_block(*given), kernels._round_in_torch(*given)
    assert torch.equal(found, expected) and torch.equal(errors, expected_errors)
    assert found.unique().tolist() == [0, 1, 2, 3] or found.numel() < 30


def test_ties_go_to_the_even_integer_and_values_beyond_the_grid_to_its_ends() -> None:
    block = torch.tensor([0.5, 1.5, 2.5, -0.5, 6.5, 1e9, -1e9], device=DEVICE)[None, :, None]
    one = torch.ones_like(block)
    found, errors = triton_kernels.round_block(block, one[:, :1], one, 0 * one, 7)
    assert found.flatten().tolist() == [0, 2, 2, 0, 6, 7, 0]
    assert torch.equal(errors, block - found)


@pytest.mark.parametrize(("tied", "shared"), [(False, True), (False, False), (True, True), (True, False)])
def test_descent_is_the_same(tied: bool, shared: bool) -> None:
    """Independent rows to the last bit; tied ones but for the order of sums over rows."""
    heads, rows, width = 2, 11, 24
    h_in = _part_of(_gram(1 if shared else heads, width, 1).float())
    h_out = _gram(heads, rows, 2).float() if tied else None
    q = torch.randint(0, 8, (heads, rows, width), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    scale = _random(heads, rows, width, seed=4).abs() * 0.1 + 0.2
    inner = _part_of(_random(heads, rows, width, seed=5) @ h_in * 0.1)
    diagonal = h_in.diagonal(dim1=1, dim2=2)[:, None]
    newton = -1 / (scale * (diagonal if h_out is None else diagonal * h_out.diagonal(dim1=1, dim2=2)[..., None]))
    given = (inner, _part_of(q), scale, newton, h_in, h_out, 7)
    before = inner.clone()
    (found, steps), (expected, expected_steps) = triton_kernels.descend_block(*given), kernels._descend_in_torch(*given)
    assert torch.equal(inner, before)
    assert torch.equal(found, expected)
    if tied:
        torch.testing.assert_close(steps, expected_steps)
    else:
        assert torch.equal(steps, expected_steps)
    assert int((found != q).sum()) == int((steps != 0).sum()) > 30


def test_tied_rows_move_together_or_alone_or_not_at_all() -> None:
    """One column: rows that all want to move the same way against a metric of their sum."""
    ones = torch.ones(1, 4, 1, device=DEVICE)
    h_in, sum_of_rows = torch.ones(1, 1, 1, device=DEVICE), torch.ones(1, 4, 4, device=DEVICE)
    metric = sum_of_rows + 0.01 * torch.eye(4, device=DEVICE)

    def moved(error: list[float], h_out: Tensor) -> list[float]:
        inner = torch.tensor(error, device=DEVICE)[None, :, None]
        newton = -ones / h_out.diagonal(dim1=1, dim2=2)[..., None]
        found, _ = triton_kernels.descend_block(inner, 3 * ones, ones, newton, h_in, h_out, 7)
        return [float(value) - 3 for value in found.flatten()]

    assert moved([1.0, 1.0, 1.0, 1.0], torch.eye(4, device=DEVICE)[None]) == [-1, -1, -1, -1]
    assert moved([0.0, 0.9, 0.0, 0.0], metric) == [0, -1, 0, 0]  # one step mends the sum, four would overshoot it
    assert moved([0.1, 0.1, 0.1, 0.1], metric) == [0, 0, 0, 0]


@pytest.mark.parametrize(("heads", "shared", "width"), [(1, True, 1), (2, True, 12), (2, False, 9)])
def test_search_is_the_same(heads: int, shared: bool, width: int) -> None:
    """Of whole numbers, so that sums in another order are the same."""
    h_in = (8 * _gram(1 if shared else heads, width, 1).float()).round()
    h_in = h_in + h_in.transpose(1, 2)
    q = torch.randint(0, 4, (heads, 3, width), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    scale = 2 ** torch.randint(-1, 2, (heads, 3, width), generator=torch.Generator().manual_seed(4)).float().to(DEVICE)
    gradient = (4 * _random(heads, 3, width, seed=5) @ h_in).round()
    given = (_part_of(gradient), _part_of(q), scale, _part_of(h_in), 3, 3 * width)
    found = triton_kernels.search_block(*given, kernels.REST)
    assert torch.equal(found, kernels._search_in_torch(*given)) and not torch.equal(found, q)


# -- which form is taken ----------------------------------------------------------------------------------------------


def test_triton_serves_where_it_agrees(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    block = _random(1, 4, 8, seed=1)
    given = (block, torch.eye(8, device=DEVICE)[None], torch.ones_like(block), torch.ones_like(block), 3)
    calls: list[str] = []

    class Wrong:
        MOST_TIED_ROWS = 8

        @staticmethod
        def round_block(*arguments: Any) -> tuple[Tensor, Tensor]:
            calls.append("round")
            found, errors = kernels._round_in_torch(*arguments)
            return found + 1, errors

        @staticmethod
        def descend_block(*arguments: Any) -> tuple[Tensor, Tensor]:
            return kernels._descend_in_torch(*arguments)

        @staticmethod
        def search_block(*arguments: Any) -> Tensor:
            return kernels._search_in_torch(*arguments[:-1])

    wrong: Any = Wrong
    monkeypatch.setattr(kernels, "is_compiled", lambda tensor: False)
    monkeypatch.setattr(kernels, "_triton_for", lambda tensor: wrong)
    assert torch.equal(kernels.round_block(*given)[0], kernels._round_in_torch(*given)[0] + 1) and calls == ["round"]
    assert not kernels._agrees(wrong, torch.device(DEVICE))

    right: Any = type("Right", (Wrong,), {"round_block": staticmethod(kernels._round_in_torch)})
    assert kernels._agrees(right, torch.device(DEVICE))

    monkeypatch.setattr(kernels, "_agrees", lambda *arguments: False)
    kernels._triton.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kernels._triton(torch.device("cuda:0")) is None
    assert "Triton cannot be used on cuda:0 (its integers differ from those of torch)" in caplog.text
    kernels._triton.cache_clear()


def test_triton_is_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROTOBOA_TRITON", "0")
    kernels._triton.cache_clear()
    assert kernels._triton(torch.device(DEVICE)) is None
    kernels._triton.cache_clear()


# -- compiled for a GPU that need not be there ------------------------------------------------------------------------

COMPILE = """
import sys
sys.argv[0] = "rotoboa"  # as the command line, which imports no more than it needs
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rotoboa.boa.kernels import triton_kernels as kernels

WHOLE = ("rows", "width", "batch", "moves", "rest")
for name, fixed in (
    ("_round", {"tile": 4}), ("_descend", {"tile": 4, "batch": 1}), ("_descend_tied", {"tile": 32}), ("_search", {})
):
    function = getattr(kernels, name)
    fixed = {"span": 32, **fixed}
    def kind(argument):
        if argument in fixed:
            return "constexpr"
        if argument == "levels":
            return "fp32"
        return "i32" if argument[-2:] in ("_b", "_r") or argument in WHOLE else "*fp32"
    source = ASTSource(function, {argument: kind(argument) for argument in function.arg_names}, fixed)
    options = {"num_warps": 1, **kernels._OPTIONS}
    print(name, triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def test_compiled_code_divides_exactly_and_fuses_nothing(tmp_path: Any) -> None:
    """PTX for an H100: every division is rounded to nearest, and no product is fused with a sum."""
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    codes = re.split(r"^(?=_round|_descend|_search)", done.stdout, flags=re.MULTILINE)[1:]
    assert len(codes) == 4
    for code in codes:
        assert "mul.f32" in code or "mul.rn.f32" in code
        assert not re.search(r"\bfma\.|\bmad\.\w+\.f32|div\.(full|approx)", code)
    assert codes[0].count("div.rn.f32") == 8  # two for each of four rows
