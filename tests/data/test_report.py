"""Label statistics and win rates against numbers worked out by hand."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from mopo_kernels.data import PreferenceData, PreferenceExample, PreferencePair, summarize, win_rates
from mopo_kernels.dual import LabelSolution, solve_labels


def example(pairs: dict[tuple[int, int], dict[str, float | None]], count: int = 2, **more: Any) -> PreferenceExample:
    responses = more.pop("responses", tuple(f"response {index}" for index in range(count)))
    prompt = more.pop("prompt", "p")
    return PreferenceExample(prompt, responses, tuple(PreferencePair(i, j, z) for (i, j), z in pairs.items()), **more)


def data(*examples: PreferenceExample, **more: Any) -> PreferenceData:
    return PreferenceData.from_examples(examples, **more)


def test_counts_coverage_ties_and_soft_labels() -> None:
    report = summarize(
        data(
            example({(0, 1): {"a": 1.0, "b": None}, (1, 2): {"a": 0.5, "b": 0.75}}, 3, prompt="p"),
            example({(0, 1): {"a": 0.0}}, prompt="p"),
            example({(0, 1): {"a": 0.5}}, prompt="q", responses=("same", "same")),
        )
    )
    counts = (report.examples, report.prompts, report.responses, report.pairs, report.equal_text_pairs)
    assert counts == (3, 2, 7, 4, 1)
    a, b = report.objectives
    assert (a.labelled, a.coverage, a.ties, a.soft) == (4, 1.0, 0.5, 0.0)
    assert (b.labelled, b.coverage, b.ties, b.soft) == (1, 0.25, 0.0, 1.0)
    assert "1 pairs are between equal texts: no policy can tell them apart" in report.messages


def test_agreement_is_the_correlation_over_both_orientations() -> None:
    rng = np.random.default_rng(0)
    labels = rng.uniform(size=(40, 2))
    report = summarize(data(*(example({(0, 1): {"a": float(a), "b": float(b)}}) for a, b in labels)))
    (entry,) = report.agreement
    both = np.concatenate([labels, 1 - labels])
    assert entry.correlation == pytest.approx(np.corrcoef(both.T)[0, 1], abs=1e-12)
    assert entry.conflict == pytest.approx(((labels > 0.5).sum(1) == 1).mean())
    assert entry.pairs == 40


def test_agreement_looks_only_at_pairs_labelled_for_both_and_a_tie_is_no_conflict() -> None:
    report = summarize(
        data(
            example({(0, 1): {"a": 1.0, "b": 0.0}}),
            example({(0, 1): {"a": 1.0, "b": None}}),
            example({(0, 1): {"a": 0.5, "b": 1.0}}),
        )
    )
    (entry,) = report.agreement
    assert (entry.pairs, entry.conflict) == (2, 0.5)


AGREE = "objectives agree within prompts: no threshold will cost anything of the primary objective"


@pytest.mark.parametrize(
    ("conflicts", "told"), [(0, True), (2, True), (3, False), (50, False)], ids=lambda value: str(value)
)
def test_agreeing_objectives_are_told_and_conflicting_ones_are_not(conflicts: int, told: bool) -> None:
    rows = [example({(0, 1): {"a": 1.0, "b": 0.0 if index < conflicts else 1.0}}) for index in range(100)]
    assert (AGREE in summarize(data(*rows)).messages) == told


def test_mostly_tied_labels_are_not_called_agreement() -> None:
    rows = [example({(0, 1): {"a": 1.0, "b": 1.0 if index < 50 else 0.5}}) for index in range(100)]
    assert summarize(data(*rows)).messages == ()


def test_when_only_some_objectives_agree_those_are_named() -> None:
    rows = [example({(0, 1): {"a": 1.0, "b": 1.0, "c": float(index % 2)}}) for index in range(10)]
    assert summarize(data(*rows)).messages == (
        "a and b agree within prompts: a threshold on one will cost nothing of the other",
    )


def test_a_threshold_on_an_agreeing_objective_can_bind_and_costs_the_primary_nothing() -> None:
    """What the message says, and why it does not say that no constraint binds."""
    agreeing = data(*(example({(0, 1): {"a": 1.0, "b": 1.0}}) for _ in range(10)))
    assert summarize(agreeing).messages == (AGREE,)
    rates = win_rates(agreeing)

    def solution(thresholds: dict[str, float]) -> LabelSolution:
        return solve_labels(rates.win_rate, rates.reference, ["a", "b"], "a", thresholds, 0.1, estimator="snis")

    free, held = solution({}), solution({"b": 0.7499})
    assert held.multiplier["b"] > 0.1
    assert held.satisfaction["a"] > free.satisfaction["a"]


def test_objectives_without_a_common_pair_cannot_be_compared() -> None:
    report = summarize(data(example({(0, 1): {"a": 1.0}}), example({(0, 1): {"b": 1.0}})))
    (entry,) = report.agreement
    assert (entry.pairs, entry.correlation, entry.conflict) == (0, None, None)
    (message,) = report.messages
    assert message.startswith("no pair is labelled for both a and b")


def test_a_single_objective_and_an_unlabelled_one_are_told() -> None:
    assert "one objective only" in summarize(data(example({(0, 1): {"a": 1.0}}))).messages[0]
    report = summarize(data(example({(0, 1): {"a": 1.0}}), objectives=["a", "b"]))
    assert report.messages[0] == "objective b has no label at all"


@pytest.mark.parametrize("count", [3, 4, 5])
def test_cycles_and_triples_match_enumeration(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(10):
        labels = {
            pair: {"a": float(rng.choice([0.0, 0.3, 0.5, 1.0]))} for pair in itertools.combinations(range(count), 2)
        }
        beats = {(i, j) if z["a"] > 0.5 else (j, i) for (i, j), z in labels.items() if z["a"] != 0.5}
        triples = cycles = 0
        for a, b, c in itertools.combinations(range(count), 3):
            inside = [(i, j) for i, j in beats if {i, j} <= {a, b, c}]
            triples += len(inside) == 3
            cycles += len(inside) == 3 and {i for i, _ in inside} == {a, b, c}
        (entry,) = summarize(data(example(labels, count))).objectives
        assert (entry.triples, entry.cycles) == (triples, cycles)


def test_the_report_is_plain_json() -> None:
    report = summarize(data(example({(0, 1): {"a": 1.0, "b": None}})))
    assert json.loads(json.dumps(report.to_dict()))["objectives"][0]["objective"] == "a"


def test_fully_labelled_win_rates_count_the_response_itself_as_a_tie() -> None:
    rates = win_rates(data(example({(0, 1): {"a": 1.0}, (0, 2): {"a": 1.0}, (2, 1): {"a": 0.75}}, 3)))
    expected = [(0.5 + 1 + 1) / 3, (0 + 0.5 + 0.25) / 3, (0 + 0.75 + 0.5) / 3]
    np.testing.assert_allclose(rates.win_rate[0, 0], expected, rtol=0, atol=1e-15)
    assert rates.win_rate.dtype == rates.reference.dtype == np.float64


def test_win_rates_of_the_reference_average_to_one_half() -> None:
    rng = np.random.default_rng(0)
    rows = [
        example({pair: {"a": float(rng.uniform())} for pair in itertools.combinations(range(count), 2)}, count)
        for count in (2, 3, 5)
    ]
    rates = win_rates(data(*rows))
    np.testing.assert_allclose((rates.win_rate[0] * rates.reference).sum(1), 0.5, rtol=0, atol=1e-15)


def test_missing_labels_are_estimated_from_those_there_are() -> None:
    rates = win_rates(data(example({(0, 1): {"a": 1.0}, (1, 0): {"a": 0.5}}, 4)))
    # P(0 beats 1) is the mean 0.75 of the two judgements; one of three opponents is labelled; 2 and 3 have no label
    np.testing.assert_allclose(rates.win_rate[0, 0], [0.5 + 0.75 * 0.25, 0.5 - 0.75 * 0.25, 0.5, 0.5], atol=1e-15)


def test_padding_is_zero_and_weights_are_normalised() -> None:
    rates = win_rates(
        data(example({(0, 1): {"a": 1.0, "b": 0.0}}, 2, weight=3.0), example({(0, 1): {"a": 1.0}}, 3)), ["b", "a"]
    )
    assert rates.win_rate.shape == (2, 2, 3)
    assert rates.reference.tolist() == [[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]
    assert rates.win_rate[:, 0, 2].tolist() == [0.0, 0.0]
    assert rates.win_rate[:, 0, 0].tolist() == [0.25, 0.75]
    assert rates.prompt_weight.tolist() == [0.75, 0.25]
