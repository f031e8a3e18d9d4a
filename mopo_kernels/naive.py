"""Every equation of the library, once, in plain PyTorch.

These functions materialise everything and work in any floating dtype; in fp64 they are the oracle that every fast path
is held against. They import nothing of ours and check nothing: arguments are checked in :mod:`mopo_kernels.functional`.
docs/method.md derives the equations and numbers them.

Dimension letters: N tokens, H hidden, V vocabulary, S sequences, P pairs, K objectives. Log-probabilities are in nats.
Source of the method: Agnihotri, Jain, Ramachandran, Wen, "Multi-Objective Preference Optimization", arXiv 2505.10892.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOSS_TYPES = ("regression", "cloning", "sigmoid")
ESTIMATORS = ("pair", "snis", "closed_form")

# exp(60) = 1.1e26 leaves room in fp32 for sums and squares of importance weights (largest fp32 is 3.4e38 only for the
# weight itself; the squares are taken after dividing by the largest weight), and exp(-60) stays above its smallest.
MAX_LOG_IMPORTANCE = 60.0
# In fp64 the squares of such numbers are still above 0.
MIN_LOG_RATIO = -300.0


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float, temperature: float
) -> Tensor:
    """``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``, (N, V)."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """``log_softmax(head_logits)[target]``, 0 where ``target == ignore_index``: hidden (N, H), target (N,) -> (N,)."""
    logits = head_logits(hidden, weight, bias, softcap, logit_scale, temperature)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scored = target != ignore_index
    logprob = torch.log_softmax(logits, dim=-1).gather(-1, target.where(scored, 0)[:, None])[:, 0]
    return torch.where(scored, logprob, torch.zeros_like(logprob))


def scatter_sum(start: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """``start.index_add(0, index, value)``, but in the same order in every run on every device."""
    # CUDA's index_add adds in the order in which threads arrive, index_put sorts first; on the CPU it is the other way.
    if start.device.type == "cpu":
        return start.index_add(0, index, value)
    return start.index_put((index,), value, accumulate=True)


def segment_sum(value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[value[a:b].sum() for a, b in zip(cu_seqlens, cu_seqlens[1:])]``: value (N,), cu_seqlens (S + 1,) -> (S,)."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    segment_ids = torch.repeat_interleave(lengths, output_size=value.shape[0])
    return scatter_sum(value.new_zeros(lengths.shape[0]), segment_ids, value)


def pair_target(
    preference: Tensor, objective_weight: Tensor, tau: float | Tensor, label_rate: Tensor | None = None
) -> Tensor:
    """``T_p = (1 / tau) * sum_k w_k (z_pk - 1/2)``, a missing label (NaN) contributing 0: (P, K), (K,) -> (P,).

    With ``label_rate`` q_k the labels that exist count ``1 / q_k``, so that T is unbiased when labels are missing at
    random: eq. (17) and (20) of docs/method.md.
    """
    centred = torch.nan_to_num(preference - 0.5, nan=0.0)
    scale = objective_weight if label_rate is None else objective_weight / label_rate
    return (centred * scale).sum(dim=1) / tau


def regression_loss(margin: Tensor, target: Tensor) -> Tensor:
    """``(h_p - T_p)^2`` a pair, (P,): eq. (16) of docs/method.md. With K = 1 this is IPO."""
    return (margin - target).square()


def sigmoid_loss(
    margin: Tensor,
    preference: Tensor,
    objective_weight: Tensor,
    beta: float | Tensor,
    label_rate: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """``- sum_k w_k [z log sig(u) + (1 - z) log sig(-u)]`` with ``u = beta h - offset``, (P,): eq. (25) of
    docs/method.md.

    K = 1 is DPO, several fixed weights are linear scalarisation, the offset is MODPO's margin.
    """
    labelled = ~torch.isnan(preference)
    u = beta * margin if offset is None else beta * margin - offset
    z = torch.nan_to_num(preference, nan=0.5)
    scale = objective_weight if label_rate is None else objective_weight / label_rate
    term = z * F.logsigmoid(u)[:, None] + (1 - z) * F.logsigmoid(-u)[:, None]
    return -(term * labelled * scale).sum(dim=1)


def pair_loss(
    margin: Tensor,
    preference: Tensor,
    objective_weight: Tensor,
    tau: float | Tensor,
    loss_type: str,
    label_rate: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The loss of every pair, (P,): :func:`regression_loss` against :func:`pair_target`, or :func:`sigmoid_loss`."""
    if loss_type == "regression":
        return regression_loss(margin, pair_target(preference, objective_weight, tau, label_rate))
    return sigmoid_loss(margin, preference, objective_weight, tau, label_rate, offset)


def mean_label(preference: Tensor, pairs: Tensor, sequences: int) -> Tensor:
    """``sbar_k(s)``: the mean of a response's labels for each objective, 0.5 where it has none: (S, K).

    See eq. (21) of docs/method.md.
    """
    labelled = ~torch.isnan(preference)
    z = torch.nan_to_num(preference, nan=0.0)
    total = preference.new_zeros(sequences, preference.shape[1])
    total = scatter_sum(scatter_sum(total, pairs[:, 0], z), pairs[:, 1], (1 - z) * labelled)
    present = labelled.to(z.dtype)
    count = scatter_sum(scatter_sum(torch.zeros_like(total), pairs[:, 0], present), pairs[:, 1], present)
    return torch.where(count > 0, total / count.clamp(min=1), 0.5)


def prompt_number(prompt_index: Tensor) -> Tensor:
    """Any integers (S,) -> the same partition named 0, 1, 2, ...; unlike ``torch.unique``, without waiting for a device
    to count them."""
    ordered, order = prompt_index.sort(stable=True)
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(first).scatter(0, order, first.cumsum(0).to(first.dtype) - 1).long()


def policy_ratio(
    preference: Tensor,
    pairs: Tensor,
    objective_weight: Tensor,
    tau: float | Tensor,
    prompt_index: Tensor,
    max_ratio: float | None = None,
) -> Tensor:
    """``rho = n softmax(sum_k w_k sbar_k / tau)`` within each prompt's n responses, optionally capped, (S,) in fp64.

    Eq. (21) of docs/method.md; (23) there is its bias. In fp32 the ratios of all responses that an objective has labels
    of could become 0 together, and it would have no value; here they are at least ``exp(-300)``.
    """
    sequences = prompt_index.shape[0]
    score = (mean_label(preference, pairs, sequences) * objective_weight).sum(dim=1).double() / tau
    group = prompt_number(prompt_index)
    top = score.new_full((sequences,), -torch.inf).scatter_reduce(0, group, score, "amax")
    tilted = torch.exp(score - top[group])
    total = scatter_sum(torch.zeros_like(score), group, tilted)
    count = scatter_sum(torch.zeros_like(score), group, torch.ones_like(score))
    rho = count[group] * tilted / total[group]
    return rho.clamp(min=math.exp(MIN_LOG_RATIO), max=max_ratio)


def satisfaction(
    log_ratio: Tensor,
    pairs: Tensor,
    preference: Tensor,
    pair_weight: Tensor,
    estimator: str = "pair",
    rho: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The measured value of every objective and the weight with which it enters a wider average, both (K,).

    ``pair``         ``sum a m [sig(h) z + (1 - sig(h)) (1 - z)] / sum a m``
    ``snis``         ``sum a m [e^r_i z + e^r_j (1 - z)] / sum a m [e^r_i + e^r_j]``
    ``closed_form``  the same with ``rho`` in place of ``e^r``

    See eq. (26) and (28) of docs/method.md.

    The second result is the denominator, so values merge over micro-batches and ranks as
    ``sum(value * labelled) / sum(labelled)``. An objective without a label has value NaN and labelled 0.
    """
    terms = satisfaction_terms(log_ratio, pairs, preference, pair_weight, estimator, rho)
    value, total = (part.sum(dim=0) for part in terms)
    smallest = torch.finfo(log_ratio.dtype).tiny
    return (value / total).to(log_ratio), total.where(total == 0, total.clamp(min=smallest)).to(log_ratio)


def satisfaction_terms(
    log_ratio: Tensor,
    pairs: Tensor,
    preference: Tensor,
    pair_weight: Tensor,
    estimator: str = "pair",
    rho: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What every pair adds to numerator and denominator of :func:`satisfaction`, both (P, K); 0 without a label."""
    labelled = ~torch.isnan(preference)
    z = torch.nan_to_num(preference, nan=0.5)
    if estimator == "pair":
        chosen = torch.sigmoid(log_ratio[pairs[:, 0]] - log_ratio[pairs[:, 1]])[:, None]
        unchosen = 1 - chosen
    else:
        importance = torch.exp(log_ratio.clamp(-MAX_LOG_IMPORTANCE, MAX_LOG_IMPORTANCE)) if estimator == "snis" else rho
        assert importance is not None
        chosen, unchosen = importance[pairs[:, 0]][:, None], importance[pairs[:, 1]][:, None]
    mass = pair_weight[:, None] * labelled
    return mass * (chosen * z + unchosen * (1 - z)), mass * (chosen + unchosen)


def capped_log_ratio(log_ratio: Tensor) -> Tensor:
    """Log importance weights cut at ``logsumexp(log_ratio) - log(S) / 2``: (S,) -> (S,).

    So no response has more than ``1 / sqrt(S)`` of the weight that there was. The cut, and with it the bias, goes away
    as S grows (Ionides, "Truncated importance sampling", 2008): section 14 of docs/method.md has what it is worth.
    """
    if log_ratio.shape[0] == 0:
        return log_ratio
    return log_ratio.clamp(max=float(torch.logsumexp(log_ratio, dim=0)) - 0.5 * math.log(log_ratio.shape[0]))


def ratio_moments(value: Tensor, total: Tensor) -> Tensor:
    """Sums over the prompts of A, B, A^2, A B, B^2 and of 1 where B > 0: value A (X, K), total B (X, K) -> (6, K).

    They merge over batches and ranks by addition; :func:`ratio_estimate` takes them.
    """
    parts = (value, total, value.square(), value * total, total.square(), (total > 0).to(total.dtype))
    return torch.stack([part.sum(dim=0) for part in parts])


def ratio_estimate(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``v = sum A / sum B``, its standard error by prompt and the effective number of prompts, each (K,).

    ``standard error = sqrt(n / (n - 1) sum (A - v B)^2) / sum B``  the delta method's, prompts being independent
    ``effective number = (sum B)^2 / sum B^2``

    See eq. (39) of docs/method.md. The error is NaN for fewer than two prompts with labels, the value for none.

    Args:
        moments: (6, K) of :func:`ratio_moments`.
    """
    a, b, aa, ab, bb, count = moments
    value = a / b
    spread = (aa - 2 * value * ab + value.square() * bb).clamp(min=0)
    error = torch.where(count > 1, (spread * count / (count - 1)).sqrt() / b, torch.nan)
    return value, error, torch.where(bb > 0, b.square() / bb, torch.zeros_like(bb))


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2`` for ``w = exp(log_weight)``, computed without overflow: (S,) -> (), 0 for S = 0.

    See eq. (24) of docs/method.md.
    """
    if log_weight.shape[0] == 0:
        return log_weight.new_zeros(())
    w = torch.exp(log_weight - log_weight.amax())
    return w.sum().square() / w.square().sum()


class PairLoss(NamedTuple):
    """What :func:`mopo_loss` returns: see :class:`mopo_kernels.MOPOLossOutput` for the meaning of each field."""

    loss: Tensor
    log_ratio: Tensor
    margin: Tensor
    satisfaction: Tensor
    labelled: Tensor
    effective_sample_size: Tensor


def mopo_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    pairs: Tensor,
    preference: Tensor,
    objective_weight: Tensor,
    *,
    tau: float = 0.1,
    loss_type: str = "regression",
    pair_weight: Tensor | None = None,
    label_rate: Tensor | None = None,
    margin: Tensor | None = None,
    length: Tensor | None = None,
    prompt_index: Tensor | None = None,
    max_ratio: float | None = None,
    estimator: str = "pair",
    normalizer: float | Tensor | None = None,
) -> PairLoss:
    """The constrained preference loss of a batch, differentiable in ``logprob``: see :func:`mopo_kernels.mopo_loss`.

    ``regression``  ``sum_p a_p (h_p - T_p)^2 / sum_p a_p``
    ``cloning``     ``- sum_s rho_s l_s / S``, rho frozen (the paper's Eq. 7)
    ``sigmoid``     ``sum_p a_p sigmoid_loss_p / sum_p a_p``

    See eq. (16), (22) and (25) of docs/method.md.
    """
    if length is not None:
        logprob, ref_logprob = logprob / length, ref_logprob / length
    log_ratio = logprob - ref_logprob
    h = log_ratio[pairs[:, 0]] - log_ratio[pairs[:, 1]]
    weight = torch.ones_like(h) if pair_weight is None else pair_weight

    rho = None
    if loss_type == "cloning" or estimator == "closed_form":
        assert prompt_index is not None
        rho = policy_ratio(preference, pairs, objective_weight, tau, prompt_index, max_ratio)

    if loss_type == "cloning":
        assert rho is not None
        total, count = -(rho.to(logprob) * logprob).sum(), h.new_full((), float(logprob.shape[0]))
    else:
        per_pair = pair_loss(h, preference, objective_weight, tau, loss_type, label_rate, margin)
        total, count = (weight * per_pair).sum(), weight.sum()
    if normalizer is not None:
        count = normalizer.to(h) if isinstance(normalizer, Tensor) else h.new_full((), normalizer)
    # A batch without a pair (or whose pairs all weigh nothing) has loss 0 and gradient 0, not 0 / 0.
    loss = total / torch.where(count == 0, torch.ones_like(count), count)

    value, labelled = satisfaction(log_ratio.detach(), pairs, preference, weight, estimator, rho)
    ess = effective_sample_size(log_ratio.detach() if rho is None else torch.log(rho).to(h))
    return PairLoss(loss, log_ratio, h, value, labelled, ess)
