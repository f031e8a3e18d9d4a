"""The robust constraint: worst expectations over a KL ball, and Newton on the optimality conditions they give."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import brentq

from mopo_kernels.tabular.problem import Array, TabularProblem

# The chi of the robust constraint is bracketed between these, as multiples of the largest |f|.
_CHI_RANGE = (1e-13, 1e13)


def robust_value(ratio: Array, score: Array, weight: Array, radius: float) -> tuple[float, Array]:
    """Worst expectation of ``f = ratio * score`` over the KL ball of ``radius`` nats around ``weight``.

    Computes ``max_{chi > 0} [-chi * log E exp(-f / chi) - chi * radius]``, with E over prompts and reference responses
    together. The maximand is concave in chi and stationary where the tilted distribution ``q ~ weight * exp(-f / chi)``
    is at distance ``radius``, a decreasing function of chi whose root is bracketed on a log scale: eq. (13) of
    docs/method.md.

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


def constraint_values(problem: TabularProblem, policy: Array) -> tuple[Array, Array, list[Array]]:
    """(K,) win rates, (K,) values the thresholds apply to, and the worst density ratio (X, Y) per threshold."""
    value = problem.value(policy)
    constraint_value, tilts = value.copy(), []
    if problem.robustness > 0:
        weight = problem.prompt_weight[:, None] * problem.reference
        ratio = np.divide(policy, problem.reference, out=np.zeros_like(policy), where=problem.support)
        for k in problem.thresholds:
            constraint_value[k], tilt = robust_value(ratio, problem.win_rate[k], weight, problem.robustness)
            tilts.append(tilt)
    return value, constraint_value, tilts


@dataclasses.dataclass(frozen=True)
class Point:
    """A policy and everything else that the optimality conditions of a robust problem speak of.

    Attributes:
        log_ratio: (X, Y) log ratio of the policy to the reference.
        level: (X,) the prompts' multipliers c_x.
        multiplier, offset, log_chi: (m,) lambda_k, alpha_k and log chi_k of every threshold.
        slack: t, by which every threshold is raised; 0 unless it is what is maximised.
    """

    log_ratio: Array
    level: Array
    multiplier: Array
    offset: Array
    log_chi: Array
    slack: float = 0.0

    def moved(self, length: float, step: tuple[Array, Array, Array]) -> Point:
        log_ratio, level, theta = step
        size = len(self.multiplier)
        return Point(
            self.log_ratio + length * log_ratio,
            self.level + length * level,
            self.multiplier + length * theta[:size],
            self.offset + length * theta[size : 2 * size],
            self.log_chi + length * theta[2 * size : 3 * size],
            self.slack + length * float(theta[3 * size :].sum()),
        )


class Conditions:
    """Newton's method on the optimality conditions of the robust problem, from a point near the optimum.

    With ``e_k = exp(alpha_k - ratio s_k / chi_k)`` the worst density ratio of threshold k, the conditions are

        s_primary - tau log ratio - c_x + sum_k lambda_k s_k e_k = 0      for every response
        E_ref[ratio | x] = 1                                              for every prompt
        E e_k = 1,  E e_k log e_k = radius,  min(lambda_k, E e_k ratio s_k - b_k - t) = 0      for every threshold

    The first two are diagonal in ``log ratio`` and c, so a step costs one system of three unknowns per threshold. With
    ``worst_slack``, ``t - tau KL`` is maximised instead of ``P_primary - tau KL``, without s_primary: t is one more
    unknown and ``sum_k lambda_k = 1`` one more condition.
    """

    def __init__(self, problem: TabularProblem, bounds: Array, worst_slack: bool = False) -> None:
        self.problem, self.bounds, self.worst_slack = problem, bounds, worst_slack
        self.score = problem.win_rate[list(problem.thresholds)]
        self.base = np.zeros_like(problem.reference) if worst_slack else problem.win_rate[problem.primary]
        self.weight = problem.prompt_weight[:, None] * problem.reference

    def start(
        self, tau: float, log_ratio: Array, multiplier: Array, tilts: list[Array], slack: float = 0.0
    ) -> Point | None:
        """The point of a policy, given the worst density ratios (X, Y) for it, or None if a tilt is not exponential."""
        problem, size = self.problem, len(self.bounds)
        log_ratio = np.where(problem.support, log_ratio, 0.0)
        ratio = np.exp(log_ratio) * problem.support
        offset, log_chi = np.zeros(size), np.ones(size)
        for k, tilt in enumerate(tilts):
            # log tilt is affine in ratio * score: its two coefficients are read off the cells that are furthest apart.
            f = (ratio * self.score[k])[self.weight > 0]
            logs = np.log(np.maximum(tilt[self.weight > 0], 1e-300))
            low, high = int(np.argmin(f)), int(np.argmax(f))
            if not f[high] > f[low] or not logs[low] > logs[high]:
                return None
            log_chi[k] = np.log((f[high] - f[low]) / (logs[low] - logs[high]))
            offset[k] = logs[low] + f[low] / np.exp(log_chi[k])
        pull = np.einsum("k,kxy,kxy->xy", multiplier, self.score, np.stack(tilts))
        level = (problem.reference * (self.base - tau * log_ratio + pull)).sum(1)
        return Point(log_ratio, level, multiplier, offset, log_chi, slack)

    def evaluate(self, point: Point, tau: float) -> tuple[tuple[Array, ...], Array, float]:
        """Defects of all conditions, logs of the worst density ratios (m, X, Y), and the defects' total size."""
        problem, size = self.problem, len(self.bounds)
        ratio = np.where(problem.support, np.exp(np.minimum(point.log_ratio, 700.0)), 0.0)
        exponent = point.offset[:, None, None] - ratio * self.score / np.exp(point.log_chi[:, None, None])
        tilt = np.exp(np.minimum(exponent, 100.0))
        pull = np.einsum("k,kxy,kxy->xy", point.multiplier, self.score, tilt)
        cells = (self.base - tau * point.log_ratio - point.level[:, None] + pull) * problem.support
        norm = (problem.reference * ratio).sum(1) - 1
        mass = self.weight * tilt
        slack = (mass * ratio * self.score).sum((1, 2)) - self.bounds - point.slack
        final = np.concatenate([mass.sum((1, 2)) - 1, (mass * exponent).sum((1, 2)) - problem.robustness, slack])
        inactive = point.multiplier < slack
        final[2 * size :][inactive] = point.multiplier[inactive]
        if self.worst_slack:
            final = np.append(final, point.multiplier.sum() - 1)
        defect = (self.weight * np.abs(cells)).sum() + problem.prompt_weight @ np.abs(norm) + np.abs(final).sum()
        return (cells, norm, final, inactive), exponent, float(defect)

    def solve(self, point: Point, tau: float) -> Point | None:
        """The point at which the conditions hold, or None if Newton's method fails."""
        parts, exponent, error = self.evaluate(point, tau)
        for _ in range(60):
            if error < 1e-14:
                break
            step = self.newton_step(point, parts, exponent, tau)
            if step is None:
                return None
            # Responses that are practically never chosen may move freely.
            largest = float((np.abs(step[0]) * (point.log_ratio > np.log(1e-6)) * self.problem.support).max())
            length = 3.0 / max(largest, float(np.abs(step[2][len(self.bounds) :]).max()), 3.0)
            for _ in range(12):
                trial = point.moved(length, step)
                trial_parts, trial_exponent, trial_error = self.evaluate(trial, tau)
                if trial_error < (1 - 0.1 * length) * error:
                    break
                length /= 2
            else:
                break
            point, parts, exponent, error = trial, trial_parts, trial_exponent, trial_error
        return point if error < 1e-9 else None

    def newton_step(
        self, point: Point, parts: tuple[Array, ...], exponent: Array, tau: float
    ) -> tuple[Array, Array, Array] | None:
        """Changes of log ratio (X, Y), of c (X,), and of lambda, alpha, log chi and t together."""
        problem, size = self.problem, len(self.bounds)
        cells, norm, final, inactive = parts
        score, reference = self.score, problem.reference
        ratio, tilt = np.exp(point.log_ratio) * problem.support, np.exp(np.minimum(exponent, 100.0))
        scaled = ratio * score / np.exp(point.log_chi[:, None, None])
        pull = point.multiplier[:, None, None] * score * tilt
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
            mass = self.weight * tilt[k]
            matrix[k] = (mass * change).sum((1, 2))
            matrix[size + k] = (mass * (exponent[k] + 1) * change).sum((1, 2))
            matrix[2 * size + k] = (mass * ratio * score[k] * (change + move)).sum((1, 2))
            if inactive[k]:
                matrix[2 * size + k] = 0.0
                matrix[2 * size + k, k] = 1.0
        system, constant = matrix[:, :-1], matrix[:, -1]
        if self.worst_slack:
            raised = np.append(np.zeros(2 * size), np.where(inactive, 0.0, -1.0))
            total = np.append(np.ones(size), np.zeros(2 * size + 1))
            system = np.concatenate([np.concatenate([system, raised[:, None]], 1), total[None]])
            constant = np.append(constant, 0.0)
        try:
            theta = np.asarray(np.linalg.solve(system, -(final + constant)), dtype=np.float64)
        except np.linalg.LinAlgError:
            return None
        along = np.append(theta[: 3 * size], 1.0)
        return np.einsum("j,jxy->xy", along, move) * problem.support, along @ shift, theta

    def tilts(self, point: Point, tau: float) -> Array:
        """The worst density ratios (m, X, Y)."""
        return np.exp(self.evaluate(point, tau)[1]) * self.problem.support


def refine(
    problem: TabularProblem, bounds: Array, tau: float, log_ratio: Array, multiplier: Array, tilts: list[Array]
) -> tuple[Array, Array] | None:
    """The robust problem's worst density ratios times win rates (m, X, Y) and multipliers (m,), from a point close to
    its optimum; None if Newton's method fails."""
    conditions = Conditions(problem, bounds)
    point = conditions.start(tau, log_ratio, multiplier, tilts)
    point = None if point is None else conditions.solve(point, tau)
    if point is None:
        return None
    return conditions.tilts(point, tau) * conditions.score, np.maximum(point.multiplier, 0.0)


@dataclasses.dataclass(frozen=True)
class WorstSlack:
    """A bracket of the largest attainable worst slack: what ``policy`` (X, Y) attains, and a bound on what any does."""

    attained: float
    policy: Array
    bound: float
    certificate: Array


def largest_worst_slack(problem: TabularProblem, bounds: Array, gap: float = 1e-10) -> WorstSlack:
    """The best attainable ``min_k (robust value_k - b_k)``, between what a policy attains and what no policy exceeds.

    ``t - tau KL`` is maximised for falling tau, from the reference policy on. The policies attain the lower value. The
    upper is that of the worst densities there, weighted by the multipliers: over them any policy is worth at most its
    best responses. The two meet as tau vanishes; where Newton's method fails before they do, the bracket is wider.
    """
    conditions = Conditions(problem, bounds, worst_slack=True)
    constrained = list(problem.thresholds)
    _, achieved, tilts = constraint_values(problem, problem.reference)
    slack = achieved[constrained] - bounds
    tau, factor = 1.0, 0.2
    point = conditions.start(
        tau, np.zeros_like(problem.reference), np.eye(len(bounds))[slack.argmin()], tilts, float(slack.min())
    )
    lower, policy = float(slack.min()), problem.reference
    upper, certificate = np.inf, np.zeros(len(bounds))
    while point is not None and upper - lower > gap and factor < 0.9 and tau > 1e-14:
        following = conditions.solve(point, tau)
        if following is None:
            tau, factor = tau / np.sqrt(factor), np.sqrt(factor)
            continue
        point = following
        candidate = problem.reference * np.exp(np.minimum(point.log_ratio, 700.0)) * problem.support
        candidate /= candidate.sum(1, keepdims=True)
        _, achieved, tilts = constraint_values(problem, candidate)
        if (worst := float((achieved[constrained] - bounds).min())) > lower:
            lower, policy = worst, candidate
        weight = np.maximum(point.multiplier, 0.0)
        weight /= weight.sum()
        score = np.einsum("k,kxy,kxy->xy", weight, np.stack(tilts), conditions.score)
        bound = float(problem.prompt_weight @ np.where(problem.support, score, -np.inf).max(1) - weight @ bounds)
        if bound < upper:
            upper, certificate = bound, weight
        tau *= factor
    return WorstSlack(lower, policy, upper, certificate)
