"""``g_s = d loss / d logprob_s``: the one number a sequence through which every token of it feels the loss.

The derivatives of the losses in :mod:`mopo_kernels.naive`, written out because they are needed inside a forward
pass, where autograd does not reach. Tests hold them against autograd of the reference in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopo_kernels import naive
from mopo_kernels.arguments import PairBatch


def pair_slope(
    margin: Tensor,
    preference: Tensor,
    objective_weight: Tensor,
    *,
    tau: float,
    loss_type: str,
    label_rate: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """``d loss_p / d h_p`` of a pair of weight 1, (P,): the slope in eq. (32) of docs/method.md."""
    if loss_type == "regression":
        return 2 * (margin - naive.pair_target(preference, objective_weight, tau, label_rate))
    u = tau * margin if offset is None else tau * margin - offset
    scale = objective_weight if label_rate is None else objective_weight / label_rate
    # z sig(-u) - (1 - z) sig(u) = z - sig(u)
    residual = torch.nan_to_num(torch.sigmoid(u)[:, None] - preference, nan=0.0)
    return tau * (residual * scale).sum(dim=1)


def sequence_grad(slope: Tensor, pairs: Tensor, sequences: int) -> Tensor:
    """``sum_p slope_p (1[s = i_p] - 1[s = j_p])``: slope (P,), pairs (P, 2) -> (S,).

    The sum in eq. (32) of docs/method.md.
    """
    g = slope.new_zeros(sequences)
    return naive.scatter_sum(naive.scatter_sum(g, pairs[:, 0], slope), pairs[:, 1], -slope)


def token_grad(grad: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """What reaches every token: the number of its sequence; grad (S,), cu_seqlens (S + 1,) -> (N,), N = ``tokens``."""
    token = torch.arange(tokens, device=grad.device, dtype=cu_seqlens.dtype)
    return grad[torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)]


def divisor(batch: PairBatch, sequences: int) -> Tensor:
    """What the loss is divided by, (): the normalizer, or else the pairs' weight, or S for "cloning"; 1 where that is
    0, as an empty batch has loss and gradient 0."""
    if batch.normalizer is not None:
        count = batch.normalizer
    elif batch.options.loss_type == "cloning":
        count = batch.objective_weight.new_full((), float(sequences))
    elif batch.pair_weight is None:
        count = batch.objective_weight.new_full((), float(batch.pairs.shape[0]))
    else:
        count = batch.pair_weight.sum()
    return torch.where(count == 0, 1.0, count)


def cloning_grad_logprob(batch: PairBatch, sequences: int) -> Tensor:
    """g for "cloning", (S,): minus the frozen ratio, whatever the policy: eq. (32) of docs/method.md."""
    assert batch.prompt_index is not None
    rho = naive.policy_ratio(
        batch.preference,
        batch.pairs,
        batch.objective_weight,
        batch.options.tau,
        batch.prompt_index,
        batch.options.max_ratio,
    )
    g = -rho.to(batch.objective_weight) / divisor(batch, sequences)
    return g if batch.length is None else g / batch.length


def grad_logprob(logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> Tensor:
    """``g = d loss / d logprob``, (S,). That of a sequence depends on those it is paired with alone.

    See eq. (31) of docs/method.md.
    """
    if batch.options.loss_type == "cloning":
        return cloning_grad_logprob(batch, logprob.shape[0])
    log_ratio = logprob - ref_logprob
    if batch.length is not None:
        log_ratio = log_ratio / batch.length
    i, j = batch.pairs.unbind(dim=1)
    slope = pair_slope(
        log_ratio[i] - log_ratio[j],
        batch.preference,
        batch.objective_weight,
        tau=batch.options.tau,
        loss_type=batch.options.loss_type,
        label_rate=batch.label_rate,
        offset=batch.margin,
    )
    if batch.pair_weight is not None:
        slope = slope * batch.pair_weight
    g = sequence_grad(slope, batch.pairs, logprob.shape[0]) / divisor(batch, logprob.shape[0])
    return g if batch.length is None else g / batch.length
