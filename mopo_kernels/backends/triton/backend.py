"""The Triton kernels as a tile backend. For bf16 and fp16 input it fuses: products stay in registers, and a tile
holds exponentials in the input's dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mopo_kernels import naive
from mopo_kernels.arguments import CallValues, PairBatch
from mopo_kernels.backends.base import TileBackend
from mopo_kernels.backends.triton.check_values import check_values
from mopo_kernels.backends.triton.exp_logits_bwd import exp_logits_bwd_
from mopo_kernels.backends.triton.linear_lse_fwd import configuration, linear_lse_fwd, offset_blocks, row_offsets
from mopo_kernels.backends.triton.logits_bwd import logits_bwd_
from mopo_kernels.backends.triton.lse_fwd import lse_fwd
from mopo_kernels.backends.triton.mark_target import mark_target_
from mopo_kernels.backends.triton.pair_loss_bwd import pair_loss_bwd
from mopo_kernels.backends.triton.pair_loss_fwd import pair_loss_fwd
from mopo_kernels.backends.triton.row_offset import row_offset
from mopo_kernels.backends.triton.row_statistics import row_statistics
from mopo_kernels.backends.triton.scale_rows import scale_rows
from mopo_kernels.backends.triton.segment_sum import segment_sum


class TritonBackend(TileBackend):
    # Maxima and sums of the blocks of a product.
    temporary_share = 1 / 16

    lse_fwd = staticmethod(lse_fwd)
    logits_bwd_ = staticmethod(logits_bwd_)
    row_offsets = staticmethod(row_offsets)
    offset_blocks = staticmethod(offset_blocks)
    row_offset = staticmethod(row_offset)
    linear_lse_fwd = staticmethod(linear_lse_fwd)
    mark_target_ = staticmethod(mark_target_)
    exp_logits_bwd_ = staticmethod(exp_logits_bwd_)
    segment_sum = staticmethod(segment_sum)

    def fuses(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float16)

    def row_block(self, dtype: torch.dtype) -> int:
        return configuration().block_r if self.fuses(dtype) else 1

    def check_values(self, values: CallValues) -> None:
        cu_seqlens = values.cu_seqlens
        if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
            super().check_values(CallValues(cu_seqlens=cu_seqlens, tokens=values.tokens))
            values = replace(values, cu_seqlens=None)
        tensors = (values.target, values.cu_seqlens, None if values.batch is None else values.batch.pairs)
        if all(x is None or x.device.type == "cpu" for x in tensors):
            super().check_values(values)
        else:
            check_values(values)

    def row_statistics(
        self,
        row_max: Tensor,
        sum_exp: Tensor,
        target_logit: Tensor,
        target: Tensor,
        logprob: Tensor,
        logsumexp: Tensor,
    ) -> None:
        if row_max.dtype != torch.float32:
            super().row_statistics(row_max, sum_exp, target_logit, target, logprob, logsumexp)
        else:
            row_statistics(row_max, sum_exp, target_logit, target, logprob, logsumexp)

    def scaled(self, x: Tensor, factor: Tensor, dtype: torch.dtype, overwrite: bool = False) -> Tensor:
        rows = x if x.dim() == 2 else x[None]
        if rows.stride(1) != 1 or (overwrite and dtype == x.dtype):
            return super().scaled(x, factor, dtype, overwrite)
        return scale_rows(rows, factor.reshape(-1).squeeze(0), dtype).view(x.shape)

    def pair_loss_bwd(self, logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> Tensor:
        if batch.options.loss_type == "cloning":
            return super().pair_loss_bwd(logprob, ref_logprob, batch)
        return pair_loss_bwd(logprob, ref_logprob, batch)

    def token_grad_logprob(
        self, logprob: Tensor, ref_logprob: Tensor, batch: PairBatch, cu_seqlens: Tensor, tokens: int
    ) -> Tensor:
        if batch.options.loss_type == "cloning":
            return super().token_grad_logprob(logprob, ref_logprob, batch, cu_seqlens, tokens)
        return pair_loss_bwd(logprob, ref_logprob, batch, cu_seqlens, tokens)

    def pair_loss_fwd(self, logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> naive.PairLoss:
        if batch.options.loss_type == "cloning" or batch.options.estimator == "closed_form":
            return super().pair_loss_fwd(logprob, ref_logprob, batch)
        return pair_loss_fwd(logprob, ref_logprob, batch)


BACKEND = TritonBackend()
