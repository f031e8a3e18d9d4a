"""Which thresholds of a problem matter, alone and together, and which cannot be met."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mopo_kernels.tabular.front import ParetoFront, linear_front, pareto_front
from mopo_kernels.tabular.named import NamedProblem
from mopo_kernels.tabular.problem import Array, TabularProblem
from mopo_kernels.tabular.solver import TabularSolution, solve

# Thresholds along one objective alone.
SWEEP_POINTS = 21
# The default grid combines at most so many thresholds, in at most so many points.
_TOGETHER, _DEFAULT_GRID = 3, 250
_LARGEST_GRID = 20_000
# How far along the way from the value without thresholds to the best attainable one the default grid goes: at the very
# end multipliers are infinite.
_REACH = 0.98
# Stands for tau = 0 where a linear programme is meant: a policy's value is then within tau * KL of the best.
_SMALL_TAU = 1e-4


@dataclasses.dataclass(frozen=True)
class ThresholdGrid:
    """Thresholds to solve a problem at.

    points: (G, K), NaN for none. flat: objectives left out, as no policy does better on them than the one without
    thresholds. alone: they are moved one at a time, being too many to combine by default.
    """

    points: Array
    flat: tuple[str, ...] = ()
    alone: bool = False


def best_values(named: NamedProblem) -> Array:
    """(K,) the largest value of each objective that any policy attains, as thresholds are compared with it."""
    problem = named.problem
    highest = np.where(problem.support, problem.win_rate, -np.inf).max(2) @ problem.prompt_weight
    if problem.robustness > 0:
        for k in named.others:
            shortfall = solve(named.with_bounds({k: 1.0})).best_value
            highest[k] = 1.0 + (shortfall or 0.0)
    return np.asarray(highest, dtype=np.float64)


def threshold_sweeps(
    named: NamedProblem, best: Array, progress: Callable[[int, int], object] | None = None
) -> dict[str, ParetoFront]:
    """For every secondary objective the front along its thresholds alone, the others' as chosen.

    From the value it has anyway to just below the most that the others leave it.

    Args:
        named: its chosen thresholds can be met together.
        best: from :func:`best_values`.
        progress: called after each point, as by :func:`mopo_kernels.tabular.pareto_front`.
    """
    sweeps = {}
    for k in named.others:
        fixed = {j: bound for j, bound in named.bounds.items() if j != k}
        low = float(solve(named.with_bounds(fixed | {k: 0.0})).constraint_value[k])
        most = _largest_value(named, k, fixed)
        high = low + _REACH * max((best[k] if most is None else most) - low, 0.0)
        points = np.full((SWEEP_POINTS, len(named.objectives)), np.nan)
        points[:, list(fixed)] = list(fixed.values())
        points[:, k] = np.linspace(low, min(high, 1.0), SWEEP_POINTS)
        sweeps[named.objectives[k]] = pareto_front(named.problem, points, progress=progress)
    return sweeps


def threshold_grid(
    named: NamedProblem,
    free: TabularSolution,
    best: Array,
    sweeps: Mapping[str, ParetoFront],
    count: int | None = None,
    ranges: Mapping[int, Array] | None = None,
) -> ThresholdGrid:
    """Every combination of ``ranges`` and, for the objectives that these leave out, of ``count`` points over the span
    that matters.

    Without a count the objectives left out have points only if there are no ranges, and are held at their chosen
    thresholds else.

    Args:
        named: the problem.
        free: its solution without thresholds.
        best: from :func:`best_values`.
        sweeps: from :func:`threshold_sweeps`.
        count: points along an objective; by default as many as keep the grid small.
        ranges: objective index -> its thresholds.

    Raises:
        ValueError: the grid would have more than 20000 points.
    """
    ranges = ranges or {}
    rest = [k for k in named.others if k not in ranges] if count is not None or not ranges else []
    low, high = _span(named, free, best, rest)
    flat = tuple(named.objectives[k] for k in rest if high[k] - low[k] < 1e-6)
    rest = [k for k in rest if named.objectives[k] not in flat]
    if count is None and len(rest) > _TOGETHER:
        return ThresholdGrid(np.concatenate([sweep.threshold for sweep in sweeps.values()]), flat, alone=True)
    if count is None:
        count = min(SWEEP_POINTS, int(_DEFAULT_GRID ** (1 / max(len(rest), 1)) + 1e-9))
    lines = {k: np.array([named.bounds.get(k, np.nan)]) for k in named.others}
    lines |= {k: np.linspace(low[k], high[k], count) for k in rest} | dict(ranges)
    size = math.prod(len(line) for line in lines.values())
    if size > _LARGEST_GRID:
        raise ValueError(f"grid: expected at most {_LARGEST_GRID} points in all; got {size}")
    points = np.full((size, len(named.objectives)), np.nan)
    points[:, list(lines)] = list(itertools.product(*lines.values()))
    return ThresholdGrid(points, flat)


def describe_conflict(named: NamedProblem, solution: TabularSolution, best: Array) -> str:
    """Which of the chosen thresholds cannot be met, alone or together, and what each objective reaches at best.

    Args:
        named: its chosen thresholds cannot be met.
        solution: at these thresholds, infeasible.
        best: from :func:`best_values`.
    """
    bounds = named.bounds

    def wanted(k: int) -> str:
        return f"{named.objectives[k]} >= {bounds[k]:g}"

    if alone := [k for k in bounds if bounds[k] > best[k]]:
        parts = [f"{wanted(k)} cannot be met: no policy attains more than {round_down(best[k])}" for k in alone]
        return "; ".join(parts)
    clashing = solution.conflict
    reached = []
    for k in clashing:
        most = _largest_value(named, k, {j: bounds[j] for j in clashing if j != k})
        beside = (
            "" if most is None else f"{round_down(most)} with the {'others' if len(clashing) > 2 else 'other'} met, "
        )
        reached.append(f"{named.objectives[k]} reaches at most {beside}{round_down(best[k])} alone")
    assert solution.best_value is not None
    lowered = math.ceil(-1e3 * solution.best_value) / 1e3
    return (
        f"{' and '.join(map(wanted, clashing))} cannot be met together: {'; '.join(reached)}; all thresholds can be "
        f"met once lowered by {lowered:.3f}"
    )


def win_rate_boundaries(named: NamedProblem) -> dict[str, Array]:
    """For every secondary objective the edge (F, 2) of the pairs (its, the primary's win rate) that policies attain."""
    problem = named.problem
    edges = {}
    for k in named.others:
        plane = TabularProblem(
            win_rate=problem.win_rate[[problem.primary, k]],
            reference=problem.reference,
            tau=problem.tau,
            prompt_weight=problem.prompt_weight,
        )
        edges[named.objectives[k]] = linear_front(plane).value[:, ::-1]
    return edges


def round_down(value: float) -> str:
    """Three decimals, rounded down: what is printed as attainable is."""
    return f"{math.floor(value * 1e3 + 1e-6) / 1e3:.3f}"


def _span(named: NamedProblem, free: TabularSolution, best: Array, objectives: Sequence[int]) -> tuple[Array, Array]:
    """(K,) ends of the thresholds that matter: below the lower no front point lies, above the upper none is attainable.

    The lower is the least value that an objective has when none of the others, or one of them, is asked for as much
    as the upper end.
    """
    floor = free.value.copy()
    if named.problem.robustness > 0:
        floor = solve(named.with_bounds(dict.fromkeys(named.others, 0.0))).constraint_value.copy()
    high = floor + _REACH * np.maximum(best - floor, 0.0)
    low = floor.copy()
    for k in objectives if len(objectives) > 1 else []:
        bounds = dict.fromkeys(named.others, 0.0) | {k: float(high[k])}
        low = np.minimum(low, solve(named.with_bounds(bounds)).constraint_value)
    return np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)


def _largest_value(named: NamedProblem, k: int, bounds: Mapping[int, float]) -> float | None:
    """Largest value of objective k with the thresholds ``bounds`` met; None where they cannot be, or it is not
    known."""
    problem = named.problem
    if problem.robustness > 0:
        # The worst case of k is not linear in the policy, and cannot be the maximised objective.
        return None
    found = solve(
        TabularProblem(
            win_rate=problem.win_rate,
            reference=problem.reference,
            tau=_SMALL_TAU,
            thresholds=bounds,
            primary=k,
            prompt_weight=problem.prompt_weight,
        )
    )
    return float(found.value[k]) if found.feasible else None
