"""Policies learned from finite labels, by the library's own loss and multiplier step.

    structure = make("condorcet_within")
    learned = learn(structure, sample_pairs(structure, 100_000, seed=0))
    learned.policy, learned.multiplier                    # compare with tabular.solve(structure.problem())

Every gradient is that of ``mopo_loss`` (``linear_mopo_loss`` for the transformer) and every multiplier moves by
``DualAscent``, one step per optimiser step on that step's measured satisfaction, as in training. What is particular to
small problems is only how the policy uses the gradient: a table can solve the inner problem in one Newton step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mopo_kernels import DualAscent, MOPOLossOutput
from mopo_kernels.naive import policy_ratio, satisfaction
from mopo_kernels.tabular import hypervolume, pareto_front, solve
from studies.canonical_structures.asymptotics import Sampling, limit, sampling_error, total_variation
from studies.canonical_structures.pairs import MergedPairs, Pairs, sample_pairs
from studies.canonical_structures.policies import (
    LogLinear,
    Policy,
    Rows,
    Transformer,
    log_linear,
    repeats,
    spell,
    table,
)
from studies.canonical_structures.structures import Structure

__all__ = [
    "Learned",
    "Pools",
    "as_written_by",
    "learn",
    "sample_pools",
    "study",
    "study_front",
    "study_structure",
    "summarize",
]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# Responses that no pool has drawn get this logit at least: cloning would put it at minus infinity.
_LOWEST_LOGIT = -600.0


# --- data -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pools:
    """Q prompts with n responses each, drawn independently from the behaviour policy, and labels for all their pairs.

    What "cloning" and the "closed_form" estimator work on: both average the labels of a response within its pool. A
    data set of pairs is one of pools with n = 2.

    Attributes:
        prompt: (Q,) prompts.
        response: (Q, n) responses.
        label: (Q, n (n - 1) / 2, K) 1 where the earlier response won; pairs in the order of ``numpy.triu_indices``.
    """

    prompt: IntArray
    response: IntArray
    label: Array


def sample_pools(structure: Structure, labels: int, size: int, seed: int, *, label_noise: float = 0.0) -> Pools:
    """As many pools of ``size`` responses as have ``labels`` labelled pairs, at least one."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, size]))
    first, second = np.triu_indices(size, 1)
    count = max(1, labels // len(first))
    prompt = rng.choice(len(structure.prompt_weight), count, p=structure.prompt_weight)
    cumulative = structure.behaviour.cumsum(1)
    cumulative /= cumulative[:, -1:]
    response = (rng.random((count, size))[..., None] >= cumulative[prompt, None, :-1]).sum(2)
    probability = structure.preference[:, prompt[:, None], response[:, first], response[:, second]]
    probability = np.moveaxis(probability, 0, 2)
    label = (rng.random(probability.shape) < probability).astype(np.float64)
    label = np.where(rng.random(probability.shape) < label_noise, 1 - label, label)
    if structure.observed_ties:
        label[probability == 0.5] = 0.5
    return Pools(prompt, response, label)


def _label_means(pairs: Pairs | MergedPairs) -> MergedPairs:
    """One row for all pairs of the same two responses that are labelled for the same objectives: the mean labels.

    The regression loss is quadratic in the margin and linear in the labels (and "sigmoid" and the measured win rates
    are linear in them), so gradients and satisfaction are those of all pairs; the regression loss is less by the
    variance of the labels, which the policy does not change.
    """
    prompts, responses = pairs.shape
    objectives = pairs.label.shape[1]
    count: Array = pairs.count if isinstance(pairs, MergedPairs) else np.ones(len(pairs.prompt))
    swap = pairs.first > pairs.second
    first, second = np.minimum(pairs.first, pairs.second), np.maximum(pairs.first, pairs.second)
    label = np.where(swap[:, None], 1 - pairs.label, pairs.label)
    labelled = ~np.isnan(label)
    patterns, pattern = np.unique(labelled @ (1 << np.arange(objectives)), return_inverse=True)
    size = (prompts, responses, responses, len(patterns))
    key = np.ravel_multi_index((pairs.prompt, first, second, pattern), size)
    total = np.bincount(key, count, int(np.prod(size))).astype(np.float64)
    seen = np.flatnonzero(total)
    mean: Array = np.stack(
        [
            np.bincount(key, count * np.nan_to_num(label[:, k]), len(total))[seen] / total[seen]
            for k in range(objectives)
        ],
        axis=1,
    )
    prompt, first, second, pattern = np.unravel_index(seen, size)
    present = patterns[pattern][:, None] >> np.arange(objectives) & 1
    # A mean of ones is one but for rounding, which labels may not exceed.
    mean = np.where(present == 1, np.clip(mean, 0.0, 1.0), np.nan)
    return MergedPairs(prompt, first, second, mean, total[seen], pairs.shape)


def _pair_rows(pairs: Pairs | MergedPairs, *, pooled: bool) -> Rows:
    """Rows for the loss. ``pooled``: each row is a pool of its own two sequences, as when each pair is one example of
    the data set; otherwise all rows share the responses, twice, so that one can be paired with itself."""
    prompts, responses = pairs.shape
    count = pairs.count if isinstance(pairs, MergedPairs) else np.ones(len(pairs.prompt))
    first = torch.from_numpy(pairs.prompt * responses + pairs.first)
    second = torch.from_numpy(pairs.prompt * responses + pairs.second)
    rows = torch.arange(len(count))
    if pooled:
        cell, one, two, group = torch.cat([first, second]), rows, len(rows) + rows, rows.repeat(2)
    else:
        cell = torch.arange(prompts * responses).repeat(2)
        one, two, group = first, prompts * responses + second, cell // responses
    weight = torch.from_numpy(count)
    return Rows(cell, torch.stack([one, two], 1), torch.from_numpy(pairs.label), weight, group)


def _pool_rows(pools: Pools, responses: int) -> Rows:
    count, size = pools.response.shape
    first, second = (torch.from_numpy(index) for index in np.triu_indices(size, 1))
    pool = torch.arange(count)
    start = (pool * size)[:, None]
    pairs = torch.stack([(start + first).reshape(-1), (start + second).reshape(-1)], 1)
    label = torch.from_numpy(pools.label.reshape(len(pairs), -1))
    cell = torch.from_numpy((pools.prompt[:, None] * responses + pools.response).reshape(-1))
    return Rows(cell, pairs, label, torch.ones(len(pairs), dtype=torch.float64), pool.repeat_interleave(size))


def _full_batch(data: Pairs | MergedPairs | Pools, responses: int, loss_type: str, estimator: str) -> Rows:
    if isinstance(data, Pools):
        return _pool_rows(data, responses)
    if loss_type == "cloning" or estimator == "closed_form":
        return _pair_rows(data.merged() if isinstance(data, Pairs) else data, pooled=True)
    return _pair_rows(_label_means(data), pooled=False)


def _batches(data: Pairs | Pools, responses: int, size: int, seed: int) -> Iterator[Rows]:
    """Batches of ``size`` pairs (or pools), over and over, in a new order each time."""
    rng = np.random.default_rng(seed)
    count = len(data.prompt)
    size = min(size, count)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            part = order[start : start + size]
            if isinstance(data, Pools):
                yield _pool_rows(Pools(data.prompt[part], data.response[part], data.label[part]), responses)
            else:
                chosen = Pairs(data.prompt[part], data.first[part], data.second[part], data.label[part], data.shape)
                yield _pair_rows(chosen, pooled=True)


# --- optimiser steps --------------------------------------------------------------------------------------------------


def _cell_curvature(rows: Rows, curvature: Tensor, cells: int) -> Tensor:
    """``sum_p weight_p curvature_p d_p d_p^T / sum_p weight_p`` with ``d_p = e_i - e_j``, (cells, cells)."""
    mass = rows.weight * curvature / rows.weight.sum()
    i, j = rows.cell[rows.pairs].unbind(1)
    result = torch.zeros(cells * cells, dtype=torch.float64)
    for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
        result.index_add_(0, a * cells + b, sign * mass)
    return result.view(cells, cells)


class _Exact:
    """Newton steps for log-linear policies on the full batch: with "regression" one solves the inner problem, whose
    loss is quadratic in the logits; with "cloning" one is the maximum-likelihood table of the frozen ratio.

    Args:
        share: of the full step that is taken.
    """

    def __init__(self, policy: LogLinear, rows: Rows, loss_type: str, tau: float, share: float) -> None:
        self.policy, self.rows, self.loss_type, self.tau, self.share = policy, rows, loss_type, tau, share
        self.inverse: Tensor | None = None

    def _newton(self, curvature: Tensor) -> Tensor:
        # Logits have a free constant for each prompt and for responses that were never compared: left where they are.
        return torch.linalg.pinv(self.policy.curvature(curvature), rtol=1e-10, hermitian=True)

    def step(self, output: MOPOLossOutput, objective_weight: Tensor) -> None:
        policy, cells = self.policy, self.policy.base.numel()
        policy.theta.grad = None
        torch.autograd.backward(output.loss)
        gradient = policy.theta.grad
        assert gradient is not None
        if self.loss_type == "regression":
            if self.inverse is None:
                self.inverse = self._newton(_cell_curvature(self.rows, torch.full_like(self.rows.weight, 2.0), cells))
            move = -self.inverse @ gradient
        elif self.loss_type == "sigmoid":
            chosen = torch.sigmoid(self.tau * output.margin)
            scale = (objective_weight * ~self.rows.preference.isnan()).sum(1) * self.tau**2
            move = -self._newton(_cell_curvature(self.rows, scale * chosen * (1 - chosen), cells)) @ gradient
            # Labels that never contradict each other send logits to infinity: not all of the way at once.
            move *= min(1.0, 3.0 / (self.tau * float(move.abs().max()) + 1e-300))
        else:
            move = self._likeliest(gradient)
        with torch.no_grad():
            policy.theta += self.share * move

    def _likeliest(self, gradient: Tensor) -> Tensor:
        policy = self.policy
        with torch.no_grad():
            probability = policy.table().exp()
        # The gradient with respect to a logit is share_x * (pi - target): share_x is the prompt's share of the draws.
        count = torch.zeros(policy.base.shape[0], dtype=torch.float64)
        repeat = repeats(self.rows)
        prompt = self.rows.cell // policy.base.shape[1]
        count.index_add_(0, prompt, repeat / repeat.sum())
        if policy.design is None:
            share = count.clamp(min=1e-300)[:, None]
            target = (probability - gradient.view_as(probability) / share).clamp(min=0)
            logit = torch.where(target > 0, target.log().clamp(min=_LOWEST_LOGIT), _LOWEST_LOGIT)
            drawn = (count > 0)[:, None].expand_as(logit) & policy.base.isfinite()
            goal = torch.where(drawn, logit - policy.base, policy.theta.detach().view_as(logit))
            return (goal - policy.theta.detach().view_as(logit)).reshape(-1)
        blocks = torch.diag_embed(probability) - probability[:, :, None] * probability[:, None, :]
        move = -self._newton(torch.block_diag(*(count[:, None, None] * blocks))) @ gradient
        return move * min(1.0, 2.0 / (float(move.abs().max()) + 1e-300))


class _Adam:
    """Adam with a learning rate that falls to zero along half a cosine."""

    def __init__(self, policy: Policy, learning_rate: float, steps: int) -> None:
        self.optimizer = torch.optim.Adam(policy.parameters(), learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, output: MOPOLossOutput, objective_weight: Tensor) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(output.loss)
        self.optimizer.step()
        self.schedule.step()


# --- learning ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Learned:
    """What training arrived at.

    Attributes:
        policy: (X, Y).
        multiplier: (K,) 1 for the primary, or the fixed weights that were given.
        value: (K,) exact win rates ``P_k`` of ``policy``.
        kl: exact ``E_x KL(policy || reference)``, nats.
        estimator_value: (K,) the last measured satisfaction (with batches: smoothed), on the estimator's scale.
        thresholds: by objective index, as they were in the end.
        steps: optimiser steps taken.
        converged: the multipliers had stopped moving; always False with batches.
        history: records of ``step, loss, multiplier, satisfaction, value, kl``.
    """

    policy: Array
    multiplier: Array
    value: Array
    kl: float
    estimator_value: Array
    thresholds: dict[int, float]
    steps: int
    converged: bool
    history: list[dict[str, Any]]


class _DualStep:
    """How long a step of the multipliers can be without overshooting: half the inverse of how fast satisfaction changes
    with them, as it is measured a step late.

    That is ``Cov(s) / tau`` under the policy for win rates (docs/method.md), and the mean over pairs of
    ``sig'(h) ds ds^T / tau`` on the "pair" scale; s are the responses' mean labels here. The "closed_form" estimator
    sees labels of single pools, whose spread is taken to be the largest there can be.
    """

    def __init__(self, rows: Rows, shape: tuple[int, int], tau: float, constrained: list[int], estimator: str) -> None:
        cells, chosen = shape[0] * shape[1], rows.preference[:, constrained]
        z, labelled = chosen.nan_to_num(0.5), (~chosen.isnan()).to(torch.float64)
        self.ends = rows.cell[rows.pairs].unbind(1)
        won = torch.zeros(cells, len(constrained), dtype=torch.float64)
        seen = torch.zeros_like(won)
        for cell, label in zip(self.ends, (z, 1 - z), strict=True):
            won.index_add_(0, cell, rows.weight[:, None] * labelled * label)
            seen.index_add_(0, cell, rows.weight[:, None] * labelled)
        self.rate = torch.where(seen > 0, won / seen.clamp(min=1e-300), 0.5)
        self.prompt = seen.sum(1).view(shape).sum(1) / seen.sum()
        self.share = rows.weight / rows.weight.sum()
        self.shape, self.tau, self.estimator = shape, tau, estimator

    def __call__(self, log_policy: Tensor, log_reference: Tensor) -> float:
        size = self.rate.shape[1]
        if self.estimator == "closed_form" or size == 0:
            return 2 * self.tau / max(size, 1)
        if self.estimator == "pair":
            i, j = self.ends
            log_ratio = log_policy.reshape(-1) - log_reference
            chosen = torch.sigmoid(log_ratio[i] - log_ratio[j])
            flat = (self.rate[i] - self.rate[j]) * (self.share * chosen * (1 - chosen)).sqrt()[:, None]
        else:
            policy, rate = log_policy.exp()[:, :, None], self.rate.view(*self.shape, size)
            centred = rate - (policy * rate).sum(1, keepdim=True)
            flat = (centred * (policy * self.prompt[:, None, None]).sqrt()).view(-1, size)
        largest = float(torch.linalg.matrix_norm(flat, 2).square())
        return 0.5 * self.tau / max(largest, 1e-3)


def _lagged(
    output: MOPOLossOutput,
    first: Tensor,
    reference: Tensor,
    rows: Rows,
    objective_weight: Tensor,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Satisfaction by the ratio to the first reference, which wrote the data, as the trainer measures it."""
    rho = None
    if options["estimator"] == "closed_form":
        rho = policy_ratio(
            rows.preference, rows.pairs, objective_weight, options["tau"], rows.group, options.get("max_ratio")
        )
    ratio = output.log_ratio + (reference - first)[rows.cell]
    return satisfaction(ratio, rows.pairs, rows.preference, rows.weight, options["estimator"], rho)


def _record(
    structure: Structure, policy: Policy, step: int, output: MOPOLossOutput, dual: DualAscent, measured: Array
) -> dict[str, Any]:
    with torch.no_grad():
        probability = policy.table().exp().numpy()
    return {
        "step": step,
        "loss": float(output.loss.detach()),
        "multiplier": dual.weight.tolist(),
        "satisfaction": measured.tolist(),
        "value": structure.value(probability).tolist(),
        "kl": float(structure.kl(probability)),
    }


def _settled(policy: Policy, tolerance: float) -> bool:
    return all(p.grad is not None and float(p.grad.abs().max()) <= tolerance for p in policy.parameters())


def _policy(structure: Structure, kind: str, seed: int) -> Policy:
    if kind == "table":
        return table(structure.reference)
    if kind == "linear":
        if structure.features is None:
            raise ValueError(f'policy must be "table" or "transformer" for {structure.name}, which has no features')
        return log_linear(structure.features, structure.reference)
    if kind == "transformer":
        policy = Transformer(structure.reference.shape[0], spell(structure.reference.shape[1]), seed=seed)
        policy.pretrain(structure.reference)
        return policy
    raise ValueError(f'policy must be "table", "linear" or "transformer", got {kind!r}')


def learn(
    structure: Structure,
    data: Pairs | MergedPairs | Pools,
    *,
    policy: str | Policy = "table",
    loss_type: str = "regression",
    estimator: str = "snis",
    steps: int | None = None,
    learning_rate: float | None = None,
    batch: int | None = None,
    dual_lr: float | None = None,
    dual_max: float = 20.0,
    smoothing: float | None = None,
    tau: float | None = None,
    thresholds: Mapping[int, float] | None = None,
    beta: float | None = None,
    t0: int | None = None,
    weight: npt.ArrayLike | None = None,
    label_rate: npt.ArrayLike | str | None = None,
    offset: npt.ArrayLike | None = None,
    max_ratio: float | None = None,
    seed: int = 0,
    tolerance: float = 1e-7,
) -> Learned:
    """Train a policy on the data.

    On the full batch a table or log-linear policy takes Newton steps until the multipliers stand still. The
    transformer, and every policy with ``batch``, takes Adam steps at a rate that falls to zero.

    Args:
        structure: the problem; only its behaviour-independent parts (reference, tau, thresholds, features) reach the
            training, its preferences only the exact numbers that are reported.
        data: labelled pairs or pools. With "cloning" or "closed_form" each pair is a pool of two.
        policy: "table", "linear" (softmax of the structure's features), "transformer", or a policy to go on from.
        loss_type, estimator: options of ``mopo_loss``.
        steps: optimiser steps; by default at most 4000 Newton or 2000 Adam ones.
        learning_rate: of Adam (default 0.05, and 0.01 for the transformer), or the share of each Newton step
            (default 1).
        batch: pairs (or pools) a step; None is all of them.
        dual_lr: step of the multipliers; by default as long as it can be without overshooting, measured anew every few
            steps, and a tenth of what it is at the start where the policy follows slowly (batches, transformer).
        dual_max: largest multiplier.
        smoothing: of the measured satisfaction; default 0.9 with batches, else 0.
        tau, thresholds: instead of the structure's.
        beta: with ``t0``: thresholds become ``beta`` times the satisfaction each time the reference moves.
        t0: optimiser steps between updates of the reference to the policy of the moment.
        weight: (K,) fixed objective weights; no multiplier moves.
        label_rate: (K,) or one number: weigh labels by its inverse; "auto" is the share found in the data.
        offset: (X, Y), for "sigmoid": the margin of a pair is the difference of the two responses' offsets.
        max_ratio: cap on the frozen ratio.
        seed: of the order of batches and the transformer's first parameters.
        tolerance: on the full batch, stop once no multiplier would move by more, in units of satisfaction, and
            the policy stands still.
    """
    prompts, responses = structure.reference.shape
    objectives = len(structure.objectives)
    tau = structure.tau if tau is None else tau
    bounds = dict(structure.thresholds if thresholds is None else thresholds)
    model = _policy(structure, policy, seed) if isinstance(policy, str) else policy
    exact = batch is None and isinstance(model, LogLinear)

    if batch is None:
        rows = _full_batch(data, responses, loss_type, estimator)
        stream: Iterator[Rows] | None = None
        sample = rows
    else:
        if isinstance(data, MergedPairs):
            raise ValueError("data must be pairs or pools, not merged, with batch")
        stream = _batches(data, responses, batch, seed)
        rows = next(stream)
        sample = next(_batches(data, responses, 8192, seed))

    if isinstance(model, Transformer):
        first = model.table().detach().reshape(-1)
    else:
        first = torch.log(torch.as_tensor(structure.reference, dtype=torch.float64)).reshape(-1)
    reference = first

    names = structure.objectives
    dual_step = _DualStep(sample, (prompts, responses), tau, sorted(bounds), estimator)
    if dual_lr is None:
        with torch.no_grad():
            start = dual_step(model.table(), reference) * (1.0 if exact else 0.1)
    else:
        start = dual_lr
    dual = DualAscent(
        names,
        names[structure.primary],
        {names[k]: bound for k, bound in bounds.items()} if weight is None else {},
        lr=start,
        maximum=dual_max,
        smoothing=(0.0 if batch is None else 0.9) if smoothing is None else smoothing,
    )
    fixed = None if weight is None else torch.as_tensor(np.asarray(weight, dtype=np.float64))

    options: dict[str, Any] = {"tau": tau, "loss_type": loss_type, "estimator": estimator}
    if label_rate is not None:
        if isinstance(label_rate, str):
            seen = ~rows.preference.isnan()
            rate = rows.weight @ seen.to(torch.float64) / rows.weight.sum()
        else:
            rate = torch.as_tensor(np.broadcast_to(np.asarray(label_rate, dtype=np.float64), objectives).copy())
        options["label_rate"] = rate
    if max_ratio is not None:
        options["max_ratio"] = max_ratio
    offsets = None if offset is None else torch.as_tensor(np.asarray(offset, dtype=np.float64)).reshape(-1)

    if steps is None:
        steps = 4000 if exact else 2000
    optimiser: _Exact | _Adam
    if exact:
        assert isinstance(model, LogLinear)
        optimiser = _Exact(model, rows, loss_type, tau, 1.0 if learning_rate is None else learning_rate)
    else:
        rate_of_adam = 0.01 if isinstance(model, Transformer) else 0.05
        optimiser = _Adam(model, rate_of_adam if learning_rate is None else learning_rate, steps)

    history: list[dict[str, Any]] = []
    converged, still, step = False, 0, 0
    measured = np.full(objectives, np.nan)
    for step in range(1, steps + 1):
        objective_weight = dual.weight.double() if fixed is None else fixed
        if offsets is not None:
            i, j = rows.cell[rows.pairs].unbind(1)
            options["margin"] = offsets[i] - offsets[j]
        output = model.loss(rows, reference, objective_weight, **options)
        optimiser.step(output, objective_weight)
        value, labelled = output.satisfaction, output.labelled
        if reference is not first:
            value, labelled = _lagged(output, first, reference, rows, objective_weight, options)
        if exact and dual_lr is None and step % 5 == 0:
            with torch.no_grad():
                # Never longer again: beyond a flat stretch the old slope would be overshot.
                dual.lr = min(dual.lr, dual_step(model.table(), reference))
        before = dual.multiplier
        dual.update(value, labelled)
        measured = value.numpy() if batch is None else np.array([dual.smoothed.get(name, np.nan) for name in names])

        if step <= 20 or step % max(1, steps // 100) == 0:
            history.append(_record(structure, model, step, output, dual, measured))
        if t0 is not None and step % t0 == 0:
            with torch.no_grad():
                reference = model.table().reshape(-1)
            if beta is not None:
                dual.set_thresholds({name: beta * dual.smoothed[name] for name in dual.threshold})
        if batch is None and t0 is None:
            moved = max((abs(dual.multiplier[name] - old) for name, old in before.items()), default=0.0)
            # Twice in a row: the satisfaction is that of the policy before the step.
            still = still + 1 if moved <= dual.lr * tolerance and _settled(model, tolerance) else 0
            if still == 2:
                converged = True
                break
        if stream is not None:
            rows = next(stream)

    history.append(_record(structure, model, step, output, dual, measured))
    with torch.no_grad():
        policy_table = model.table().exp().numpy()
    policy_table = policy_table / policy_table.sum(1, keepdims=True)
    return Learned(
        policy=policy_table,
        multiplier=dual.weight.double().numpy() if fixed is None else fixed.numpy(),
        value=structure.value(policy_table),
        kl=float(structure.kl(policy_table)),
        estimator_value=measured,
        thresholds={k: dual.threshold[names[k]] for k in bounds} if weight is None else bounds,
        steps=step,
        converged=converged,
        history=history,
    )


# --- the study --------------------------------------------------------------------------------------------------------

# From this many pairs on the errors are near enough to normal for a p-value to mean what it says.
_NORMAL_COUNT = 100_000


def as_written_by(structure: Structure, policy: Policy) -> Structure:
    """The structure whose responses this policy writes: it is behaviour and reference, as of a model that is tuned on
    its own samples. Thresholds stay, multipliers are solved for."""
    with torch.no_grad():
        written = policy.table().exp().numpy()
    written = written / written.sum(1, keepdims=True)
    changed = dataclasses.replace(structure, behaviour=written, reference=written)
    return dataclasses.replace(changed, multiplier=solve(changed.problem()).multiplier)


def study(
    structure: Structure,
    counts: Sequence[int],
    seeds: Sequence[int],
    *,
    loss_type: str = "regression",
    estimator: str = "snis",
    policy: str = "table",
    pool: int = 2,
    sampling: Sampling | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row for each number of labelled pairs and seed: how far what is learned is from the exact optimum.

    Args:
        counts: labelled pairs; with pools about as many.
        seeds: one data set each.
        policy: as in :func:`learn`. The transformer is pretrained once and writes the responses itself.
        pool: responses a pool; above 2, data are pools instead of pairs.
        sampling: how pairs are drawn; labels then count the inverse of their rate.
        options: further ones of :func:`learn`.

    Returns:
        JSON-able rows. ``tv``, ``kl``: total variation and E_x KL(learned || optimum), nats. ``slack``: worst exact
        slack of a threshold. ``gap``: exact primal value below the optimum's (negative where a threshold is missed).
        ``bias_tv``: total variation of the estimator's limit from the optimum, None where it could not be solved;
        ``tv_limit``: of the learned policy from that limit; ``expected_tv``: what the delta method says of that;
        ``p_value``: of its test, from 100,000 pairs on.
    """
    sampling = Sampling() if sampling is None else sampling
    model = None
    if policy == "transformer":
        model = _policy(structure, policy, 0)
        structure = as_written_by(structure, model)
    rate = sampling.rate(len(structure.objectives))
    label_rate = None if rate == 1 else rate
    exact = solve(structure.problem())
    kind = "linear" if policy == "linear" else "table"
    end = limit(
        structure,
        loss_type=loss_type,
        estimator=estimator,
        policy=kind,
        sampling=sampling,
        label_rate=label_rate,
        pool=pool,
    )
    solved = end.residual < 1e-6
    rows = []
    for count in counts:
        error = None
        if solved and loss_type == "regression" and estimator != "closed_form":
            error = sampling_error(
                structure, end, count, estimator=estimator, policy=kind, sampling=sampling, label_rate=label_rate
            )
        for seed in seeds:
            data: Pairs | Pools
            if pool > 2:
                data = sample_pools(structure, count, pool, seed, label_noise=sampling.label_noise)
            else:
                data = sample_pairs(structure, count, seed, **dataclasses.asdict(sampling))
            started = time.perf_counter()
            learned = learn(
                structure,
                data,
                policy=policy if model is None else copy.deepcopy(model),
                loss_type=loss_type,
                estimator=estimator,
                label_rate=label_rate,
                **({"steps": 1500, "tolerance": 1e-5} | options if kind == policy else options),
            )
            seconds = time.perf_counter() - started
            tested = error is not None and error.regular and count >= _NORMAL_COUNT and "batch" not in options
            rows.append(
                {
                    "structure": structure.name,
                    "loss_type": loss_type,
                    "estimator": estimator,
                    "policy": policy,
                    "pool": pool,
                    "batch": options.get("batch"),
                    "sampling": dataclasses.asdict(sampling),
                    "count": int(count),
                    "seed": int(seed),
                    "tv": total_variation(structure, learned.policy, exact.policy),
                    "kl": _divergence(structure, learned.policy, exact.policy),
                    "slack": min((learned.value[k] - b for k, b in structure.thresholds.items()), default=0.0),
                    "gap": exact.primal - (learned.value[structure.primary] - structure.tau * learned.kl),
                    "multiplier": learned.multiplier.tolist(),
                    "value": learned.value.tolist(),
                    "bias_tv": total_variation(structure, end.policy, exact.policy) if solved else None,
                    "tv_limit": total_variation(structure, learned.policy, end.policy) if solved else None,
                    "expected_tv": None if error is None else error.total_variation,
                    "p_value": error.test(learned.policy, learned.multiplier)[0] if tested and error else None,
                    "steps": learned.steps,
                    "converged": learned.converged,
                    "seconds": round(seconds, 3),
                }
            )
    return rows


def _divergence(structure: Structure, policy: Array, other: Array) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        term = np.where(policy > 0, policy * (np.log(policy) - np.log(other)), 0.0)
    return float(structure.prompt_weight @ term.sum(1))


def study_front(
    structure: Structure, counts: Sequence[int], seeds: Sequence[int], *, points: int = 5, **options: Any
) -> list[dict[str, Any]]:
    """Hypervolume of the learned points over that of the exact ones, for ``points`` thresholds of the first constrained
    objective from where it begins to bind to the default, the others as they are.

    In the plane of the primal value and that objective's win rate, 0.05 below the worst exact point. Values are exact,
    those of the learned policies; where other thresholds are missed the ratio can exceed 1.
    """
    chosen = min(structure.thresholds)
    others = {k: bound for k, bound in structure.thresholds.items() if k != chosen}
    free = float(solve(structure.problem(thresholds=others)).value[chosen])
    grid = np.linspace(free, structure.thresholds[chosen], points)
    front = pareto_front(structure.problem(), {chosen: grid.tolist()})
    exact = np.stack([front.primal, front.value[:, chosen]], 1)[front.feasible]
    corner = exact.min(0) - 0.05
    best = hypervolume(exact, corner)
    rows = []
    for count in counts:
        for seed in seeds:
            data = sample_pairs(structure, count, seed)
            found = []
            for bound in grid:
                thresholds = structure.thresholds | {chosen: float(bound)}
                learned = learn(structure, data, thresholds=thresholds, tolerance=1e-5, steps=1500, **options)
                found.append([learned.value[structure.primary] - structure.tau * learned.kl, learned.value[chosen]])
            rows.append(
                {
                    "structure": structure.name,
                    "count": int(count),
                    "seed": int(seed),
                    "points": found,
                    "hypervolume_ratio": hypervolume(np.array(found), corner) / best,
                }
            )
    return rows


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each way of learning in rows of :func:`study`: bias, error by number of pairs, and its rate.

    ``slope``: of the log of the mean distance to the limit against the log of the number of pairs, with
    ``slope_deviation`` its standard error from the spread over seeds; -1/2 is expected. ``rejected``: the share of
    p-values below 0.01.
    """
    keys = ("structure", "loss_type", "estimator", "policy", "pool", "batch")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([*(row[key] for key in keys), row["sampling"]]), []).append(row)
    lines = []
    for group in groups.values():
        counts = sorted({row["count"] for row in group})
        line: dict[str, Any] = {key: group[0][key] for key in (*keys, "sampling", "bias_tv")}
        by_count = [[row for row in group if row["count"] == count] for count in counts]
        line["counts"] = counts
        line["tv"] = [float(np.mean([row["tv"] for row in part])) for part in by_count]
        line["worst_slack"] = [float(np.min([row["slack"] for row in part])) for part in by_count]
        line["expected_tv"] = [part[0]["expected_tv"] for part in by_count]
        line["tv_limit"] = line["slope"] = line["slope_deviation"] = None
        if group[0]["tv_limit"] is not None:
            sample = [np.array([row["tv_limit"] for row in part]) for part in by_count]
            line["tv_limit"] = [float(each.mean()) for each in sample]
            if len(counts) > 1 and min(line["tv_limit"]) > 0:
                centred = np.log(counts) - np.mean(np.log(counts))
                lever = centred / (centred @ centred)
                line["slope"] = float(lever @ np.log(line["tv_limit"]))
                if min(map(len, sample)) > 1:
                    relative = [each.std(ddof=1) / each.mean() / np.sqrt(len(each)) for each in sample]
                    line["slope_deviation"] = float(np.sqrt(np.square(lever) @ np.square(relative)))
        tested = [row["p_value"] for row in group if row["p_value"] is not None]
        line["tested"] = len(tested)
        line["rejected"] = float(np.mean(np.array(tested) < 0.01)) if tested else None
        lines.append(line)
    return lines


def study_structure(
    structure: Structure,
    seeds: Sequence[int],
    *,
    fast: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Every way of learning on one structure: rows, their summary, and learned fronts. About a minute on one core."""
    few = list(seeds)[:3]
    large = [1_000] if fast else [1_000, 10_000, 100_000, 1_000_000]
    middle = [1_000] if fast else [10_000, 100_000]
    plans: list[tuple[Sequence[int], Sequence[int], dict[str, Any]]] = [
        (large, seeds, {}),
        (middle, few, {"estimator": "pair"}),
        (middle, few, {"sampling": Sampling(missing=0.5)}),
        (middle, few, {"sampling": Sampling(one_objective=True)}),
        (middle, few, {"loss_type": "cloning", "pool": 8}),
        (middle, few, {"loss_type": "cloning", "pool": 32}),
        (middle[-1:], few[:1], {"batch": 256, "steps": 50 if fast else 3000}),
    ]
    # A pair's labels fall into 2^K patterns, and as pools none of them can be averaged beforehand.
    if len(structure.objectives) <= 4:
        plans += [(middle, few, {"estimator": "closed_form"}), (middle, few, {"loss_type": "cloning"})]
    if structure.features is not None:
        plans.append((middle, few, {"policy": "linear"}))
    with contextlib.suppress(ValueError):
        spell(structure.reference.shape[1])
        plans.append((middle[-1:], few[:1], {"policy": "transformer", "steps": 20 if fast else 1500}))
    rows: list[dict[str, Any]] = []
    for done, (counts, chosen, plan) in enumerate(plans):
        if progress is not None:
            progress(done, len(plans) + 1)
        rows += study(structure, counts, chosen, **plan)
    if progress is not None:
        progress(len(plans), len(plans) + 1)
    fronts = study_front(structure, middle, few, points=3 if fast else 5)
    if progress is not None:
        progress(len(plans) + 1, len(plans) + 1)
    return {"rows": rows, "summary": summarize(rows), "fronts": fronts}
