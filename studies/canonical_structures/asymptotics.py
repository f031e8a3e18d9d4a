"""What learning from labels tends to, and how far finite data leaves it from there: the statistics of the study.

:func:`limit` is where training ends with infinitely many pairs. For "regression" with "snis" and the reference's own
data that is the exact optimum; for other losses and estimators it is the solution of another problem, and its distance
from the optimum is their bias. :func:`sampling_error` is the distribution of what is learned around that limit by the
delta method. Nothing here calls the library's losses: both are derived apart from what they are compared with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import chi2

from studies.canonical_structures.structures import Structure

__all__ = ["Limit", "Sampling", "SamplingError", "limit", "sampling_error", "total_variation"]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Pools whose averages stand for the population where it cannot be enumerated.
_POOL_DRAWS = 400_000


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pairs are drawn: the options of :func:`studies.canonical_structures.pairs.sample_pairs`."""

    missing: float = 0.0
    one_objective: bool = False
    label_noise: float = 0.0
    distinct: bool = False

    def rate(self, objectives: int) -> float:
        """The share of pairs with a label of a given objective."""
        return (1 - self.missing) / (objectives if self.one_objective else 1)

    def joint_rate(self, objectives: int) -> Array:
        """(K, K) the share of pairs with labels of both objectives."""
        both = (1 - self.missing) ** 2 * (0.0 if self.one_objective else 1.0)
        return np.where(np.eye(objectives, dtype=bool), self.rate(objectives), both)


@dataclasses.dataclass(frozen=True)
class Limit:
    """Where training ends with infinitely many labels.

    Attributes:
        policy: (X, Y).
        multiplier: (K,) 1 for the primary.
        measured: (K,) what the estimator then says of each objective.
        value: (K,) exact win rates ``P_k``.
        residual: how well the conditions that define the multipliers hold.
    """

    policy: Array
    multiplier: Array
    measured: Array
    value: Array
    residual: float


def total_variation(structure: Structure, one: Array, other: Array) -> float:
    """``E_x`` of half the summed absolute difference of two policies (X, Y)."""
    return float(0.5 * structure.prompt_weight @ np.abs(one - other).sum(1))


def _normalised(logit: Array) -> Array:
    policy = np.exp(logit - logit.max(1, keepdims=True))
    return np.asarray(policy / policy.sum(1, keepdims=True))


def _pair_weight(structure: Structure, distinct: bool) -> Array:
    """(X, Y, Y) the probability of each prompt and pair of draws."""
    weight = structure.behaviour[:, :, None] * structure.behaviour[:, None, :]
    if distinct:
        weight = weight * ~np.eye(weight.shape[1], dtype=bool)
        weight = weight / weight.sum((1, 2), keepdims=True)
    return np.asarray(structure.prompt_weight[:, None, None] * weight)


def _centred_preference(structure: Structure, sampling: Sampling) -> Array:
    """(K, X, Y, Y) mean label minus 1/2."""
    return np.asarray((1 - 2 * sampling.label_noise) * (structure.preference - 0.5))


# --- pools ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _PoolLabels:
    """Pools with their responses' mean labels: cell (Q, n), mean (Q, n, K), weight (Q,) summing to one."""

    cell: IntArray
    mean: Array
    weight: Array

    def ratio(self, objective_weight: Array, tau: float) -> Array:
        """``n softmax`` of the mean labels within each pool, (Q, n)."""
        score = self.mean @ objective_weight / tau
        tilted = np.exp(score - score.max(1, keepdims=True))
        return np.asarray(score.shape[1] * tilted / tilted.sum(1, keepdims=True))


def _pairs_as_pools(structure: Structure, sampling: Sampling) -> _PoolLabels:
    """Every pair with every pattern of labels and its probability."""
    objectives, prompts, responses, _ = structure.preference.shape
    won = 0.5 + _centred_preference(structure, sampling)
    tie = (structure.preference == 0.5) & structure.observed_ties
    start = _pair_weight(structure, sampling.distinct)
    grid = np.arange(prompts * responses).reshape(prompts, responses)
    cell = np.stack(np.broadcast_arrays(grid[:, :, None], grid[:, None, :]), -1).reshape(-1, 2)
    cells, means, weights = [], [], []
    for pattern in itertools.product((0.0, 1.0), repeat=objectives):
        bits = np.array(pattern)[:, None, None, None]
        label = np.where(tie, 0.5, np.broadcast_to(bits, won.shape)).reshape(objectives, -1).T
        weight = (start * np.where(tie, 0.5, np.where(bits == 1, won, 1 - won)).prod(0)).reshape(-1)
        likely = weight > 0
        cells.append(cell[likely])
        means.append(np.stack([label, 1 - label], 1)[likely])
        weights.append(weight[likely])
    return _PoolLabels(np.concatenate(cells), np.concatenate(means), np.concatenate(weights))


def _drawn_pools(structure: Structure, sampling: Sampling, size: int, seed: int) -> _PoolLabels:
    """Many pools of ``size`` draws with all their pairs labelled."""
    rng = np.random.default_rng([seed, size])
    objectives, prompts, responses, _ = structure.preference.shape
    count = max(1, _POOL_DRAWS // size)
    prompt = rng.choice(prompts, count, p=structure.prompt_weight)
    response = np.empty((count, size), dtype=np.int64)
    for x in range(prompts):
        here = prompt == x
        response[here] = rng.choice(responses, (int(here.sum()), size), p=structure.behaviour[x])
    won = np.zeros((count, size, objectives))
    for i, j in itertools.combinations(range(size), 2):
        probability = structure.preference[:, prompt, response[:, i], response[:, j]].T
        label = (rng.random(probability.shape) < probability).astype(np.float64)
        label = np.where(rng.random(probability.shape) < sampling.label_noise, 1 - label, label)
        if structure.observed_ties:
            label[probability == 0.5] = 0.5
        won[:, i] += label
        won[:, j] += 1 - label
    return _PoolLabels(prompt[:, None] * responses + response, won / (size - 1), np.full(count, 1 / count))


# --- the limit --------------------------------------------------------------------------------------------------------


def _least_squares(structure: Structure, target: Array, weight: Array) -> Array:
    """The policy of the restricted class whose margins are nearest to ``target`` (X, Y, Y) plus the reference's."""
    assert structure.features is not None
    features = structure.features
    difference = (features[:, :, None] - features[:, None, :]).reshape(-1, features.shape[2])
    log_reference = np.log(structure.reference)
    goal = (target + log_reference[:, :, None] - log_reference[:, None, :]).reshape(-1)
    root = np.sqrt(weight.reshape(-1))
    theta = np.linalg.lstsq(root[:, None] * difference, root * goal, rcond=None)[0]
    return structure.class_policy(theta)


def _complementary(
    measure: Callable[[Array], Array], bounds: Array, maximum: float, tolerance: float
) -> tuple[Array, float]:
    """``lambda`` in [0, maximum] with ``measure(lambda) >= bounds``, equal where ``lambda > 0``; and the residual.

    Newton's method on the conditions, with differences for derivatives and shorter steps where it does not progress.
    """

    def residual(multiplier: Array, slack: Array) -> Array:
        return np.asarray(multiplier - np.clip(multiplier - slack, 0.0, maximum))

    multiplier = np.zeros(len(bounds))
    slack = measure(multiplier) - bounds
    for _ in range(60):
        now = residual(multiplier, slack)
        if np.abs(now).max(initial=0.0) <= tolerance:
            break
        free = ((multiplier - slack) > 0) & ((multiplier - slack) < maximum)
        slope = np.zeros((len(bounds), len(bounds)))
        for k in np.flatnonzero(free):
            moved = multiplier.copy()
            moved[k] += 1e-5
            slope[:, k] = (measure(moved) - bounds - slack) / 1e-5
        target = np.where(multiplier - slack <= 0, 0.0, np.where(multiplier - slack >= maximum, maximum, multiplier))
        right = -slack[free] - slope[np.ix_(free, ~free)] @ (target - multiplier)[~free]
        step = target - multiplier
        step[free] = np.clip(np.linalg.lstsq(slope[np.ix_(free, free)], right, rcond=None)[0], -2.0, 2.0)
        for share in 0.5 ** np.arange(8):
            candidate = np.clip(multiplier + share * step, 0.0, maximum)
            trial = measure(candidate) - bounds
            if np.abs(residual(candidate, trial)).max() < (1 - 1e-4 * share) * np.abs(now).max():
                break
        else:
            candidate = np.clip(multiplier - 0.5 * slack, 0.0, maximum)
            trial = measure(candidate) - bounds
        multiplier, slack = candidate, trial
    return multiplier, float(np.abs(residual(multiplier, slack)).max(initial=0.0))


def limit(
    structure: Structure,
    *,
    loss_type: str = "regression",
    estimator: str = "snis",
    policy: str = "table",
    sampling: Sampling | None = None,
    label_rate: float | None = None,
    pool: int = 2,
    maximum: float = 20.0,
    seed: int = 0,
) -> Limit:
    """Where :func:`studies.canonical_structures.learning.learn` ends with infinitely many labels, solved without it.

    Args:
        structure: the problem.
        loss_type: "regression" or "cloning".
        estimator: "pair", "snis" or "closed_form".
        policy: "table", or "linear" with "regression".
        sampling: how pairs are drawn.
        label_rate: as in ``learn``; None leaves missing labels at 0.
        pool: responses a pool, for "cloning" and "closed_form": 2 is enumerated, more are averaged over many drawn
            pools, which leaves an error of about 1e-3.
        maximum: cap on the multipliers.
        seed: of those pools.
    """
    sampling = Sampling() if sampling is None else sampling
    objectives = len(structure.objectives)
    pooled = loss_type == "cloning" or estimator == "closed_form"
    if pooled and (sampling.missing or sampling.one_objective):
        raise ValueError("sampling must label every objective with cloning or closed_form")
    pools = None
    if pooled:
        pools = _pairs_as_pools(structure, sampling) if pool == 2 else _drawn_pools(structure, sampling, pool, seed)
    pair_weight = _pair_weight(structure, sampling.distinct)
    label = _centred_preference(structure, sampling)
    counted = sampling.rate(objectives) / (1.0 if label_rate is None else label_rate)
    with np.errstate(divide="ignore"):
        log_reference = np.log(structure.reference)
    share = pair_weight / pair_weight.sum((1, 2), keepdims=True)

    def learned(weight: Array) -> Array:
        if loss_type == "cloning":
            assert pools is not None
            ratio = pools.weight[:, None] * pools.ratio(weight, structure.tau)
            mass = np.bincount(pools.cell.reshape(-1), ratio.reshape(-1), structure.reference.size)
            mass = mass.reshape(structure.reference.shape)
            return np.asarray(mass / mass.sum(1, keepdims=True))
        target = counted * np.tensordot(weight, label, 1) / structure.tau
        if policy == "linear":
            return _least_squares(structure, target, pair_weight)
        # Normal equations of the pairs, solved as they stand: with distinct draws they are not those of the mean.
        log_ratio = np.empty_like(structure.reference)
        for x in range(len(log_ratio)):
            laplacian = np.diag(share[x].sum(1)) - share[x]
            log_ratio[x] = np.linalg.pinv(laplacian) @ (share[x] * target[x]).sum(1)
        return _normalised(log_reference + log_ratio)

    def measured(weight: Array) -> Array:
        if estimator == "closed_form":
            assert pools is not None
            ratio = pools.weight[:, None] * pools.ratio(weight, structure.tau)
            return np.asarray(np.einsum("qn,qnk->k", ratio, pools.mean) / ratio.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            log_ratio = np.log(learned(weight)) - log_reference
        log_ratio = np.where(structure.reference > 0, log_ratio, 0.0)
        if estimator == "pair":
            chosen = expit(log_ratio[:, :, None] - log_ratio[:, None, :])
            total = 1.0
        else:
            chosen = np.broadcast_to(np.exp(log_ratio)[:, :, None], pair_weight.shape)
            total = float((pair_weight * (chosen + chosen.transpose(0, 2, 1))).sum())
        unchosen = chosen.transpose(0, 2, 1)
        return np.asarray(0.5 + np.einsum("xij,kxij->k", pair_weight * (chosen - unchosen), label) / total)

    weight = np.zeros(objectives)
    weight[structure.primary] = 1.0
    constrained = sorted(structure.thresholds)

    def at(multiplier: Array) -> Array:
        weight[constrained] = multiplier
        return measured(weight)[constrained]

    bounds = np.array([structure.thresholds[k] for k in constrained])
    multiplier, residual = _complementary(at, bounds, maximum, 1e-9)
    weight[constrained] = multiplier
    result = learned(weight)
    return Limit(result, weight.copy(), measured(weight), structure.value(result), residual)


# --- the error --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SamplingError:
    """The large-sample distribution of what is learned from ``count`` pairs: normal around the limit.

    Attributes:
        covariance: (X * Y + K, X * Y + K) of log-policy (less its mean over each prompt's responses) and multipliers.
        limit: its mean.
        value_deviation: (K,) standard deviations of the exact win rates of the learned policy.
        multiplier_deviation: (K,) those of the multipliers.
        total_variation: expected total variation between the learned policy and the limit.
        kl: expected ``E_x KL`` between them, nats.
        regular: no constraint without a multiplier is so close to binding that it will bind in some samples; where one
            is, the distribution is not normal.
    """

    covariance: Array
    limit: Limit
    value_deviation: Array
    multiplier_deviation: Array
    total_variation: float
    kl: float
    regular: bool

    def test(self, policy: Array, multiplier: Array) -> tuple[float, int]:
        """The p-value of a learned policy and its multipliers, and the degrees of freedom: the squared distance to the
        limit in units of the covariance, all together, is chi-square distributed."""
        with np.errstate(divide="ignore"):
            difference = np.log(policy) - np.log(self.limit.policy)
        vector = np.concatenate(
            [(difference - difference.mean(1, keepdims=True)).ravel(), multiplier - self.limit.multiplier]
        )
        scale = np.sqrt(np.maximum(np.diagonal(self.covariance), 0))
        used = scale > 1e-9 * scale.max()
        # What cannot vary must not: multipliers that are 0 in the limit.
        if np.abs(vector[~used]).max(initial=0.0) > 1e-5:
            return 0.0, int(used.sum())
        if not np.isfinite(vector).all():
            return 0.0, int(used.sum())
        correlation = self.covariance[np.ix_(used, used)] / np.outer(scale[used], scale[used])
        eigenvalue, axes = np.linalg.eigh(correlation)
        kept = eigenvalue > 1e-7 * eigenvalue[-1]
        z = (axes[:, kept].T @ (vector[used] / scale[used])) / np.sqrt(eigenvalue[kept])
        return float(chi2.sf(float(z @ z), int(kept.sum()))), int(kept.sum())


def sampling_error(
    structure: Structure,
    at: Limit,
    count: int,
    *,
    estimator: str = "snis",
    policy: str = "table",
    sampling: Sampling | None = None,
    label_rate: float | None = None,
) -> SamplingError:
    """Delta method for "regression" with "snis" or "pair", from ``count`` independent pairs.

    Training solves ``sum_p psi_p(theta, lambda) = 0``: the gradient of a pair's loss, and, for each active constraint,
    its term ``m [c (z - b) + c' (1 - z - b)]`` with ``c, c'`` the estimator's weights of the two responses. So the
    error is ``A^-1 B A^-T / count`` with A the expected derivative and B the covariance of psi, both exact sums over
    all pairs here.
    """
    sampling = Sampling() if sampling is None else sampling
    objectives, prompts, responses, _ = structure.preference.shape
    cells, tau = prompts * responses, structure.tau
    active = np.array([k for k in sorted(structure.thresholds) if at.multiplier[k] > 1e-7], dtype=np.int64)
    bounds = np.array([structure.thresholds[k] for k in active])

    # One row per ordered pair with positive probability: E rows.
    weight = _pair_weight(structure, sampling.distinct)
    x, i, j = np.nonzero(weight > 0)
    weight = weight[x, i, j]
    centred = _centred_preference(structure, sampling)[:, x, i, j].T
    tie = ((structure.preference[:, x, i, j] == 0.5) & structure.observed_ties).T
    rate, joint = sampling.rate(objectives), sampling.joint_rate(objectives)

    # Second moments of (1, u, m), with m_k = 1 where labelled and u_k = m_k (z_k - 1/2): (E, 2K + 1, 2K + 1).
    size = 2 * objectives + 1
    moment = np.empty((len(x), size, size))
    u, m = slice(1, objectives + 1), slice(objectives + 1, size)
    moment[:, 0, 0] = 1.0
    moment[:, 0, u] = moment[:, u, 0] = rate * centred
    moment[:, 0, m] = moment[:, m, 0] = rate
    moment[:, u, u] = joint * centred[:, :, None] * centred[:, None, :]
    same = np.arange(1, objectives + 1)
    moment[:, same, same] = rate * np.where(tie, 0.0, 0.25)
    moment[:, u, m] = joint * centred[:, :, None]
    moment[:, m, u] = moment[:, u, m].transpose(0, 2, 1)
    moment[:, m, m] = joint

    with np.errstate(divide="ignore"):
        log_ratio = np.log(at.policy) - np.log(structure.reference)
    margin = log_ratio[x, i] - log_ratio[x, j]
    scale = at.multiplier / (tau * (1.0 if label_rate is None else label_rate))
    loss = np.zeros((len(x), size))
    loss[:, 0], loss[:, u] = margin, -scale

    # d c and d c' with respect to the logits, (E, X * Y).
    identity = np.eye(cells)
    first, second = identity[x * responses + i], identity[x * responses + j]
    difference = first - second
    if estimator == "pair":
        chosen = expit(margin)
        unchosen = 1 - chosen
        d_chosen = (chosen * unchosen)[:, None] * difference
        d_unchosen = -d_chosen
    else:
        mean = np.zeros((len(x), cells))
        mean[np.arange(len(x))[:, None], x[:, None] * responses + np.arange(responses)] = at.policy[x]
        chosen, unchosen = np.exp(log_ratio[x, i]), np.exp(log_ratio[x, j])
        d_chosen, d_unchosen = chosen[:, None] * (first - mean), unchosen[:, None] * (second - mean)
    term = np.zeros((len(active), len(x), size))
    for row, (k, bound) in enumerate(zip(active, bounds, strict=True)):
        term[row, :, 1 + k] = chosen - unchosen
        term[row, :, 1 + objectives + k] = (chosen + unchosen) * (0.5 - bound)

    design = identity
    if policy == "linear":
        assert structure.features is not None
        design = structure.features.reshape(cells, -1)
    difference_theta = difference @ design
    parameters = design.shape[1]
    total = parameters + len(active)
    slope, spread = np.zeros((total, total)), np.zeros((total, total))
    head, tail = slice(0, parameters), slice(parameters, total)
    slope[head, head] = difference_theta.T @ (weight[:, None] * difference_theta)
    slope[head, tail] = (
        -difference_theta.T @ (weight[:, None] * rate * centred[:, active]) * (scale[active] / at.multiplier[active])
    )
    for row, (k, bound) in enumerate(zip(active, bounds, strict=True)):
        label = centred[:, k, None]
        d_term = (d_chosen - d_unchosen) * label + (d_chosen + d_unchosen) * (0.5 - bound)
        slope[parameters + row, head] = rate * (weight @ d_term) @ design
    spread[head, head] = difference_theta.T @ (
        (weight * np.einsum("ea,eab,eb->e", loss, moment, loss))[:, None] * difference_theta
    )
    cross = difference_theta.T @ (weight[:, None] * np.einsum("ea,eab,keb->ek", loss, moment, term))
    spread[head, tail], spread[tail, head] = cross, cross.T
    spread[tail, tail] = np.einsum("e,kea,eab,leb->kl", weight, term, moment, term)

    inverse = np.linalg.pinv(slope, rcond=1e-11)
    covariance = inverse @ spread @ inverse.T / count

    # From theta to the centred log-policy, and from there to everything else.
    to_logits = np.zeros((cells + objectives, total))
    centre = np.eye(cells) - np.kron(np.eye(prompts), np.full((responses, responses), 1 / responses))
    to_logits[:cells, head] = centre @ design
    to_logits[cells + active, parameters + np.arange(len(active))] = 1.0
    full = to_logits @ covariance @ to_logits.T
    logits = full[:cells, :cells]
    fisher = np.zeros((cells, cells))
    for prompt in range(prompts):
        block = slice(prompt * responses, (prompt + 1) * responses)
        fisher[block, block] = np.diag(at.policy[prompt]) - np.outer(at.policy[prompt], at.policy[prompt])
    nu = np.repeat(structure.prompt_weight, responses)
    policy_deviation = np.sqrt(np.maximum(np.diagonal(fisher @ logits @ fisher), 0))
    to_value = (nu * structure.win_rate.reshape(objectives, cells)) @ fisher
    value_deviation = np.sqrt(np.maximum(np.diagonal(to_value @ logits @ to_value.T), 0))
    # Measured values vary with the policy and with the labels that measure them, those by 1/2 at most.
    wide = 4 * (value_deviation + 0.5 / np.sqrt(count * rate))
    slack = {k: at.measured[k] - bound for k, bound in structure.thresholds.items() if k not in active}
    return SamplingError(
        covariance=full,
        limit=at,
        value_deviation=value_deviation,
        multiplier_deviation=np.sqrt(np.maximum(np.diagonal(full)[cells:], 0)),
        total_variation=float(0.5 * np.sqrt(2 / np.pi) * nu @ policy_deviation),
        kl=float(0.5 * np.trace((nu[:, None] * fisher) @ logits)),
        regular=all(slack[k] > wide[k] for k in slack),
    )
