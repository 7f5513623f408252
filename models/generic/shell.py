"""A whole model of transformers without its blocks: it says what a block is given, and makes logits of the last one.

In the place of each block is a stand-in that notes what it is called with. So masks, positions and biases of attention
are what the model's own code makes, and factors, caps and norms before and after the blocks are its own too.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """What a block is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stopped(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass that need not go on."""


class StandIn(nn.Module):
    """In the place of a block: notes its call, and gives back what it is told to, or what it was given.

    Args:
        outputs: how many things a block gives, in a tuple; 0: its hidden states alone, in none.
    """

    def __init__(self, block: nn.Module, outputs: int) -> None:
        super().__init__()
        self._block = [block]  # in a list: it is no part of this module
        self.outputs = outputs
        self.call: Call | None = None
        self.seen: Tensor | None = None
        self.gives: Tensor | None = None
        self.stops = False

    def __getattr__(self, name: str) -> Any:
        """What a model reads of its blocks, such as the kind of their attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a block's."""
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.call, self.seen = Call(args[1:], kwargs), hidden
        if self.stops:
            raise Stopped
        output = hidden if self.gives is None else self.gives
        return (output, *[None] * (self.outputs - 1)) if self.outputs else output


class Shell:
    """The model around its blocks.

    Args:
        skeleton: the model on the meta device; not changed.
        layers: name of its list of blocks.
        outputs: of a block, see `StandIn`.
        dtype, device: what it computes in, and where.

    Until `load` gives it others, its tensors are ones, but for a head, which it has not.
    """

    def __init__(
        self, skeleton: Any, layers: str, *, outputs: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.model = copy.deepcopy(skeleton)
        self.stubs = [StandIn(block, outputs) for block in skeleton.get_submodule(layers)]
        self.model.set_submodule(layers, nn.ModuleList(self.stubs))
        fill_buffers(self.model, skeleton, self.device)
        ends = {id(self.model.get_input_embeddings()), id(self.model.get_output_embeddings())}
        inner = [m for m in self.model.modules() if id(m) not in ends]
        for module in inner:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(module, name, nn.Parameter(torch.ones(parameter.shape, dtype=dtype, device=self.device)))
        self.model.requires_grad_(False)
        hidden = skeleton.get_input_embeddings().embedding_dim
        # Two tokens that are no multiples of each other: what blocks are given must not follow from which it is.
        self.embed_rows(torch.stack([torch.linspace(-1, 1, hidden), torch.linspace(0, 1, hidden).square()]))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take these for its own, by their full names."""
        state = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in tensors.items()
        }
        self.model.load_state_dict(state, assign=True, strict=False)
        self.model.requires_grad_(False)

    def embed_rows(self, rows: Tensor) -> None:
        """Let the embedding have these rows (n, hidden) alone."""
        embedding = self.model.get_input_embeddings()
        embedding.padding_idx = None
        embedding.weight = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)

    @torch.no_grad()
    def first(self, places: Tensor) -> Tensor:
        """What the first block reads of tokens (batch, length), which are numbers of `embed_rows`."""
        self._run(places, stop=0)
        hidden = self.stubs[0].seen
        assert hidden is not None
        return hidden

    @torch.no_grad()
    def calls(self, batch: int, length: int, token: int = 0) -> list[Call]:
        """What each block is called with for so many sequences from position 0."""
        self._run(torch.full((batch, length), token), stop=len(self.stubs) - 1)
        return [stub.call for stub in self.stubs if stub.call is not None]

    @torch.no_grad()
    def first_call(self, batch: int, length: int) -> Call:
        """Of `calls` the first, for which blocks need not have been run."""
        self._run(torch.zeros(batch, length, dtype=torch.int64), stop=0)
        call = self.stubs[0].call
        assert call is not None
        return call

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Of the last block's output (n, hidden), each by itself: (n, vocabulary)."""
        self.stubs[-1].gives = hidden[:, None].to(self.device, self.dtype)
        try:
            output = self._run(torch.zeros(len(hidden), 1, dtype=torch.int64))
        finally:
            self.stubs[-1].gives = None
        found: Tensor = output.logits[:, 0]
        return found

    def _run(self, places: Tensor, stop: int | None = None) -> Any:
        for i, stub in enumerate(self.stubs):
            stub.stops = i == stop
        try:
            return self.model(input_ids=places.to(self.device), use_cache=False)
        except Stopped:
            return None

    @torch.no_grad()
    def after_blocks(self, length: int) -> list[nn.Module]:
        """The modules with weights that run behind the last block, in order, up to the head."""
        found: list[nn.Module] = []
        head, handles = self.model.get_output_embeddings(), []

        def note(module: nn.Module, args: Any) -> None:
            found.append(module)
            if module is head:
                raise Stopped

        for module in self.model.modules():
            if not isinstance(module, StandIn) and next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_pre_hook(note))
        handles.append(self.stubs[-1].register_forward_hook(lambda *_: found.clear()))
        try:
            self._run(torch.zeros(1, length, dtype=torch.int64))
        finally:
            for handle in handles:
                handle.remove()
        return found

    @property
    def chained(self) -> bool:
        """Whether each block read what the one before it gave, in the last run."""
        seen = [stub.seen for stub in self.stubs]
        return all(one is not None and one is seen[0] for one in seen)


def fill_buffers(module: nn.Module, model: Any, device: torch.device) -> None:
    """Give a module on the meta device the buffers that no checkpoint has, as its class computes them, in place.

    `model` is the whole model, whose class knows how.

    Raises:
        ValueError: it does not, or knows it of all blocks together alone.
    """
    for part in module.modules():
        names = [
            name
            for name, buffer in part._buffers.items()
            if buffer is not None and buffer.is_meta and name in part._non_persistent_buffers_set
        ]
        for name in names:
            buffer = part._buffers[name]
            assert buffer is not None
            part._buffers[name] = torch.full_like(buffer, _unset(buffer.dtype), device=device)
        if names:
            model._init_weights(part)
        for name in names:
            if _is_unset(part._buffers[name]):
                raise ValueError(f"{name} of its {type(part).__name__} is in no checkpoint")


def _unset(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else 0 if dtype == torch.bool else -12345


def _is_unset(buffer: Tensor | None) -> bool:
    if buffer is None or not buffer.numel():
        return False
    return bool(buffer.isnan().any() if buffer.is_floating_point() else (buffer == -12345).any())
