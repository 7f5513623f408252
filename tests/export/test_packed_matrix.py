"""Rows of a packed embedding are those of the whole weight, by slices and by token ids, also in the loaded model."""

import pytest
import torch

from rotoboa.boa.scheme import TWO_LEVELS, QuantizationArgs
from rotoboa.boa.solver.rounding import Quantized, quantize
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.export.packed_matrix import PackedMatrix
from rotoboa.export.packing import packed_bytes, packed_parts, part_names
from rotoboa.export.runtime.embedding import QuantizedEmbedding


@torch.no_grad()
@pytest.mark.parametrize("name", ["int", *TWO_LEVELS])
def test_rows_are_those_of_the_whole(name: str) -> None:
    args = QuantizationArgs.of(name, 3, 32, False)
    weight = torch.randn(1, 20, 512, generator=torch.Generator().manual_seed(0))
    heads = quantize(weight, None, Settings(bits=3, method="rtn").of(args))
    found = Quantized(heads.integers[0], heads.scale[0], heads.zero[0])
    matrix = PackedMatrix(packed_parts(found, args), args, 512)
    integers, per = found.integers.double(), 512 // found.scale.shape[1]
    slow = found.scale.double().repeat_interleave(per, 1) * (integers - found.zero.double().repeat_interleave(per, 1))
    torch.testing.assert_close(matrix[:].double(), slow, rtol=1e-5, atol=1e-6)
    assert (slow - weight[0]).std() < 0.5 and matrix.shape == (20, 512) and matrix.bits == args.num_bits
    assert tuple(matrix.parts()) == part_names(args)
    assert sum(part.nbytes for part in matrix.parts().values()) == packed_bytes(20, 512, args, 2)

    ids = torch.tensor([[3, 3, 19], [0, 7, 4]])
    assert torch.equal(matrix[ids], matrix[:][ids]) and torch.equal(matrix[4:9], matrix[:][4:9])
    module = QuantizedEmbedding(
        20, 512, bits=args.num_bits, group_size=args.group_size, format=args.format, dtype=torch.float32
    )
    module.load_state_dict(matrix.parts())
    assert torch.equal(module(ids), matrix[ids])
    half = module.to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16 and torch.equal(half(ids), matrix[ids].bfloat16())
