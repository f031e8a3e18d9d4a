"""What a batch says about the policy, as sums that merge over micro-batches, ranks and steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mopo_kernels.reference import MAX_LOG_IMPORTANCE

_SCALARS = (
    "loss",  # the loss of the batch, as returned
    "items",  # what the loss is a mean of: sum of pair weights, or responses for cloning
    "margin",  # sum a sign(T) h
    "margin_weight",  # sum a over pairs with T != 0
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


@dataclass(frozen=True)
class Statistics:
    """The layout of the vector of sums: 2 K + 13 numbers in fp64.

    Args:
        objectives: names of the K objectives.
        scalars: names of the other sums, in their order.
    """

    objectives: Sequence[str]
    scalars: ClassVar[tuple[str, ...]] = _SCALARS

    @property
    def size(self) -> int:
        """Length of the vector."""
        return 2 * len(self.objectives) + len(self.scalars)

    def pack(self, value: Tensor, labelled: Tensor, scalars: dict[str, Tensor]) -> Tensor:
        """The vector of one batch: value (K,), NaN where labelled (K,) is 0, and every scalar."""
        mass = double(labelled)
        parts = [torch.nan_to_num(double(value), nan=0.0) * mass, mass]
        return torch.cat([*parts, torch.stack([double(scalars[name]).reshape(()) for name in self.scalars])])

    def satisfaction(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """``(value (K,), labelled (K,))`` of the sums: value NaN where nothing is labelled."""
        count = len(self.objectives)
        return sums[:count] / sums[count : 2 * count], sums[count : 2 * count]

    def scalar(self, sums: Tensor, name: str) -> float:
        """One of the sums by name."""
        return float(sums[2 * len(self.objectives) + self.scalars.index(name)])

    def summary(self, sums: Tensor) -> dict[str, float]:
        """Satisfaction per objective, margin (nats), both KL estimates (nats) and the sums' effective sample size.

        The KL of the policy to a reference is estimated on the data, which the first reference (or a policy near it)
        wrote: it is the KL between the two as distributions over the responses at hand, each weighted by its ratio to
        the first reference and normalised. With w = exp(r) that is ``sum w r / sum w - log(sum w / S)`` for the first
        reference and ``sum w r' / sum w - log(sum w / sum exp(r - r'))`` for the current one. It is never negative and
        exact as S grows, and for the first reference at most log S: read it as a lower bound once the effective sample
        size is small.
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
        importance, lagged = self.scalar(sums, "importance"), self.scalar(sums, "lagged")
        if importance > 0 and lagged > 0:
            for name, key, total in (("kl", "importance_current", lagged), ("kl_first", "importance_first", responses)):
                mean_log = self.scalar(sums, key) / importance
                result[name] = max(0.0, mean_log - math.log(importance / total))
        if square := self.scalar(sums, "ratio_square"):
            result["effective_sample_size"] = self.scalar(sums, "ratio") ** 2 / square
        return result


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
