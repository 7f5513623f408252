"""What llama.cpp computes for each of its architectures, and where a model is another one.

Names of tensors are those of the gguf package. The rest follows llama.cpp's own converter and `src/models`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH

from ...errors import InputError
from ..finished import Finished


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's.

    Attributes:
        arch: its name and tensors in the gguf package's tables.
        activation: of the feed-forward layers.
        windows: layers attend within windows, as config.json has it. Elsewhere all positions are seen.
        square: queries are as wide as the hidden state.
        tied: the embedding is the head too.
        legal: config field -> the values that it computes with; a str is another field that it must equal.
        model_type: what transformers reads the file as.
        stock: transformers reads it.
    """

    arch: MODEL_ARCH
    activation: str = "silu"
    windows: bool = False
    square: bool = False
    tied: bool = False
    legal: Mapping[str, tuple[Any, ...] | str] | None = None
    model_type: str | None = None
    stock: bool = True


_GEMMA: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "windows": True}
_SCALE: dict[str, Any] = {"query_pre_attn_scalar": "head_dim"}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA),
    "mistral": Architecture(MODEL_ARCH.LLAMA, model_type="llama"),
    "mixtral": Architecture(MODEL_ARCH.LLAMA, stock=False),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, square=True),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, legal={"attention_bias": (False, None)}),
    "qwen3_moe": Architecture(MODEL_ARCH.QWEN3MOE, legal={"attention_bias": (False, None), "norm_topk_prob": (True,)}),
    "qwen2_moe": Architecture(MODEL_ARCH.QWEN2MOE, square=True, legal={"norm_topk_prob": (False,)}),
    "olmoe": Architecture(
        MODEL_ARCH.OLMOE,
        square=True,
        legal={
            "attention_bias": (False, None),
            "norm_topk_prob": (False,),
            "num_key_value_heads": "num_attention_heads",
        },
        stock=False,
    ),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, tied=True, legal={**_SCALE, "attention_bias": (False, None)}, **_GEMMA),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, legal={**_SCALE, "attention_bias": (False, None)}, **_GEMMA),
    "phi3": Architecture(MODEL_ARCH.PHI3, square=True),
}
"""By transformers' model_type."""


def architecture(run: Finished) -> Architecture:
    """The architecture that a run is written as.

    Raises:
        InputError: llama.cpp has none that computes it, or it is not written here.
    """
    found, config = ARCHITECTURES.get(run.family.model_type), run.transformers_config()
    if found is None:
        raise InputError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, and this is a '{run.family.model_type}': "
            "use --format native."
        )
    name, use = found.arch.name.lower(), instead(run)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", found.activation)
    if activation != found.activation:
        raise InputError(
            f"llama.cpp's {name} has the activation {found.activation}, and this model {activation}: {use}."
        )
    if len(run.family.all_kinds) > 1:
        raise InputError(f"llama.cpp's {name} has experts in every block, and this model has not: {use}.")
    for field, values in (found.legal or {}).items():
        value = getattr(config, field, None)
        legal = (getattr(config, values),) if isinstance(values, str) else values
        if value not in legal:
            raise InputError(f"llama.cpp's {name} computes with {field} {legal[0]}, and this model has {value}: {use}.")
    if found.square and run.shape.query_width != run.shape.hidden:
        raise InputError(
            f"llama.cpp's {name} has queries as wide as the hidden size {run.shape.hidden}, and these have "
            f"{run.shape.query_width}: {use}."
        )
    if found.tied and not run.tied:
        raise InputError(f"llama.cpp's {name} takes the embedding for the head, and this model has another: {use}.")
    return found


def instead(run: Finished) -> str:
    """What to use where GGUF cannot hold a run."""
    f = run.family
    return f"use --format {'native' if f.merged or f.experts or f.layer_norm else 'compressed-tensors'}"


def window(run: Finished) -> int | None:
    """The positions that a layer of the model sees, where that is not all."""
    config = run.transformers_config()
    kinds = getattr(config, "layer_types", None)
    size = getattr(config, "sliding_window", None)
    return None if size is None or (kinds and "sliding_attention" not in kinds) else int(size)


def context(run: Finished) -> int:
    """The most tokens that the file's reader computes right: all, or those of a window that the reader has not."""
    most, size = int(run.transformers_config().max_position_embeddings), window(run)
    return most if size is None or ARCHITECTURES[run.family.model_type].windows else min(most, size)


def config_of(run: Finished, ffn: int) -> dict[str, Any]:
    """config.json of what the file is: `ffn` wide, without windows that its reader has not."""
    row, config = ARCHITECTURES[run.family.model_type], {**run.config, run.family.ffn_field: ffn}
    if window(run) is not None and not row.windows:
        config |= {"max_position_embeddings": context(run), "sliding_window": None}
        if "layer_types" in config or "use_sliding_window" in config:
            config |= {"use_sliding_window": False, "layer_types": ["full_attention"] * run.shape.blocks}
    if row.model_type is not None:
        config |= {"model_type": row.model_type, "architectures": ["LlamaForCausalLM"]}
    return config
