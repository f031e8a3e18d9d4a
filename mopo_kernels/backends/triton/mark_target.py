"""Turns exponentials with one offset a row, as :mod:`mopo_kernels.backends.triton.linear_lse_fwd` leaves them, into the
gradient of the rows' log-probabilities up to a factor of each row.

``mark_target_kernel``: one element a row changes, and the factors are written. ``bend_kernel``, before it and with a
softcap alone: all are multiplied by the softcap's slope, for whose logits the product's epilogue has no registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends.triton.math import OPTIONS, expm1, times, transform_arguments

BLOCK_R = 64
# Rows and columns of a program that bends.
BEND_R, BEND_V = 8, 256
# Nats between a row's offset and its log-sum-exp beyond which their exponential is not followed. Within one tile they
# are never so far apart; of a row that has them, exponentials relative to the offset weigh less than its rounding.
FARTHEST = tl.constexpr(60.0)


@triton.jit(do_not_specialize=["offset", "rows"])
def bend_kernel(
    exp_logits: tl.tensor,
    offset: tl.tensor,
    rows: tl.int32,
    columns: tl.int32,
    stride: tl.int64,
    outer: tl.float64,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    v_block = tl.program_id(1)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    v = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = exp_logits + r.to(tl.int64)[:, None] * stride + v[None, :]
    inside = r[:, None] < rows
    # Only the last block needs a mask for columns, which would make every access as narrow as one element.
    whole = (v_block + 1) * BLOCK_V <= columns
    if whole:
        e = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        e = tl.load(at, mask=inside & (v[None, :] < columns), other=0.0).to(tl.float32)
    cap = tl.full((), outer, tl.float64).to(tl.float32)
    z = tl.load(offset + r, mask=r < rows, other=0.0)[:, None] + tl.log(e)
    # Where e is 0, z is -inf, and any slope that is a number will do.
    tanh = tl.minimum(tl.maximum(z / cap, -1.0), 1.0)
    bent = (e * ((1.0 - tanh) * (1.0 + tanh))).to(exp_logits.dtype.element_ty)
    if whole:
        tl.store(at, bent, mask=inside)
    else:
        tl.store(at, bent, mask=inside & (v[None, :] < columns))


@triton.jit(do_not_specialize=["target", "offset", "logsumexp", "logprob", "scale", "rows", "start"])
def mark_target_kernel(
    exp_logits: tl.tensor,
    target: tl.tensor,
    offset: tl.tensor,
    logsumexp: tl.tensor,
    logprob: tl.tensor,
    scale: tl.tensor,
    rows: tl.int32,
    columns: tl.int32,
    start: tl.int32,
    stride: tl.int64,
    outer: tl.float64,
    slope: tl.float64,
    CAPPED: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    wanted = tl.load(target + r, mask=r < rows, other=-1)
    normalizer = tl.load(logsumexp + r, mask=r < rows, other=0.0)
    lp = tl.load(logprob + r, mask=r < rows, other=0.0)
    distance = (normalizer - tl.load(offset + r, mask=r < rows, other=0.0).to(tl.float64)).to(tl.float32)
    distance = tl.where(distance > FARTHEST, FARTHEST, distance)
    # p - 1 at the target, with all its digits where p is near 1.
    value = expm1(lp) * tl.exp(distance)
    if CAPPED:
        tanh = ((lp.to(tl.float64) + normalizer) / tl.full((), outer, tl.float64)).to(tl.float32)
        value *= (1.0 - tanh) * (1.0 + tanh)
    # What rounding the element does to it goes to the row's factor: it is the largest by far where it counts, and the
    # others are rounded as much.
    marked = value.to(exp_logits.dtype.element_ty)
    rounded = marked.to(tl.float32)
    exact = tl.where((rounded != 0.0) & (tl.abs(rounded) < float("inf")), value / rounded, 1.0)
    column = wanted - start
    here = (r < rows) & (wanted >= 0) & (column >= 0) & (column < columns)
    tl.store(exp_logits + r.to(tl.int64) * stride + column, marked, mask=here)
    factor = times(-tl.exp(-distance) * exact, slope)
    tl.store(scale + r, tl.where(wanted >= 0, factor, 0.0), mask=r < rows)


def mark_target_(
    exp_logits: Tensor,
    target: Tensor,
    start: int,
    transform: LogitTransform,
    offset: Tensor,
    logsumexp: Tensor,
    logprob: Tensor,
    scale: Tensor,
) -> None:
    """:meth:`mopo_kernels.backends.base.TileBackend.mark_target_` for a tile (R, W) in bf16."""
    rows, columns = exp_logits.shape
    if rows == 0:
        return
    arguments = transform_arguments(transform)
    with torch.cuda.device_of(exp_logits):
        if arguments["CAPPED"]:
            bend_kernel[(triton.cdiv(rows, BEND_R), triton.cdiv(columns, BEND_V))](
                exp_logits,
                offset,
                rows,
                columns,
                exp_logits.stride(0),
                arguments["outer"],
                BLOCK_R=BEND_R,
                BLOCK_V=BEND_V,
                num_warps=4,
                **OPTIONS,
            )
        mark_target_kernel[(triton.cdiv(rows, BLOCK_R),)](
            exp_logits,
            target,
            offset,
            logsumexp,
            logprob,
            scale,
            rows,
            columns,
            start,
            exp_logits.stride(0),
            arguments["outer"],
            arguments["slope"],
            CAPPED=arguments["CAPPED"],
            BLOCK_R=BLOCK_R,
            num_warps=2,
            **OPTIONS,
        )
