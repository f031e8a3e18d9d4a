"""Backend "torch": tile work in plain torch operations, on any device.

Rows are taken a block at a time: the temporaries of an elementwise chain stay in cache, and within an eighth of the
tile (or one row), which is what the buffer's plan allows a backend.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends.base import TileBackend

# Small enough to stay in a core's cache between the passes of one block, large enough to hide the cost of a call.
BLOCK_BYTES = 2 << 20


def unavailable_reason() -> str | None:
    return None


def _row_blocks(tile: Tensor) -> Iterator[slice]:
    row_bytes = max(1, tile.shape[1] * tile.element_size())
    rows = max(1, min(BLOCK_BYTES, int(tile.shape[0] * row_bytes * TorchBackend.temporary_share)) // row_bytes)
    for start in range(0, tile.shape[0], rows):
        yield slice(start, min(start + rows, tile.shape[0]))


def logits_(
    block: Tensor, bias: Tensor | None, transform: LogitTransform, need_slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Products to logits, in place; and, if needed and not constant, their slope ``1 - tanh^2``, scale left out."""
    if bias is not None:
        block += bias
    if transform.softcap is None:
        scale = transform.logit_scale / transform.temperature
        return (block if scale == 1.0 else block.mul_(scale)), None
    block.mul_(transform.logit_scale).div_(transform.softcap).tanh_()
    slope = block.square().neg_().add_(1.0) if need_slope else None
    return block.mul_(transform.softcap).div_(transform.temperature), slope


class TorchBackend(TileBackend):
    temporary_share = 1 / 8

    def lse_fwd(
        self,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        row_max: Tensor,
        sum_exp: Tensor,
        target_logit: Tensor,
    ) -> None:
        width = tile.shape[1]
        column = target - start
        inside = (column >= 0) & (column < width)
        for rows in _row_blocks(tile):
            z, _ = logits_(tile[rows].clone(), bias, transform)
            hit = z.gather(1, column[rows].clamp(0, width - 1)[:, None])[:, 0]
            target_logit[rows] = torch.where(inside[rows], hit, target_logit[rows])
            top = torch.maximum(row_max[rows], z.amax(dim=1))
            # While every logit is -inf, exp(z - 0) = 0 where exp(z - top) would be NaN.
            shift = top.where(top > -torch.inf, 0)
            sum_exp[rows] *= torch.exp(row_max[rows] - shift)
            sum_exp[rows] += z.sub_(shift[:, None]).exp_().sum(dim=1)
            row_max[rows] = top
            del z  # before the next block's copy is made

    def logits_bwd_(
        self,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        logsumexp: Tensor,
        grad_logprob: Tensor | None,
    ) -> None:
        width = tile.shape[1]
        column = target - start
        inside = (column >= 0) & (column < width)
        for rows in _row_blocks(tile):
            z, slope = logits_(tile[rows], bias, transform, need_slope=True)
            # Two numbers stand for the fp64 log-sum-exp: rounding it to one would tilt the whole row's gradient.
            high = logsumexp[rows].to(z.dtype)
            low = (logsumexp[rows] - high).to(z.dtype)
            scale = torch.full_like(logsumexp[rows], transform.logit_scale / transform.temperature)
            if grad_logprob is not None:
                scale *= grad_logprob[rows]
            z.sub_(high[:, None]).exp_().mul_(-torch.exp(-low)[:, None])
            z.scatter_add_(1, column[rows].clamp(0, width - 1)[:, None], inside[rows, None].to(z.dtype))
            z.mul_(scale.to(z.dtype)[:, None])
            if slope is not None:
                z.mul_(slope)
            del slope  # before the next block's is made
            z.masked_fill_((target[rows] < 0)[:, None], 0)

    def mark_columns_(
        self,
        marked: Tensor,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        least: Tensor,
    ) -> None:
        marked.zero_()
        for rows in _row_blocks(tile):
            z, _ = logits_(tile[rows].clone(), bias, transform)
            marked |= (z < least[rows, None]).logical_not_().any(dim=0)
            del z  # before the next block's copy is made
        column = target - start
        marked[column[(target >= 0) & (column >= 0) & (column < tile.shape[1])]] = True


BACKEND = TorchBackend()
