"""The multipliers that meet thresholds on a data set's own labels, which is where training starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit

from mopo_kernels.dual.thresholds import UnmetThreshold, check_maximum, check_objectives, check_thresholds, wanted
from mopo_kernels.naive import ESTIMATORS
from mopo_kernels.tabular import TabularProblem, capped_multipliers, solve

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class LabelSolution:
    """Multipliers that meet the thresholds on a data set's own labels.

    Attributes:
        multiplier: by constrained objective, in [0, maximum]; ready to be ``DualAscent(initial=...)``.
        satisfaction: by objective, what the in-sample optimum at these multipliers has, on the estimator's scale; NaN
            for an objective without labels on the "pair" scale.
        feasible: whether every threshold is met.
        unmet: the thresholds that are not, with what these multipliers give.
        message: what a reader should know; empty when feasible and solved to the tolerance.
        residual: largest violation of the conditions that define the multipliers.
        converged: whether the residual is as small as that of a solution. On the "pair" scale the search can end above
            it where objectives are strongly opposed; a threshold unmet there is not known to be out of reach.
        slope: by constrained objective, how much its satisfaction changes a unit of its own multiplier there: eq. (8)
            of docs/method.md on the win-rate scale.
    """

    multiplier: dict[str, float]
    satisfaction: dict[str, float]
    feasible: bool
    unmet: tuple[UnmetThreshold, ...]
    message: str
    residual: float
    converged: bool = True
    slope: dict[str, float] = dataclasses.field(default_factory=dict)


class _PairScale:
    """Satisfaction on the "pair" scale of the in-sample optimum ``r_s = (1/tau) sum_k w_k (s_k - 1/2)``."""

    def __init__(self, difference: Array, preference: Array, weight: Array, tau: float) -> None:
        labelled = ~np.isnan(preference)
        mass = np.where(labelled, weight[:, None], 0.0)
        total = mass.sum(0)
        self.labelled = total > 0
        share = mass / np.where(self.labelled, total, 1.0)
        label = np.where(labelled, preference, 0.5)
        # sig z + (1 - sig)(1 - z) = (1 - z) + sig (2 z - 1): affine in sig(h).
        self.offset = (share * (1 - label)).sum(0)
        self.slope = share * (2 * label - 1)
        self.difference = difference / tau

    def __call__(self, objective_weight: Array) -> Array:
        chosen = expit(self.difference @ objective_weight)
        return np.where(self.labelled, self.offset + chosen @ self.slope, np.nan)

    def jacobian(self, objective_weight: Array) -> Array:
        """(K, K): derivative of satisfaction k with respect to weight l."""
        chosen = expit(self.difference @ objective_weight)
        return self.slope.T @ ((chosen * (1 - chosen))[:, None] * self.difference)


def _natural_residual(multiplier: Array, slack: Array, maximum: float) -> Array:
    return multiplier - np.clip(multiplier - slack, 0.0, maximum)


def _solve_pair(
    scale: _PairScale, primary: int, constrained: IntArray, bounds: Array, maximum: float, tolerance: float
) -> tuple[Array, float]:
    """Multipliers (m,) with ``lambda in [0, maximum]`` complementary to the slack, and the residual.

    Newton on the equations that the complementarity conditions select, where it makes progress; else a sweep that
    solves each objective's own equation in its own multiplier by bracketing, in which satisfaction increases.
    """
    weight = np.zeros(len(scale.offset))
    weight[primary] = 1.0

    def slack_at(multiplier: Array) -> Array:
        weight[constrained] = multiplier
        return np.asarray(scale(weight)[constrained] - bounds)

    grid = np.r_[0.0, maximum * np.geomspace(1e-4, 1.0, 32)]

    def lowest_met(multiplier: Array, k: int) -> float:
        """Lowest multiplier of constraint k that meets it, the others as they are; the maximum if none does."""
        moved = multiplier.copy()

        def own(value: float) -> float:
            moved[k] = value
            return float(slack_at(moved)[k])

        met = next((index for index, value in enumerate(grid) if own(value) >= 0), None)
        if met is None:
            return maximum
        return 0.0 if met == 0 else float(brentq(own, grid[met - 1], grid[met], xtol=1e-15, rtol=1e-15))

    multiplier = np.zeros(len(constrained))
    slack = slack_at(multiplier)
    best, best_size = multiplier, np.inf
    for sweep in range(200):
        size = float(np.abs(_natural_residual(multiplier, slack, maximum)).max(initial=0.0))
        if size < best_size:
            best, best_size = multiplier, size
        if best_size <= tolerance:
            break
        moved = multiplier - slack
        free = (moved > 0) & (moved < maximum)
        target = np.where(moved <= 0, 0.0, np.where(moved >= maximum, maximum, multiplier))
        weight[constrained] = multiplier
        jacobian = scale.jacobian(weight)[np.ix_(constrained, constrained)]
        right = -slack[free] - jacobian[np.ix_(free, ~free)] @ (target - multiplier)[~free]
        target[free] += np.linalg.lstsq(jacobian[np.ix_(free, free)], right, rcond=None)[0]
        for share in (1.0, 0.5, 0.25, 0.1):
            candidate = np.clip(multiplier + share * (target - multiplier), 0.0, maximum)
            trial = slack_at(candidate)
            if np.abs(_natural_residual(candidate, trial, maximum)).max() <= (1 - 0.5 * share) * size:
                multiplier, slack = candidate, trial
                break
        else:
            # Sweeps that go in circles are broken up by going only part of the way.
            share = 1.0 if sweep < 20 else 0.3
            multiplier = multiplier.copy()
            for k in range(len(constrained)):
                multiplier[k] += share * (lowest_met(multiplier, k) - multiplier[k])
            slack = slack_at(multiplier)
    return best, best_size


def solve_labels(
    win_rate: npt.ArrayLike,
    reference: npt.ArrayLike,
    objectives: Sequence[str],
    primary: str,
    thresholds: Mapping[str, float],
    tau: float,
    *,
    estimator: str = "pair",
    maximum: float = 10.0,
    prompt_weight: npt.ArrayLike | None = None,
    prompt: npt.ArrayLike | None = None,
    i: npt.ArrayLike | None = None,
    j: npt.ArrayLike | None = None,
    preference: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    tolerance: float = 1e-10,
) -> LabelSolution:
    """Solve the dual on a data set's own labels, as the starting point of training.

    On the win-rate scale ("snis", "closed_form") this is the tabular problem on the data set's candidate responses. On
    the "pair" scale satisfaction is how often the policy, choosing between the two responses of a labelled pair by its
    own log-ratio, picks the preferred one; the in-sample optimum has log-ratios ``(1/tau) sum_k w_k (s_k - 1/2)``, and
    the multipliers are those at which each threshold is met exactly or has multiplier 0.

    Args:
        win_rate: (K, X, Y) mean win rate of every candidate response, in [0, 1].
        reference: (X, Y) probabilities; usually uniform over a prompt's responses, 0 on padding.
        objectives: names of the K objectives.
        primary: the objective to maximise.
        thresholds: lowest allowed satisfaction by objective, on the estimator's scale.
        tau: strength of the KL term, > 0.
        estimator: "pair", "snis" or "closed_form".
        maximum: cap on every multiplier, > 0.
        prompt_weight: (X,) weights >= 0 of the prompts on the win-rate scale; equal by default.
        prompt: (P,) prompt index in 0..X-1 of every pair; this and the following are for "pair" only.
        i, j: (P,) indices in 0..Y-1 of the pair's responses.
        preference: (P, K) probability that response i beats response j, NaN where unlabelled.
        weight: (P,) pair weights >= 0; 1 by default.
        tolerance: largest residual accepted.

    Raises:
        ValueError: an argument is missing or out of range, or a constrained objective has no labels.
    """
    names = check_objectives(objectives, primary)
    bounds_by_name = check_thresholds(names, primary, thresholds)
    maximum = check_maximum(maximum)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {list(ESTIMATORS)}; got {estimator!r}")
    main = names.index(primary)
    constrained = np.array([names.index(name) for name in bounds_by_name], dtype=np.int64)
    bounds = np.array(list(bounds_by_name.values()))
    problem = TabularProblem(
        win_rate=win_rate,
        reference=reference,
        tau=tau,
        thresholds=dict(zip(constrained.tolist(), bounds.tolist(), strict=True)),
        primary=main,
        prompt_weight=prompt_weight,
    )
    if len(problem.win_rate) != len(names):
        raise ValueError(f"win_rate: expected {len(names)} objectives first; got shape {problem.win_rate.shape}")
    if estimator == "pair":
        scale = _pair_scale(problem, prompt, i, j, preference, weight)
        if unlabelled := [names[k] for k in constrained if not scale.labelled[k]]:
            raise ValueError(f"thresholds: expected objectives that have labels; got some for {unlabelled}")
        multiplier, residual = _solve_pair(scale, main, constrained, bounds, maximum, tolerance)
        full = np.zeros(len(names))
        full[main], full[constrained] = 1.0, multiplier
        satisfaction = scale(full)
        jacobian = scale.jacobian(full)
        reason = ""
    else:
        exact = solve(problem, tolerance)
        multiplier, satisfaction, residual = exact.multiplier[constrained], exact.value, exact.kkt_residual
        reason = ""
        if exact.best_value is not None:
            reason = f"; on these responses every policy misses some threshold by at least {-exact.best_value:.3g}"
        elif multiplier.max(initial=0.0) > maximum:
            reason = f"; a maximum of {multiplier.max():.3g} would do"
        if reason:
            capped, satisfaction, residual = capped_multipliers(problem, maximum, tolerance)
            multiplier = capped[constrained]
        full = np.zeros(len(names))
        full[main], full[constrained] = 1.0, multiplier
        jacobian = _win_rate_jacobian(problem, full)
    accepted = 100 * tolerance
    # With a residual no larger, a threshold missed by more has its multiplier at the maximum.
    missed = satisfaction[constrained] < bounds - accepted
    # Where the win-rate scale has a reason, that is the proof, however well the capped problem was solved.
    converged = bool(reason) or residual <= accepted
    found = dict(zip(bounds_by_name, multiplier.tolist(), strict=True))
    unmet = tuple(
        UnmetThreshold(name, bounds_by_name[name], float(satisfaction[names.index(name)]), found[name])
        for name, bad in zip(bounds_by_name, missed, strict=True)
        if bad
    )
    message = ""
    if unmet and converged:
        held = [name for name, bad in zip(found, missed, strict=True) if found[name] > 0 and not bad]
        message = _impossible(unmet, [wanted(name, bounds_by_name[name]) for name in held]) + reason
    elif not converged:
        reached = "".join(f", {wanted(each.objective, each.threshold)} reaches {each.best_seen:.4f}" for each in unmet)
        message = f"the multipliers are approximate (residual {residual:.1e}){reached}"
    return LabelSolution(
        multiplier=found,
        satisfaction=dict(zip(names, satisfaction.tolist(), strict=True)),
        feasible=not unmet,
        unmet=unmet,
        message=message,
        residual=residual,
        converged=converged,
        slope={name: float(jacobian[k, k]) for name, k in zip(found, constrained, strict=True)},
    )


def _win_rate_jacobian(problem: TabularProblem, objective_weight: Array) -> Array:
    """(K, K): ``E_x Cov_{pi_w}(s_k, s_l) / tau``, eq. (8) of docs/method.md."""
    score = np.einsum("k,kxy->xy", objective_weight, problem.win_rate) / problem.tau
    tilted = np.where(problem.support, np.log(np.where(problem.support, problem.reference, 1.0)) + score, -np.inf)
    policy = np.exp(tilted - tilted.max(1, keepdims=True))
    policy /= policy.sum(1, keepdims=True)
    centred = problem.win_rate - (policy * problem.win_rate).sum(2, keepdims=True)
    covariance = np.einsum("x,xy,kxy,lxy->kl", problem.prompt_weight, policy, centred, centred, optimize=True)
    return np.asarray(covariance / problem.tau)


def _impossible(unmet: Sequence[UnmetThreshold], held: Sequence[str]) -> str:
    """That the multipliers of ``unmet`` are all at their maximum and do not suffice while ``held`` are met."""
    named = " and ".join(wanted(each.objective, each.threshold) for each in unmet)
    beside = f" beside {' and '.join(held)}" if held else ""
    if len(unmet) == 1:
        (only,) = unmet
        return (
            f"threshold {named} cannot be met{beside}: {only.best_seen:.3f} with its multiplier at the maximum, "
            f"{only.multiplier:g}"
        )
    reached = ", ".join(f"{each.objective} {each.best_seen:.3f}" for each in unmet)
    return (
        f"thresholds {named} cannot be met together{beside}: {reached} with their multipliers at the maximum, "
        f"{unmet[0].multiplier:g}"
    )


def _pair_scale(
    problem: TabularProblem,
    prompt: npt.ArrayLike | None,
    i: npt.ArrayLike | None,
    j: npt.ArrayLike | None,
    preference: npt.ArrayLike | None,
    weight: npt.ArrayLike | None,
) -> _PairScale:
    """The pair arrays of :func:`solve_labels`, checked."""
    objectives, prompts, responses = problem.win_rate.shape
    indices = []
    for name, value, size in (("prompt", prompt, prompts), ("i", i, responses), ("j", j, responses)):
        if value is None:
            raise ValueError(f'{name}: expected a (P,) array for the estimator "pair"; got None')
        index = np.asarray(value)
        if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer) or len(index) != len(np.asarray(prompt)):
            raise ValueError(f"{name}: expected a (P,) array of integers; got shape {index.shape}, {index.dtype}")
        outside = (index < 0) | (index >= size)
        if outside.any():
            raise ValueError(f"{name}: expected a number in 0..{size - 1}; got {index[outside][0]}")
        indices.append(index)
    x, first, second = indices
    for name, response in (("i", first), ("j", second)):
        if not problem.support[x, response].all():
            where = int(np.argmin(problem.support[x, response]))
            raise ValueError(f"{name}: expected a response with reference > 0; got {response[where]} at pair {where}")
    if preference is None:
        raise ValueError('preference: expected a (P, K) array for the estimator "pair"; got None')
    label = np.asarray(preference, dtype=np.float64)
    if label.shape != (len(x), objectives):
        raise ValueError(f"preference: expected shape ({len(x)}, {objectives}); got {label.shape}")
    if ((label < 0) | (label > 1)).any():
        raise ValueError(f"preference: expected a number in [0, 1] or NaN; got {label[(label < 0) | (label > 1)][0]}")
    mass = np.ones(len(x)) if weight is None else np.asarray(weight, dtype=np.float64)
    if mass.shape != (len(x),):
        raise ValueError(f"weight: expected shape ({len(x)},); got {mass.shape}")
    if not (np.isfinite(mass).all() and (mass >= 0).all()):
        raise ValueError(f"weight: expected finite weights >= 0; got {mass[~(np.isfinite(mass) & (mass >= 0))][0]}")
    difference = problem.win_rate[:, x, first] - problem.win_rate[:, x, second]
    return _PairScale(difference.T, label, mass, problem.tau)
