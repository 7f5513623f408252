"""What is not finite in a block, or hardly definite, is named: weights, streams, and what arises in a layer."""

import pytest
import torch

from rotoboa.boa.objective.objective import FEW_TOKENS
from rotoboa.boa.solver.rounding_settings import LAYERWISE

from ..small_block import (
    HIDDEN,
    LENGTH,
    LLAMA,
    PLAIN,
    QUICK,
    make_decoder,
    make_streams,
    make_tensors,
    run_block,
    run_small,
)


@pytest.mark.parametrize("name", LLAMA.projections)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weight_is_named(name: str, value: float) -> None:
    decoder = make_decoder()
    tensors = make_tensors()
    tensors[f"{name}.weight"][1, 2] = value
    with pytest.raises(ValueError, match=f"^{name}: its weight holds NaN or Inf$"):
        run_block(decoder, decoder.block(0, tensors), QUICK, PLAIN, make_streams())


@pytest.mark.parametrize("stream", ["full-precision", "quantized"])
def test_bad_stream_is_named(stream: str) -> None:
    decoder = make_decoder()
    full, quantized = make_streams()
    (full if stream == "full-precision" else quantized)[1, 5, 0] = float("nan")
    with pytest.raises(ValueError, match=f"^the {stream} stream that comes in holds NaN or Inf$"):
        run_block(decoder, decoder.block(0, make_tensors()), QUICK, PLAIN, (full, quantized))


@pytest.mark.parametrize("method", ["rtn", "gptq", "boa"])
@pytest.mark.parametrize(
    ("huge", "message"),
    [
        (LLAMA.query, f"{LLAMA.query}, {LLAMA.key}: what weighs its outputs holds NaN or Inf"),
        (LLAMA.value, f"{LLAMA.output}: what it should put out holds NaN or Inf"),
        (LLAMA.gate, f"{LLAMA.down}: what it should put out holds NaN or Inf"),
    ],
)
def test_what_arises_in_a_layer_is_named(huge: str, message: str, method: str) -> None:
    decoder, tensors = make_decoder(), make_tensors()
    tensors[f"{huge}.weight"] *= 1e37
    given = (decoder, decoder.block(0, tensors), QUICK.but(method=method, attention="bound"), PLAIN, make_streams())
    if method in LAYERWISE and huge == LLAMA.query:
        run_block(*given)  # what queries and keys are weighed by is not looked at
        return
    with pytest.raises(ValueError, match=f"^{message}"):
        run_block(*given)


@pytest.mark.parametrize("layer", [LLAMA.output, LLAMA.down])
def test_what_arises_where_nothing_is_solved_is_named(layer: str) -> None:
    decoder, ran = make_decoder(), run_small()
    tensors = make_tensors()
    tensors[f"{layer}.weight"].mul_(3e38).clamp_(-3e38, 3e38)
    block, results = decoder.block(0, tensors), ran.found.results
    with pytest.raises(ValueError, match=f"^{layer}: the full-precision stream after it holds NaN or Inf$"):
        run_block(decoder, block, QUICK, PLAIN, make_streams(), previous=results)


def test_damping_that_was_raised_is_told() -> None:
    decoder = make_decoder()
    generator = torch.Generator().manual_seed(0)
    enough = -(-FEW_TOKENS * HIDDEN // LENGTH)  # with fewer tokens Hessians are shrunk, and none fails
    full = torch.randn(enough, LENGTH, 2, generator=generator) @ torch.randn(2, HIDDEN, generator=generator)
    settings = QUICK.but(damping=1e-12, method="gptq")
    block = decoder.block(0, make_tensors())
    found = run_block(decoder, block, settings, PLAIN, (full, full.clone())).found
    assert {LLAMA.query, LLAMA.key} <= found.damping.keys()  # inputs of two dimensions
    assert all(1e-12 < value <= 1e-5 for value in found.damping.values())
    assert run_small().found.damping == {}
