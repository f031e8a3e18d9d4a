"""What the labels themselves hold: the exact optimum under thresholds, and the unconstrained one turned down.

On the training responses alone, so this is what a policy could have that fitted every label and generalised to none;
it says how much the objectives conflict, not what a model reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mopo_kernels.data import PreferenceData, win_rates
from mopo_kernels.dual import solve_labels
from mopo_kernels.tabular import TabularProblem, solve

# Factors on the unconstrained solution's log-ratios at which the turned-down rival is looked for.
_FACTORS = np.linspace(0.0, 1.0, 201)


def tilted(problem: TabularProblem, score: np.ndarray) -> tuple[np.ndarray, float]:
    """Win rates (K,) and KL (nats) of the policy ``reference * exp(score)``, score (X, Y), normalised by prompt."""
    exponent = np.where(problem.support, score, -np.inf)
    weight = problem.reference * np.exp(exponent - exponent.max(1, keepdims=True))
    policy = weight / weight.sum(1, keepdims=True)
    value = np.einsum("x,xy,kxy->k", problem.prompt_weight, policy, problem.win_rate)
    ratio = np.where(policy > 0, policy / np.where(problem.reference > 0, problem.reference, 1.0), 1.0)
    kl = float(np.einsum("x,xy->", problem.prompt_weight, policy * np.log(ratio)))
    return value, kl


def label_solutions(
    data: PreferenceData, primary: str, thresholds: Mapping[str, float], tau: float, objectives: Sequence[str]
) -> dict[str, Any]:
    """What the labels of ``data`` allow at these thresholds.

    Returns:
        ``constrained``: win rates, KL and multipliers of the exact optimum; ``unconstrained``: without thresholds;
        ``turned_down``: its log-ratios times the largest factor in [0, 1] at which every threshold is kept (the labels'
        counterpart of a scaled adapter; factor 0 is the reference, which has 0.5 everywhere);
        ``multiplier`` by constrained objective.
    """
    rates = win_rates(data, objectives)
    solution = solve_labels(
        rates.win_rate,
        rates.reference,
        objectives,
        primary,
        thresholds,
        tau,
        estimator="snis",
        prompt_weight=rates.prompt_weight,
    )
    problem = TabularProblem(
        win_rate=rates.win_rate,
        reference=rates.reference,
        tau=tau,
        primary=list(objectives).index(primary),
        prompt_weight=rates.prompt_weight,
    )
    free = solve(problem)
    score = rates.win_rate[problem.primary] / tau

    def described(value: np.ndarray, kl: float, **more: Any) -> dict[str, Any]:
        return {"satisfaction": dict(zip(objectives, value.tolist(), strict=True)), "kl": kl, **more}

    bounds = [(list(objectives).index(name), bound) for name, bound in thresholds.items()]
    kept = 0.0
    for factor in _FACTORS:
        value, _ = tilted(problem, factor * score)
        if all(value[k] >= bound for k, bound in bounds):
            kept = float(factor)
    weight = np.array([1.0 if name == primary else solution.multiplier.get(name, 0.0) for name in objectives])
    return {
        "thresholds": dict(thresholds),
        "tau": tau,
        "prompts": len(rates.prompt_weight),
        "multiplier": solution.multiplier,
        "feasible": solution.feasible,
        "constrained": described(*tilted(problem, np.einsum("k,kxy->xy", weight, rates.win_rate) / tau)),
        "unconstrained": described(free.value, tilted(problem, score)[1]),
        "turned_down": described(*tilted(problem, kept * score), factor=kept),
    }
