"""A decoder run one block at a time: modules of the real transformers class, made when they are needed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import InputError
from .families import Family, family_for
from .layout import drop_norm_bias, expected_shapes, give_norm_bias, split_modules
from .matrices import spans
from .outer_layers import OuterLayers
from .seeing.whole_model import attention_in, auto_class
from .shape import Shape


class Decoder:
    """The parts of one decoder, without its weights.

    Args:
        config: the transformers config of the whole model; `config` is then that of its decoder.
        attention: name of the attention function, registered with transformers.
        dtype: what the blocks compute in.
        device: where the blocks compute.

    Raises:
        InputError: the architecture is not supported, or transformers cannot make a model of the config.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.whole = config
        self.family: Family = family_for(config, "the model")
        self.config = self.family.text(config)
        self.attention, self.dtype = attention, dtype
        self.device = torch.device(device)
        try:
            self.shape = Shape.of(config)
            if self.shape.blocks < 1:
                raise ValueError(f"num_hidden_layers is {self.shape.blocks}")
            with torch.device("meta"):
                self.skeleton = auto_class(self.family).from_config(
                    config, attn_implementation=attention_in(self.family, attention), dtype=dtype
                )
            # RoPE's frequencies are not in the checkpoint: they are computed from the config, off the meta device.
            self._rotary = None
            if self.family.rotary is not None:
                own = self.family.text(self.skeleton.config)
                self._rotary = type(self.skeleton.get_submodule(self.family.rotary))(config=own)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}".rstrip(".")
            raise InputError(f"no model can be made of this config.json ({what}): download it again.") from error
        self.skeleton.eval()
        if self._rotary is not None:
            self._rotary.to(self.device)

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return bool(self.whole.tie_word_embeddings)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The tensors that a checkpoint of this config holds, by their full names."""
        shapes = {name: tensor.shape for name, tensor in self.skeleton.state_dict().items()}
        return expected_shapes(shapes, self.family, self.shape)

    def empty_block(self, index: int) -> nn.Module:
        """Block `index` on the meta device, a module of its own, with one linear layer a projection."""
        block = copy.deepcopy(self.skeleton.get_submodule(f"{self.family.layers}.{index}"))
        return split_modules(block, self.family.at(index), self.shape.at(index), self.attention)

    def block(self, index: int, tensors: Mapping[str, Tensor], module: nn.Module | None = None) -> nn.Module:
        """Block `index` with the weights `tensors` (names inside the block), ready to compute.

        Floating-point weights are cast to `dtype`; `module` replaces the plain block where linear layers are packed.
        A LayerNorm whose bias is not there has had it folded into its readers, and becomes an RMSNorm.

        Raises:
            InputError: tensors are missing, unknown or of another shape than the config says.
        """
        module = module if module is not None else self.empty_block(index)
        if self.family.layer_norm:
            for norm in self.family.norm_readers:
                if f"{norm}.bias" not in tensors:
                    drop_norm_bias(module, norm)
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

    def norm(self, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
        """The final norm with `weight` and, for a LayerNorm that has not lost it, `bias`, each (hidden,)."""
        outer = nn.Module()
        outer.add_module("norm", copy.deepcopy(self.skeleton.get_submodule(self.family.final_norm)))
        if self.family.layer_norm:
            (give_norm_bias if bias is not None else drop_norm_bias)(outer, "norm")
        state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        module = outer.get_submodule("norm")
        module.load_state_dict({name: t.to(self.device, self.dtype) for name, t in state.items()}, assign=True)
        return module.requires_grad_(False)

    def embed(self, outer: OuterLayers, tokens: Tensor) -> Tensor:
        """(batch, length) token ids -> (batch, length, hidden), what the first block reads, on the CPU."""
        hidden = outer.embedding[tokens.cpu()].to(self.dtype)
        if self.family.embedding_factor:
            hidden = hidden * getattr(self.config, self.family.embedding_factor)
        if self.family.scaled_embedding:
            hidden = hidden * torch.tensor(self.shape.hidden**0.5).to(self.dtype)  # by way of float32, as Gemma has it
        if outer.positions is not None:
            start = self.family.position_offset
            hidden = hidden + outer.positions[start : start + tokens.shape[1]].to(self.dtype)
        return hidden.cpu()

    def logits(self, outer: OuterLayers) -> Callable[[Tensor], Tensor]:
        """The function from the last block's output (..., hidden) to logits (..., vocabulary).

        It takes some rows of the head at a time and casts them to `dtype`. Another device than the CPU is given a copy
        of the head, as stored, so that it is not sent there for every call.
        """
        norm = self.norm(outer.norm, outer.norm_bias)
        bias = None if outer.head_bias is None else outer.head_bias.to(self.device, self.dtype)
        turn = None if outer.before_head is None else outer.before_head.to(self.device, self.dtype)
        cap = getattr(self.config, "final_logit_softcapping", None)
        divisor = getattr(self.config, self.family.logits_divisor) if self.family.logits_divisor else 1
        factor = getattr(self.config, self.family.logits_factor) if self.family.logits_factor else 1
        parts = spans(outer.head)
        sent = None if self.device.type == "cpu" else [outer.head[rows].to(self.device) for rows in parts]

        def function(hidden: Tensor) -> Tensor:
            x, found = norm(hidden), []
            x = x if turn is None else x @ turn
            for i, rows in enumerate(parts):
                weight = (outer.head[rows] if sent is None else sent[i]).to(self.dtype)
                found.append(nn.functional.linear(x, weight, None if bias is None else bias[rows]))
            logits = found[0] if len(found) == 1 else torch.cat(found, -1)
            logits = logits if divisor == 1 else logits / divisor
            logits = logits if factor == 1 else logits * factor
            return logits if cap is None else torch.tanh(logits / cap) * cap

        return function

    @property
    def branch_factor(self) -> float:
        """What the output of attention and MLP is multiplied by before it is added to the residual stream."""
        return float(getattr(self.config, self.family.branch_factor)) if self.family.branch_factor else 1.0

    def turns(self, index: int) -> bool:
        """Whether block `index` has RoPE."""
        if self._rotary is None or self.family.rope_layers == "none":
            return False
        layers = getattr(self.config, self.family.rope_layers) if self.family.rope_layers else None
        if self.family.rope_layers == "layer_types" and self.config.sliding_window is None:
            return True
        return layers is None or layers[index] in (1, "sliding_attention")

    def position_embeddings(self, length: int, index: int = 0) -> tuple[Tensor, Tensor]:
        """Cosine and sine of RoPE in block `index`, positions 0 .. length - 1, each (1, length, rotated channels).

        Where nothing is turned, as by learned positions, 1 and 0.
        """
        if not self.turns(index):
            like = torch.ones(1, length, self.shape.head_dim, device=self.device, dtype=self.dtype)
            return like, torch.zeros_like(like)
        found = self._turning(length, index)
        cos, sin = (found.real, found.imag) if isinstance(found, Tensor) else found
        once = self.family.rope_halves or isinstance(found, Tensor)
        return (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)) if once else (cos, sin)

    def _turning(self, length: int, index: int) -> tuple[Tensor, Tensor] | Tensor:
        """The same, as the module of the class gives it: of some they are complex numbers, one for two channels."""
        assert self._rotary is not None
        like = torch.zeros(1, device=self.device, dtype=self.dtype)
        kind = {"layer_type": self.config.layer_types[index]} if self.family.rope_by_layer else {}
        embeddings: tuple[Tensor, Tensor] | Tensor = self._rotary(
            like, position_ids=torch.arange(length, device=self.device)[None], **kind
        )
        return embeddings

    def window(self, index: int) -> int | None:
        """How many tokens, itself included, a token of block `index` sees; None: all before it."""
        window = getattr(self.config, "sliding_window", None) if self.family.window in ("all", "layers") else None
        if self.family.window == "layers" and self.config.layer_types[index] != "sliding_attention":
            return None
        return window

    def chunk(self, index: int) -> int | None:
        """How many tokens a chunk has, of which a token of block `index` sees its own alone; None: there are none."""
        if self.family.window != "chunks" or self.config.layer_types[index] != "chunked_attention":
            return None
        return int(self.config.attention_chunk_size)

    def index_of(self, block: nn.Module) -> int:
        """Which block it is."""
        return next(int(part.layer_idx) for part in block.modules() if hasattr(part, "layer_idx"))  # type: ignore[arg-type]

    def family_of(self, block: nn.Module) -> Family:
        """The family of a block, which is of one kind."""
        return self.family.at(self.index_of(block)) if self.family.blocks else self.family

    def arguments(self, block: nn.Module, length: int) -> dict[str, Any]:
        """What a block, or its attention, takes beside hidden states of `length` positions from 0: causal, no cache."""
        index = self.index_of(block)
        window, chunk, mask = self.window(index), self.chunk(index), None
        position = torch.arange(length, device=self.device)
        if window is not None and length > window:
            distance = position[:, None] - position[None]
            mask = ((distance >= 0) & (distance < window))[None, None]
        if chunk is not None and length > chunk:
            mask = (position[:, None] >= position[None]) & (position[:, None] // chunk == position[None] // chunk)
            mask = mask[None, None]
        arguments: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": position[None],
        }
        if chunk is not None:
            arguments["chunk"] = chunk
        if self._rotary is not None:
            turning = self._turning if self.turns(index) else self.position_embeddings
            arguments["position_embeddings"] = turning(length, index)
        if self.family.own_attention:
            arguments["alibi"] = self._alibi(length) if self.family.alibi else None
        return arguments

    def _alibi(self, length: int) -> Tensor:
        """Of each key, (heads, 1, length), by the code of the class."""
        build = sys.modules[type(self.skeleton).__module__].build_alibi_tensor
        found: Tensor = build(torch.ones(1, length, device=self.device), self.shape.query_heads, self.dtype)
        return found

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One block over `hidden` (batch, length, hidden), causal, from position 0."""
        return stream_of(block(hidden, **self.arguments(block, hidden.shape[1])))


def stream_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The hidden states of what a block puts out: some put out attention's probabilities beside them."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _is_weight(name: str, tensor: Tensor) -> bool:
    # Scales keep the dtype they are stored in: the integers were chosen for exactly these values.
    return tensor.is_floating_point() and not name.endswith((".scale", "global_scale"))
