"""Exact solutions of finite MOPO problems.

The problem, over prompts ``x ~ nu`` and a finite set of responses per prompt:

    maximise  P_primary(pi) - tau * E_x KL(pi || reference)   subject to   P_k(pi) >= b_k

with ``P_k(pi) = E_{x ~ nu, y ~ pi} s_k(x, y)`` and ``s_k(x, y) = E_{y' ~ behaviour} p_k(y > y' | x)``. For multipliers
``lambda`` the maximiser is ``pi ~ reference * exp((s_primary + sum_k lambda_k s_k) / tau)``, and the multipliers are
the minimiser of the dual (``mopo_kernels.tabular.dual``).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mopo_kernels.tabular.dual import Dual, best_attainable, minimise, optimality_residual
from mopo_kernels.tabular.problem import Array, IntArray, TabularProblem
from mopo_kernels.tabular.robust import constraint_values, largest_worst_slack, refine

_ROBUST_ROUNDS = 60
_CUTTING_ROUNDS = 100


@dataclasses.dataclass(frozen=True)
class TabularSolution:
    """The optimum, or, when the thresholds cannot be met together, proof of that and the best that can.

    The values are those of eq. (2) of docs/method.md, the gap is eq. (10) of docs/method.md.

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
            when infeasible. At the boundary of what is attainable the policy is that of a multiplier of more digits
            than fit ``multiplier``, whose last digit there moves the policy by up to ``multiplier / tau * 1e-16``.
        gap: dual value minus primal value, each computed from its own definition. Infinite when infeasible.
        primal: P_primary - tau * kl of ``policy``.
        dual: g(multiplier), an upper bound on every feasible policy's ``primal`` (minus infinity when infeasible).
        best_value: None when feasible; otherwise the largest attainable ``min_k (constraint_value_k - b_k)``, < 0,
            attained by ``policy``.
        best_bound: None when feasible; otherwise an upper bound on what any policy can attain, proved by
            ``certificate``: ``best_bound - best_value`` is the error of ``best_value``, below 1e-10. With
            ``robustness > 0`` it can be as much as 1e-3, where the ball is so large that it reaches single outcomes.
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


def _by_owner(owner: IntArray, value: Array, size: int) -> Array:
    """Sums of ``value`` over the rows of each of ``size`` constraints."""
    return np.asarray(np.bincount(owner, value.astype(np.float64), size), dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class _Found:
    """Where a search ended: linear constraints (robust: those found so far), each row's threshold, and multipliers."""

    feasible: bool
    dual: Dual
    multiplier: Array
    owner: IntArray
    tau: float
    residual: float


def _search(problem: TabularProblem, bounds: Array, tolerance: float, start: Array | None = None) -> _Found:
    """Minimise the dual of ``problem`` with ``bounds`` for thresholds, or prove that they cannot be met."""
    constrained = np.array(list(problem.thresholds), dtype=np.int64)
    count = len(constrained)
    rows, owner = problem.win_rate[constrained], np.arange(count)
    start = np.zeros(count) if start is None else start
    inner = tolerance if problem.robustness == 0 else 0.1 * tolerance
    levels = [problem.tau]
    while problem.robustness > 0 and levels[-1] < 0.2:
        levels.append(2 * levels[-1])
    for tau in reversed(levels):
        refined = False
        for attempt in range(_ROBUST_ROUNDS):
            dual = Dual(problem, rows, bounds[owner])
            if refined:
                found = start
            else:
                found, residual, infeasible = minimise(dual, tau, inner, start, extended=problem.robustness == 0)
                if infeasible or (residual > tolerance and best_attainable(dual)[1] < -tolerance):
                    return _Found(False, dual, found, owner, tau, np.inf)
            policy, _ = dual.policy(found, tau)
            _, achieved, tilts = constraint_values(problem, policy)
            total = _by_owner(owner, found, count)
            residual = optimality_residual(total, achieved[constrained] - bounds, np.inf)
            if residual <= tolerance or not tilts:
                break
            if attempt % 4 == 0 and not refined:
                log_ratio = np.concatenate([dual.softmax(block, found, tau)[2] for block in dual.blocks()])
                better = refine(problem, bounds, tau, log_ratio, total, tilts)
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
            if largest_worst_slack(problem, bounds).bound < -tolerance:
                return _Found(False, dual, found, owner, tau, np.inf)
            raise ArithmeticError(f"the robust problem was not solved: its residual is {residual:.1e} at tau {tau:g}")
        start = found
    return _Found(True, dual, found, owner, tau, residual)


def _infeasible(problem: TabularProblem, search: _Found) -> TabularSolution:
    """The certificate and the policy with the largest worst slack, from the linear constraints that cannot be met.

    Without robustness one linear programme gives both. With it, Newton's method on the robust problem itself does,
    unless the ball is so large that it reaches single outcomes, where the method fails: then the programme is solved
    over and over, each time with the worst q for its last policy among the constraints.
    """
    constrained = np.array(list(problem.thresholds))
    bounds = np.array(list(problem.thresholds.values()))
    rows, owner = search.dual.rows, search.owner
    lower, upper, policy, certificate = -np.inf, np.inf, problem.reference, np.zeros(len(bounds))
    if problem.robustness > 0:
        closest = largest_worst_slack(problem, bounds)
        lower, upper = closest.attained, closest.bound
        policy, certificate = closest.policy, closest.certificate
    for _ in range(_CUTTING_ROUNDS):
        if upper - lower <= 1e-10:
            break
        _, bound, candidate, weight = best_attainable(Dual(problem, rows, bounds[owner]))
        if bound < upper:
            upper, certificate = bound, _by_owner(owner, weight, len(bounds))
        _, achieved, tilts = constraint_values(problem, candidate)
        if (worst := float((achieved[constrained] - bounds).min())) > lower:
            lower, policy = worst, candidate
        if not tilts:
            break
        rows = np.concatenate([rows, np.stack(tilts) * problem.win_rate[constrained]])
        owner = np.concatenate([owner, np.arange(len(bounds))])
    value, achieved, _ = constraint_values(problem, policy)
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


def solve(problem: TabularProblem, tolerance: float = 1e-10, *, start: Array | None = None) -> TabularSolution:
    """Solve ``problem`` exactly: minimise its dual and read the policy off the multipliers.

    The problem is eq. (3) of docs/method.md.

    With ``robustness > 0`` every constraint is the minimum of linear ones, one for each distribution q in the KL ball:
    the linear problem is solved for the q known so far, and the worst q for its policy joins them until the policy
    meets the robust constraint itself. The multiplier of an objective is then the sum over its q, and the dual value
    remains a valid bound, because a mixture of distributions in the ball is in the ball.

    Args:
        problem: the problem.
        tolerance: largest residual accepted (win-rate units), and the margin below which thresholds at the exact
            boundary of what is attainable count as met. There the multipliers grow without bound, and the returned ones
            are finite values at which the policy meets the thresholds within the tolerance.
        start: (K,) multipliers to begin from, as of a problem with nearby thresholds; those of objectives without a
            threshold are not looked at. It changes how long the solution takes, not what it is.

    Returns:
        The solution. Thresholds that cannot be met together give ``feasible=False`` with a certificate, never a policy
        that pretends to be the optimum.

    Raises:
        ValueError: ``tolerance`` is not positive, or ``start`` is not K finite values.
        ArithmeticError: a robust problem could not be solved to ``tolerance``.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a number > 0; got {tolerance}")
    constrained = np.array(list(problem.thresholds), dtype=np.int64)
    bounds = np.array(list(problem.thresholds.values()))
    if start is not None:
        start = np.array(start, dtype=np.float64)
        if start.shape != (len(problem.win_rate),) or not np.isfinite(start).all():
            raise ValueError(f"start: expected {len(problem.win_rate)} finite values; got {start.tolist()}")
        start = np.maximum(start[constrained], 0.0)
    search = _search(problem, bounds, tolerance, start)
    if not search.feasible:
        return _infeasible(problem, search)
    dual, found, residual = search.dual, search.multiplier, search.residual
    policy, kl = dual.policy(found, problem.tau)
    value, achieved, _ = constraint_values(problem, policy)
    total = _by_owner(search.owner, found, len(constrained))
    multiplier = np.zeros(len(value))
    multiplier[constrained] = total
    multiplier[problem.primary] = 1.0
    primal = float(value[problem.primary]) - problem.tau * kl
    bound = float(dual.evaluate(found, problem.tau)[0])
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
    is not met has its multiplier at the cap: eq. (12) of docs/method.md.

    Args:
        problem: the problem, with ``robustness`` 0.
        maximum: the cap, > 0.
        tolerance: largest residual accepted.

    Returns:
        Multipliers (K,) with 1 for the primary, the win rates (K,) of the policy they define, and the residual.
    """
    if problem.robustness > 0:
        raise ValueError(f"problem: expected robustness 0; got {problem.robustness}")
    constrained = np.array(list(problem.thresholds), dtype=np.int64)
    dual = Dual(problem, problem.win_rate[constrained], np.array(list(problem.thresholds.values())))
    found, residual, _ = minimise(dual, problem.tau, tolerance, np.zeros(len(constrained)), maximum)
    value = problem.value(dual.policy(found, problem.tau)[0])
    multiplier = np.zeros(len(value))
    multiplier[problem.primary] = 1.0
    multiplier[constrained] = found
    return multiplier, value, residual
