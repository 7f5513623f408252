"""The rotations of QuaRot and SpinQuant, exact.

| | where | cost at run time |
|---|---|---|
| R1 | residual stream | none, folded |
| R2 | values and the input of the output projection, per head | none, folded |
| R3 | queries and keys after RoPE, per head | a Hadamard transform of head_dim |
| R4 | input of the down projection | a Hadamard transform of ffn; its inverse is folded |
| heads | input of the output projection, over all heads | a Hadamard transform of the number of heads |

Where no average of values is what the output projection reads, behind a gate or in a block without attention, there is
no R2, and `heads` is a Hadamard transform of all channels.

R1, R2 and R4 can be of diagonal blocks of some channels (`blocks`): where neighbours share a scale, outliers then stay
where they are but for their neighbours.

With orthogonal Q, a row vector x becomes x Q: a layer that reads it gets W Q, a layer that writes it Q^T W.

Post norms (Gemma 2 and 3): a branch adds `D y / rms(y)` to the stream, D the norm's weight. A rotated stream would
need `Q^T D y / rms(y)`. Writing `P y` for y leaves rms(y) as it is, but then `Q^T D P^T` must be diagonal to be a
norm's weight, which for a Hadamard Q and a D that is no multiple of I it is for no P; folding D into the layer before
changes rms(y). So the stream stays.

R1 online: the stream stays, and Q turns what the readers get behind the norm: (D x^) Q, against W Q. That costs two
Hadamard transforms of hidden a block, and rounds in another metric than R1 merged. Merged, inputs are rounded as x^ Q
and every channel has the same noise, which W D then multiplies by the norm's weight: where D is far from constant,
channels that it silences set the scale, and those that it amplifies drown. Behind the norm the noise is that of D x^.

The diagonal of `balance` stands before a site's rotations, in the norm or the layer that makes the site's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.families import Family
from ..models.outer_layers import OuterLayers
from ..models.shape import Shape
from .channels import scale_channels
from .fold import fold_norms, remove_mean
from .hadamard import Hadamard


@dataclass(frozen=True)
class Rotations:
    """Which rotations a model has; None where one is off. R2 has its own signs in every block.

    `online_r1`: R1 turns the inputs of q, k, v, gate and up as the model runs, as families with post norms need it.
    `heads` mixes the heads before the output projection, online. `scales` of each block by site, from `balance`.
    `blocks`: the channels of a diagonal block of R1, R2 and R4; None: all. `r4_blocks`: those of R4 are the largest
    power of two that divides its width.
    """

    shape: Shape
    r1: Hadamard | None = None
    r2: bool = False
    r3: Hadamard | None = None
    r4: Hadamard | None = None
    seed: int = 0
    online_r1: bool = False
    heads: Hadamard | None = None
    scales: Sequence[Mapping[str, Tensor]] | None = None
    blocks: int | None = None
    r4_blocks: bool = False

    @classmethod
    def of(
        cls,
        shape: Shape,
        *,
        r1: bool,
        r2: bool,
        r3: bool,
        r4: bool,
        seed: int = 0,
        online_r1: bool = False,
        r4_blocks: bool = False,
        heads: bool = False,
        blocks: int | None = None,
    ) -> Rotations:
        """Randomised Hadamards for R1 and R2, drawn from `seed`; plain ones for those that run online.

        `r4_blocks` makes R4 of blocks of the largest power of two that divides its width; `blocks` makes R1, R2 and R4
        of blocks of so many channels, a power of two.
        """
        return cls(
            shape,
            r1=Hadamard.of(shape.hidden, None if online_r1 else seed, block=blocks) if r1 else None,
            r2=r2,
            r3=Hadamard.of(shape.head_dim) if r3 else None,
            r4=Hadamard.of(shape.ffn, powers=r4_blocks, block=blocks) if r4 else None,
            seed=seed,
            online_r1=online_r1 and r1,
            heads=Hadamard.across(shape.query_heads, shape.head_dim) if heads else None,
            blocks=blocks,
            r4_blocks=r4_blocks,
        )

    def r4_of(self, width: int) -> Hadamard | None:
        """R4 of a down projection with so many inputs: those of a block need not all be alike."""
        if self.r4 is None or self.r4.size == width:
            return self.r4
        return Hadamard.of(width, powers=self.r4_blocks, block=self.blocks)

    @property
    def turned(self) -> bool:
        """Whether the residual stream itself is rotated, and the norms are folded into the layers that read them."""
        return self.r1 is not None and not self.online_r1

    def reseeded(self, seed: int) -> Rotations:
        """The same rotations, their signs drawn from another seed; those that run online have none."""
        r1 = self.r1 if self.r1 is None or self.online_r1 else replace(self.r1, seed=seed)
        return replace(self, r1=r1, seed=seed)

    def values(self, index: int) -> Hadamard | None:
        """R2 of block `index`."""
        seed = 1_000_003 * (self.seed + 1) + index
        return Hadamard.of(self.shape.head_dim, seed, block=self.blocks) if self.r2 else None

    def rotate_block(self, block: dict[str, Tensor], family: Family, index: int) -> dict[str, Tensor]:
        """The tensors of block `index`, scaled, folded and rotated, in float64. Names are those inside the block.

        Where the residual stream is not turned, the norms stay but for their scales.
        """
        family, shape = family.at(index), self.shape.at(index)
        block = {name: tensor.to(torch.float64) for name, tensor in block.items()}
        for site, scale in ({} if self.scales is None else self.scales[index]).items():
            block |= scale_channels(block, family, shape, site, scale)
        if self.turned:
            fold_norms(block, family)
        if self.r1 is not None:
            for name in (name for names in family.norm_readers.values() for name in names):
                if self.turned or name not in family.deciders:  # these read the norm's output before it is turned
                    _rotate_inputs(block, name, self.r1)
        if self.r1 is not None and self.turned:
            if family.layer_norm:
                remove_mean(block, family)
            for name in (family.output, *family.downs):
                _rotate_outputs(block, name, self.r1)
        r2 = self.values(index)
        if r2 is not None and family.has_values:
            _rotate_outputs(block, family.value, r2)
            _rotate_inputs(block, family.output, r2)
        if self.heads is not None:
            _rotate_inputs(block, family.output, before_output(family, shape))
        for name in family.downs:
            if (r4 := self.r4_of(block[f"{name}.weight"].shape[1])) is not None:
                _rotate_inputs(block, name, r4)
        return block

    def rotate_outer_layers(self, outer: OuterLayers, family: Family) -> OuterLayers:
        """What is outside the blocks, the final norm folded into the head and both ends rotated, in float64.

        For LayerNorm the mean over channels is taken out of embedding and positions, and the final norm's bias b
        becomes the head's, W b.
        """
        embedding, head, norm, positions, bias = (
            None if part is None else part[:].to(torch.float64)
            for part in (outer.embedding, outer.head, outer.norm, outer.positions, outer.norm_bias)
        )
        assert embedding is not None and head is not None and norm is not None
        if not self.turned:
            plain = OuterLayers(embedding, norm, head, positions=positions, norm_bias=bias)
            return replace(plain, head_bias=outer.head_bias, others=outer.others)
        if family.layer_norm:
            embedding, positions = (None if s is None else s - s.mean(-1, keepdim=True) for s in (embedding, positions))
        assert embedding is not None
        turned, neutral = self.rotate_head(head, norm, family)
        return OuterLayers(
            self.rotate_embedding(embedding),
            neutral,
            turned,
            positions=None if positions is None else self.rotate_embedding(positions),
            head_bias=_sum(None if bias is None else head @ bias, outer.head_bias),
        )

    def rotate_stream(self, hidden: Tensor, family: Family) -> Tensor:
        """The residual stream (..., hidden) of the model as it is between two blocks of the rotated model."""
        if not self.turned:
            return hidden
        assert self.r1 is not None
        return self.r1.apply(hidden - hidden.mean(-1, keepdim=True) if family.layer_norm else hidden)

    def rotate_embedding(self, embedding: Tensor) -> Tensor:
        """(vocabulary, hidden) -> the same, in float64."""
        embedding = embedding.to(torch.float64)
        return embedding if self.r1 is None else self.r1.apply(embedding)

    def rotate_head(self, head: Tensor, norm: Tensor, family: Family) -> tuple[Tensor, Tensor]:
        """Output layer (vocabulary, hidden) and final norm weight (hidden,), folded and rotated, float64."""
        head, norm = head.to(torch.float64), norm.to(torch.float64)
        if self.r1 is None:
            return head, norm
        return self.r1.apply(head * (norm + family.norm_offset)), torch.full_like(norm, 1.0 - family.norm_offset)

    def rotate_tower(self, name: str, tensor: Tensor, family: Family) -> Tensor:
        """A tensor beside the decoder of a model that sees: weight or bias of what writes to the stream, in float64.

        Images come into the stream as that layer's output y, which becomes `y Q`. All else is as it was.
        """
        if self.r1 is None or not self.turned or family.sight is None or not family.sight.writes(name):
            return tensor
        return self.r1.apply(tensor.to(torch.float64).movedim(0, -1)).movedim(-1, 0).contiguous()

    def before_head(self, norm: Tensor, family: Family) -> Tensor:
        """What a head that stays the rotated embedding E Q has before it, (hidden, hidden) in float64.

        With the final norm's weight g, `x^ diag(g) E^T = (x^ Q) [Q^T diag(g) Q] (E Q)^T`.
        """
        assert self.turned and self.r1 is not None
        half = self.r1.apply(torch.diag(norm.to(torch.float64) + family.norm_offset))
        return self.r1.apply(half.T.contiguous())


def before_output(family: Family, shape: Shape) -> Hadamard:
    """What `heads` is in a block of this family.

    Over all heads where R2 has mixed the channels of each. Where it cannot, since a gate stands between the values and
    the output projection, or there are none, over all channels.
    """
    if family.has_values:
        return Hadamard.across(shape.query_heads, shape.head_dim)
    return Hadamard.of(input_width(family, shape))


def input_width(family: Family, shape: Shape) -> int:
    """Channels of what the output projection reads."""
    return (family.sizes or {}).get(family.output, (0, shape.query_width))[1]


def _sum(*parts: Tensor | None) -> Tensor | None:
    """Of those that are there, in float64."""
    there = [part.to(torch.float64) for part in parts if part is not None]
    return torch.stack(there).sum(0) if there else None


def _rotate_inputs(block: dict[str, Tensor], name: str, rotation: Hadamard) -> None:
    """W Q; a Q smaller than the input acts on each of its equal parts (heads)."""
    weight = block[f"{name}.weight"]
    parts = weight.unflatten(1, (-1, rotation.size))
    block[f"{name}.weight"] = rotation.apply(parts).flatten(1)


def _rotate_outputs(block: dict[str, Tensor], name: str, rotation: Hadamard) -> None:
    """Q^T W and Q^T b."""
    weight = block[f"{name}.weight"]
    parts = weight.T.unflatten(1, (-1, rotation.size))
    block[f"{name}.weight"] = rotation.apply(parts).flatten(1).T.contiguous()
    if f"{name}.bias" in block:
        bias = block[f"{name}.bias"].unflatten(0, (-1, rotation.size))
        block[f"{name}.bias"] = rotation.apply(bias).flatten()
