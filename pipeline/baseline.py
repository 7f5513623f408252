"""The naive baseline: weights rounded to nearest where they are, no rotation, the same quantizers for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..boa.rounding import Settings, quantize
from ..boa.transforms import OnlineTransforms
from ..export.native import pack_block, prepare_block
from ..export.spec import Spec
from ..models.decoder import Decoder


def block(
    decoder: Decoder, index: int, tensors: Mapping[str, Tensor], settings: Settings, transforms: OnlineTransforms
) -> nn.Module:
    """Block `index` of the original checkpoint, every projection rounded to nearest."""
    family, rtn = decoder.family, replace(settings, method="rtn")
    results = {}
    for name in family.projections:
        result = quantize(tensors[f"{name}.weight"].float()[None], None, rtn)
        results[name] = type(result)(result.integers[0], result.scale[0], result.zero[0])
    spec = Spec(settings.bits, settings.group_size, settings.symmetric)
    module = prepare_block(decoder.empty_block(index), family, spec, transforms)
    return decoder.block(index, pack_block(results, dict(tensors), settings.bits, decoder.dtype), module)
