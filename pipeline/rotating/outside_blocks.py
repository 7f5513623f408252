"""What is outside the blocks, embedding, final norm and output layer, on its way through a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...boa.objective.objective import is_finite
from ...boa.objective.statistics import InputStatistics
from ...boa.objective.totals import Total
from ...boa.scheme import QuantizationArgs
from ...boa.solver.rounding import Quantized, quantize
from ...errors import RunError
from ...export.packed_matrix import PackedMatrix
from ...export.packing import packed_parts
from ...models.families import Family
from ...models.matrices import SPAN, Matrix, spans
from ...models.outer_layers import OuterLayers
from ...rotation.fold import neutral
from ..job.job import Job
from ..recipe.settings import moves_head


def rotated_outer_layers(job: Job) -> OuterLayers:
    """What is outside the blocks, rotated, in the checkpoint's dtype: what is stored is what is measured.

    Rows of embedding and head are rotated some at a time (in float64), into files. Where the stream is not turned, they
    are those of the checkpoint, tied if they were.

    Raises:
        RunError: values do not fit into the dtype.
    """
    source, family, dtype = job.checkpoint.outer_layers(), job.decoder.family, job.checkpoint.dtype
    if not job.rotations.turned and source.head[:1].dtype == dtype:
        rest = source.rows(slice(1)).map(lambda tensor: tensor.to(dtype))
        _check_fits(rest, family, dtype)
        bias = None if source.head_bias is None else source.head_bias.to(dtype)
        return replace(rest, embedding=source.embedding, head=source.head, head_bias=bias)
    if job.spec.turns_head:
        return _rotated_embedding(job, source)
    embedding, head = (job.buffers.file(*source.embedding.shape, dtype=dtype) for _ in range(2))
    biases: list[Tensor] = []
    for rows in spans(source.head):
        part = job.rotations.rotate_outer_layers(source.rows(rows), family).map(lambda tensor: tensor.to(dtype))
        _check_fits(part, family, dtype)
        embedding[rows], head[rows] = part.embedding[:], part.head[:]
        biases += [] if part.head_bias is None else [part.head_bias]
        job.release()
    return replace(part, embedding=embedding, head=head, head_bias=torch.cat(biases) if biases else None)


def rotated_towers(job: Job) -> Iterator[dict[str, Tensor]]:
    """What a model that sees has beside its decoder, as it goes into the finished model, a tensor at a time.

    Raises:
        RunError: values do not fit into the dtype.
    """
    for name, stored in job.checkpoint.towers():
        if name not in job.decoder.shapes:
            continue
        tensor = job.rotations.rotate_tower(name, stored, job.decoder.family).to(stored.dtype)
        _check_finite(name, tensor, stored.dtype)
        yield {name: tensor}
        job.release()


def _rotated_embedding(job: Job, source: OuterLayers) -> OuterLayers:
    """As `rotated_outer_layers` of a tied model whose head stays the embedding, with a matrix before it."""
    rotations, family, dtype = job.rotations, job.decoder.family, job.checkpoint.dtype
    embedding = job.buffers.file(*source.embedding.shape, dtype=dtype)
    norm, turn = neutral(source.norm, family).to(dtype), rotations.before_head(source.norm, family).to(dtype)
    for rows in spans(source.embedding):
        part = rotations.rotate_embedding(source.embedding[rows]).to(dtype)
        _check_fits(OuterLayers(part, norm, part, before_head=turn), family, dtype)
        embedding[rows] = part
        job.release()
    return OuterLayers(embedding, norm, embedding, before_head=turn)


def rounded_embedding(job: Job, outer: OuterLayers) -> OuterLayers:
    """With the embedding in few bits, rounded to nearest, where the recipe asks for it; a tied head is the same."""
    args = job.spec.outer(job.decoder.family.embedding)
    if not args.quantizes:
        return outer
    settings = job.settings.but(method="rtn", grid="diagonal").of(args)
    packed = _packed(job, outer.embedding, lambda rows: quantize(rows, None, settings), args)
    return replace(outer, embedding=packed, head=packed if job.spec.tied_head else outer.head)


def _packed(job: Job, matrix: Matrix, rounded: Callable[[Tensor], Quantized], args: QuantizationArgs) -> PackedMatrix:
    """A matrix in few bits, `rounded` of some rows (1, r, c) at a time."""
    parts = []
    for rows in spans(matrix, SPAN // 8):
        found = rounded(matrix[rows].to(job.decoder.device, job.decoder.dtype)[None])
        integers, scale, zero = (part[0].cpu() for part in (found.integers, found.scale, found.zero))
        parts.append(packed_parts(Quantized(integers, scale, zero), args))
        job.release()
    stored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return PackedMatrix(stored, args, matrix.shape[1])


def _check_fits(part: OuterLayers, family: Family, dtype: torch.dtype) -> None:
    for name, tensor in part.named(family).items():
        _check_finite(name, tensor, dtype)


def _check_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not is_finite(tensor):
        raise RunError(
            f"tensor {name} does not fit into {str(dtype).removeprefix('torch.')} once rotated: save it "
            "as bfloat16 or float32."
        )


@torch.no_grad()
def corrected_head(job: Job, outer: OuterLayers, full: Tensor, quantized: Tensor) -> OuterLayers:
    """The output layer moved to make up for what the last hidden states lost, and rounded where the recipe asks for it.

    It is the target shift of any projection, W* = W (I + alpha R H_in^-1), with or without rounding after it. A head
    that is still the checkpoint's is copied into a file for it.
    """
    weights, args = job.recipe.weights, job.spec.outer(job.decoder.family.head)
    if not moves_head(job.recipe) and not args.quantizes:
        return outer
    settings = job.settings.of(args).but(alpha=weights.head if moves_head(job.recipe) else 0.0)
    if args.quantizes and settings.method == "rtn":
        return replace(outer, head=_packed(job, outer.head, lambda rows: quantize(rows, None, settings), args))
    if settings.method == "brecq":
        settings = settings.but(method="boa")
    final, batch = job.decoder.norm(outer.norm, outer.norm_bias), job.recipe.calibration.batch
    shares = job.ranks.shares(job.recipe.calibration.samples, batch)
    batches = [range(share.start // batch, -(-share.stop // batch)) for share in shares]
    statistics, first = Total(InputStatistics, job.ranks, batches), shares[job.ranks.rank].start
    for i, (f, q) in enumerate(zip(*(stream.split(batch) for stream in (full, quantized)), strict=True)):
        statistics.at(first // batch + i).add(final(f.to(job.decoder.device)), final(q.to(job.decoder.device)))
        job.release()
    goal = statistics.value().objective()
    if job.ranks.rank > 0:
        return outer  # the first rank writes them
    if args.quantizes:
        goal = replace(goal, memo={})
        return replace(outer, head=_packed(job, outer.head, lambda rows: quantize(rows, goal, settings), args))
    objective = goal.damped(weights.damping)
    ours = isinstance(outer.head, Tensor)
    head = outer.head if ours else job.buffers.file(*outer.head.shape, dtype=job.checkpoint.dtype)
    assert isinstance(head, Tensor)
    for rows in spans(outer.head, 4 * SPAN):  # the Hessian is factored anew for each
        part = outer.head[rows]
        moved = objective.target(part.to(job.decoder.device, job.decoder.dtype)[None], weights.head)[0]
        head[rows].copy_(moved)
        job.buffers.release()
    return replace(outer, head=head)
