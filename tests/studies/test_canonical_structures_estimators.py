"""Where each estimator leads, and how noisy a batch's measurement is, against what can be worked out otherwise."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mopo_kernels import tabular
from studies.canonical_structures import estimators
from studies.canonical_structures.estimators import batch_noise, measured, study_estimators
from studies.canonical_structures.pairs import sample_pairs
from studies.canonical_structures.structures import closed_form_policy, make


def test_snis_measures_the_win_rate_and_pair_something_else() -> None:
    structure = make("bradley_terry_opposed")
    policy = tabular.solve(structure.problem()).policy
    pairs = sample_pairs(structure, 400_000, 0)
    value, share = measured(structure, pairs, policy, "snis")
    np.testing.assert_allclose(value, structure.value(policy), atol=3e-3)
    assert np.abs(measured(structure, pairs, policy, "pair")[0] - structure.value(policy)).max() > 0.01
    # 1 / E (policy / reference)^2, as the reference wrote the data.
    ratio = policy / structure.reference
    expected = 1 / (structure.prompt_weight @ (structure.reference * ratio**2).sum(1))
    assert share == pytest.approx(expected, rel=0.02)
    assert measured(structure, pairs, structure.reference, "snis")[1] == pytest.approx(1.0)


@pytest.mark.parametrize("estimator", ["snis", "pair"])
def test_the_noise_of_a_batch_falls_with_the_root_of_its_size_and_is_in_win_rates(estimator: str) -> None:
    structure = make("flat_faces")
    small, large = (batch_noise(structure, estimator, size, draws=150) for size in (100, 1600))
    assert small is not None
    assert large is not None
    assert 2.8 < small["deviation"] / large["deviation"] < 5.7
    # What moves the win rate by 0.01 moves the estimator by that times its scale.
    weight = structure.multiplier
    scale = estimators._scale(structure, weight, 1, estimator)
    pairs = sample_pairs(structure, 400_000, 1)
    found = []
    for multiplier in (weight[1] - 0.05, weight[1] + 0.05):
        policy = closed_form_policy(structure.reference, structure.win_rate, np.array([1.0, multiplier]), structure.tau)
        found.append((measured(structure, pairs, policy, estimator)[0][1], structure.value(policy)[1]))
    slope = (found[1][0] - found[0][0]) / (found[1][1] - found[0][1])
    assert slope == pytest.approx(scale, rel=0.05)
    assert batch_noise(make("bradley_terry_agreeing"), estimator, 32, draws=2) is None


def test_the_study_says_which_estimator_aims_elsewhere() -> None:
    structures = [make("condorcet_across", number) for number in range(2)]
    heard: list[tuple[int, int]] = []
    rows = study_estimators(structures, range(2), counts=(2000,), draws=3, progress=lambda *at: heard.append(at))
    json.dumps(rows, allow_nan=False)
    assert heard[-1] == (6, 6)
    by = {(row["instance"], row["estimator"]): row for row in rows}
    for instance in range(2):
        assert by[instance, "snis"]["bias_tv"] < 1e-6
        assert abs(by[instance, "snis"]["slack"]) < 1e-6
        assert by[instance, "pair"]["bias_tv"] > 0.05
        # Its own scale is met; in win rates the threshold is missed.
        assert by[instance, "pair"]["slack"] < -0.01
        assert by[instance, "pair"]["residual"] < 1e-6
        assert by[instance, "snis"]["learned"]["2000"]["tv"]["mean"] < 0.5
        assert "learned" not in by[instance, "closed_form"]
    assert by[0, "pair"]["bias_tv"] != by[1, "pair"]["bias_tv"]
    # 2^8 patterns of labels are not enumerated.
    assert {row["estimator"] for row in study_estimators([make("many_objectives")], [0], counts=(), draws=2)} == {
        "snis",
        "pair",
    }
