"""Multiplies hidden and weight and takes the product's logits into their log-sum-exp without storing them.

``linear_lse_fwd_kernel``: one program a block of rows and a block of the vocabulary. It leaves the sum of each row's
exponentials over its block, the target's logit and, if asked to, the exponentials themselves, all relative to an offset
of the row:

* bf16, with the exponents of fp32: any number within some tens of nats of the log-sum-exp, so that it is chosen before
  the product (:mod:`mopo_kernels.backends.triton.row_offset`) and is the same for every block. ``merge_sums_kernel``
  adds the blocks' sums up in a fixed order, and computes again the rows whose offset turns out to lie too far away.
* fp16: the maximum of the block. ``merge_kernel`` takes maxima and sums into the rows' running ones, in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels import checks
from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends.triton.math import OPTIONS, accumulate, architecture, lowest, reduce, transform_arguments


class Configuration(NamedTuple):
    """Rows, vocabulary entries and hidden components of a block, and how many blocks of rows pass over a block of the
    weight before the next: enough that the weight is read few times, few enough that their hidden stays in L2."""

    block_r: int
    block_v: int
    block_h: int
    group_r: int
    num_warps: int
    num_stages: int


# By compute capability, for 2-byte elements. That of 9.0 is the fastest of 18 on an H100 (bench.device's "tune"): to
# read operands by the tensor memory accelerator was slower there, and warps that Triton 3.6 specializes gave no result.
# The others were not measured: bench/compile_report.py shows what a change costs in registers and shared memory. Two
# programs of 128 x 128 share a multiprocessor, so that one's products hide the other's exponentials. 0 is the
# interpreter, where small blocks let small tests cross their edges.
CONFIGURATIONS = {
    0: Configuration(32, 64, 32, 2, 4, 1),
    80: Configuration(128, 128, 32, 16, 4, 4),
    90: Configuration(128, 256, 64, 4, 8, 4),
    100: Configuration(128, 128, 64, 16, 4, 3),
    103: Configuration(128, 128, 64, 16, 4, 3),
}
# For every other architecture: those of 8.6, 8.9 and 12.0 have 99 KiB of shared memory a block.
OTHER = Configuration(64, 128, 32, 16, 4, 4)
# What is smaller where the last block of a tile is stored a few bytes at a time, and where every access is as narrow:
# see _launches.
NARROW_EDGE = {"block_r": 32, "block_h": 32, "num_warps": 4}
NARROW = {"block_r": 32, "block_h": 16, "num_warps": 4}
# Blocks of the vocabulary and rows that a program of the merge takes at a time.
MERGE_BLOCKS, MERGE_ROWS = 128, 16
# The same of merge_sums_kernel, and the columns and components of its products. These are for the rare row, and take
# any shape and alignment.
SUMS_BLOCKS, SUMS_ROWS, AGAIN_V, AGAIN_H = 64, 16, 64, 32
# A row whose sum of exponentials is larger is computed again: what its tokens count for would be too small a number.
LARGEST_SUM = tl.constexpr(2.0**64)
LOG2_E = tl.constexpr(1.4426950408889634)


def configuration() -> Configuration:
    """The current device's."""
    return CONFIGURATIONS.get(architecture(), OTHER)


def offset_blocks(columns: int) -> int:
    """Blocks of the vocabulary in a tile of ``columns``, on the current device."""
    return int(triton.cdiv(columns, configuration().block_v))


class Launch(NamedTuple):
    """``blocks`` of the vocabulary from ``first`` on; ``even``: none of them is cut short."""

    first: int
    blocks: int
    even: bool
    configuration: Configuration


def _launches(columns: int, matrices: tuple[Tensor | None, ...]) -> list[Launch]:
    """Launches for a tile of ``columns``. Accesses of 16 bytes need rows that start at multiples of 16 bytes and a tile
    that ends at one; narrower ones need more registers than a thread has for a large block. So where rows do not, all
    blocks are small, and where only the end of the tile does not, the last ones are."""
    main = configuration()
    whole, rest = divmod(columns, main.block_v)
    blocks = whole + (rest > 0)
    if any(m is not None and (m.stride(0) % 8 or m.data_ptr() % 16) for m in matrices):
        return [Launch(0, blocks, rest == 0, main._replace(**NARROW))]
    if columns % 16 == 0:
        return [Launch(0, blocks, rest == 0, main)]
    return [Launch(0, whole, True, main)] * (whole > 0) + [Launch(whole, 1, False, main._replace(**NARROW_EDGE))]


def row_offsets(dtype: torch.dtype) -> bool:
    """Whether exponentials of this dtype have one offset a row."""
    return dtype == torch.bfloat16


@triton.jit
def _blocks(
    rows: tl.int32, blocks: tl.int32, BLOCK_R: tl.constexpr, GROUP_R: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The program's block of rows and of the vocabulary: within a group of rows, blocks of rows come first."""
    program = tl.program_id(0)
    group_size = GROUP_R * blocks
    first = program // group_size * GROUP_R
    height = tl.minimum(tl.cdiv(rows, BLOCK_R) - first, GROUP_R)
    return first + program % group_size % height, program % group_size // height


@triton.jit
def _logit(
    x: tl.tensor, inner: tl.float64, outer: tl.float64, slope: tl.float64, CAPPED: tl.constexpr, SCALED: tl.constexpr
) -> tl.tensor:
    """Logits of products plus bias, fp32. A thread holds over a hundred of them in registers, and every step is taken
    for all before the next: so no step may need a second number beside each. This is why the constants are rounded and
    tanh(y) = 1 - 2 / (1 + exp(2 y)), off by 2^-23, serves near 0 as well."""
    z = x
    if CAPPED:
        rate = (tl.full((), inner, tl.float64) * 2.8853900817779268).to(tl.float32)
        top = tl.full((), outer, tl.float64).to(tl.float32)
        z = top - (2.0 * top) / (1.0 + tl.exp2(x * rate))
    elif SCALED:
        z = x * tl.full((), slope, tl.float64).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["bias", "target", "offsets", "sums", "target_logit", "rows", "start", "first_block"])
def linear_lse_fwd_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    target: tl.tensor,
    exp_logits: tl.tensor,
    offsets: tl.tensor,
    sums: tl.tensor,
    target_logit: tl.tensor,
    rows: tl.int32,
    columns: tl.int32,
    hidden_size: tl.int32,
    start: tl.int32,
    first_block: tl.int32,
    blocks: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    exp_logits_stride: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    STORE: tl.constexpr,
    ROW_OFFSETS: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_R: tl.constexpr,
) -> None:
    """``offsets``: (R,), read, with ROW_OFFSETS, else (blocks, R), written."""
    r_block, v_block = _blocks(rows, blocks, BLOCK_R, GROUP_R)
    v_block += first_block
    r = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    v = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
    h = tl.arange(0, BLOCK_H)
    wanted = tl.load(target + r, mask=r < rows, other=-1)
    scored = wanted >= 0
    statistic = v_block.to(tl.int64) * rows + r
    width = BLOCK_V if EVEN_V else tl.minimum(columns - v_block * BLOCK_V, BLOCK_V)
    if STORE:
        corner = exp_logits + r_block.to(tl.int64) * BLOCK_R * exp_logits_stride + v_block * BLOCK_V
        at = tl.arange(0, BLOCK_R)[:, None] * exp_logits_stride.to(tl.int32) + tl.arange(0, BLOCK_V)[None, :]
        inside = r[:, None] < rows
        if not EVEN_V:
            inside &= v[None, :] < columns
    if tl.max(scored.to(tl.int32), axis=0) == 0:
        # The statistics of rows that are not scored only have to be finite.
        tl.store(sums + statistic, tl.full((BLOCK_R,), 1.0, tl.float32), mask=r < rows)
        if not ROW_OFFSETS:
            tl.store(offsets + statistic, tl.zeros((BLOCK_R,), tl.float32), mask=r < rows)
        elif STORE:
            tl.store(corner + at, tl.zeros((BLOCK_R, BLOCK_V), exp_logits.dtype.element_ty), mask=inside)
        return
    column = wanted - start - v_block * BLOCK_V
    here = (column >= 0) & (column < width)
    column = tl.where(here, column, -1).to(tl.int32)

    # Beyond the last row and column the last is read again, so that no load needs a mask for them. Offsets within a
    # block fit 32 bits, which leaves registers for the products; the blocks' own are 64 bits wide.
    r_in = tl.minimum(tl.arange(0, BLOCK_R), rows - r_block * BLOCK_R - 1)
    v_in = tl.minimum(tl.arange(0, BLOCK_V), width - 1)
    a = hidden + r_block.to(tl.int64) * BLOCK_R * hidden_stride
    b = weight + v_block.to(tl.int64) * BLOCK_V * weight_stride
    a_offset = r_in[:, None] * hidden_stride.to(tl.int32) + h[None, :]
    b_offset = v_in[None, :] * weight_stride.to(tl.int32) + h[:, None]
    z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + v, mask=v < columns, other=0.0)[None, :]
    for first in range(0, hidden_size, BLOCK_H):
        if EVEN_H:
            z = tl.dot(tl.load(a + a_offset), tl.load(b + b_offset), z)
        else:
            left = hidden_size - first
            a_block = tl.load(a + a_offset, mask=h[None, :] < left, other=0.0)
            z = tl.dot(a_block, tl.load(b + b_offset, mask=h[:, None] < left, other=0.0), z)
        a += BLOCK_H
        b += BLOCK_H
    z = _logit(z, inner, outer, slope, CAPPED, SCALED)

    if tl.max(column, axis=0) >= 0:
        hit = column[:, None] == tl.arange(0, BLOCK_V)[None, :]
        tl.store(target_logit + r, tl.sum(tl.where(hit, z, 0.0), axis=1), mask=column >= 0)

    if not EVEN_V:
        z = tl.where(v[None, :] < columns, z, -float("inf"))
    if ROW_OFFSETS:
        offset = tl.load(offsets + r, mask=r < rows, other=0.0) * LOG2_E
        e = tl.where(scored[:, None], tl.exp2(z * LOG2_E - offset[:, None]), 0.0)
    else:
        row_max = tl.max(z, axis=1)
        # While every logit is -inf, exp(z - 0) = 0 where exp(z - maximum) would be NaN.
        e = tl.exp(z - tl.where(row_max == -float("inf"), 0.0, row_max)[:, None])
        tl.store(offsets + statistic, tl.where(scored, row_max, 0.0), mask=r < rows)
    # What a row that is not scored leaves does not depend on the rows beside it.
    tl.store(sums + statistic, tl.where(scored, tl.sum(e, axis=1), 1.0), mask=r < rows)
    if STORE:
        tl.store(corner + at, e.to(exp_logits.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    r: tl.tensor,
    v: tl.tensor,
    rows: tl.int32,
    columns: tl.int32,
    hidden_size: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    HAS_BIAS: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> tl.tensor:
    """Products plus bias of any rows and columns, fp32; beyond the last, those of the last."""
    h = tl.arange(0, BLOCK_H)
    a = hidden + tl.minimum(r, rows - 1).to(tl.int64)[:, None] * hidden_stride + h[None, :]
    b = weight + tl.minimum(v, columns - 1).to(tl.int64)[None, :] * weight_stride + h[:, None]
    z = tl.zeros((r.shape[0], v.shape[0]), tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + v, mask=v < columns, other=0.0)[None, :]
    for first in range(0, hidden_size, BLOCK_H):
        left = hidden_size - first
        a_block = tl.load(a + first, mask=h[None, :] < left, other=0.0)
        z = tl.dot(a_block, tl.load(b + first, mask=h[:, None] < left, other=0.0), z)
    return z


@triton.jit(do_not_specialize=["bias", "target", "sums", "row_max", "sum_exp", "rows", "blocks"])
def merge_sums_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    target: tl.tensor,
    exp_logits: tl.tensor,
    sums: tl.tensor,
    row_max: tl.tensor,
    sum_exp: tl.tensor,
    rows: tl.int32,
    columns: tl.int32,
    hidden_size: tl.int32,
    blocks: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    exp_logits_stride: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Adds the blocks' sums to the total. A row whose total is then 0, not finite or very large is computed again from
    its products, relative to their maximum, which becomes its offset."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    scored = tl.load(target + r, mask=r < rows, other=-1) >= 0
    offset = tl.load(row_max + r, mask=r < rows, other=0.0)
    before = tl.load(sum_exp + r, mask=r < rows, other=0.0)
    b = tl.arange(0, BLOCK_B)
    summed = before
    for first in range(0, blocks, BLOCK_B):
        at = (first + b).to(tl.int64)[:, None] * rows + r[None, :]
        part = tl.load(sums + at, mask=((first + b)[:, None] < blocks) & (r[None, :] < rows), other=0.0)
        summed += tl.sum(part, axis=0)
    # NaN is neither.
    good = ((summed > 0.0) & (summed < LARGEST_SUM)) | (scored == 0)
    if tl.min(good.to(tl.int32), axis=0) == 0:
        v = tl.arange(0, BLOCK_V)
        top = tl.where(before > 0.0, offset, -float("inf"))
        for first in range(0, columns, BLOCK_V):
            z = _products(
                hidden, weight, bias, r, first + v, rows, columns, hidden_size, hidden_stride, weight_stride,
                HAS_BIAS, BLOCK_H,
            )  # fmt: skip
            z = _logit(z, inner, outer, slope, CAPPED, SCALED)
            z = tl.where((first + v)[None, :] < columns, z, -float("inf"))
            top = tl.maximum(top, tl.max(z, axis=1))
        # While every logit is -inf, exp(z - 0) = 0 where exp(z - top) would be NaN.
        shift = tl.where(top == -float("inf"), 0.0, top)
        again = tl.where(before > 0.0, before * tl.exp(offset - shift), 0.0)
        for first in range(0, columns, BLOCK_V):
            z = _products(
                hidden, weight, bias, r, first + v, rows, columns, hidden_size, hidden_stride, weight_stride,
                HAS_BIAS, BLOCK_H,
            )  # fmt: skip
            z = _logit(z, inner, outer, slope, CAPPED, SCALED)
            z = tl.where((first + v)[None, :] < columns, z, -float("inf"))
            e = tl.exp2(z * LOG2_E - (shift * LOG2_E)[:, None])
            again += tl.sum(e, axis=1)
            if STORE:
                into = exp_logits + r.to(tl.int64)[:, None] * exp_logits_stride + (first + v)[None, :]
                inside = (r < rows)[:, None] & ((first + v)[None, :] < columns) & (good == 0)[:, None]
                tl.store(into, e.to(exp_logits.dtype.element_ty), mask=inside)
        summed = tl.where(good, summed, again)
        tl.store(row_max + r, top, mask=(r < rows) & (good == 0))
    tl.store(sum_exp + r, tl.where(scored, summed, 1.0), mask=r < rows)


@triton.jit(do_not_specialize=["offsets", "sums", "row_max", "sum_exp", "rows"])
def merge_kernel(
    offsets: tl.tensor,
    sums: tl.tensor,
    row_max: tl.tensor,
    sum_exp: tl.tensor,
    rows: tl.int32,
    blocks: tl.int32,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.arange(0, BLOCK_B)
    top = lowest((BLOCK_B, BLOCK_R), tl.float32)
    summed = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for first in range(0, blocks, BLOCK_B):
        at = (first + b).to(tl.int64)[:, None] * rows + r[None, :]
        inside = ((first + b)[:, None] < blocks) & (r[None, :] < rows)
        block_maximum = tl.load(offsets + at, mask=inside, other=-float("inf"))
        top, summed = accumulate(top, summed, block_maximum, tl.load(sums + at, mask=inside, other=0.0))
    top, summed = reduce(top, summed, 0)
    old_row_max = tl.load(row_max + r, mask=r < rows, other=0.0)
    top, summed = accumulate(top, summed, old_row_max, tl.load(sum_exp + r, mask=r < rows, other=0.0))
    tl.store(row_max + r, tl.where(summed == 0, -float("inf"), top), mask=r < rows)
    tl.store(sum_exp + r, summed, mask=r < rows)


def linear_lse_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    start: int,
    transform: LogitTransform,
    row_max: Tensor,
    sum_exp: Tensor,
    target_logit: Tensor,
    exp_logits: Tensor | None = None,
    offsets: Tensor | None = None,
) -> None:
    """:meth:`mopo_kernels.backends.base.TileBackend.linear_lse_fwd` for bf16 or fp16: hidden (R, H), weight (W, H).
    Takes 4 bytes a row and block of the vocabulary for the sums, and in fp16 as many for the offsets if they are not
    given."""
    (rows, hidden_size), columns = hidden.shape, weight.shape[0]
    if rows == 0:
        return
    blocks = offset_blocks(columns)
    by_row = row_offsets(hidden.dtype)
    if not by_row:
        checks.expect(
            (exp_logits is None) == (offsets is None), "offsets", "a tensor with exponentials, and only then", offsets
        )
        if offsets is None:
            offsets = row_max.new_empty(blocks, rows)
        checks.shape("offsets", offsets, (blocks, rows), "(blocks, R)")
    sums = row_max.new_empty(blocks, rows)
    with torch.cuda.device_of(hidden):
        for launch in _launches(columns, (hidden, weight, exp_logits)):
            c = launch.configuration
            linear_lse_fwd_kernel[(triton.cdiv(rows, c.block_r) * launch.blocks,)](
                hidden,
                weight,
                bias,
                target,
                exp_logits,
                row_max if by_row else offsets,
                sums,
                target_logit,
                rows,
                columns,
                hidden_size,
                start,
                launch.first,
                launch.blocks,
                hidden.stride(0),
                weight.stride(0),
                0 if exp_logits is None else exp_logits.stride(0),
                HAS_BIAS=bias is not None,
                STORE=exp_logits is not None,
                ROW_OFFSETS=by_row,
                EVEN_H=hidden_size % c.block_h == 0,
                EVEN_V=launch.even,
                BLOCK_R=c.block_r,
                BLOCK_V=c.block_v,
                BLOCK_H=c.block_h,
                GROUP_R=c.group_r,
                num_warps=c.num_warps,
                num_stages=c.num_stages,
                **transform_arguments(transform),
                **OPTIONS,
            )
        if not by_row:
            merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
                offsets,
                sums,
                row_max,
                sum_exp,
                rows,
                blocks,
                BLOCK_B=MERGE_BLOCKS,
                BLOCK_R=MERGE_ROWS,
                num_warps=4,
                **OPTIONS,
            )
            return
        merge_sums_kernel[(triton.cdiv(rows, SUMS_ROWS),)](
            hidden,
            weight,
            bias,
            target,
            exp_logits,
            sums,
            row_max,
            sum_exp,
            rows,
            columns,
            hidden_size,
            blocks,
            hidden.stride(0),
            weight.stride(0),
            0 if exp_logits is None else exp_logits.stride(0),
            HAS_BIAS=bias is not None,
            STORE=exp_logits is not None,
            BLOCK_B=SUMS_BLOCKS,
            BLOCK_R=SUMS_ROWS,
            BLOCK_V=AGAIN_V,
            BLOCK_H=AGAIN_H,
            num_warps=4,
            num_stages=2,
            # Left to itself ptxas takes fewer, to run more programs at a time than there are, and spills.
            maxnreg=128,
            **transform_arguments(transform),
            **OPTIONS,
        )
