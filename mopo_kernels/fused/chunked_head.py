"""One pass over a head: chunks of scored rows, their products, statistics and gradients.

    products (R, W) -> forward: log-sum-exp and target logit -> gradient in place -> dhidden, dweight, dbias

The backend does ``lse_fwd`` and ``logits_bwd_`` (or, fused, ``linear_lse_fwd`` both products and log-sum-exp);
everything else is here, once for every backend. A tile spans the whole vocabulary (W = V) whenever the buffer holds
enough such rows, so that no product is done twice (:mod:`mopo_kernels.fused.buffer_plan`); otherwise the vocabulary is
tiled too and the gradient computes its products again, except for a frozen head, whose gradient is rescaled from tile
to tile instead. Accumulation is in fp32 (fp64 for fp64 input), in a fixed order, with one cast at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopo_kernels.arguments import HeadInputs, HeadOptions
from mopo_kernels.backends import tile_backend
from mopo_kernels.backends.base import RowStats
from mopo_kernels.backends.torch_ops import logits_
from mopo_kernels.fused import buffer_plan
from mopo_kernels.fused.buffer_plan import FILTER_ROWS, ROW_ALIGNMENT, row_chunks
from mopo_kernels.fused.fp16_scaling import RowPowers, split
from mopo_kernels.fused.scored_rows import Rows, ScoredRows
from mopo_kernels.fused.vocab_parallel import VocabShard

# Where a filtered gradient would keep more of the columns than this, the whole tile is faster.
FILTER_LARGEST_SHARE = 0.5
# Where what it keeps holds less than this of the first rows' probability, distributions are flat, and all that is small
# is not nothing together.
FILTER_LEAST_MASS = 0.5
# Offsets within a block, of at most 256 rows, fit 32 bits in the kernels that fuse, if rows are no further apart.
FARTHEST_ROWS = 2**23


def row_major(matrix: Tensor) -> Tensor:
    """(R, H) with unit stride in H and rows near each other, as kernels that fuse read it; a copy unless it is so."""
    near = matrix.stride(0) < FARTHEST_ROWS or matrix.shape[0] <= 1
    return matrix if matrix.stride(1) == 1 and near else matrix.contiguous()


def readable(inputs: HeadInputs, options: HeadOptions) -> HeadInputs:
    """The inputs with a weight that the backend's kernels can read: where it fuses, a copy if it does not stand so."""
    if not tile_backend(options.backend).fuses(inputs.weight.dtype):
        return inputs
    return replace(inputs, weight=row_major(inputs.weight))


class Tile(NamedTuple):
    """(R, W) products; or, fused, exponentials: with their ``offsets`` (blocks, R), or, after forward, the gradient of
    the rows' log-probabilities up to a factor ``scale`` (R,)."""

    values: Tensor
    offsets: Tensor | None = None
    scale: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tile:
        """Some of the rows: the same values and scale, and a copy of the offsets, which kernels want in one piece."""
        offsets = None if self.offsets is None else self.offsets[:, start:stop].contiguous()
        return Tile(self.values[start:stop], offsets, None if self.scale is None else self.scale[start:stop])

    def keep_offsets(self, part: Tile, start: int, stop: int) -> None:
        """Take back the offsets of :meth:`rows`, after they were written."""
        if self.offsets is not None and part.offsets is not None:
            self.offsets[:, start:stop] = part.offsets

    def copy_(self, other: Tile) -> None:
        self.values.copy_(other.values)
        if self.offsets is not None and other.offsets is not None:
            self.offsets.copy_(other.offsets)


class TokenLogprob(NamedTuple):
    """Of each row (R,): the target's log-probability, and the log-sum-exp in fp64, since its rounding would tilt the
    gradient of the whole row."""

    logprob: Tensor
    logsumexp: Tensor

    def at(self, rows: Rows) -> TokenLogprob:
        return TokenLogprob(self.logprob[rows], self.logsumexp[rows])


@dataclass(frozen=True)
class Chunk:
    """Rows of one chunk: ``start .. stop`` among those asked for, where they stand in the batch, hidden (R, H) in the
    products' dtype, target (R,), below 0 for ignored ones (none, after compaction)."""

    start: int
    stop: int
    rows: Rows
    hidden: Tensor
    target: Tensor


class ChunkedHead:
    """A head with the working buffers of one pass, and the gradients that the pass adds up: dhidden (N, H), dweight
    (V, H), dbias (V,). With a ``shard`` the weight's rows are those of this rank."""

    def __init__(
        self,
        inputs: HeadInputs,
        options: HeadOptions,
        shard: VocabShard | None,
        max_buffer_bytes: int,
        *,
        copies: int = 1,
        full_vocab: bool = False,
        save_logits: bool = True,
        gathered_rows: bool = False,
    ) -> None:
        """``copies``: how many rows of the head stand for one of the batch; ``gathered_rows``: chunks will be of rows
        that do not follow one another; ``full_vocab``: tiles span the vocabulary however few rows that leaves a chunk;
        ``save_logits``: False if no gradient will follow a forward."""
        self.hidden, self.weight = inputs.hidden, inputs.weight
        self.transform, self.shard = options.transform, shard
        self.backend = tile_backend(options.backend)
        self.fused = self.backend.fuses(self.weight.dtype)
        self.by_row = self.fused and self.backend.row_offsets(self.weight.dtype)
        self.save_logits = save_logits
        self.gradient_filter = options.gradient_filter if any(inputs.needs) else None
        self.scored = ScoredRows(inputs.target, options.ignore_index)
        self.layout = buffer_plan.layout_of(
            self.weight,
            self.backend,
            max_buffer_bytes,
            save_logits=save_logits,
            gathered_rows=gathered_rows or copies > 1 or self.scored.index is not None,
            grad_hidden_only=not inputs.trained,
            filtered=self.gradient_filter is not None,
            vocabulary=None if shard is None else shard.largest,
        )
        self.plan = self.layout.plan(self.scored.count * copies, max_buffer_bytes, full_vocab)
        self._filter_columns = self.layout.filter_columns(max_buffer_bytes)
        self._target_rows = self.layout.target_rows(max_buffer_bytes)
        self.bias = None if inputs.bias is None else inputs.bias.to(self.layout.acc_dtype).contiguous()
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        # What rows of dhidden (N, H) are multiplied with in the end, (N,).
        self.row_factor: Tensor | None = None
        self.untouched = True

    # ---- rows

    @property
    def full_vocab(self) -> bool:
        """A tile spans the vocabulary, so that products survive from forward to the gradient."""
        return self.plan.columns == self.layout.vocabulary

    def chunks(self, positions: Rows | None = None, of: Tensor | None = None) -> Iterator[Chunk]:
        """The scored rows, or those at ``positions`` among them, a chunk at a time; ``of`` other hidden states."""
        if positions is None:
            positions = slice(0, self.scored.count)
        count = positions.stop - positions.start if isinstance(positions, slice) else positions.shape[0]
        block = self.backend.row_block(self.weight.dtype)
        for start, stop in row_chunks(count, self.plan.rows, block):
            if isinstance(positions, slice):
                rows: Rows = slice(positions.start + start, positions.start + stop)
            else:
                rows = positions[start:stop]
            rows = self.scored.in_batch(rows)
            hidden = self._gather(self.hidden if of is None else of, rows)
            yield Chunk(start, stop, rows, hidden, self.scored.target[rows])

    def _gather(self, hidden: Tensor, rows: Rows) -> Tensor:
        chunk = hidden[rows].to(self.layout.matmul_dtype)
        if self.fused:
            return row_major(chunk)
        # Products want unit stride in one dimension.
        return chunk if 1 in chunk.stride() else chunk.contiguous()

    # ---- buffers

    @property
    def _first(self) -> int:
        """Vocabulary entry of the weight's first row."""
        return 0 if self.shard is None else self.shard.start

    def _column_tiles(self) -> Iterator[tuple[int, int]]:
        return row_chunks(self.weight.shape[0], self.plan.columns)

    @cached_property
    def _scratch(self) -> Tensor:
        return self.weight.new_empty(self.plan.weight_columns * self.weight.shape[1], dtype=self.layout.matmul_dtype)

    @cached_property
    def _buffer(self) -> Tensor:
        return self.weight.new_empty(self.plan.rows * self._stride(self.plan.columns), dtype=self.layout.tile_dtype)

    @cached_property
    def _scale_buffer(self) -> Tensor:
        return self.weight.new_empty(self.plan.rows, dtype=torch.float32)

    @cached_property
    def _offset_buffer(self) -> Tensor:
        blocks = self.backend.offset_blocks(self.plan.columns)
        return self.weight.new_empty(blocks * self.plan.rows, dtype=torch.float32)

    def _stride(self, columns: int) -> int:
        if self.weight.device.type == "cpu":
            return columns
        return -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def tile(self, rows: int, columns: int) -> Tile:
        stride = self._stride(columns)
        values = self._buffer[: rows * stride].view(rows, stride)[:, :columns]
        if not self.fused:
            return Tile(values)
        if self.by_row:
            return Tile(values, scale=self._scale_buffer[:rows])
        blocks = self.backend.offset_blocks(columns)
        return Tile(values, self._offset_buffer[: blocks * rows].view(blocks, rows))

    def new_tile(self, rows: int) -> Tile:
        """A tile of its own across the whole vocabulary, to be saved."""
        columns = self.weight.shape[0]
        values = self.weight.new_empty(rows, columns, dtype=self.layout.tile_dtype)
        if not self.fused:
            return Tile(values)
        if self.by_row:
            return Tile(values, scale=values.new_empty(rows, dtype=torch.float32))
        return Tile(values, values.new_empty(self.backend.offset_blocks(columns), rows, dtype=torch.float32))

    def saved_tile(self, chunk: Chunk, copies: int = 1) -> Tile | None:
        """The chunk's tile, if the last forward left it; that was of so many times the chunk's rows."""
        if not self.full_vocab:
            return None
        rows = chunk.stop - chunk.start
        return self.tile(copies * rows, self.weight.shape[0]).rows(0, rows)

    def _bias(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop]

    # ---- products

    def _weight_blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of the weight in the products' dtype."""
        if self.plan.weight_columns == 0:
            yield start, stop, self.weight[start:stop]
            return
        for a in range(start, stop, self.plan.weight_columns):
            b = min(a + self.plan.weight_columns, stop)
            block = self._scratch[: (b - a) * self.weight.shape[1]].view(b - a, -1)
            yield a, b, block.copy_(self.weight[a:b])

    def _products_(self, hidden: Tensor, values: Tensor, start: int, stop: int) -> None:
        for a, b, block in self._weight_blocks(start, stop):
            self._product_(values[:, a - start : b - start], hidden, block.T)

    def _product_(self, out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False, alpha: float = 1.0) -> None:
        """``out = alpha * a @ b``, added to it with ``accumulate``, in the dtype of ``out`` throughout."""
        if self.layout.scratch:
            self.backend.product_(out, a, b, accumulate, self.layout.scratch)
        else:
            torch_product_(out, a, b, accumulate, alpha)

    # ---- forward

    def new_token_logprob(self) -> TokenLogprob:
        """For all rows of the batch: 0 where none goes through the head, the others for :meth:`forward` to write."""
        new = self.weight.new_empty if self.scored.index is None else self.weight.new_zeros
        tokens = self.hidden.shape[0]
        return TokenLogprob(new(tokens, dtype=self.layout.acc_dtype), new(tokens, dtype=torch.float64))

    def forward(
        self,
        chunk: Chunk,
        into: TokenLogprob,
        tile: Tile | None = None,
        *,
        store: bool = True,
        backward: bool = False,
    ) -> TokenLogprob:
        """Log-probability, 0 where ignored, and log-sum-exp of the chunk's rows, written to those of the batch
        ``into``. With ``full_vocab``, ``save_logits`` and ``store`` their tile is there afterwards: the one given, or
        :meth:`tile`. With ``backward``, for a frozen head, d logprob / d hidden of the rows is in dhidden as well: 2
        products, whatever the buffer."""
        if backward and not self.fused and not (self.full_vocab and self.shard is None):
            return self._rescaled_backward(chunk, into)
        stats, filled = self._new_stats(chunk), tile
        for start, stop in self._column_tiles():
            if tile is None and (not self.fused or (self.save_logits and self.full_vocab and store)):
                filled = self.tile(chunk.hidden.shape[0], stop - start)
            self._lse_fwd(chunk, start, stop, filled, stats)
        token = self._finished(stats, chunk, into)
        if filled is not None:
            self._mark_(filled, chunk.target, 0, stats.row_max, token)
        if backward:
            self.backward(chunk, token, None, self.saved_tile(chunk))
        return token

    def forward_with_reference(
        self, chunk: Chunk, into: TokenLogprob, other: Tensor, ref_logprob: Tensor
    ) -> TokenLogprob:
        """:meth:`forward` of a chunk and, by the same product, of the same rows of other hidden states, whose
        log-probabilities go to those of the batch ``ref_logprob`` (N,)."""
        rows = chunk.stop - chunk.start
        hidden = torch.cat([chunk.hidden, self._gather(other, chunk.rows)])
        both = replace(chunk, rows=slice(0, 2 * rows), hidden=hidden, target=chunk.target.repeat(2))
        logprob = self.weight.new_empty(2 * rows, dtype=self.layout.acc_dtype)
        token = self.forward(both, TokenLogprob(logprob, logprob.new_empty(2 * rows, dtype=torch.float64)))
        ref_logprob[chunk.rows] = token.logprob[rows:]
        token = token.at(slice(0, rows))
        into.logprob[chunk.rows], into.logsumexp[chunk.rows] = token
        return token

    def _new_stats(self, chunk: Chunk) -> RowStats:
        if self.by_row:
            at = (self.bias, chunk.target, self._first, self.transform)
            return self.backend.row_offset(chunk.hidden, self.weight, *at)
        row_max = self.weight.new_full((chunk.hidden.shape[0],), -torch.inf, dtype=self.layout.acc_dtype)
        return RowStats(row_max, *row_max.new_zeros(2, row_max.shape[0]))

    def _lse_fwd(self, chunk: Chunk, start: int, stop: int, tile: Tile | None, stats: RowStats) -> None:
        """Products of the chunk with weight rows ``start .. stop`` into the tile, and into the statistics."""
        at = (self._bias(start, stop), chunk.target, self._first + start, self.transform)
        if self.fused:
            stored = (None, None) if tile is None else (tile.values, tile.offsets)
            self.backend.linear_lse_fwd(chunk.hidden, self.weight[start:stop], *at, *stats, *stored)
            return
        assert tile is not None
        self._products_(chunk.hidden, tile.values, start, stop)
        self.backend.lse_fwd(tile.values, *at, *stats)

    def _mark_(self, tile: Tile, target: Tensor, start: int, offset: Tensor, token: TokenLogprob) -> None:
        """What makes a tile of exponentials with one offset a row the gradient up to its ``scale``."""
        if tile.scale is not None:
            at = (target, self._first + start, self.transform, offset, token.logsumexp, token.logprob)
            self.backend.mark_target_(tile.values, *at, tile.scale)

    def _finished(self, stats: RowStats, chunk: Chunk, into: TokenLogprob) -> TokenLogprob:
        """What the statistics of all tiles, and of all ranks, come to, written to the chunk's rows of the batch."""
        if self.shard is not None:
            # The offsets of this rank's exponentials stay what they are.
            stats = RowStats(*(t.clone() for t in stats)) if self.by_row else stats
            self.shard.all_reduce_lse_(*stats)
        if isinstance(chunk.rows, slice):
            token = into.at(chunk.rows)
            self.backend.row_statistics(*stats, chunk.target, *token)
            return token
        token = TokenLogprob(*(t.new_empty(chunk.target.shape) for t in into))
        self.backend.row_statistics(*stats, chunk.target, *token)
        into.logprob[chunk.rows], into.logsumexp[chunk.rows] = token
        return token

    # ---- gradients

    def allocate(self, need_hidden: bool, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Accumulators for dhidden, dweight, dbias, of size 0 for what is not needed; all but dweight, which the first
        chunk overwrites, are zeros, or rows of dhidden that chunks overwrite."""
        weight, dtype = self.weight, self.layout.acc_dtype
        new = self.hidden.new_empty if self._overwrites and self.scored.index is None else self.hidden.new_zeros
        dhidden = new(self.hidden.shape if need_hidden else (0,), dtype=dtype)
        self.row_factor = new(self.hidden.shape[0], dtype=dtype) if need_hidden and self._overwrites else None
        dweight = weight.new_empty(weight.shape if need_weight else (0,), dtype=dtype)
        dbias = weight.new_zeros(weight.shape[:1] if need_bias else (0,), dtype=dtype)
        self.dhidden = dhidden if need_hidden else None
        self.dweight = dweight if need_weight else None
        self.dbias = dbias if need_bias else None
        return dhidden, dweight, dbias

    def finish(self, grad_logprob: Tensor | None = None) -> None:
        """What is left to do after the last chunk: gradients of nothing are zeros, rows of dhidden are multiplied with
        their factors, and with ``grad_logprob`` (N,) if :meth:`backward` did not have it; the ranks' parts of it are
        summed."""
        if self.dweight is not None and self.untouched:
            self.dweight.zero_()
        factor = grad_logprob if self.row_factor is None else self.row_factor
        if grad_logprob is not None and self.row_factor is not None:
            factor = self.row_factor.mul_(grad_logprob)
        if factor is not None and self.dhidden is not None:
            self.dhidden.mul_(factor[:, None])
        if self.shard is not None and self.dhidden is not None:
            self.shard.all_reduce_(self.dhidden)

    @property
    def _overwrites(self) -> bool:
        """Whether :meth:`backward` overwrites its rows of dhidden: with products of a rank that has any weight."""
        return self.by_row and self.weight.shape[0] > 0

    def _put_back(self, dhidden: Tensor | None, chunk: Chunk) -> None:
        """Take back rows of dhidden that were copied."""
        if self.dhidden is not None and dhidden is not None and not isinstance(chunk.rows, slice):
            self.dhidden[chunk.rows] = dhidden

    def _rescaled_backward(self, chunk: Chunk, into: TokenLogprob) -> TokenLogprob:
        """:meth:`forward` with ``backward`` over a tiled vocabulary, dhidden being zeros before.

        Tile after tile, what was added so far is scaled down to the log-sum-exp so far (the online softmax of
        arXiv:1805.02867). That scales the target's own row of the weight as well, which is made up for at the end: eq.
        (35) and (36) of docs/method.md.
        """
        assert self.dhidden is not None
        dhidden = self.dhidden[chunk.rows]
        stats = self._new_stats(chunk)
        level = torch.full_like(stats.row_max, -torch.inf, dtype=torch.float64)
        at_target = level.clone()
        for start, stop in self._column_tiles():
            tile = self.tile(chunk.hidden.shape[0], stop - start)
            self._lse_fwd(chunk, start, stop, tile, stats)
            level, before = _logsumexp(stats), level
            _scale_rows_(dhidden, before, level)
            local = chunk.target - (self._first + start)
            at_target = level.where((local >= 0) & (local < stop - start), at_target)
            self._tile_backward(tile, chunk, start, stop, TokenLogprob(level, level), None, dhidden)
        token = self._finished(stats, chunk, into)
        _scale_rows_(dhidden, level, token.logsumexp)
        missing = -torch.expm1(at_target - token.logsumexp) * self.transform.slope(stats.target_logit.double())
        missing = missing.where(at_target > -torch.inf, 0).to(dhidden.dtype)[:, None]
        local = (chunk.target - self._first).clamp(0, self.weight.shape[0] - 1)
        for a in range(0, chunk.hidden.shape[0] if self.weight.shape[0] else 0, self._target_rows):
            b = a + self._target_rows
            dhidden[a:b].addcmul_(self.weight[local[a:b]].to(dhidden.dtype), missing[a:b])
        self._put_back(dhidden, chunk)
        return token

    def backward(self, chunk: Chunk, token: TokenLogprob, grad_logprob: Tensor | None, saved: Tile | None) -> None:
        """Add the gradients of ``sum grad_logprob * logprob`` over the chunk, None standing for 1; ``saved`` are its
        products, if they are still there, and are overwritten. The first chunk overwrites dweight, which is
        ``untouched`` before: it would only be filled with zeros to add to them.

        See eq. (34) of docs/method.md.
        """
        # Of rows that do not follow one another a copy, else the zeros themselves.
        dhidden = self.dhidden
        if dhidden is not None and self._overwrites and not isinstance(chunk.rows, slice):
            dhidden = dhidden.new_empty(chunk.hidden.shape)
        elif dhidden is not None:
            dhidden = dhidden[chunk.rows]
        factor = None
        for start, stop in self._column_tiles():
            tile = self._again(chunk, token, start, stop) if saved is None else saved
            if tile.scale is None:
                self._tile_backward(tile, chunk, start, stop, token, grad_logprob, dhidden)
            else:
                # The same for every tile.
                factor = self._keep_factor(chunk, tile.scale, grad_logprob) if factor is None else factor
                self._unscaled_products(tile.values, factor[:, None], chunk.hidden, start, stop, dhidden)
        self.untouched = False
        self._put_back(dhidden, chunk)

    def _keep_factor(self, chunk: Chunk, scale: Tensor, grad_logprob: Tensor | None) -> Tensor:
        """What the gradients of the chunk's rows lack (R,), also where :meth:`finish` finds it."""
        kept = None
        if self.row_factor is not None and isinstance(chunk.rows, slice):
            kept = self.row_factor[chunk.rows]
        if grad_logprob is None:
            factor = scale if kept is None else kept.copy_(scale)
        else:
            factor = torch.mul(scale, grad_logprob, out=kept)
        if self.row_factor is not None and kept is None:
            self.row_factor[chunk.rows] = factor
        return factor

    def _again(self, chunk: Chunk, token: TokenLogprob, start: int, stop: int) -> Tile:
        """A tile of the chunk whose log-sum-exp is known, computed again."""
        tile = self.tile(chunk.hidden.shape[0], stop - start)
        if not self.fused:
            self._products_(chunk.hidden, tile.values, start, stop)
        elif self.by_row:
            # With the log-sum-exp every tile's offset is known too. A sum of 1 beforehand keeps it, where 0 would not
            # in a tile without any probability.
            offset = token.logsumexp.float()
            stats = RowStats(offset, torch.ones_like(offset), torch.zeros_like(offset))
            self._lse_fwd(chunk, start, stop, tile, stats)
            self._mark_(tile, chunk.target, start, stats.row_max, token)
        else:
            self._lse_fwd(chunk, start, stop, tile, self._new_stats(chunk))
        return tile

    def _unscaled_products(
        self, values: Tensor, factor: Tensor, hidden: Tensor, start: int, stop: int, dhidden: Tensor | None
    ) -> None:
        """:meth:`_backward_products` of a gradient whose rows lack a factor (R, 1): what they are multiplied with has
        it instead, and dhidden, which is overwritten by the first tile, lacks it until :meth:`finish`. The tile is left
        as it was."""
        if self.dbias is not None:
            # Two numbers of half precision stand for each factor.
            high = factor.to(values.dtype)
            parts = torch.cat([high, (factor - high.to(factor.dtype)).to(values.dtype)], dim=1)
            product = self.dbias.new_empty(stop - start, 2)
            self._product_(product, values.T, parts)
            self.dbias[start:stop] += product.sum(dim=1)
        if dhidden is not None:
            self._product_(dhidden, values, self.weight[start:stop], accumulate=start > 0)
        if self.dweight is not None:
            scaled = self.backend.scaled(hidden, factor, hidden.dtype)
            self._product_(self.dweight[start:stop], values.T, scaled, accumulate=not self.untouched)

    def _tile_backward(
        self,
        tile: Tile,
        chunk: Chunk,
        start: int,
        stop: int,
        token: TokenLogprob,
        grad_logprob: Tensor | None,
        dhidden: Tensor | None,
    ) -> None:
        """The gradients of one tile, which is overwritten; dhidden (R, H) are the chunk's rows."""
        exponent = None
        if self.layout.matmul_dtype == torch.float16:
            # The mantissa goes into the tile, whose values then stay within -1 .. 1; the exponent, exactly, elsewhere.
            grad_logprob, exponent = split(torch.ones_like(token.logprob) if grad_logprob is None else grad_logprob)
        if self._filtered_backward(tile.values, chunk, start, stop, token, grad_logprob, dhidden):
            return
        first = self._first + start
        if tile.offsets is None:
            at = (self._bias(start, stop), chunk.target, first, self.transform, token.logsumexp, grad_logprob)
            self.backend.logits_bwd_(tile.values, *at)
        else:
            of_rows = (token.logsumexp, token.logprob, grad_logprob)
            self.backend.exp_logits_bwd_(tile.values, tile.offsets, chunk.target, first, self.transform, *of_rows)
        self._backward_products(tile.values, chunk.hidden, exponent, start, stop, dhidden)

    def _backward_products(
        self,
        gradient: Tensor,
        hidden: Tensor,
        exponent: Tensor | None,
        start: int,
        stop: int,
        dhidden: Tensor | None,
    ) -> None:
        factor, alpha = gradient.to(self.layout.matmul_dtype) if self.layout.copied else gradient, 1.0
        powers = None if exponent is None else RowPowers.of(hidden, exponent, self.layout.acc_dtype)
        if powers is not None:
            hidden, alpha = powers.hidden, powers.alpha
        if self.dbias is not None:
            if powers is None:
                self.dbias[start:stop] += gradient.sum(dim=0, dtype=self.dbias.dtype)
            else:
                self._product_(self.dbias[start:stop, None], factor.T, powers.ones, accumulate=True, alpha=alpha)
        if dhidden is not None:
            added = dhidden if powers is None else torch.zeros_like(dhidden)
            for a, b, block in self._weight_blocks(start, stop):
                part = factor[:, a - start : b - start]
                self._product_(added, part, block, accumulate=True, alpha=alpha)
            if powers is not None:
                dhidden += added.mul_(powers.power)
        if self.dweight is not None:
            self._product_(self.dweight[start:stop], factor.T, hidden, accumulate=not self.untouched, alpha=alpha)

    # ---- the gradient filter

    def _filtered_backward(
        self,
        products: Tensor,
        chunk: Chunk,
        start: int,
        stop: int,
        token: TokenLogprob,
        grad_logprob: Tensor | None,
        dhidden: Tensor | None,
    ) -> bool:
        """:meth:`_tile_backward` of the columns alone in which an element of the gradient, its slope left out, reaches
        ``gradient_filter`` of the largest factor of the tile's rows; for so many rows at a time the columns that any of
        them needs, their targets included. See eq. (43) of docs/method.md.

        Returns:
            False, and nothing done, without a filter, or where so many columns would be kept that the whole tile is
            faster.
        """
        if self.gradient_filter is None:
            return False
        least = _least_logit(self.gradient_filter, token.logsumexp, grad_logprob).to(products.dtype)
        marked = torch.empty(stop - start, dtype=torch.bool)
        for a, b in row_chunks(chunk.hidden.shape[0], FILTER_ROWS):
            at = (self._bias(start, stop), chunk.target[a:b], self._first + start, self.transform, least[a:b])
            self.backend.mark_columns_(marked, products[a:b], *at)
            kept = marked.nonzero()[:, 0]
            if a == 0:
                if kept.shape[0] > FILTER_LARGEST_SHARE * (stop - start):
                    return False
                if self.full_vocab and self.shard is None and not self._holds_the_mass(products[a:b], token, kept):
                    return False
                if self.dweight is not None and self.untouched:
                    self.dweight[start:stop].zero_()
            rows = slice(a, b)
            for first, last in row_chunks(kept.shape[0], self._filter_columns):
                columns = kept[first:last]
                gradient = products[rows].index_select(1, columns)
                bias = None if self.bias is None else self.bias[start:stop].index_select(0, columns)
                local = _places(columns, chunk.target[rows] - (self._first + start))
                of_rows = (token.logsumexp[rows], None if grad_logprob is None else grad_logprob[rows])
                self.backend.logits_bwd_(gradient, bias, local, 0, self.transform, *of_rows)
                if self.dbias is not None:
                    self.dbias[start:stop].index_add_(0, columns, gradient.sum(dim=0))
                if dhidden is not None:
                    block = self.weight[start:stop].index_select(0, columns).to(self.layout.matmul_dtype)
                    self._product_(dhidden[rows], gradient, block, accumulate=True)
                if self.dweight is not None:
                    part = self.dweight.new_empty(columns.shape[0], chunk.hidden.shape[1])
                    self._product_(part, gradient.T, chunk.hidden[rows])
                    self.dweight[start:stop].index_add_(0, columns, part)
        return True

    def _holds_the_mass(self, products: Tensor, token: TokenLogprob, kept: Tensor) -> bool:
        """Whether entries ``kept`` (C,) of the vocabulary have most of the probability of the tile's first rows."""
        mass = torch.zeros(products.shape[0], dtype=torch.float64)
        for first, last in row_chunks(kept.shape[0], self._filter_columns):
            columns = kept[first:last]
            bias = None if self.bias is None else self.bias.index_select(0, columns)
            z, _ = logits_(products.index_select(1, columns), bias, self.transform)
            mass += z.sub_(token.logsumexp[: products.shape[0], None]).exp_().sum(dim=1)
        return not bool(mass.mean() < FILTER_LEAST_MASS)


def _least_logit(share: float, logsumexp: Tensor, grad_logprob: Tensor | None) -> Tensor:
    """(R,) in fp64, the logits at which ``|grad_logprob| exp(z - logsumexp)`` is ``share`` of the largest factor,
    infinite where the factor is 0; one that is not a number keeps every column."""
    least = logsumexp + log(share)
    if grad_logprob is None:
        return least
    size = grad_logprob.abs().double()
    return least + torch.log(size.amax(0, keepdim=True) / size).where(size != 0, torch.inf)


def _places(columns: Tensor, target: Tensor) -> Tensor:
    """Where targets (R,) stand among ascending columns (C,), C where they do not."""
    place = torch.searchsorted(columns, target)
    return place.where(columns[place.clamp(max=columns.shape[0] - 1)] == target, columns.shape[0])


def _logsumexp(stats: RowStats) -> Tensor:
    """In fp64, of the statistics so far."""
    return stats.row_max.double() + torch.log(stats.sum_exp.double())


def _scale_rows_(values: Tensor, before: Tensor, after: Tensor) -> None:
    """``values *= exp(before - after)`` by rows, 1 where nothing changed, be it infinite."""
    values.mul_(torch.exp(before - after).where(before != after, 1).to(values.dtype)[:, None])


def torch_product_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, alpha: float) -> None:
    """:meth:`ChunkedHead._product_` by PyTorch, which on the CPU gives the result in the factors' dtype alone."""
    if b.dtype != out.dtype and out.device.type == "cpu":
        a, b = a.to(out.dtype), b.to(out.dtype)
    options: dict[str, Any] = {} if b.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, alpha=alpha, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)
        if alpha != 1.0:
            out.mul_(alpha)
