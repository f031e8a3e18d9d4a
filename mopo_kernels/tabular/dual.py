"""The dual of a problem whose constraints are linear in the policy: its minimiser, and what is best when it has none.

    g(lambda) = tau * E_x log E_{y ~ reference} exp((s_primary + sum_k lambda_k s_k) / tau) - sum_k lambda_k b_k

is smooth and convex, with gradient ``P_k - b_k`` and Hessian ``Cov(s) / tau``. It has one variable per constraint
however large the problem is, so it is minimised by Newton steps, each of them an exact small quadratic programme over
``lambda >= 0`` within a trust region. Everything is in double precision and in log space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from scipy.optimize import linprog

from mopo_kernels.tabular.problem import Array, IntArray, TabularProblem

# Rows of prompts are visited in blocks of about this many cells, so that temporaries stay within the processor's cache.
_BLOCK_CELLS = 1 << 16
_NEWTON_STEPS = 200
_WARM_STEPS = 15


class Dual:
    """The dual function of a problem whose constraints are linear in the policy: rows (m, X, Y), bounds (m,)."""

    def __init__(self, problem: TabularProblem, rows: Array, bounds: Array) -> None:
        self.base = np.ascontiguousarray(problem.win_rate[problem.primary])
        self.rows = np.ascontiguousarray(rows)
        self.bounds = bounds
        self.weight = problem.prompt_weight
        self.support = problem.support
        with np.errstate(divide="ignore"):
            self.log_reference = np.log(problem.reference)

    def blocks(self) -> Iterator[slice]:
        prompts, responses = self.base.shape
        step = max(1, _BLOCK_CELLS // responses)
        return (slice(start, min(start + step, prompts)) for start in range(0, prompts, step))

    def mixture(self, block: slice, multiplier: Array) -> Array:
        """sum_j multiplier_j rows_j over a block of prompts, (x, Y)."""
        rows = self.rows[:, block]
        return (multiplier @ rows.reshape(len(rows), rows.shape[1] * rows.shape[2])).reshape(rows.shape[1:])

    def evaluate(self, multiplier: Array, tau: float) -> tuple[float, Array, Array]:
        """g (up to rounding), its gradient (m,) and its Hessian (m, m), in the precision of ``multiplier``.

        See eq. (6), (7) and (8) of docs/method.md.
        """
        size, dtype = len(self.rows), multiplier.dtype
        value: Any = dtype.type(0)
        mean_total, hessian = np.zeros(size, dtype), np.zeros((size, size), dtype)
        for block in self.blocks():
            weight = self.weight[block]
            policy, log_normaliser, _ = self.softmax(block, multiplier, tau)
            value += weight @ log_normaliser
            rows = self.rows[:, block]
            mean = np.einsum("kxy,xy->kx", rows, policy)
            mean_total += mean @ weight
            # Centred before squaring: positive semi-definite by construction, and accurate for nearly pure policies.
            centred = rows - mean[..., None]
            centred *= np.sqrt(policy * weight[:, None])
            flat = centred.reshape(size, policy.size)
            hessian += flat @ flat.T
        return tau * value - multiplier @ self.bounds, mean_total - self.bounds, hessian / tau

    def softmax(self, block: slice, multiplier: Array, tau: float) -> tuple[Array, Array, Array]:
        """Policy (x, Y), log normaliser (x,) and log ratio to the reference (x, Y) of a block of prompts.

        See eq. (4) of docs/method.md.
        """
        tilt = (self.base[block] + self.mixture(block, multiplier)) / tau
        logit = tilt + self.log_reference[block]
        top = logit.max(1, keepdims=True)
        policy = np.exp(logit - top)
        total = policy.sum(1, keepdims=True)
        policy /= total
        normaliser = top + np.log(total)
        return policy, normaliser[:, 0], tilt - normaliser

    def policy(self, multiplier: Array, tau: float) -> tuple[Array, float]:
        """The maximising policy (X, Y), eq. (4) of docs/method.md, and its KL to the reference, nats."""
        policy, kl = np.empty_like(self.base), 0.0
        for block in self.blocks():
            policy[block], _, log_ratio = self.softmax(block, multiplier, tau)
            kl += float(self.weight[block] @ (policy[block] * log_ratio).sum(1))
        return policy, kl

    def support_function(self, weight: Array, argmax: bool = False) -> tuple[Array, IntArray | None]:
        """``max_y sum_j weight_j rows_j`` for every prompt (X,), and where, over available responses."""
        best = np.empty(len(self.base))
        where = np.empty(len(self.base), dtype=np.int64) if argmax else None
        for block in self.blocks():
            score = np.where(self.support[block], self.mixture(block, weight), -np.inf)
            if where is None:
                best[block] = score.max(1)
            else:
                where[block] = score.argmax(1)
                best[block] = np.take_along_axis(score, where[block, None], 1)[:, 0]
        return best, where

    def attainable(self, weight: Array) -> float:
        """Largest ``sum_j weight_j slack_j`` of any policy: negative proves that the thresholds cannot be met.

        See eq. (11) of docs/method.md.
        """
        return float(self.weight @ self.support_function(weight)[0] - weight @ self.bounds)


def optimality_residual(multiplier: Array, slack: Array, maximum: float) -> float:
    """Violation of ``slack >= 0, multiplier * slack = 0``; at the cap a violated threshold is as it must be."""
    if not len(slack):
        return 0.0
    violation = np.where(multiplier < maximum, -slack, 0.0)
    product = np.where(multiplier < maximum, multiplier * np.abs(slack), multiplier * np.maximum(slack, 0.0))
    return float(np.maximum(np.maximum(violation, product), 0.0).max())


def _quadratic_step(gradient: Array, hessian: Array, lower: Array, upper: Array) -> Array:
    """Minimiser of ``gradient @ d + d @ hessian @ d / 2`` over the box ``lower <= d <= upper``, which holds 0.

    A primal active-set method: exact up to rounding relative to the gradient, however short the step is in units of the
    box, which is what lets Newton's last steps converge.
    """
    rounding = float(np.finfo(hessian.dtype).eps)
    diagonal = np.diagonal(hessian)
    scale = 1 / np.sqrt(np.maximum(diagonal, max(float(diagonal.max()), 1e-280) * 1e-20))
    # In units of ``scale`` the diagonal is one; the small multiple of the identity picks the shortest of several
    # minimisers (identical objectives) without being felt otherwise.
    matrix = hessian * np.outer(scale, scale) + 50 * rounding * np.eye(len(gradient))
    slope, low, high = gradient * scale, lower / scale, upper / scale
    step = np.zeros_like(gradient)
    free = np.where(slope > 0, low < 0, high > 0)
    for _ in range(20 * len(gradient)):
        target = step.copy()
        if free.any():
            others = slope[free] + matrix[np.ix_(free, ~free)] @ step[~free]
            target[free] = -_solve(matrix[np.ix_(free, free)], others)
        move = target - step
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(move > 0, (high - step) / move, np.where(move < 0, (low - step) / move, np.inf))
        block = int(np.argmin(room))
        if room[block] < 1:
            step = np.clip(step + max(room[block], 0.0) * move, low, high)
            step[block] = high[block] if move[block] > 0 else low[block]
            free[block] = False
            continue
        step = np.clip(target, low, high)
        derivative = slope + matrix @ step
        wrong = np.where(free, 0.0, np.where(step <= low, -derivative, derivative))
        wrong[(low == 0) & (high == 0)] = 0.0
        release = int(np.argmax(wrong))
        if wrong[release] <= 5 * rounding * np.abs(slope).max():
            break
        free[release] = True
    return np.clip(step * scale, lower, upper)


def _solve(matrix: Array, right: Array) -> Array:
    """``matrix^-1 right`` for a positive definite matrix, in its precision: LAPACK has none beyond double."""
    if matrix.dtype.type is np.float64:
        return np.asarray(np.linalg.solve(matrix, right))
    matrix, right = matrix.copy(), right.copy()
    for i in range(len(right)):
        factor = matrix[i + 1 :, i] / matrix[i, i]
        matrix[i + 1 :] -= factor[:, None] * matrix[i]
        right[i + 1 :] -= factor * right[i]
    for i in reversed(range(len(right))):
        right[i] = (right[i] - matrix[i, i + 1 :] @ right[i + 1 :]) / matrix[i, i]
    return right


def minimise(
    dual: Dual, tau: float, tolerance: float, start: Array, maximum: float = np.inf, extended: bool = True
) -> tuple[Array, float, bool]:
    """Minimise the dual over ``[0, maximum]^m``: (multiplier, residual, whether infeasibility was proved).

    Trust-region Newton. When tau is small the dual is nearly piecewise linear and its curvature underflows away from
    the kinks, so larger values of tau are solved first and their minimisers followed down, unless ``start`` is already
    close enough for a few steps at tau itself. Close to the boundary of what is attainable the multipliers are so large
    that the last bits of ``sum_k lambda_k s_k / tau``, and of lambda itself, move the policy by more than the
    tolerance: there, with ``extended``, the last steps are taken in the platform's extended precision, in which the
    multiplier is then returned.
    """
    multiplier = np.clip(start, 0.0, maximum).astype(np.float64)
    if not len(multiplier):
        return multiplier, 0.0, False
    levels = [tau]
    while levels[-1] < 0.05:
        levels.append(levels[-1] * 3)
    if len(levels) > 1 and multiplier.any():
        found, residual, infeasible = _descend(dual, tau, multiplier, maximum, tolerance, tolerance, _WARM_STEPS)
        if infeasible or residual <= tolerance:
            return found, residual, infeasible
    for level in reversed(levels):
        goal = tolerance if level == tau else max(tolerance, 1e-3)
        multiplier, residual, infeasible = _descend(dual, level, multiplier, maximum, goal, tolerance, _NEWTON_STEPS)
        if infeasible:
            return multiplier, np.inf, True
    if residual > tolerance and extended:
        finer = cast(Array, multiplier.astype(np.longdouble))
        found, finer_residual, infeasible = _descend(dual, tau, finer, maximum, tolerance, tolerance, _NEWTON_STEPS)
        if infeasible or finer_residual < residual:
            return found, finer_residual, infeasible
    return multiplier, residual, False


def _descend(
    dual: Dual, tau: float, multiplier: Array, maximum: float, goal: float, tolerance: float, steps: int
) -> tuple[Array, float, bool]:
    """Newton steps at one tau, in the precision of ``multiplier``, until the residual is ``goal``; see `minimise`."""
    radius, stalled = 1.0, 0
    value, gradient, hessian = dual.evaluate(multiplier, tau)
    residual = optimality_residual(multiplier, gradient, maximum)
    best = (residual, multiplier)
    rounding = 50 * float(np.finfo(multiplier.dtype).eps)
    for _ in range(steps):
        if residual <= goal or stalled >= 8:
            break
        total = float(multiplier.sum())
        # Only multipliers that have outgrown the problem's scale (win rates and tau) can be on their way to infinity.
        if total > 2.0 and -gradient.min() > tolerance:
            direction = np.asarray(multiplier / total, dtype=np.float64)
            if dual.attainable(direction) < -tolerance:
                if np.isinf(maximum):
                    return multiplier, np.inf, True
                if goal > tolerance:
                    break
        lower, upper = np.maximum(-multiplier, -radius), np.minimum(maximum - multiplier, radius)
        step = _quadratic_step(gradient, hessian, lower, upper)
        predicted = -float(gradient @ step + 0.5 * step @ hessian @ step)
        candidate = np.clip(multiplier + step, 0.0, maximum)
        trial = dual.evaluate(candidate, tau)
        trial_residual = optimality_residual(candidate, trial[1], maximum)
        noise = rounding * (1.0 + abs(value) + float(candidate @ dual.bounds))
        # What is gained, too little to be seen in g itself, follows from its slopes at both ends.
        gained = value - trial[0] if predicted > noise else -0.5 * (gradient + trial[1]) @ step
        ratio = gained / predicted if predicted > 0 else 0.0
        if ratio > 0.05:
            multiplier, (value, gradient, hessian), residual = candidate, trial, trial_residual
        if ratio > 0.7 and np.abs(step).max() > 0.9 * radius:
            radius *= 4
        elif ratio < 0.25:
            radius = max(radius, float(np.abs(step).max())) if predicted <= noise else float(np.abs(step).max())
            radius /= 4
        stalled = 0 if residual < 0.99 * best[0] or predicted > noise else stalled + 1
        if residual < best[0]:
            best = (residual, multiplier)
    return best[1], best[0], False


def best_attainable(dual: Dual, gap: float = 1e-11, rounds: int = 400) -> tuple[float, float, Array, Array]:
    """The linear programme ``max_pi min_j slack_j(pi)``: (value, upper bound, policy (X, Y), certificate (m,)).

    Column generation. A policy is a mixture, group of prompts by group of prompts, of deterministic policies; the
    master programme mixes those known, its dual weights the thresholds, and the best response to these weights is the
    next deterministic policy. That response also bounds the optimum from above, so the two values bracket it; the bound
    is eq. (11) of docs/method.md.
    """
    prompts, responses = dual.base.shape
    size = len(dual.bounds)
    edges = np.unique(np.linspace(0, prompts, min(prompts, 64) + 1).astype(int))
    starts, groups = edges[:-1], len(edges) - 1
    index = np.arange(prompts)
    columns: list[Array] = []
    choices: list[IntArray] = []
    known: list[set[bytes]] = [set() for _ in range(groups)]
    owners: list[IntArray] = []
    picks: list[IntArray] = []

    def respond(weight: Array) -> tuple[float, bool]:
        best, where = dual.support_function(weight, argmax=True)
        assert where is not None
        earned = np.add.reduceat(dual.rows[:, index, where] * dual.weight, starts, axis=1)
        fresh = []
        for group in range(groups):
            key = where[edges[group] : edges[group + 1]].tobytes()
            if key not in known[group]:
                known[group].add(key)
                fresh.append(group)
        if fresh:
            columns.append(earned[:, fresh])
            owners.append(np.array(fresh))
            picks.append(np.full(len(fresh), len(choices)))
            choices.append(where)
        return float(dual.weight @ best - weight @ dual.bounds), bool(fresh)

    certificate = np.full(size, 1 / size)
    upper = np.inf
    for weight in (certificate, *np.eye(size)):
        bound, _ = respond(weight)
        if bound < upper:
            upper, certificate = bound, weight
    lower, policy = -np.inf, np.zeros((prompts, responses))
    for _ in range(rounds):
        earned, owner = np.concatenate(columns, 1), np.concatenate(owners)
        count = len(owner)
        matrix = np.concatenate([-earned, np.ones((size, 1))], 1)
        equality = np.zeros((groups, count + 1))
        equality[owner, np.arange(count)] = 1.0
        master: Any = linprog(
            np.r_[np.zeros(count), -1.0],
            A_ub=matrix,
            b_ub=-dual.bounds,
            A_eq=equality,
            b_eq=np.ones(groups),
            bounds=[(0, None)] * count + [(None, None)],
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        share = np.maximum(master.x[:-1], 0.0)
        share /= np.bincount(owner, share, groups)[owner]
        worst = float((earned @ share - dual.bounds).min())
        if worst > lower:
            lower, best_share, best_owner, best_pick = worst, share, owner, np.concatenate(picks)
        weight = np.maximum(-master.ineqlin.marginals, 0.0)
        weight /= weight.sum()
        bound, fresh = respond(weight)
        if bound < upper:
            upper, certificate = bound, weight
        if upper - lower <= gap or not fresh:
            break
    for share_value, group, pick in zip(best_share, best_owner, best_pick, strict=True):
        if share_value > 0:
            members = index[edges[group] : edges[group + 1]]
            policy[members, choices[pick][members]] += share_value
    return lower, upper, policy / policy.sum(1, keepdims=True), certificate
