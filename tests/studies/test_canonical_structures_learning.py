"""Learning from labels reaches the exact optimum, within the error that so many labels must leave, and not otherwise.

The optimum is ``tabular.solve``'s, the error the delta method's (studies/canonical_structures/asymptotics.py): neither
calls the losses or the multiplier step under test.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from mopo_kernels.tabular import solve
from studies.canonical_structures.asymptotics import Sampling, limit, sampling_error, total_variation
from studies.canonical_structures.learning import (
    Pools,
    as_written_by,
    learn,
    sample_pools,
    study,
    study_front,
    summarize,
)
from studies.canonical_structures.pairs import Pairs, population_pairs, sample_pairs
from studies.canonical_structures.policies import Transformer, log_linear, spell, table
from studies.canonical_structures.structures import STRUCTURES, Structure, make

COUNT = 100_000
# A right implementation fails a test of this level in one of a thousand data sets; the seeds are fixed.
LEVEL = 1e-3
# Where another policy wrote the data the weights of snis aim elsewhere: it has a test of its own.
OWN_DATA = [name for name in STRUCTURES if name != "shifted_reference"]


def p_value(structure: Structure, data: Pairs, sampling: Sampling | None = None, **options: Any) -> float:
    """Of what is learned from the data, against the exact optimum of the structure."""
    rate = 1.0 if sampling is None else sampling.rate(len(structure.objectives))
    learned = learn(structure, data, label_rate=None if rate == 1 else rate, tolerance=1e-5, **options)
    exact = solve(structure.problem())
    at = dataclasses.replace(
        limit(structure, sampling=sampling, label_rate=rate), policy=exact.policy, multiplier=exact.multiplier
    )
    error = sampling_error(structure, at, len(data.prompt), sampling=sampling, label_rate=rate)
    assert error.regular
    return error.test(learned.policy, learned.multiplier)[0]


def flipped(data: Pairs, objective: int) -> Pairs:
    label = data.label.copy()
    label[:, objective] = 1 - label[:, objective]
    return dataclasses.replace(data, label=label)


@pytest.mark.parametrize("name", OWN_DATA)
def test_a_learned_table_is_the_exact_optimum_within_its_statistical_error(name: str) -> None:
    structure = make(name)
    assert p_value(structure, sample_pairs(structure, COUNT, seed=1)) > LEVEL


@pytest.mark.parametrize("name", OWN_DATA)
def test_twice_the_temperature_is_told_apart_from_the_optimum(name: str) -> None:
    structure = make(name)
    assert p_value(structure, sample_pairs(structure, COUNT, seed=1), tau=2 * structure.tau) < 1e-9


@pytest.mark.parametrize("name", [name for name in OWN_DATA if name != "bradley_terry_agreeing"])
def test_multipliers_that_never_move_are_told_apart_from_the_optimum(name: str) -> None:
    # Where objectives agree no constraint binds and 0 is the right multiplier.
    structure = make(name)
    primary = np.eye(len(structure.objectives))[structure.primary]
    assert p_value(structure, sample_pairs(structure, COUNT, seed=1), weight=primary) < 1e-9


@pytest.mark.parametrize("name", OWN_DATA)
def test_flipped_labels_of_one_objective_are_told_apart_from_the_optimum(name: str) -> None:
    structure = make(name)
    # The primary where nothing else matters, else a constraint that binds.
    objective = structure.primary if name == "bradley_terry_agreeing" else 1
    data = flipped(sample_pairs(structure, COUNT, seed=1), objective)
    assert p_value(structure, data, steps=300) < 1e-9


@pytest.mark.parametrize("sampling", [Sampling(missing=0.5), Sampling(one_objective=True)], ids=["missing", "one"])
def test_missing_labels_cost_precision_but_no_bias(sampling: Sampling) -> None:
    structure = make("bradley_terry_independent")
    data = sample_pairs(structure, COUNT, 2, **dataclasses.asdict(sampling))
    assert p_value(structure, data, sampling) > LEVEL
    # Without their rate the same labels aim at another problem.
    learned = learn(structure, data)
    end = limit(structure, sampling=sampling)
    error = sampling_error(structure, limit(structure, sampling=sampling, label_rate=sampling.rate(3)), COUNT)
    assert error.test(learned.policy, learned.multiplier)[0] < 1e-9
    assert total_variation(structure, end.policy, solve(structure.problem()).policy) > 0.05


def test_p_values_are_uniform() -> None:
    # What makes one p-value mean something: over data sets the learned policies spread as the delta method says.
    structure = make("condorcet_within")
    end = limit(structure)
    error = sampling_error(structure, end, COUNT)
    distance, p = [], []
    for seed in range(16):
        learned = learn(structure, sample_pairs(structure, COUNT, seed), tolerance=1e-5)
        p.append(error.test(learned.policy, learned.multiplier)[0])
        distance.append(total_variation(structure, learned.policy, end.policy))
    assert abs(np.mean(p) - 0.5) < 3.5 * np.sqrt(1 / 12 / len(p))
    spread = np.std(distance) / np.sqrt(len(distance))
    assert abs(np.mean(distance) - error.total_variation) < 4 * spread


def test_the_distance_falls_with_the_root_of_the_number_of_pairs() -> None:
    structure = make("bradley_terry_opposed")
    rows = study(structure, [3_000, 30_000, 300_000], range(4))
    (line,) = summarize(json.loads(json.dumps(rows)))
    assert line["bias_tv"] < 1e-6
    assert abs(line["slope"] + 0.5) < 4 * line["slope_deviation"] + 0.02
    assert line["slope_deviation"] < 0.08


@pytest.mark.parametrize("estimator", ["snis", "pair", "closed_form"])
@pytest.mark.parametrize("name", ["bradley_terry_opposed", "total_orders", "shifted_reference"])
def test_each_estimator_ends_where_its_own_equations_say(name: str, estimator: str) -> None:
    # In exact preferences for what is linear in labels; "closed_form" is not, so from many labels.
    structure = make(name)
    end = limit(structure, estimator=estimator)
    assert end.residual < 1e-6
    if estimator == "closed_form":
        learned = learn(structure, sample_pairs(structure, 200_000, 3), estimator=estimator)
        bound = 0.03
    else:
        learned = learn(structure, population_pairs(structure), estimator=estimator)
        bound = 1e-5
    assert learned.converged
    assert total_variation(structure, learned.policy, end.policy) < bound
    np.testing.assert_allclose(learned.estimator_value, end.measured, atol=bound)


def test_only_snis_on_the_references_own_data_has_no_bias() -> None:
    def bias(structure: Structure, **options: Any) -> float:
        return total_variation(structure, limit(structure, **options).policy, solve(structure.problem()).policy)

    opposed, shifted = make("bradley_terry_opposed"), make("shifted_reference")
    assert bias(opposed) < 1e-8
    assert bias(opposed, estimator="pair") > 0.005
    assert bias(shifted) > 0.02
    # Comparing a response with itself never: win rates are then stretched.
    assert bias(opposed, sampling=Sampling(distinct=True)) > 1e-3
    few, many = (bias(opposed, loss_type="cloning", pool=size) for size in (8, 32))
    assert few > 1.5 * many > 0


@pytest.mark.parametrize("pool", [2, 8])
def test_cloning_ends_at_its_biased_limit(pool: int) -> None:
    structure = make("partial_orders")
    end = limit(structure, loss_type="cloning", pool=pool)
    data: Pairs | Pools
    data = sample_pairs(structure, COUNT, 0) if pool == 2 else sample_pools(structure, COUNT, pool, 0)
    learned = learn(structure, data, loss_type="cloning", tolerance=1e-5)
    distance = total_variation(structure, learned.policy, end.policy)
    exact = solve(structure.problem())
    assert distance < 0.03
    assert total_variation(structure, learned.policy, exact.policy) > 1.5 * distance


def test_merging_pools_changes_no_cloning_gradient() -> None:
    structure = make("bradley_terry_opposed")
    data = sample_pairs(structure, 2_000, 4)
    pools = Pools(data.prompt, np.stack([data.first, data.second], 1), data.label[:, None, :])
    for estimator in ("snis", "closed_form"):
        merged = learn(structure, data, loss_type="cloning", estimator=estimator, steps=20)
        plain = learn(structure, pools, loss_type="cloning", estimator=estimator, steps=20, dual_lr=None)
        np.testing.assert_allclose(merged.policy, plain.policy, atol=1e-9)
        np.testing.assert_allclose(merged.multiplier, plain.multiplier, atol=1e-6)


def test_the_restricted_class_is_learned_where_least_squares_projects() -> None:
    structure = make("restricted_class")
    end = limit(structure, policy="linear")
    learned = learn(structure, population_pairs(structure), policy="linear")
    np.testing.assert_allclose(learned.policy, end.policy, atol=1e-6)
    sampled = learn(structure, sample_pairs(structure, COUNT, 5), policy="linear")
    error = sampling_error(structure, end, COUNT, policy="linear")
    assert error.test(sampled.policy, sampled.multiplier)[0] > LEVEL
    start = log_linear(structure.features, structure.reference).table().exp()
    assert torch.allclose(start.sum(1), torch.ones(len(start), dtype=torch.float64))


def test_fresh_batches_with_adam_come_near() -> None:
    structure = make("bradley_terry_opposed")
    learned = learn(structure, sample_pairs(structure, COUNT, 6), batch=256, steps=600)
    exact = solve(structure.problem())
    assert total_variation(structure, learned.policy, exact.policy) < 0.08
    # The multiplier follows measurements on 256 pairs each, so it is the values that are held.
    slack = learned.value[1] - structure.thresholds[1]
    assert abs(slack) < 0.02


def test_a_transformer_tuned_on_its_own_samples_reaches_the_optimum() -> None:
    structure = make("bradley_terry_independent")
    policy = Transformer(*structure.reference.shape[:1], spell(structure.reference.shape[1]), width=16, layers=1)
    policy.pretrain(structure.reference, steps=60)
    structure = as_written_by(structure, policy)
    exact = solve(structure.problem())
    count = 20_000
    data = sample_pairs(structure, count, 7)
    learned = learn(structure, data, policy=policy, steps=300, learning_rate=0.02)
    expected = sampling_error(structure, limit(structure), count).total_variation
    distance = total_variation(structure, learned.policy, exact.policy)
    assert distance < 2 * expected
    assert total_variation(structure, structure.reference, exact.policy) > 5 * distance
    np.testing.assert_allclose(learned.multiplier, exact.multiplier, atol=0.2)


def test_strings_are_all_different_and_as_many_as_asked() -> None:
    for responses, alphabet, length in ((8, 2, 3), (16, 4, 2), (9, 3, 2), (64, 4, 3)):
        strings = spell(responses)
        assert strings.shape == (responses, length)
        assert len(torch.unique(strings, dim=0)) == responses
        assert int(strings.max()) + 1 == alphabet
    with pytest.raises(ValueError, match="responses must be a power"):
        spell(6)


def test_a_transformers_table_is_a_distribution_and_agrees_with_plain_log_softmax() -> None:
    policy = Transformer(3, spell(8), width=8, layers=1, seed=1)
    log_probability = policy.table()
    torch.testing.assert_close(log_probability.exp().sum(1), torch.ones(3, dtype=torch.float64))
    logits = policy.hidden() @ policy.head.weight.T
    plain = logits.log_softmax(-1).gather(2, policy.target[..., None])[..., 0].sum(1)
    torch.testing.assert_close(log_probability, plain.view(3, 8))


def test_unseen_responses_stay_at_the_reference() -> None:
    structure = make("rare_catastrophe")
    data = sample_pairs(structure, 30, 8)
    learned = learn(structure, data, steps=200)
    assert np.isfinite(learned.policy).all()
    never = sorted(set(range(len(structure.prompt_weight))) - set(data.prompt.tolist()))
    np.testing.assert_allclose(learned.policy[never], structure.reference[never], atol=1e-12)


def test_a_lagged_reference_moves_and_relaxes_thresholds() -> None:
    structure = make("bradley_terry_opposed")
    data = population_pairs(structure)
    plain = learn(structure, data)
    lagged = learn(structure, data, t0=50, beta=0.9, steps=200)
    assert not lagged.converged
    assert lagged.steps == 200
    assert lagged.thresholds[1] != structure.thresholds[1]
    # Each new reference may be left by as much again.
    assert lagged.kl > plain.kl


def test_dpo_and_offsets_go_through_the_same_loop() -> None:
    structure = make("bradley_terry_opposed")
    data = population_pairs(structure)
    primary = np.array([1.0, 0.0])
    dpo = learn(structure, data, loss_type="sigmoid", weight=primary)
    assert dpo.converged
    # Bradley-Terry scores are recovered: log-ratios are scores / beta.
    odds = structure.preference[0, :, :, 0]
    score = np.log(odds) - np.log(1 - odds)
    ratio = np.log(dpo.policy / structure.reference)
    np.testing.assert_allclose(ratio - ratio[:, :1], score / structure.tau, atol=1e-4)
    moved = learn(structure, data, loss_type="sigmoid", weight=primary, offset=-score)
    ratio = np.log(moved.policy / structure.reference)
    np.testing.assert_allclose(ratio - ratio[:, :1], 0, atol=1e-4)


def test_learned_fronts_lie_under_the_exact_one() -> None:
    (row,) = study_front(make("bradley_terry_opposed"), [50_000], [0], points=3)
    assert 0.8 < row["hypervolume_ratio"] < 1.05
    json.dumps(row)


def test_a_policy_kind_that_a_structure_has_not_is_refused() -> None:
    structure = make("bradley_terry_opposed")
    with pytest.raises(ValueError, match="has no features"):
        learn(structure, population_pairs(structure), policy="linear")
    with pytest.raises(ValueError, match="policy must be"):
        learn(structure, population_pairs(structure), policy="tabel")
    assert torch.allclose(table(structure.reference).table().exp(), torch.as_tensor(structure.reference))
