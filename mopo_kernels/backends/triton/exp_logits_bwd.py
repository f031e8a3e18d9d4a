"""Turns a tile of exponentials, as :mod:`mopo_kernels.backends.triton.linear_lse_fwd` leaves them, into the gradient of
the rows' log-probabilities, in place: one program a block of rows and a block of the vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels import checks
from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends.triton.linear_lse_fwd import configuration
from mopo_kernels.backends.triton.math import OPTIONS, expm1, times, transform_arguments

# Elements of a program, whatever the block of the vocabulary.
ELEMENTS = 2048
NUM_WARPS = 4


@triton.jit(do_not_specialize=["offsets", "target", "logsumexp", "logprob", "grad_logprob", "rows", "start"])
def exp_logits_bwd_kernel(
    exp_logits: tl.tensor,
    offsets: tl.tensor,
    target: tl.tensor,
    logsumexp: tl.tensor,
    logprob: tl.tensor,
    grad_logprob: tl.tensor,
    rows: tl.int32,
    columns: tl.int32,
    start: tl.int32,
    stride: tl.int64,
    outer: tl.float64,
    slope: tl.float64,
    HAS_GRAD_LOGPROB: tl.constexpr,
    CAPPED: tl.constexpr,
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
    wanted = tl.load(target + r, mask=r < rows, other=-1)
    normalizer = tl.load(logsumexp + r, mask=r < rows, other=0.0)
    lp = tl.load(logprob + r, mask=r < rows, other=0.0)
    row_max = tl.load(offsets + v_block.to(tl.int64) * rows + r, mask=r < rows, other=0.0)

    # Every logit of the block is -inf where its maximum is, and the exponentials are 0.
    share = tl.exp((row_max.to(tl.float64) - normalizer).to(tl.float32))
    share = tl.where(row_max == -float("inf"), 0.0, share)
    if whole:  # noqa: SIM108 - Triton has no conditional expression on a value of the device
        e = tl.load(at, mask=inside, other=0.0)
    else:
        e = tl.load(at, mask=inside & (v[None, :] < columns), other=0.0)
    e = e.to(tl.float32)
    column = wanted - start - v_block * BLOCK_V
    hit = (
        tl.where((column >= 0) & (column < BLOCK_V), column, -1).to(tl.int32)[:, None] == tl.arange(0, BLOCK_V)[None, :]
    )
    # p - 1 at the target, with all its digits where p is near 1.
    probability = tl.where(hit, expm1(lp)[:, None], e * share[:, None])
    if CAPPED:
        cap = tl.full((), outer, tl.float64).to(tl.float32)
        # At the target z is known better than its exponential.
        z = tl.where(hit, (lp.to(tl.float64) + normalizer).to(tl.float32)[:, None], row_max[:, None] + tl.log(e))
        # Where e is 0, z is -inf, and any slope that is a number will do.
        tanh = tl.minimum(tl.maximum(z / cap, -1.0), 1.0)
        probability *= (1.0 - tanh) * (1.0 + tanh)
    factor = times(tl.full((BLOCK_R,), -1.0, tl.float32), slope)
    if HAS_GRAD_LOGPROB:
        factor = times(-tl.load(grad_logprob + r, mask=r < rows, other=0.0), slope)
    gradient = tl.where((wanted >= 0)[:, None], factor[:, None] * probability, 0.0).to(exp_logits.dtype.element_ty)
    if whole:
        tl.store(at, gradient, mask=inside)
    else:
        tl.store(at, gradient, mask=inside & (v[None, :] < columns))


def exp_logits_bwd_(
    exp_logits: Tensor,
    offsets: Tensor,
    target: Tensor,
    start: int,
    transform: LogitTransform,
    logsumexp: Tensor,
    logprob: Tensor,
    grad_logprob: Tensor | None,
) -> None:
    """:meth:`mopo_kernels.backends.base.TileBackend.exp_logits_bwd_` for a tile (R, W) in bf16 or fp16."""
    rows, columns = exp_logits.shape
    if rows == 0:
        return
    block_v = configuration().block_v
    block_r = ELEMENTS // block_v
    blocks = triton.cdiv(columns, block_v)
    checks.shape("offsets", offsets, (blocks, rows), "(blocks, R)")
    arguments = transform_arguments(transform)
    with torch.cuda.device_of(exp_logits):
        exp_logits_bwd_kernel[(triton.cdiv(rows, block_r), blocks)](
            exp_logits,
            offsets,
            target,
            logsumexp,
            logprob,
            grad_logprob,
            rows,
            columns,
            start,
            exp_logits.stride(0),
            arguments["outer"],
            arguments["slope"],
            HAS_GRAD_LOGPROB=grad_logprob is not None,
            CAPPED=arguments["CAPPED"],
            BLOCK_R=block_r,
            BLOCK_V=block_v,
            num_warps=NUM_WARPS,
            **OPTIONS,
        )
