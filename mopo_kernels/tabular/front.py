"""Pareto fronts of finite problems: with the KL term over a grid of thresholds, and without it by linear programming.

Non-dominated filtering and hypervolumes are moocore's; it is imported when first needed and comes with
``pip install 'mopo-kernels[pareto]'``.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy.optimize import linprog
from scipy.spatial import ConvexHull

from mopo_kernels.tabular.problem import Array, BoolArray, IntArray, TabularProblem
from mopo_kernels.tabular.solver import solve

# Two points of a front whose coordinates agree to this many decimals are the same point: thresholds that do not bind
# give one optimum, up to rounding, and rounding must not make one copy dominate another.
_DECIMALS = 9
# Slopes of the edges of an attainable set that agree to this relative difference are one edge's.
_SAME_SLOPE = 1e-11
# Weighted win rates that agree to this much tie, and a vertex must be this far beyond a facet to be new.
_TIE = 1e-14
_BEYOND = 1e-10
# Policies of a block of weights are scored together in about this many cells.
_BLOCK_CELLS = 1 << 22
# The vertices of a front of more than two objectives: looked for at about so many weights at first, and on a hull's
# facets only for so many objectives and vertices.
_FIRST_WEIGHTS = 300
_HULL_OBJECTIVES = 4
_HULL_VERTICES = 2000


def _moocore() -> ModuleType:
    try:
        return importlib.import_module("moocore")
    except ModuleNotFoundError as error:
        if error.name != "moocore":
            raise
        raise ModuleNotFoundError(
            "hypervolumes and non-dominated points need moocore: pip install 'mopo-kernels[pareto]'", name="moocore"
        ) from error


def _points(points: npt.ArrayLike) -> Array:
    array = np.ascontiguousarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"points: expected shape (any, K), one objective a column; got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"points: expected a finite number; got {array[~np.isfinite(array)][0]}")
    return array


def nondominated(points: npt.ArrayLike) -> BoolArray:
    """Which points no other point dominates, every objective being maximised.

    A point dominates another when it is at least as large in every objective and larger in one, so copies of one point
    do not dominate each other.

    Args:
        points: (F, K) finite values, one point a row.

    Returns:
        (F,) mask.

    Raises:
        ValueError: ``points`` has the wrong shape or is not finite.
        ModuleNotFoundError: moocore is not installed.
    """
    array = _points(points)
    moocore = _moocore()
    if len(array) == 0:
        return np.zeros(0, dtype=np.bool_)
    if array.shape[1] == 1:
        return np.asarray(array[:, 0] == array.max())
    return np.asarray(moocore.is_nondominated(array, maximise=True, keep_weakly=True), dtype=np.bool_)


def hypervolume(points: npt.ArrayLike, reference_point: npt.ArrayLike) -> float:
    """Volume of what lies below some point and above ``reference_point``, every objective being maximised.

    Args:
        points: (F, K) finite values, one point a row; points that are not above ``reference_point`` in every objective
            add nothing, and no points have volume 0.
        reference_point: (K,) finite values.

    Raises:
        ValueError: a shape is wrong or a value is not finite.
        ModuleNotFoundError: moocore is not installed.
    """
    array, origin = _points(points), np.asarray(reference_point, dtype=np.float64)
    if origin.shape != (array.shape[1],) or not np.isfinite(origin).all():
        raise ValueError(f"reference_point: expected {array.shape[1]} finite values; got {origin.tolist()}")
    moocore = _moocore()
    above = array[(array > origin).all(1)]
    if len(above) == 0:
        return 0.0
    if array.shape[1] == 1:
        return float((above - origin).max())
    return float(moocore.hypervolume(above, ref=origin, maximise=True))


@dataclasses.dataclass(frozen=True)
class ParetoFront:
    """The exact optima of a problem over G settings of its thresholds.

    Attributes:
        threshold: (G, K) thresholds, NaN where an objective has none.
        multiplier: (G, K) 1 for the primary and the dual variable of every threshold; NaN rows where infeasible.
        value: (G, K) win rates P_k; NaN rows where infeasible.
        kl: (G,) E_x KL(policy || reference), nats; NaN where infeasible.
        primal: (G,) what is maximised, P_primary - tau * kl; NaN where infeasible.
        feasible: (G,) whether the thresholds can be met together.
        nondominated: (G,) feasible points that no other dominates in (primal, every other P_k). Points that agree to
            1e-9 do not dominate each other.
        best_value: (G,) NaN where feasible, else the largest attainable worst slack ``min_k (P_k - b_k)``, < 0.
        reference_point: (K,) what ``hypervolume`` is measured from.
        hypervolume: of the points (primal, every other P_k), primal in the primary's place, above ``reference_point``.
    """

    threshold: Array
    multiplier: Array
    value: Array
    kl: Array
    primal: Array
    feasible: BoolArray
    nondominated: BoolArray
    best_value: Array
    reference_point: Array
    hypervolume: float


def _thresholds(problem: TabularProblem, grid: Mapping[int, Sequence[float] | Array] | npt.ArrayLike) -> Array:
    """The grid as an array (G, K), NaN where an objective has no threshold."""
    objectives = len(problem.win_rate)
    if isinstance(grid, Mapping):
        axes = {**{k: [bound] for k, bound in problem.thresholds.items()}, **grid}
        for k, bounds in axes.items():
            if not 0 <= k < objectives:
                raise ValueError(f"grid: expected objectives 0..{objectives - 1}; got one for {k}")
            if np.ndim(bounds) != 1 or len(bounds) == 0:
                raise ValueError(f"grid: expected a list of thresholds for objective {k}; got {bounds!r}")
        product = list(itertools.product(*axes.values()))
        threshold = np.full((len(product), objectives), np.nan)
        threshold[:, list(axes)] = product
    else:
        threshold = np.array(grid, dtype=np.float64)
        if threshold.ndim != 2 or threshold.shape[1] != objectives or len(threshold) == 0:
            raise ValueError(f"grid: expected shape (any, {objectives}); got {threshold.shape}")
    for row in threshold:
        problem.with_thresholds(_bounds(row))  # raises on what is out of range before anything is solved
    return threshold


def _bounds(row: Array) -> dict[int, float]:
    return {k: float(bound) for k, bound in enumerate(row) if not np.isnan(bound)}


def pareto_front(
    problem: TabularProblem,
    grid: Mapping[int, Sequence[float] | Array] | npt.ArrayLike,
    *,
    tolerance: float = 1e-10,
    reference_point: npt.ArrayLike | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ParetoFront:
    """Solve ``problem`` exactly over a grid of thresholds; every point starts from its nearest solved neighbour.

    Args:
        problem: the problem; its own thresholds hold wherever ``grid``, as a mapping, says nothing.
        grid: ``{objective: its thresholds}``, of which every combination is solved, the last objective's changing
            first; or a (G, K) array of the thresholds themselves, NaN for none.
        tolerance: of :func:`solve`.
        reference_point: (K,) what the hypervolume is measured from, on the scale of (primal, every other P_k); by
            default the lowest win rates that any policy has, which depend on neither the grid nor tau.
        progress: called with (points solved, points in all) after every point.

    Raises:
        ValueError: ``grid``, ``tolerance`` or ``reference_point`` is out of range or has the wrong shape.
        ArithmeticError: a robust problem could not be solved.
        ModuleNotFoundError: moocore is not installed.
    """
    threshold = _thresholds(problem, grid)
    count, objectives = threshold.shape
    _moocore()  # a missing package shows before the work, not after it
    if reference_point is None:
        lowest = np.where(problem.support, problem.win_rate, np.inf).min(2) @ problem.prompt_weight
        origin = np.asarray(lowest, dtype=np.float64)
    else:
        origin = np.array(reference_point, dtype=np.float64)
        if origin.shape != (objectives,) or not np.isfinite(origin).all():
            raise ValueError(f"reference_point: expected {objectives} finite values; got {origin.tolist()}")
    multiplier, value = np.full((count, objectives), np.nan), np.full((count, objectives), np.nan)
    kl, primal, best_value = np.full(count, np.nan), np.full(count, np.nan), np.full(count, np.nan)
    feasible = np.zeros(count, dtype=np.bool_)
    # An objective without a threshold counts as one with the threshold 0, which any policy meets.
    place = np.nan_to_num(threshold)
    for point, row in enumerate(threshold):
        start = None
        if feasible[:point].any():
            solved = np.flatnonzero(feasible[:point])
            start = multiplier[solved[np.abs(place[solved] - place[point]).sum(1).argmin()]]
        solution = solve(problem.with_thresholds(_bounds(row)), tolerance, start=start)
        feasible[point] = solution.feasible
        if solution.feasible:
            multiplier[point], value[point] = solution.multiplier, solution.value
            kl[point], primal[point] = solution.kl, solution.primal
        else:
            best_value[point] = np.nan if solution.best_value is None else solution.best_value
        if progress is not None:
            progress(point + 1, count)
    points = value.copy()
    points[:, problem.primary] = primal
    best = feasible.copy()
    best[feasible] = nondominated(np.round(points[feasible], _DECIMALS))
    return ParetoFront(
        threshold=threshold,
        multiplier=multiplier,
        value=value,
        kl=kl,
        primal=primal,
        feasible=feasible,
        nondominated=best,
        best_value=best_value,
        reference_point=origin,
        hypervolume=hypervolume(points[best], origin),
    )


@dataclasses.dataclass(frozen=True)
class LinearFront:
    """What any policy can attain: Pareto-optimal win rates (P_1 .. P_K) without the KL term.

    The attainable set is the Minkowski sum over prompts, weighted by their probabilities, of the convex hulls of the
    available responses' ``s(x, .)``: a polytope. Its Pareto-optimal vertices come first, by falling P_primary, each the
    value of a deterministic policy; then the optima of the grid of thresholds, in the grid's order.

    Attributes:
        weight: (F, K) supporting weights, >= 0 with sum 1: no policy has a larger ``weight @ P`` than this point. For
            two objectives a vertex's weights are halfway between its faces' normals: every other point has less.
        value: (F, K) win rates P_k.
        vertex: (F,) whether the point is a vertex.
        threshold: (F, K) thresholds of a grid's point, at which P_primary is the largest that any policy has; NaN for
            vertices, and where an objective has none.
        complete: whether all Pareto-optimal vertices are listed. Always so for two objectives; for more than four, or
            where there are thousands, those listed are some of them, the best for a lattice of weights included.
        unattainable: (U, K) thresholds of the grid that no policy meets.
    """

    weight: Array
    value: Array
    vertex: BoolArray
    threshold: Array
    complete: bool
    unattainable: Array
    _problem: TabularProblem = dataclasses.field(repr=False)
    _mixtures: tuple[Array, ...] = dataclasses.field(repr=False)

    def policy(self, index: int) -> Array:
        """A policy (X, Y) that attains point ``index``: deterministic for a vertex, else mixed in at most K prompts."""
        index = range(len(self.value))[index]
        if not self.vertex[index]:
            return self._mixtures[index - int(self.vertex.sum())].copy()
        policy = np.zeros_like(self._problem.reference)
        choice = next(_best_responses(self._problem, self.weight[index : index + 1]))[0]
        policy[np.arange(len(policy)), choice] = 1.0
        return policy


def linear_front(
    problem: TabularProblem, grid: Mapping[int, Sequence[float] | Array] | npt.ArrayLike | None = None
) -> LinearFront:
    """The exact front without the KL term (tau and robustness are not used): what any policy can attain.

    For two objectives the vertices are found in closed form: the edges of the prompts' own hulls, in the order of their
    slopes, are the edges of the sum. For three and four, new vertices are looked for on every facet of the hull of the
    known ones until there are none. The points of ``grid`` maximise P_primary subject to their thresholds, then, where
    that leaves a choice, the sum of the other win rates: linear programmes (HiGHS).

    Args:
        problem: the problem. Its own thresholds hold at the points of ``grid``, as of :func:`pareto_front`, only.
        grid: thresholds, as :func:`pareto_front` takes them; none by default.

    Raises:
        ValueError: ``grid`` is out of range or has the wrong shape.
    """
    objectives = len(problem.win_rate)
    if objectives == 2:
        weight, value = _vertices_of_two(problem)
        complete = True
    else:
        weight, value, complete = _vertices_by_hull(problem)
    order = np.argsort(-value[:, problem.primary], kind="stable")
    weight, value = weight[order], value[order]
    points: list[tuple[Array, Array, Array, Array]] = []
    unattainable = []
    if grid is not None:
        programme = _Programme(problem)
        for row in _thresholds(problem, grid):
            found = programme.best(row)
            if found is None:
                unattainable.append(row)
            else:
                points.append((row, *found))
    count = len(weight)
    empty = np.zeros((0, objectives))
    return LinearFront(
        weight=np.concatenate([weight, [point[1] for point in points] or empty]),
        value=np.concatenate([value, [point[2] for point in points] or empty]),
        vertex=np.arange(count + len(points)) < count,
        threshold=np.concatenate([np.full((count, objectives), np.nan), [point[0] for point in points] or empty]),
        complete=complete,
        unattainable=np.array(unattainable).reshape(-1, objectives),
        _problem=problem,
        _mixtures=tuple(point[3] for point in points),
    )


def _best_responses(problem: TabularProblem, weight: Array) -> Iterator[IntArray]:
    """Best responses to the weights (W, K), in blocks (w, X) of them.

    Ties go to the larger of another weighted sum, the same for every prompt and of positive weights. What is chosen is
    then a vertex of the attainable set however many prompts tie, and Pareto-optimal even where a weight is zero.
    """
    objectives, prompts, responses = problem.win_rate.shape
    rate = problem.win_rate.reshape(objectives, -1)
    second = (np.sqrt(np.arange(objectives) + 2.0) @ rate).reshape(prompts, responses)
    step = max(1, _BLOCK_CELLS // (prompts * responses))
    for start in range(0, len(weight), step):
        score = (weight[start : start + step] @ rate).reshape(-1, prompts, responses)
        score[:, ~problem.support] = -np.inf
        tied = score >= score.max(2, keepdims=True) - _TIE
        yield np.where(tied, second, -np.inf).argmax(2)


def _vertices_at(problem: TabularProblem, weight: Array) -> Array:
    """Win rates (W, K) of the best responses to weights (W, K)."""
    prompt = np.arange(len(problem.prompt_weight))
    blocks = [
        problem.win_rate[:, prompt, choice] @ problem.prompt_weight for choice in _best_responses(problem, weight)
    ]
    return np.concatenate(blocks, 1).T


def _vertices_of_two(problem: TabularProblem) -> tuple[Array, Array]:
    """Weights (F, 2) and win rates (F, 2) of all Pareto-optimal vertices, from the largest P_0 to the largest P_1."""
    first, second = problem.win_rate
    # Along a prompt's responses by falling s_0, those whose s_1 is a record are its Pareto-optimal ones.
    order = np.lexsort((-second, -np.where(problem.support, first, -np.inf)), axis=1)
    across, up = np.take_along_axis(first, order, 1), np.take_along_axis(second, order, 1)
    available = np.take_along_axis(problem.support, order, 1)
    up = np.where(available, up, -np.inf)
    record = np.maximum.accumulate(up, 1)
    keep = available.copy()
    keep[:, 1:] &= up[:, 1:] > record[:, :-1]
    start = np.stack([across[:, 0], up[:, 0]]) @ problem.prompt_weight
    slopes: list[float] = []
    edges: list[tuple[float, float]] = []
    for x in np.flatnonzero((keep.sum(1) > 1) & (problem.prompt_weight > 0)):
        hull = _upper_hull(across[x, keep[x]].tolist(), up[x, keep[x]].tolist())
        for (a, b), (c, d) in itertools.pairwise(hull):
            slopes.append((d - b) / (a - c))
            edges.append((problem.prompt_weight[x] * (c - a), problem.prompt_weight[x] * (d - b)))
    # The first edge is the one that gains the most P_1 for the P_0 it gives up; edges of one slope are one face.
    by_slope = np.argsort(-np.array(slopes))
    slope = np.array(slopes)[by_slope]
    path = start + np.concatenate([np.zeros((1, 2)), np.cumsum(np.array(edges).reshape(-1, 2)[by_slope], 0)])
    steeper = np.append(slope[1:], -1.0)[: len(slope)] < slope * (1 - _SAME_SLOPE)
    ends = np.flatnonzero(steeper)
    value = path[np.append(0, ends + 1)]
    # A face of slope r has the normal (r, 1); halfway between its faces' normals a vertex is the only optimum.
    faces = slope[ends]
    normal = np.concatenate([[[1.0, 0.0]], np.stack([faces / (1 + faces), 1 / (1 + faces)], 1), [[0.0, 1.0]]])
    return (normal[:-1] + normal[1:]) / 2, value


def _upper_hull(across: list[float], up: list[float]) -> list[tuple[float, float]]:
    """The concave chain over points of falling ``across`` and rising ``up``: the gain per loss falls along it."""
    hull: list[tuple[float, float]] = []
    for point in zip(across, up, strict=True):
        while len(hull) > 1:
            (a, b), (c, d) = hull[-2:]
            if (d - b) * (c - point[0]) > (point[1] - d) * (a - c):
                break
            hull.pop()
        hull.append(point)
    return hull


def _lattice(objectives: int) -> Array:
    """Weights (W, K) >= 0 with sum 1, multiples of the largest 1/n for which there are at most some hundreds."""
    parts = 1
    while math.comb(parts + objectives, objectives - 1) <= _FIRST_WEIGHTS:
        parts += 1
    bars = np.array(list(itertools.combinations(range(parts + objectives - 1), objectives - 1)))
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), parts + objectives - 1)], 1)
    return (np.diff(edges, axis=1) - 1) / parts


def _distinct(weight: Array, value: Array) -> tuple[Array, Array]:
    """One row of each point, the first."""
    _, index = np.unique(np.round(value, _DECIMALS), axis=0, return_index=True)
    index.sort()
    return weight[index], value[index]


def _vertices_by_hull(problem: TabularProblem) -> tuple[Array, Array, bool]:
    """Weights (F, K) and win rates (F, K) of Pareto-optimal vertices, and whether these are all.

    The points that some attainable one dominates, down to a common floor, are a polytope of full dimension. Where all
    facets of the polytope below the known vertices support the attainable set there are no others; where one does not,
    the best response to its normal is new.
    """
    objectives = len(problem.win_rate)
    weight = _lattice(objectives) if objectives > 1 else np.ones((1, 1))
    weight, value = _distinct(weight, _vertices_at(problem, weight))
    if objectives == 1:
        return weight, value, True
    if objectives > _HULL_OBJECTIVES:
        return weight, value, False
    floor = value.min(0) - 1
    asked: set[bytes] = set()
    while len(value) <= _HULL_VERTICES:
        lowered = [np.where(mask, value, floor) for mask in itertools.product([True, False], repeat=objectives)]
        facets = ConvexHull(np.unique(np.concatenate(lowered), axis=0)).equations[:, :-1]
        normal = np.maximum(facets[facets.min(1) > -1e-9], 0.0)
        normal /= normal.sum(1, keepdims=True)
        fresh = np.array([key not in asked for key in map(_key, normal)])
        if not fresh.any():
            return weight, value, True
        normal = normal[fresh]
        asked.update(map(_key, normal))
        reply = _vertices_at(problem, normal)
        beyond = (normal * reply).sum(1) > (normal @ value.T).max(1) + _BEYOND
        if not beyond.any():
            return weight, value, True
        weight, value = _distinct(np.concatenate([weight, normal[beyond]]), np.concatenate([value, reply[beyond]]))
    return weight, value, False


def _key(row: Array) -> bytes:
    return np.round(row, _DECIMALS).tobytes()


class _Programme:
    """Linear programmes over all policies: the largest P_primary subject to thresholds."""

    def __init__(self, problem: TabularProblem) -> None:
        self.problem = problem
        self.prompt, self.response = np.nonzero(problem.support)
        cells = len(self.prompt)
        self.rate = problem.win_rate[:, self.prompt, self.response] * problem.prompt_weight[self.prompt]
        self.total = scipy.sparse.csr_array((np.ones(cells), (self.prompt, np.arange(cells))))

    def maximise(self, weight: Array, rows: Array, bounds: Array) -> tuple[Array, Array] | None:
        """The policy's cells that maximise ``weight @ P`` subject to ``rows @ P >= bounds``, and the dual variables."""
        found: Any = linprog(
            -weight @ self.rate,
            A_ub=-rows @ self.rate if len(rows) else None,
            b_ub=-bounds if len(rows) else None,
            A_eq=self.total,
            b_eq=np.ones(self.total.shape[0]),
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if found.status == 2:
            return None
        if found.status != 0:
            raise ArithmeticError(f"the linear programme was not solved: {found.message}")
        return found.x, np.maximum(-found.ineqlin.marginals, 0.0)

    def best(self, threshold: Array) -> tuple[Array, Array, Array] | None:
        """Supporting weights (K,), win rates (K,) and policy (X, Y) of the best point that meets ``threshold`` (K,)."""
        problem = self.problem
        bounded = ~np.isnan(threshold)
        unit = np.eye(len(threshold))
        first = unit[problem.primary]
        found = self.maximise(first, unit[bounded], threshold[bounded])
        if found is None:
            return None
        cells, multiplier = found
        weight = first.copy()
        weight[bounded] = multiplier
        if (weight <= 0).any():
            # Thresholds that do not bind leave a choice among the best policies: take one that nothing dominates.
            rows = np.concatenate([unit[bounded], first[None]])
            bounds = np.append(threshold[bounded], self.rate[problem.primary] @ cells - 1e-10)
            second = self.maximise(1 - first, rows, bounds)
            cells = cells if second is None else second[0]
        policy = np.zeros_like(problem.reference)
        policy[self.prompt, self.response] = np.maximum(cells, 0.0)
        policy /= policy.sum(1, keepdims=True)
        value = problem.value(policy)
        return weight / weight.sum(), value, policy
