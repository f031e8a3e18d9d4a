"""Every baseline reaches its own known optimum, MOPO the exact front; what compares them measures what it says.

On all pairs with their probabilities (``population_pairs``) each method's optimum is known in closed form or from a
one-dimensional problem. Each such test has a control: the same comparison with something wrong must fail.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logit, logsumexp

from mopo_kernels import mopo_loss, tabular
from studies.canonical_structures import ablations, baselines
from studies.canonical_structures.asymptotics import total_variation
from studies.canonical_structures.baselines import Multipliers, Point, Task
from studies.canonical_structures.exact import worst_slack
from studies.canonical_structures.learning import learn
from studies.canonical_structures.pairs import Pairs, population_pairs, sample_pairs
from studies.canonical_structures.structures import Structure, closed_form_policy, make

Array = npt.NDArray[np.float64]


def population(name: str) -> Task:
    structure = make(name)
    return Task(structure, (population_pairs(structure),))


def away(task: Task, point: Point, policy: Array) -> float:
    """Total variation between a method's policy and ``policy``."""
    return total_variation(task.structure, np.exp(point.log_policy[0]), policy)


def tilted(structure: Structure, weight: Array, tau: float | None = None) -> Array:
    return closed_form_policy(structure.reference, structure.win_rate, weight, tau or structure.tau)


def scores(structure: Structure) -> Array:
    """Bradley-Terry scores (K, X, Y) up to a constant a prompt, from the preferences over the first response."""
    return np.asarray(logit(structure.preference[..., 0]))


# --- optima -----------------------------------------------------------------------------------------------------------

# Scores, a cycle that has none, ties, a reference that did not write the data.
STRUCTURES = ("bradley_terry_opposed", "condorcet_within", "partial_orders", "shifted_reference")


@pytest.mark.parametrize("name", STRUCTURES)
def test_ipo_ends_at_the_closed_form_of_its_objective(name: str) -> None:
    task = population(name)
    for k, (right, wrong) in enumerate(
        zip(
            baselines.per_objective(task, 1.0, "regression"),
            baselines.per_objective(task, 0.5, "regression"),
            strict=True,
        )
    ):
        policy = tilted(task.structure, np.eye(task.objectives)[k])
        assert away(task, right, policy) < 1e-9
        assert away(task, wrong, policy) > 0.01  # the target with 1 / (tau / 2)


@pytest.mark.parametrize("name", [*STRUCTURES, "many_objectives"])
def test_scalarised_regression_ends_at_pi_w(name: str) -> None:
    task = population(name)
    weight = baselines.weight_grid(task.objectives, 4)
    policies = [tilted(task.structure, row) for row in weight]
    points = baselines.scalarisation(task, 1.0, "regression", weight)
    soup = baselines.soups(task, baselines.per_objective(task, 1.0, "regression"), weight)
    for number, policy in enumerate(policies):
        assert away(task, points[number], policy) < 1e-9
        # The minimiser is linear in the target, so that averaging the parts' logits is the same policy.
        assert away(task, soup[number], policy) < 1e-9
        assert away(task, points[number - 1], policy) > 0.005


def test_dpo_ends_at_the_reward_tilted_policy_where_there_are_rewards() -> None:
    task = population("bradley_terry_opposed")
    beta = 4 * task.structure.tau
    for k, point in enumerate(baselines.per_objective(task, 1.0, "sigmoid")):
        policy = closed_form_policy(task.structure.reference, scores(task.structure), np.eye(2)[k], beta)
        assert away(task, point, policy) < 1e-7
    cyclic = population("condorcet_within")
    point = baselines.per_objective(cyclic, 1.0, "sigmoid")[0]
    policy = closed_form_policy(cyclic.structure.reference, scores(cyclic.structure), np.eye(2)[0], 4 * 0.05)
    assert away(cyclic, point, policy) > 0.1


def test_modpo_and_soups_of_dpo_end_at_the_policy_of_the_weighted_rewards() -> None:
    task = population("bradley_terry_independent")
    beta = 4 * task.structure.tau
    weight = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    parts = baselines.per_objective(task, 1.0, "sigmoid")
    policies = [closed_form_policy(task.structure.reference, scores(task.structure), row, beta) for row in weight]
    for points in (baselines.modpo(task, parts, weight), baselines.soups(task, parts, weight)):
        assert away(task, points[0], policies[0]) < 1e-7
        assert away(task, points[1], policies[1]) < 1e-7
        assert away(task, points[0], policies[1]) > 0.05
    # Scalarised DPO fits the mean of the sigmoids, not of the rewards.
    assert away(task, baselines.scalarisation(task, 1.0, "sigmoid", weight)[0], policies[0]) > 1e-3


@pytest.mark.parametrize("name", ["bradley_terry_opposed", "flat_faces"])
def test_max_min_ends_where_no_policy_has_a_better_worst_slack_less_kl(name: str) -> None:
    task = population(name)
    structure = task.structure
    target = np.array([0.5, structure.thresholds[1]])

    def dual(share: float) -> float:
        u = np.tensordot([1 - share, share], structure.win_rate - target[:, None, None], 1) / structure.tau
        return float(structure.tau * structure.prompt_weight @ logsumexp(u, axis=1, b=structure.reference))

    found = minimize_scalar(dual, bounds=(0, 1), method="bounded", options={"xatol": 1e-10})
    policy = tilted(structure, np.array([1 - found.x, found.x]))
    assert away(task, baselines.max_min(task, 1.0, [0.5])[0], policy) < 1e-4
    assert away(task, baselines.max_min(task, 1.0, [0.4])[0], policy) > 0.01


def test_a_weight_that_has_vanished_comes_back() -> None:
    controller = baselines._WorstSlack(np.array([0.5, 0.5]), 1)
    for _ in range(200):
        controller.update(np.array([[0.9, 0.1]]), np.array([10.0]))
    assert controller.weight()[0, 0] < 1e-4
    for _ in range(40):
        controller.update(np.array([[0.1, 0.9]]), None)
    assert controller.weight()[0, 0] > 0.9


@pytest.mark.parametrize("name", ["bradley_terry_independent", "condorcet_across", "flat_faces", "shifted_reference"])
def test_mopo_ends_at_the_exact_optimum(name: str) -> None:
    task = population(name)
    exact = tabular.solve(task.structure.problem())
    multipliers = Multipliers(task.structure, task.structure.thresholds, 1)
    policy = np.exp(baselines.train(task, None, task.structure.tau, controller=multipliers)[0, 0])
    assert total_variation(task.structure, policy, exact.policy) < 1e-4
    np.testing.assert_allclose(multipliers.weight()[0], exact.multiplier, atol=1e-3)
    still = Multipliers(task.structure, task.structure.thresholds, 1, step=1e-9)
    policy = np.exp(baselines.train(task, None, task.structure.tau, controller=still)[0, 0])
    assert total_variation(task.structure, policy, exact.policy) > 0.05


@pytest.mark.parametrize("name", ["bradley_terry_independent", "condorcet_within", "many_objectives"])
def test_one_shot_multipliers_are_those_of_the_exact_dual_and_training_ends_there(name: str) -> None:
    task = population(name)
    structure = task.structure
    win_rate, seen = baselines.mean_labels(baselines.pool(task.pairs), 1)
    np.testing.assert_allclose(win_rate[0], np.moveaxis(structure.win_rate, 0, 2), atol=1e-12)
    np.testing.assert_allclose(seen[0], structure.prompt_weight, atol=1e-12)
    weight = baselines.dual_optimum(structure, win_rate[0], seen[0], structure.tau, structure.thresholds)
    np.testing.assert_allclose(weight, structure.multiplier, atol=1e-4)
    point = baselines.one_shot(task, 1.0, [structure.thresholds])[0]
    assert away(task, point, tilted(structure, structure.multiplier)) < 1e-4
    # With other thresholds it ends elsewhere; those that nothing meets take the largest multiplier.
    lower = {k: bound - 0.03 for k, bound in structure.thresholds.items()}
    assert away(task, baselines.one_shot(task, 1.0, [lower])[0], tilted(structure, structure.multiplier)) > 0.01
    beyond = {k: 0.99 for k in structure.thresholds}
    hopeless = baselines.dual_optimum(structure, win_rate[0], seen[0], structure.tau, beyond)
    assert hopeless.max() == baselines.MAXIMUM


def test_sigmoid_with_dual_ascent_keeps_thresholds_at_the_policy_of_the_weighted_log_odds() -> None:
    task = population("bradley_terry_opposed")
    structure = task.structure
    beta = 4 * structure.tau

    def policy(multiplier: float, divided: bool = True) -> Array:
        share = np.array([1.0, multiplier]) / (1 + multiplier)
        target = logit(np.tensordot(share, structure.preference, 1))
        strength = beta / (1 + multiplier) if divided else beta
        # The sigmoid loss fits log-odds of the mean label pair by pair, each with the curvature it has there.
        log_ratio = np.zeros_like(structure.reference)
        for _ in range(200):
            margin = log_ratio[:, :, None] - log_ratio[:, None, :]
            mass = structure.behaviour[:, :, None] * structure.behaviour[:, None, :]
            chosen = 1 / (1 + np.exp(-strength * margin))
            gradient = (mass * (chosen - 1 / (1 + np.exp(-target)))).sum(2)
            curvature = mass * strength * chosen * (1 - chosen)
            for x, (g, c) in enumerate(zip(gradient, curvature, strict=True)):
                log_ratio[x] -= np.linalg.pinv(np.diag(c.sum(1)) - c) @ g
        return closed_form_policy(structure.reference, log_ratio[None], np.ones(1), 1.0)

    def slack(multiplier: float) -> float:
        return float(structure.value(policy(multiplier))[1] - structure.thresholds[1])

    multiplier = brentq(slack, 0.0, 5.0, xtol=1e-8)
    point = baselines.sigmoid_dual(task, 1.0, [structure.thresholds])[0]
    assert away(task, point, policy(multiplier)) < 1e-3
    assert point.value[0, 1] == pytest.approx(structure.thresholds[1], abs=1e-4)
    assert away(task, point, policy(multiplier, divided=False)) > 0.05


def test_policies_of_a_restricted_class_are_the_best_fit_in_it() -> None:
    task = population("restricted_class")
    structure = task.structure
    assert structure.features is not None
    point = baselines.scalarisation(task, 1.0, "regression", np.array([[0.5, 0.5]]))[0]
    log_policy = point.log_policy[0]
    logits = log_policy - log_policy.mean(1, keepdims=True)
    centred = (structure.features - structure.features.mean(1, keepdims=True)).reshape(-1, 2)
    theta, *_ = np.linalg.lstsq(centred, logits.reshape(-1), rcond=None)
    np.testing.assert_allclose(structure.class_policy(theta), np.exp(log_policy), atol=1e-9)
    assert away(task, point, tilted(structure, np.array([0.5, 0.5]))) > 0.05


# --- finite data ------------------------------------------------------------------------------------------------------


def flipped(pairs: Pairs) -> Pairs:
    return dataclasses.replace(pairs, label=1 - pairs.label)


def test_pooled_pairs_have_the_gradient_and_win_rates_of_all_pairs() -> None:
    structure = make("partial_orders")
    pairs = sample_pairs(structure, 500, 0)
    table = torch.randn(structure.reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = torch.log(torch.from_numpy(structure.reference)).reshape(-1)
    for loss_type in ("regression", "sigmoid"):
        found = []
        for data in (pairs.tensors(), baselines.pool([pairs]).tensors(), baselines.pool([flipped(pairs)]).tensors()):
            logits = table.clone().requires_grad_()
            output = mopo_loss(
                logits.log_softmax(1).reshape(-1)[data.response],
                reference[data.response],
                data.pairs,
                data.preference,
                torch.tensor([1.0, 0.7], dtype=torch.float64),
                loss_type=loss_type,
                pair_weight=data.pair_weight,
                estimator="snis",
            )
            output.loss.backward()
            found.append((logits.grad, output.satisfaction))
        torch.testing.assert_close(found[0], found[1])
        assert not torch.allclose(found[0][0], found[2][0])


def test_training_many_data_sets_at_once_is_training_each() -> None:
    structure = make("bradley_terry_independent")
    pairs = tuple(sample_pairs(structure, 2000, seed) for seed in range(3))
    log_policy = baselines.mopo(Task(structure, pairs), 1.0, [structure.thresholds])[0].log_policy
    for number, each in enumerate(pairs):
        alone = learn(structure, each)
        assert alone.converged
        assert total_variation(structure, alone.policy, np.exp(log_policy[number])) < 1e-4
        assert total_variation(structure, alone.policy, np.exp(log_policy[number - 1])) > 0.01


@pytest.mark.parametrize("name", ["bradley_terry_opposed", "flat_faces"])
def test_mopo_lies_on_the_exact_front_within_its_error(name: str) -> None:
    structure = make(name)
    thresholds = baselines.threshold_grid(structure, 4)[1:3]
    exact = baselines.exact_points(structure, thresholds)[0]

    def errors(count: int, flip: bool = False) -> Array:
        pairs = tuple(sample_pairs(structure, count, seed) for seed in range(2 if flip else 12))
        pairs = tuple(map(flipped, pairs)) if flip else pairs
        return np.stack([p.value for p in baselines.mopo(Task(structure, pairs), 1.0, thresholds)], 1) - exact

    few, many = errors(5_000), errors(40_000)
    # Eight times the pairs: 1 / 2.8 of the error, which twelve data sets show to within a factor of about 1.5.
    assert 1.7 < np.sqrt(few.var(0, ddof=1).mean() / many.var(0, ddof=1).mean()) < 4.7
    # Win rates measured on the pairs that the policy was trained on are too high by O(1 / pairs), here about 0.001.
    assert (np.abs(many.mean(0)) < 4 * many.std(0, ddof=1) / np.sqrt(len(many)) + 0.002).all()
    assert (np.abs(errors(5_000, flip=True).mean(0)) > 0.05).any()


def test_weighted_sums_jump_over_flat_faces_and_thresholds_do_not() -> None:
    def widest(points: list[Point]) -> float:
        value = np.sort([p.value[0, 1] for p in points])
        return float(np.diff(value).max() / (value[-1] - value[0]))

    task = population("flat_faces")
    weight = baselines.weight_grid(2, 9)
    grid = [{1: bound} for bound in np.linspace(0.3, 0.6, 7)]
    assert widest(baselines.scalarisation(task, 0.25, "regression", weight)) > 0.4
    assert widest(baselines.mopo(task, 0.25, grid)) < 0.2
    # Where the front is curved neither does.
    curved = population("bradley_terry_opposed")
    assert widest(baselines.scalarisation(curved, 1.0, "regression", weight)) < 0.3


# --- the yardstick ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bradley_terry_agreeing", "condorcet_across", "restricted_class"])
def test_no_policy_covers_more_than_the_exact_front(name: str) -> None:
    structure = make(name)
    thresholds = baselines.threshold_grid(structure, 25)
    stick = baselines.yardstick(structure, thresholds)
    rng = np.random.default_rng(0)
    if structure.features is None:
        weights = rng.exponential(1.0, (400, len(structure.objectives)))
        policies = [tilted(structure, row, structure.tau * rng.uniform(0.5, 2.0)) for row in weights]
    else:
        policies = [structure.class_policy(row) for row in rng.normal(0, 2, (400, 2))]
    value = np.array([structure.value(policy) for policy in policies])
    kl = np.array([structure.kl(policy) for policy in policies])
    for measure in (baselines.hypervolume, baselines.budget_hypervolume):
        share = measure(structure, stick, value, kl)
        assert 0.5 < share < 1.001
        assert measure(structure, stick, value + 0.05, kl) > 1.001
    optima = baselines.exact_points(structure, thresholds)
    assert 0.93 < baselines.hypervolume(structure, stick, *optima) < 1.001
    assert baselines.distance(structure, stick, *optima) < baselines.distance(structure, stick, value[:3], kl[:3])


def test_the_best_of_a_restricted_class_keeps_its_thresholds_and_beats_the_grid() -> None:
    structure = make("restricted_class")
    _, value, kl = baselines.class_members(structure)
    primal = value[:, 0] - structure.tau * kl
    for bound in (structure.thresholds[1], 0.55):
        best, its_kl = baselines.exact_points(structure, [{1: bound}])
        its_primal = best[0, 0] - structure.tau * its_kl[0]
        assert best[0, 1] > bound - 1e-8
        assert primal[value[:, 1] >= bound].max() <= its_primal < primal[value[:, 1] >= bound - 0.03].max()


def test_the_budget_plane_is_what_weighted_sums_reach_at_that_kl() -> None:
    structure = make("bradley_terry_opposed")

    def at(share: float, budget: float) -> Array:
        weight = np.array([1 - share, share])
        log_tau = brentq(lambda log_tau: structure.kl(tilted(structure, weight, np.exp(log_tau))) - budget, -7, 3)
        return structure.value(tilted(structure, weight, np.exp(log_tau)))

    for shift in (0.0, 0.05):
        found = []
        for budget in (0.3, 0.33):
            share = brentq(lambda share, kl=budget, least=shift: worst_slack(structure, at(share, kl)) - least, 0, 1)
            found.append(at(share, budget)[0])
        point = baselines._within_budget(structure, shift, 0.3)
        assert point is not None
        # Bisection stops a little short of the budget.
        assert found[0] - 1e-3 < point[1] < found[0] + 1e-6 < found[1] - 1e-3
    assert baselines._within_budget(structure, 0.3, 1e-3) is None


def coverage(quantile: float) -> float:
    draws = np.random.default_rng(0).normal(1.0, 2.0, (600, 10))
    inside = 0
    for row in draws:
        interval = baselines.mean_interval(row)
        half = quantile * (interval["high"] - interval["mean"])
        inside += abs(interval["mean"] - 1.0) <= half
    return inside / len(draws)


def test_intervals_cover_at_their_rate() -> None:
    assert abs(coverage(1.0) - 0.95) < 0.02
    assert abs(coverage(0.7) - 0.95) > 0.05
    assert baselines.mean_interval([0.3] * 10)["low"] == pytest.approx(0.3)
    for rate in (0.1, 0.5):
        hits = np.random.default_rng(1).binomial(20, rate, 2000)
        intervals = {count: baselines.rate_interval(int(count), 20) for count in np.unique(hits)}
        inside = np.mean([intervals[count]["low"] <= rate <= intervals[count]["high"] for count in hits])
        assert 0.92 < inside < 0.99
    # Instances count alike and their differences are no noise.
    apart = np.random.default_rng(2).normal(0.0, 1.0, (400, 3, 5)) + np.array([[0.0], [50.0], [100.0]])
    inside = np.mean(
        [abs(found["mean"] - 50) <= found["high"] - found["mean"] for found in map(baselines.mean_interval, apart)]
    )
    assert 0.92 < inside < 0.98
    assert baselines.mean_interval(apart[0])["high"] - baselines.mean_interval(apart[0])["low"] < 3
    none = baselines.rate_interval(0, 10)
    assert (none["low"], none["high"]) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.2775, abs=1e-4))


def test_a_user_takes_the_best_policy_that_is_measured_to_keep_the_thresholds() -> None:
    structure = make("bradley_terry_opposed")
    bound = structure.thresholds[1]

    def at(first: float, second: float, kl: float) -> Point:
        estimate = np.array([[first, second]])
        # The exact numbers say the opposite and must not be looked at.
        return Point("dpo", {}, np.zeros((1, 1, 1)), 1 - estimate, np.array([kl]), np.array([0.0]), estimate)

    points = [at(0.9, bound - 0.01, 0.1), at(0.6, bound + 0.1, 0.1), at(0.7, bound, 0.1), at(0.75, bound, 1.0)]
    assert baselines.pick(structure, points, 0) == 2
    assert baselines.pick(structure, [points[0], at(0.2, bound - 0.001, 0.1)], 0) == 1


# --- the whole --------------------------------------------------------------------------------------------------------


def test_the_comparison_says_who_is_better() -> None:
    structures = [make("bradley_terry_opposed", number) for number in range(2)]
    seen: list[tuple[int, int]] = []
    rows = baselines.compare(structures, 4000, range(3), settings=3, progress=lambda *at: seen.append(at))
    json.dumps(rows, allow_nan=False)
    assert seen[-1] == (60, 60)
    by_method: dict[str, dict[str, Any]] = {row["method"]: row for row in rows}
    assert tuple(by_method) == (*baselines.METHODS, "exact")
    for method in baselines.METHODS:
        row = by_method[method]
        for measure in ("hypervolume", "volume", "budget_hypervolume"):
            assert 0 < row[measure]["mean"] < 1.001
            assert np.shape(row[measure]["each"]) == (2, 3)
        # With two objectives the plane has all dimensions there are.
        assert row["volume"] == row["hypervolume"]
        assert {each["verdict"] for each in row["minus_mopo"].values()} <= {"better", "worse", "no difference"}
        assert len(row["minus_mopo"]["distance"]["verdicts"]) == 2
        # A point is a policy, whatever the method: as many for everyone.
        assert len(row["picture"]) == 9
        slack = np.array(row["slack"]["each"])
        assert row["missed"]["count"] == (slack < 0).sum() >= row["violation"]["count"] == (slack < -0.01).sum()
    assert by_method["mopo"]["minus_mopo"]["hypervolume"]["mean"] == 0
    assert by_method["max_min"]["minus_mopo"]["hypervolume"]["verdict"] == "worse"
    assert by_method["max_min"]["minus_mopo"]["distance"]["verdict"] == "worse"
    assert by_method["mopo"]["trained"] == 9
    strengths = 1 if by_method["soup_dpo"]["fronts"]["hypervolume"] == "one strength" else 3
    assert by_method["soup_dpo"]["trained"] == 2 * strengths
    assert by_method["mopo"]["regret"]["mean"] < by_method["scalarised_ipo"]["regret"]["mean"]


def test_fronts_have_as_many_policies_for_every_method() -> None:
    task = Task(make("bradley_terry_opposed"), (sample_pairs(make("bradley_terry_opposed"), 500, 0),))
    made = baselines.run_methods(task, 2)
    assert made.keys() == set(baselines.METHODS)
    for points in made.values():
        fronts = baselines.fronts(points, 2)
        assert {name: len(front) for name, front in fronts.items()} == dict.fromkeys(baselines.FRONTS, 6)
        assert {p.setting["strength"] for p in fronts["one strength"]} == {1.0}
        assert [p.setting["strength"] for p in fronts["three strengths"]] == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]


def test_the_front_that_does_better_is_taken_for_everyone() -> None:
    def scores(one: float, three: float) -> dict[str, dict[str, list[list[float]]]]:
        return {
            front: {measure: [[value, value]] for measure in baselines.MEASURES}
            for front, value in zip(baselines.FRONTS, (one, three), strict=True)
        }

    # More is better, but of the distance.
    best = baselines._best_fronts(scores(0.9, 0.8))
    assert best == {**dict.fromkeys(baselines.MEASURES, "one strength"), "distance": "three strengths"}
    best = baselines._best_fronts(scores(0.8, 0.9))
    assert best == {**dict.fromkeys(baselines.MEASURES, "three strengths"), "distance": "one strength"}


@pytest.mark.parametrize("name", ["condorcet_across", "flat_objective", "many_objectives"])
def test_the_volume_grows_with_every_dimension_and_is_that_of_the_optima(name: str) -> None:
    structure = make(name)
    stick = baselines.yardstick(structure, baselines.threshold_grid(structure, 4))
    weights = baselines.multiplier_grid(structure, 300)
    policies = [tilted(structure, row) for row in weights]
    value = np.array([structure.value(policy) for policy in policies])
    kl = np.array([structure.kl(policy) for policy in policies])
    many = baselines.volume(structure, stick, value, kl)
    assert baselines.volume(structure, stick, value[:20], kl[:20]) < many <= 1.001
    if len(structure.objectives) == 3:
        assert many > 0.9
    moves = baselines._moved(structure)
    for k in range(len(structure.objectives)):
        better = value.copy()
        better[:, k] += 0.01
        assert (baselines.volume(structure, stick, better, kl) > many + 1e-6) is bool(moves[k])


def test_the_same_seeds_give_the_same_policies() -> None:
    structure = make("condorcet_within")

    def run(seed: int) -> Array:
        task = Task(structure, (sample_pairs(structure, 500, seed),))
        return baselines.mopo(task, 1.0, [structure.thresholds])[0].log_policy

    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))


# --- ablations --------------------------------------------------------------------------------------------------------


def test_a_lagged_reference_divides_tau_where_nothing_binds() -> None:
    structure = make("bradley_terry_opposed")
    free = dataclasses.replace(structure, thresholds={1: 0.0})
    for rounds in (1, 4):
        policy = ablations.lagged_sequence(free, 0.0, rounds).policy
        right, wrong = (tilted(structure, np.array([1.0, 0.0]), structure.tau / n) for n in (rounds + 1, rounds))
        assert total_variation(structure, policy, right) < 1e-9
        assert total_variation(structure, policy, wrong) > 1e-3


def test_training_with_a_lagged_reference_follows_the_exact_sequence() -> None:
    task = dataclasses.replace(population("bradley_terry_opposed"), steps=240)
    structure = task.structure
    multipliers = Multipliers(structure, structure.thresholds, 1)
    learned = baselines.train(task, None, structure.tau, controller=multipliers, every=60, beta=0.95)[0, 0]
    assert multipliers.bounds[0, 0] == pytest.approx(0.95**4 * structure.thresholds[1], abs=1e-3)
    for rounds, near in ((3, True), (2, False)):
        exact = ablations.lagged_sequence(structure, 0.95, rounds)
        assert (total_variation(structure, np.exp(learned), exact.policy) < 1e-3) is near


def test_ablations_merge_instances_and_mark_those_whose_constraint_is_lost() -> None:
    structures = [make("bradley_terry_opposed", number) for number in range(2)]
    rows = ablations.ablate(structures, range(2), count=2000, steps=40)
    json.dumps(rows, allow_nan=False)
    learned = [row for row in rows if row["ablation"] != "robustness"]
    for row in learned:
        assert np.shape(row["slack"]["each"]) == (2, 2)
        assert row["lost"] == (row["slack"]["mean"] < -baselines.TOLERANCE)
    lost = {(row["ablation"], *row["setting"].values()): row["lost"] for row in learned}
    assert lost["dual_step", 0.01]
    assert not lost["tau", structures[0].tau * 2]
    own = next(row for row in learned if row["setting"] == {"tau": structures[0].tau})
    alone = ablations.ablate(structures[1:], range(2), count=2000, steps=40)
    again = next(row for row in alone if row["setting"] == {"tau": structures[0].tau})
    assert own["slack"]["each"][1] == again["slack"]["each"][0]
    assert own["slack"]["each"][0] != again["slack"]["each"][0]


def test_flipped_labels_make_the_noisy_problem() -> None:
    structure = make("bradley_terry_opposed")
    pairs = tuple(sample_pairs(structure, 40_000, seed, label_noise=0.2) for seed in range(6))
    point = baselines.mopo(Task(structure, pairs), 1.0, [structure.thresholds])[0]
    mean = np.exp(point.log_policy).mean(0)
    noisy, clean = tabular.solve(ablations.noisy_problem(structure, 0.2)), tabular.solve(structure.problem())
    assert total_variation(structure, mean, noisy.policy) < 0.03
    assert total_variation(structure, mean, clean.policy) > 0.05


def test_the_papers_radius_cannot_be_met_on_a_pool_of_eight() -> None:
    structure = make("bradley_terry_opposed")
    problem = ablations.pool_problem(structure)
    assert tabular.solve(problem).feasible
    solution = ablations._solve_at(problem, 0.15)
    assert solution is not None
    assert not solution.feasible
    # Easier thresholds can be met, so it is not the radius alone that fails.
    easy = tabular.TabularProblem(
        win_rate=problem.win_rate,
        reference=problem.reference,
        tau=problem.tau,
        thresholds={1: 0.2},
        prompt_weight=problem.prompt_weight,
        robustness=0.15,
    )
    assert tabular.solve(easy, tolerance=1e-8).feasible


def test_ablations_have_a_row_for_every_setting() -> None:
    structure = make("bradley_terry_opposed")
    seen: list[tuple[int, int]] = []
    rows = ablations.ablate([structure], range(2), count=500, steps=20, progress=lambda *at: seen.append(at))
    json.dumps(rows, allow_nan=False)
    assert seen[-1] == (len(rows), len(rows))
    count = {kind: sum(row["ablation"] == kind for row in rows) for kind in {row["ablation"] for row in rows}}
    assert count == {"tau": 5, "reference": 13, "dual_step": 6, "noise": 5, "robustness": 12}
    usual = next(row for row in rows if row["ablation"] == "tau" and row["setting"]["tau"] == structure.tau)
    same = next(row for row in rows if row["ablation"] == "noise" and row["setting"]["noise"] == 0)
    assert usual["value"] == same["value"]
