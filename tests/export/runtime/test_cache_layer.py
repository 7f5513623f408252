"""A layer of the packed cache against the simulation: the same keys and values to the last bit."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import AttentionTransform
from rotoboa.export.runtime.cache import PackedLayer
from rotoboa.rotation.hadamard import Hadamard

BATCH, HEADS = 3, 2


def transform(bits: int, head_dim: int, *, symmetric: bool = False, search: bool = False) -> AttentionTransform:
    quantizer = DynamicQuantizer(bits, symmetric, 0.95, search=search)
    return AttentionTransform(Hadamard.of(head_dim), quantizer, replace(quantizer, clip=0.9))


def states(length: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, BATCH, HEADS, length, head_dim, generator=torch.Generator().manual_seed(head_dim))
    x[:, 0, :, 1] = 0  # a padded token
    x[:, 1, :, 2] = -3.5  # a constant one
    x[..., 1] += 20
    key, value = x.to(dtype)
    return key, value


def simulated(transform: AttentionTransform, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return transform(key, key, value)[1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("search", [False, True])
def test_holds_what_the_simulation_computes(bits: int, symmetric: bool, dtype: torch.dtype, search: bool) -> None:
    for head_dim in (16, 20):
        how = transform(bits, head_dim, symmetric=symmetric, search=search)
        key, value = states(9, head_dim, dtype)
        layer, expected = PackedLayer(how), [key[:, :, :0], value[:, :, :0]]
        for start, stop in ((0, 4), (4, 5), (5, 5), (5, 9)):
            new = key[:, :, start:stop], value[:, :, start:stop]
            found = layer.update(*new)
            if stop > start:  # part by part, as a rotation of one token differs in its last digit from one of many
                expected = [torch.cat(pair, 2) for pair in zip(expected, simulated(how, *new), strict=True)]
            assert layer.get_seq_length() == stop and found[0].dtype == dtype
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 4), (3, 16), (16, 16), (2, 8)])
def test_sixteen_bits_are_kept_as_they_are(key_bits: int, value_bits: int) -> None:
    keys, values = (DynamicQuantizer.of(bits, False, 0.95) for bits in (key_bits, value_bits))
    how, (key, value) = AttentionTransform(Hadamard.of(16), keys, values), states(6, 16)
    layer = PackedLayer(how)
    layer.update(key[:, :, :5], value[:, :, :5])
    found, expected = layer.update(key[:, :, 5:], value[:, :, 5:]), simulated(how, key, value)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("bits", "head_dim"), [(2, 64), (3, 64), (4, 64), (4, 128), (8, 64)])
def test_bytes_are_those_of_the_formula(bits: int, head_dim: int) -> None:
    layer = PackedLayer(transform(bits, head_dim))
    layer.update(*states(10, head_dim, torch.bfloat16))
    vectors = 2 * BATCH * HEADS * 10
    assert layer.bytes == vectors * (head_dim * bits // 8 + 2 * 2)  # and smallest and largest entry in bfloat16
    assert layer.keys.dtype == torch.int32
    held = [tensor for tensor in vars(layer).values() if isinstance(tensor, Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == layer.bytes


def test_sequences_and_tokens_are_chosen() -> None:
    how, (key, value) = transform(4, 16), states(8, 16)
    order = torch.tensor([2, 0, 0])
    steps: list[tuple[Callable[[PackedLayer], None], Callable[[Tensor], Tensor]]] = [
        (lambda layer: layer.reorder_cache(order), lambda x: x[order]),
        (lambda layer: layer.crop(-3), lambda x: x[:, :, :-3]),
        (lambda layer: layer.crop(0), lambda x: x),
        (lambda layer: layer.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
        (lambda layer: layer.batch_select_indices(order), lambda x: x[order]),
        (lambda layer: layer.offload(), lambda x: x),
        (lambda layer: layer.prefetch(), lambda x: x),
    ]
    layer = PackedLayer(how)
    layer.update(key[:, :, :7], value[:, :, :7])
    expected = [tensor[:, :, :7] for tensor in (key, value)]
    for change, same in steps:
        change(layer)
        expected = [same(tensor) for tensor in expected]
        assert layer.get_seq_length() == expected[0].shape[2]
    new = [tensor[order, :, 7:] for tensor in (key, value)]
    found = layer.update(*new)
    expected = [torch.cat(pair, 2) for pair in zip(expected, new, strict=True)]
    for a, b in zip(found, simulated(how, *expected), strict=True):
        assert torch.equal(a, b)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.bytes == 0
    assert torch.equal(layer.update(key, value)[0], simulated(how, key, value)[0])


@pytest.mark.parametrize("sink", [1, 4, 7, 20])
@pytest.mark.parametrize("steps", [[9], [1] * 9, [3, 1, 0, 5]])
def test_the_first_positions_are_kept_as_they_are(sink: int, steps: list[int]) -> None:
    how, (key, value) = replace(transform(3, 16), sink=sink), states(9, 16)
    plain, layer = replace(how, key=None, value=None), PackedLayer(how)
    for new in zip(key.split(steps, 2), value.split(steps, 2), strict=True):
        found = layer.update(*new)
    rounded, exact = (other(key, key, value) for other in (replace(how, sink=0), plain))
    for i, part in ((1, found[0]), (2, found[1])):
        torch.testing.assert_close(part[:, :, :sink], exact[i][:, :, :sink], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part[:, :, sink:], rounded[i][:, :, sink:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part, how(key, key, value)[i], rtol=1e-6, atol=1e-6)
    assert layer.bytes == 2 * BATCH * HEADS * (sink * 16 * 4 + 9 * (2 * 4 + 2 * 4))


def test_crop_wants_the_number_of_tokens_to_remove() -> None:
    with pytest.raises(ValueError, match="as a negative number"):
        PackedLayer(transform(4, 16)).crop(3)
