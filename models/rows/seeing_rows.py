"""Rows of models that see: each is that of its decoder, with the names that its parts have in the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..family import Family
from .row_parts import Sight

INSIDE = "model.language_model"
"""Where most of them keep their decoder."""

_LLAVA = (
    (r"^language_model\.model\.", f"{INSIDE}."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
"""The names of LLaVA, which transformers still writes."""

_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


def rows_that_see(rows: Mapping[str, Family]) -> dict[str, Family]:
    """By `model_type`, those that are made of the `rows` of text."""
    found = (
        replace(
            _inside(rows["gemma3_text"]),
            model_type="gemma3",
            sight=Sight(("gemma3_text",), (_TOWER, _PROJECTOR), ()),
            renamed=_LLAVA,
            note="sees; the decoder is that of gemma3_text",
        ),
        replace(
            _inside(rows["mistral"]),
            model_type="mistral3",
            sight=Sight(("mistral", "ministral3"), (_TOWER, _PROJECTOR), (f"{_PROJECTOR}.linear_2",)),
            renamed=_LLAVA,
            note="sees; the decoder is that of mistral or ministral3",
        ),
        *(
            replace(
                _inside(rows["qwen2"]),
                model_type=name,
                sight=Sight((f"{name}_text",), ("model.visual",), ("model.visual.merger.mlp.2",)),
                renamed=((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", f"{INSIDE}.")),
                note="sees; the decoder is that of qwen2, RoPE has three axes, which are one in text",
            )
            for name in ("qwen2_vl", "qwen2_5_vl")
        ),
        replace(
            _inside(rows["qwen3"]),
            model_type="qwen3_vl",
            window=None,
            sight=Sight(
                ("qwen3_vl_text",),
                ("model.visual",),
                ("model.visual.merger.linear_fc2", r"model.visual.deepstack_merger_list.\d+.linear_fc2"),
            ),
            note="sees, and adds what it saw to the first blocks; the decoder is that of qwen3, RoPE has three axes",
        ),
    )
    dense = found[-1]
    assert dense.sight is not None
    mixture = replace(
        _inside(rows["qwen3_moe"]),
        model_type="qwen3_vl_moe",
        window=None,
        fused=True,
        sight=replace(dense.sight, texts=("qwen3_vl_moe_text",)),
        note="as qwen3_vl; the decoder is that of qwen3_moe",
    )
    hybrids = (
        replace(
            _inside(rows[f"{name}_text"]),
            model_type=name,
            fused=name.endswith("moe"),
            sight=Sight((f"{name}_text",), ("model.visual",), ("model.visual.merger.linear_fc2",)),
            renamed=(),
            note=f"sees; the decoder is that of {name}_text, RoPE has three axes",
        )
        for name in ("qwen3_5", "qwen3_5_moe")
    )
    llama = replace(
        _inside(rows["llama4_text"], "language_model.model"),
        model_type="llama4",
        head="language_model.lm_head",
        sight=Sight(("llama4_text",), ("vision_model", "multi_modal_projector"), ("multi_modal_projector.linear_1",)),
        note="sees; the decoder is that of llama4_text",
    )
    return {row.model_type: row for row in (*found, mixture, *hybrids, llama)}


def _inside(row: Family, inside: str = INSIDE) -> Family:
    """A row of text with the names of the whole model."""
    names = {
        field: name.replace("model", inside, 1)
        for field in ("embedding", "layers", "rotary", "final_norm")
        if (name := getattr(row, field)) is not None
    }
    return replace(row, **names)
