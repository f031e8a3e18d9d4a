"""The study of certificates: what it draws is what it says, and a run's record has every share."""

from __future__ import annotations

import json

import numpy as np
import pytest

from studies.canonical_structures.learning import sample_pools
from studies.canonical_structures.pairs import sample_pairs
from studies.canonical_structures.structures import make
from studies.certificate_coverage.coverage import AIMS, instance, labelled_win_rate, learned, main, measured


def test_win_rates_of_many_labels_and_weighted_prompts_are_the_exact_ones():
    structure = make("bradley_terry_independent")
    found = labelled_win_rate(structure, sample_pairs(structure, 400_000, 0))
    np.testing.assert_allclose(found, structure.win_rate, atol=0.03)
    policy = learned(structure, sample_pairs(structure, 5_000, 0))[0]
    sums = measured(structure, sample_pools(structure, 6 * 100_000, 4, 1), policy)
    assert sums.coverage == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(sums.value.sum(0) / sums.total.sum(0), structure.value(policy), atol=0.01)


def test_candidates_aim_higher_and_higher():
    structure = make("bradley_terry_opposed")
    policies = learned(structure, sample_pairs(structure, 5_000, 0))
    held = structure.value(np.stack(policies))[:, 1]
    assert 1 < len(policies) <= len(AIMS)
    assert (np.diff(held) > 0).all()


def test_an_instance_is_false_only_if_it_is_certified_below_a_threshold(monkeypatch):
    structure = make("condorcet_within")
    found = instance(structure, 0, 5_000, 400, 0.95)
    assert not found["false"]
    # Bounds that are no bounds: every candidate that looks good is certified, and some are not.
    monkeypatch.setattr("mopo_kernels.certify.lower_bound", lambda value, total, level: value.sum() / total.sum())
    careless = [instance(structure, seed, 5_000, 400, 0.95) for seed in range(12)]
    assert sum(each["wrong"] for each in careless) >= 2
    assert sum(each["false"] for each in careless) >= 1


def test_a_run_prints_a_table_and_writes_its_record(tmp_path, capsys):
    out = tmp_path / "certify.json"
    arguments = ["--structures", "flat_faces", "--instances", "3", "--prompts", "200", "--output", str(out)]
    assert main(arguments) == 0
    assert "flat_faces" in capsys.readouterr().out
    record = json.loads(out.read_text(encoding="utf-8"))
    assert set(record["results"]["flat_faces"]) == {
        *("wrong", "certified", "false", "refused", "naive", "effective_prompts", "cost")
    }
    assert record["settings"]["instances"] == 3
    assert record["command"].startswith("python -m studies.certificate_coverage --structures flat_faces")
