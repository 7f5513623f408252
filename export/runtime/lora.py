"""LoRA adapters (PEFT) on the packed layers of a loaded run, through PEFT's interface for layers of others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from ...errors import InputError
from .linear import QuantizedLinear

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_FROM_WEIGHTS = ("use_dora", "velora_config", "kasa_config", "monteclora_config")
_STARTS = (True, False, "gaussian")


def add_lora(model: PreTrainedModel, adapter: LoraConfig | str | Path, **options: Any) -> PeftModel:
    """Put an adapter on a loaded run: a new one, of a config of PEFT, or a saved one, of its folder or hub id.

    `target_modules="all-linear"` means all packed layers. `options` go to `get_peft_model`, or to
    `PeftModel.from_pretrained` (`is_trainable=True` goes on training). Gradients pass the quantizers of activations and
    cache as if they were not there, in full the rotations and the weights.

    Raises:
        InputError: peft is not installed, the model has no packed layers, or the adapter needs the weights themselves.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise InputError(f"adapters need peft, which cannot be imported ({error}): pip install peft.") from error
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if not packed:
        raise InputError("the model has no packed layers: give one that rotoboa.load gave, or use peft alone.")
    config = adapter if isinstance(adapter, LoraConfig) else LoraConfig.from_pretrained(str(adapter))
    _check(config)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = set(packed)
    config._register_custom_module({QuantizedLinear: _layer()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # it is, by the class above
        if isinstance(adapter, LoraConfig):
            return get_peft_model(model, config, **options)
        return PeftModel.from_pretrained(model, str(adapter), config=config, **options)


def _check(config: LoraConfig) -> None:
    """Refuse what needs the weights themselves.

    Raises:
        InputError: it does.
    """
    wrong = [name for name in _FROM_WEIGHTS if getattr(config, name, None)]
    if config.init_lora_weights not in _STARTS:
        wrong.append(f"init_lora_weights={config.init_lora_weights!r}")
    if wrong:
        raise InputError(
            f"{' and '.join(wrong)} of the adapter needs weights that are not packed: use plain LoRA, with "
            "init_lora_weights true, false or gaussian."
        )


def _layer() -> type:
    """The class of an adapter's layers, a packed one with two small matrices beside it."""
    from peft.tuners.lora.layer import Linear

    class PackedLoraLinear(Linear):
        """As PEFT's, around a packed layer, into which nothing can be merged."""

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Refuse.

            Raises:
                InputError: always.
            """
            raise InputError(
                "an adapter cannot be merged into packed weights: keep it beside the run, or merge it into the "
                "original checkpoint and quantize that."
            )

    return PackedLoraLinear
