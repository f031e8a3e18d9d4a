"""Turns a tile of products into the gradient of the rows' log-probabilities, in place: one program a row and block."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends.triton.math import OPTIONS, expm1, logit, split, times, transform_arguments


class Configuration(NamedTuple):
    """``block``: columns of a program."""

    block: int
    num_warps: int


CONFIGURATIONS = {torch.float32: Configuration(4096, 8), torch.float64: Configuration(1024, 8)}


@triton.jit(do_not_specialize=["bias", "target", "start", "logsumexp", "grad_logprob"])
def logits_bwd_kernel(
    tile: tl.tensor,
    bias: tl.tensor,
    target: tl.tensor,
    logsumexp: tl.tensor,
    grad_logprob: tl.tensor,
    start: tl.int32,
    columns: tl.int32,
    stride: tl.int64,
    inner: tl.float64,
    outer: tl.float64,
    slope: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_GRAD_LOGPROB: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    v = first + tl.arange(0, BLOCK)
    tile += row.to(tl.int64) * stride
    dtype: tl.constexpr = tile.dtype.element_ty
    wanted = tl.load(target + row)
    if wanted < 0:
        tl.store(tile + v, tl.zeros((BLOCK,), dtype), mask=v < columns)
    else:
        x = tl.load(tile + v, mask=v < columns, other=0.0)
        if HAS_BIAS:
            x += tl.load(bias + v, mask=v < columns, other=0.0)
        z, bend = logit(x, inner, outer, slope, CAPPED, SCALED)
        factor = times(tl.full((), -1.0, dtype), slope)
        if HAS_GRAD_LOGPROB:
            factor = times(-tl.load(grad_logprob + row), slope)
        # Two numbers stand for the log-sum-exp: rounding it to one would tilt the whole row's gradient.
        high, low = split(tl.load(logsumexp + row), dtype)
        difference = z - high
        gradient = tl.exp(difference) * (factor * tl.exp(-low))
        column = wanted - start
        if (column >= first) & (column < first + BLOCK):
            # p - 1 at the target, with all its digits where p is near 1.
            gradient = tl.where(v == column, expm1(difference - low) * factor, gradient)
        tl.store(tile + v, gradient * bend, mask=v < columns)


def logits_bwd_(
    tile: Tensor,
    bias: Tensor | None,
    target: Tensor,
    start: int,
    transform: LogitTransform,
    logsumexp: Tensor,
    grad_logprob: Tensor | None,
) -> None:
    """:meth:`mopo_kernels.backends.base.TileBackend.logits_bwd_` for a tile (R, W) in fp32 or fp64."""
    rows, columns = tile.shape
    if rows == 0:
        return
    configuration = CONFIGURATIONS[tile.dtype]
    with torch.cuda.device_of(tile):
        logits_bwd_kernel[(rows, triton.cdiv(columns, configuration.block))](
            tile,
            bias,
            target,
            logsumexp,
            grad_logprob,
            start,
            columns,
            tile.stride(0),
            HAS_BIAS=bias is not None,
            HAS_GRAD_LOGPROB=grad_logprob is not None,
            BLOCK=configuration.block,
            num_warps=configuration.num_warps,
            **transform_arguments(transform),
            **OPTIONS,
        )
