"""TF32 where sums over tokens are formed, IEEE where they are solved, and nothing changed on the CPU or afterwards."""

from typing import Any

import pytest
import torch

from rotoboa.boa.block import block as block_module
from rotoboa.boa.block import solving
from rotoboa.boa.objective.statistics import InputStatistics
from rotoboa.boa.precision import exact_products, quick_products
from rotoboa.boa.solver.rounding_settings import Settings

from .small_block import run_small

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_on_cuda(with_cuda: None) -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with quick_products(CUDA):
        assert torch.get_float32_matmul_precision() == "high"
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_error_leaves_nothing_changed() -> None:
    with pytest.raises(ValueError), quick_products(CUDA):
        raise ValueError
    assert torch.get_float32_matmul_precision() == "highest"


def test_on_a_cpu_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: pytest.fail(precision))
    with quick_products(CPU), exact_products():
        assert torch.get_float32_matmul_precision() == "highest"


def test_which_part_of_a_block_computes_how(with_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {"statistics": set(), "solver": set()}

    def watched(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            seen[name].add(torch.get_float32_matmul_precision())
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(block_module, "quick_products", lambda device: quick_products(CUDA))
    monkeypatch.setattr(InputStatistics, "add", watched("statistics", InputStatistics.add))
    monkeypatch.setattr(InputStatistics, "objective", watched("solver", InputStatistics.objective))
    monkeypatch.setattr(solving, "solve", watched("solver", solving.solve))
    run_small(Settings(bits=4, refine=0, starts=1, tabu=0))
    assert seen == {"statistics": {"high"}, "solver": {"highest"}}


def rounded_to_11_bits(x: torch.Tensor) -> torch.Tensor:
    """As a tensor core reads a float32: 13 of its 23 stored bits are dropped."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_what_tf32_does_to_a_hessian() -> None:
    """H_in of inputs in 11 bits: positive semi-definite, and off by a part of the damping of 1 %."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=generator) * torch.linspace(0.01, 10, 64)
    exact, quick = (part.double().T @ part.double() for part in (x, rounded_to_11_bits(x)))
    assert float(torch.linalg.eigvalsh(quick)[0]) > 0
    scale = exact.diagonal().sqrt()
    assert float(((quick - exact) / scale / scale[:, None]).abs().max()) < 1e-3
