"""What vLLM computes of low-bit inputs, as its classes answered `benchmarks/vllm_contract.py` (docs/formats.md)."""

import pytest

from rotoboa.boa.scheme import QuantizationArgs, QuantizationScheme
from rotoboa.export.vllm_inputs import humming_bits, served_inputs


def scheme(weights: int, inputs: int, group: int | None = None) -> QuantizationScheme:
    return QuantizationScheme(QuantizationArgs(weights, group, True), QuantizationArgs(inputs, None, True))


# Bits of weights, of inputs, group of weights; and what Humming rounds inputs to at 8.0, 8.9 and 9.0.
SEEN = {
    (2, 4, None): (4, 4, 8),
    (3, 8, None): (8, 8, 8),
    (4, 4, None): (4, 4, 8),
    (4, 4, 128): (4, 4, 8),
    (4, 8, None): (8, 8, 8),
    (4, 8, 128): (16, 16, 16),
    (8, 4, None): (8, 8, 8),
    (4, 5, None): (None, None, None),
}


@pytest.mark.parametrize("case", SEEN)
def test_bits_are_those_that_were_seen(case: tuple[int, int, int | None]) -> None:
    assert tuple(humming_bits(scheme(*case), capability) for capability in (80, 89, 90)) == SEEN[case]


def test_what_is_said() -> None:
    assert served_inputs([scheme(4, 16)]) is None
    assert "vLLM refuses W4A5" in str(served_inputs([scheme(4, 4), scheme(4, 5)]))
    packed = str(served_inputs([scheme(4, 4), scheme(4, 8)]))
    assert "in 16 bits, silently, unless a GPU serves it with --linear-backend humming" in packed
    assert "W4A4 in 4 bits, and 8 from compute capability 9.0 on; inputs of W4A8 in 8 bits, as its" in packed
    assert str(served_inputs([scheme(3, 8)])).startswith("vLLM serves this export on GPUs alone")
