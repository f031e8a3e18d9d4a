"""What each row's statistics start from: a number near its log-sum-exp, before the product that gives it. That is the
logit of the row's target, or of another row of the weight where the target lies elsewhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends.base import RowStats
from mopo_kernels.backends.triton.math import OPTIONS, interpreted, logit, transform_arguments

# Rows of a program, and the components of hidden that it takes at a time; fewer in the interpreter, where small tests
# cross their edges.
BLOCK_R = 8
BLOCK_H = 64 if interpreted() else 512


@triton.jit(do_not_specialize=["bias", "target", "row_max", "sum_exp", "target_logit", "rows", "start"])
def row_offset_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    target: tl.tensor,
    row_max: tl.tensor,
    sum_exp: tl.tensor,
    target_logit: tl.tensor,
    rows: tl.int32,
    columns: tl.int32,
    hidden_size: tl.int32,
    start: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.arange(0, BLOCK_H)
    wanted = tl.load(target + r, mask=r < rows, other=-1)
    column = tl.minimum(tl.maximum(wanted - start, 0), columns - 1).to(tl.int64)
    a = hidden + r.to(tl.int64)[:, None] * hidden_stride + h[None, :]
    b = weight + column[:, None] * weight_stride + h[None, :]
    product = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for first in range(0, hidden_size, BLOCK_H):
        inside = (wanted >= 0)[:, None] & (h[None, :] < hidden_size - first)
        left = tl.load(a + first, mask=inside, other=0.0).to(tl.float32)
        product += left * tl.load(b + first, mask=inside, other=0.0).to(tl.float32)
    x = tl.sum(product, axis=1)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=wanted >= 0, other=0.0)
    z, _ = logit(x, inner, outer, slope, CAPPED, SCALED)
    # Any number will do for a target of probability 0; NaN is found in the products.
    z = tl.where((wanted >= 0) & (tl.abs(z) < float("inf")), z, 0.0)
    tl.store(row_max + r, z, mask=r < rows)
    tl.store(sum_exp + r, tl.zeros((BLOCK_R,), tl.float32), mask=r < rows)
    tl.store(target_logit + r, tl.zeros((BLOCK_R,), tl.float32), mask=r < rows)


def row_offset(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, start: int, transform: LogitTransform
) -> RowStats:
    """:meth:`mopo_kernels.backends.base.TileBackend.row_offset`: (R,) fp32 each."""
    rows, hidden_size = hidden.shape
    stats = RowStats(*(hidden.new_empty(rows, dtype=torch.float32) for _ in RowStats._fields))
    if rows == 0 or weight.shape[0] == 0:
        return RowStats(*(x.zero_() for x in stats))
    with torch.cuda.device_of(hidden):
        row_offset_kernel[(triton.cdiv(rows, BLOCK_R),)](
            hidden,
            weight,
            bias,
            target,
            *stats,
            rows,
            weight.shape[0],
            hidden_size,
            start,
            hidden.stride(0),
            weight.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_R=BLOCK_R,
            BLOCK_H=BLOCK_H,
            num_warps=4,
            **transform_arguments(transform),
            **OPTIONS,
        )
    return stats
