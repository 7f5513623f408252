"""A decoder run one block at a time: modules of the real transformers class, made when they are needed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..errors import InputError
from .families import Family, Shape, family_of


class Decoder:
    """The parts of one decoder, without its weights.

    Args:
        config: the transformers config of the model.
        attention: name of the attention function, registered with transformers.
        dtype: what the blocks compute in.
        device: where the blocks compute.

    Raises:
        InputError: transformers cannot make a model of the config.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.family: Family = family_of(config.model_type, "the model")
        self.dtype = dtype
        self.device = torch.device(device)
        try:
            self.shape = Shape.of(config)
            with torch.device("meta"):
                self.skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
            # RoPE's frequencies are not in the checkpoint: they are computed from the config, off the meta device.
            self._rotary = type(self.skeleton.get_submodule(self.family.rotary))(config=self.skeleton.config)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}".rstrip(".")
            raise InputError(f"no model can be made of this config.json ({what}): download it again.") from error
        self.skeleton.eval()
        self._rotary.to(self.device)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The tensors that a checkpoint of this config holds, by their full names."""
        return {name: tensor.shape for name, tensor in self.skeleton.state_dict().items()}

    def empty_block(self, index: int) -> nn.Module:
        """Block `index` on the meta device, a module of its own."""
        return copy.deepcopy(self.skeleton.get_submodule(f"{self.family.layers}.{index}"))

    def block(self, index: int, tensors: Mapping[str, Tensor], module: nn.Module | None = None) -> nn.Module:
        """Block `index` with the weights `tensors` (names inside the block), ready to compute.

        Floating-point weights are cast to `dtype`; `module` replaces the plain block where linear layers are packed.

        Raises:
            InputError: tensors are missing, unknown or of another shape than the config says.
        """
        module = module if module is not None else self.empty_block(index)
        state = {
            name: tensor.to(self.device, self.dtype if _is_weight(name, tensor) else None)
            for name, tensor in tensors.items()
        }
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            detail = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise InputError(f"block {index}: the checkpoint contradicts its config.json: {detail}") from error
        return module.requires_grad_(False).eval()

    def norm(self, weight: Tensor) -> nn.Module:
        """The final norm with `weight` (hidden,)."""
        module = copy.deepcopy(self.skeleton.get_submodule(self.family.final_norm))
        module.load_state_dict({"weight": weight.to(self.device, self.dtype)}, assign=True)
        return module.requires_grad_(False)

    def position_embeddings(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of RoPE for positions 0 .. length - 1, each (1, length, head_dim)."""
        like = torch.zeros(1, device=self.device, dtype=self.dtype)
        return self._rotary(like, position_ids=torch.arange(length, device=self.device)[None])

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block over `hidden` (batch, length, hidden), causal, from position 0."""
        positions = torch.arange(hidden.shape[1], device=self.device)[None]
        return block(
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=self.position_embeddings(hidden.shape[1]),
        )


def _is_weight(name: str, tensor: Tensor) -> bool:
    # Scales keep the dtype they are stored in: the integers were chosen for exactly these values.
    return tensor.is_floating_point() and not name.endswith(".scale")
