"""Takes a tile of products into running statistics of its rows: one program a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends.triton.math import OPTIONS, accumulate, logit, lowest, reduce, transform_arguments


class Configuration(NamedTuple):
    """``block``: columns a program takes at a time."""

    block: int
    num_warps: int


CONFIGURATIONS = {torch.float32: Configuration(4096, 8), torch.float64: Configuration(1024, 8)}


@triton.jit(do_not_specialize=["bias", "target", "start", "row_max", "sum_exp", "target_logit"])
def lse_fwd_kernel(
    tile: tl.tensor,
    bias: tl.tensor,
    target: tl.tensor,
    row_max: tl.tensor,
    sum_exp: tl.tensor,
    target_logit: tl.tensor,
    start: tl.int32,
    columns: tl.int32,
    stride: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    tile += row.to(tl.int64) * stride
    dtype: tl.constexpr = tile.dtype.element_ty
    # Every lane keeps statistics of its own, so that the lanes meet once, after the loop.
    top = lowest((BLOCK,), dtype)
    summed = tl.zeros((BLOCK,), dtype)
    for first in range(0, columns, BLOCK):
        v = first + tl.arange(0, BLOCK)
        x = tl.load(tile + v, mask=v < columns, other=0.0)
        if HAS_BIAS:
            x += tl.load(bias + v, mask=v < columns, other=0.0)
        z, _ = logit(x, inner, outer, slope, CAPPED, SCALED)
        top, summed = accumulate(top, summed, tl.where(v < columns, z, -float("inf")), 1.0)
    top, summed = reduce(top, summed, 0)
    top, summed = accumulate(top, summed, tl.load(row_max + row), tl.load(sum_exp + row))
    tl.store(row_max + row, tl.where(summed == 0, -float("inf"), top))
    tl.store(sum_exp + row, summed)

    column = tl.load(target + row) - start
    if (column >= 0) & (column < columns):
        x = tl.load(tile + column)
        if HAS_BIAS:
            x += tl.load(bias + column)
        z, _ = logit(x, inner, outer, slope, CAPPED, SCALED)
        tl.store(target_logit + row, z)


def lse_fwd(
    tile: Tensor,
    bias: Tensor | None,
    target: Tensor,
    start: int,
    transform: LogitTransform,
    row_max: Tensor,
    sum_exp: Tensor,
    target_logit: Tensor,
) -> None:
    """:meth:`mopo_kernels.backends.base.TileBackend.lse_fwd` for a tile (R, W) in fp32 or fp64."""
    rows, columns = tile.shape
    if rows == 0:
        return
    configuration = CONFIGURATIONS[tile.dtype]
    with torch.cuda.device_of(tile):
        lse_fwd_kernel[(rows,)](
            tile,
            bias,
            target,
            row_max,
            sum_exp,
            target_logit,
            start,
            columns,
            tile.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK=configuration.block,
            num_warps=configuration.num_warps,
            **transform_arguments(transform),
            **OPTIONS,
        )
