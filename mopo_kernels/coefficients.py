"""``g_s = d loss / d logprob_s``: the one number a sequence through which every token of it feels the loss.

The derivatives of the losses in :mod:`mopo_kernels.reference`, written out because they are needed inside a forward
pass, where autograd does not reach. Tests hold them against autograd of the reference in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopo_kernels import reference


@dataclass(frozen=True)
class PairData:
    """What the loss needs besides log-probabilities: see :func:`mopo_kernels.mopo_loss`. All tensors but ``pairs`` and
    ``prompt_index`` are in the accumulation dtype already."""

    pairs: Tensor
    preference: Tensor
    objective_weight: Tensor
    tau: float
    loss_type: str
    pair_weight: Tensor | None
    label_rate: Tensor | None
    margin: Tensor | None
    length: Tensor | None
    prompt_index: Tensor | None
    max_ratio: float | None
    estimator: str
    normalizer: Tensor | None


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
        return 2 * (margin - reference.pair_target(preference, objective_weight, tau, label_rate))
    u = tau * margin if offset is None else tau * margin - offset
    scale = objective_weight if label_rate is None else objective_weight / label_rate
    # z sig(-u) - (1 - z) sig(u) = z - sig(u)
    residual = torch.nan_to_num(torch.sigmoid(u)[:, None] - preference, nan=0.0)
    return tau * (residual * scale).sum(dim=1)


def sequence_coefficient(slope: Tensor, pairs: Tensor, sequences: int) -> Tensor:
    """``sum_p slope_p (1[s = i_p] - 1[s = j_p])``: slope (P,), pairs (P, 2) -> (S,).

    The sum in eq. (32) of docs/method.md.
    """
    g = slope.new_zeros(sequences)
    return reference.scatter_sum(reference.scatter_sum(g, pairs[:, 0], slope), pairs[:, 1], -slope)


def divisor(data: PairData, sequences: int) -> Tensor:
    """What the loss is divided by, (): the normalizer, or else the pairs' weight, or S for "cloning"; 1 where that is
    0, as an empty batch has loss and gradient 0."""
    if data.normalizer is not None:
        count = data.normalizer
    elif data.loss_type == "cloning":
        count = data.objective_weight.new_full((), float(sequences))
    elif data.pair_weight is None:
        count = data.objective_weight.new_full((), float(data.pairs.shape[0]))
    else:
        count = data.pair_weight.sum()
    return torch.where(count == 0, 1.0, count)


def frozen_coefficient(data: PairData, sequences: int) -> Tensor:
    """g for "cloning", (S,): minus the frozen ratio, whatever the policy: eq. (32) of docs/method.md."""
    assert data.prompt_index is not None
    rho = reference.policy_ratio(
        data.preference, data.pairs, data.objective_weight, data.tau, data.prompt_index, data.max_ratio
    )
    g = -rho.to(data.objective_weight) / divisor(data, sequences)
    return g if data.length is None else g / data.length


def coefficient(logprob: Tensor, ref_logprob: Tensor, data: PairData) -> Tensor:
    """``g = d loss / d logprob``, (S,). That of a sequence depends on those it is paired with alone.

    See eq. (31) of docs/method.md.
    """
    if data.loss_type == "cloning":
        return frozen_coefficient(data, logprob.shape[0])
    log_ratio = logprob - ref_logprob
    if data.length is not None:
        log_ratio = log_ratio / data.length
    i, j = data.pairs.unbind(dim=1)
    slope = pair_slope(
        log_ratio[i] - log_ratio[j],
        data.preference,
        data.objective_weight,
        tau=data.tau,
        loss_type=data.loss_type,
        label_rate=data.label_rate,
        offset=data.margin,
    )
    if data.pair_weight is not None:
        slope = slope * data.pair_weight
    g = sequence_coefficient(slope, data.pairs, logprob.shape[0]) / divisor(data, logprob.shape[0])
    return g if data.length is None else g / data.length
