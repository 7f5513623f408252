"""The native format, and the loader that transformers calls.

`import rotoboa` registers it; `AutoModelForCausalLM.from_pretrained(folder)` then runs the checkpoint as it was
quantized: weights packed, online rotations, activation and cache quantizers on.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...boa.online.attention import NAME
from ...errors import InputError
from ...models.families import FAMILIES, Family, family_for, has_row
from ...models.names import renamed
from ...models.seeing.whole_model import attention_in, auto_class
from ...models.shape import Shape
from ..runtime.cache_hook import use_packed_cache
from ..runtime.parts import base_prefix, family_in, is_new_head
from ..runtime.prepared import prepare_model
from ..spec import METHOD, Spec


@register_quantization_config(METHOD)
class RotoboaConfig(QuantizationConfigMixin):
    """`quantization_config` of a native checkpoint: the fields of `Spec`."""

    def __init__(self, **fields: Any) -> None:
        fields.pop("quant_method", None)
        self.quant_method = METHOD
        self.spec = Spec.from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {"quant_method": METHOD, **self.spec.to_dict()}

    def __repr__(self) -> str:
        return f"RotoboaConfig({self.to_dict()})"


@register_quantizer(METHOD)
class RotoboaQuantizer(HfQuantizer):
    """What transformers calls while it loads a native checkpoint."""

    requires_calibration = True
    quantization_config: RotoboaConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Rotation and quantization of the cache live in our attention function."""
        if not has_row(config):  # they have an attention of their own
            return config
        if config._attn_implementation is not None:
            _keep_attention(config._attn_implementation)
        config._attn_implementation = attention_in(FAMILIES[config.model_type], NAME)
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: Any = model.config
        family, shape = family_in(model, family_for(config, "the checkpoint")), Shape.of(config)
        layers = model.get_submodule(family.layers)
        assert isinstance(layers, nn.ModuleList)
        spec = self.quantization_config.spec.inside(base_prefix(model))
        if spec.clips is not None and len(spec.clips) != len(layers):
            raise InputError(f"config.json has clips of {len(spec.clips)} blocks for {len(layers)}: export it again.")
        if family.own_attention:
            config._attn_implementation = NAME  # whose masks are made from here on
        prepare_model(model, family, shape, spec)
        if config.tie_word_embeddings and spec.turned:
            raise InputError("config.json ties embedding and head, which rotation has made different: export it again.")
        if base_prefix(model) and spec.turned:
            warnings.warn(
                "the hidden states of this run are rotated, and the weight of its last norm is in its head (R1 is "
                "merged): for states like the original's quantize with --rotation.r1 online or none.",
                stacklevel=2,
            )
        if kwargs.get("checkpoint_files"):
            _check_files(model, family, [Path(file) for file in kwargs["checkpoint_files"]])

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config: Any = model.config
        if has_row(config):
            model.set_attn_implementation = _keep_attention  # type: ignore[assignment]
        family = family_in(model, family_for(config, "the checkpoint"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_new_head(name, model, family))
        spec = self.quantization_config.spec
        if spec.quantizes_cache:
            decoder, _, layers = family.layers.rpartition(".")
            names = [family.at(index).attention for index in range(Shape.of(config).blocks)]
            use_packed_cache(model.get_submodule(decoder), layers, names)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed weights again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on it are; the integers have no gradient."""
        return True


def _keep_attention(requested: Any, *arguments: Any, **options: Any) -> None:
    """Say that another attention is not taken: scripts ask for one by habit."""
    if requested != NAME:
        warnings.warn(
            f"this model runs with attn_implementation='{NAME}', which rotates and quantizes the cache and computes "
            f"with SDPA: '{requested}' is not used.",
            stacklevel=2,
        )


def _check_files(model: nn.Module, family: Family, files: list[Path]) -> None:
    """Compare the headers of a checkpoint with the model made from its config: transformers fills gaps with noise.

    Raises:
        InputError: a tensor is missing or of another shape, or a file is damaged.
    """
    found: dict[str, tuple[int, ...]] = {}
    whole = family_for(model.config, "the checkpoint")
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                names = list(reader.keys())
                shapes = {name: tuple(reader.get_slice(name).get_shape()) for name in names}
                found |= {renamed(name, whole) if whole.sight else name: shape for name, shape in shapes.items()}
        except SafetensorError as error:
            raise InputError(f"{file} is not a whole safetensors file ({error}): copy or export it again.") from error
    tied: Any = getattr(model, "all_tied_weights_keys", {})
    prefix = base_prefix(model)
    if not any(name.startswith(prefix) for name in found):  # a decoder alone that was saved by itself
        prefix = ""
    for own, tensor in model.state_dict().items():
        name = prefix + own
        if own in tied or (name not in found and is_new_head(name, model, family)):
            continue
        if name not in found:
            raise InputError(f"{files[0].parent} has no tensor {name}: copy or export it again.")
        if found[name] != tuple(tensor.shape):
            raise InputError(
                f"{files[0].parent}: tensor {name} has shape {found[name]}, and config.json asks for "
                f"{tuple(tensor.shape)}: they do not belong together, export the model again."
            )


def load_native(folder: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a run folder or a model folder; `options` go to `from_pretrained`.

    Raises:
        InputError: the folder holds no checkpoint in this format.
    """
    folder = folder / "model" if (folder / "model").is_dir() else folder
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no model ({error}): give the folder of a finished run.") from error
    quantization = (config.get("quantization_config") if isinstance(config, dict) else None) or {}
    if quantization.get("quant_method") != METHOD:
        raise InputError(f"{folder} holds no rotoboa checkpoint: load it with transformers alone.")
    row = FAMILIES.get(str(config.get("model_type")))
    kind = AutoModelForCausalLM if row is None else auto_class(row)
    return kind.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)
