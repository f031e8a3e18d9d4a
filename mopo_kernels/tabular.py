"""Exact solutions of finite MOPO problems.

The problem, over prompts ``x ~ nu`` and a finite set of responses per prompt:

    maximise  P_primary(pi) - tau * E_x KL(pi || reference)   subject to   P_k(pi) >= b_k

with ``P_k(pi) = E_{x ~ nu, y ~ pi} s_k(x, y)`` and ``s_k(x, y) = E_{y' ~ behaviour} p_k(y > y' | x)``. For multipliers
``lambda`` the maximiser is ``pi ~ reference * exp((s_primary + sum_k lambda_k s_k) / tau)`` and the dual

    g(lambda) = tau * E_x log E_{y ~ reference} exp((s_primary + sum_k lambda_k s_k) / tau) - sum_k lambda_k b_k

is smooth and convex, with gradient ``P_k - b_k`` and Hessian ``Cov(s) / tau``. It has one variable per threshold
however large the problem is, so it is minimised by Newton steps, each of them an exact small quadratic programme over
``lambda >= 0`` within a trust region. Everything is in double precision and in log space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, linprog

__all__ = ["TabularProblem", "TabularSolution", "capped_multipliers", "robust_value", "solve"]

Array = npt.NDArray[np.float64]

# Rows of prompts are visited in blocks of about this many cells, so that temporaries stay within the processor's cache.
_BLOCK_CELLS = 1 << 16
# The chi of the robust constraint is bracketed between these, as multiples of the largest |f|.
_CHI_RANGE = (1e-13, 1e13)
_NEWTON_STEPS = 200
_ROBUST_ROUNDS = 60


def _array(name: str, value: npt.ArrayLike, shape: tuple[int | None, ...]) -> Array:
    """``value`` as a fp64 array whose shape matches ``shape`` (None: any size)."""
    array = np.array(value, dtype=np.float64)
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        expected = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    return array


def _distribution(name: str, value: npt.ArrayLike, shape: tuple[int | None, ...]) -> Array:
    """``value`` as an array of probabilities whose last axis sums to one exactly as far as rounding allows."""
    array = _array(name, value, shape)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"{name} must hold finite probabilities >= 0, got {array[~(array >= 0)][:1]}")
    total = array.sum(-1, keepdims=True)
    if (np.abs(total - 1) > 1e-5).any():
        worst = float(total.flat[np.argmax(np.abs(total - 1))])
        raise ValueError(f"{name} must sum to 1 over its last axis, got a sum of {worst}")
    return array / total


class TabularProblem:
    """A finite constrained problem, validated.

    Give either ``preference`` and ``behaviour``, or ``win_rate``. Prompts with fewer than Y candidates are padded: a
    response whose reference probability is zero can never be chosen, and its entries of ``win_rate`` (or of
    ``preference``, where its behaviour probability is zero too) are ignored and may be NaN.

    Args:
        preference: (K, X, Y, Y), ``preference[k, x, y, z] = P(y beats z)`` in [0, 1]; opposite entries sum to 1.
        behaviour: (X, Y) probabilities of the policy that wrote the responses.
        reference: (X, Y) probabilities of the reference policy; zero marks a response that is not available.
        tau: strength of the KL term, in win-rate units per nat, > 0.
        thresholds: ``{objective index: lowest allowed win rate in [0, 1]}``; the primary cannot have one.
        primary: index of the objective to maximise.
        prompt_weight: (X,) prompt probabilities up to scale; uniform by default.
        robustness: radius in nats of the KL ball of the robust constraint (see :func:`robust_value`); 0 turns it off.
            Its price grows quickly: 0.15, which the method's paper quotes, makes thresholds near parity infeasible on
            pools as small as 8 candidates, because already the reference policy itself is worth far less than its
            average there.
        win_rate: (K, X, Y), the ``s_k(x, y)`` themselves, in [0, 1].

    Raises:
        ValueError: an argument is missing, has the wrong shape, or is out of range.
    """

    def __init__(
        self,
        preference: npt.ArrayLike | None = None,
        behaviour: npt.ArrayLike | None = None,
        reference: npt.ArrayLike | None = None,
        tau: float | None = None,
        thresholds: Mapping[int, float] | None = None,
        primary: int = 0,
        prompt_weight: npt.ArrayLike | None = None,
        robustness: float = 0.0,
        *,
        win_rate: npt.ArrayLike | None = None,
    ) -> None:
        if reference is None:
            raise ValueError("reference must be given, as an (X, Y) array of probabilities, got None")
        self.reference: Array = _distribution("reference", reference, (None, None))
        prompts, responses = self.reference.shape
        self.support: npt.NDArray[np.bool_] = self.reference > 0
        if win_rate is not None and preference is None and behaviour is None:
            rate = _array("win_rate", win_rate, (None, prompts, responses))
        elif win_rate is None and preference is not None and behaviour is not None:
            rate = _win_rate(
                _array("preference", preference, (None, prompts, responses, responses)),
                _distribution("behaviour", behaviour, (prompts, responses)),
                self.support,
            )
        else:
            given = [
                name
                for name, value in (("preference", preference), ("behaviour", behaviour), ("win_rate", win_rate))
                if value is not None
            ]
            raise ValueError(f"either preference and behaviour, or win_rate alone, must be given, got {given}")
        rate[:, ~self.support] = 0.0
        if not ((rate >= 0) & (rate <= 1)).all():
            raise ValueError(
                f"win_rate must lie in [0, 1] where reference > 0, got {rate[~((rate >= 0) & (rate <= 1))][0]}"
            )
        self.win_rate: Array = rate
        if tau is None or not (np.isfinite(tau) and tau > 0):
            raise ValueError(f"tau must be a finite number > 0, got {tau}")
        self.tau = float(tau)
        objectives = rate.shape[0]
        if not 0 <= primary < objectives:
            raise ValueError(f"primary must be an objective index in 0..{objectives - 1}, got {primary}")
        self.primary = int(primary)
        self.thresholds: dict[int, float] = {}
        for index, bound in sorted((thresholds or {}).items()):
            if not 0 <= index < objectives:
                raise ValueError(f"thresholds must be for objectives 0..{objectives - 1}, got one for {index}")
            if index == primary:
                raise ValueError(f"thresholds must not include the primary objective {primary}, got {bound} for it")
            if not 0 <= bound <= 1:
                raise ValueError(f"thresholds must lie in [0, 1], got {bound} for objective {index}")
            self.thresholds[int(index)] = float(bound)
        if prompt_weight is None:
            prompt_weight = np.ones(prompts)
        weight = _array("prompt_weight", prompt_weight, (prompts,))
        if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.sum() > 0):
            raise ValueError("prompt_weight must be finite, >= 0 and not all zero")
        self.prompt_weight: Array = weight / weight.sum()
        if not (np.isfinite(robustness) and robustness >= 0):
            raise ValueError(f"robustness must be a finite radius >= 0 in nats, got {robustness}")
        self.robustness = float(robustness)


def _win_rate(preference: Array, behaviour: Array, support: npt.NDArray[np.bool_]) -> Array:
    """``s_k(x, y)`` (K, X, Y) from preferences (K, X, Y, Y); entries of unavailable responses are not looked at."""
    seen = behaviour > 0
    needed = support[:, :, None] & seen[:, None, :]
    paired = needed & needed.transpose(0, 2, 1)
    preference[:, ~needed] = 0.0
    if not ((preference >= 0) & (preference <= 1)).all():
        bad = preference[~((preference >= 0) & (preference <= 1))][0]
        raise ValueError(f"preference must lie in [0, 1], got {bad}")
    defect = np.where(paired, np.abs(preference + preference.swapaxes(2, 3) - 1), 0.0)
    if (defect > 1e-5).any():
        k, x, y, z = (int(i) for i in np.unravel_index(np.argmax(defect), defect.shape))
        raise ValueError(
            "preference[k, x, y, z] + preference[k, x, z, y] must be 1, "
            f"got {preference[k, x, y, z] + preference[k, x, z, y]} at [{k}, {x}, {y}, {z}]"
        )
    return np.clip(np.einsum("kxyz,xz->kxy", preference, behaviour), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class TabularSolution:
    """The optimum, or, when the thresholds cannot be met together, proof of that and the best that can.

    Attributes:
        policy: (X, Y) optimal policy; when infeasible, the policy whose worst slack is the largest.
        multiplier: (K,) 1 for the primary, the dual variable of each threshold, 0 for objectives without one; NaN for
            every threshold when infeasible, since the dual then has no minimiser.
        value: (K,) win rates P_k of ``policy``.
        constraint_value: (K,) what the thresholds are compared with: ``value``, or with ``robustness > 0`` the worst
            case over the KL ball for objectives that have a threshold.
        kl: E_x KL(policy || reference), nats.
        feasible: whether the thresholds can be met together, within the tolerance of :func:`solve`.
        kkt_residual: largest of all threshold violations and all ``multiplier * |value - threshold|``; the policy is
            the closed-form maximiser for the multiplier, so the remaining condition holds by construction. Infinite
            when infeasible.
        gap: dual value minus primal value, each computed from its own definition. Infinite when infeasible.
        primal: P_primary - tau * kl of ``policy``.
        dual: g(multiplier), an upper bound on every feasible policy's ``primal`` (minus infinity when infeasible).
        best_value: None when feasible; otherwise the largest attainable ``min_k (constraint_value_k - b_k)``, < 0,
            attained by ``policy``.
        best_bound: None when feasible; otherwise an upper bound on what any policy can attain, proved by
            ``certificate``: ``best_bound - best_value`` is the error of ``best_value``, rounding without robustness and
            usually below 1e-3 with it.
        conflict: objectives whose thresholds cannot be met together (a positive certificate); empty when feasible.
        certificate: (K,) weights >= 0 summing to one; without robustness, ``E_x max_y sum_k certificate_k s_k(x, y) -
            sum_k certificate_k b_k == best_bound < 0`` proves infeasibility. None when feasible.
    """

    policy: Array
    multiplier: Array
    value: Array
    constraint_value: Array
    kl: float
    feasible: bool
    kkt_residual: float
    gap: float
    primal: float
    dual: float
    best_value: float | None = None
    best_bound: float | None = None
    conflict: tuple[int, ...] = ()
    certificate: Array | None = None


class _Dual:
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
        """g (up to rounding), its gradient (m,) and its Hessian (m, m)."""
        size = len(self.rows)
        value, mean_total, hessian = 0.0, np.zeros(size), np.zeros((size, size))
        for block in self.blocks():
            weight = self.weight[block]
            policy, log_normaliser, _ = self.softmax(block, multiplier, tau)
            value += float(weight @ log_normaliser)
            rows = self.rows[:, block]
            mean = np.einsum("kxy,xy->kx", rows, policy)
            mean_total += mean @ weight
            # Centred before squaring: positive semi-definite by construction, and accurate for nearly pure policies.
            centred = rows - mean[..., None]
            centred *= np.sqrt(policy * weight[:, None])
            flat = centred.reshape(size, policy.size)
            hessian += flat @ flat.T
        return tau * value - float(multiplier @ self.bounds), mean_total - self.bounds, hessian / tau

    def softmax(self, block: slice, multiplier: Array, tau: float) -> tuple[Array, Array, Array]:
        """Policy (x, Y), log normaliser (x,) and log ratio to the reference (x, Y) of a block of prompts."""
        tilt = (self.base[block] + self.mixture(block, multiplier)) / tau
        logit = tilt + self.log_reference[block]
        top = logit.max(1, keepdims=True)
        policy = np.exp(logit - top)
        total = policy.sum(1, keepdims=True)
        policy /= total
        normaliser = top + np.log(total)
        return policy, normaliser[:, 0], tilt - normaliser

    def policy(self, multiplier: Array, tau: float) -> tuple[Array, float]:
        """The maximising policy (X, Y) and its KL to the reference, nats."""
        policy, kl = np.empty_like(self.base), 0.0
        for block in self.blocks():
            policy[block], _, log_ratio = self.softmax(block, multiplier, tau)
            kl += float(self.weight[block] @ (policy[block] * log_ratio).sum(1))
        return policy, kl

    def support_function(self, weight: Array, argmax: bool = False) -> tuple[Array, npt.NDArray[np.int64] | None]:
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
        """Largest ``sum_j weight_j slack_j`` of any policy: negative proves that the thresholds cannot be met."""
        return float(self.weight @ self.support_function(weight)[0] - weight @ self.bounds)


def _residual(multiplier: Array, slack: Array, maximum: float) -> float:
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
    diagonal = np.diagonal(hessian)
    scale = 1 / np.sqrt(np.maximum(diagonal, max(float(diagonal.max()), 1e-280) * 1e-20))
    # In units of ``scale`` the diagonal is one; the small multiple of the identity picks the shortest of several
    # minimisers # (identical objectives) without being felt otherwise.
    matrix = hessian * np.outer(scale, scale) + 1e-14 * np.eye(len(gradient))
    slope, low, high = gradient * scale, lower / scale, upper / scale
    step = np.zeros_like(gradient)
    free = np.where(slope > 0, low < 0, high > 0)
    for _ in range(20 * len(gradient)):
        target = step.copy()
        if free.any():
            others = slope[free] + matrix[np.ix_(free, ~free)] @ step[~free]
            target[free] = -np.linalg.solve(matrix[np.ix_(free, free)], others)
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
        if wrong[release] <= 1e-15 * np.abs(slope).max():
            break
        free[release] = True
    return np.clip(step * scale, lower, upper)


def _minimise(
    dual: _Dual, tau: float, tolerance: float, start: Array, maximum: float = np.inf
) -> tuple[Array, float, bool]:
    """Minimise the dual over ``[0, maximum]^m``: (multiplier, residual, whether infeasibility was proved).

    Trust-region Newton. When tau is small the dual is nearly piecewise linear and its curvature underflows away from
    the kinks, so larger values of tau are solved first and their minimisers followed down.
    """
    multiplier = np.clip(start, 0.0, maximum)
    if not len(multiplier):
        return multiplier, 0.0, False
    levels = [tau]
    while levels[-1] < 0.05:
        levels.append(levels[-1] * 3)
    residual, radius = np.inf, 1.0
    for level in reversed(levels):
        goal = tolerance if level == tau else max(tolerance, 1e-3)
        value, gradient, hessian = dual.evaluate(multiplier, level)
        residual = _residual(multiplier, gradient, maximum)
        best = (residual, multiplier)
        stalled = 0
        for _ in range(_NEWTON_STEPS):
            if residual <= goal or stalled >= 8:
                break
            total = float(multiplier.sum())
            # Only multipliers that have outgrown the problem's scale (win rates and tau) can be on their way to
            # infinity.
            if total > 2.0 and -gradient.min() > tolerance and dual.attainable(multiplier / total) < -tolerance:
                if np.isinf(maximum):
                    return multiplier, np.inf, True
                if level != tau:
                    break
            lower, upper = np.maximum(-multiplier, -radius), np.minimum(maximum - multiplier, radius)
            step = _quadratic_step(gradient, hessian, lower, upper)
            predicted = -float(gradient @ step + 0.5 * step @ hessian @ step)
            candidate = np.clip(multiplier + step, 0.0, maximum)
            trial = dual.evaluate(candidate, level)
            trial_residual = _residual(candidate, trial[1], maximum)
            noise = 1e-14 * (1.0 + abs(value) + float(candidate @ dual.bounds))
            ratio = (value - trial[0]) / predicted if predicted > noise else float(trial_residual < residual)
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
        if residual > best[0]:
            residual, multiplier = best
        radius = max(radius, 1e-3)
    return multiplier, residual, False


def _best_attainable(dual: _Dual, gap: float = 1e-11, rounds: int = 400) -> tuple[float, float, Array, Array]:
    """The linear programme ``max_pi min_j slack_j(pi)``: (value, upper bound, policy (X, Y), certificate (m,)).

    Column generation. A policy is a mixture, group of prompts by group of prompts, of deterministic policies; the
    master programme mixes those known, its dual weights the thresholds, and the best response to these weights is the
    next deterministic policy. That response also bounds the optimum from above, so the two values bracket it.
    """
    prompts, responses = dual.base.shape
    size = len(dual.bounds)
    edges = np.unique(np.linspace(0, prompts, min(prompts, 64) + 1).astype(int))
    starts, groups = edges[:-1], len(edges) - 1
    index = np.arange(prompts)
    columns: list[Array] = []
    choices: list[npt.NDArray[np.int64]] = []
    known: list[set[bytes]] = [set() for _ in range(groups)]
    owners: list[npt.NDArray[np.int64]] = []
    picks: list[npt.NDArray[np.int64]] = []

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


def robust_value(ratio: Array, score: Array, weight: Array, radius: float) -> tuple[float, Array]:
    """Worst expectation of ``f = ratio * score`` over the KL ball of ``radius`` nats around ``weight``.

    Computes ``max_{chi > 0} [-chi * log E exp(-f / chi) - chi * radius]``, with E over prompts and reference responses
    together. The maximand is concave in chi and stationary where the tilted distribution ``q ~ weight * exp(-f / chi)``
    is at distance ``radius``, a decreasing function of chi whose root is bracketed on a log scale.

    Args:
        ratio: (X, Y) density ratio of the policy to the reference.
        score: (X, Y) win rates of one objective.
        weight: (X, Y) prompt weight times reference probability; sums to 1, zero entries take no part.
        radius: radius of the ball in nats, >= 0.

    Returns:
        The value, and the worst density ratio (X, Y), zero where ``weight`` is, whose expectation of f attains it.
    """
    active = weight > 0
    f, mass = (ratio * score)[active], weight[active]
    scale = float(np.abs(f).max())
    tilt = np.zeros_like(weight)
    if radius == 0 or scale == 0:
        tilt[active] = 1.0
        return float(mass @ f), tilt
    excess = (f - f.min()) / scale

    def tilted(log_chi: float) -> tuple[Array, float]:
        density = np.exp(-excess / np.exp(log_chi))
        total = float(mass @ density)
        density /= total
        return density, float(-(mass * density) @ excess / np.exp(log_chi) - np.log(total))

    low, high = np.log(_CHI_RANGE[0]), np.log(_CHI_RANGE[1])
    if tilted(low)[1] <= radius:
        root = low  # the ball reaches the worst outcomes alone
    elif tilted(high)[1] >= radius:
        root = high
    else:
        root = brentq(lambda log_chi: tilted(log_chi)[1] - radius, low, high, xtol=1e-15, rtol=1e-15, maxiter=500)
    tilt[active] = tilted(root)[0]
    return float(mass @ (tilt[active] * f)), tilt


def _constraint_values(problem: TabularProblem, policy: Array) -> tuple[Array, Array, list[Array]]:
    """(K,) win rates, (K,) values the thresholds apply to, and the worst density ratio (X, Y) per threshold."""
    value = np.einsum("kxy,xy->kx", problem.win_rate, policy) @ problem.prompt_weight
    constraint_value, tilts = value.copy(), []
    if problem.robustness > 0:
        weight = problem.prompt_weight[:, None] * problem.reference
        ratio = np.divide(policy, problem.reference, out=np.zeros_like(policy), where=problem.support)
        for k in problem.thresholds:
            constraint_value[k], tilt = robust_value(ratio, problem.win_rate[k], weight, problem.robustness)
            tilts.append(tilt)
    return value, constraint_value, tilts


def _refine(
    problem: TabularProblem, bounds: Array, tau: float, log_ratio: Array, multiplier: Array, tilts: list[Array]
) -> tuple[Array, Array] | None:
    """Newton on the optimality conditions of the robust problem, from a point near the optimum.

    With ``e_k = exp(alpha_k - ratio s_k / chi_k)`` the worst density ratio of threshold k, the conditions are

        s_primary - tau log ratio - c_x + sum_k lambda_k s_k e_k = 0      for every response
        E_ref[ratio | x] = 1                                              for every prompt
        E e_k = 1,  E e_k log e_k = radius,  min(lambda_k, E e_k ratio s_k - b_k) = 0      for every threshold

    The first two are diagonal in ``log ratio`` and c, so a step costs one system of three unknowns per threshold.

    Returns:
        The worst density ratios times win rates (m, X, Y) and the multipliers (m,), or None if Newton fails.
    """
    constrained = list(problem.thresholds)
    size = len(bounds)
    base, score = problem.win_rate[problem.primary], problem.win_rate[constrained]
    reference = problem.reference
    weight = problem.prompt_weight[:, None] * reference
    log_ratio = np.where(problem.support, log_ratio, 0.0)
    ratio = np.exp(log_ratio) * problem.support
    slope = np.ones(size)
    offset = np.zeros(size)
    for k, tilt in enumerate(tilts):
        # log tilt is affine in ratio * score: its two coefficients are read off the cells that are furthest apart.
        f = (ratio * score[k])[weight > 0]
        logs = np.log(np.maximum(tilt[weight > 0], 1e-300))
        low, high = int(np.argmin(f)), int(np.argmax(f))
        if not f[high] > f[low] or not logs[low] > logs[high]:
            return None
        slope[k] = np.log((f[high] - f[low]) / (logs[low] - logs[high]))
        offset[k] = logs[low] + f[low] / np.exp(slope[k])
    theta = np.concatenate([multiplier, offset, slope])  # lambda, alpha, log chi
    level = (reference * (base - tau * log_ratio + np.einsum("k,kxy,kxy->xy", multiplier, score, np.stack(tilts)))).sum(
        1
    )

    def conditions(log_ratio: Array, level: Array, theta: Array) -> tuple[tuple[Array, ...], Array, float]:
        ratio = np.where(problem.support, np.exp(np.minimum(log_ratio, 700.0)), 0.0)
        exponent = theta[size : 2 * size, None, None] - ratio * score / np.exp(theta[2 * size :, None, None])
        tilt = np.exp(np.minimum(exponent, 100.0))
        cells = (base - tau * log_ratio - level[:, None] + np.einsum("k,kxy,kxy->xy", theta[:size], score, tilt)) * (
            problem.support
        )
        norm = (reference * ratio).sum(1) - 1
        mass = weight * tilt
        slack = (mass * ratio * score).sum((1, 2)) - bounds
        final = np.concatenate([mass.sum((1, 2)) - 1, (mass * exponent).sum((1, 2)) - problem.robustness, slack])
        inactive = theta[:size] < slack
        final[2 * size :][inactive] = theta[:size][inactive]
        size_of = float((weight * np.abs(cells)).sum() + problem.prompt_weight @ np.abs(norm) + np.abs(final).sum())
        return (cells, norm, final, inactive), exponent, size_of

    parts, exponent, error = conditions(log_ratio, level, theta)
    for _ in range(60):
        if error < 1e-14:
            break
        cells, norm, final, inactive = parts
        ratio, tilt = np.exp(log_ratio) * problem.support, np.exp(np.minimum(exponent, 100.0))
        scaled = ratio * score / np.exp(theta[2 * size :, None, None])
        pull = theta[:size, None, None] * score * tilt
        diagonal = tau + (pull * scaled).sum(0)
        # Changes of log ratio per unit of each of the 3 m unknowns (last entry: the constant part), c_x eliminated.
        push = np.concatenate([score * tilt, pull, pull * scaled, cells[None]]) / diagonal
        share = reference * ratio
        inner = (share / diagonal).sum(1)
        shift = (share * push).sum(2) / inner
        shift[-1] += norm / inner
        move = push - shift[:, :, None] / diagonal
        # The conditions of the thresholds along these changes.
        matrix = np.zeros((3 * size, 3 * size + 1))
        for k in range(size):
            change = -scaled[k] * move
            change[size + k] += 1.0
            change[2 * size + k] += scaled[k]
            mass = weight * tilt[k]
            matrix[k] = (mass * change).sum((1, 2))
            matrix[size + k] = (mass * (exponent[k] + 1) * change).sum((1, 2))
            matrix[2 * size + k] = (mass * ratio * score[k] * (change + move)).sum((1, 2))
            if inactive[k]:
                matrix[2 * size + k] = 0.0
                matrix[2 * size + k, k] = 1.0
        try:
            step = np.linalg.solve(matrix[:, :-1], -(final + matrix[:, -1]))
        except np.linalg.LinAlgError:
            return None
        step_log = np.einsum("j,jxy->xy", np.append(step, 1.0), move) * problem.support
        step_level = np.append(step, 1.0) @ shift
        # Responses that are practically never chosen may move freely.
        largest = max(float((np.abs(step_log) * (ratio > 1e-6)).max()), float(np.abs(step[size:]).max()))
        length = 3.0 / max(largest, 3.0)
        for _ in range(12):
            trial = (log_ratio + length * step_log, level + length * step_level, theta + length * step)
            trial_parts, trial_exponent, trial_error = conditions(*trial)
            if trial_error < (1 - 0.1 * length) * error:
                break
            length /= 2
        else:
            break
        (log_ratio, level, theta), parts, exponent, error = trial, trial_parts, trial_exponent, trial_error
    if not error < 1e-9:
        return None
    return np.exp(exponent) * problem.support * score, np.maximum(theta[:size], 0.0)


def _by_owner(owner: npt.NDArray[np.int64], value: Array, size: int) -> Array:
    """Sums of ``value`` over the rows of each of ``size`` constraints."""
    return np.asarray(np.bincount(owner, value, size), dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Where a search ended: linear constraints (robust: those found so far), each row's threshold, and multipliers."""

    feasible: bool
    dual: _Dual
    multiplier: Array
    owner: npt.NDArray[np.int64]
    tau: float
    residual: float


def _search(problem: TabularProblem, bounds: Array, tolerance: float) -> _Found:
    """Minimise the dual of ``problem`` with ``bounds`` for thresholds, or prove that they cannot be met."""
    constrained = np.array(list(problem.thresholds), dtype=np.int64)
    count = len(constrained)
    rows, owner, start = problem.win_rate[constrained], np.arange(count), np.zeros(count)
    inner = tolerance if problem.robustness == 0 else 0.1 * tolerance
    levels = [problem.tau]
    while problem.robustness > 0 and levels[-1] < 0.2:
        levels.append(2 * levels[-1])
    for tau in reversed(levels):
        refined = False
        for attempt in range(_ROBUST_ROUNDS):
            dual = _Dual(problem, rows, bounds[owner])
            if refined:
                found = start
            else:
                found, residual, infeasible = _minimise(dual, tau, inner, start)
                if infeasible or (residual > tolerance and _best_attainable(dual)[1] < -tolerance):
                    return _Found(False, dual, found, owner, tau, np.inf)
            policy, _ = dual.policy(found, tau)
            _, achieved, tilts = _constraint_values(problem, policy)
            total = _by_owner(owner, found, count)
            residual = _residual(total, achieved[constrained] - bounds, np.inf)
            if residual <= tolerance or not tilts:
                break
            if attempt % 4 == 0 and not refined:
                log_ratio = np.concatenate([dual.softmax(block, found, tau)[2] for block in dual.blocks()])
                better = _refine(problem, bounds, tau, log_ratio, total, tilts)
                if better is not None:
                    (rows, start), owner, refined = better, np.arange(count), True
                    continue
            refined = False
            keep = found > 0
            fresh = np.stack([tilt * problem.win_rate[k] for k, tilt in zip(constrained, tilts, strict=True)])
            rows = np.concatenate([rows[keep], fresh])
            owner = np.concatenate([owner[keep], np.arange(count)])
            start = np.concatenate([found[keep], np.zeros(count)])
        else:
            raise ArithmeticError(f"the robust problem was not solved: its residual is {residual:.1e} at tau {tau:g}")
        start = found
    return _Found(True, dual, found, owner, tau, residual)


def _infeasible(problem: TabularProblem, search: _Found) -> TabularSolution:
    """The certificate and the policy with the largest worst slack, from the linear constraints that cannot be met.

    Without robustness one linear programme gives both. With it, the programme over the linear constraints known is an
    upper bound, and the attainable value is found by bisection: thresholds lowered by a common amount are met, and the
    policy attains a value, or they are not, and the constraints that prove it lower the bound.
    """
    constrained = np.array(list(problem.thresholds))
    bounds = np.array(list(problem.thresholds.values()))

    def worst_slack(policy: Array) -> float:
        return float((_constraint_values(problem, policy)[1][constrained] - bounds).min())

    def programme(found: _Found) -> tuple[float, Array, Array]:
        dual = _Dual(problem, found.dual.rows, bounds[found.owner])
        _, bound, policy, weight = _best_attainable(dual)
        return bound, policy, _by_owner(found.owner, weight, len(constrained))

    upper, policy, certificate = programme(search)
    lower = worst_slack(policy)
    if problem.robustness > 0:
        if (reference_slack := worst_slack(problem.reference)) > lower:
            lower, policy = reference_slack, problem.reference
        while upper - lower > 1e-6:
            trial = 0.5 * (lower + upper)
            try:
                found = _search(problem, bounds + trial, 1e-9)
            except ArithmeticError:
                break  # too close to the boundary to tell: the bracket stands
            if found.feasible:
                candidate, _ = found.dual.policy(found.multiplier, found.tau)
                achieved_slack = worst_slack(candidate)
                if achieved_slack <= lower:
                    break
                lower, policy = achieved_slack, candidate
            else:
                bound, _, weight = programme(found)
                if bound >= upper:
                    break
                upper, certificate = bound, weight
    value, achieved, _ = _constraint_values(problem, policy)
    multiplier = np.zeros(len(value))
    multiplier[problem.primary] = 1.0
    multiplier[constrained] = np.nan
    full = np.zeros(len(value))
    full[constrained] = certificate
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.where(policy > 0, np.log(policy / problem.reference), 0.0)
    kl = float(problem.prompt_weight @ (policy * log_ratio).sum(1))
    return TabularSolution(
        policy=policy,
        multiplier=multiplier,
        value=value,
        constraint_value=achieved,
        kl=kl,
        feasible=False,
        kkt_residual=np.inf,
        gap=np.inf,
        primal=float(value[problem.primary]) - problem.tau * kl,
        dual=-np.inf,
        best_value=lower,
        best_bound=upper,
        conflict=tuple(int(k) for k in constrained[certificate > 1e-9]),
        certificate=full,
    )


def solve(problem: TabularProblem, tolerance: float = 1e-10) -> TabularSolution:
    """Solve ``problem`` exactly: minimise its dual and read the policy off the multipliers.

    With ``robustness > 0`` every constraint is the minimum of linear ones, one for each distribution q in the KL ball:
    the linear problem is solved for the q known so far, and the worst q for its policy joins them until the policy
    meets the robust constraint itself. The multiplier of an objective is then the sum over its q, and the dual value
    remains a valid bound, because a mixture of distributions in the ball is in the ball.

    Args:
        problem: the problem.
        tolerance: largest residual accepted (win-rate units), and the margin below which thresholds at the exact
            boundary of what is attainable count as met. There the multipliers grow without bound, and the returned ones
            are finite values at which the policy meets the thresholds within the tolerance.

    Returns:
        The solution. Thresholds that cannot be met together give ``feasible=False`` with a certificate, never a policy
        that pretends to be the optimum.

    Raises:
        ValueError: ``tolerance`` is not positive.
        ArithmeticError: a robust problem could not be solved to ``tolerance``.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    constrained = np.array(list(problem.thresholds), dtype=np.int64)
    bounds = np.array(list(problem.thresholds.values()))
    search = _search(problem, bounds, tolerance)
    if not search.feasible:
        return _infeasible(problem, search)
    dual, found, residual = search.dual, search.multiplier, search.residual
    policy, kl = dual.policy(found, problem.tau)
    value, achieved, _ = _constraint_values(problem, policy)
    total = _by_owner(search.owner, found, len(constrained))
    multiplier = np.zeros(len(value))
    multiplier[constrained] = total
    multiplier[problem.primary] = 1.0
    primal = float(value[problem.primary]) - problem.tau * kl
    bound = dual.evaluate(found, problem.tau)[0]
    return TabularSolution(
        policy=policy,
        multiplier=multiplier,
        value=value,
        constraint_value=achieved,
        kl=kl,
        feasible=True,
        kkt_residual=residual,
        gap=bound - primal,
        primal=primal,
        dual=bound,
    )


def capped_multipliers(problem: TabularProblem, maximum: float, tolerance: float = 1e-10) -> tuple[Array, Array, float]:
    """Minimise the dual over multipliers in ``[0, maximum]``, which has an answer whether or not the problem has.

    The cap turns every threshold into a penalty: falling short of it by one unit costs ``maximum``, so a threshold that
    is not met has its multiplier at the cap.

    Args:
        problem: the problem, with ``robustness`` 0.
        maximum: the cap, > 0.
        tolerance: largest residual accepted.

    Returns:
        Multipliers (K,) with 1 for the primary, the win rates (K,) of the policy they define, and the residual.
    """
    if problem.robustness > 0:
        raise ValueError(f"problem must have robustness 0, got {problem.robustness}")
    constrained = np.array(list(problem.thresholds), dtype=np.int64)
    dual = _Dual(problem, problem.win_rate[constrained], np.array(list(problem.thresholds.values())))
    found, residual, _ = _minimise(dual, problem.tau, tolerance, np.zeros(len(constrained)), maximum)
    value = np.einsum("kxy,xy->kx", problem.win_rate, dual.policy(found, problem.tau)[0]) @ problem.prompt_weight
    multiplier = np.zeros(len(value))
    multiplier[problem.primary] = 1.0
    multiplier[constrained] = found
    return multiplier, value, residual
