"""Each row's log-probability and log-sum-exp, from what :mod:`mopo_kernels.kernels.linear_fold` leaves of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.kernels.common import OPTIONS
from mopo_kernels.kernels.linear_fold import LOG2_E

BLOCK = 256


@triton.jit(do_not_specialize=["maximum", "total", "picked", "logprob", "logsumexp", "rows"])
def row_statistics_kernel(
    maximum: tl.tensor,
    total: tl.tensor,
    picked: tl.tensor,
    logprob: tl.tensor,
    logsumexp: tl.tensor,
    rows: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.load(maximum + r, mask=r < rows, other=0.0)
    summed = tl.load(total + r, mask=r < rows, other=1.0)
    z = tl.load(picked + r, mask=r < rows, other=0.0)
    lp = (z - offset) - tl.log(summed)
    # The target's own part of the sum, bit by bit. Where it is nearly all of it, what is left says more.
    share = tl.exp2(z * LOG2_E - offset * LOG2_E)
    left = (summed - share) / share
    near = -left * (1.0 - 0.5 * left)
    lp = tl.where((left >= 0.0) & (left < 1e-3), near, lp)
    tl.store(logprob + r, lp, mask=r < rows)
    # Its rounding would tilt the gradient of the whole row.
    tl.store(logsumexp + r, offset.to(tl.float64) + tl.log(summed.to(tl.float64)), mask=r < rows)


def row_statistics(maximum: Tensor, total: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """:meth:`mopo_kernels.backends.tile.TileBackend.row_statistics` for fp32."""
    rows = maximum.shape[0]
    logprob, logsumexp = torch.empty_like(maximum), maximum.new_empty(rows, dtype=torch.float64)
    if rows:
        row_statistics_kernel[(triton.cdiv(rows, BLOCK),)](
            maximum, total, picked, logprob, logsumexp, rows, BLOCK=BLOCK, num_warps=2, **OPTIONS
        )
    return logprob, logsumexp
