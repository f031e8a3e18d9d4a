"""One chunk of rows through the head: how it is cut to fit a buffer, its products, statistics and gradients.

    products (R, W) -> fold: log-sum-exp and target logit -> gradient in place -> dhidden, dweight, dbias

The backend does ``fold`` and ``gradient_`` (or, fused, the products with the fold); everything else is here, once for
every backend. A tile spans the whole vocabulary (W = V) whenever the buffer holds enough such rows, so that no product
is done twice; otherwise the vocabulary is tiled too and the gradient computes its products again, except for a frozen
head, whose gradient is rescaled from tile to tile instead. Accumulation is in fp32 (fp64 for fp64 input), in a fixed
order, with one cast at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import isqrt, log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopo_kernels.backends import Head, TileBackend
from mopo_kernels.backends.torch_ops import logits_
from mopo_kernels.parallel import Shard

# Fewer rows than this make a product so narrow that computing it twice over a tiled vocabulary is faster.
MIN_ROWS = 32
MIN_COLUMNS = 128
# Fewer vocabulary entries than this are never converted, or gathered, at a time.
MIN_CONVERTED = 16
# Products of so many rows are as fast as any. More would only make for narrower tiles where the vocabulary is tiled.
STREAMED_ROWS = 1024
# Bytes of target rows of the weight that a streamed gradient takes at a time, and at most a sixteenth of the buffer.
TARGET_BYTES = 1 << 20
# Bytes a row of a chunk takes besides hidden and logits: target, column, masks, running statistics, coefficient.
ROW_OVERHEAD = 96
# A fused fold that stores nothing still keeps a maximum and a sum for every 64 columns or more.
STATISTICS_BYTES = 8 / 64
# Weights are converted in blocks that stay in cache until they are multiplied, and of at most a quarter of the buffer.
WEIGHT_SCRATCH_BYTES = 16 << 20
# Rows of a tile start at multiples of so many elements on an accelerator, whose products are slow on odd strides.
ROW_ALIGNMENT = 16
# A filtered gradient looks at so many rows at a time: the columns that one of them needs are computed for all.
FILTER_ROWS = 128
# Bytes of gathered columns that it multiplies at a time, and at most an eighth of the buffer.
FILTER_BYTES = 32 << 20
# Where it would keep more of the columns than this, the whole tile is faster.
FILTER_LARGEST_SHARE = 0.5
# Where what it keeps holds less than this of the first rows' probability, distributions are flat, and all that is small
# is not nothing together.
FILTER_LEAST_MASS = 0.5
# Bytes a column of a tile takes while it is filtered: its mark and its number.
FILTER_COLUMN_BYTES = 1 + 8
# Gradients in fp16 are multiplied by this before they are rounded: they lie between -1 and 1, and what is below 2^-24
# would be lost.
FP16_SCALE = 2.0**14
# Offsets within a block, of at most 256 rows, fit 32 bits in the kernels that fuse, if rows are no further apart.
FARTHEST_ROWS = 2**23


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_major(matrix: Tensor) -> Tensor:
    """(R, H) with unit stride in H and rows near each other, as kernels that fuse read it; a copy unless it is so."""
    near = matrix.stride(0) < FARTHEST_ROWS or matrix.shape[0] <= 1
    return matrix if matrix.stride(1) == 1 and near else matrix.contiguous()


@dataclass(frozen=True)
class Plan:
    """How a head of V x H is cut within a buffer: chunks of ``rows``, tiles of ``columns``, weights converted
    ``weight_columns`` vocabulary entries at a time (0: used as they are)."""

    rows: int
    columns: int
    weight_columns: int


@dataclass(frozen=True)
class Layout:
    """The sizes from which a :class:`Plan` follows; all in elements but the item sizes, in bytes.

    ``operand`` is the dtype of the products' factors, ``tile`` that of a tile, of which there is none if None;
    ``copied``: a tile is converted to ``operand`` before the backward products, not by them; ``scratch``: bytes that
    the backend's own products take; ``temporary``: the backend's temporaries as a share of the tile; ``gathered``: the
    rows of a chunk are copied together, rather than used where they stand; ``converted``: the weight is copied to
    ``operand``, or for its strides, before it is multiplied; ``streamed``: nothing is lost by tiling the vocabulary, as
    for a frozen head; ``scaled``: hidden is copied to be scaled by rows; ``filtered``: the backward products take a
    few columns of a tile.
    """

    hidden_size: int
    vocabulary: int
    accumulate: torch.dtype
    operand: torch.dtype
    weight: torch.dtype
    tile: torch.dtype | None
    copied: bool
    scratch: int
    temporary: float
    gathered: bool
    converted: bool
    streamed: bool
    scaled: bool
    filtered: bool

    def tile_bytes(self) -> float:
        """Bytes an element of a tile takes: itself, the backend's temporary, a copy in the products' dtype."""
        if self.tile is None:
            return STATISTICS_BYTES
        return self.tile.itemsize * (1 + self.temporary) + (self.operand.itemsize if self.copied else 0)

    def row_bytes(self) -> int:
        """Bytes a row takes besides its tile: hidden, its gradient (in fp16 both scaled as well), statistics."""
        component = 0
        if self.gathered or self.weight != self.operand:
            component += self.operand.itemsize
        if self.gathered:
            component += self.accumulate.itemsize
        if self.scaled:
            component += self.operand.itemsize
        if self.operand == torch.float16:
            component += 2 * self.accumulate.itemsize + self.operand.itemsize
        return self.hidden_size * component + ROW_OVERHEAD

    def column_bytes(self) -> int:
        """Bytes a column takes besides its tile: the bias, and what finds out whether a filter keeps it."""
        return self.accumulate.itemsize + (FILTER_COLUMN_BYTES if self.filtered else 0)

    def least_bytes(self) -> int:
        """The smallest buffer to work in, forward and backward: one row, however its rows have to be put together, and
        tiles wide enough that a small problem is quick."""
        converted = self.weight_columns(0) * self.hidden_size * self.operand.itemsize
        fixed = converted + self.scratch + self._target_bytes(0) + self.filter_bytes(0)
        stored = replace(self, gathered=True, tile=self.tile or self.operand, scaled=self.scaled or self.tile is None)
        column_bytes = stored.tile_bytes() + self.column_bytes()
        return int(stored.row_bytes() + min(self.vocabulary, MIN_COLUMNS) * column_bytes + fixed) + 1

    def _filter_column_bytes(self) -> int:
        """Bytes of a gathered column: of ``FILTER_ROWS`` rows, its row of the weight (twice where it is converted) and
        that row's gradient."""
        weight = self.operand.itemsize + (self.weight.itemsize if self.weight != self.operand else 0)
        return FILTER_ROWS * self.accumulate.itemsize + self.hidden_size * (weight + self.accumulate.itemsize)

    def filter_columns(self, max_buffer_bytes: int) -> int:
        """Columns that a filtered gradient gathers and multiplies at a time."""
        columns = min(max_buffer_bytes // 8, FILTER_BYTES) // self._filter_column_bytes()
        return min(self.vocabulary, max(MIN_CONVERTED, columns))

    def filter_bytes(self, max_buffer_bytes: int) -> int:
        """What a filtered gradient gathers and multiplies at a time; 0 without a filter."""
        return self.filter_columns(max_buffer_bytes) * self._filter_column_bytes() if self.filtered else 0

    def target_rows(self, max_buffer_bytes: int) -> int:
        """Target rows of the weight that a streamed gradient takes at a time."""
        row = self.hidden_size * (self.weight.itemsize + self.accumulate.itemsize)
        return max(1, min(max_buffer_bytes // 16, TARGET_BYTES) // max(1, row))

    def _target_bytes(self, max_buffer_bytes: int) -> int:
        if not self.streamed:
            return 0
        row = self.hidden_size * (self.weight.itemsize + self.accumulate.itemsize)
        return self.target_rows(max_buffer_bytes) * row

    def weight_columns(self, max_buffer_bytes: int) -> int:
        """Vocabulary entries converted at a time; 0 if the weight is used as it is."""
        if not self.converted:
            return 0
        scratch = min(max_buffer_bytes // 4, WEIGHT_SCRATCH_BYTES)
        return min(self.vocabulary, max(MIN_CONVERTED, scratch // (self.hidden_size * self.operand.itemsize)))

    def tile_budget(self, max_buffer_bytes: int) -> int:
        """What is left for rows and tiles."""
        converted = self.weight_columns(max_buffer_bytes) * self.hidden_size * self.operand.itemsize
        rest = self._target_bytes(max_buffer_bytes) + self.filter_bytes(max_buffer_bytes)
        return max_buffer_bytes - converted - self.scratch - rest

    def whole_rows(self, max_buffer_bytes: int) -> int:
        """Rows that fit with a tile across the whole vocabulary; may be 0 or less."""
        available = self.tile_budget(max_buffer_bytes) - self.vocabulary * self.column_bytes()
        return int(available // (self.vocabulary * self.tile_bytes() + self.row_bytes()))

    def plan(self, rows: int, max_buffer_bytes: int, whole: bool = False) -> Plan:
        """The cut for ``rows`` rows; with ``whole`` tiles span the vocabulary however few rows that leaves a chunk."""
        if max_buffer_bytes < self.least_bytes():
            raise ValueError(
                f"max_buffer_bytes must be at least {self.least_bytes()} for hidden size {self.hidden_size}; "
                f"got {max_buffer_bytes}"
            )
        weight_columns, whole_rows = self.weight_columns(max_buffer_bytes), self.whole_rows(max_buffer_bytes)
        rows = max(1, rows)
        enough = STREAMED_ROWS if self.streamed else MIN_ROWS
        if whole_rows >= (1 if whole else min(rows, enough)):
            return Plan(min(rows, whole_rows), self.vocabulary, weight_columns)
        available, per_element, per_row = self.tile_budget(max_buffer_bytes), self.tile_bytes(), self.row_bytes()
        least = per_row + min(self.vocabulary, MIN_COLUMNS) * per_element
        square = isqrt(int(available / per_element)) if self.streamed else rows
        chunk = max(1, min(rows, enough, square, int(available // least)))
        columns = int((available - chunk * per_row) // (chunk * per_element + self.column_bytes()))
        return Plan(chunk, max(1, min(self.vocabulary, columns)), weight_columns)


def layout_of(
    weight: Tensor,
    backend: TileBackend,
    max_buffer_bytes: int,
    *,
    stored: bool = True,
    gathered: bool = True,
    streamed: bool = False,
    filtered: bool = False,
    vocabulary: int | None = None,
) -> Layout:
    """The layout of a head (V, H) under a backend; ``stored`` False if no gradient will follow the fold, so that a
    backend that fuses needs no tile; ``gathered`` False if chunks are rows that follow one another; ``streamed``
    if the head is frozen or no gradient will follow; ``filtered`` if there is a gradient filter; ``vocabulary`` to plan
    for, if not the weight's own."""
    accumulate = accumulation_dtype(weight.dtype)
    fused, on_cpu, scratch = backend.fuses(weight.dtype), weight.device.type == "cpu", 0
    if on_cpu and 1 in weight.stride():
        scratch = backend.product_scratch(weight.dtype, max_buffer_bytes // 4)
    operand = accumulate if on_cpu and not fused and not scratch else weight.dtype
    tile = (weight.dtype if stored else None) if fused else accumulate
    return Layout(
        weight.shape[1],
        weight.shape[0] if vocabulary is None else vocabulary,
        accumulate,
        operand,
        weight.dtype,
        tile,
        copied=not fused and not scratch and operand != tile,
        scratch=scratch,
        temporary=backend.temporary_share,
        gathered=gathered,
        converted=weight.dtype != operand or (not fused and 1 not in weight.stride()),
        streamed=streamed and not fused,
        scaled=fused and stored and backend.row_offsets(weight.dtype),
        filtered=filtered,
    )


def row_chunks(count: int, largest: int) -> Iterator[tuple[int, int]]:
    """0 .. count in the fewest chunks of at most ``largest``, as even as they go."""
    chunks = -(-count // largest) if count else 0
    for c in range(chunks):
        yield count * c // chunks, count * (c + 1) // chunks


class Tile(NamedTuple):
    """(R, W) products; or, fused, exponentials: with their ``offsets`` (blocks, R), or, after a fold, the gradient of
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


class Folded(NamedTuple):
    """Of each row (R,): the target's log-probability, and the log-sum-exp in fp64, since its rounding would tilt the
    gradient of the whole row."""

    logprob: Tensor
    logsumexp: Tensor

    def rows(self, start: int, stop: int) -> Folded:
        return Folded(self.logprob[start:stop], self.logsumexp[start:stop])


class LinearHead:
    """A head with the working buffers of one call. ``weight`` (V, H), ``bias`` (V,) or None; with a ``shard``, the rows
    of this rank."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        backend: TileBackend,
        max_buffer_bytes: int,
        rows: int,
        *,
        whole: bool = False,
        stored: bool = True,
        gathered: bool = True,
        streamed: bool = False,
        gradient_filter: float | None = None,
        shard: Shard | None = None,
    ) -> None:
        self.weight = weight
        self.head = head
        self.backend = backend
        self.fused = backend.fuses(weight.dtype)
        self.by_row = self.fused and backend.row_offsets(weight.dtype)
        self.stored = stored
        self.shard = shard
        vocabulary = None if shard is None else shard.largest
        self.layout = layout_of(
            weight,
            backend,
            max_buffer_bytes,
            stored=stored,
            gathered=gathered,
            streamed=streamed,
            filtered=gradient_filter is not None,
            vocabulary=vocabulary,
        )
        self.gradient_filter = gradient_filter
        self._filter_columns = self.layout.filter_columns(max_buffer_bytes)
        self._target_rows = self.layout.target_rows(max_buffer_bytes)
        self.untouched = True
        self.plan = self.layout.plan(rows, max_buffer_bytes, whole)
        self.bias = None if bias is None else bias.to(self.layout.accumulate).contiguous()

    @property
    def whole(self) -> bool:
        """A tile spans the vocabulary, so that products survive from the fold to the gradient."""
        return self.plan.columns == self.layout.vocabulary

    @property
    def _first(self) -> int:
        """Vocabulary entry of the weight's first row."""
        return 0 if self.shard is None else self.shard.start

    def _column_tiles(self) -> Iterator[tuple[int, int]]:
        return row_chunks(self.weight.shape[0], self.plan.columns)

    @cached_property
    def _scratch(self) -> Tensor:
        return self.weight.new_empty(self.plan.weight_columns * self.weight.shape[1], dtype=self.layout.operand)

    @cached_property
    def _buffer(self) -> Tensor:
        return self.weight.new_empty(self.plan.rows * self._stride(self.plan.columns), dtype=self.layout.tile)

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
        """A tile of its own across the whole vocabulary, to be kept."""
        columns = self.weight.shape[0]
        values = self.weight.new_empty(rows, columns, dtype=self.layout.tile)
        if not self.fused:
            return Tile(values)
        if self.by_row:
            return Tile(values, scale=values.new_empty(rows, dtype=torch.float32))
        return Tile(values, values.new_empty(self.backend.offset_blocks(columns), rows, dtype=torch.float32))

    def _bias(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop]

    def _weight_blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of the weight in the products' dtype."""
        if self.plan.weight_columns == 0:
            yield start, stop, self.weight[start:stop]
            return
        for a in range(start, stop, self.plan.weight_columns):
            b = min(a + self.plan.weight_columns, stop)
            block = self._scratch[: (b - a) * self.weight.shape[1]].view(b - a, -1)
            yield a, b, block.copy_(self.weight[a:b])

    def _fold_tile(
        self, hidden: Tensor, target: Tensor, start: int, stop: int, tile: Tile | None, statistics: list[Tensor]
    ) -> None:
        """Products of ``hidden`` with weight rows ``start .. stop`` into the tile, folded into the statistics."""
        at = (self._bias(start, stop), target, self._first + start, self.head)
        if self.fused:
            stored = (None, None) if tile is None else (tile.values, tile.offsets)
            self.backend.linear_fold(hidden, self.weight[start:stop], *at, *statistics, *stored)
            return
        assert tile is not None
        self._products_(hidden, tile.values, start, stop)
        self.backend.fold(tile.values, *at, *statistics)

    def _products_(self, hidden: Tensor, values: Tensor, start: int, stop: int) -> None:
        for a, b, block in self._weight_blocks(start, stop):
            self._product_(values[:, a - start : b - start], hidden, block.T)

    def _product_(self, out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False, alpha: float = 1.0) -> None:
        """``out = alpha * a @ b``, added to it with ``accumulate``, in the dtype of ``out`` throughout."""
        if self.layout.scratch:
            self.backend.product_(out, a, b, accumulate, self.layout.scratch)
        else:
            torch_product_(out, a, b, accumulate, alpha)

    def _new_statistics(self, hidden: Tensor, target: Tensor) -> list[Tensor]:
        if self.by_row:
            at = (self.bias, target, self._first, self.head)
            maximum = self.backend.row_offset(hidden, self.weight, *at)
        else:
            maximum = self.weight.new_full((hidden.shape[0],), -torch.inf, dtype=self.layout.accumulate)
        return [maximum, torch.zeros_like(maximum), torch.zeros_like(maximum)]

    def fold(self, hidden: Tensor, target: Tensor, tile: Tile | None = None, store: bool = True) -> Folded:
        """The statistics of rows ``hidden`` (R, H), in the products' dtype. If ``whole``, ``stored`` and ``store``,
        their tile is held afterwards: the one given, or :meth:`tile`."""
        statistics, into = self._new_statistics(hidden, target), tile
        for start, stop in self._column_tiles():
            if tile is None and (not self.fused or (self.stored and self.whole and store)):
                into = self.tile(hidden.shape[0], stop - start)
            self._fold_tile(hidden, target, start, stop, into, statistics)
        folded = self._merged(statistics)
        if into is not None:
            self._mark_(into, target, 0, statistics[0], folded)
        return folded

    def _mark_(self, tile: Tile, target: Tensor, start: int, offset: Tensor, folded: Folded) -> None:
        """What makes a tile of exponentials with one offset a row the gradient up to its ``scale``."""
        if tile.scale is not None:
            at = (target, self._first + start, self.head, offset, folded.logsumexp, folded.logprob)
            self.backend.mark_target_(tile.values, *at, tile.scale)

    def _merged(self, statistics: list[Tensor]) -> Folded:
        if self.shard is not None:
            # The offsets of this rank's exponentials stay what they are.
            statistics = [t.clone() for t in statistics] if self.by_row else statistics
            self.shard.merge_(*statistics)
        return Folded(*self.backend.row_statistics(*statistics))

    def fold_unfold(self, hidden: Tensor, target: Tensor, dhidden: Tensor) -> Folded:
        """:meth:`fold`, and ``d logprob / d hidden`` into dhidden (R, H), zeros before: 2 products if ``streamed``,
        whatever the buffer.

        Tile after tile, what was added so far is scaled down to the log-sum-exp so far (the online softmax of
        arXiv:1805.02867). That scales the target's own row of the weight as well, which is made up for at the end: eq.
        (35) and (36) of docs/method.md.
        """
        if self.fused or (self.whole and self.shard is None):
            folded = self.fold(hidden, target)
            held = self.tile(hidden.shape[0], self.weight.shape[0]) if self.whole else None
            self.unfold(hidden, target, folded, None, held, dhidden, None, None)
            return folded
        statistics = self._new_statistics(hidden, target)
        level = torch.full_like(statistics[0], -torch.inf, dtype=torch.float64)
        at_target = level.clone()
        for start, stop in self._column_tiles():
            tile = self.tile(hidden.shape[0], stop - start)
            self._fold_tile(hidden, target, start, stop, tile, statistics)
            level, before = _logsumexp(statistics), level
            _scale_rows_(dhidden, before, level)
            local = target - (self._first + start)
            at_target = level.where((local >= 0) & (local < stop - start), at_target)
            self._unfold_tile(tile, hidden, target, start, stop, Folded(level, level), None, dhidden, None, None)
        folded = self._merged(statistics)
        _scale_rows_(dhidden, level, folded.logsumexp)
        missing = -torch.expm1(at_target - folded.logsumexp) * self.head.slope(statistics[2].double())
        missing = missing.where(at_target > -torch.inf, 0).to(dhidden.dtype)[:, None]
        local = (target - self._first).clamp(0, self.weight.shape[0] - 1)
        for a in range(0, hidden.shape[0] if self.weight.shape[0] else 0, self._target_rows):
            b = a + self._target_rows
            dhidden[a:b].addcmul_(self.weight[local[a:b]].to(dhidden.dtype), missing[a:b])
        return folded

    def unfold(
        self,
        hidden: Tensor,
        target: Tensor,
        folded: Folded,
        coefficient: Tensor | None,
        held: Tile | None,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        """Add the gradients of ``sum coefficient * logprob`` for a chunk, None standing for 1, to dhidden (R, H),
        dweight (V, H), dbias (V,); ``held`` are its products, if they are still there, and are overwritten. The first
        chunk overwrites dweight, which is ``untouched`` before: it would only be filled with zeros to add to them.

        See eq. (34) of docs/method.md.
        """
        factor = None
        for start, stop in self._column_tiles():
            tile = held
            if tile is None:
                tile = self.tile(hidden.shape[0], stop - start)
                if not self.fused:
                    self._products_(hidden, tile.values, start, stop)
                elif self.by_row:
                    # The log-sum-exp is known by now, and so every tile's offset. A sum of 1 beforehand keeps it, where
                    # 0 would not in a tile without any probability.
                    offset = folded.logsumexp.float()
                    statistics = [offset, torch.ones_like(offset), torch.zeros_like(offset)]
                    self._fold_tile(hidden, target, start, stop, tile, statistics)
                    self._mark_(tile, target, start, statistics[0], folded)
                else:
                    statistics = self._new_statistics(hidden, target)
                    self._fold_tile(hidden, target, start, stop, tile, statistics)
            if tile.scale is None:
                self._unfold_tile(tile, hidden, target, start, stop, folded, coefficient, dhidden, dweight, dbias)
            else:
                # The same for every tile.
                factor = (tile.scale if coefficient is None else tile.scale * coefficient)[:, None]
                self._unscaled_products(tile.values, factor, hidden, start, stop, dhidden, dweight, dbias)
        if factor is not None and dhidden is not None:
            dhidden.mul_(factor)
        self.untouched = False

    def _unscaled_products(
        self,
        values: Tensor,
        factor: Tensor,
        hidden: Tensor,
        start: int,
        stop: int,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        """:meth:`_backward_products` of a gradient whose rows lack a factor (R, 1): what they are multiplied with has
        it instead, and dhidden, which is overwritten by the first tile, lacks it as well. The tile is left as it
        was."""
        if dbias is not None:
            # Two numbers of half precision stand for each factor.
            high = factor.to(values.dtype)
            parts = torch.cat([high, (factor - high.to(factor.dtype)).to(values.dtype)], dim=1)
            product = dbias.new_empty(stop - start, 2)
            self._product_(product, values.T, parts)
            dbias[start:stop] += product.sum(dim=1)
        if dhidden is not None:
            self._product_(dhidden, values, self.weight[start:stop], accumulate=start > 0)
        if dweight is not None:
            scaled = self.backend.scaled(hidden, factor, hidden.dtype)
            self._product_(dweight[start:stop], values.T, scaled, accumulate=not self.untouched)

    def _unfold_tile(
        self,
        tile: Tile,
        hidden: Tensor,
        target: Tensor,
        start: int,
        stop: int,
        folded: Folded,
        coefficient: Tensor | None,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        exponent = None
        if self.layout.operand == torch.float16:
            # The mantissa goes into the tile, whose values then stay within -1 .. 1; the exponent, exactly, elsewhere.
            coefficient = torch.ones_like(folded.logprob) if coefficient is None else coefficient
            mantissa, exponent = torch.frexp(coefficient)
            coefficient = mantissa * FP16_SCALE
        if self.gradient_filter is not None and self._unfold_filtered(
            self.gradient_filter, tile.values, hidden, target, start, stop, folded, coefficient, dhidden, dweight, dbias
        ):
            return
        self._gradient_(tile, target, start, stop, folded, coefficient)
        self._backward_products(tile.values, hidden, exponent, start, stop, dhidden, dweight, dbias)

    def _unfold_filtered(
        self,
        share: float,
        products: Tensor,
        hidden: Tensor,
        target: Tensor,
        start: int,
        stop: int,
        folded: Folded,
        coefficient: Tensor | None,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> bool:
        """:meth:`_unfold_tile` of the columns alone in which an element of the gradient, its slope left out, reaches
        ``share`` of the largest coefficient of the tile's rows; for so many rows at a time the columns that any of them
        needs, their targets included. See eq. (43) of docs/method.md.

        Returns:
            False, and nothing done, where so many columns would be kept that the whole tile is faster.
        """
        least = _least_logit(share, folded.logsumexp, coefficient).to(products.dtype)
        marked = torch.empty(stop - start, dtype=torch.bool)
        for a, b in row_chunks(hidden.shape[0], FILTER_ROWS):
            at = (self._bias(start, stop), target[a:b], self._first + start, self.head, least[a:b])
            self.backend.mark_columns_(marked, products[a:b], *at)
            kept = marked.nonzero()[:, 0]
            if a == 0:
                if kept.shape[0] > FILTER_LARGEST_SHARE * (stop - start):
                    return False
                if self.whole and self.shard is None and not self._holds_the_mass(products[a:b], folded, kept):
                    return False
                if dweight is not None and self.untouched:
                    dweight[start:stop].zero_()
            rows = slice(a, b)
            for first, last in row_chunks(kept.shape[0], self._filter_columns):
                columns = kept[first:last]
                gradient = products[rows].index_select(1, columns)
                bias = None if self.bias is None else self.bias[start:stop].index_select(0, columns)
                local = _places(columns, target[rows] - (self._first + start))
                of_rows = (folded.logsumexp[rows], None if coefficient is None else coefficient[rows])
                self.backend.gradient_(gradient, bias, local, 0, self.head, *of_rows)
                if dbias is not None:
                    dbias[start:stop].index_add_(0, columns, gradient.sum(dim=0))
                if dhidden is not None:
                    block = self.weight[start:stop].index_select(0, columns).to(self.layout.operand)
                    self._product_(dhidden[rows], gradient, block, accumulate=True)
                if dweight is not None:
                    part = dweight.new_empty(columns.shape[0], hidden.shape[1])
                    self._product_(part, gradient.T, hidden[rows])
                    dweight[start:stop].index_add_(0, columns, part)
        return True

    def _holds_the_mass(self, products: Tensor, folded: Folded, kept: Tensor) -> bool:
        """Whether entries ``kept`` (C,) of the vocabulary have most of the probability of the tile's first rows."""
        mass = torch.zeros(products.shape[0], dtype=torch.float64)
        for first, last in row_chunks(kept.shape[0], self._filter_columns):
            columns = kept[first:last]
            bias = None if self.bias is None else self.bias.index_select(0, columns)
            z, _ = logits_(products.index_select(1, columns), bias, self.head)
            mass += z.sub_(folded.logsumexp[: products.shape[0], None]).exp_().sum(dim=1)
        return not bool(mass.mean() < FILTER_LEAST_MASS)

    def _gradient_(
        self, tile: Tile, target: Tensor, start: int, stop: int, folded: Folded, coefficient: Tensor | None
    ) -> None:
        first, head = self._first + start, self.head
        if tile.offsets is None:
            bias = self._bias(start, stop)
            self.backend.gradient_(tile.values, bias, target, first, head, folded.logsumexp, coefficient)
        else:
            self.backend.exponential_gradient_(
                tile.values, tile.offsets, target, first, head, folded.logsumexp, folded.logprob, coefficient
            )

    def _backward_products(
        self,
        gradient: Tensor,
        hidden: Tensor,
        exponent: Tensor | None,
        start: int,
        stop: int,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        operand, alpha, ones = gradient.to(self.layout.operand) if self.layout.copied else gradient, 1.0, None
        if exponent is not None:
            power = torch.ldexp(torch.ones_like(hidden[:, :1], dtype=self.layout.accumulate), exponent[:, None])
            hidden, ones, alpha = (hidden * power).to(hidden.dtype), power.to(hidden.dtype), 1 / FP16_SCALE
        if dbias is not None:
            if ones is None:
                dbias[start:stop] += gradient.sum(dim=0, dtype=dbias.dtype)
            else:
                self._product_(dbias[start:stop, None], operand.T, ones, accumulate=True, alpha=alpha)
        if dhidden is not None:
            added = dhidden if exponent is None else torch.zeros_like(dhidden)
            for a, b, block in self._weight_blocks(start, stop):
                part = operand[:, a - start : b - start]
                self._product_(added, part, block, accumulate=True, alpha=alpha)
            if exponent is not None:
                dhidden += added.mul_(power)
        if dweight is not None:
            self._product_(dweight[start:stop], operand.T, hidden, accumulate=not self.untouched, alpha=alpha)


def _least_logit(share: float, logsumexp: Tensor, coefficient: Tensor | None) -> Tensor:
    """(R,) in fp64, the logits at which ``|coefficient| exp(z - logsumexp)`` is ``share`` of the largest coefficient,
    infinite where the coefficient is 0; a coefficient that is not a number keeps every column."""
    least = logsumexp + log(share)
    if coefficient is None:
        return least
    size = coefficient.abs().double()
    return least + torch.log(size.amax(0, keepdim=True) / size).where(size != 0, torch.inf)


def _places(columns: Tensor, target: Tensor) -> Tensor:
    """Where targets (R,) stand among ascending columns (C,), C where they do not."""
    place = torch.searchsorted(columns, target)
    return place.where(columns[place.clamp(max=columns.shape[0] - 1)] == target, columns.shape[0])


def _logsumexp(statistics: list[Tensor]) -> Tensor:
    """In fp64, of a maximum and a sum relative to it so far."""
    maximum, total, _ = statistics
    return maximum.double() + torch.log(total.double())


def _scale_rows_(values: Tensor, before: Tensor, after: Tensor) -> None:
    """``values *= exp(before - after)`` by rows, 1 where nothing changed, be it infinite."""
    values.mul_(torch.exp(before - after).where(before != after, 1).to(values.dtype)[:, None])


def torch_product_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, alpha: float) -> None:
    """:meth:`LinearHead._product_` by PyTorch, which on the CPU gives the result in the factors' dtype alone."""
    if b.dtype != out.dtype and out.device.type == "cpu":
        a, b = a.to(out.dtype), b.to(out.dtype)
    options: dict[str, Any] = {} if b.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, alpha=alpha, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)
        if alpha != 1.0:
            out.mul_(alpha)
