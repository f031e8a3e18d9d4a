"""Which rows of a batch are scored, and what becomes of the others.

On the CPU ignored rows are dropped before any product. On an accelerator counting them would wait for the device: every
row goes through the head there, ignored ones with a target below 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopo_kernels.backends.base import NOT_SCORED

Rows = slice | Tensor


def on_host(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def scored_grad(grad: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Upstream gradients (N,) with 0 where nothing is scored: there the derivative is 0 whatever comes, be it NaN."""
    return grad.where(target != ignore_index, 0)


class ScoredRows:
    """The rows of target (N,) that go through the head: ``count`` of them."""

    def __init__(self, target: Tensor, ignore_index: int) -> None:
        self.target = target.contiguous()
        self.index: Tensor | None = None
        self.count = target.shape[0]
        if on_host(target):
            scored = target != ignore_index
            if not bool(scored.all()):
                self.index = scored.nonzero()[:, 0]
                self.count = self.index.shape[0]
        elif ignore_index >= 0:
            self.target = self.target.where(self.target != ignore_index, NOT_SCORED)

    def in_batch(self, rows: Rows) -> Rows:
        """Where rows of those that go through stand in the batch."""
        return rows if self.index is None else self.index[rows]

    def offsets(self, cu_seqlens: Tensor) -> Tensor:
        """Offsets of sequences among the rows that go through."""
        return cu_seqlens if self.index is None else torch.searchsorted(self.index, cu_seqlens.long())
