"""Sums over packed sequences: one program a sequence, so that the order is fixed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.triton.math import OPTIONS

BLOCK = 1024


@triton.jit(do_not_specialize=["value", "cu_seqlens", "total"])
def segment_sum_kernel(value: tl.tensor, cu_seqlens: tl.tensor, total: tl.tensor, BLOCK: tl.constexpr) -> None:
    sequence = tl.program_id(0)
    stop = tl.load(cu_seqlens + sequence + 1)
    summed = tl.zeros((BLOCK,), value.dtype.element_ty)
    for first in range(tl.load(cu_seqlens + sequence), stop, BLOCK):
        n = first + tl.arange(0, BLOCK)
        summed += tl.load(value + n, mask=n < stop, other=0.0)
    tl.store(total + sequence, tl.sum(summed, axis=0))


def segment_sum(value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """:meth:`mopo_kernels.backends.base.TileBackend.segment_sum`: (N,) in fp32 or fp64, (S + 1,) -> (S,)."""
    sequences = cu_seqlens.shape[0] - 1
    total = value.new_empty(sequences)
    with torch.cuda.device_of(value):
        if sequences > 0:
            segment_sum_kernel[(sequences,)](
                value.contiguous(), cu_seqlens.contiguous(), total, BLOCK=BLOCK, num_warps=4, **OPTIONS
            )
    return total
