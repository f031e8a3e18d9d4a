"""How a head is cut to fit a buffer: bytes and rows, no numbers of the model.

A tile spans the whole vocabulary (W = V) whenever the buffer holds enough such rows, so that no product is done twice;
otherwise the vocabulary is tiled too. :class:`Layout` has the sizes, :class:`Plan` the cut that follows from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import torch
from torch import Tensor

from mopo_kernels.arguments import HeadOptions
from mopo_kernels.backends import TileBackend

#: Default bound on the memory of one call beyond inputs, outputs and gradients, in bytes: on the CPU, and the least of
#: it on a GPU; see :func:`default_buffer_bytes`.
DEFAULT_BUFFER_BYTES = 256 << 20
# Rows of a chunk below which a GPU's products are slower, most of all those that add to dweight in fp32.
_ROWS_ON_A_GPU = 4096
# Fewer rows than this make a product so narrow that computing it twice over a tiled vocabulary is faster.
MIN_ROWS = 32
MIN_COLUMNS = 128
# Fewer vocabulary entries than this are never converted, or gathered, at a time.
MIN_CONVERTED = 16
# Products of so many rows are as fast as any. More would only make for narrower tiles where the vocabulary is tiled.
GRAD_HIDDEN_ROWS = 1024
# Bytes of target rows of the weight that a gradient for hidden alone takes at a time, at most a sixteenth of the
# buffer.
TARGET_BYTES = 1 << 20
# Bytes a row of a chunk takes besides hidden and logits: target, column, masks, running statistics, grad_logprob.
ROW_OVERHEAD = 96
# A fused forward that stores nothing still keeps a maximum and a sum for every 64 columns or more.
STATISTICS_BYTES = 8 / 64
# Weights are converted in blocks that stay in cache until they are multiplied, and of at most a quarter of the buffer.
WEIGHT_SCRATCH_BYTES = 16 << 20
# Rows of a tile start at multiples of so many elements on an accelerator, whose products are slow on odd strides.
ROW_ALIGNMENT = 16
# A filtered gradient looks at so many rows at a time: the columns that one of them needs are computed for all.
FILTER_ROWS = 128
# Bytes of gathered columns that it multiplies at a time, and at most an eighth of the buffer.
FILTER_BYTES = 32 << 20
# Bytes a column of a tile takes while it is filtered: its mark and its number.
FILTER_COLUMN_BYTES = 1 + 8


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_buffer_bytes(weight: Tensor) -> int:
    """The default of ``max_buffer_bytes`` for a head (V, H): 256 MiB, and on a GPU room for 4096 rows of logits in the
    weight's dtype."""
    if weight.device.type == "cpu":
        return DEFAULT_BUFFER_BYTES
    vocabulary, hidden_size = weight.shape
    row = weight.itemsize * (vocabulary + vocabulary // 8 + 2 * hidden_size)
    return max(DEFAULT_BUFFER_BYTES, _ROWS_ON_A_GPU * row)


def buffer_bytes(options: HeadOptions, weight: Tensor) -> int:
    """The bound on the memory of a call."""
    return default_buffer_bytes(weight) if options.max_buffer_bytes is None else options.max_buffer_bytes


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

    ``matmul_dtype`` is the dtype of the products' factors, ``tile_dtype`` that of a tile, of which there is none if
    None; ``copied``: a tile is converted to ``matmul_dtype`` before the backward products, not by them; ``scratch``:
    bytes that the backend's own products take; ``temporary``: the backend's temporaries as a share of the tile;
    ``gathered_rows``: the rows of a chunk are copied together, rather than used where they stand; ``converted``: the
    weight is copied to ``matmul_dtype``, or for its strides, before it is multiplied; ``grad_hidden_only``: nothing is
    lost by tiling the vocabulary, as for a frozen head; ``scaled``: hidden is copied to be scaled by rows;
    ``filtered``: the backward products take a few columns of a tile.
    """

    hidden_size: int
    vocabulary: int
    acc_dtype: torch.dtype
    matmul_dtype: torch.dtype
    weight_dtype: torch.dtype
    tile_dtype: torch.dtype | None
    copied: bool
    scratch: int
    temporary: float
    gathered_rows: bool
    converted: bool
    grad_hidden_only: bool
    scaled: bool
    filtered: bool

    def tile_bytes(self) -> float:
        """Bytes an element of a tile takes: itself, the backend's temporary, a copy in the products' dtype."""
        return STATISTICS_BYTES if self.tile_dtype is None else self._tile_bytes(self.tile_dtype)

    def _tile_bytes(self, tile_dtype: torch.dtype) -> float:
        return tile_dtype.itemsize * (1 + self.temporary) + (self.matmul_dtype.itemsize if self.copied else 0)

    def row_bytes(self) -> int:
        """Bytes a row takes besides its tile: hidden, its gradient (in fp16 both scaled as well), statistics."""
        return self._row_bytes(self.gathered_rows, self.scaled)

    def _row_bytes(self, gathered_rows: bool, scaled: bool) -> int:
        component = 0
        if gathered_rows or self.weight_dtype != self.matmul_dtype:
            component += self.matmul_dtype.itemsize
        if gathered_rows:
            component += self.acc_dtype.itemsize
        if scaled:
            component += self.matmul_dtype.itemsize
        if self.matmul_dtype == torch.float16:
            component += 2 * self.acc_dtype.itemsize + self.matmul_dtype.itemsize
        return self.hidden_size * component + ROW_OVERHEAD

    def column_bytes(self) -> int:
        """Bytes a column takes besides its tile: the bias, and what finds out whether a filter keeps it."""
        return self.acc_dtype.itemsize + (FILTER_COLUMN_BYTES if self.filtered else 0)

    def min_buffer_bytes(self) -> int:
        """The smallest buffer to work in, forward and backward: one row, however its rows have to be put together, and
        tiles wide enough that a small problem is quick."""
        converted = self.weight_columns(0) * self.hidden_size * self.matmul_dtype.itemsize
        fixed = converted + self.scratch + self._target_bytes(0) + self.filter_bytes(0)
        column_bytes = self._tile_bytes(self.tile_dtype or self.matmul_dtype) + self.column_bytes()
        row_bytes = self._row_bytes(gathered_rows=True, scaled=self.scaled or self.tile_dtype is None)
        return int(row_bytes + min(self.vocabulary, MIN_COLUMNS) * column_bytes + fixed) + 1

    def _filter_column_bytes(self) -> int:
        """Bytes of a gathered column: of ``FILTER_ROWS`` rows, its row of the weight (twice where it is converted) and
        that row's gradient."""
        weight = self.matmul_dtype.itemsize
        if self.weight_dtype != self.matmul_dtype:
            weight += self.weight_dtype.itemsize
        return FILTER_ROWS * self.acc_dtype.itemsize + self.hidden_size * (weight + self.acc_dtype.itemsize)

    def filter_columns(self, max_buffer_bytes: int) -> int:
        """Columns that a filtered gradient gathers and multiplies at a time."""
        columns = min(max_buffer_bytes // 8, FILTER_BYTES) // self._filter_column_bytes()
        return min(self.vocabulary, max(MIN_CONVERTED, columns))

    def filter_bytes(self, max_buffer_bytes: int) -> int:
        """What a filtered gradient gathers and multiplies at a time; 0 without a filter."""
        return self.filter_columns(max_buffer_bytes) * self._filter_column_bytes() if self.filtered else 0

    def target_rows(self, max_buffer_bytes: int) -> int:
        """Target rows of the weight that a gradient for hidden alone takes at a time."""
        row = self.hidden_size * (self.weight_dtype.itemsize + self.acc_dtype.itemsize)
        return max(1, min(max_buffer_bytes // 16, TARGET_BYTES) // max(1, row))

    def _target_bytes(self, max_buffer_bytes: int) -> int:
        if not self.grad_hidden_only:
            return 0
        row = self.hidden_size * (self.weight_dtype.itemsize + self.acc_dtype.itemsize)
        return self.target_rows(max_buffer_bytes) * row

    def weight_columns(self, max_buffer_bytes: int) -> int:
        """Vocabulary entries converted at a time; 0 if the weight is used as it is."""
        if not self.converted:
            return 0
        scratch = min(max_buffer_bytes // 4, WEIGHT_SCRATCH_BYTES)
        return min(self.vocabulary, max(MIN_CONVERTED, scratch // (self.hidden_size * self.matmul_dtype.itemsize)))

    def tile_budget(self, max_buffer_bytes: int) -> int:
        """What is left for rows and tiles."""
        converted = self.weight_columns(max_buffer_bytes) * self.hidden_size * self.matmul_dtype.itemsize
        rest = self._target_bytes(max_buffer_bytes) + self.filter_bytes(max_buffer_bytes)
        return max_buffer_bytes - converted - self.scratch - rest

    def full_vocab_rows(self, max_buffer_bytes: int) -> int:
        """Rows that fit with a tile across the whole vocabulary; may be 0 or less."""
        available = self.tile_budget(max_buffer_bytes) - self.vocabulary * self.column_bytes()
        return int(available // (self.vocabulary * self.tile_bytes() + self.row_bytes()))

    def plan(self, rows: int, max_buffer_bytes: int, full_vocab: bool = False) -> Plan:
        """The cut for ``rows`` rows; with ``full_vocab`` tiles span the vocabulary however few rows that leaves."""
        if max_buffer_bytes < self.min_buffer_bytes():
            raise ValueError(
                f"max_buffer_bytes: expected at least {self.min_buffer_bytes()} for hidden size {self.hidden_size}; "
                f"got {max_buffer_bytes}"
            )
        weight_columns, full_vocab_rows = self.weight_columns(max_buffer_bytes), self.full_vocab_rows(max_buffer_bytes)
        rows = max(1, rows)
        enough = GRAD_HIDDEN_ROWS if self.grad_hidden_only else MIN_ROWS
        if full_vocab_rows >= (1 if full_vocab else min(rows, enough)):
            return Plan(min(rows, full_vocab_rows), self.vocabulary, weight_columns)
        available, per_element, per_row = self.tile_budget(max_buffer_bytes), self.tile_bytes(), self.row_bytes()
        least = per_row + min(self.vocabulary, MIN_COLUMNS) * per_element
        square = isqrt(int(available / per_element)) if self.grad_hidden_only else rows
        chunk = max(1, min(rows, enough, square, int(available // least)))
        columns = int((available - chunk * per_row) // (chunk * per_element + self.column_bytes()))
        return Plan(chunk, max(1, min(self.vocabulary, columns)), weight_columns)


def layout_of(
    weight: Tensor,
    backend: TileBackend,
    max_buffer_bytes: int,
    *,
    save_logits: bool = True,
    gathered_rows: bool = True,
    grad_hidden_only: bool = False,
    filtered: bool = False,
    vocabulary: int | None = None,
) -> Layout:
    """The layout of a head (V, H) under a backend; ``save_logits`` False if no gradient will follow forward, so that a
    backend that fuses needs no tile; ``gathered_rows`` False if chunks are rows that follow one another;
    ``grad_hidden_only`` if the head is frozen or no gradient will follow; ``filtered`` if there is a gradient filter;
    ``vocabulary`` to plan for, if not the weight's own."""
    acc_dtype = accumulation_dtype(weight.dtype)
    fused, on_cpu, scratch = backend.fuses(weight.dtype), weight.device.type == "cpu", 0
    if on_cpu and 1 in weight.stride():
        scratch = backend.product_scratch(weight.dtype, max_buffer_bytes // 4)
    matmul_dtype = acc_dtype if on_cpu and not fused and not scratch else weight.dtype
    tile = (weight.dtype if save_logits else None) if fused else acc_dtype
    return Layout(
        weight.shape[1],
        weight.shape[0] if vocabulary is None else vocabulary,
        acc_dtype,
        matmul_dtype,
        weight.dtype,
        tile,
        copied=not fused and not scratch and matmul_dtype != tile,
        scratch=scratch,
        temporary=backend.temporary_share,
        gathered_rows=gathered_rows,
        converted=weight.dtype != matmul_dtype or (not fused and 1 not in weight.stride()),
        grad_hidden_only=grad_hidden_only and not fused,
        scaled=fused and save_logits and backend.row_offsets(weight.dtype),
        filtered=filtered,
    )


def row_chunks(count: int, largest: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """0 .. count in the fewest chunks of at most ``largest``, as even as they go, and all but the last of a
    ``multiple``, unless that makes one too large."""
    chunks = -(-count // largest) if count else 0
    even = [count * c // chunks for c in range(chunks + 1)] if chunks else []
    rounded = [min(count, -(-start // multiple) * multiple) for start in even]
    fits = all(0 < stop - start <= largest for start, stop in pairwise(rounded))
    return pairwise(rounded if fits else even)
