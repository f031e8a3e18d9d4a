"""Backend "cpp": tile work in vectorised, threaded C++ on the CPU (csrc/cpu), in the extension ``mopo_kernels._C``.

The extension is optional: where it was not built, or does not load, :func:`unavailable_reason` says why.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends import extension
from mopo_kernels.backends.base import TileBackend

# What a thread of product_ packs its factors into: blocks of up to 1026 x 1024, 384 deep, in bf16; at least of 6 x 64.
PRODUCT_SCRATCH_BYTES = (1026 + 1024) * 384 * 2
LEAST_PRODUCT_SCRATCH_BYTES = (6 + 64) * 384 * 2


@cache
def unavailable_reason() -> str | None:
    """None if the extension is loaded, which the first call attempts; otherwise one line that says why not."""
    return extension.unavailable_reason("_C", "C++", "reason", "cpu")


@cache
def has_native_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of ``dtype`` faster than fp32 ones, and :meth:`CppBackend.product_` is
    there: bf16, with the instructions avx512_bf16 (and not where ATEN_CPU_CAPABILITY forbids AVX-512)."""
    return bool(torch.ops.mopo_tile.has_native_products(dtype))


class CppBackend(TileBackend):
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
        torch.ops.mopo_tile.lse_fwd(tile, bias, target, start, *transform.flatten(), row_max, sum_exp, target_logit)

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
        torch.ops.mopo_tile.logits_bwd_(tile, bias, target, start, *transform.flatten(), logsumexp, grad_logprob)

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
        torch.ops.mopo_tile.mark_columns_(marked, tile, bias, target, start, *transform.flatten(), least)

    def product_scratch(self, dtype: torch.dtype, available: int) -> int:
        if not has_native_products(dtype):
            return 0
        scratch = min(torch.get_num_threads() * PRODUCT_SCRATCH_BYTES, available)
        return scratch if scratch >= LEAST_PRODUCT_SCRATCH_BYTES else 0

    def product_(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool, scratch_bytes: int | None = None) -> None:
        """``out = a @ b``, or ``out += a @ b`` with ``accumulate``.

        ``out`` (M, N) fp32 with column stride 1; ``a`` (M, K) bf16, or fp32 that is rounded to bf16 first; ``b`` (K, N)
        bf16; ``a`` and ``b`` have stride 1 in either dimension. Sums are in fp32, in an order that depends on K alone.
        Subnormal numbers count as zeros. Takes at most ``scratch_bytes`` of working memory in all, of which
        ``LEAST_PRODUCT_SCRATCH_BYTES`` are enough for any product, or else at most ``PRODUCT_SCRATCH_BYTES`` a thread;
        the result does not depend on it. Raises ValueError for other shapes, dtypes or strides or for less memory, and
        NotImplementedError where :func:`has_native_products` is False for bf16."""
        torch.ops.mopo_tile.product_(out, a, b, accumulate, scratch_bytes)


BACKEND = CppBackend()
