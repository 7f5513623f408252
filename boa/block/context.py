"""What the steps of a block are given: what does not change, the two streams that move, and what they give back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ...models.decoder import Decoder
from ...models.families import Family
from ...models.shape import Shape
from ..objective.totals import Statistics, Total
from ..online.transforms import OnlineTransforms
from ..ranks import Ranks
from ..scheme import QuantizationScheme
from ..solver.rounding import Quantized
from ..solver.rounding_settings import LAYERWISE, Settings
from ..solver.zfold import ChannelScales
from ..stored_scales import global_scale_of

Report = Callable[[str, float], None]
S = TypeVar("S", bound=Statistics)


@dataclass(frozen=True)
class Share:
    """Which sequences of all are this rank's, and how they are computed.

    Attributes:
        ranks: the processes that quantize the block together, each with some of the sequences.
        batch: sequences computed at a time.
        first: sequences of the ranks before this one.
        own: sequences of this rank.
        count: sequences of all ranks.
        batches: the numbers of each rank's batches.
    """

    ranks: Ranks
    batch: int
    first: int
    own: int
    count: int
    batches: tuple[range, ...]

    @classmethod
    def of(cls, ranks: Ranks, sequences: int, batch: int) -> Share:
        """The share of a rank that has so many sequences; every rank says how many it has."""
        counts = ranks.gather(sequences)
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        batches = (range(a // batch, -(-(a + count) // batch)) for a, count in zip(starts, counts, strict=True))
        return cls(ranks, batch, starts[ranks.rank], sequences, sum(counts), tuple(batches))

    def number(self, start: int) -> int:
        """The number, among those of all ranks, of the batch that begins at this sequence of the rank's own."""
        return (self.first + start) // self.batch

    def total(self, make: Callable[[], S], first: int | None = None) -> Total[S]:
        """Statistics over all batches of all ranks, or over those that the `first` sequences of all are in."""
        if first is None:
            return Total(make, self.ranks, self.batches)
        end = -(-first // self.batch)
        return Total(make, self.ranks, [range(b.start, max(b.start, min(b.stop, end))) for b in self.batches])


@dataclass(frozen=True)
class Streams:
    """Hidden states (sequences, length, hidden) of this rank, which steps move through the block in place.

    The full-precision stream says what each layer should have computed. The quantized one, with activation and cache
    quantizers on, is what a layer is given.
    """

    full: Tensor
    quantized: Tensor

    def copy(self, empty: Callable[..., Tensor]) -> Streams:
        """Both as they are now, in tensors that `empty` makes; where both are one, so is the copy."""
        parts = [self.full] if self.full is self.quantized else [self.full, self.quantized]
        found = [empty(*part.shape, dtype=part.dtype).copy_(part) for part in parts]
        return Streams(found[0], found[-1])

    def restore(self, earlier: Streams) -> None:
        """Make both what they were."""
        self.full.copy_(earlier.full)
        self.quantized.copy_(earlier.quantized)


class Batch(NamedTuple):
    """Some sequences of both streams, where blocks compute, (batch, length, hidden).

    `number` is that among the batches of all ranks, `span` says which of this rank's sequences they are.
    """

    number: int
    span: slice
    full: Tensor
    quantized: Tensor


@dataclass(frozen=True, eq=False)
class BlockContext:
    """What does not change while a block is quantized.

    The weights of both blocks do: those of `quantized` are replaced as they are found, and Z-Fold scales those of both.

    Attributes:
        decoder: makes and runs blocks.
        full: the block, its norms folded and rotated as the recipe asks.
        quantized: a `shared_copy` of it.
        settings: of the rounding.
        transforms: online rotations and quantizers.
        share: which sequences are this rank's.
        previous: results of an earlier run by projection; these are used as they are, and nothing is solved.
        references: also measure RTN and plain GPTQ on each projection's objective.
        report: called with each projection's name and its loss relative to that of a zero weight.
        empty: makes the tensors that hold a layer's input for all tokens, by their size and `dtype`.
        release: called after each batch, so that what lies in files need not stay in memory.
        schemes: by projection, where they are not all as the settings have them.
        follows_full: whether the full-precision stream is moved too; see `needs_full`, which says where it is not read.
    """

    decoder: Decoder
    full: nn.Module
    quantized: nn.Module
    settings: Settings
    transforms: OnlineTransforms
    share: Share
    previous: Mapping[str, Quantized] | None = None
    references: bool = False
    report: Report = lambda name, loss: None
    empty: Callable[..., Tensor] = torch.empty
    release: Callable[[], None] = lambda: None
    follows_full: bool = True
    schemes: Mapping[str, QuantizationScheme] = field(default_factory=dict)

    @cached_property
    def family(self) -> Family:
        """Where the block keeps its layers."""
        return self.decoder.family_of(self.full)

    @cached_property
    def shape(self) -> Shape:
        """Sizes of the block."""
        return self.decoder.shape.at(self.decoder.index_of(self.full))

    def settings_of(self, name: str) -> Settings | None:
        """How a projection is rounded; None: it is left as it is."""
        settings = self.settings
        if name in self.schemes:
            args = self.schemes[name].weights
            if not args.quantizes:
                return None
            settings = settings.of(args)
        if settings.format != "nvfp4":
            return settings
        return settings.with_global_scale(self._global_scales[self.family.sites[name]])

    @cached_property
    def _global_scales(self) -> dict[str, float]:
        """By site: one for all projections of an input, which kernels run as one. Of many experts it is found once."""
        peaks = dict[str, float]()
        for name, site in self.family.sites.items():
            peaks[site] = max(peaks.get(site, 0.0), float(self.weight(name).abs().amax()))
        return {site: global_scale_of(peak) for site, peak in peaks.items()}

    def batches(self, streams: Streams) -> Iterator[Batch]:
        """Both streams, `share.batch` sequences at a time."""
        for start in range(0, len(streams.full), self.share.batch):
            yield self.batch(streams, slice(start, start + self.share.batch))
            self.release()

    def batch(self, streams: Streams, span: slice) -> Batch:
        """That of the sequences `span`, which one batch has."""
        device = self.decoder.device
        quantized = streams.quantized[span].to(device)
        full = streams.full[span].to(device) if self.follows_full else quantized
        return Batch(self.share.number(span.start), span, full, quantized)

    def weight(self, name: str) -> Tensor:
        """The full-precision weight of a projection, (r, c)."""
        return self.full.get_parameter(f"{name}.weight").data


@dataclass(frozen=True)
class BlockResult:
    """What was found of a block, or of what one step of it quantizes; the dictionaries are by projection or as told.

    Attributes:
        results: integers (r, c), scale and zero (r, groups).
        losses: the objective at the result, relative to that at a zero weight.
        objectives: what `relative_losses` finds, where references are asked for.
        damping: of the projections whose Hessian needed more than the settings say.
        fallbacks: the projections of experts that saw too few tokens, with the number of these.
        channel_scales: what Z-Fold found, by site.
        folded: the norms and biases that it changed, by their names inside the block.
        centers: that of the keys, and what `find_scales` finds, by their names inside the block.
        output_error: where the method is brecq, the error of the block's output at the solution that it starts from,
            which `losses` and `objectives` are of, and at the end.
    """

    results: dict[str, Quantized] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    objectives: dict[str, dict[str, float]] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    channel_scales: dict[str, ChannelScales] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    centers: dict[str, Tensor] = field(default_factory=dict)
    output_error: tuple[float, float] | None = None

    def __or__(self, later: BlockResult) -> BlockResult:
        """Both; where both know something of one projection, what was found later."""
        names = [f.name for f in fields(self) if f.name != "output_error"]
        merged = {name: getattr(self, name) | getattr(later, name) for name in names}
        return BlockResult(**merged, output_error=later.output_error or self.output_error)


def needs_full(settings: Settings, family: Family) -> bool:
    """Whether anything that a block is solved by follows from the full-precision stream.

    Shifts of targets do, which rounding to the nearest has none of, the objectives of attention and Z-Fold, what
    experts put out together, and what post norms divide errors by.
    """
    layers_alone = (
        settings.method in LAYERWISE
        and not settings.zfold
        and family.attention_post_norm is None
        and not family.experts
    )
    shifts = settings.alpha > 0 and settings.method != "rtn"
    return shifts or not layers_alone


def shared_copy(block: nn.Module) -> nn.Module:
    """A copy whose weights are those of `block` until others take their place."""
    memo = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in block.parameters()}
    return copy.deepcopy(block, memo)
