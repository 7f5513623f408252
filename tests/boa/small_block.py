"""A block of a small random model, what its quantizer makes of it, and the same block as transformers runs it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from rotoboa.boa.block.block import quantize_block
from rotoboa.boa.block.context import BlockContext, BlockResult, Share, Streams, shared_copy
from rotoboa.boa.objective.objective import Objective
from rotoboa.boa.online.activations import DynamicQuantizer
from rotoboa.boa.online.attention import NAME, AttentionInputs, AttentionTransform, set_attention
from rotoboa.boa.online.transforms import InputTransform, OnlineTransforms
from rotoboa.boa.ranks import Ranks
from rotoboa.boa.solver.rounding_settings import Settings
from rotoboa.models.decoder import Decoder
from rotoboa.models.families import FAMILIES
from rotoboa.models.layout import split_tensors
from rotoboa.rotation.hadamard import Hadamard
from rotoboa.rotation.rotate import Rotations

LLAMA = FAMILIES["llama"]
HIDDEN, FFN, HEADS, KEY_HEADS, SIZE, SEQUENCES, LENGTH = 32, 24, 4, 2, 8, 3, 20
SHAPES = {
    LLAMA.query: (HEADS * SIZE, HIDDEN),
    LLAMA.key: (KEY_HEADS * SIZE, HIDDEN),
    LLAMA.value: (KEY_HEADS * SIZE, HIDDEN),
    LLAMA.output: (HIDDEN, HEADS * SIZE),
    LLAMA.gate: (FFN, HIDDEN),
    LLAMA.up: (FFN, HIDDEN),
    LLAMA.down: (HIDDEN, FFN),
}
QUICK = Settings(bits=4, refine=1, starts=1, tabu=0)

Solved = list[tuple[Tensor, Objective]]  # weights and objectives, one problem after another


def _w4a4kv4() -> OnlineTransforms:
    tokens, cache = DynamicQuantizer(4, True, 0.9), DynamicQuantizer(4, False, 0.95)
    site = InputTransform(quantizer=tokens)
    down = InputTransform(Hadamard.of(FFN), tokens)
    return OnlineTransforms(site, site, site, down, AttentionTransform(Hadamard.of(SIZE), cache, cache))


PLAIN = OnlineTransforms()
ROTATED = OnlineTransforms(
    down=InputTransform(Hadamard.of(FFN)), attention=AttentionTransform(rotation=Hadamard.of(SIZE))
)
QUANTIZED = _w4a4kv4()


def make_decoder(family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Decoder:
    """Of one block; `sizes` are what differs from those above."""
    usual = {
        "vocab_size": 16,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
    }
    return Decoder(AutoConfig.for_model(family, **(usual | sizes)), attention=NAME, dtype=dtype)


def make_tensors() -> dict[str, Tensor]:
    """Weights that make attention sharp; the norms multiply by something else than 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(s, generator=generator) * 1.5 / s[1] ** 0.5 for name, s in SHAPES.items()}
    for name in (LLAMA.attention_norm, LLAMA.mlp_norm):
        tensors[f"{name}.weight"] = 0.5 + torch.rand(HIDDEN, generator=generator)
    return tensors


def make_block(decoder: Decoder, transforms: OnlineTransforms = PLAIN) -> nn.Module:
    """With the folded half of R4 where the transforms have the other."""
    rotations = Rotations(decoder.shape, r4=transforms.down.rotation)
    return decoder.block(0, rotations.rotate_block(make_tensors(), LLAMA, 0))


def make_streams() -> tuple[Tensor, Tensor]:
    """Hidden states (sequences, length, hidden), correlated, some channels large; the quantized ones a bit off."""
    generator = torch.Generator().manual_seed(5)
    full = torch.randn(SEQUENCES, LENGTH, 12, generator=generator) @ torch.randn(12, HIDDEN, generator=generator) / 3
    full = full + 0.3 * torch.randn(full.shape, generator=generator)
    full[..., 3] *= 6
    return full, full + 0.1 * torch.randn(full.shape, generator=generator)


def block_tensors(model: nn.Module, decoder: Decoder, index: int) -> dict[str, Tensor]:
    """Those of a block of a model of transformers, one linear layer a projection."""
    family, shape = decoder.family.at(index), decoder.shape.at(index)
    prefix = f"{family.layers}.{index}."
    tensors = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    apart = [] if family.fused else [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    for name in apart:
        for i, fused in enumerate(tensors.pop(name)):
            gate, up, down = family.expert(i)
            parts = {down: fused} if name.endswith("down_proj") else dict(zip((gate, up), fused.chunk(2), strict=True))
            tensors |= {f"{key}.weight": part.clone() for key, part in parts.items()}
    return split_tensors(tensors, family, shape)


class Ran(NamedTuple):
    """What was found of a block, what became of the streams, and what the steps were given."""

    found: BlockResult
    full: Tensor
    quantized: Tensor
    context: BlockContext


def make_context(
    decoder: Decoder,
    block: nn.Module,
    settings: Settings = QUICK,
    transforms: OnlineTransforms = PLAIN,
    *,
    sequences: int = SEQUENCES,
    batch: int = 2,
    **options: Any,
) -> BlockContext:
    """That of `block` on one rank."""
    share = Share.of(Ranks(), sequences, batch)
    return BlockContext(decoder, block, shared_copy(block), settings, transforms, share, **options)


def run_block(
    decoder: Decoder,
    block: nn.Module,
    settings: Settings,
    transforms: OnlineTransforms,
    streams: tuple[Tensor, Tensor],
    *,
    batch: int = 2,
    **options: Any,
) -> Ran:
    """The block quantized on streams, which are written to."""
    context = make_context(decoder, block, settings, transforms, sequences=len(streams[0]), batch=batch, **options)
    return Ran(quantize_block(context, Streams(*streams)), *streams, context)


def run_small(settings: Settings = QUICK, transforms: OnlineTransforms = PLAIN, **options: Any) -> Ran:
    """That of the small Llama's block on its streams."""
    decoder = make_decoder()
    return run_block(decoder, make_block(decoder, transforms), settings, transforms, make_streams(), **options)


@torch.no_grad()
def forward(
    decoder: Decoder, block: nn.Module, hidden: Tensor, transforms: OnlineTransforms, *, exact: bool, batch: int = 2
) -> Tensor:
    """As transformers runs it, the transforms put beside its layers; `exact` leaves the quantizers out."""
    handles = []
    family = decoder.family_of(block)
    for name, site in transforms.by_projection(family).items():
        function = site.rotate if exact else site
        hook = lambda _, args, function=function: function(args[0])  # noqa: E731
        handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    attention = AttentionTransform(transforms.attention.rotation) if exact else transforms.attention
    set_attention(block.get_submodule(family.attention), attention)
    output = torch.cat([decoder.run(block, part) for part in hidden.split(batch)])
    for handle in handles:
        handle.remove()
    return output


def seen_where(decoder: Decoder, block: nn.Module, hidden: Tensor, moved: str, by: Tensor) -> AttentionInputs:
    """What attention computes with where the output of the layer `moved` is another."""
    found: list[AttentionInputs] = []
    attention = block.get_submodule(decoder.family.attention)
    handle = block.get_submodule(moved).register_forward_hook(lambda _, args, output: output + by)
    set_attention(attention, AttentionTransform(), found.append)
    try:
        decoder.run(block, hidden)
    finally:
        set_attention(attention, None)
        handle.remove()
    return found[0]
