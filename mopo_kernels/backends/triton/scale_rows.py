"""``x * factor`` in another dtype, in one pass: a row of x and of the result, and a factor, a program's block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.backends.triton.math import OPTIONS

BLOCK = 2048


@triton.jit(do_not_specialize=["factor", "factor_step"])
def scale_rows_kernel(
    x: tl.tensor,
    factor: tl.tensor,
    out: tl.tensor,
    columns: tl.int32,
    x_stride: tl.int64,
    out_stride: tl.int64,
    factor_step: tl.int32,
    BLOCK: tl.constexpr,
) -> None:
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + r * x_stride + c, mask=c < columns, other=0.0).to(factor.dtype.element_ty)
    value *= tl.load(factor + r * factor_step)
    tl.store(out + r * out_stride + c, value.to(out.dtype.element_ty), mask=c < columns)


def scale_rows(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """:meth:`mopo_kernels.backends.base.TileBackend.scaled`: x (R, C) with unit stride in C, factor () or (R,)."""
    rows, columns = x.shape
    out = x.new_empty(rows, columns, dtype=dtype)
    with torch.cuda.device_of(x):
        if x.numel():
            scale_rows_kernel[(rows, triton.cdiv(columns, BLOCK))](
                x,
                factor,
                out,
                columns,
                x.stride(0),
                out.stride(0),
                factor.stride(0) if factor.dim() else 0,
                BLOCK=BLOCK,
                num_warps=4,
                **OPTIONS,
            )
    return out
