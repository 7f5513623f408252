"""A decoder without a row, run one block at a time: as `Decoder`, by what its model's own code gives to each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..decoder import Decoder, stream_of
from ..families import family_for, has_row
from ..layout import expected_shapes
from ..outer_layers import OuterLayers
from ..shape import Shape
from .generic_family import GenericFamily, meta_model
from .shell import Call, Shell, fill_buffers


def decoder_for(
    config: PretrainedConfig,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """The decoder of a config, whether its type has a row or not; arguments and errors as of `Decoder`."""
    kind = Decoder if has_row(config) else GenericDecoder
    return kind(config, attention=attention, dtype=dtype, device=device)


class GenericDecoder(Decoder):
    """As `Decoder`; `attention` is not read: the model has its own."""

    family: GenericFamily

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = self.whole = config
        self.attention = attention
        family = family_for(config, "the model")
        assert isinstance(family, GenericFamily)
        self.family, self.shape = family, Shape.of(config)
        self.dtype, self.device, self._rotary = dtype, torch.device(device), None
        self.skeleton = meta_model(config, dtype)
        self._shell = self._make_shell()
        self._calls: dict[tuple[int, int], list[Call]] = {}

    def _make_shell(self) -> Shell:
        family = self.family
        return Shell(self.skeleton, family.layers, outputs=family.outputs, dtype=self.dtype, device=self.device)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """As of `Decoder`."""
        shapes = {name: tensor.shape for name, tensor in self.skeleton.state_dict().items()}
        return expected_shapes(shapes, self.family, self.shape)

    def empty_block(self, index: int) -> nn.Module:
        """As of `Decoder`."""
        block = super().empty_block(index)
        block.rotoboa_index = index  # type: ignore[assignment]
        return block

    def block(self, index: int, tensors: Mapping[str, Tensor], module: nn.Module | None = None) -> nn.Module:
        """As of `Decoder`."""
        module = module if module is not None else self.empty_block(index)
        fill_buffers(module, self.skeleton, self.device)
        return super().block(index, tensors, module)

    def embed(self, outer: OuterLayers, tokens: Tensor) -> Tensor:
        """As of `Decoder`."""
        known, places = tokens.cpu().unique(return_inverse=True)
        self._shell.load(dict(outer.others))
        self._shell.embed_rows(outer.embedding[known])
        return self._shell.first(places).cpu()

    def logits(self, outer: OuterLayers) -> Callable[[Tensor], Tensor]:
        """As of `Decoder`; the whole head is held in `dtype`."""
        shell = self._make_shell()
        shell.load(outer.after(self.family) | {f"{self.family.head}.weight": outer.head[:]} | dict(outer.others))

        def function(hidden: Tensor) -> Tensor:
            return shell.logits(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])

        return function

    def index_of(self, block: nn.Module) -> int:
        """As of `Decoder`."""
        return int(block.rotoboa_index)  # type: ignore[arg-type]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """As of `Decoder`."""
        size = (hidden.shape[0], hidden.shape[1])
        if size not in self._calls:
            self._calls = {size: self._shell.calls(*size)}  # masks are large: those of one size are kept
        call = self._calls[size][self.index_of(block)]
        return stream_of(block(hidden, *call.args, **call.kwargs))
