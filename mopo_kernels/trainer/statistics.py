"""What a batch says about the policy, as sums that merge over micro-batches, ranks and steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopo_kernels.reference import MAX_LOG_IMPORTANCE

_SCALARS = (
    "loss",  # the loss of the batch, as returned
    "items",  # what the loss is a mean of: sum of pair weights, or responses for cloning
    "margin",  # sum a sign(T) h
    "margin_weight",  # sum a over pairs with T != 0
    "responses",
    "importance",  # sum w, w = exp(log-ratio to the current reference)
    "importance_log",  # sum w log w
    "importance_first",  # the same to the first reference
    "importance_first_log",
    "ratio",  # sum of the weights whose effective sample size is reported
    "ratio_square",
    "scored_tokens",
    "tokens",
)


@dataclass(frozen=True)
class Statistics:
    """The layout of the vector of sums: 2 K + 13 numbers in fp64.

    Args:
        objectives: names of the K objectives.
    """

    objectives: Sequence[str]

    @property
    def size(self) -> int:
        """Length of the vector."""
        return 2 * len(self.objectives) + len(_SCALARS)

    def pack(self, value: Tensor, labelled: Tensor, scalars: dict[str, Tensor]) -> Tensor:
        """The vector of one batch: value (K,), NaN where labelled (K,) is 0, and every scalar."""
        mass = double(labelled)
        parts = [torch.nan_to_num(double(value), nan=0.0) * mass, mass]
        return torch.cat([*parts, torch.stack([double(scalars[name]).reshape(()) for name in _SCALARS])])

    def satisfaction(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """``(value (K,), labelled (K,))`` of the sums: value NaN where nothing is labelled."""
        count = len(self.objectives)
        return sums[:count] / sums[count : 2 * count], sums[count : 2 * count]

    def scalar(self, sums: Tensor, name: str) -> float:
        """One of the sums by name."""
        return float(sums[2 * len(self.objectives) + _SCALARS.index(name)])

    def summary(self, sums: Tensor, steps: int = 1) -> dict[str, float]:
        """Satisfaction per objective, margin (nats), both KL estimates (nats) and effective sample size a step.

        The KL of the policy to a reference is estimated on the batch, whose responses the reference (or a policy near
        it) wrote, with self-normalised importance weights w = exp(r): ``sum w r / sum w - log(mean w)``. It is never
        negative, exact as the batch grows, and at most log of the number of responses: read it as a lower bound once
        the effective sample size is small.
        """
        values, labelled = self.satisfaction(sums)
        result = {
            f"satisfaction/{name}": float(value)
            for name, value, mass in zip(self.objectives, values, labelled, strict=True)
            if mass > 0
        }
        responses = self.scalar(sums, "responses")
        if weight := self.scalar(sums, "margin_weight"):
            result["margin"] = self.scalar(sums, "margin") / weight
        for name, key in (("kl", "importance"), ("kl_first", "importance_first")):
            total = self.scalar(sums, key)
            if responses and total > 0:
                mean_log = self.scalar(sums, f"{key}_log") / total
                result[name] = max(0.0, mean_log - math.log(total / responses))
        if square := self.scalar(sums, "ratio_square"):
            result["effective_sample_size"] = self.scalar(sums, "ratio") ** 2 / square / steps
        return result


def double(tensor: Tensor) -> Tensor:
    """``tensor`` in fp64, on the CPU if its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def importance_sums(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum w, sum w r)`` with w = exp(r), r cut at the estimators' limit: log_ratio (S,) -> two fp64 scalars."""
    r = double(log_ratio).clamp(max=MAX_LOG_IMPORTANCE)
    w = torch.exp(r)
    return w.sum(), (w * r).sum()
