"""The family of a decoder without a row: its linear layers, found by running it once without data.

The model is made on the meta device, where a forward pass computes shapes alone. `Shell` says what its blocks are
given; hooks see which linear layers run in a block, in which order, and which of them read the same tensor. What cannot
be taken is refused here, before any work.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ...errors import InputError
from ..family import Family
from .generic_experts import UnfitError, experts_of_blocks, renamed_in, split_all
from .shell import Call, Shell, fill_buffers

LENGTH = 8
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer")
_FEW = 8  # rows of a layer that decides rather than computes


@dataclass(frozen=True)
class GenericFamily(Family):
    """A family whose blocks are known by their linear layers alone, `groups` and `sizes`.

    Attributes:
        outputs: how many things a block gives, in a tuple; 0: its hidden states, in none.
    """

    outputs: int = 0

    @property
    def generic(self) -> bool:
        """As of `Family`."""
        return True

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """Unknown."""
        return ()

    @property
    def downs(self) -> tuple[str, ...]:
        """Unknown."""
        return ()

    @property
    def sites(self) -> dict[str, str]:
        """Each linear layer; what their inputs are is unknown, and nothing runs online before them."""
        return dict.fromkeys((name for group in self.groups for name in group), "qkv")


def is_causal_type(model_type: str) -> bool:
    """Whether transformers has a causal decoder of this type, that is nothing else too."""
    others = (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in others


_FOUND: dict[str, GenericFamily] = {}


def generic_family(config: PretrainedConfig, source: str) -> GenericFamily:
    """The family of a config whose type has no row; `source` names the model in errors.

    Raises:
        InputError: it is no list of blocks that are alike, or most of their weights are in no linear layer.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _FOUND:
        try:
            with torch.device("cpu"):  # transformers asks for it while it makes a model on the meta device
                _FOUND[key] = _found(config)
        except UnfitError as error:
            raise InputError(
                f"{source} is a '{config.model_type}' model, which has no row of its own, and {error}: choose another "
                "model."
            ) from error
    return _FOUND[key]


@torch.no_grad()
def _found(config: PretrainedConfig) -> GenericFamily:
    model = meta_model(config)
    renamed, experts = renamed_in(model), split_all(model)
    layers, blocks = _blocks(model, int(getattr(config, "num_hidden_layers", 0) or 0))
    for block in blocks:
        _check_weights(block, [name for name, part in block.named_modules() if isinstance(part, nn.Linear)])
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise UnfitError("its embedding or its output layer is no plain one")
    if any(embedding.children()):
        raise UnfitError("its embedding has a layer of its own inside")
    try:
        shell = Shell(model, layers, outputs=0, dtype=torch.float32, device="cpu")
        outputs = _outputs(blocks[0], shell.first_call(1, LENGTH), embedding.embedding_dim)
        shell = Shell(model, layers, outputs=outputs, dtype=torch.float32, device="cpu")
        calls = shell.calls(1, LENGTH)
        chained = shell.chained and len(calls) == len(blocks)
        told = _alike(calls, shell.calls(1, LENGTH, token=1))
        fill_buffers(copy.deepcopy(blocks[0]), model, torch.device("cpu"))
        ran = [_inputs(*pair, embedding.embedding_dim) for pair in zip(blocks, calls, strict=False)]
        places = {id(module): name for name, module in shell.model.named_modules()}
        end = [places[id(module)] for module in shell.after_blocks(LENGTH)]
    except Exception as error:  # whatever its code raises: it does not run as other decoders do
        what = " ".join(str(error).split())[:200].rstrip(".")
        raise UnfitError(f"its blocks do not run by themselves ({type(error).__name__}: {what})") from error
    if not chained:
        raise UnfitError("something is computed between its blocks, or not all of them run")
    if not told:
        raise UnfitError("its blocks are given more of the tokens than their hidden states")
    if len(end) != 2 or end[-1] != names[id(head)] or not _is_norm(shell.model.get_submodule(end[0])):
        raise UnfitError("between its last block and its output layer there is something else than one norm")
    linears = _linears(config, ran, blocks)
    groups: dict[int, list[str]] = {}
    for name, tensor in ran[0]:
        if name in linears:
            groups.setdefault(id(tensor), []).append(name)
    _check_weights(blocks[0], linears)
    outer = (names[id(embedding)], end[0], end[1])
    inside = experts_of_blocks(blocks, experts)
    others = [name for name in model.state_dict() if not name.startswith((f"{layers}.", *(f"{m}." for m in outer)))]
    return GenericFamily(
        config.model_type,
        embedding=outer[0],
        layers=layers,
        rotary=None,
        final_norm=outer[1],
        head=outer[2],
        others=tuple(others),
        renamed=renamed,
        **inside,
        groups=tuple(tuple(group) for group in groups.values()),
        sizes={name: _size(blocks[0], name) for name in linears},
        outputs=outputs,
    )


def meta_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model without data, with its own attention.

    Raises:
        InputError: transformers cannot make one of the config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        what = f"{type(error).__name__}: {error}".rstrip(".")
        raise InputError(f"no model can be made of this config.json ({what}): download it again.") from error


def _blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and count and len(m) == count]
    lists = [(name, blocks) for name, blocks in lists if any(isinstance(m, nn.Linear) for m in blocks.modules())]
    if not lists:
        raise UnfitError("it is no list of blocks with linear layers")
    name, blocks = lists[0]
    kinds = sorted({type(block).__name__ for block in blocks})
    if len(kinds) > 1:
        raise UnfitError(f"its blocks are of several kinds ({', '.join(kinds)})")
    if len({id(p) for p in blocks.parameters()}) < sum(1 for block in blocks for _ in block.parameters()):
        raise UnfitError("its blocks share weights")
    return name, blocks


def _outputs(block: nn.Module, call: Call, hidden: int) -> int:
    """How many things a block gives, in a tuple; 0: one tensor, in none."""
    output = block(*_on_meta(torch.zeros(1, LENGTH, hidden), *call.args), **_on_meta(call.kwargs)[0])
    return 0 if isinstance(output, Tensor) else len(output)


def _is_norm(module: nn.Module) -> bool:
    """Whether it has the weight of one, by channel: a head may be a module of its own around the output layer."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1


def _inputs(block: nn.Module, call: Call, hidden: int) -> list[tuple[str, Tensor]]:
    """The linear layers of a block, in the order in which they run, with what they read."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        block(*_on_meta(torch.zeros(1, LENGTH, hidden), *call.args), **_on_meta(call.kwargs)[0])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _on_meta(*values: Any) -> tuple[Any, ...]:
    """Any arguments, their tensors without data."""
    return tuple(
        value.to("meta")
        if isinstance(value, Tensor)
        else type(value)(_on_meta(*value))
        if type(value) in (list, tuple)
        else {name: _on_meta(part)[0] for name, part in value.items()}
        if isinstance(value, dict)
        else value
        for value in values
    )


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(part, other[name]) for name, part in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return True


def _size(block: nn.Module, name: str) -> tuple[int, int]:
    rows, columns = block.get_submodule(name).get_parameter("weight").shape
    return rows, columns


def _linears(config: PretrainedConfig, ran: list[list[tuple[str, Tensor]]], blocks: nn.ModuleList) -> list[str]:
    """Those of a block that are quantized, in order; routers and layers of few rows are not."""
    experts = {getattr(config, name, None) for name in _EXPERTS}
    found = []
    for index, inputs in enumerate(ran):
        names = [name for name, _ in inputs]
        if len(set(names)) < len(names):
            raise UnfitError(f"a linear layer of block {index} runs more than once")
        sizes = [(name, _size(blocks[index], name)) for name in names]
        found.append([(name, size) for name, size in sizes if size[0] not in experts and size[0] > _FEW])
    if any(one != found[0] for one in found):
        index = next(i for i, one in enumerate(found) if one != found[0])
        raise UnfitError(f"its blocks 0 and {index} have other linear layers")
    return [name for name, _ in found[0]]


def _check_weights(block: nn.Module, linears: list[str]) -> None:
    """Most of a block must be in what is quantized."""
    inside = {f"{name}.weight" for name in linears}
    rest = {name: p.numel() for name, p in block.named_parameters() if name not in inside and p.ndim > 1}
    whole = sum(p.numel() for p in block.parameters())
    if sum(rest.values()) * 2 > whole:
        raise UnfitError(f"most weights of a block are in no linear layer ({max(rest, key=rest.__getitem__)})")
