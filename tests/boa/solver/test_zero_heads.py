"""Heads that nothing reads, as pruning leaves them: H_out is zero there, and every form of the solver goes through."""

import pytest
import torch

from rotoboa.boa.kernels import dispatch as kernels
from rotoboa.boa.kernels import squares
from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.solver import refine
from rotoboa.boa.solver.rounding import quantize
from rotoboa.boa.solver.rounding_settings import Settings

from ..problems import check_stored, problem, same
from ..small_block import HIDDEN, LLAMA, PLAIN, QUICK, SIZE, make_block, make_decoder, make_streams, run_block

HEADS, ROWS, COLUMNS = 2, 4, 8
SMALL = 1e-10  # of the inputs' squares: as float32, a product with the least of these numbers is zero
METHODS = pytest.mark.parametrize("method", ["boa", "aespa"])
FEW = Settings(bits=4, iterations=5, refine=1, starts=2, tabu=0.5)


@pytest.fixture(params=["compiled", "torch", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where each form of the solver's loops runs; Triton's in its interpreter where there is no GPU."""
    if request.param == "compiled":
        return "cpu"
    for module in (kernels, refine, squares):
        monkeypatch.setattr(module, "is_compiled", lambda _: False)
    if request.param == "torch":
        return "cpu"
    pytest.importorskip("triton")
    from rotoboa.boa.kernels import triton_kernels

    monkeypatch.setattr(kernels, "_triton_for", lambda _: triton_kernels)
    return "cuda" if torch.cuda.is_available() else "cpu"


@METHODS
def test_a_head_that_nothing_reads(method: str, device: str) -> None:
    """It is rounded by its inputs alone; the others are what they are without it."""
    weight, objective = problem(HEADS, ROWS, COLUMNS, shared=True)
    weight, h_in = weight.float().to(device), objective.h_in.float().to(device) * SMALL
    assert objective.h_out is not None
    h_out = objective.h_out.float().to(device)
    h_out[1] = 0
    settings = FEW.but(method=method)
    found = quantize(weight, Objective(h_in, h_out), settings)
    check_stored(found, 4)
    h_out[1] = torch.eye(ROWS, device=device) / (1 + settings.damping)
    same(found, quantize(weight, Objective(h_in, h_out), settings))
    error = (found.dequantize() - weight)[1].double()
    plain = (quantize(weight, None, Settings(bits=4, method="rtn")).dequantize() - weight)[1].double()
    losses = [float((e @ h_in[0].double() * e).sum()) for e in (error, plain)]
    assert losses[0] < losses[1]


@METHODS
def test_nothing_is_read_and_nothing_comes_in(method: str, device: str) -> None:
    weight, _ = problem(HEADS, ROWS, COLUMNS)
    zeros = torch.zeros(HEADS, COLUMNS, COLUMNS, device=device)
    nothing = Objective(zeros[:1], zeros[:, :ROWS, :ROWS])
    found = quantize(weight.float().to(device), nothing, FEW.but(method=method))
    check_stored(found, 4)
    assert not found.dequantize().any()


def test_channel_scales_are_none_of_its_business() -> None:
    """Z-Fold of q, k, v finds the same scales whatever the values are that the output projection leaves unread."""
    decoder, found = make_decoder(), []
    for size in (1.0, 30.0):
        block = make_block(decoder)
        block.get_parameter(f"{LLAMA.output}.weight").data[:, : HIDDEN // 2] = 0  # the first of two key heads
        values = block.get_parameter(f"{LLAMA.value}.weight").data[:SIZE]
        values *= size * torch.linspace(0.1, 1, HIDDEN)
        settings = QUICK.but(bits=2, zfold=("qkv",))
        ran = run_block(decoder, block, settings, PLAIN, make_streams())
        found.append(ran.found.channel_scales["qkv"].zeta)
    assert found[0].max() > 1.01 * found[0].min()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)
