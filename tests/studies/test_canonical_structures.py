"""The canonical structures are what they are called, and pairs drawn from them are distributed as they should be."""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.stats import chi2

import mopo_kernels
from mopo_kernels import tabular
from studies.canonical_structures.pairs import MergedPairs, Pairs, PairTensors, population_pairs, sample_pairs
from studies.canonical_structures.structures import STRUCTURES, Structure, closed_form_policy, make

SEEDS = (0, 1, 2)
every_structure = pytest.mark.parametrize("name", STRUCTURES)
every_seed = pytest.mark.parametrize("seed", SEEDS)


def optimum(structure: Structure) -> np.ndarray:
    """The policy for the multipliers that the structure was made with."""
    return closed_form_policy(structure.reference, structure.win_rate, structure.multiplier, structure.tau)


def least_squares_ratio(structure: Structure) -> np.ndarray:
    """The population minimiser r (X, Y) of the regression loss, up to a constant a prompt, by its normal equations."""
    target = np.tensordot(structure.multiplier, structure.preference - 0.5, 1) / structure.tau
    ratio = []
    for mu, t in zip(structure.behaviour, target, strict=True):
        weight = np.outer(mu, mu)
        laplacian = np.diag(weight.sum(1)) - weight
        ratio.append(np.linalg.lstsq(laplacian, (weight * t).sum(1), rcond=None)[0])
    return np.stack(ratio)


def bradley_terry_defect(preference: np.ndarray) -> float:
    """How far log odds (X, Y, Y) are from differences of scores, at their best: the largest residual."""
    odds = np.log(preference / (1 - preference))
    score = odds.mean(-1)
    return float(np.abs(odds - (score[:, :, None] - score[:, None, :])).max())


def has_cycle(beats: np.ndarray) -> bool:
    """Whether there are a, b, c such that a beats b, b beats c and c beats a, for a relation (Y, Y)."""
    steps = beats.astype(int)
    return bool(np.trace(steps @ steps @ steps) > 0)


def is_transitive(relation: np.ndarray) -> bool:
    """Whether every two steps of a relation (..., Y, Y) are one of its steps too."""
    return not (((relation.astype(int) @ relation.astype(int)) > 0) & ~relation).any()


# --- all structures ---------------------------------------------------------------------------------------------------


@every_structure
@every_seed
def test_structure_is_well_formed_and_small(name: str, seed: int) -> None:
    structure = make(name, seed)
    objectives, prompts, responses, _ = structure.preference.shape
    assert structure.name == name
    assert len(structure.objectives) == objectives
    assert 4 <= prompts <= 8
    assert 5 <= responses <= 8
    assert ((structure.preference >= 0) & (structure.preference <= 1)).all()
    # Opposite entries sum to 1 to the last bit or the one before: labels of swapped pairs rely on it.
    assert np.abs(structure.preference + structure.preference.swapaxes(2, 3) - 1).max() <= 2.3e-16
    assert (structure.preference[:, :, range(responses), range(responses)] == 0.5).all()
    for probability in (structure.behaviour, structure.reference, structure.prompt_weight[None]):
        assert probability.min() > 0.01
        assert np.abs(probability.sum(-1) - 1).max() < 1e-14
    assert np.array_equal(structure.reference, structure.behaviour) == (name != "shifted_reference")


@every_structure
def test_structure_is_made_of_its_seed_alone(name: str) -> None:
    def numbers(structure: Structure) -> list[bytes]:
        fields = dataclasses.asdict(structure).values()
        return [field.tobytes() for field in fields if isinstance(field, np.ndarray)] + [
            repr(structure.thresholds).encode()
        ]

    assert numbers(make(name, 3)) == numbers(make(name, 3)) == numbers(STRUCTURES[name](3))
    assert numbers(make(name, 3)) != numbers(make(name, 4))


def test_unknown_structure_is_named() -> None:
    with pytest.raises(ValueError, match=r"name must be one of bradley_terry_agreeing, .* got 'nonsense'"):
        make("nonsense")


@every_structure
@every_seed
def test_exact_solution_has_the_multipliers_the_structure_was_made_with(name: str, seed: int) -> None:
    structure = make(name, seed)
    solution = tabular.solve(structure.problem(), 1e-12)
    assert solution.feasible
    assert solution.multiplier == pytest.approx(structure.multiplier, abs=1e-8)
    assert np.abs(solution.policy - optimum(structure)).max() < 1e-8
    assert solution.value == pytest.approx(structure.value(solution.policy), abs=1e-14)
    assert solution.kl == pytest.approx(structure.kl(solution.policy), abs=1e-13)
    for k, bound in structure.thresholds.items():
        if structure.multiplier[k] > 0:
            assert abs(solution.value[k] - bound) < 1e-11
        else:
            assert solution.value[k] - bound > 0.01
    assert (structure.multiplier[1:] > 0).any() == (name != "bradley_terry_agreeing")


@every_structure
@every_seed
def test_optimum_is_interior_and_importance_weights_do_not_collapse(name: str, seed: int) -> None:
    structure = make(name, seed)
    policy = optimum(structure)
    second_moment = structure.prompt_weight @ (policy**2 / structure.behaviour).sum(1)
    assert 1 / second_moment > 0.15  # effective sample size a sample
    assert policy.min() > 1e-5


@every_structure
@every_seed
def test_least_squares_finds_the_closed_form_whatever_the_preferences(name: str, seed: int) -> None:
    structure = make(name, seed)
    expected = np.log(optimum(structure) / structure.reference)
    expected -= expected.mean(1, keepdims=True)
    ratio = least_squares_ratio(structure)
    ratio -= ratio.mean(1, keepdims=True)
    assert np.abs(ratio - expected).max() < 1e-10
    # Negative control: the target is 1 / tau, not 1 / (2 tau).
    assert np.abs(ratio / 2 - expected).max() > 0.1


@every_structure
def test_problem_takes_changes(name: str) -> None:
    structure = make(name)
    problem = structure.problem(tau=0.3, thresholds={}, robustness=0.01)
    assert (problem.tau, problem.thresholds, problem.robustness) == (0.3, {}, 0.01)
    assert np.abs(problem.win_rate - structure.win_rate).max() < 1e-15


# --- each structure is what it is called ------------------------------------------------------------------------------


@every_seed
def test_agreeing_objectives_agree_and_no_constraint_binds(seed: int) -> None:
    structure = make("bradley_terry_agreeing", seed)
    assert (np.sign(structure.preference[0] - 0.5) == np.sign(structure.preference[1] - 0.5)).all()
    assert max(bradley_terry_defect(p) for p in structure.preference) < 1e-12
    alone = tabular.solve(structure.problem(thresholds={}))
    assert np.array_equal(alone.policy, tabular.solve(structure.problem()).policy)
    assert alone.value[1] > 0.6  # the other objective is served, not only kept


@every_seed
def test_opposed_objectives_disagree_and_the_front_is_a_trade_off(seed: int) -> None:
    structure = make("bradley_terry_opposed", seed)
    off = ~np.eye(structure.preference.shape[-1], dtype=bool)
    assert ((structure.preference[0] - 0.5) * (structure.preference[1] - 0.5))[:, off].max() < 0
    assert max(bradley_terry_defect(p) for p in structure.preference) < 1e-12
    # Still both can be better than the reference (1/2), by giving each the prompts where more is at stake for it.
    assert tabular.solve(structure.problem(thresholds={1: 0.505})).value[0] > 0.505
    bounds = structure.thresholds[1] + np.linspace(0, 0.1, 6)
    front = [tabular.solve(structure.problem(thresholds={1: float(bound)})) for bound in bounds]
    assert (np.diff([solution.value[0] for solution in front]) < 0).all()
    assert (np.diff([solution.primal for solution in front]) < 0).all()
    assert (np.diff([solution.multiplier[1] for solution in front]) > 0).all()


@every_seed
def test_independent_objectives_are_bradley_terry_and_nearly_uncorrelated(seed: int) -> None:
    structure = make("bradley_terry_independent", seed)
    assert max(bradley_terry_defect(p) for p in structure.preference) < 1e-12
    correlation = np.atleast_2d(np.corrcoef(structure.win_rate.reshape(3, -1)))
    assert np.abs(correlation[~np.eye(3, dtype=bool)]).max() < 0.45  # 48 win rates: 3 standard deviations


@every_seed
def test_total_orders_are_deterministic_and_transitive(seed: int) -> None:
    preference = make("total_orders", seed).preference
    off = ~np.eye(preference.shape[-1], dtype=bool)
    assert np.isin(preference[..., off], (0.0, 1.0)).all()
    assert is_transitive(preference == 1)
    assert (preference[0] != preference[1]).any()


@every_seed
def test_partial_orders_have_ties_that_no_scores_explain(seed: int) -> None:
    structure = make("partial_orders", seed)
    assert structure.observed_ties
    preference = structure.preference
    off = ~np.eye(preference.shape[-1], dtype=bool)
    assert np.isin(preference, (0.0, 0.5, 1.0)).all()
    assert is_transitive(preference == 1)
    share = (preference[..., off] == 0.5).mean((1, 2))
    assert ((share > 0.2) & (share < 0.8)).all()
    # Scores would make "tied" an equivalence; here a ties with b and b with c, but a beats c.
    assert not any(is_transitive(p == 0.5) for p in preference)


@every_seed
def test_cycle_within_an_objective_has_no_scores_on_any_prompt(seed: int) -> None:
    structure = make("condorcet_within", seed)
    assert all(has_cycle(p > 0.5) for p in structure.preference[0])
    assert all(bradley_terry_defect(p[None]) > 1 for p in structure.preference[0])
    # Negative control: the other objective is Bradley-Terry.
    assert not any(has_cycle(p > 0.5) for p in structure.preference[1])
    assert bradley_terry_defect(structure.preference[1]) < 1e-12


@every_seed
def test_cycle_across_objectives_is_in_the_majority_and_in_none_of_them(seed: int) -> None:
    preference = make("condorcet_across", seed).preference
    assert max(bradley_terry_defect(p) for p in preference) < 1e-12
    assert not any(has_cycle(p > 0.5) for objective in preference for p in objective)
    majority = (preference > 0.5).sum(0) >= 2
    assert all(has_cycle(beats) for beats in majority)
    # Not only in the count of votes: the average preference, which equal weights optimise, runs in a circle as well.
    assert all(has_cycle(p > 0.5) for p in preference.mean(0))


@every_seed
def test_flat_objective_cannot_be_moved(seed: int) -> None:
    structure = make("flat_objective", seed)
    rng = np.random.default_rng(seed)
    policies = rng.dirichlet(np.ones(structure.behaviour.shape[1]), (100, len(structure.behaviour)))
    assert np.abs(structure.value(policies)[:, 2] - 0.5).max() < 1e-14
    assert np.ptp(structure.value(policies)[:, 0]) > 0.05
    beyond = tabular.solve(structure.problem(thresholds=structure.thresholds | {2: 0.51}))
    assert not beyond.feasible
    assert beyond.best_value == pytest.approx(-0.01, abs=1e-12)
    assert beyond.conflict == (2,)


@every_seed
def test_catastrophic_responses_are_picked_without_the_constraint_and_avoided_with_it(seed: int) -> None:
    structure = make("rare_catastrophe", seed)
    marked = structure.marked
    assert marked is not None
    assert (marked.sum(1) == 1).all()

    def rate(policy: np.ndarray) -> float:
        return float(structure.prompt_weight @ (policy * marked).sum(1))

    assert rate(structure.behaviour) == pytest.approx(0.03, abs=1e-15)
    assert (np.argmax(structure.win_rate[0], 1) == np.argmax(marked, 1)).all()
    assert rate(tabular.solve(structure.problem(thresholds={})).policy) > 0.5
    assert rate(tabular.solve(structure.problem()).policy) < 0.015


@every_seed
def test_many_objectives_are_eight_with_four_constraints_that_bind(seed: int) -> None:
    structure = make("many_objectives", seed)
    assert structure.preference.shape[0] == 8
    assert sorted(structure.thresholds) == [1, 2, 3, 4, 5, 6, 7]
    assert (tabular.solve(structure.problem()).multiplier[1:] > 1e-6).tolist() == [True] * 4 + [False] * 3


def unregularised(structure: Structure, bound: float) -> np.ndarray:
    """Values (2,) of the best policy for the first objective with at least ``bound`` for the second, without KL."""
    prompts, responses = structure.behaviour.shape
    gain = (structure.win_rate * structure.prompt_weight[:, None]).reshape(2, -1)
    solution = linprog(
        -gain[0],
        A_ub=-gain[1:],
        b_ub=[-bound],
        A_eq=np.kron(np.eye(prompts), np.ones(responses)),
        b_eq=np.ones(prompts),
        method="highs",
    )
    return np.asarray(gain @ solution.x)


@every_seed
def test_weighted_sums_find_the_corners_of_flat_faces_and_thresholds_the_points_between(seed: int) -> None:
    structure = make("flat_faces", seed)
    found = set()
    for share in np.linspace(0.001, 0.999, 999):
        score = (1 - share) * structure.win_rate[0] + share * structure.win_rate[1]
        policy = np.eye(score.shape[1])[score.argmax(1)]
        found.add(tuple(structure.value(policy).round(12)))
    corners = sorted(found, key=lambda point: point[1])
    assert len(corners) == 3
    for (high, low), (next_high, next_low) in itertools.pairwise(corners):
        for part in (0.1, 0.5, 0.9):
            value = unregularised(structure, low + part * (next_low - low))
            assert value == pytest.approx([high + part * (next_high - high), low + part * (next_low - low)], abs=1e-9)
    # The default threshold is such a point, far from the corners.
    default = (structure.thresholds[1] - corners[0][1]) / (corners[1][1] - corners[0][1])
    assert 0.2 < default < 0.8


@every_seed
def test_restricted_class_attains_two_points_but_nothing_as_good_as_their_midpoint(seed: int) -> None:
    structure = make("restricted_class", seed)
    assert structure.features is not None
    assert (structure.features == structure.features[0]).all()  # one distribution for all prompts: 5 numbers
    assert structure.class_policy([0.0, 0.0]) == pytest.approx(structure.reference, abs=1e-15)
    response = structure.prompt_weight @ structure.win_rate  # (2, Y)
    # Responses 0 and 1 have the same features, hence the same probability, and so have 2 and 3: they are worth as much
    # as their means. The two ends mirror each other.
    score = np.column_stack([response[:, :2].mean(1), response[:, 2:4].mean(1), response[:, 4:]])
    total = score.sum(0)
    assert total[0] == pytest.approx(total[1], abs=1e-14)
    ends = structure.value(structure.class_policy([[4.0, 0.0], [-4.0, 0.0]]))
    middle = ends.mean(0)
    # Whatever is at least as good as the midpoint in both objectives has at least its total, which is lost in
    # proportion to the mass m on the middling responses. As m >= 4 / (4 + 4 cosh theta_1), theta_1 must be far from 0.
    largest_mass = (total[0] - middle.sum()) / (total[0] - total[2:].max())
    least_cosh = (1 - largest_mass) / largest_mass
    assert least_cosh > 1
    share = np.exp(-2 * np.arccosh(least_cosh))  # then the less likely end has at most this share
    # The other objective of the end that is favoured is then worth less than it is at the midpoint.
    worse = score[1, 0] + share * (score[1, 1] - score[1, 0]) + largest_mass * max(0, score[1, 2:].max() - score[1, 0])
    assert worse < middle[1] - 0.05
    # Negative control: tables attain better than the midpoint, by mixing the ends.
    mixture = np.zeros_like(structure.behaviour)
    mixture[:, :4] = 0.25
    assert (structure.value(mixture) > middle + 1e-4).all()


@every_seed
def test_weighted_sums_run_to_the_ends_of_the_restricted_class_and_thresholds_do_not(seed: int) -> None:
    structure = make("restricted_class", seed)
    one = np.linspace(-8, 8, 321)
    theta = np.stack(np.meshgrid(one, np.linspace(-4, 4, 17), indexing="ij"), -1)
    value = structure.value(structure.class_policy(theta))  # (321, 17, 2)
    for share in np.linspace(0, 1, 101):
        best = np.unravel_index((value @ [1 - share, share]).argmax(), value.shape[:2])
        assert best[0] in (0, 320)
    # With the KL term there are two mirrored optima at equal weights, far apart: the weighted sum jumps between them.
    regularised = value.sum(-1) - structure.tau * structure.kl(structure.class_policy(theta))
    assert regularised[:160].max() == pytest.approx(regularised[161:].max(), abs=1e-12)
    low, high = (
        half.reshape(-1, 2)[sums.argmax()]
        for half, sums in ((value[:160], regularised[:160]), (value[161:], regularised[161:]))
    )
    assert regularised[160].max() < regularised.max() - 1e-3
    assert high[0] - low[0] > 0.2
    attained = np.where(value[..., 1] >= structure.thresholds[1], value[..., 0], -np.inf).max(1)
    assert 0 < attained.argmax() < 320
    with pytest.raises(ValueError, match="flat_faces has no restricted policy class"):
        make("flat_faces").class_policy([0.0])


# --- pairs ------------------------------------------------------------------------------------------------------------


def arrays(pairs: Pairs | MergedPairs) -> list[bytes]:
    return [value.tobytes() for value in vars(pairs).values() if isinstance(value, np.ndarray)]


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Probability of counts this far from the expected ones."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(chi2.sf(statistic, observed.size - 1))


def test_same_seed_gives_the_same_pairs_to_the_bit() -> None:
    structure = make("partial_orders")
    options = {"missing": 0.2, "label_noise": 0.1}
    assert arrays(sample_pairs(structure, 1000, 5, **options)) == arrays(sample_pairs(structure, 1000, 5, **options))
    assert arrays(sample_pairs(structure, 1000, 5)) != arrays(sample_pairs(structure, 1000, 6))


def test_options_change_only_what_they_are_about() -> None:
    structure = make("bradley_terry_independent")
    plain = sample_pairs(structure, 2000, 1)
    for options in ({"missing": 0.5}, {"one_objective": True}, {"label_noise": 0.2}):
        other = sample_pairs(structure, 2000, 1, **options)
        for name in ("prompt", "first", "second"):
            assert np.array_equal(getattr(plain, name), getattr(other, name))
        if "label_noise" not in options:
            kept = ~np.isnan(other.label)
            assert np.array_equal(plain.label[kept], other.label[kept])


@pytest.mark.parametrize("distinct", [False, True])
def test_pairs_are_two_independent_draws_from_the_behaviour(distinct: bool) -> None:
    structure = make("shifted_reference", 2)  # here the reference would be the wrong policy to draw from
    count = 200_000
    pairs = sample_pairs(structure, count, 0, distinct=distinct)
    prompts, responses = structure.behaviour.shape
    observed = np.zeros((prompts, responses, responses))
    np.add.at(observed, (pairs.prompt, pairs.first, pairs.second), 1)
    cells = ~np.eye(responses, dtype=bool) if distinct else np.ones((responses, responses), dtype=bool)
    assert observed[:, ~cells].sum() == 0

    def fit(policy: np.ndarray) -> float:
        expected = policy[:, :, None] * policy[:, None, :] * cells
        expected *= structure.prompt_weight[:, None, None] / expected.sum((1, 2), keepdims=True)
        return chi_square(observed[:, cells], count * expected[:, cells])

    assert fit(structure.behaviour) > 1e-3
    assert fit(structure.reference) < 1e-12  # negative control


@pytest.mark.parametrize("name", ["bradley_terry_independent", "condorcet_within"])
def test_labels_are_draws_with_the_probability_of_the_preference(name: str) -> None:
    structure = make(name, 1)
    pairs = sample_pairs(structure, 200_000, 3)
    objectives = len(structure.objectives)
    cell = (pairs.prompt, pairs.first, pairs.second)
    number, wins = np.zeros(structure.preference.shape[1:]), np.zeros(structure.preference.shape)
    np.add.at(number, cell, 1)
    for k in range(objectives):
        np.add.at(wins[k], cell, pairs.label[:, k])

    def fit(preference: np.ndarray) -> float:
        statistic = ((wins - number * preference) ** 2 / np.maximum(number * preference * (1 - preference), 1e-9)).sum()
        return float(chi2.sf(statistic, wins.size))

    assert np.isin(pairs.label, (0.0, 1.0)).all()
    assert number.min() > 50
    assert fit(structure.preference) > 1e-3
    assert fit(structure.preference.swapaxes(2, 3)) < 1e-12  # negative control: the other response had won


def test_ties_are_observed_only_where_the_structure_says_so() -> None:
    structure = make("partial_orders")
    pairs = sample_pairs(structure, 5000, 0, label_noise=0.3)
    tied = structure.preference[:, pairs.prompt, pairs.first, pairs.second].T == 0.5
    assert ((pairs.label == 0.5) == tied).all()
    tossed = sample_pairs(dataclasses.replace(structure, observed_ties=False), 5000, 0)
    assert np.isin(tossed.label, (0.0, 1.0)).all()
    assert abs(tossed.label[tied].mean() - 0.5) < 5 * 0.5 / np.sqrt(tied.sum())


def test_missing_labels_are_missing_at_random_at_the_given_rate() -> None:
    structure = make("bradley_terry_independent")
    absent = np.isnan(sample_pairs(structure, 40_000, 0, missing=0.3).label)
    assert np.abs(absent.mean(0) - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / len(absent))
    assert abs(absent.all(1).mean() - 0.3**3) < 5 * np.sqrt(0.3**3 / len(absent))  # each on its own
    assert not np.isnan(sample_pairs(structure, 1000, 0).label).any()
    assert np.isnan(sample_pairs(structure, 1000, 0, missing=1.0).label).all()


def test_one_objective_leaves_every_pair_one_label() -> None:
    structure = make("bradley_terry_independent")
    present = ~np.isnan(sample_pairs(structure, 30_000, 0, one_objective=True).label)
    assert (present.sum(1) == 1).all()
    assert chi_square(present.sum(0), np.full(3, 10_000.0)) > 1e-3


def test_label_noise_flips_the_given_share_of_labels() -> None:
    structure = make("bradley_terry_independent")
    flipped = sample_pairs(structure, 40_000, 0, label_noise=0.1).label != sample_pairs(structure, 40_000, 0).label
    assert np.abs(flipped.mean(0) - 0.1).max() < 5 * np.sqrt(0.09 / len(flipped))
    every = sample_pairs(structure, 1000, 0, label_noise=1.0).label
    assert np.array_equal(every, 1 - sample_pairs(structure, 1000, 0).label)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": 1.5}, r"missing must be a probability in \[0, 1\], got 1.5"),
        ({"label_noise": -0.1}, r"label_noise must be a probability in \[0, 1\], got -0.1"),
        ({"count": -1}, "count must be >= 0, got -1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_pairs(make("flat_faces"), **{"count": 10, "seed": 0, **options})


def test_distinct_pairs_of_a_single_response_are_refused() -> None:
    structure = make("flat_faces")
    certain = dataclasses.replace(structure, behaviour=np.eye(8)[np.zeros(6, dtype=int)])
    assert (sample_pairs(certain, 100, 0).first == 0).all()  # and responses of probability zero are not drawn
    with pytest.raises(ValueError, match="distinct must be False"):
        sample_pairs(certain, 100, 0, distinct=True)


def loss_of(structure: Structure, data: PairTensors, table: torch.Tensor, **options) -> mopo_kernels.MOPOLossOutput:
    """mopo_loss of a softmax table policy (X, Y) on tensors of pairs."""
    weight = torch.linspace(1.0, 0.4, len(structure.objectives), dtype=torch.float64)
    return mopo_kernels.mopo_loss(
        table.log_softmax(1).flatten()[data.response],
        torch.from_numpy(structure.reference).log().flatten()[data.response],
        data.pairs,
        data.preference,
        options.pop("objective_weight", weight),
        tau=structure.tau,
        pair_weight=data.pair_weight,
        **options,
    )


def table_of(structure: Structure) -> torch.Tensor:
    noise = np.random.default_rng(0).normal(size=structure.behaviour.shape)
    return torch.from_numpy(np.log(structure.behaviour) + noise).requires_grad_()


@pytest.mark.parametrize("loss_type", ["regression", "sigmoid"])
@pytest.mark.parametrize("estimator", ["pair", "snis"])
@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("partial_orders", {"missing": 0.3}),
        ("condorcet_across", {"one_objective": True, "label_noise": 0.1}),
        ("total_orders", {"distinct": True}),
    ],
    ids=["ties-missing", "one-objective", "distinct"],
)
def test_merged_pairs_have_the_loss_gradient_and_values_of_all_pairs(
    name: str, sampling: dict, estimator: str, loss_type: str
) -> None:
    structure = make(name)
    pairs = sample_pairs(structure, 20_000, 0, **sampling)
    merged = pairs.merged()
    assert merged.count.sum() == 20_000
    assert len(merged.count) < 10_000
    assert torch.equal(pairs.tensors().label_rate, merged.tensors().label_rate)
    results = []
    for data in (pairs.tensors(), merged.tensors()):
        table = table_of(structure)
        output = loss_of(structure, data, table, loss_type=loss_type, estimator=estimator, label_rate=data.label_rate)
        output.loss.backward()
        results.append(
            torch.cat([output.loss.detach()[None], output.satisfaction, output.labelled, table.grad.flatten()])
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-13)
    # Negative control: without the counts it is another loss.
    uncounted = dataclasses.replace(merged, count=np.ones_like(merged.count)).tensors()
    other = loss_of(structure, uncounted, table_of(structure), loss_type=loss_type, estimator=estimator)
    assert abs(float(other.loss.detach()) - float(results[0][0])) > 1e-3


def test_merging_does_not_depend_on_the_order_of_rows_or_of_responses() -> None:
    pairs = sample_pairs(make("partial_orders"), 5000, 0, missing=0.3, distinct=True)
    flip = np.random.default_rng(1).random(5000) < 0.5
    order = np.random.default_rng(2).permutation(5000)
    other = Pairs(
        pairs.prompt[order],
        np.where(flip, pairs.second, pairs.first)[order],
        np.where(flip, pairs.first, pairs.second)[order],
        np.where(flip[:, None], 1 - pairs.label, pairs.label)[order],
        pairs.shape,
    )
    assert arrays(pairs.merged()) == arrays(other.merged())


def test_merged_pairs_are_not_for_cloning() -> None:
    # Cloning averages the labels of a response over rows without their weights: what the docstring warns of.
    structure = make("bradley_terry_independent")
    pairs = sample_pairs(structure, 20_000, 0, distinct=True)
    losses = [
        loss_of(structure, data, table_of(structure), loss_type="cloning", prompt_index=data.prompt_index).loss.item()
        for data in (pairs.tensors(), pairs.merged().tensors())
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_soft_labels_are_not_merged() -> None:
    pairs = sample_pairs(make("flat_faces"), 10, 0)
    with pytest.raises(ValueError, match=r"label must be 0, 0\.5, 1 or NaN"):
        dataclasses.replace(pairs, label=0.9 * pairs.label + 0.05).merged()


def test_label_rate_is_the_share_of_pairs_with_a_label() -> None:
    pairs = sample_pairs(make("bradley_terry_independent"), 5000, 0, missing=0.4)
    rate = pairs.merged().tensors().label_rate.numpy()
    assert rate == pytest.approx((~np.isnan(pairs.label)).mean(0), abs=1e-15)


@every_structure
def test_population_pairs_make_the_optimum_stationary_and_snis_exact(name: str) -> None:
    structure = make(name)
    data = population_pairs(structure).tensors()
    assert float(data.pair_weight.sum()) == pytest.approx(1, abs=1e-14)
    table = torch.from_numpy(np.log(optimum(structure))).requires_grad_()
    weight = torch.from_numpy(structure.multiplier)
    output = loss_of(structure, data, table, objective_weight=weight, estimator="snis")
    output.loss.backward()
    assert float(table.grad.abs().max()) < 1e-12
    bias = np.abs(output.satisfaction.numpy() - structure.value(optimum(structure))).max()
    if name == "shifted_reference":
        assert bias > 0.01  # importance weights against the reference, draws from another policy
    else:
        assert bias < 1e-12
    # Negative control: twice the weight is another optimum.
    table = torch.from_numpy(np.log(optimum(structure))).requires_grad_()
    loss_of(structure, data, table, objective_weight=2 * weight).loss.backward()
    assert float(table.grad.abs().max()) > 1e-3


def test_leaving_out_equal_responses_biases_snis_as_stated_and_not_the_loss() -> None:
    structure = make("bradley_terry_independent")
    population = population_pairs(structure)
    kept = population.first != population.second
    keep = {name: getattr(population, name)[kept] for name in ("prompt", "first", "second", "label", "count")}
    data = MergedPairs(**keep, shape=population.shape).tensors()
    policy = optimum(structure)
    table = torch.from_numpy(np.log(policy)).requires_grad_()
    output = loss_of(structure, data, table, objective_weight=torch.from_numpy(structure.multiplier), estimator="snis")
    output.loss.backward()
    assert float(table.grad.abs().max()) < 1e-12
    same = float(structure.prompt_weight @ (structure.behaviour * policy).sum(1))
    assert output.satisfaction.numpy() == pytest.approx((structure.value(policy) - same / 2) / (1 - same), abs=1e-12)
    assert same > 0.1


def test_a_million_pairs_with_eight_objectives_take_seconds() -> None:
    structure = make("many_objectives")
    start = time.process_time()
    merged = sample_pairs(structure, 1_000_000, 0, missing=0.1).merged()
    assert merged.count.sum() == 1_000_000
    assert time.process_time() - start < 15  # 2 s on an idle core
