"""What a tile backend is: :class:`TileBackend`.

A *tile* is an (R, W) block of ``hidden @ weight.T`` (rows: scored tokens, columns: vocabulary entries ``start`` to
``start + W``). Every backend takes a tile of products, in the accumulation dtype (fp32, or fp64 for fp64 input), into
running statistics of the log-sum-exp (:class:`RowStats`) and turns it into its gradient in place. A backend that
*fuses* computes the products itself, for half precision input, and keeps a tile of exponentials instead; see
:meth:`TileBackend.linear_lse_fwd`. Chunking, the other products and the order of accumulation belong to
:mod:`mopo_kernels.fused`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopo_kernels import naive, naive_grad
from mopo_kernels.arguments import CallValues, LogitTransform, PairBatch

# A target that no tile holds, like every one below 0: the token is not scored. Its statistics mean nothing and its
# gradient is exactly 0.
NOT_SCORED = -1


class RowStats(NamedTuple):
    """Running statistics of rows, (R,) each: the largest logit, or an offset near it, ``sum exp(z - row_max)``, and the
    logit of the target."""

    row_max: Tensor
    sum_exp: Tensor
    target_logit: Tensor


class TileBackend:
    """Tile work. ``tile`` (R, W), ``bias`` (W,) or None, ``target`` (R,) int64 in 0 .. V - 1, or below 0 where
    the token is not scored; the rest (R,)."""

    # Temporaries beside a tile, as a share of it; they count against the buffer. One row always may be.
    temporary_share: float = 0.0

    def check_values(self, values: CallValues) -> None:
        """Raise ValueError for wrong values on the host; on a device fail an assert, for which the host does not
        wait."""
        values.check()

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
        """Fold the tile's logits z into ``row_max``, ``sum_exp = sum exp(z - row_max)`` and, where the target lies in
        the tile, ``target_logit = z[target]``. The tile is left as it was. First call: row_max -inf, sum_exp 0."""
        raise NotImplementedError

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
        """Overwrite the tile with ``grad_logprob * d logprob / d product``, i.e. with
        ``grad_logprob * (onehot(target) - exp(z - logsumexp)) * dz/dproduct``; ``logsumexp`` is in fp64, and
        ``grad_logprob`` None stands for 1. Zeros where the token is not scored. See eq. (33) of docs/method.md."""
        raise NotImplementedError

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
        """``marked`` (W,) bool: the columns of products in which a row's logit is not below its ``least`` (R,), in the
        tile's dtype, or is not a number, or that are a row's target. The tile is left as it was."""
        raise NotImplementedError

    def product_scratch(self, dtype: torch.dtype, available: int) -> int:
        """Bytes of working memory that :meth:`product_` will take, of those available, for factors of this half
        precision dtype on the CPU; 0 if it is not to be used and factors are converted to fp32: PyTorch's own products
        of half precision factors only give half precision results there."""
        return 0

    def product_(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool, scratch_bytes: int | None = None) -> None:
        """``out (M, N) = a @ b``, added to it with ``accumulate``: out fp32, b (K, N) in half precision, a (M, K) in
        the same or in fp32, which is then rounded to it."""
        raise NotImplementedError

    def fuses(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`linear_lse_fwd` and :meth:`exp_logits_bwd_` take input of this dtype."""
        return False

    def row_block(self, dtype: torch.dtype) -> int:
        """Rows of this dtype that the products take at a time: a chunk of a multiple wastes none."""
        return 1

    def row_offsets(self, dtype: torch.dtype) -> bool:
        """Whether a fused tile of this dtype has one offset a row, which :meth:`row_offset` chooses, and is turned into
        its gradient by :meth:`mark_target_`; otherwise each block of it has its own, and
        :meth:`exp_logits_bwd_` follows."""
        return False

    def offset_blocks(self, columns: int) -> int:
        """Blocks of the vocabulary, each with its own offset, in a fused tile of that many columns."""
        raise NotImplementedError

    def row_offset(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, start: int, transform: LogitTransform
    ) -> RowStats:
        """The statistics of rows of ``hidden (R, H) @ weight (W, H).T`` before the first tile, fp32: ``row_max`` finite
        and near the log-sum-exp, being the target's logit, or that of a row of the weight where the target lies
        elsewhere; the others 0."""
        raise NotImplementedError

    def linear_lse_fwd(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        row_max: Tensor,
        sum_exp: Tensor,
        target_logit: Tensor,
        exp_logits: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        """:meth:`lse_fwd` of ``hidden (R, H) @ weight (W, H).T`` without the products ever being stored. With
        ``exp_logits`` (R, W) in the input's dtype ``exp(z - offset)`` is left in them: a logit rounded to bf16 is off
        by up to 1/256 of itself, its exponential so stored by 1/256 of itself.

        With :meth:`row_offsets` the offsets are ``row_max``, from :meth:`row_offset` before the first call, and no
        maxima: only where a total would be too large or too small for them, a row takes the maximum after all.
        Exponentials are then 0 where the token is not scored. Otherwise they are ``offsets`` (blocks, R) fp32,
        written."""
        raise NotImplementedError

    def row_statistics(
        self,
        row_max: Tensor,
        sum_exp: Tensor,
        target_logit: Tensor,
        target: Tensor,
        logprob: Tensor,
        logsumexp: Tensor,
    ) -> None:
        """Write the targets' log-probabilities, 0 where not scored, and the log-sum-exp in fp64, since its rounding
        would tilt the gradient of the whole row."""
        # Not target_logit - logsumexp: the difference to row_max is small, so it rounds less.
        logprob.copy_(((target_logit - row_max) - torch.log(sum_exp)).where(target >= 0, 0))
        logsumexp.copy_(row_max.double() + torch.log(sum_exp.double()))

    def mark_target_(
        self,
        exp_logits: Tensor,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        offset: Tensor,
        logsumexp: Tensor,
        logprob: Tensor,
        scale: Tensor,
    ) -> None:
        """Write to what :meth:`linear_lse_fwd` left relative to offsets (R,) the elements at the targets, and ``scale``
        (R,), so that ``scale * exp_logits`` is ``d logprob / d product``; with a softcap every element changes. See
        eq. (38) of docs/method.md."""
        raise NotImplementedError

    def exp_logits_bwd_(
        self,
        exp_logits: Tensor,
        offsets: Tensor,
        target: Tensor,
        start: int,
        transform: LogitTransform,
        logsumexp: Tensor,
        logprob: Tensor,
        grad_logprob: Tensor | None,
    ) -> None:
        """:meth:`logits_bwd_` of what :meth:`linear_lse_fwd` left relative to ``offsets`` (blocks, R), in place;
        ``logprob`` is the target's, in fp32. See eq. (38) of docs/method.md."""
        raise NotImplementedError

    def scaled(self, x: Tensor, factor: Tensor, dtype: torch.dtype, overwrite: bool = False) -> Tensor:
        """``x * factor`` in ``dtype``, for x (R, C) and factor () or (R, 1), or x (R,) and factor (); with
        ``overwrite`` nobody looks at x any more."""
        return (x.mul_(factor) if overwrite else x * factor).to(dtype)

    def segment_sum(self, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Sums over packed sequences, in a fixed order: (N,), (S + 1,) -> (S,)."""
        return naive.segment_sum(value, cu_seqlens)

    def pair_loss_bwd(self, logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> Tensor:
        """``g = d loss / d logprob``, (S,), in a fixed order: :func:`mopo_kernels.naive_grad.grad_logprob`."""
        return naive_grad.grad_logprob(logprob, ref_logprob, batch)

    def token_grad_logprob(
        self, logprob: Tensor, ref_logprob: Tensor, batch: PairBatch, cu_seqlens: Tensor, tokens: int
    ) -> Tensor:
        """:meth:`pair_loss_bwd` of every token's sequence, (N,), N being ``tokens``."""
        return naive_grad.token_grad(self.pair_loss_bwd(logprob, ref_logprob, batch), cu_seqlens, tokens)

    def pair_loss_fwd(self, logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> naive.PairLoss:
        """The loss of sequences' log-probabilities (S,) and what is reported beside it, each in memory of its own:
        :func:`mopo_kernels.naive.mopo_loss`."""
        return naive.PairLoss(*(t.clone() for t in naive.mopo_loss(logprob, ref_logprob, **batch.keywords())))
