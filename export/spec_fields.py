"""Whether the fields of a native checkpoint's config.json have a meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..boa.online.activations import CONVENTIONS
from ..boa.online.served_cache import SERVERS

if TYPE_CHECKING:
    from .spec import Spec


def without_meaning(spec: Spec) -> str:
    """The first field whose value has no meaning, in words; empty where all have."""
    legal = {
        "bits": spec.bits in range(2, 9),
        **{
            name: getattr(spec, name) is None or (isinstance(getattr(spec, name), int) and getattr(spec, name) > 0)
            for name in ("group_size", "activation_group")
        },
        **{name: getattr(spec, name) in (*range(2, 9), 16) for name in ("activation_bits", "key_bits", "value_bits")},
        **{
            name: isinstance(getattr(spec, name), int | float) and 0 < getattr(spec, name) <= 1
            for name in ("activation_clip", "cache_clip")
        },
        **{
            name: isinstance(getattr(spec, name), bool)
            for name in (
                "symmetric",
                "r1",
                "r2",
                "r3",
                "r4",
                "activation_symmetric",
                "activation_search",
                "cache_search",
                "cache_center",
                "online_r1",
                "r4_blocks",
                "heads",
                "tied_head",
            )
        },
    }
    legal["clips"] = spec.clips is None or (
        isinstance(spec.clips, list)
        and all(isinstance(block, dict) for block in spec.clips)
        and all(isinstance(clip, int | float) and 0 < clip <= 1 for block in spec.clips for clip in block.values())
    )
    for layer, scheme in spec.layers.items():
        if what := scheme.weights.wrong() or scheme.input_activations.wrong():
            return f"of {layer} {what}"
    legal["activation_convention"] = spec.activation_convention in CONVENTIONS
    legal["cache_served_by"] = spec.cache_served_by in SERVERS
    legal["cache_format"] = spec.cache_format in ("int", "fp8")
    for field_name, args in (("type", spec.scheme.weights), ("activation_type", spec.scheme.input_activations)):
        legal[field_name] = args.type == "int" or not args.wrong()
    legal["blocks"] = spec.blocks is None or (type(spec.blocks) is int and spec.blocks.bit_count() == 1)
    for name in ("cache_sink", "activation_directions"):
        legal[name] = type(getattr(spec, name)) is int and getattr(spec, name) >= 0
    return next((f"{name} is {getattr(spec, name)!r}" for name, is_legal in legal.items() if not is_legal), "")
