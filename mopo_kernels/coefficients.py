"""``g_s = d loss / d logprob_s``: the one number a sequence through which every token of it feels the loss.

The derivatives of the losses in :mod:`mopo_kernels.reference`, written out because they are needed inside a forward
pass, where autograd does not reach. Tests hold them against autograd of the reference in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopo_kernels import reference


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
    """``d loss_p / d h_p`` of a pair of weight 1, (P,)."""
    if loss_type == "regression":
        return 2 * (margin - reference.pair_target(preference, objective_weight, tau, label_rate))
    u = tau * margin if offset is None else tau * margin - offset
    scale = objective_weight if label_rate is None else objective_weight / label_rate
    # z sig(-u) - (1 - z) sig(u) = z - sig(u)
    residual = torch.nan_to_num(torch.sigmoid(u)[:, None] - preference, nan=0.0)
    return tau * (residual * scale).sum(dim=1)


def sequence_coefficient(slope: Tensor, pairs: Tensor, sequences: int) -> Tensor:
    """``sum_p slope_p (1[s = i_p] - 1[s = j_p])``: slope (P,), pairs (P, 2) -> (S,)."""
    g = slope.new_zeros(sequences)
    return g.index_add_(0, pairs[:, 0], slope).index_add_(0, pairs[:, 1], slope, alpha=-1)


def safe_divisor(normalizer: Tensor) -> Tensor:
    """The normalizer, or 1 where it is 0: an empty batch has loss and gradient 0."""
    return torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
