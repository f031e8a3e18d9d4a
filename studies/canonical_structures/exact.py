"""The exact solution of each structure's default setting, and its front in the plane of worst slack and primary.

With K objectives a front has K - 1 dimensions; the plane shows the curve on it that the default thresholds lie on: all
thresholds raised or lowered together, ``b_k + shift``. For two objectives that is the whole front. A policy stands at
the worst slack ``min_k (P_k - b_k)`` over the objectives with a threshold, which is also how it is seen at a glance
whether it keeps all thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_kernels import tabular
from studies.canonical_structures.structures import Structure, make

Array = npt.NDArray[np.float64]

POINTS = 41
# The steep end of a front, where thresholds are about to become impossible, stops this much short of the very end.
_END = 1e-6


def worst_slack(structure: Structure, value: Array) -> Array:
    """``min_k (P_k - b_k)`` over objectives with a threshold: win rates (..., K) -> (...)."""
    held = list(structure.thresholds)
    return np.asarray((value[..., held] - np.array([structure.thresholds[k] for k in held])).min(-1))


def shifts(structure: Structure, points: int) -> Array:
    """Shifts of all thresholds together, from where none of them binds to where they can just be met, (G,)."""
    free = tabular.solve(structure.problem(thresholds={}))
    lowest = float(worst_slack(structure, free.value))
    room = 1.0 - max(structure.thresholds.values())
    highest = room + (_solve(structure, room).best_value or 0.0)
    # Denser towards the steep end.
    step = np.linspace(0.0, 1.0, points)
    return np.asarray(lowest + (highest - lowest) * (1.0 - _END) * (1.0 - (1.0 - step) ** 2))


def _shifted(structure: Structure, shift: float) -> dict[int, float]:
    return {k: float(np.clip(bound + shift, 0.0, 1.0)) for k, bound in structure.thresholds.items()}


def _solve(structure: Structure, shift: float) -> tabular.TabularSolution:
    return tabular.solve(structure.problem(thresholds=_shifted(structure, shift)))


def solve_structure(
    name: str, *, points: int = POINTS, progress: Callable[[int, int], object] = lambda done, total: None
) -> dict[str, Any]:
    """The exact optimum of a structure's default setting, its front and what any policy can attain without the KL term.

    Args:
        name: of the structure.
        points: points of the front.
        progress: called with (points done, points in all).

    Returns:
        "optimum", "hypervolume" with its "reference_point", and "rows": a point each, by rising shift, of "kind"
        "front" (the KL term counted) or "attainable" (the largest P_primary that any policy has there).
    """
    structure = make(name)
    problem = structure.problem()
    solution = tabular.solve(problem)
    grid = np.full((points, len(structure.objectives)), np.nan)
    shift = shifts(structure, points)
    for row, by in zip(grid, shift, strict=True):
        bounds = _shifted(structure, float(by))
        row[list(bounds)] = list(bounds.values())
    front = tabular.pareto_front(problem, grid, progress=progress)
    linear = tabular.linear_front(problem, grid)
    rows = [
        {
            "kind": "front",
            "shift": shift[g],
            "feasible": front.feasible[g],
            "nondominated": front.nondominated[g],
            "multiplier": front.multiplier[g],
            "value": front.value[g],
            "kl": front.kl[g],
            "primal": front.primal[g],
            "worst_slack": worst_slack(structure, front.value[g]),
        }
        for g in range(points)
    ]
    rows += [
        {"kind": "attainable", "value": value, "worst_slack": worst_slack(structure, value)}
        for value, vertex in zip(linear.value, linear.vertex, strict=True)
        if not vertex
    ]
    return {
        "title": structure.title,
        "description": structure.description,
        "objectives": structure.objectives,
        "primary": structure.primary,
        "prompts": structure.behaviour.shape[0],
        "responses": structure.behaviour.shape[1],
        "restricted": structure.features is not None,
        "tau": structure.tau,
        "thresholds": structure.thresholds,
        "optimum": {
            "multiplier": solution.multiplier,
            "value": solution.value,
            "kl": solution.kl,
            "primal": solution.primal,
            "kkt_residual": solution.kkt_residual,
            "gap": solution.gap,
        },
        "vertices": int(linear.vertex.sum()),
        "reference_point": front.reference_point,
        "hypervolume": front.hypervolume,
        "rows": rows,
    }
