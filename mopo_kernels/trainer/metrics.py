"""What a batch says about the policy, as sums that merge over micro-batches, ranks and steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mopo_kernels import naive
from mopo_kernels.naive import MAX_LOG_IMPORTANCE

_SCALARS = (
    "loss",  # the preference loss of the batch
    "reference_loss",  # the same of the current reference, whose log-ratios are 0; 0 for cloning
    "aux_loss",  # its part of the step's load-balancing loss, without the coefficient
    "items",  # what the loss is a mean of: sum of pair weights, or responses for cloning
    "margin",  # sum a sign(T) h
    "margin_weight",  # sum a over pairs with T != 0
    "preferred",  # sum a over pairs of which the primary objective prefers one response
    "chosen_reward",  # sum a tau r' over these, r' the log-ratio of the preferred one to the current reference
    "rejected_reward",
    "accuracy",  # sum a where the preferred one has the larger reward
    "chosen_logprob",  # sum a l
    "rejected_logprob",
    "responses",
    "importance",  # sum w, w = exp(r), r the policy's log-ratio to the first reference
    "importance_first",  # sum w r
    "importance_current",  # sum w r', r' the log-ratio to the current reference
    "lagged",  # sum exp(r - r'), the current reference's own weights
    "ratio",  # sum of the weights whose effective sample size is reported
    "ratio_square",
    "scored_tokens",
    "tokens",
)


_OF_PREFERRED = ("chosen_reward", "rejected_reward", "accuracy", "chosen_logprob", "rejected_logprob")


@dataclass(frozen=True)
class Statistics:
    """The layout of the vector of sums: 6 K + 21 numbers in fp64, the first 6 K those of ``naive.ratio_moments``.

    Args:
        objectives: names of the K objectives.
        scalars: names of the other sums, in their order.
    """

    objectives: Sequence[str]
    scalars: ClassVar[tuple[str, ...]] = _SCALARS

    @property
    def size(self) -> int:
        """Length of the vector."""
        return 6 * len(self.objectives) + len(self.scalars)

    def pack(self, moments: Tensor, scalars: dict[str, Tensor]) -> Tensor:
        """The vector of one batch: satisfaction's moments (6, K) over its prompts, and every scalar."""
        return torch.cat([moments.flatten(), torch.stack([double(scalars[name]).reshape(()) for name in self.scalars])])

    def satisfaction(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(value, standard error by prompt, effective number of prompts)``, each (K,): ``naive.ratio_estimate``.

        The value is NaN where nothing is labelled, the error where fewer than two prompts are.
        """
        return naive.ratio_estimate(sums[: 6 * len(self.objectives)].reshape(6, -1))

    def scalar(self, sums: Tensor, name: str) -> float:
        """One of the sums by name."""
        return float(sums[6 * len(self.objectives) + self.scalars.index(name)])

    def summary(self, sums: Tensor) -> dict[str, float]:
        """Satisfaction per objective with its standard error by prompt, margin (nats), R^2, both KL estimates (nats),
        the sums' effective sample size, and TRL's figures of preferred ("chosen") and other responses by its names.

        ``r_squared`` is ``1 - loss / loss of the reference``, eq. (44) of docs/method.md: the share of the pairs'
        targets that the policy explains (``regression``; McFadden's pseudo-R^2 for ``sigmoid``).

        The KL of the policy to a reference is estimated on the data, which the first reference (or a policy near it)
        wrote: it is the KL between the two as distributions over the responses at hand, each weighted by its ratio to
        the first reference and normalised. With w = exp(r) that is ``sum w r / sum w - log(sum w / S)`` for the first
        reference and ``sum w r' / sum w - log(sum w / sum exp(r - r'))`` for the current one. It is never negative and
        exact as S grows, and for the first reference at most log S: read it as a lower bound once the effective sample
        size is small.
        """
        result = {}
        for name, value, error in zip(
            self.objectives, *(part.tolist() for part in self.satisfaction(sums)[:2]), strict=True
        ):
            if not math.isnan(value):
                result[f"satisfaction/{name}"] = value
            if not math.isnan(error):
                result[f"standard_error/{name}"] = error
        responses = self.scalar(sums, "responses")
        if weight := self.scalar(sums, "margin_weight"):
            result["margin"] = self.scalar(sums, "margin") / weight
        if nothing := self.scalar(sums, "reference_loss"):
            result["r_squared"] = 1 - self.scalar(sums, "loss") / nothing
        result |= self._of_preferred(sums)
        importance, lagged = self.scalar(sums, "importance"), self.scalar(sums, "lagged")
        if importance > 0 and lagged > 0:
            for name, key, total in (("kl", "importance_current", lagged), ("kl_first", "importance_first", responses)):
                mean_log = self.scalar(sums, key) / importance
                result[name] = max(0.0, mean_log - math.log(importance / total))
        if square := self.scalar(sums, "ratio_square"):
            result["effective_sample_size"] = self.scalar(sums, "ratio") ** 2 / square
        return result

    def _of_preferred(self, sums: Tensor) -> dict[str, float]:
        """What TRL's DPOTrainer logs, of the pairs of which the primary objective prefers one response: the chosen one.

        Rewards are tau times the log-ratio to the current reference.
        """
        weight = self.scalar(sums, "preferred")
        if not weight:
            return {}
        mean = {name: self.scalar(sums, name) / weight for name in _OF_PREFERRED}
        return {
            "rewards/chosen": mean["chosen_reward"],
            "rewards/rejected": mean["rejected_reward"],
            "rewards/accuracies": mean["accuracy"],
            "rewards/margins": mean["chosen_reward"] - mean["rejected_reward"],
            "logps/chosen": mean["chosen_logprob"],
            "logps/rejected": mean["rejected_logprob"],
        }


def double(tensor: Tensor) -> Tensor:
    """``tensor`` in fp64, on the CPU if its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def importance_sums(first_ratio: Tensor, ratio: Tensor) -> dict[str, Tensor]:
    """The sums behind both KL estimates, log-ratios cut at the estimators' limit.

    Args:
        first_ratio: (S,) log-ratios of the policy to the first reference, nats.
        ratio: (S,) to the current reference.
    """
    r, current = double(first_ratio), double(ratio)
    w = torch.exp(r.clamp(max=MAX_LOG_IMPORTANCE))
    return {
        "importance": w.sum(),
        "importance_first": (w * r).sum(),
        "importance_current": (w * current).sum(),
        "lagged": torch.exp((r - current).clamp(max=MAX_LOG_IMPORTANCE)).sum(),
    }


def preferred_sums(
    log_ratio: Tensor, logprob: Tensor, pairs: Tensor, preference: Tensor, pair_weight: Tensor, tau: float
) -> dict[str, Tensor]:
    """The sums over pairs of which one objective prefers one response, for what TRL logs.

    Args:
        log_ratio, logprob: (S,) nats.
        pairs: (P, 2).
        preference: (P,) of that objective; NaN is no label.
        pair_weight: (P,).
        tau: of the rewards.
    """
    reward, logprob, weight = tau * double(log_ratio), double(logprob), double(pair_weight)
    preference, pairs = preference.to(reward.device), pairs.to(reward.device)
    # A comparison with NaN is false.
    first, second = preference > 0.5, preference < 0.5
    weight = weight.to(reward.device) * (first | second)
    chosen = torch.where(first, pairs[:, 0], pairs[:, 1])
    rejected = torch.where(first, pairs[:, 1], pairs[:, 0])
    return {
        "preferred": weight.sum(),
        "chosen_reward": (weight * reward[chosen]).sum(),
        "rejected_reward": (weight * reward[rejected]).sum(),
        "accuracy": (weight * (reward[chosen] > reward[rejected])).sum(),
        "chosen_logprob": (weight * logprob[chosen]).sum(),
        "rejected_logprob": (weight * logprob[rejected]).sum(),
    }


def satisfaction_moments(
    log_ratio: Tensor,
    pairs: Tensor,
    preference: Tensor,
    pair_weight: Tensor,
    prompt_index: Tensor,
    estimator: str,
    rho: Tensor | None,
) -> Tensor:
    """``naive.ratio_moments`` (6, K) in fp64 of a batch whose responses belong to the prompts ``prompt_index``
    (S,).

    The other arguments are those of ``naive.satisfaction``.
    """
    ratio = double(log_ratio)
    pairs, prompt_index = pairs.to(ratio.device), prompt_index.to(ratio.device)
    terms = naive.satisfaction_terms(
        ratio, pairs, double(preference), double(pair_weight), estimator, None if rho is None else double(rho)
    )
    # As many places as responses: how many prompts there are, only a wait for the device would tell.
    prompt = naive.prompt_number(prompt_index)[pairs[:, 0]]
    return naive.ratio_moments(
        *(naive.scatter_sum(part.new_zeros(len(ratio), part.shape[1]), prompt, part) for part in terms)
    )


class RunningMean:
    """Bias-corrected exponential means of named numbers, of which some may be missing in an update.

    Args:
        decay: share of the old value, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.sums: dict[str, list[float]] = {}

    def update(self, values: Mapping[str, float]) -> None:
        """Take in one more of each."""
        for name, value in values.items():
            total, weight = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = [
                self.decay * old + (1 - self.decay) * new for old, new in ((total, value), (weight, 1.0))
            ]

    @property
    def value(self) -> dict[str, float]:
        """Of every name seen so far."""
        return {name: total / weight for name, (total, weight) in self.sums.items()}
