"""A block on a CUDA device that is not there: no operation meets tensors of two devices.

Tensors of this device say that they are on cuda:0 and compute on the CPU; an operation whose tensors are on different
devices fails as on a real GPU. Unlike in torch's FakeTensorMode values are real: code that looks at them runs,
and results be compared.
"""

# A tensor that pretends overrides what torch declares otherwise.
# mypy: disable-error-code="override, assignment, arg-type"

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from rotoboa.boa.block import block
from rotoboa.boa.block.context import Streams
from rotoboa.boa.kernels import dispatch as kernels
from rotoboa.boa.online.attention import NAME, attention_forward
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.export.packing import pack_block
from rotoboa.export.spec import Spec
from rotoboa.models.decoder import Decoder
from rotoboa.rotation.rotate import Rotations

from ..small_block import block_tensors, make_context

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
_MIXES = ("_to_copy", "copy_", "index", "index_put_", "_index_put_impl_", "set_data")  # with tensors of two devices
_WHOLE = (torch.nn.functional.scaled_dot_product_attention, torch.linalg.cholesky)
_LOOKS = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__)


class OnGpu(Tensor):
    """Holds a tensor of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def data(self) -> "OnGpu":
        return OnGpu(self.inner)

    @data.setter
    def data(self, other: "OnGpu") -> None:
        self.inner = other.inner

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, function._schema.name, args, kwargs or {})


def run(function: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of torch, on the CPU; its result is where a GPU would have it."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    here = any(isinstance(t, OnGpu) for t in tensors)
    name = name.removeprefix("aten::")
    if here and name not in _MIXES and any(not isinstance(t, OnGpu) and t.dim() for t in tensors):
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
    if name in ("index", "index_put_", "_index_put_impl_") and not isinstance(args[0], OnGpu) and here:
        raise RuntimeError(f"{name}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    there = isinstance(args[0], OnGpu) if name in _MIXES else here
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "cuda"
        kwargs = kwargs | {"device": CPU if there else kwargs["device"]}
    given = tree_map_only(OnGpu, lambda t: t.inner, (args, kwargs))
    result = function(*given[0], **given[1])
    known = {id(t.inner): t for t in tensors if isinstance(t, OnGpu)}

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor) or not there or isinstance(value, OnGpu):
            return value
        return known[id(value)] if id(value) in known else OnGpu(value)

    return tree_map(place, result)


class _Factories(TorchDispatchMode):
    """What has no tensor among its arguments but a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, function._schema.name, args, kwargs or {})


class _Whole(TorchFunctionMode):
    """Functions that ask for a kernel or for scratch space of the device are run as a whole."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _WHOLE and any(isinstance(t, OnGpu) for t in tree_flatten((args, kwargs))[0]):
            return run(function, function.__name__, args, kwargs)
        if function is torch.tensor and torch.device(kwargs.get("device") or CPU).type == "cuda":
            return OnGpu(torch.tensor(*args, **(kwargs | {"device": CPU})))
        if function in _LOOKS and isinstance(args[0], OnGpu):
            return function(args[0].inner, *args[1:], **kwargs)
        return function(*args, **kwargs)


class PretendCuda:
    """While it is entered, `cuda:0` may be asked for."""

    def __enter__(self) -> "PretendCuda":
        self._modes = (mock.patch("torch.cuda._lazy_init"), _Whole(), _Factories())
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


SETTINGS = Settings(bits=3, refine=1, starts=2, tabu=0.2, rows=8)
SPEC = Spec(bits=3, r3=True, r4=True, activation_bits=8, key_bits=4, value_bits=4)


def _quantized(
    model: nn.Module, device: torch.device, streams: torch.device, settings: Settings, *, real: bool = False
) -> dict[str, Any]:
    """The packed block, both streams and the losses of a run whose blocks are on one device and streams on another."""
    decoder = Decoder(model.config, attention=NAME)
    tensors = block_tensors(model, decoder, 0)
    x = torch.randn(3, 12, decoder.shape.hidden, generator=torch.Generator().manual_seed(1))
    with nullcontext() if real else PretendCuda():
        decoder.device = device
        if decoder._rotary is not None:
            decoder._rotary.to(device)
        rotations = Rotations.of(decoder.shape, r1=True, r2=True, r3=True, r4=True, online_r1=decoder.family.post_norms)
        near = {name: tensor.to(device) for name, tensor in tensors.items()}
        rotated = rotations.rotate_block(near, decoder.family, 0)
        assert all(tensor.device == device for tensor in rotated.values())
        module = decoder.block(0, rotated)
        full, quantized = x.to(streams), x.clone().to(streams)

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=streams)

        transforms = SPEC.transforms(decoder.shape, decoder.family)
        context = make_context(decoder, module, settings, transforms, references=True, empty=empty)
        result = block.quantize_block(context, Streams(full, quantized))
        assert {r.integers.device for r in result.results.values()} == {device}
        assert (full.device, quantized.device) == (streams, streams)
        others = {n: t for n, t in rotated.items() if n.removesuffix(".weight") not in result.results}
        packed = pack_block(result.results, others, SPEC.schemes(decoder.family, 0), torch.bfloat16)
        found = {name: tensor.cpu() for name, tensor in packed.items()}
        return {**found, "full": full.cpu(), "quantized": quantized.cpu(), "losses": result.losses}


def test_a_block_on_the_gpu_is_what_it_is_here(
    family_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_triton_for", lambda tensor: None)
    half = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = family_model("llama-biases", **half)  # each operation on such a device takes a while
    there = _quantized(model, GPU, GPU, SETTINGS)
    here = _quantized(model, CPU, CPU, SETTINGS)
    assert there.pop("losses") == pytest.approx(here.pop("losses"), rel=1e-2)
    for name, tensor in here.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(there[name], tensor, rtol=1e-2, atol=1e-2)
        else:
            assert (there[name] == tensor).float().mean() > 0.99, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("streams", [GPU, CPU])
def test_a_block_on_a_real_gpu(
    streams: torch.device, family_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton where it works. In TF32 integers differ, and losses hardly."""
    model = family_model("llama-biases")
    here = _quantized(model, CPU, CPU, SETTINGS, real=True)
    quick = _quantized(model, GPU, streams, SETTINGS, real=True)
    assert quick["losses"] == pytest.approx(here["losses"], rel=0.1)
    monkeypatch.setattr(block, "quick_products", lambda device: nullcontext())
    exact = _quantized(model, GPU, streams, SETTINGS, real=True)
    assert exact.pop("losses") == pytest.approx(here.pop("losses"), rel=1e-2)
    for name, tensor in here.items():
        if not tensor.is_floating_point():
            assert (exact[name] == tensor).float().mean() > 0.97, name


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_float32_attention_on_the_gpu_has_as_many_key_heads_as_query_heads(
    dtype: torch.dtype, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernel for float32 takes no groups of heads, those for bfloat16 do."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, heads, 9, 8, generator=generator).to(dtype) for heads in (4, 2, 2))
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    expected, _ = attention_forward(module, query, key, value, None, dropout=0.0)
    plain, given = torch.nn.functional.scaled_dot_product_attention, []

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        given.append((query.shape[1] // key.shape[1], query.shape[1] // value.shape[1]))
        return plain(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with PretendCuda():
        found, _ = attention_forward(module, query.to(GPU), key.to(GPU), value.to(GPU), None, dropout=0.0)
        assert given == [(groups, groups)]
        torch.testing.assert_close(found.cpu(), expected)


def test_the_device_that_is_not_there_tells_devices_apart() -> None:
    with PretendCuda():
        there, here = torch.ones(3, device="cuda:0"), torch.ones(3)
        assert there.is_cuda and there.device == GPU and (there * 2).device == GPU and there.cpu().device == CPU
        assert float((there + 1).sum()) == 6 and bool((there == 1).all())
        there[:2].add_(1)
        assert there.tolist() == [2, 2, 1]
        with pytest.raises(RuntimeError, match="same device"):
            there + here
