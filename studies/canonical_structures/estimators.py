"""Which estimator the multipliers should listen to: what each of them tends to, and how noisy it is in small batches.

A threshold is on the scale of its estimator. On the scale of win rates (``snis``, where the reference wrote the data)
training tends to the exact optimum of the problem; on others (``pair``, ``closed_form``) the same number asks for
something else, and :func:`studies.canonical_structures.asymptotics.limit` says what. The noise is that of one batch's
measured satisfaction at the exact optimum, in units of the win rate: what a change of the objective's own multiplier
moves it by is divided out, so that scales can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mopo_kernels.naive import effective_sample_size, satisfaction
from mopo_kernels.tabular import solve
from studies.canonical_structures.asymptotics import limit, total_variation
from studies.canonical_structures.baselines import mean_interval
from studies.canonical_structures.exact import worst_slack
from studies.canonical_structures.learning import learn
from studies.canonical_structures.pairs import Pairs, sample_pairs
from studies.canonical_structures.structures import Structure, closed_form_policy

__all__ = ["BATCHES", "ESTIMATORS", "batch_noise", "measured", "study_estimators"]

Array = npt.NDArray[np.float64]

ESTIMATORS = ("snis", "pair", "closed_form")
COUNTS = (10_000, 100_000)
# Pairs in a batch: what a step of a language model has, and what a dual step could wait for.
BATCHES = (32, 256, 2048)
DRAWS = 200
# Enumerating the labels of a pair takes 2^K patterns.
_MOST_OBJECTIVES = 4
_STEP = 1e-3


def measured(structure: Structure, pairs: Pairs, policy: Array, estimator: str) -> tuple[Array, float]:
    """Satisfaction (K,) of a policy (X, Y) on labelled pairs, by its ratio to the reference, and the responses that the
    importance weights are worth, as a share of all."""
    data = pairs.tensors()
    ratio = torch.from_numpy(np.log(policy) - np.log(structure.reference)).reshape(-1)
    found = satisfaction(ratio[data.response], data.pairs, data.preference, data.pair_weight, estimator)[0]
    drawn = ratio[data.response[data.pairs].reshape(-1)]
    return found.numpy(), float(effective_sample_size(drawn)) / len(drawn)


def _scale(structure: Structure, weight: Array, objective: int, estimator: str) -> float:
    """How far an estimator's value moves per unit of the win rate when the objective's multiplier moves."""

    def at(multiplier: float) -> tuple[float, float]:
        moved = weight.copy()
        moved[objective] = multiplier
        policy = closed_form_policy(structure.reference, structure.win_rate, moved, structure.tau)
        ratio = np.log(policy) - np.log(structure.reference)
        chosen = 1 / (1 + np.exp(ratio[:, None, :] - ratio[:, :, None]))
        if estimator == "snis":
            chosen = np.broadcast_to(np.exp(ratio)[:, :, None], chosen.shape)
        mass = structure.prompt_weight[:, None, None] * structure.behaviour[:, :, None] * structure.behaviour[:, None]
        total = (mass * (chosen + chosen.swapaxes(1, 2))).sum()
        label = structure.preference[objective]
        value = (mass * (chosen * label + chosen.swapaxes(1, 2) * (1 - label))).sum() / total
        return float(value), float(structure.value(policy)[objective])

    low, high = at(max(0.0, weight[objective] - _STEP)), at(weight[objective] + _STEP)
    return (high[0] - low[0]) / (high[1] - low[1])


def batch_noise(
    structure: Structure, estimator: str, size: int, draws: int = DRAWS, seed: int = 0
) -> dict[str, float] | None:
    """The standard deviation of one batch's satisfaction at the exact optimum, in win-rate units, the largest over the
    objectives whose threshold binds, and the share of responses that its importance weights are worth; None where no
    threshold binds."""
    weight = structure.multiplier
    binding = [k for k in structure.thresholds if weight[k] > 0]
    if not binding:
        return None
    policy = closed_form_policy(structure.reference, structure.win_rate, weight, structure.tau)
    found, worth = [], []
    for draw in range(draws):
        value, share = measured(structure, sample_pairs(structure, size, seed + draw), policy, estimator)
        found.append(value[binding])
        worth.append(share)
    scale = np.array([_scale(structure, weight, k, estimator) for k in binding])
    return {
        "deviation": float((np.std(found, axis=0, ddof=1) / np.abs(scale)).max()),
        "sample_share": float(np.mean(worth)),
    }


def study_estimators(
    structures: Sequence[Structure],
    seeds: Sequence[int],
    *,
    counts: Sequence[int] = COUNTS,
    draws: int = DRAWS,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row for each instance of a structure and each estimator.

    Args:
        structures: instances of one structure.
        seeds: of the data sets that policies are learned from.
        counts: pairs in each.
        draws: batches for the noise.
        progress: called with (rows done, rows in all).

    Returns:
        Rows with "bias_tv", the total variation between the exact optimum and where training tends to; "slack" and
        "gap", the worst slack in win rates and what the optimum has more of the maximised quantity, both of that limit;
        "learned", by number of pairs the total variation of learned policies to the optimum and their worst slacks
        (not for "closed_form"); "noise" by batch size (see :func:`batch_noise`; not for "closed_form").
    """
    rows: list[dict[str, Any]] = []
    kinds = [e for e in ESTIMATORS if e != "closed_form" or len(structures[0].objectives) <= _MOST_OBJECTIVES]
    for instance, structure in enumerate(structures):
        exact = solve(structure.problem())
        for estimator in kinds:
            end = limit(structure, estimator=estimator)
            primal = end.value[structure.primary] - structure.tau * structure.kl(end.policy)
            row: dict[str, Any] = {
                "structure": structure.name,
                "instance": instance,
                "estimator": estimator,
                "binding": bool((np.delete(structure.multiplier, structure.primary) > 0).any()),
                "residual": end.residual,
                "bias_tv": total_variation(structure, end.policy, exact.policy),
                "slack": float(worst_slack(structure, end.value)),
                "gap": float(exact.primal - primal),
                "multiplier": end.multiplier.tolist(),
            }
            if estimator != "closed_form":
                row["learned"] = {
                    str(count): _learned(structure, exact.policy, estimator, count, seeds) for count in counts
                }
                row["noise"] = {str(size): batch_noise(structure, estimator, size, draws) for size in BATCHES}
            rows.append(row)
            progress(len(rows), len(kinds) * len(structures))
    return rows


def _learned(structure: Structure, optimum: Array, estimator: str, count: int, seeds: Sequence[int]) -> dict[str, Any]:
    learned = [
        learn(structure, sample_pairs(structure, count, seed), estimator=estimator, steps=1500, tolerance=1e-5)
        for seed in seeds
    ]
    return {
        "tv": mean_interval([total_variation(structure, each.policy, optimum) for each in learned]),
        "slack": mean_interval([float(worst_slack(structure, each.value)) for each in learned]),
    }
