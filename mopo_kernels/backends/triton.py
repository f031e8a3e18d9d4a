"""Backend "triton": tile work in :mod:`mopo_kernels.kernels`, on NVIDIA GPUs and in Triton's interpreter on the CPU.

For bf16 and fp16 input it fuses: products are folded in registers, and a tile holds exponentials in the input's dtype.
Triton is imported on first use, and this module without it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor

from mopo_kernels.arguments import LogitTransform, PairBatch
from mopo_kernels.backends.tile import TileBackend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def unavailable_reason() -> str | None:
    """None where Triton imports and there is a GPU or its interpreter is on; otherwise one line that says why not."""
    interpreting = _interpreting()
    if not interpreting and (not torch.cuda.is_available() or torch.version.cuda is None):
        return "there is no NVIDIA GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    try:
        from mopo_kernels.kernels.common import interpreted
    except ImportError as error:
        detail = " ".join(str(error).split())[:200]
        return f"Triton does not import ({detail}); install triton"
    if interpreting != interpreted():
        return "TRITON_INTERPRET changed after Triton was imported; set it before"
    return None


def serves() -> tuple[str, ...]:
    """Kinds of device: the interpreter takes CPU tensors as well."""
    return ("cuda", "cpu") if _interpreting() else ("cuda",)


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on."""
    return torch.cuda.device_of(tensor)


class TritonBackend(TileBackend):
    # Maxima and sums of the blocks of a product.
    temporary_share = 1 / 16

    def fold(
        self,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        maximum: Tensor,
        total: Tensor,
        picked: Tensor,
    ) -> None:
        from mopo_kernels.kernels.fold import fold

        with _on_device(tile):
            fold(tile, bias, target, start, transform, maximum, total, picked)

    def gradient_(
        self,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        logsumexp: Tensor,
        coefficient: Tensor | None,
    ) -> None:
        from mopo_kernels.kernels.gradient import gradient_

        with _on_device(tile):
            gradient_(tile, bias, target, start, transform, logsumexp, coefficient)

    def fuses(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float16)

    def row_offsets(self, dtype: torch.dtype) -> bool:
        from mopo_kernels.kernels.linear_fold import row_offsets

        return row_offsets(dtype)

    def row_offset(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, start: int, transform: LogitTransform
    ) -> Tensor:
        from mopo_kernels.kernels.row_offset import row_offset

        with _on_device(hidden):
            return row_offset(hidden, weight, bias, target, start, transform)

    def offset_blocks(self, columns: int) -> int:
        from mopo_kernels.kernels.linear_fold import offset_blocks

        return offset_blocks(columns)

    def linear_fold(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        maximum: Tensor,
        total: Tensor,
        picked: Tensor,
        exponentials: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        from mopo_kernels.kernels.linear_fold import linear_fold

        with _on_device(hidden):
            linear_fold(hidden, weight, bias, target, start, transform, maximum, total, picked, exponentials, offsets)

    def row_statistics(self, maximum: Tensor, total: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        from mopo_kernels.kernels.row_statistics import row_statistics

        if maximum.dtype != torch.float32:
            return super().row_statistics(maximum, total, picked)
        with _on_device(maximum):
            return row_statistics(maximum, total, picked)

    def mark_target_(
        self,
        exponentials: Tensor,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        offset: Tensor,
        logsumexp: Tensor,
        logprob: Tensor,
        scale: Tensor,
    ) -> None:
        from mopo_kernels.kernels.mark_target import mark_target_

        with _on_device(exponentials):
            mark_target_(exponentials, target, start, transform, offset, logsumexp, logprob, scale)

    def exponential_gradient_(
        self,
        exponentials: Tensor,
        offsets: Tensor,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        logsumexp: Tensor,
        logprob: Tensor,
        coefficient: Tensor | None,
    ) -> None:
        from mopo_kernels.kernels.exponential_gradient import exponential_gradient_

        with _on_device(exponentials):
            exponential_gradient_(exponentials, offsets, target, start, transform, logsumexp, logprob, coefficient)

    def scaled(self, x: Tensor, factor: Tensor, dtype: torch.dtype, overwrite: bool = False) -> Tensor:
        from mopo_kernels.kernels.scale_rows import scale_rows

        rows = x if x.dim() == 2 else x[None]
        if rows.stride(1) != 1 or (overwrite and dtype == x.dtype):
            return super().scaled(x, factor, dtype, overwrite)
        with _on_device(x):
            return scale_rows(rows, factor.reshape(-1).squeeze(0), dtype).view(x.shape)

    def segment_sum(self, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        from mopo_kernels.kernels.segment_sum import segment_sum

        with _on_device(value):
            return segment_sum(value, cu_seqlens)

    def pair_coefficient(self, logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> Tensor:
        from mopo_kernels.kernels.pair_coefficient import pair_coefficient

        if batch.options.loss_type == "cloning":
            return super().pair_coefficient(logprob, ref_logprob, batch)
        with _on_device(logprob):
            return pair_coefficient(logprob, ref_logprob, batch)


BACKEND = TritonBackend()
