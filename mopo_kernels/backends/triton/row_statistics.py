"""Each row's log-probability and log-sum-exp, from what :mod:`mopo_kernels.backends.triton.linear_lse_fwd` leaves of
it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.triton.linear_lse_fwd import LOG2_E
from mopo_kernels.backends.triton.math import OPTIONS

BLOCK = 256


@triton.jit(do_not_specialize=["row_max", "sum_exp", "target_logit", "target", "logprob", "logsumexp", "rows"])
def row_statistics_kernel(
    row_max: tl.tensor,
    sum_exp: tl.tensor,
    target_logit: tl.tensor,
    target: tl.tensor,
    logprob: tl.tensor,
    logsumexp: tl.tensor,
    rows: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.load(row_max + r, mask=r < rows, other=0.0)
    summed = tl.load(sum_exp + r, mask=r < rows, other=1.0)
    z = tl.load(target_logit + r, mask=r < rows, other=0.0)
    lp = (z - offset) - tl.log(summed)
    # The target's own part of the sum, bit by bit as linear_lse_fwd has it, whose compiler joins these two operations.
    # Where it is nearly all of the sum, what is left says more.
    share = tl.exp2(tl.fma(z, tl.full((BLOCK,), LOG2_E, tl.float32), -(offset * LOG2_E)))
    left = (summed - share) / share
    near = -left * (1.0 - 0.5 * left)
    lp = tl.where((left >= 0.0) & (left < 1e-3), near, lp)
    scored = tl.load(target + r, mask=r < rows, other=-1) >= 0
    tl.store(logprob + r, tl.where(scored, lp, 0.0), mask=r < rows)
    # Its rounding would tilt the gradient of the whole row.
    tl.store(logsumexp + r, offset.to(tl.float64) + tl.log(summed.to(tl.float64)), mask=r < rows)


def row_statistics(
    row_max: Tensor, sum_exp: Tensor, target_logit: Tensor, target: Tensor, logprob: Tensor, logsumexp: Tensor
) -> None:
    """:meth:`mopo_kernels.backends.base.TileBackend.row_statistics` for fp32."""
    rows = row_max.shape[0]
    with torch.cuda.device_of(row_max):
        if rows:
            row_statistics_kernel[(triton.cdiv(rows, BLOCK),)](
                row_max, sum_exp, target_logit, target, logprob, logsumexp, rows, BLOCK=BLOCK, num_warps=2, **OPTIONS
            )
