"""DualAscent and the exact solve on labels, against hand-worked steps and conditions checked afresh."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mopo_kernels import tabular
from mopo_kernels.data import load_preferences, win_rates
from mopo_kernels.dual import DualAscent, LabelSolution, ThresholdError, UnmetThreshold, solve_labels

NAMES = ("detail", "plain", "warm")


def make(**changes: object) -> DualAscent:
    arguments: dict = {
        "objectives": NAMES,
        "primary": "detail",
        "thresholds": {"plain": 0.6},
        "lr": 0.5,
        "maximum": 2.0,
    }
    return DualAscent(**(arguments | changes))


def feed(dual: DualAscent, *values: float) -> None:
    for value in values:
        dual.update(torch.tensor([0.5, value, 0.5]), torch.ones(3))


def test_weight_is_one_for_the_primary_and_zero_for_monitored_objectives() -> None:
    weight = make(initial={"plain": 0.25}).weight
    assert weight.dtype == torch.float32
    assert weight.tolist() == [1.0, 0.25, 0.0]


def test_update_is_one_plain_projected_step() -> None:
    dual = make(initial={"plain": 0.25})
    dual.update([0.5, 0.4, 0.9], [3, 3, 3])
    assert dual.multiplier == {"plain": pytest.approx(0.25 + 0.5 * (0.6 - 0.4), abs=1e-15)}
    dual.update([0.5, 1.0, 0.9], [3, 3, 3])
    assert dual.multiplier == {"plain": pytest.approx(0.15, abs=1e-15)}
    feed(dual, 1.0)
    assert dual.multiplier == {"plain": 0.0}
    feed(dual, *[0.0] * 20)
    assert dual.multiplier == {"plain": 2.0}


def test_unlabelled_objectives_keep_multiplier_and_average() -> None:
    dual = make(thresholds={"plain": 0.6, "warm": 0.6}, initial={"plain": 1.0, "warm": 1.0}, smoothing=0.5)
    dual.update([0.5, 0.4, math.nan], [1, 1, 0])
    assert dual.multiplier["warm"] == 1.0
    assert dual.multiplier["plain"] > 1.0
    assert "warm" not in dual.smoothed
    assert "warm" not in dual.slack


def test_smoothing_counts_the_first_value_fully_and_matches_the_closed_form() -> None:
    dual = make(smoothing=0.9)
    values = [0.3, 0.8, 0.1, 0.45]
    feed(dual, values[0])
    assert dual.smoothed["plain"] == pytest.approx(0.3, abs=1e-7)
    feed(dual, *values[1:])
    weights = 0.9 ** np.arange(len(values))[::-1]
    assert dual.smoothed["plain"] == pytest.approx(weights @ values / weights.sum(), abs=1e-7)
    assert dual.slack["plain"] == dual.smoothed["plain"] - 0.6


def test_warm_up_feeds_the_average_but_moves_nothing() -> None:
    dual = make(warmup_steps=2, smoothing=0.5)
    feed(dual, 0.0, 0.0)
    assert dual.multiplier == {"plain": 0.0}
    feed(dual, 0.7)
    # (0.25 * 0 + 0.5 * 0 + 1 * 0.7) / 1.75 = 0.4: were the warm-up not remembered, 0.7 would leave the multiplier at 0.
    assert dual.multiplier["plain"] == pytest.approx(0.5 * (0.6 - 0.4), abs=1e-7)


def test_state_round_trips_bit_for_bit_through_json() -> None:
    rng = np.random.default_rng(0)
    dual = make(smoothing=0.97, thresholds={"plain": 0.6, "warm": 0.55}, lr=0.0123, warmup_steps=3)
    values = [rng.random(3).tolist() for _ in range(40)]
    for value in values[:20]:
        dual.update(value, [1, 1, 1])
    resumed = make(smoothing=0.97, thresholds={"plain": 0.1, "warm": 0.1}, lr=0.0123, warmup_steps=3)
    resumed.load_state_dict(json.loads(json.dumps(dual.state_dict(), allow_nan=False)))
    assert resumed.state_dict() == dual.state_dict()
    for value in values[20:]:
        dual.update(value, [1, 1, 1])
        resumed.update(value, [1, 1, 1])
    assert resumed.state_dict() == dual.state_dict()
    assert all(value.hex() == resumed.multiplier[name].hex() for name, value in dual.multiplier.items())
    assert dual.multiplier["plain"] > 0


def test_state_dict_is_a_copy() -> None:
    dual = make()
    state = dual.state_dict()
    feed(dual, 0.0)
    assert state["multiplier"] == {"plain": 0.0}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objectives", ["detail", "warm", "plain"], "state: expected objectives"),
        ("primary", "warm", "state: expected primary 'detail'; got 'warm'"),
        ("multiplier", {"warm": 1.0}, r"state's multiplier: expected entries for \['plain'\]; got \['warm'\]"),
        ("multiplier", {"plain": 3.0}, r"state's multiplier: expected a number in \[0, 2\]; got 3.0"),
        ("multiplier", {"plain": math.nan}, "state's multiplier: expected a finite number; got nan for 'plain'"),
        (
            "average",
            {"detail": 0.5, "plain": 0.5, "warm": math.nan},
            "state's average: expected a finite number; got nan for 'warm'",
        ),
        ("best_seen", {"plain": math.inf}, "state's best_seen: expected a finite number; got inf for 'plain'"),
    ],
)
def test_foreign_state_is_refused(field: str, value: object, message: str) -> None:
    dual = make()
    with pytest.raises(ValueError, match=message):
        dual.load_state_dict(dual.state_dict() | {field: value})


def test_incomplete_state_is_refused() -> None:
    state = make().state_dict()
    del state["average"]
    with pytest.raises(ValueError, match=r"got one without \['average'\]"):
        make().load_state_dict(state)


def test_unmet_thresholds_are_reported_after_patience_at_the_maximum() -> None:
    dual = make(lr=100.0, patience=3)
    feed(dual, 0.553, 0.4)
    assert dual.unmet() == []
    feed(dual, 0.5)
    (unmet,) = dual.unmet()
    assert (unmet.objective, unmet.threshold, unmet.multiplier) == ("plain", 0.6, 2.0)
    assert unmet.best_seen == pytest.approx(0.553, abs=1e-6)
    feed(dual, 0.61)
    assert dual.unmet() == []


def test_threshold_error_says_what_cannot_be_met() -> None:
    error = ThresholdError([UnmetThreshold("helpful", 0.6, 0.5532, 10.0)])
    text = "threshold helpful >= 0.60 cannot be met: best seen 0.553 (multiplier at its maximum 10)"
    assert isinstance(error, RuntimeError)
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text
    told = pickle.loads(pickle.dumps(ThresholdError(error.unmet, "in other words")))
    assert (str(told), told.unmet) == ("in other words", error.unmet)
    assert "helpful >= 0.3976 cannot" in str(UnmetThreshold("helpful", 0.3976, 0.1, 10.0))


def test_set_thresholds_replaces_and_starts_the_divergence_count_afresh() -> None:
    dual = make(lr=100.0, patience=2)
    feed(dual, 0.3, 0.3)
    assert dual.unmet()
    dual.set_thresholds({"plain": 0.55})
    assert dual.unmet() == []
    assert dual.threshold == {"plain": 0.55}
    feed(dual, 0.2, 0.2)
    assert dual.unmet()[0].best_seen == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"thresholds: expected objectives that have one, .*'plain'.*; got 'warm'"):
        dual.set_thresholds({"warm": 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ("a", "a")}, "objectives: expected one or more distinct names"),
        ({"primary": "other"}, "primary: expected one of the objectives .*; got 'other'"),
        ({"thresholds": {"detail": 0.5}}, "expected none for the primary objective 'detail'.*got 0.5"),
        ({"thresholds": {"other": 0.5}}, "thresholds: expected objectives among .*; got one for 'other'"),
        ({"thresholds": {"plain": 1.5}}, r"thresholds: expected a number in \[0, 1\]; got 1.5 for 'plain'"),
        ({"thresholds": {"plain": math.nan}}, r"thresholds: expected a number in \[0, 1\]; got nan"),
        ({"lr": 0.0}, "lr: expected a finite step size > 0; got 0.0"),
        ({"maximum": math.inf}, "maximum: expected a finite multiplier > 0; got inf"),
        ({"warmup_steps": -1}, "warmup_steps: expected a number >= 0; got -1"),
        ({"smoothing": 1.0}, r"smoothing: expected a number in \[0, 1\); got 1.0"),
        ({"patience": 0}, "patience: expected a number >= 1; got 0"),
        ({"initial": {"warm": 1.0}}, "initial: expected objectives with a threshold, .*got one for 'warm'"),
        ({"initial": {"plain": 2.5}}, r"initial: expected a number in \[0, 2\]; got 2.5 for 'plain'"),
    ],
)
def test_arguments_out_of_range_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("satisfaction", "labelled", "message"),
    [
        ([0.5, 0.5], [1, 1, 1], r"satisfaction: expected shape \(3,\).*got \(2,\)"),
        (
            [0.5, math.nan, 0.5],
            [1, 1, 1],
            "satisfaction: expected a finite number where labelled > 0; got nan for 'plain'",
        ),
        ([0.5, 0.5, 0.5], [1, -1, 1], "labelled: expected a number >= 0; got -1.0 for 'plain'"),
    ],
)
def test_bad_measurements_are_named(satisfaction: list, labelled: list, message: str) -> None:
    dual = make()
    before = dual.state_dict()
    with pytest.raises(ValueError, match=message):
        dual.update(satisfaction, labelled)
    assert dual.state_dict() == before


def table_problem(seed: int = 0) -> tabular.TabularProblem:
    """4 prompts x 8 responses, three objectives, thresholds above what no multiplier gives."""
    rng = np.random.default_rng(seed)
    rate = rng.random((3, 4, 8))
    rate[1] = 1 - rate[0] + 0.2 * (rng.random((4, 8)) - 0.5)
    rate = np.clip(rate, 0, 1)
    reference = np.full((4, 8), 1 / 8)
    free = tabular.solve(tabular.TabularProblem(win_rate=rate, reference=reference, tau=0.1, thresholds={}))
    thresholds = {k: float(free.value[k]) + 0.05 for k in (1, 2)}
    return tabular.TabularProblem(win_rate=rate, reference=reference, tau=0.1, thresholds=thresholds)


def win_rates_at(problem: tabular.TabularProblem, weight: np.ndarray) -> np.ndarray:
    logit = np.einsum("k,kxy->xy", weight, problem.win_rate) / problem.tau + np.log(problem.reference)
    policy = np.exp(logit - logit.max(1, keepdims=True))
    policy /= policy.sum(1, keepdims=True)
    return np.einsum("kxy,xy->kx", problem.win_rate, policy) @ problem.prompt_weight


@pytest.mark.parametrize("sign", [1, -1], ids=["as_is", "negative_control_wrong_sign"])
def test_ascent_on_exact_values_ends_at_the_exact_multipliers(sign: int) -> None:
    problem = table_problem()
    exact = tabular.solve(problem)
    thresholds = {NAMES[k]: bound for k, bound in problem.thresholds.items()}
    dual = DualAscent(NAMES, "detail", thresholds, lr=0.5, maximum=10.0)
    for _ in range(3000):
        value = win_rates_at(problem, dual.weight.double().numpy())
        bound = np.array([0.0, *problem.thresholds.values()])
        dual.update((bound + sign * (value - bound)).tolist(), [1, 1, 1])
    error = np.abs(np.array(list(dual.multiplier.values())) - exact.multiplier[1:]).max()
    assert exact.multiplier[1:].min() > 0.05
    if sign == 1:
        assert error < 1e-6
    else:
        assert error > 0.05


def test_sampled_ascent_ends_near_the_exact_multipliers() -> None:
    """A table policy at the closed form, 256 sampled responses a step."""
    problem = table_problem()
    exact = tabular.solve(problem)
    rng = np.random.default_rng(1)
    thresholds = {NAMES[k]: bound for k, bound in problem.thresholds.items()}
    dual = DualAscent(NAMES, "detail", thresholds, lr=0.05, maximum=10.0, smoothing=0.9)
    tail = []
    for step in range(3000):
        logit = np.einsum("k,kxy->xy", dual.weight.double().numpy(), problem.win_rate) / problem.tau
        policy = np.exp(logit - logit.max(1, keepdims=True))
        policy /= policy.sum(1, keepdims=True)
        x = rng.integers(0, 4, 256)
        y = (rng.random((256, 1)) > policy[x].cumsum(1)).sum(1).clip(max=7)
        beats = rng.random((3, 256)) < problem.win_rate[:, x, y]
        dual.update(beats.mean(1).tolist(), [256, 256, 256])
        if step >= 1500:
            tail.append(list(dual.multiplier.values()))
    assert np.abs(np.mean(tail, 0) - exact.multiplier[1:]).max() < 0.03


def label_data(seed: int, prompts: int = 60, responses: int = 4, missing: float = 0.3, objectives: int = 3) -> dict:
    """Labelled pairs of every prompt; win rates with each response counted as a tie with itself."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=(objectives, prompts, responses))
    quality[1] = -0.6 * quality[0] + 0.8 * quality[1]
    first, second = np.triu_indices(responses, 1)
    prompt = np.repeat(np.arange(prompts), len(first))
    i, j = np.tile(first, prompts), np.tile(second, prompts)
    chance = 1 / (1 + np.exp(-2 * (quality[:, prompt, i] - quality[:, prompt, j])))
    preference = (rng.random(chance.shape) < chance).T.astype(float)
    preference[rng.random(preference.shape) < missing] = np.nan
    rate = np.full((objectives, prompts, responses), 0.5)
    for k in range(objectives):
        excess = np.nan_to_num(preference[:, k] - 0.5) / responses
        np.add.at(rate[k], (prompt, i), excess)
        np.add.at(rate[k], (prompt, j), -excess)
    return {
        "win_rate": rate,
        "reference": np.full((prompts, responses), 1 / responses),
        "objectives": [f"o{k}" for k in range(objectives)],
        "primary": "o0",
        "tau": 0.2,
        "prompt": prompt,
        "i": i,
        "j": j,
        "preference": preference,
        "weight": rng.random(len(prompt)) + 0.5,
    }


def pair_satisfaction(data: dict, multiplier: dict[str, float]) -> dict[str, float]:
    """The estimator "pair", pair by pair."""
    weight = [1.0 if name == data["primary"] else multiplier.get(name, 0.0) for name in data["objectives"]]
    out = {}
    for k, name in enumerate(data["objectives"]):
        total = mass = 0.0
        for p, (x, i, j) in enumerate(zip(data["prompt"], data["i"], data["j"], strict=True)):
            label = data["preference"][p, k]
            if np.isnan(label):
                continue
            ratio = [sum(w * (s[x, y] - 0.5) for w, s in zip(weight, data["win_rate"], strict=True)) for y in (i, j)]
            chosen = 1 / (1 + math.exp(-(ratio[0] - ratio[1]) / data["tau"]))
            total += data["weight"][p] * (chosen * label + (1 - chosen) * (1 - label))
            mass += data["weight"][p]
        out[name] = total / mass
    return out


def check_pair_conditions(data: dict, thresholds: dict[str, float], solution: LabelSolution, tolerance: float) -> None:
    measured = pair_satisfaction(data, solution.multiplier)
    assert solution.satisfaction == pytest.approx(measured, abs=1e-12)
    for name, bound in thresholds.items():
        assert measured[name] >= bound - tolerance
        assert solution.multiplier[name] == 0 or abs(measured[name] - bound) < tolerance


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_pair_solution_meets_thresholds_exactly_or_has_no_multiplier(objectives: int) -> None:
    data = label_data(objectives, objectives=objectives)
    free = solve_labels(**data, thresholds={})
    raised = {name: value + 0.03 for name, value in free.satisfaction.items() if name != "o0"}
    raised[f"o{objectives - 1}"] -= 0.3
    solution = solve_labels(**data, thresholds=raised)
    assert solution.feasible
    assert solution.message == ""
    assert solution.residual <= 1e-10
    check_pair_conditions(data, raised, solution, 1e-9)
    assert solution.multiplier[f"o{objectives - 1}"] == 0
    assert objectives == 2 or solution.multiplier["o1"] > 0.01
    negated = {name: -value for name, value in solution.multiplier.items()}
    if objectives > 2:
        with pytest.raises(AssertionError):
            check_pair_conditions(data, raised, LabelSolution(negated, solution.satisfaction, True, (), "", 0.0), 1e-9)


def test_pair_threshold_out_of_reach_is_reported_with_what_the_maximum_gives() -> None:
    data = label_data(0)
    solution = solve_labels(**data, thresholds={"o1": 0.999, "o2": 0.1}, maximum=4.0)
    assert not solution.feasible
    assert solution.multiplier == {"o1": 4.0, "o2": 0.0}
    (unmet,) = solution.unmet
    assert unmet.best_seen == pytest.approx(pair_satisfaction(data, solution.multiplier)["o1"], abs=1e-12)
    reached = f"{solution.satisfaction['o1']:.3f}"
    assert solution.message == f"threshold o1 >= 0.9990 cannot be met: {reached} with its multiplier at the maximum, 4"


def test_thresholds_missed_together_are_named_together_beside_those_that_are_held() -> None:
    data = label_data(0, objectives=4)
    free = solve_labels(**data, thresholds={}).satisfaction
    held = free["o3"] + 0.02
    assert solve_labels(**data, thresholds={"o2": 0.9}).feasible, "alone it can be met"
    solution = solve_labels(**data, thresholds={"o1": 0.95, "o2": 0.9, "o3": held}, maximum=6.0)
    assert [unmet.objective for unmet in solution.unmet] == ["o1", "o2"]
    assert solution.converged
    value = solution.satisfaction
    assert solution.message == (
        f"thresholds o1 >= 0.95 and o2 >= 0.90 cannot be met together beside o3 >= {held:.4f}: o1 {value['o1']:.3f}, "
        f"o2 {value['o2']:.3f} with their multipliers at the maximum, 6"
    )


def demo_labels() -> dict:
    """The labels of the demo, whose ``plain`` and ``brevity`` are opposed to ``detail``."""
    data = load_preferences(Path(__file__).parents[2] / "examples" / "demo" / "data" / "preferences.jsonl")
    rates = win_rates(data)
    pairs = [(x, pair) for x, example in enumerate(data) for pair in example.pairs]
    return {
        "win_rate": rates.win_rate,
        "reference": rates.reference,
        "objectives": data.objectives,
        "primary": "detail",
        "tau": 0.1,
        "prompt": [x for x, _ in pairs],
        "i": [pair.i for _, pair in pairs],
        "j": [pair.j for _, pair in pairs],
        "preference": [[pair.preference[name] for name in data.objectives] for _, pair in pairs],
    }


def test_a_search_that_ends_above_the_tolerance_names_what_it_missed_and_proves_nothing() -> None:
    solution = solve_labels(**demo_labels(), thresholds={"plain": 0.75, "brevity": 0.75}, maximum=1000.0)
    assert not solution.feasible
    assert not solution.converged
    assert [unmet.objective for unmet in solution.unmet] == ["plain", "brevity"]
    assert all(unmet.best_seen < 0.75 and unmet.multiplier < 1000 for unmet in solution.unmet)
    plain, brevity = (unmet.best_seen for unmet in solution.unmet)
    assert solution.message == (
        f"the multipliers are approximate (residual {solution.residual:.1e}), plain >= 0.75 reaches {plain:.4f}, "
        f"brevity >= 0.75 reaches {brevity:.4f}"
    )


@pytest.mark.parametrize("estimator", ["snis", "closed_form"])
def test_win_rate_scale_counts_prompts_by_their_weight(estimator: str) -> None:
    data = {**label_data(1), "estimator": estimator}
    weight = np.random.default_rng(0).random(60) ** 3
    equal = solve_labels(**data, thresholds={})
    thresholds = {"o1": equal.satisfaction["o1"] + 0.03}
    solution = solve_labels(**data, thresholds=thresholds, prompt_weight=weight)
    exact = tabular.solve(
        tabular.TabularProblem(
            win_rate=data["win_rate"],
            reference=data["reference"],
            tau=data["tau"],
            thresholds={1: thresholds["o1"]},
            prompt_weight=weight,
        )
    )
    assert solution.multiplier["o1"] == exact.multiplier[1] > 0.01
    assert list(solution.satisfaction.values()) == pytest.approx(exact.value, abs=1e-12)
    assert abs(solution.multiplier["o1"] - solve_labels(**data, thresholds=thresholds).multiplier["o1"]) > 1e-3
    with pytest.raises(ValueError, match="prompt_weight"):
        solve_labels(**data, thresholds=thresholds, prompt_weight=weight[:-1])


@pytest.mark.parametrize("estimator", ["snis", "closed_form"])
def test_win_rate_scale_is_the_tabular_problem(estimator: str) -> None:
    data = label_data(1)
    for name in ("prompt", "i", "j", "preference", "weight"):
        del data[name]
    free = solve_labels(**data, thresholds={}, estimator=estimator)
    thresholds = {name: free.satisfaction[name] + 0.03 for name in ("o1", "o2")}
    solution = solve_labels(**data, thresholds=thresholds, estimator=estimator)
    exact = tabular.solve(
        tabular.TabularProblem(
            win_rate=data["win_rate"],
            reference=data["reference"],
            tau=data["tau"],
            thresholds={1: thresholds["o1"], 2: thresholds["o2"]},
        )
    )
    assert solution.feasible
    assert list(solution.multiplier.values()) == exact.multiplier[1:].tolist()
    assert min(solution.multiplier.values()) > 0.01
    assert list(solution.satisfaction.values()) == pytest.approx(exact.value, abs=1e-12)


def test_win_rate_scale_says_when_the_cap_is_what_prevents_it() -> None:
    data = label_data(1)
    free = solve_labels(**data, thresholds={}, estimator="snis")
    threshold = free.satisfaction["o1"] + 0.05
    needed = solve_labels(**data, thresholds={"o1": threshold}, estimator="snis").multiplier["o1"]
    solution = solve_labels(**data, thresholds={"o1": threshold}, estimator="snis", maximum=needed / 2)
    assert not solution.feasible
    assert solution.multiplier == {"o1": needed / 2}
    assert solution.message.endswith(f"a maximum of {needed:.3g} would do")


def test_win_rate_scale_says_when_no_policy_meets_the_thresholds() -> None:
    solution = solve_labels(**label_data(1), thresholds={"o1": 0.95, "o2": 0.3}, estimator="snis")
    assert not solution.feasible
    assert [unmet.objective for unmet in solution.unmet] == ["o1"]
    assert "every policy misses some threshold by at least" in solution.message


def test_solution_starts_dual_ascent() -> None:
    data = label_data(2)
    free = solve_labels(**data, thresholds={})
    thresholds = {"o1": free.satisfaction["o1"] + 0.05}
    solution = solve_labels(**data, thresholds=thresholds)
    dual = DualAscent(data["objectives"], "o0", thresholds, lr=0.1, maximum=10.0, initial=solution.multiplier)
    assert dual.multiplier == solution.multiplier
    dual.update(list(solution.satisfaction.values()), [1, 1, 1])
    assert dual.multiplier["o1"] == pytest.approx(solution.multiplier["o1"], abs=1e-9)


def test_padding_is_allowed_and_never_paired() -> None:
    data = label_data(3, responses=4)
    padded = dict(data)
    padded["win_rate"] = np.concatenate([data["win_rate"], np.full((3, 60, 2), np.nan)], 2)
    padded["reference"] = np.concatenate([data["reference"], np.zeros((60, 2))], 1)
    thresholds = {"o1": 0.5}
    assert solve_labels(**padded, thresholds=thresholds) == solve_labels(**data, thresholds=thresholds)
    padded["j"] = np.full_like(data["j"], 5)
    with pytest.raises(ValueError, match="j: expected a response with reference > 0; got 5 at pair 0"):
        solve_labels(**padded, thresholds=thresholds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "exact"}, "estimator: expected one of .*; got 'exact'"),
        ({"maximum": 0.0}, "maximum: expected a finite multiplier > 0; got 0.0"),
        ({"tau": 0.0}, "tau: expected a finite number > 0; got 0.0"),
        ({"objectives": ["o0", "o1"]}, r"win_rate: expected 2 objectives first; got shape \(3, 60, 4\)"),
        ({"prompt": None}, r'prompt: expected a \(P,\) array for the estimator "pair"'),
        ({"preference": None}, r'preference: expected a \(P, K\) array for the estimator "pair"'),
        ({"prompt": np.full(360, 60)}, r"prompt: expected a number in 0..59; got 60"),
        ({"i": np.zeros(3, dtype=int)}, r"i: expected a \(P,\) array of integers; got shape \(3,\)"),
        ({"preference": np.full((360, 3), 2.0)}, r"preference: expected a number in \[0, 1\] or NaN; got 2.0"),
        ({"preference": np.full((360, 3), np.nan)}, r"objectives that have labels; got some for \['o1'\]"),
        ({"weight": np.full(360, -1.0)}, "weight: expected finite weights >= 0"),
        ({"weight": np.ones(3)}, r"weight: expected shape \(360,\); got \(3,\)"),
    ],
)
def test_label_arguments_out_of_range_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_labels(**(label_data(0) | {"thresholds": {"o1": 0.5}} | changes))
