"""The driver: which rows go through the head together, in what order, and what becomes of them.

Rows are scored tokens; on the CPU ignored ones are dropped before any product. On an accelerator nothing here waits for
the device: every row counts, ignored ones with coefficient 0, and a plan that needs values (which sequences a chunk
holds, which pairs close in it) is made from ``cu_seqlens`` and ``pairs`` where those are on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mopo_kernels import coefficients, parallel, reference
from mopo_kernels.backends import Head, tile_backend
from mopo_kernels.backends.tile import NOT_SCORED
from mopo_kernels.coefficients import PairData
from mopo_kernels.groups import closed_groups
from mopo_kernels.head import Folded, LinearHead, Tile, accumulation_dtype, layout_of, row_chunks, row_major


def _kept_budget(max_buffer_bytes: int) -> int:
    """What is left of the buffer beside products that are kept for backward: see :meth:`Call.keeps_products`."""
    return max_buffer_bytes // 4


@dataclass(frozen=True)
class Call:
    """The options that all passes over a head share; see :func:`mopo_kernels.linear_logprob`. ``needs``: whether
    gradients for hidden, weight and bias are wanted."""

    ignore_index: int
    head: Head
    backend: str
    max_buffer_bytes: int
    process_group: str | None
    gradient_filter: float | None
    needs: tuple[bool, bool, bool]

    @property
    def frozen(self) -> bool:
        """A gradient for hidden alone."""
        return self.needs == (True, False, False)

    @property
    def trained(self) -> bool:
        return self.needs[1] or self.needs[2]

    def shard(self, hidden: Tensor, weight: Tensor, target: Tensor) -> parallel.Shard | None:
        """This rank's part of the vocabulary; None without a process group."""
        if self.process_group is None:
            return None
        return parallel.open_shard(self.process_group, hidden, weight, target, self.needs)

    def readable(self, weight: Tensor) -> Tensor:
        """The weight itself, or, where the backend fuses, a copy if its kernels cannot read it as it stands."""
        return row_major(weight) if tile_backend(self.backend).fuses(weight.dtype) else weight

    def keeps_products(self, rows: int, weight: Tensor) -> bool:
        """Whether a trained head's products are kept for backward: they fit three quarters of the buffer, the last
        quarter being left for turning them into gradients."""
        if not self.trained or self.process_group is not None:
            return False
        budget = _kept_budget(self.max_buffer_bytes)
        backend, filtered = tile_backend(self.backend), self.gradient_filter is not None
        layout = layout_of(weight, backend, budget, filtered=filtered)
        assert layout.tile is not None
        if rows * weight.shape[0] * layout.tile.itemsize > self.max_buffer_bytes - budget:
            return False
        return budget >= layout.least_bytes() and layout.whole_rows(budget) >= 1


def on_host(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


Rows = slice | Tensor


@dataclass(frozen=True)
class Chunk:
    """Rows of one chunk: ``start .. stop`` among those asked for, where they stand in the batch, hidden (R, H) in the
    products' dtype, target (R,) with ``NOT_SCORED`` for ignored ones (none, after compaction)."""

    start: int
    stop: int
    rows: Rows
    hidden: Tensor
    target: Tensor


class _Pass:
    """One pass over the scored rows of a packed batch: gathers chunks, folds them, accumulates their gradients."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        call: Call,
        shard: parallel.Shard | None,
        max_buffer_bytes: int | None = None,
        *,
        copies: int = 1,
        whole: bool = False,
        stored: bool = True,
        gathered: bool = False,
    ) -> None:
        """``copies``: how many rows of the head stand for one of the batch; ``gathered``: chunks will be of rows that
        do not follow one another; ``whole``, ``stored``: see :class:`mopo_kernels.head.LinearHead`."""
        self.hidden, self.target, self.ignore_index = hidden, target.contiguous(), call.ignore_index
        self.compact = on_host(target)
        self.scored: Tensor | None = None
        self.count = target.shape[0]
        if self.compact:
            scored = target != call.ignore_index
            if not bool(scored.all()):
                self.scored = scored.nonzero()[:, 0]
                self.count = self.scored.shape[0]
        self.head = LinearHead(
            weight,
            bias,
            call.head,
            tile_backend(call.backend),
            call.max_buffer_bytes if max_buffer_bytes is None else max_buffer_bytes,
            self.count * copies,
            whole=whole,
            stored=stored,
            gathered=gathered or copies > 1 or self.scored is not None,
            streamed=not call.trained,
            gradient_filter=call.gradient_filter if any(call.needs) else None,
            shard=shard,
        )
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None

    def chunks(self, positions: slice | Tensor | None = None, of: Tensor | None = None) -> Iterator[Chunk]:
        """The scored rows, or those at ``positions`` among them, a chunk at a time; ``of`` other hidden states."""
        if positions is None:
            positions = slice(0, self.count)
        count = positions.stop - positions.start if isinstance(positions, slice) else positions.shape[0]
        for start, stop in row_chunks(count, self.head.plan.rows):
            if isinstance(positions, slice):
                rows: Rows = slice(positions.start + start, positions.start + stop)
            else:
                rows = positions[start:stop]
            if self.scored is not None:
                rows = self.scored[rows]
            target = self.target[rows]
            if not self.compact:
                target = target.where(target != self.ignore_index, NOT_SCORED)
            yield Chunk(start, stop, rows, self.gather(self.hidden if of is None else of, rows), target)

    def gather(self, hidden: Tensor, rows: Rows) -> Tensor:
        chunk = hidden[rows].to(self.head.layout.operand)
        if self.head.fused:
            return row_major(chunk)
        # Products want unit stride in one dimension.
        return chunk if 1 in chunk.stride() else chunk.contiguous()

    def fold(self, chunk: Chunk, tile: Tile | None = None, store: bool = True) -> Folded:
        """Log-probability, 0 where ignored, and log-sum-exp of the chunk's rows, (R,)."""
        return self._masked(self.head.fold(chunk.hidden, chunk.target, tile, store), chunk.target)

    def fold_both(self, chunk: Chunk, other: Tensor) -> tuple[Folded, Tensor]:
        """:meth:`fold` of a chunk and, by the same product, of the same rows of other hidden states: what ``fold``
        returns, and the others' log-probability."""
        rows = chunk.stop - chunk.start
        hidden = torch.cat([chunk.hidden, self.gather(other, chunk.rows)])
        target = chunk.target.repeat(2)
        both = self._masked(self.head.fold(hidden, target), target)
        return both.rows(0, rows), both.logprob[rows:]

    def _masked(self, folded: Folded, target: Tensor) -> Folded:
        return folded if self.compact else folded._replace(logprob=folded.logprob.where(target != NOT_SCORED, 0))

    def held(self, chunk: Chunk, of: int = 1) -> Tile | None:
        """The chunk's tile, if the last fold left it; that was of so many times the chunk's rows."""
        if not self.head.whole:
            return None
        rows = chunk.stop - chunk.start
        return self.head.tile(of * rows, self.head.weight.shape[0]).rows(0, rows)

    def fold_unfold(self, chunk: Chunk) -> Folded:
        """:meth:`fold`, and ``d logprob / d hidden`` of the chunk's rows into dhidden."""
        assert self.dhidden is not None
        dhidden = self.dhidden[chunk.rows]
        folded = self._masked(self.head.fold_unfold(chunk.hidden, chunk.target, dhidden), chunk.target)
        self._keep(dhidden, chunk)
        return folded

    def _keep(self, dhidden: Tensor | None, chunk: Chunk) -> None:
        """Take back rows of dhidden that were copied."""
        if self.dhidden is not None and dhidden is not None and not isinstance(chunk.rows, slice):
            self.dhidden[chunk.rows] = dhidden

    def unfold(self, chunk: Chunk, folded: Folded, coefficient: Tensor | None, held: Tile | None) -> None:
        """Add the gradients of ``sum coefficient * logprob`` over the chunk; None stands for 1."""
        # A copy of the rows where they do not follow one another, else the zeros themselves.
        dhidden = None if self.dhidden is None else self.dhidden[chunk.rows]
        self.head.unfold(chunk.hidden, chunk.target, folded, coefficient, held, dhidden, self.dweight, self.dbias)
        self._keep(dhidden, chunk)

    def accumulate(self, need_hidden: bool, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulators for dhidden, dweight, dbias, of size 0 for what is not needed; all but dweight, which the first
        chunk overwrites, are zeros."""
        weight, dtype = self.head.weight, self.head.layout.accumulate
        dhidden = self.hidden.new_zeros(self.hidden.shape if need_hidden else (0,), dtype=dtype)
        dweight = weight.new_empty(weight.shape if need_weight else (0,), dtype=dtype)
        dbias = weight.new_zeros(weight.shape[:1] if need_bias else (0,), dtype=dtype)
        self.dhidden = dhidden if need_hidden else None
        self.dweight = dweight if need_weight else None
        self.dbias = dbias if need_bias else None
        return dhidden, dweight, dbias

    def finish(self) -> None:
        """Gradients of nothing are zeros; sum over the ranks what every rank has a part of."""
        if self.dweight is not None and self.head.untouched:
            self.dweight.zero_()
        if self.head.shard is not None and self.dhidden is not None:
            self.head.shard.sum_(self.dhidden)


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, call: Call, shard: parallel.Shard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per-token log-probability (N,), log-sum-exp (N,) in fp64, and what makes backward cheap:

    * head frozen: the rows ``d logprob / d hidden`` (N, H), so that backward only scales them (2 products in all);
    * head trained: the tile (N, V), scored rows first, and its offsets or scale, if it fits the buffer (3 products in
      all), else nothing (4).
    """
    weight = call.readable(weight)
    dtype = accumulation_dtype(hidden.dtype)
    logprob = hidden.new_zeros(hidden.shape[0], dtype=dtype)
    logsumexp = hidden.new_zeros(hidden.shape[0], dtype=torch.float64)
    keep = call.keeps_products(hidden.shape[0], weight)
    budget = _kept_budget(call.max_buffer_bytes) if keep else call.max_buffer_bytes
    work = _Pass(hidden, weight, target, bias, call, shard, budget, whole=keep, stored=keep or call.frozen)
    unit, _, _ = work.accumulate(call.frozen, False, False)
    kept = work.head.new_tile(hidden.shape[0]) if keep else None
    for chunk in work.chunks():
        into = None if kept is None else kept.rows(chunk.start, chunk.stop)
        folded = work.fold_unfold(chunk) if call.frozen else work.fold(chunk, into)
        if kept is not None and into is not None:
            kept.keep_offsets(into, chunk.start, chunk.stop)
        logprob[chunk.rows], logsumexp[chunk.rows] = folded
    work.finish()
    empty = hidden.new_empty(0, dtype=dtype)
    if kept is None:
        return logprob, logsumexp, unit, empty, empty.clone()
    kept.values[work.count :].zero_()
    beside = kept.scale if kept.offsets is None else kept.offsets
    return logprob, logsumexp, unit, kept.values, empty if beside is None else beside


def linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    folded: Folded,
    kept: Tile | None,
    call: Call,
    shard: parallel.Shard | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum grad * logprob``, in the accumulation dtype; ``kept`` is the tile left by forward, if any."""
    weight = call.readable(weight)
    budget = call.max_buffer_bytes if kept is None else _kept_budget(call.max_buffer_bytes)
    work = _Pass(hidden, weight, target, bias, call, shard, budget, whole=kept is not None)
    gradients = work.accumulate(*call.needs)
    # Whatever comes from upstream for a token that is not scored, inf and NaN included, counts for nothing.
    grad = grad.where(target != call.ignore_index, 0)
    unit = None
    if work.head.layout.operand == torch.float16 and grad.numel():
        # Loss scaling, or a mean over many tokens, leaves the range of fp16: a power of two stays outside.
        unit = torch.ldexp(torch.ones_like(grad[:1]), torch.frexp(grad.abs().amax(0, keepdim=True)).exponent)
        grad = grad / unit
    if kept is not None and not work.head.whole:
        kept = None  # there are more threads than in forward, whose own memory left room for it
    for chunk in work.chunks():
        tile = None
        if kept is not None:
            tile = kept.rows(chunk.start, chunk.stop)
            if tile.scale is None:
                # A copy: a second backward will want what was kept.
                tile = work.head.tile(chunk.stop - chunk.start, weight.shape[0])
                tile.copy_(kept.rows(chunk.start, chunk.stop))
        at_rows = Folded(folded.logprob[chunk.rows], folded.logsumexp[chunk.rows])
        work.unfold(chunk, at_rows, grad[chunk.rows], tile)
    work.finish()
    if unit is not None:
        for gradient in gradients:
            gradient.mul_(unit)
    return gradients


def evaluate_loss(logprob: Tensor, ref_logprob: Tensor, data: PairData) -> reference.PairLoss:
    """The loss of sequence log-probabilities (S,)."""
    return reference.mopo_loss(
        logprob,
        ref_logprob,
        data.pairs,
        data.preference,
        data.objective_weight,
        tau=data.tau,
        loss_type=data.loss_type,
        pair_weight=data.pair_weight,
        label_rate=data.label_rate,
        margin=data.margin,
        length=data.length,
        prompt_index=data.prompt_index,
        max_ratio=data.max_ratio,
        estimator=data.estimator,
        normalizer=data.normalizer,
    )


@dataclass(frozen=True)
class Step:
    """Rows that are finished together: their positions among the scored ones, and whether one chunk holds them all."""

    positions: slice | Tensor
    held: bool


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU or the device on the device, without waiting for it: to a GPU from pinned memory, as a copy
    from any other waits for all that was launched before it."""
    if values.device.type != "cpu" or device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _schedule(work: _Pass, cu_seqlens: Tensor, pairs: Tensor) -> Iterator[Step]:
    """The steps of a pass in which every sequence's coefficient is known before its rows are left behind.

    Where lengths and pairs can be read, rows of sequences that no pair leaves are put together until they fill a chunk.
    Where they cannot, all rows are one step.
    """
    largest = work.head.plan.rows if work.head.whole else 0
    if not (on_host(cu_seqlens) and on_host(pairs)):
        yield Step(slice(0, work.count), work.count <= largest)
        return
    offsets = cu_seqlens if work.scored is None else torch.searchsorted(work.scored, cu_seqlens.long())
    first = offsets.tolist()
    lengths = [stop - start for start, stop in pairwise(first)]
    for group in closed_groups(pairs.tolist(), lengths, largest):
        ranges = group.row_ranges(first)
        if len(ranges) == 1:
            yield Step(slice(*ranges[0]), group.held)
        elif ranges:
            positions = torch.cat([torch.arange(start, stop) for start, stop in ranges])
            yield Step(to_device(positions, work.hidden.device), group.held)


def linear_mopo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    ref_logprob: Tensor | None,
    ref_hidden: Tensor | None,
    data: PairData,
    pairs: Tensor,
    call: Call,
    shard: parallel.Shard | None,
) -> tuple[reference.PairLoss, Tensor, Tensor, Tensor]:
    """The loss of a packed batch and its gradients for hidden, weight and bias (size 0 where not needed).

    Three products with a trained head: a chunk of logits is held until the pairs of its sequences close, g follows from
    the pairs, and the chunk becomes ``g * J`` in place. Sequences tied together by pairs that need more rows than the
    buffer has are folded first and computed again afterwards: one product more for their rows, the same numbers. Two
    with a frozen head, whose rows of dhidden are scaled by g at the end, and one without gradients. The reference is
    ``ref_logprob`` (S,) or ``ref_hidden`` (N, H) under the same head, one more product: in one with the policy's where
    the buffer holds both. ``pairs`` are those of ``data``, on the CPU if they can be read.
    """
    weight = call.readable(weight)
    sequences, tokens = cu_seqlens.shape[0] - 1, hidden.shape[0]
    host_cu_seqlens = cu_seqlens.contiguous()
    cu_seqlens = to_device(host_cu_seqlens, hidden.device)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(tokens, device=hidden.device), right=True)

    def new_pass(copies: int, gathered: bool = False) -> _Pass:
        return _Pass(
            hidden, weight, target, bias, call, shard, copies=copies, stored=any(call.needs), gathered=gathered
        )

    work = new_pass(copies=1)
    together = False
    if ref_hidden is not None and work.head.whole and work.count <= work.head.plan.rows:
        both = new_pass(copies=2)
        if both.head.whole and 2 * both.count <= both.head.plan.rows:
            work, together = both, True
    planned = call.trained and data.loss_type != "cloning"
    steps = list(_schedule(work, host_cu_seqlens, pairs)) if planned else []
    if not together and any(isinstance(step.positions, Tensor) for step in steps):
        work = new_pass(copies=1, gathered=True)
        steps = list(_schedule(work, host_cu_seqlens, pairs))
    backend = work.head.backend
    gradients = work.accumulate(*call.needs)
    token = hidden.new_zeros(tokens, dtype=work.head.layout.accumulate)
    ref_token = torch.zeros_like(token)
    logsumexp = token.new_zeros(tokens, dtype=torch.float64)

    def fold(chunk: Chunk, unfold: bool = False) -> Folded:
        if together and ref_hidden is not None:
            folded, ref_token[chunk.rows] = work.fold_both(chunk, ref_hidden)
            if unfold:
                work.unfold(chunk, folded, None, work.held(chunk, 2))
        elif unfold:
            folded = work.fold_unfold(chunk)
        else:
            folded = work.fold(chunk)
        token[chunk.rows], logsumexp[chunk.rows] = folded
        return folded

    if ref_hidden is not None and not together:
        # Without a tile to keep, more rows go at a time.
        reference_work = work
        if work.head.fused and work.head.stored:
            reference_work = _Pass(ref_hidden, weight, target, bias, call, shard, stored=False)
        for chunk in reference_work.chunks(of=ref_hidden):
            ref_token[chunk.rows] = reference_work.fold(chunk, store=False).logprob

    def sums() -> tuple[Tensor, Tensor]:
        reference_sum = backend.segment_sum(ref_token, cu_seqlens) if ref_logprob is None else ref_logprob
        return backend.segment_sum(token, cu_seqlens), reference_sum

    def coefficient_of_rows() -> Tensor:
        return backend.pair_coefficient(*sums(), data)[owner]

    copies = 2 if together else 1
    if planned:
        for step in steps:
            for chunk in work.chunks(step.positions):
                folded = fold(chunk)
                if step.held:
                    work.unfold(chunk, folded, coefficient_of_rows()[chunk.rows], work.held(chunk, copies))
            if not step.held:
                g = coefficient_of_rows()
                for chunk in work.chunks(step.positions):
                    work.unfold(chunk, Folded(token[chunk.rows], logsumexp[chunk.rows]), g[chunk.rows], None)
    else:
        # Either g is known beforehand, or it only scales the rows of dhidden, which can wait.
        known = coefficients.frozen_coefficient(data, sequences)[owner] if call.trained else None
        for chunk in work.chunks():
            folded = fold(chunk, unfold=call.frozen)
            if known is not None:
                work.unfold(chunk, folded, known[chunk.rows], work.held(chunk, copies))
        if call.frozen:
            gradients[0].mul_(coefficient_of_rows()[:, None])
    work.finish()
    return evaluate_loss(*sums(), data), *gradients
