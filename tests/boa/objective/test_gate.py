"""Attention with a gate: H_out of the gate and of the values, of a real block of transformers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rotoboa.boa.block.forward_parts import attend, attend_ungated, capture
from rotoboa.boa.online.attention import AttentionTransform

from ..block.test_block_families import SETTINGS, Setup
from ..small_block import Solved, run_block

NAME = "qwen3_5_text"


def _parts(setup: Setup, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By head and token: what attention puts out, z of the gate, and M of the output projection."""
    family, shape = setup.decoder.family, setup.decoder.shape
    output, gate = attend_ungated(setup.decoder, setup.block, x, AttentionTransform())
    assert gate is not None
    z = setup.block.get_submodule(family.attention_gate)(x)
    weight = setup.block.get_parameter(f"{family.output}.weight").unflatten(1, (shape.query_heads, -1))
    m = torch.einsum("rhi,rhj->hij", weight, weight)
    return (*(part.unflatten(-1, (shape.query_heads, -1)).flatten(0, 1) for part in (output, z)), m)


def test_what_passes_the_gate_is_what_attention_writes(family_model: Callable[..., nn.Module]) -> None:
    setup = Setup(family_model(NAME))
    x = setup.streams()[0]
    before, gate = attend_ungated(setup.decoder, setup.block, x, AttentionTransform())
    assert gate is not None
    whole = attend(setup.decoder, setup.block, x, AttentionTransform())
    torch.testing.assert_close(before * gate, whole, rtol=0, atol=1e-6)
    assert (before - whole).abs().max() > 0.1


def test_objectives_of_gate_and_values(family_model: Callable[..., nn.Module], solved: Solved) -> None:
    """Token by token, without a mean; both streams are the same."""
    setup = Setup(family_model(NAME))
    full, _ = setup.streams()
    x = setup.block.get_submodule(setup.decoder.family.attention_norm)(full)
    run_block(setup.decoder, setup.block, SETTINGS, setup.transforms, (full, full.clone()))
    _, (_, value), (_, gate), *_ = solved
    output, z, m = _parts(setup, x)
    g = z.sigmoid()
    slope = output * g * (1 - g)
    wanted = sum(m * (s[:, :, None] * s[:, None]) for s in slope) / len(slope)
    torch.testing.assert_close(gate.h_out, wanted, rtol=1e-3, atol=1e-5)
    wanted = sum(m * (s[:, :, None] * s[:, None]) for s in g) / len(g)
    torch.testing.assert_close(value.h_out, wanted.unflatten(0, (2, 2)).sum(1), rtol=1e-3, atol=1e-5)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(gate.h_in[0], flat.T @ flat, rtol=1e-3, atol=1e-3)


def test_of_one_token_the_gate_is_exact(family_model: Callable[..., nn.Module], solved: Solved) -> None:
    """Against autograd, through what the block writes to the stream."""
    setup = Setup(family_model(NAME))
    hidden = setup.streams()[0][:1, :1]
    run_block(setup.decoder, setup.block, SETTINGS, setup.transforms, (hidden.clone(), hidden.clone()))
    family, shape = setup.decoder.family, setup.decoder.shape
    projection, output = (setup.block.get_submodule(name) for name in (family.attention_gate, family.output))

    def written(by: Tensor) -> Tensor:
        handle = projection.register_forward_hook(lambda _, args, y: y + by)
        try:
            x = capture(output, lambda: setup.decoder.run(setup.block, hidden))
        finally:
            handle.remove()
        return output(x).flatten()

    with torch.enable_grad():
        j = torch.autograd.functional.jacobian(written, torch.zeros(shape.query_width))
    whole, size = j.T @ j, shape.head_dim
    wanted = torch.stack([whole[i : i + size, i : i + size] for i in range(0, len(whole), size)])
    torch.testing.assert_close(solved[2][1].h_out, wanted, rtol=1e-3, atol=1e-5)
