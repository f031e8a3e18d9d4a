"""Other ways to several objectives, on the same pairs, with the same steps of the same policy through the same loss.

Every method trains tables (or the structure's log-linear class) from the reference by ``mopo_loss``, full batch, the
same number of Newton steps at most, at every strength of a grid. The strength is tau of the regression loss; beta of
the sigmoid loss is four times it, as ``logit(p) = 4 (p - 1/2) + ...`` then makes both ask for the same log-ratios near
parity.

``scalarised_dpo``, ``scalarised_ipo``
    one policy for each weight of a grid on the simplex: every objective's loss by its weight, or the weighted labels as
    the target; the corners of the grid are DPO and IPO on one objective alone
``multiplier_grid``
    ``scalarised_ipo`` with weights of the form that MOPO's optima have: 1 for the primary and a grid for the others'
``modpo``
    "sigmoid" on the primary's labels with the margin ``sum_j w_j r_j / w_primary`` of the others' implicit rewards
    ``r_j = beta log(pi_j / pi_ref)``, ``pi_j`` the DPO policy of objective j, and ``beta / w_primary`` in beta's place
    (Zhou et al., arXiv 2310.03708)
``soup_dpo``
    rewarded soups (Rame et al., arXiv 2306.04488): the parameters of the objectives' DPO policies averaged with the
    weights of the grid, no training of their own. Soups of IPO are no method of their own: least squares is linear in
    the target, so they are ``scalarised_ipo`` to rounding
``max_min``
    the policy whose worst slack is the largest: weights on the simplex over the slacks ``P_k - b_k`` and ``P_primary -
    d`` follow multiplicative weights while the regression loss is trained with them (in the spirit of MaxMin-RLHF,
    arXiv 2402.08925), one policy for each d of a grid
``one_shot``
    one policy for each setting of the thresholds: multipliers that solve the dual on the labels' mean win rates, once
    and before training, then the regression loss with these (in the spirit of CAN, arXiv 2405.19544)
``sigmoid_dual``
    one policy for each setting of the thresholds: multipliers as MOPO's, but the sigmoid loss (in the spirit of C-DPO,
    arXiv 2403.02475, and PD-DPO, arXiv 2510.05703). Weights enter the sigmoid loss by their proportions only, so beta
    is divided by their sum: near parity the policy then is that of ``sum_k w_k s_k / tau``
``mopo``
    one policy for each setting of the thresholds, multipliers by :class:`mopo_kernels.DualAscent`

Every policy, whatever made it, is placed by its exact win rates and its exact KL to the reference, and each method has
the same number of policies on its front; :func:`compare` says in which spaces hypervolumes are taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import moocore
import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize, stats
from torch import Tensor

from mopo_kernels import DualAscent, mopo_loss, tabular
from mopo_kernels.naive import satisfaction
from studies.canonical_structures import policies
from studies.canonical_structures.exact import shifts, worst_slack
from studies.canonical_structures.pairs import MergedPairs, Pairs, PairTensors, sample_pairs
from studies.canonical_structures.structures import Structure, closed_form_policy

__all__ = [
    "FRONTS",
    "MEASURES",
    "METHODS",
    "STRENGTHS",
    "TOLD",
    "TOLERANCE",
    "Multipliers",
    "Point",
    "Task",
    "Yardstick",
    "budget_hypervolume",
    "compare",
    "distance",
    "dual_optimum",
    "exact_points",
    "fronts",
    "hypervolume",
    "max_min",
    "mean_interval",
    "mean_labels",
    "modpo",
    "mopo",
    "multiplier_grid",
    "one_shot",
    "per_objective",
    "pick",
    "pool",
    "rate_interval",
    "scalarisation",
    "sigmoid_dual",
    "soups",
    "threshold_grid",
    "train",
    "volume",
    "weight_grid",
    "yardstick",
]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

METHODS = (
    "scalarised_dpo",
    "scalarised_ipo",
    "multiplier_grid",
    "modpo",
    "soup_dpo",
    "max_min",
    "one_shot",
    "sigmoid_dual",
    "mopo",
)
# Methods that are told thresholds; the others are searched for a policy that keeps them.
TOLD = ("one_shot", "sigmoid_dual", "mopo")
# Strengths, as multiples of the structure's tau. A weight on the simplex divides the primary's own weight, so that
# scalarisation needs strengths below tau to answer the same question; none needs one above it.
STRENGTHS = (0.25, 0.5, 1.0)
# A third of a front's points: all are at the last strength, which has the finer grid, or a third at each.
SETTINGS = 9
# Newton steps at most: training stops when gradients are below _SETTLED, or they and moves of the weights below _STILL.
STEPS = 200
MAXIMUM = 50.0
_SETTLED = 1e-7
# The same where weights move, far below what finite labels leave open.
_STILL = 1e-5
_FLATTEST = 1e-12
# Of the multiplicative weights: e^-12 of the largest weight is none.
_LOWEST_SCORE = -12.0
# A threshold counts as violated when the exact win rate falls short of it by more than this.
TOLERANCE = 0.01
CONFIDENCE = 0.95
# The dense curves and fronts that hypervolumes are divided by.
EXACT_POINTS = 101
# Exact optima that volumes in more than two dimensions are divided by.
VOLUME_POINTS = 2000
VOLUME_SAMPLES = 2**14


# --- the same training for all --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A structure and the data sets, one a seed, that every method is given, and the most Newton steps it may take."""

    structure: Structure
    pairs: tuple[Pairs | MergedPairs, ...]
    steps: int = STEPS

    @property
    def objectives(self) -> int:
        return len(self.structure.objectives)


def pool(pairs: Sequence[Pairs | MergedPairs], copies: int = 1) -> MergedPairs:
    """Data sets as one, with a block of prompts for each, ``copies`` times over: prompts (copies * B * X).

    Labels of the same two responses are averaged: the regression and sigmoid losses are linear in the labels up to a
    constant, and so are measured win rates, so that gradients and values are those of all pairs. A table that is
    trained on this is as many tables trained each on their own.
    """
    prompts, responses = pairs[0].shape
    label = np.concatenate([np.where((p.first > p.second)[:, None], 1 - p.label, p.label) for p in pairs])
    if np.isnan(label).any():
        raise ValueError("pairs must be labelled for every objective")
    size = (len(pairs) * prompts, responses, responses)
    key = np.concatenate(
        [
            np.ravel_multi_index(
                (block * prompts + p.prompt, np.minimum(p.first, p.second), np.maximum(p.first, p.second)), size
            )
            for block, p in enumerate(pairs)
        ]
    )
    each = np.concatenate([p.count if isinstance(p, MergedPairs) else np.ones(len(p.prompt)) for p in pairs])
    found, where = np.unique(key, return_inverse=True)
    count = np.bincount(where, each)
    mean = np.stack([np.bincount(where, each * column) for column in label.T], 1) / count[:, None]
    prompt, first, second = np.unravel_index(found, size)
    again = np.arange(copies).repeat(len(found)) * size[0]
    return MergedPairs(
        again + np.tile(prompt, copies),
        np.tile(first, copies),
        np.tile(second, copies),
        np.clip(np.tile(mean, (copies, 1)), 0.0, 1.0),
        np.tile(count, copies),
        (copies * size[0], responses),
    )


def _columns(preference: Tensor, group: Tensor, groups: int) -> Tensor:
    """Labels (P, K) in columns of their own for each group of rows, (P, groups * K), NaN in the others' columns.

    Each group then has its own objective weights and its own measured win rates within one call of the loss.
    """
    rows, objectives = preference.shape
    spread = preference.new_full((rows, groups, objectives), torch.nan)
    spread[torch.arange(rows), group] = preference
    return spread.reshape(rows, -1)


class _Pace:
    """How far weights move per unit of slack, a number a problem: as given, but halved whenever the slack turns round,
    and slowly raised again. At small strengths the policy can jump from one response to another between two steps."""

    def __init__(self, problems: int) -> None:
        self.rate, self.share = np.zeros(problems), np.ones(problems)
        self.last: Array | float = 0.0

    def __call__(self, slack: Array, rate: Array | None) -> Array:
        if rate is not None:
            self.rate = rate
        turned = (slack * self.last).sum(1) < 0
        self.share = np.where(turned, 0.5 * self.share, np.minimum(1.0, 1.05 * self.share))
        self.last = slack
        return self.rate * self.share


class _Controller(Protocol):
    """Chooses objective weights while the policies are trained."""

    def weight(self) -> Array:
        """(N, K), a row a problem."""
        ...

    def update(self, measured: Array, rate: Array | None) -> None:
        """Win rates (N, K) measured on the pairs; (N,) how far to move per unit of win rate, None: as last time."""
        ...


class Multipliers:
    """A :class:`mopo_kernels.DualAscent` for each problem.

    Args:
        structure: names the objectives.
        thresholds: ``{objective: bound}``, at first the same for all problems.
        problems: N.
        step: of the dual, multiplier units per unit of win rate; by default as long as it can be without overshooting.

    Attributes:
        trace: (N, K) weights before every step.
    """

    def __init__(
        self, structure: Structure, thresholds: Mapping[int, float], problems: int, step: float | None = None
    ) -> None:
        names = structure.objectives
        bounds = {names[k]: bound for k, bound in thresholds.items()}
        self.primary, self.held = structure.primary, list(thresholds)
        self.bounds = np.tile([thresholds[k] for k in self.held], (problems, 1))
        self.names = [names[k] for k in self.held]
        self.objectives = len(names)
        self.ascents = [
            DualAscent(names, names[self.primary], bounds, lr=step or structure.tau, maximum=MAXIMUM)
            for _ in range(problems)
        ]
        self.pace = _Pace(problems) if step is None else None
        self.trace: list[Array] = []

    def weight(self) -> Array:
        weight = np.zeros((len(self.ascents), self.objectives))
        weight[:, self.primary] = 1.0
        weight[:, self.held] = [[ascent.multiplier[name] for name in self.names] for ascent in self.ascents]
        return weight

    def update(self, measured: Array, rate: Array | None) -> None:
        weight = self.weight()
        self.trace.append(weight)
        slack = measured[:, self.held] - self.bounds
        slack[(weight[:, self.held] == 0) & (slack > 0)] = 0.0
        steps = None if self.pace is None else self.pace(slack, rate)
        for number, (ascent, value) in enumerate(zip(self.ascents, measured, strict=True)):
            if steps is not None:
                ascent.lr = float(steps[number])
            ascent.update(value.tolist(), [1.0] * len(value))

    def relax(self, beta: float, measured: Array) -> None:
        """Thresholds become ``beta`` times the win rates (N, K) measured now."""
        self.bounds = beta * measured[:, self.held]
        for ascent, bounds in zip(self.ascents, self.bounds, strict=True):
            ascent.set_thresholds(dict(zip(self.names, bounds.tolist(), strict=True)))


class _Fixed:
    """Weights (N, K) that stay."""

    def __init__(self, weight: Array) -> None:
        self.fixed = weight

    def weight(self) -> Array:
        return self.fixed

    def update(self, measured: Array, rate: Array | None) -> None:
        pass


class _WorstSlack:
    """Multiplicative weights over objectives: the minimising player of ``max_policy min_k (P_k - target_k)``."""

    def __init__(self, target: Array, problems: int) -> None:
        self.target = target
        self.lowest = np.where(np.isnan(target), -np.inf, _LOWEST_SCORE)
        self.score = np.tile(np.where(np.isnan(target), -np.inf, 0.0), (problems, 1))
        self.pace = _Pace(problems)

    def weight(self) -> Array:
        exponential = np.exp(self.score)
        return np.asarray(exponential / exponential.sum(1, keepdims=True))

    def update(self, measured: Array, rate: Array | None) -> None:
        slack = np.nan_to_num(measured - self.target)
        # What moves the weights is how the slacks differ.
        slack -= (self.weight() * slack).sum(1, keepdims=True)
        slack[:, np.isnan(self.target)] = 0.0
        score = self.score - np.clip(self.pace(slack * self.weight(), rate)[:, None] * slack, -1.0, 1.0)
        # A weight that has all but vanished must be able to come back.
        self.score = np.maximum(score - score.max(1, keepdims=True), self.lowest)


def _policy(structure: Structure, problems: int) -> policies.LogLinear:
    """The structure's policy class, once for each problem, as one policy over ``problems * X`` prompts."""
    reference = np.tile(structure.reference, (problems, 1))
    if structure.features is None:
        return policies.table(reference)
    prompts, responses, size = structure.features.shape
    design = np.zeros((problems, prompts, responses, problems, size))
    design[np.arange(problems), :, :, np.arange(problems)] = structure.features
    return policies.log_linear(design.reshape(problems * prompts, responses, problems * size), reference)


def _measure(structure: Structure, data: PairTensors, table: Tensor, preference: Tensor) -> Array:
    """Win rates by self-normalised importance weights on the pairs, a number a column of ``preference``.

    The weights are ratios to the policy that wrote the responses, which need not be the reference.
    """
    behaviour = np.log(np.tile(structure.behaviour, (table.shape[0] // len(structure.behaviour), 1)))
    ratio = (table.detach() - torch.from_numpy(behaviour)).reshape(-1)[data.response]
    return satisfaction(ratio, data.pairs, preference, data.pair_weight, "snis")[0].numpy()


class _Newton:
    """Newton steps of N policies at once: each has parameters of its own, prompt by prompt for a table."""

    def __init__(
        self, structure: Structure, merged: MergedPairs, loss_type: str, strength: float, count: float
    ) -> None:
        self.structure, self.loss_type, self.strength = structure, loss_type, strength
        self.cells = merged.shape
        responses = self.cells[1]
        first, second = (torch.from_numpy(index) for index in (merged.first, merged.second))
        block = torch.from_numpy(merged.prompt) * responses**2
        places = [(first, first, 1.0), (second, second, 1.0), (first, second, -1.0), (second, first, -1.0)]
        self.places = [(block + a * responses + b, sign) for a, b, sign in places]
        self.mass = torch.from_numpy(merged.count / count)
        self.features = None if structure.features is None else torch.from_numpy(structure.features)
        self.inverse: Tensor | None = None

    def _inverse(self, curvature: Tensor) -> Tensor:
        """Of the loss's second derivative, given each pair's: (N * X, Y, Y), or (N, F, F) with features."""
        prompts, responses = self.cells
        blocks = torch.zeros(prompts * responses**2, dtype=torch.float64)
        for place, sign in self.places:
            blocks.index_add_(0, place, sign * self.mass * curvature)
        blocks = blocks.view(prompts, responses, responses)
        if self.features is not None:
            each = blocks.view(-1, len(self.features), responses, responses)
            blocks = torch.einsum("xyf,nxyz,xzg->nfg", self.features, each, self.features)
        # A constant added to a prompt's logits changes nothing, nor do responses that were never compared.
        return torch.linalg.pinv(blocks, rtol=1e-10, hermitian=True)

    def step(self, theta: Tensor, margin: Tensor, offset: Tensor | None, weight: Tensor, share: float) -> float:
        """One step; returns the largest entry of the gradient. ``weight``: (P,) of each pair's curvature in the sigmoid
        loss."""
        gradient = theta.grad
        assert gradient is not None
        if self.loss_type == "regression":
            if self.inverse is None:
                self.inverse = self._inverse(torch.full_like(self.mass, 2.0))
            inverse = self.inverse
        else:
            chosen = torch.sigmoid(self.strength * margin - (0.0 if offset is None else offset))
            # Far from its label a pair has a gradient and no curvature to speak of; a floor makes the step finite.
            inverse = self._inverse(weight * self.strength**2 * (chosen * (1 - chosen)).clamp(min=_FLATTEST))
        move = -share * (inverse @ gradient.view(len(inverse), -1, 1))[..., 0]
        if self.loss_type == "sigmoid":
            # Labels that never contradict each other send logits to infinity: not all of the way at once.
            longest = self.strength * move.abs().amax(1, keepdim=True)
            move = move * (3.0 / longest.clamp(min=1e-300)).clamp(max=1.0)
        with torch.no_grad():
            theta += move.reshape(-1)
        return float(gradient.abs().max())


def mean_labels(merged: MergedPairs, problems: int) -> tuple[Array, Array]:
    """For each of N problems the mean label of every response, 1/2 if it has none, (N, X, Y, K), and how often each
    prompt was seen, (N, X), as shares."""
    size, objectives = merged.shape[0] * merged.shape[1], merged.label.shape[1]
    won, seen = np.zeros((size, objectives)), np.zeros(size)
    for response, label in ((merged.first, merged.label), (merged.second, 1 - merged.label)):
        cell = merged.prompt * merged.shape[1] + response
        np.add.at(won, cell, merged.count[:, None] * label)
        np.add.at(seen, cell, merged.count)
    rate = np.where(seen[:, None] > 0, won / np.maximum(seen, 1e-300)[:, None], 0.5)
    prompt = seen.reshape(problems, -1, merged.shape[1]).sum(2)
    return rate.reshape(problems, -1, merged.shape[1], objectives), prompt / prompt.sum(1, keepdims=True)


class _Rate:
    """How far weights can move per unit of win rate without overshooting: as in
    :mod:`studies.canonical_structures.learning`, half the inverse of the largest eigenvalue of ``Cov(s) / tau``, s the
    mean labels of each response, for each problem."""

    def __init__(self, merged: MergedPairs, problems: int, strength: float, held: Sequence[int]) -> None:
        rate, self.prompt = mean_labels(merged, problems)
        self.rate = rate[..., held]
        self.strength = strength

    def __call__(self, log_policy: Array) -> Array:
        policy = np.exp(log_policy).reshape(self.rate.shape[:3])
        mean = np.einsum("nxy,nxyk->nxk", policy, self.rate)
        second = np.einsum("nx,nxy,nxyk,nxyl->nkl", self.prompt, policy, self.rate, self.rate)
        covariance = second - np.einsum("nx,nxk,nxl->nkl", self.prompt, mean, mean)
        # A policy that has all but settled on one response each still moves when the weights do.
        return np.asarray(0.5 * self.strength / np.maximum(np.linalg.eigvalsh(covariance)[:, -1], 1e-3))


def train(
    task: Task,
    weight: npt.ArrayLike | None,
    strength: float,
    *,
    loss_type: str = "regression",
    margin: Callable[[PairTensors], Tensor] | None = None,
    controller: _Controller | None = None,
    share: float = 1.0,
    every: int | None = None,
    beta: float | None = None,
) -> Array:
    """Train G settings on each of the B data sets.

    Args:
        task: the structure, data sets and number of steps.
        weight: (G, K) objective weights; None with a ``controller``, which has one setting, G = 1.
        strength: tau of "regression", beta of "sigmoid".
        loss_type: of ``mopo_loss``.
        margin: gives the ``margin`` of ``mopo_loss``, from the data of all settings.
        controller: sets the weights after every step.
        share: of each Newton step that is taken.
        every: steps between updates of the reference to the policy of the moment (the paper's t0).
        beta: with ``every``, and :class:`Multipliers` for controller: thresholds then become beta times the win rates
            measured at that moment.

    Returns:
        (G, B, X, Y) log-probabilities.
    """
    structure, seeds = task.structure, len(task.pairs)
    prompts, responses = structure.reference.shape
    settings = 1 if weight is None else len(np.asarray(weight))
    problems = settings * seeds
    merged = pool(task.pairs, settings)
    data = merged.tensors()
    # Settings that share weights share columns: one a setting, or one a problem where a controller has its say.
    groups = problems if controller is not None else settings
    group = torch.from_numpy(merged.prompt // (prompts * (problems // groups)))
    preference = _columns(data.preference, group, groups)
    objective_weight = torch.from_numpy(controller.weight() if controller is not None else np.array(weight, float))
    reference = torch.log(torch.from_numpy(np.tile(structure.reference, (problems, 1)))).reshape(-1)
    offset = None if margin is None else margin(data)
    count = float(data.pair_weight.sum()) / problems
    policy = _policy(structure, problems)
    newton = _Newton(structure, merged, loss_type, strength, count)
    # Log-odds are about four times what preferences are above 1/2.
    rate = _Rate(merged, problems, strength / (4.0 if loss_type == "sigmoid" else 1.0), list(structure.thresholds))
    block = data.prompt_index // (prompts * (problems // groups))
    for step in range(task.steps):
        table = policy.table()
        # Of the sigmoid loss beta is divided by the sum of the weights, which leaves shares: see the top of this file.
        pull = objective_weight.sum(1) if loss_type == "sigmoid" else torch.ones(groups, dtype=torch.float64)
        output = mopo_loss(
            table.reshape(-1)[data.response] / pull[block],
            reference[data.response] / pull[block],
            data.pairs,
            preference,
            (objective_weight / pull[:, None]).reshape(-1),
            tau=strength,
            loss_type=loss_type,
            pair_weight=data.pair_weight,
            margin=offset,
            normalizer=count,
        )
        policy.theta.grad = None
        torch.autograd.backward(output.loss)
        largest = newton.step(policy.theta, output.margin, offset, pull[group] ** -2, share)
        moved = 0.0
        if controller is not None:
            measured = _measure(structure, data, table, preference).reshape(problems, -1)
            controller.update(measured, rate(table.detach().numpy()) if step % 5 == 0 else None)
            before, objective_weight = objective_weight, torch.from_numpy(controller.weight())
            moved = float((before - objective_weight).abs().max())
        if every is not None:
            if (step + 1) % every == 0:
                with torch.no_grad():
                    reference = policy.table().reshape(-1)
                if beta is not None:
                    assert isinstance(controller, Multipliers)
                    controller.relax(beta, measured)
        elif max(largest, moved) < (_SETTLED if controller is None else _STILL):
            break
    with torch.no_grad():
        return policy.table().numpy().reshape(settings, seeds, prompts, responses)


# --- methods --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """What a method makes of every data set at one setting.

    Attributes:
        method: one of :data:`METHODS`.
        setting: "strength" (in units of the structure's tau) and what else the method was set to.
        log_policy: (B, X, Y), nats.
        value: (B, K) exact win rates.
        kl: (B,) exact E_x KL(policy || reference), nats.
        primal: (B,) P_primary - tau KL at the structure's own tau.
        estimate: (B, K) win rates measured on the training pairs, which is what a user sees.
    """

    method: str
    setting: dict[str, Any]
    log_policy: Array
    value: Array
    kl: Array
    primal: Array
    estimate: Array


def point(task: Task, method: str, setting: dict[str, Any], log_policy: Array) -> Point:
    """A :class:`Point` from the policies, (B, X, Y) log-probabilities."""
    structure = task.structure
    merged = pool(task.pairs)
    data = merged.tensors()
    seeds = len(task.pairs)
    preference = _columns(data.preference, torch.from_numpy(merged.prompt // len(structure.reference)), seeds)
    table = torch.from_numpy(np.ascontiguousarray(log_policy)).reshape(-1, log_policy.shape[2])
    estimate = _measure(structure, data, table, preference).reshape(seeds, -1)
    value = np.array([structure.value(np.exp(each)) for each in log_policy])
    kl = np.array([structure.kl(np.exp(each)) for each in log_policy])
    primal = value[:, structure.primary] - structure.tau * kl
    return Point(method, setting, log_policy, value, kl, primal, estimate)


def _strength(task: Task, factor: float, loss_type: str) -> float:
    return task.structure.tau * factor * (4.0 if loss_type == "sigmoid" else 1.0)


_SUFFIX = {"sigmoid": "dpo", "regression": "ipo"}


def per_objective(task: Task, factor: float, loss_type: str) -> list[Point]:
    """DPO ("sigmoid") or IPO ("regression") on each objective alone: K points, objective by objective."""
    unit = np.eye(task.objectives)
    trained = train(task, unit, _strength(task, factor, loss_type), loss_type=loss_type)
    return [
        point(task, _SUFFIX[loss_type], {"strength": factor, "weight": row.tolist()}, policy)
        for row, policy in zip(unit, trained, strict=True)
    ]


def scalarisation(task: Task, factor: float, loss_type: str, weight: Array, method: str | None = None) -> list[Point]:
    """One policy for each weight (G, K)."""
    trained = train(task, weight, _strength(task, factor, loss_type), loss_type=loss_type)
    method = method or f"scalarised_{_SUFFIX[loss_type]}"
    return [
        point(task, method, {"strength": factor, "weight": row.tolist()}, policy)
        for row, policy in zip(weight, trained, strict=True)
    ]


def soups(task: Task, parts: Sequence[Point], weight: Array) -> list[Point]:
    """Average the parameters of ``parts``, the policies of :func:`per_objective`, with each of the weights (G, K).

    The parameters of a table are its logits, those of the log-linear class are its theta: either way the average of
    policies is ``softmax(sum_k w_k log pi_k)``.
    """
    log_policy = np.stack([part.log_policy for part in parts])
    made = []
    for row in weight:
        mixed = torch.from_numpy(np.tensordot(row, log_policy, 1)).log_softmax(-1).numpy()
        setting = {"strength": parts[0].setting["strength"], "weight": row.tolist()}
        made.append(point(task, f"soup_{parts[0].method}", setting, mixed))
    return made


def modpo(task: Task, parts: Sequence[Point], weight: Array) -> list[Point]:
    """MODPO from ``parts``, the DPO policies of :func:`per_objective`, for each of the weights (G, K).

    The primary's weight divides: where it is below 0.02 it is raised to that.
    """
    structure, factor = task.structure, parts[0].setting["strength"]
    beta = _strength(task, factor, "sigmoid")
    log_reference = np.log(structure.reference)
    reward = np.stack([beta * (part.log_policy - log_reference) for part in parts])
    only = np.eye(task.objectives)[structure.primary][None]
    made = []
    for row in weight:
        share = np.maximum(row, 0.02 * only[0])
        share = share / share.sum()
        others = np.where(only[0] == 1, 0.0, share) / share[structure.primary]
        total = torch.from_numpy(np.tensordot(others, reward, 1)).reshape(-1)

        def margin(data: PairTensors, total: Tensor = total) -> Tensor:
            each = total[data.response]
            return each[data.pairs[:, 0]] - each[data.pairs[:, 1]]

        trained = train(task, only, beta / share[structure.primary], loss_type="sigmoid", margin=margin)[0]
        made.append(point(task, "modpo", {"strength": factor, "weight": row.tolist()}, trained))
    return made


def max_min(task: Task, factor: float, targets: Sequence[float]) -> list[Point]:
    """Maximise the worst of ``P_primary - d`` and the slacks ``P_k - b_k``, less tau KL, for each target d."""
    structure = task.structure
    made = []
    for target in targets:
        wanted = np.full(task.objectives, np.nan)
        wanted[list(structure.thresholds)] = list(structure.thresholds.values())
        wanted[structure.primary] = target
        controller = _WorstSlack(wanted, len(task.pairs))
        trained = train(task, None, _strength(task, factor, "regression"), controller=controller)[0]
        made.append(point(task, "max_min", {"strength": factor, "target": float(target)}, trained))
    return made


def _held(
    task: Task,
    method: str,
    factor: float,
    thresholds: Sequence[dict[int, float]],
    controller: Callable[[dict[int, float]], _Controller],
    loss_type: str = "regression",
) -> list[Point]:
    made = []
    for bounds in thresholds:
        strength = _strength(task, factor, loss_type)
        trained = train(task, None, strength, loss_type=loss_type, controller=controller(bounds))[0]
        setting = {"strength": factor, "thresholds": {str(k): b for k, b in bounds.items()}}
        made.append(point(task, method, setting, trained))
    return made


def mopo(task: Task, factor: float, thresholds: Sequence[dict[int, float]]) -> list[Point]:
    """The constrained optimum for each setting of the thresholds, multipliers from 0 by dual ascent."""
    return _held(task, "mopo", factor, thresholds, lambda at: Multipliers(task.structure, at, len(task.pairs)))


def sigmoid_dual(task: Task, factor: float, thresholds: Sequence[dict[int, float]]) -> list[Point]:
    """As :func:`mopo`, with the sigmoid loss."""

    def ascent(bounds: dict[int, float]) -> Multipliers:
        return Multipliers(task.structure, bounds, len(task.pairs))

    return _held(task, "sigmoid_dual", factor, thresholds, ascent, "sigmoid")


def one_shot(task: Task, factor: float, thresholds: Sequence[dict[int, float]]) -> list[Point]:
    """Multipliers from the labels' mean win rates beforehand, then training with these."""
    tau = _strength(task, factor, "regression")
    win_rate, seen = mean_labels(pool(task.pairs), len(task.pairs))

    def solved(bounds: dict[int, float]) -> _Fixed:
        each = [dual_optimum(task.structure, *data, tau, bounds) for data in zip(win_rate, seen, strict=True)]
        return _Fixed(np.array(each))

    return _held(task, "one_shot", factor, thresholds, solved)


def dual_optimum(
    structure: Structure, win_rate: Array, prompt_weight: Array, tau: float, thresholds: Mapping[int, float]
) -> Array:
    """Weights (K,) that minimise ``tau E_x log E_ref exp(u) - sum_k lambda_k b_k``, ``u = sum_k w_k s_k / tau``, over
    multipliers from 0 to :data:`MAXIMUM`; s are the win rates (X, Y, K)."""
    weight = np.zeros(win_rate.shape[2])
    weight[structure.primary] = 1.0
    held, bounds = list(thresholds), np.array(list(thresholds.values()))

    def dual(multiplier: Array) -> tuple[float, Array]:
        weight[held] = multiplier
        u = win_rate @ weight / tau + np.log(structure.reference)
        most = u.max(1, keepdims=True)
        mass = np.exp(u - most)
        total = mass.sum(1, keepdims=True)
        value = np.einsum("x,xy,xyk->k", prompt_weight, mass / total, win_rate)
        worth = tau * prompt_weight @ (most + np.log(total))[:, 0] - multiplier @ bounds
        return float(worth), value[held] - bounds

    found = optimize.minimize(
        dual,
        np.zeros(len(held)),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, MAXIMUM)] * len(held),
        options={"ftol": 1e-15, "gtol": 1e-7},
    )
    weight[held] = found.x
    return weight


# --- what the settings range over -------------------------------------------------------------------------------------


def weight_grid(objectives: int, count: int) -> Array:
    """(G, K) weights on the simplex: evenly spaced for two objectives, else all equal and uniform draws (seeded)."""
    if objectives == 2:
        share = np.linspace(0.0, 1.0, count)
        return np.stack([1.0 - share, share], 1)
    drawn = np.random.default_rng(0).dirichlet(np.ones(objectives), count - 1)
    return np.concatenate([np.full((1, objectives), 1.0 / objectives), drawn])


def _shifted(structure: Structure, shift: float) -> dict[int, float]:
    return {k: float(np.clip(bound + shift, 0.0, 1.0)) for k, bound in structure.thresholds.items()}


def threshold_grid(structure: Structure, count: int) -> list[dict[int, float]]:
    """Thresholds for MOPO.

    Two objectives: evenly spaced over the range of the front, the last twentieth of which is left out, as multipliers
    grow without bound towards its end. More: half of them are all thresholds of the structure shifted together, and
    half the win rates of exact optima in directions of :func:`weight_grid`, where all thresholds bind.
    """
    low, high = shifts(structure, 2)
    ray = count if len(structure.objectives) == 2 else count // 2
    grid = [_shifted(structure, shift) for shift in np.linspace(low, low + 0.95 * (high - low), ray)]
    # An objective that no policy moves keeps its own threshold, below what it always has.
    moves = _moved(structure)
    for row in multiplier_grid(structure, count - ray) if count > ray else []:
        policy = closed_form_policy(structure.reference, structure.win_rate, row, structure.tau)
        value = structure.value(policy)
        grid.append({k: float(value[k]) if moves[k] else b for k, b in structure.thresholds.items()})
    return grid


def multiplier_grid(structure: Structure, count: int) -> Array:
    """(G, K) weights with 1 for the primary. Two objectives: 0 and multipliers from 1/16 to 16 by equal factors; more:
    :func:`weight_grid` divided by the primary's share, at least a tenth."""
    primary = structure.primary
    if len(structure.objectives) == 2:
        grid = np.ones((count, 2))
        grid[:, 1 - primary] = np.concatenate([[0.0], np.geomspace(1 / 16, 16, count - 1)])
        return grid
    share = weight_grid(len(structure.objectives), count)
    grid = share / np.maximum(share[:, primary : primary + 1], 0.1)
    grid[:, primary] = 1.0
    return grid


# --- the yardstick ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What can be attained, exactly, and where hypervolumes are measured from.

    Attributes:
        plane: (G, 2) the front in the plane (worst slack, primal): the policy class's own where it is restricted.
        plane_origin: (2,) a tenth of the extent of ``plane`` below its least, or below the reference policy where that
            has less.
        budget: nats, the largest KL that counts in the plane (worst slack, P_primary).
        budget_plane: (G, 2) the front there, among policies with no more KL than that.
        budget_origin: (2,) as ``plane_origin``.
        front: (F, K) samples of the front in all dimensions, (primal, every other P_k).
        volume: with more than two objectives, what :data:`VOLUME_POINTS` exact optima cover of that space, of those
            objectives that some policy moves; None with two, where the plane is all there is.
        volume_origin: where it is measured from, as ``plane_origin``.
    """

    plane: Array
    plane_origin: Array
    budget: float
    budget_plane: Array
    budget_origin: Array
    front: Array
    volume: float | None
    volume_origin: Array | None


def _origin(structure: Structure, plane: Array) -> Array:
    value = structure.value(structure.reference)
    start = np.array([float(worst_slack(structure, value)), value[structure.primary]])
    return np.asarray(np.minimum(plane.min(0), start) - 0.1 * np.ptp(plane, axis=0))


def _filled(plane: Array) -> Array:
    """Chords between the points of a concave front: what lies below them can be attained too."""
    order = plane[np.argsort(plane[:, 0])]
    across = np.linspace(order[0, 0], order[-1, 0], 4001)
    return np.stack([across, np.interp(across, order[:, 0], order[:, 1])], 1)


def _thresholds_rows(structure: Structure, thresholds: Sequence[Mapping[int, float]]) -> Array:
    rows = np.full((len(thresholds), len(structure.objectives)), np.nan)
    for row, bounds in zip(rows, thresholds, strict=True):
        row[list(bounds)] = list(bounds.values())
    return rows


def exact_points(structure: Structure, thresholds: Sequence[Mapping[int, float]]) -> tuple[Array, Array]:
    """Exact optima for each setting of the thresholds that can be met: win rates (G, K) and KL (G,). Of a restricted
    class, the best of :func:`class_members` and what sequential quadratic programming makes of it."""
    if structure.features is None:
        front = tabular.pareto_front(structure.problem(), _thresholds_rows(structure, thresholds))
        return front.value[front.feasible], front.kl[front.feasible]
    theta, value, kl = class_members(structure)
    primal = value[:, structure.primary] - structure.tau * kl

    def at(parameters: Array) -> Array:
        policy = structure.class_policy(parameters)
        return np.append(structure.value(policy), structure.kl(policy))

    found = []
    for bounds in thresholds:
        held = list(bounds)
        least = np.array(list(bounds.values()))
        meets = (value[:, held] >= least).all(1)
        if not meets.any():
            continue
        start = theta[np.where(meets, primal, -np.inf).argmax()]
        refined = optimize.minimize(
            lambda parameters: structure.tau * at(parameters)[-1] - at(parameters)[structure.primary],
            start,
            method="SLSQP",
            constraints={
                "type": "ineq",
                "fun": lambda parameters, held=held, least=least: at(parameters)[held] - least,
            },
            options={"ftol": 1e-12},
        )
        found.append(at(refined.x if refined.success else start))
    best = np.array(found)
    return best[:, :-1], best[:, -1]


def _within_budget(structure: Structure, shift: float, budget: float) -> Array | None:
    """(worst slack, P_primary) of the best policy with slack ``shift`` and KL of at most ``budget``, or None."""
    low, high = np.log(1e-3), np.log(10.0)

    def at(log_tau: float) -> tabular.TabularSolution:
        return tabular.solve(structure.problem(thresholds=_shifted(structure, shift), tau=float(np.exp(log_tau))))

    # KL falls with tau, to the least that the thresholds allow.
    best = at(high)
    if not best.feasible or best.kl > budget:
        return None
    for _ in range(14):
        middle = 0.5 * (low + high)
        trial = at(middle)
        if trial.kl <= budget:
            best, high = trial, middle
        else:
            low = middle
    return np.array([float(worst_slack(structure, best.value)), best.value[structure.primary]])


def class_members(structure: Structure, largest: float = 12.0, points: int = 241) -> tuple[Array, Array, Array]:
    """A restricted class on a grid of its parameters: these (M, F), win rates (M, K) and KL (M,)."""
    assert structure.features is not None
    axis = np.linspace(-largest, largest, points)
    theta = np.stack(np.meshgrid(*[axis] * structure.features.shape[2]), -1).reshape(-1, structure.features.shape[2])
    values, kls = [], []
    for part in np.array_split(theta, max(1, len(theta) // 4096)):
        logit = np.einsum("xyf,mf->mxy", structure.features, part)
        log_policy = logit - np.logaddexp.reduce(logit, axis=2, keepdims=True)
        policy = np.exp(log_policy)
        values.append(np.einsum("kxy,mxy,x->mk", structure.win_rate, policy, structure.prompt_weight))
        ratio = log_policy - np.log(structure.reference)
        kls.append(np.einsum("mxy,mxy,x->m", policy, ratio, structure.prompt_weight))
    return theta, np.concatenate(values), np.concatenate(kls)


def yardstick(structure: Structure, thresholds: Sequence[Mapping[int, float]]) -> Yardstick:
    """The exact fronts; ``thresholds``: those that MOPO is run with, whose largest exact KL is the budget."""
    primary = structure.primary
    budget = float(exact_points(structure, thresholds)[1].max())
    if structure.features is not None:
        _, value, kl = class_members(structure)
        primal = value[:, primary] - structure.tau * kl
        slack = worst_slack(structure, value)
        plane = _nondominated(np.stack([slack, primal], 1))
        budget_plane = _nondominated(np.stack([slack, value[:, primary]], 1)[kl <= budget])
        even = np.linspace(plane[:, 0].min(), plane[:, 0].max(), EXACT_POINTS)
        best = [int(np.where(slack >= least, primal, -np.inf).argmax()) for least in even]
        front = _space(structure, value, kl)[best]
    else:
        every = shifts(structure, EXACT_POINTS)
        value, kl = exact_points(structure, [_shifted(structure, shift) for shift in every])
        plane = _filled(np.stack([worst_slack(structure, value), value[:, primary] - structure.tau * kl], 1))
        tried = [_within_budget(structure, shift, budget) for shift in [-1.0, *np.linspace(every[0], every[-1], 25)]]
        budget_plane = _filled(np.array([point for point in tried if point is not None]))
        if len(structure.objectives) == 2:
            even = np.linspace(every[0], every[-1], EXACT_POINTS)
            front = _space(structure, *exact_points(structure, [_shifted(structure, shift) for shift in even]))
        else:
            optima = [
                closed_form_policy(structure.reference, structure.win_rate, row, structure.tau)
                for row in multiplier_grid(structure, EXACT_POINTS)
            ]
            value = np.array([structure.value(policy) for policy in optima])
            front = _space(structure, value, np.array([structure.kl(policy) for policy in optima]))
    origin, budget_origin = _origin(structure, plane), _origin(structure, budget_plane)
    whole, corner = _volume_yardstick(structure) if len(structure.objectives) > 2 else (None, None)
    return Yardstick(plane, origin, budget, budget_plane, budget_origin, front, whole, corner)


def _moved(structure: Structure) -> npt.NDArray[np.bool_]:
    """Objectives that some policy moves."""
    return np.asarray(np.ptp(structure.win_rate, axis=(1, 2)) > 1e-9)


def _volume_yardstick(structure: Structure) -> tuple[float, Array]:
    optima = [
        closed_form_policy(structure.reference, structure.win_rate, row, structure.tau)
        for row in multiplier_grid(structure, VOLUME_POINTS)
    ]
    value = np.array([structure.value(policy) for policy in optima])
    kl = np.array([structure.kl(policy) for policy in optima])
    space = _space(structure, value, kl)[:, _moved(structure)]
    start = structure.value(structure.reference)[_moved(structure)]
    corner = np.minimum(space.min(0), start) - 0.1 * np.ptp(space, axis=0)
    return _covered(space, corner), np.asarray(corner)


def _covered(space: Array, corner: Array) -> float:
    """Hypervolume, in more than four dimensions approximately but always in the same way."""
    if space.shape[1] <= 4:
        return float(moocore.hypervolume(space, ref=corner, maximise=True))
    return float(moocore.hv_approx(space, ref=corner, maximise=True, nsamples=VOLUME_SAMPLES, method="Rphi-FWE+"))


def _nondominated(points: Array) -> Array:
    return points[tabular.nondominated(points)]


def _space(structure: Structure, value: Array, kl: Array) -> Array:
    """Win rates (M, K) with P_primary - tau KL in the primary's place."""
    space = value.copy()
    space[:, structure.primary] -= structure.tau * kl
    return space


def hypervolume(structure: Structure, stick: Yardstick, value: Array, kl: Array) -> float:
    """In the plane (worst slack, primal), of policies by their exact win rates (M, K) and KL (M,), as a share of the
    exact front's."""
    plane = np.stack([worst_slack(structure, value), value[:, structure.primary] - structure.tau * kl], 1)
    return tabular.hypervolume(plane, stick.plane_origin) / tabular.hypervolume(stick.plane, stick.plane_origin)


def volume(structure: Structure, stick: Yardstick, value: Array, kl: Array) -> float:
    """In all dimensions, (primal, every other P_k): as a share of what many exact optima cover."""
    if stick.volume is None or stick.volume_origin is None:
        return hypervolume(structure, stick, value, kl)
    return _covered(_space(structure, value, kl)[:, _moved(structure)], stick.volume_origin) / stick.volume


def budget_hypervolume(structure: Structure, stick: Yardstick, value: Array, kl: Array) -> float:
    """In the plane (worst slack, P_primary), of the policies within the budget, as a share of the exact front's."""
    plane = np.stack([worst_slack(structure, value), value[:, structure.primary]], 1)[kl <= stick.budget]
    whole = tabular.hypervolume(stick.budget_plane, stick.budget_origin)
    return tabular.hypervolume(plane.reshape(-1, 2), stick.budget_origin) / whole


def distance(structure: Structure, stick: Yardstick, value: Array, kl: Array) -> float:
    """Mean distance by which points of the exact front, in K dimensions, are missed (IGD+, win-rate units)."""
    return float(moocore.igd_plus(_space(structure, value, kl), ref=stick.front, maximise=True))


# --- the comparison ---------------------------------------------------------------------------------------------------


def pick(structure: Structure, points: Sequence[Point], seed: int) -> int:
    """Which of a method's policies its user takes, who sees the measured win rates and knows each policy's KL.

    Of those measured to keep all of the structure's thresholds the one with the best measured primal; if none is, the
    one whose worst slack is the best.
    """
    slack = np.array([worst_slack(structure, each.estimate[seed]) for each in points])
    primal = np.array([each.estimate[seed, structure.primary] - structure.tau * each.kl[seed] for each in points])
    keeps = slack >= 0
    return int(np.where(keeps, primal, -np.inf).argmax() if keeps.any() else slack.argmax())


def mean_interval(each: npt.ArrayLike) -> dict[str, Any]:
    """Mean with Student's interval, of values of each data set (B,), or of each data set of each instance (I, B).

    The instances are what they are and count alike: the interval is over data sets.
    """
    values = np.asarray(each, dtype=np.float64)
    rows = np.atleast_2d(values)
    instances, seeds = rows.shape
    mean = float(rows.mean())
    half = 0.0
    if seeds > 1:
        deviation = float(np.sqrt((rows.var(1, ddof=1) / seeds).sum())) / instances
        half = deviation * float(stats.t.ppf(0.5 + 0.5 * CONFIDENCE, instances * (seeds - 1)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "each": values.tolist()}


def rate_interval(hits: int, total: int) -> dict[str, Any]:
    """Share of seeds with Wilson's interval."""
    interval = stats.binomtest(hits, total).proportion_ci(CONFIDENCE, method="wilson")
    return {"rate": hits / total, "low": float(interval.low), "high": float(interval.high), "count": hits}


Progress = Callable[[int, int], object]


def run_methods(
    task: Task, settings: int = SETTINGS, progress: Progress = lambda done, total: None
) -> dict[str, list[Point]]:
    """The points of every method: ``settings`` at each strength but the last, and at the last as many as at all three
    together."""
    structure, fine = task.structure, len(STRENGTHS) * settings
    weight = {count: weight_grid(task.objectives, count) for count in (settings, fine)}
    thresholds = {count: threshold_grid(structure, count) for count in (settings, fine)}
    multipliers = {count: multiplier_grid(structure, count) for count in (settings, fine)}
    value = exact_points(structure, thresholds[settings])[0][:, structure.primary]
    made: dict[str, list[Point]] = {method: [] for method in METHODS}
    parts: list[Point] = []

    def soup_parts(factor: float, count: int) -> list[Point]:
        parts[:] = per_objective(task, factor, "sigmoid")
        return []

    work: list[Callable[[float, int], list[Point]]] = [
        soup_parts,
        lambda factor, count: scalarisation(task, factor, "sigmoid", weight[count]),
        lambda factor, count: scalarisation(task, factor, "regression", weight[count]),
        lambda factor, count: scalarisation(task, factor, "regression", multipliers[count], "multiplier_grid"),
        lambda factor, count: modpo(task, parts, weight[count]),
        lambda factor, count: soups(task, parts, weight[count]),
        lambda factor, count: max_min(task, factor, np.linspace(value.min(), value.max(), count).tolist()),
        lambda factor, count: one_shot(task, factor, thresholds[count]),
        lambda factor, count: sigmoid_dual(task, factor, thresholds[count]),
        lambda factor, count: mopo(task, factor, thresholds[count]),
    ]
    for number, factor in enumerate(STRENGTHS):
        for place, each in enumerate(work):
            for found in each(factor, fine if factor == STRENGTHS[-1] else settings):
                made[found.method].append(found)
            progress(number * len(work) + place + 1, len(STRENGTHS) * len(work))
    return made


FRONTS = ("one strength", "three strengths")
MEASURES = ("hypervolume", "volume", "budget_hypervolume", "distance")


def fronts(points: Sequence[Point], settings: int) -> dict[str, list[Point]]:
    """The two fronts of ``3 * settings`` policies that a method's points hold."""
    fine = len(STRENGTHS) * settings
    last = list(points[-fine:])
    return dict(zip(FRONTS, (last, [*points[:-fine], *last[:: len(STRENGTHS)]]), strict=True))


def _trained(method: str, front: str, settings: int, objectives: int) -> int:
    """How many policies one user of a method trains for a front."""
    strengths = 1 if front == FRONTS[0] else len(STRENGTHS)
    count = len(STRENGTHS) * settings
    if method == "soup_dpo":
        return strengths * objectives
    return count + strengths * (objectives - 1) if method == "modpo" else count


def compare(
    structures: Sequence[Structure],
    count: int,
    seeds: Sequence[int],
    *,
    settings: int = SETTINGS,
    steps: int = STEPS,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """All methods on ``count`` pairs drawn with each of the seeds from each of the instances of a structure.

    Each method's front has ``3 * settings`` policies: all at the structure's own tau, or a third of them at each of the
    :data:`STRENGTHS`, whichever does better on a measure on average: chosen with hindsight, for all methods alike.
    Hypervolumes are shares of the exact front's.

    * "hypervolume": in the plane (worst slack, P_primary - tau KL), tau the structure's own: the problem as stated;
    * "volume": in all dimensions, P_primary - tau KL and every other win rate, where no threshold plays a part; the
      same plane with two objectives. With more, of what :data:`VOLUME_POINTS` exact optima cover;
    * "budget_hypervolume": in the plane (worst slack, P_primary) of policies whose KL is at most a budget, the largest
      along MOPO's exact optima: how a policy was regularised does not show at all;
    * "distance": the mean distance (IGD+) by which points of the exact front are missed, in all K dimensions; less is
      better.

    The worst slack is ``min_k (P_k - b_k)``: with two objectives P_2 but for a constant. Violations are of the
    structure's thresholds, by the one policy that a method's user takes: methods that are told thresholds
    (:data:`TOLD`) are trained with these at the structure's tau, all others are searched for (:func:`pick`).

    Args:
        structures: instances of one structure.
        count: pairs in each data set.
        seeds: of the data sets; intervals are over them.
        settings: a third of the policies of a front.
        steps: Newton steps at most.
        progress: called with (parts done, parts in all).

    Returns:
        A row for each method and one, "exact", for the exact optima at MOPO's thresholds: what it would have with
        infinite data. Values of each data set are (instances, data sets). "minus_mopo" holds the paired differences to
        MOPO with a "verdict" where 0 is outside the interval, and one for each instance in "verdicts". "picture" has
        the points of the first data set of the first instance.
    """
    scores: dict[str, dict[str, dict[str, list[list[float]]]]] = {
        method: {front: {measure: [] for measure in MEASURES} for front in FRONTS} for method in METHODS
    }
    taken: dict[str, dict[str, list[list[float]]]] = {
        method: {name: [] for name in ("slack", "regret", "kl", "primal")} for method in METHODS
    }
    ideal: dict[str, Any] = {name: [] for name in ("hypervolume", "volume", "distance")}
    pictured: dict[str, dict[str, list[Point]]] = {}
    thresholds: list[dict[int, float]] = []
    for number, structure in enumerate(structures):
        task = Task(structure, tuple(sample_pairs(structure, count, seed) for seed in seeds), steps)

        def heard(done: int, total: int, before: int = number) -> None:
            progress(before * total + done, len(structures) * total)

        made = run_methods(task, settings, heard)
        thresholds = threshold_grid(structure, len(STRENGTHS) * settings)
        stick = yardstick(structure, thresholds)
        for method, points in made.items():
            for front, some in fronts(points, settings).items():
                for measure, values in _scores(structure, stick, some).items():
                    scores[method][front][measure].append(values)
            for name, values in _taken(task, method, points).items():
                taken[method][name].append(values)
        value, kl = exact_points(structure, thresholds)
        for name, measure_one in (("hypervolume", hypervolume), ("volume", volume), ("distance", distance)):
            ideal[name].append(measure_one(structure, stick, value, kl))
        if number == 0:
            pictured = {method: fronts(points, settings) for method, points in made.items()}
            ideal |= {
                "budget": stick.budget,
                "front": stick.plane[:: max(1, len(stick.plane) // EXACT_POINTS)].tolist(),
                "picture": [_place(structure, *each) for each in zip(value, kl.tolist(), strict=True)],
            }
    first = structures[0]
    best = {method: _best_fronts(scores[method]) for method in METHODS}
    rows = []
    for method in METHODS:
        slack = np.array(taken[method]["slack"])
        chosen = best[method]
        row: dict[str, Any] = {
            "structure": first.name,
            "method": method,
            "pairs": count,
            "trained": _trained(method, chosen["hypervolume"], settings, len(first.objectives)),
            "fronts": chosen,
            "minus_mopo": {},
        }
        for measure in MEASURES:
            each = np.array(scores[method][chosen[measure]][measure])
            row[measure] = mean_interval(each)
            ours = np.array(scores["mopo"][best["mopo"][measure]][measure])
            row["minus_mopo"][measure] = _difference(each - ours, -1.0 if measure == "distance" else 1.0)
        row["violation"] = {"tolerance": TOLERANCE, **rate_interval(int((slack < -TOLERANCE).sum()), slack.size)}
        row["missed"] = {"tolerance": 0.0, **rate_interval(int((slack < 0).sum()), slack.size)}
        row |= {name: mean_interval(values) for name, values in taken[method].items()}
        row["picture"] = [
            {**p.setting, **_place(first, p.value[0], float(p.kl[0]))} for p in pictured[method][chosen["hypervolume"]]
        ]
        rows.append(row)
    for name in ("hypervolume", "volume", "distance"):
        ideal |= {name: float(np.mean(ideal[name])), f"{name}_each": ideal[name]}
    return [*rows, {"structure": first.name, "method": "exact", **ideal}]


def _best_fronts(scores: Mapping[str, Mapping[str, list[list[float]]]]) -> dict[str, str]:
    """Which of its fronts does best by each measure."""
    best = {}
    for measure in MEASURES:
        mean = {front: float(np.mean(each[measure])) for front, each in scores.items()}
        best[measure] = (min if measure == "distance" else max)(mean, key=mean.__getitem__)
    return best


def _scores(structure: Structure, stick: Yardstick, points: Sequence[Point]) -> dict[str, list[float]]:
    """Each measure's value for each seed."""
    all_value, all_kl = np.array([p.value for p in points]), np.array([p.kl for p in points])
    measures = (hypervolume, volume, budget_hypervolume, distance)
    return {
        name: [
            measure(structure, stick, value, kl) for value, kl in zip(all_value.swapaxes(0, 1), all_kl.T, strict=True)
        ]
        for name, measure in zip(MEASURES, measures, strict=True)
    }


_AGAIN = {"one_shot": one_shot, "sigmoid_dual": sigmoid_dual, "mopo": mopo}


def _taken(task: Task, method: str, points: Sequence[Point]) -> dict[str, list[float]]:
    """What the policy is worth that a method's user takes, for each seed."""
    structure = task.structure
    value, kl = exact_points(structure, [structure.thresholds])
    best = float(_space(structure, value, kl)[0, structure.primary])
    considered = _AGAIN[method](task, 1.0, [structure.thresholds]) if method in TOLD else points
    chosen = [considered[pick(structure, considered, seed)] for seed in range(len(task.pairs))]
    return {
        "slack": [float(worst_slack(structure, p.value[seed])) for seed, p in enumerate(chosen)],
        "regret": [best - float(p.primal[seed]) for seed, p in enumerate(chosen)],
        "kl": [float(p.kl[seed]) for seed, p in enumerate(chosen)],
        "primal": [float(p.primal[seed]) for seed, p in enumerate(chosen)],
    }


def _difference(each: Array, sign: float) -> dict[str, Any]:
    interval = mean_interval(each)
    # Of every data set they follow from the methods' own.
    del interval["each"]
    verdicts = [_verdict(mean_interval(row), sign) for row in each]
    return {**interval, "verdict": _verdict(interval, sign), "verdicts": verdicts}


def _verdict(interval: Mapping[str, Any], sign: float) -> str:
    low, high = sorted((sign * interval["low"], sign * interval["high"]))
    return "better" if low > 0 else "worse" if high < 0 else "no difference"


def _place(structure: Structure, value: Array, kl: float) -> dict[str, Any]:
    return {
        "value": value.tolist(),
        "kl": kl,
        "primal": float(value[structure.primary] - structure.tau * kl),
        "worst_slack": float(worst_slack(structure, value)),
    }
