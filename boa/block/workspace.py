"""What both halves of a block work with: two streams, the transforms between layers, and the solver."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ...models.decoder import Decoder
from ..objective.objective import Objective
from ..objective.statistics import InputStatistics
from ..objective.totals import Statistics, Total
from ..online.transforms import OnlineTransforms
from ..precision import exact_products
from ..ranks import Ranks
from ..solver.references import relative_losses
from ..solver.rounding import Quantized, Settings
from ..solver.units import Problem, Solved, solve
from ..solver.zfold import ChannelScales
from ..stopwatch import stage

Report = Callable[[str, float], None]
S = TypeVar("S", bound=Statistics)


class Pending(NamedTuple):
    """Projections that share an H_in, and how many heads each has; the objective is asked for when they are solved."""

    names: list[str]
    objective: Callable[[], Objective]
    heads: list[int]


class Captured(Exception):  # noqa: N818 (a signal, not an error)
    """Carries a layer's input out of a forward pass that need not go on."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Workspace:
    """One block in two versions and the results so far; see `BlockQuantizer`, which is what this is a part of."""

    def __init__(
        self,
        decoder: Decoder,
        block: nn.Module,
        settings: Settings,
        transforms: OnlineTransforms,
        *,
        batch: int = 8,
        report: Report | None = None,
        previous: Mapping[str, Quantized] | None = None,
        empty: Callable[..., Tensor] = torch.empty,
        release: Callable[[], None] = lambda: None,
        references: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.decoder, self.family, self.shape = decoder, decoder.family, decoder.shape
        self.full = block
        # A copy whose weights are those of `block` until others take their place.
        memo = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in block.parameters()}
        self.quantized = copy.deepcopy(block, memo)
        self.settings, self.transforms, self.batch = settings, transforms, batch
        self.report = report or (lambda name, loss: None)
        self.previous = previous
        self.empty, self.release = empty, release
        self.results: dict[str, Quantized] = {}
        self.losses: dict[str, float] = {}
        self.damping: dict[str, float] = {}
        self.references, self.objectives = references, dict[str, dict[str, float]]()
        self.fallbacks: dict[str, int] = {}
        self.channel_scales: dict[str, ChannelScales] = {}
        self.folded: dict[str, Tensor] = {}
        self.centers: dict[str, Tensor] = {}
        self.ranks = ranks or Ranks()
        self.first = self.own = self.count = 0  # sequences before this rank's, its own, and all
        self.batches: list[range] = []  # the numbers of each rank's batches

    def _share(self, sequences: int) -> None:
        """Find out which sequences of all these are."""
        counts = self.ranks.gather(sequences)
        starts = [sum(counts[:rank]) for rank in range(len(counts))]
        self.first, self.own, self.count = starts[self.ranks.rank], sequences, sum(counts)
        self.batches = [
            range(start // self.batch, -(-(start + count) // self.batch))
            for start, count in zip(starts, counts, strict=True)
        ]

    def _total(self, make: Callable[[], S], first: int | None = None) -> Total[S]:
        """Statistics over all batches of all ranks, or those of the `first` sequences."""
        return Total(make, self.ranks, self.batches if first is None else self._batches_of(first))

    def _batches_of(self, first: int) -> list[range]:
        """The numbers of each rank's batches, of those that the `first` sequences of all are in."""
        end = -(-first // self.batch)
        return [range(own.start, max(own.start, min(own.stop, end))) for own in self.batches]

    def _number(self, span: slice) -> int:
        """The number of a batch among those of all ranks."""
        return (self.first + int(span.start)) // self.batch

    def _sum_now(self, tensor: Tensor) -> None:
        self.ranks.sum([tensor])()

    def _batches(self, full: Tensor, quantized: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Both streams, `batch` sequences at a time, where blocks compute."""
        for start in range(0, len(full), self.batch):
            span = slice(start, start + self.batch)
            yield span, full[span].to(self.decoder.device), quantized[span].to(self.decoder.device)
            self.release()

    def _write(
        self,
        name: str,
        statistics: Total[InputStatistics],
        number: int,
        stream: Tensor,
        hf: Tensor,
        hq: Tensor,
        exact: Tensor,
        given: Tensor,
        post_norm: str | None = None,
    ) -> None:
        """Move a batch of the full stream through a projection that writes to it, and collect the other's statistics.

        Args:
            statistics, number: where they go, and which batch this is.
            stream: the batch of the full stream, changed in place.
            hf, hq: both streams before the projection, where blocks compute.
            exact, given: the projection's input in both.
            post_norm: the norm between the projection's output y and the stream. An error of y then counts by one over
                rms(y); the norm's weight multiplies rows, which are rounded each for itself, and changes nothing. What
                the stream has lost is not made up for: it could only be by an output that the norm divides again.
        """
        projection = self.full.get_submodule(name)
        written = projection(exact)
        if self.previous is None:
            wanted = written if projection.bias is None else written - projection.bias
            if post_norm is not None:
                weight = written.square().mean(-1, keepdim=True).clamp_min(torch.finfo(written.dtype).tiny).rsqrt()
                wanted, given = wanted * weight, given * weight
            elif self.settings.drift:
                wanted = wanted + (hf - hq)
            statistics.at(number).add(None, given, wanted)
        stream += self._normed(self.full, post_norm, written).to(stream.device)

    def _add(self, name: str, stream: Tensor, inputs: Tensor, post_norm: str | None = None) -> None:
        """Move the quantized stream through a projection that is quantized now."""
        projection = self.quantized.get_submodule(name)
        for part, x in zip(stream.split(self.batch), inputs.split(self.batch), strict=True):
            y = projection(x.to(self.decoder.device))
            part += self._normed(self.quantized, post_norm, y).to(part.device)
            self.release()

    def _normed(self, block: nn.Module, post_norm: str | None, x: Tensor) -> Tensor:
        normed: Tensor = x if post_norm is None else block.get_submodule(post_norm)(x)
        return normed

    def _weight(self, name: str) -> Tensor:
        return self.full.get_parameter(f"{name}.weight").data

    @stage("losses")
    @exact_products()
    def _solve(self, *problems: Pending) -> None:
        """Problems that do not depend on each other: all ranks solve them together."""
        if self.ranks.size == 1 and len(problems) > 1:
            for problem in problems:  # no need to hold all objectives at once
                self._solve(problem)
            return
        if self.previous is None:
            given = [self._problem(pending) for pending in problems]
            solved = solve(given, self.settings, self.ranks, references=self.references)
            for whole, found in zip(given, solved, strict=True):
                self._keep(whole, found)
        for name in (name for problem in problems for name in problem.names):
            if self.previous is not None:
                self.results[name] = self.previous[name]
            weight = self.quantized.get_parameter(f"{name}.weight")
            weight.data = self.results[name].dequantize().to(weight.device, weight.dtype)

    def _problem(self, pending: Pending) -> Problem:
        names, heads = pending.names, pending.heads
        stacked = torch.cat([self._weight(name).unflatten(0, (h, -1)) for name, h in zip(names, heads, strict=True)])
        goal = pending.objective()
        return Problem(names, heads, stacked, replace(goal, memo={}) if self.ranks.deterministic else goal)

    def _keep(self, problem: Problem, solved: Solved) -> None:
        result, heads = solved.result, problem.heads
        # An error of the size of the weight itself is 1.
        loss = solved.losses["found"].clamp_min(0) / solved.losses["zero"].clamp_min(1e-30)
        parts = [
            [piece.flatten(0, 1) for piece in tensor.split(heads)]
            for tensor in (result.integers, result.scale, result.zero)
        ]
        for i, (name, part) in enumerate(zip(problem.names, loss.split(heads), strict=True)):
            self.results[name] = Quantized(*(pieces[i] for pieces in parts))
            self.losses[name] = float(part.mean())
            if result.damping > self.settings.damping:
                self.damping[name] = result.damping
            self.report(name, self.losses[name])
        if self.references:
            self.objectives.update(zip(problem.names, relative_losses(solved.losses, heads), strict=True))


def layer_objective(total: Total[InputStatistics], weight: Tensor | None = None) -> Callable[[], Objective]:
    """The objective of a layer, once it is asked for; of its weight where outputs were wanted."""
    return lambda: total.value().objective(weight)


def capture(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """The input of `module` in `run`, which goes no further."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise Captured(args[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        run()
    except Captured as captured:
        return captured.value
    finally:
        handle.remove()
    raise RuntimeError("the captured layer did not run")
