"""`mopo pareto`: its figures are those of the exact solver, its errors one line that says what can be had."""

from __future__ import annotations

import builtins
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mopo_kernels import cli, plots, tabular
from mopo_kernels.cli import pareto_file
from mopo_kernels.data import PreferenceData, load_preferences, win_rates
from mopo_kernels.dual import solve_labels
from mopo_kernels.tabular import explore

EXAMPLE = Path(__file__).parents[2] / "examples" / "pareto" / "three_objectives.json"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_TRACEBACK", "")
    monkeypatch.setenv("COLUMNS", "200")


def rates(objectives: int = 2, prompts: int = 3, responses: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.1, 0.9, (objectives, prompts, responses))


def write(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two opposed objectives, quality the primary one."""
    win_rate = rates()
    win_rate[1] = 0.8 - 0.8 * win_rate[0] + 0.2 * win_rate[1]
    return write(tmp_path / "two.json", objectives=["quality", "safety"], tau=0.2, win_rate=win_rate.tolist())


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Preferences with missing labels, ties, and prompts of two to four responses."""
    draw = np.random.default_rng(3)
    rows = []
    for index in range(12):
        count = 2 + index % 3
        quality = draw.permutation(count)
        pairs = []
        for i in range(count):
            for j in range(i + 1, count):
                wins = float(quality[i] > quality[j])
                preference = {"quality": wins, "safety": None if draw.random() < 0.3 else 0.9 - 0.8 * wins}
                pairs.append({"i": i, "j": j, "preference": preference | {"style": float(draw.integers(3)) / 2}})
        rows.append({"prompt": f"p{index}", "responses": [f"r{index} {n}" for n in range(count)], "pairs": pairs})
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """The report of a run that must succeed."""
    out = tmp_path / "new" / "out.json"
    assert cli.main(["pareto", *map(str, arguments), "--output", str(out)]) == 0
    report: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return report


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, which must be one line, on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mopo: error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.strip()


def in_order(report: dict[str, Any], named: dict[str, float | None]) -> np.ndarray:
    return np.array([np.nan if named[name] is None else named[name] for name in report["objectives"]], dtype=float)


def assert_is_solution(report: dict[str, Any], row: dict[str, Any], solve: Callable[[dict[int, float]], Any]) -> None:
    exact = solve({report["objectives"].index(name): bound for name, bound in row["threshold"].items()})
    assert row.get("feasible", True) == exact.feasible
    if not exact.feasible:
        assert row["best_worst_slack"] == pytest.approx(exact.best_value, abs=1e-9)
        assert row["kl"] is None
        return
    np.testing.assert_allclose(in_order(report, row["value"]), exact.value, atol=1e-8)
    np.testing.assert_allclose(in_order(report, row["multiplier"]), exact.multiplier, atol=1e-5)
    assert row["kl"] == pytest.approx(exact.kl, abs=1e-7)
    assert row["primal"] == pytest.approx(exact.primal, abs=1e-8)


# What it finds


def test_every_point_of_a_finite_problem_is_what_solve_says(tmp_path):
    preference = np.random.default_rng(1).uniform(size=(2, 3, 4, 4))
    preference = (preference + 1 - preference.swapaxes(2, 3)) / 2
    behaviour = np.random.default_rng(2).dirichlet(np.ones(4), 3)
    path = write(
        tmp_path / "p.json",
        objectives=["safety", "quality"],
        primary="quality",
        tau=0.05,
        preference=preference.tolist(),
        behaviour=behaviour.tolist(),
        reference=behaviour.tolist(),
        prompt_weight=[1, 2, 5],
        thresholds={"safety": 0.5},
    )
    report = run(tmp_path, path, "--grid", "safety=0.3:0.9:7")

    def solve(thresholds: dict[int, float]) -> tabular.TabularSolution:
        return tabular.solve(
            tabular.TabularProblem(
                preference, behaviour, behaviour, 0.05, thresholds, primary=1, prompt_weight=[1, 2, 5]
            )
        )

    assert report["primary"] == "quality"
    assert len(report["front"]) == 7
    assert {row["feasible"] for row in report["front"]} == {True, False}
    for row in [*report["front"], report["chosen"], report["without_thresholds"] | {"threshold": {}}]:
        assert_is_solution(report, row, solve)
    np.testing.assert_allclose(report["chosen"]["policy"], solve({0: 0.5}).policy, atol=1e-8)
    assert report["chosen"]["gap"] == pytest.approx(0, abs=1e-9)
    assert solve({0: report["best_attainable"]["safety"] - 1e-6}).feasible
    assert not solve({0: report["best_attainable"]["safety"] + 1e-6}).feasible
    front = tabular.pareto_front(
        tabular.TabularProblem(preference, behaviour, behaviour, 0.05, primary=1, prompt_weight=[1, 2, 5]),
        {0: np.linspace(0.3, 0.9, 7)},
    )
    assert report["hypervolume"] == pytest.approx(front.hypervolume)
    assert [row["nondominated"] for row in report["front"]] == front.nondominated.tolist()


def test_npz_and_padded_prompts_give_the_same_answer_as_the_shorter_json(tmp_path):
    win_rate = rates(prompts=2, responses=3)
    short = write(tmp_path / "a.json", win_rate=[[row[0].tolist(), [*row[1, :2].tolist(), None]] for row in win_rate])
    win_rate[:, 1, 2] = np.nan
    np.savez(
        tmp_path / "b.npz", win_rate=win_rate, objectives=np.array(["objective_0", "objective_1"]), tau=np.float64(0.1)
    )
    first, second = (run(tmp_path, path, "--thresholds", "objective_1=0.4") for path in (short, tmp_path / "b.npz"))
    assert (first["prompts"], first["responses"]) == (2, 5)
    assert first["tau"] == 0.1
    assert {**first, "file": ""} == {**second, "file": ""}
    np.testing.assert_allclose(first["chosen"]["policy"][1][2], 0)
    rate = np.nan_to_num(win_rate)
    assert first["reference"]["objective_0"] == pytest.approx((rate[0, 0].mean() + rate[0, 1, :2].mean()) / 2)


def test_options_win_over_the_file(two, tmp_path):
    report = run(tmp_path, two, "--primary", "safety", "--tau", 0.3, "--thresholds", '{"quality": 0.4}', "--grid", 2)
    assert (report["primary"], report["tau"]) == ("safety", 0.3)
    assert report["chosen"]["threshold"] == {"quality": 0.4}
    assert report["chosen"]["multiplier"]["safety"] == 1


def pair_arrays(data: PreferenceData) -> dict[str, list[Any]]:
    """The pairs of a data set as solve_labels takes them."""
    pairs = [(x, pair) for x, example in enumerate(data) for pair in example.pairs]
    labels = [[pair.preference.get(name) for name in data.objectives] for _, pair in pairs]
    return {
        "prompt": [x for x, _ in pairs],
        "i": [pair.i for _, pair in pairs],
        "j": [pair.j for _, pair in pairs],
        "preference": [[math.nan if value is None else value for value in row] for row in labels],
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_preferences_give_the_multipliers_that_training_starts_from(labels, tmp_path, suffix):
    data = load_preferences(labels)
    path = labels
    if suffix == ".parquet":
        path = tmp_path / "labels.parquet"
        data.save(path)
    if suffix == ".json":  # an array of rows
        path = tmp_path / "labels.json"
        path.write_text(json.dumps([json.loads(line) for line in labels.read_text().splitlines()]))
    thresholds = {"safety": 0.5, "style": 0.6}
    report = run(tmp_path, path, "--tau", 0.3, "--thresholds", "safety=0.5,style=0.6", "--grid", 2)
    estimate = win_rates(data)
    arguments = (estimate.win_rate, estimate.reference, data.objectives, "quality")
    expected = solve_labels(*arguments, thresholds, 0.3, estimator="snis")
    assert min(expected.multiplier.values()) > 0.1
    assert {name: report["chosen"]["multiplier"][name] for name in thresholds} == pytest.approx(expected.multiplier)
    assert report["chosen"]["value"] == pytest.approx(expected.satisfaction)

    # On the pair scale the same policy is asked for by the values reported on it.
    scale = report["chosen"]["pair_satisfaction"]
    on_pairs = solve_labels(
        *arguments,
        {name: scale[name] for name in thresholds},
        0.3,
        estimator="pair",
        **pair_arrays(data),
    )
    assert on_pairs.multiplier == pytest.approx(expected.multiplier, abs=1e-6)
    assert scale == pytest.approx(on_pairs.satisfaction, abs=1e-8)


def test_example_weights_count(labels, tmp_path):
    weighted = [json.loads(line) | {"weight": 1 + index} for index, line in enumerate(labels.read_text().splitlines())]
    path = tmp_path / "weighted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in weighted))
    data = load_preferences(path)
    estimate = win_rates(data)
    report = run(tmp_path, path, "--tau", 0.3, "--thresholds", "safety=0.5", "--grid", 1)
    exact = tabular.solve(
        tabular.TabularProblem(
            win_rate=estimate.win_rate,
            reference=estimate.reference,
            prompt_weight=np.arange(1, 13),
            tau=0.3,
            thresholds={data.objectives.index("safety"): 0.5},
        )
    )
    np.testing.assert_allclose(in_order(report, report["chosen"]["multiplier"]), exact.multiplier, atol=1e-6)
    on_pairs = solve_labels(
        estimate.win_rate,
        estimate.reference,
        data.objectives,
        "quality",
        {},
        0.3,
        estimator="pair",
        **pair_arrays(data),
        weight=[1.0 + x for x in pair_arrays(data)["prompt"]],
    )
    assert report["without_thresholds"]["pair_satisfaction"] == pytest.approx(on_pairs.satisfaction, abs=1e-8)


def test_notes_say_what_the_labels_and_the_scale_are(labels, capsys):
    assert cli.main(["pareto", str(labels), "--grid", "2"]) == 0
    printed = capsys.readouterr().out
    assert "note: thresholds here are win rates, as for `mopo train --estimator snis`" in printed
    assert "pair scale" in printed


def test_one_objective_has_a_solution_and_no_thresholds(tmp_path):
    report = run(tmp_path, write(tmp_path / "one.json", win_rate=rates(1).tolist()))
    assert len(report["front"]) == 1
    assert report["front"][0]["nondominated"]
    assert report["front"][0]["value"] == report["without_thresholds"]["value"]


# The grid


def test_the_default_grid_runs_from_the_free_value_to_just_below_the_best(two, tmp_path):
    report = run(tmp_path, two)
    bounds = [row["threshold"]["safety"] for row in report["front"]]
    free, best = report["without_thresholds"]["value"]["safety"], report["best_attainable"]["safety"]
    np.testing.assert_allclose(bounds, np.linspace(free, free + 0.98 * (best - free), 21))
    assert all(row["feasible"] for row in report["front"])
    assert report["front"][0]["multiplier"]["safety"] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose([row["threshold"]["safety"] for row in report["sweeps"]["safety"]], bounds, atol=1e-3)


def test_named_objectives_have_their_range_and_the_others_what_is_chosen(tmp_path):
    def grid(*options: str) -> list[dict[str, float]]:
        report = run(tmp_path, EXAMPLE, *options)
        return [row["threshold"] for row in report["front"]]

    assert grid("--grid", "harmless=0.4:0.5:2", "--thresholds", "concise=0.5") == [
        {"harmless": 0.4, "concise": 0.5},
        {"harmless": 0.5, "concise": 0.5},
    ]
    assert grid("--grid", "harmless=0.4:0.5:2") == [{"harmless": 0.4}, {"harmless": 0.5}]
    mixed = grid("--grid", "harmless=0.4:0.5:2,3")
    assert len(mixed) == 6
    assert {row["harmless"] for row in mixed} == {0.4, 0.5}
    assert len({row["concise"] for row in mixed}) == 3


def test_the_spans_of_several_objectives_reach_down_to_what_the_others_cost_them(tmp_path):
    report = run(tmp_path, EXAMPLE, "--primary", "concise", "--grid", "2")
    low = min(row["threshold"]["helpful"] for row in report["front"])
    assert low < report["without_thresholds"]["value"]["helpful"] - 0.05
    harmless = max(row["threshold"]["harmless"] for row in report["front"])
    asked = next(row for row in report["front"] if row["threshold"] == {"helpful": low, "harmless": harmless})
    assert asked["multiplier"]["helpful"] == pytest.approx(0, abs=1e-6)
    assert asked["value"]["helpful"] == pytest.approx(low, abs=1e-6)


def test_sweeps_move_one_threshold_and_hold_the_others_as_chosen(tmp_path):
    report = run(tmp_path, EXAMPLE, "--thresholds", "harmless=0.52,concise=0.55", "--grid", 1)
    for name, other, bound in (("harmless", "concise", 0.55), ("concise", "harmless", 0.52)):
        sweep = report["sweeps"][name]
        assert len(sweep) == 21
        assert {row["threshold"][other] for row in sweep} == {bound}
        assert sweep[0]["multiplier"][name] == pytest.approx(0, abs=1e-6)
        ends = sweep[0]["threshold"][name], sweep[-1]["threshold"][name]
        assert ends[0] < report["chosen"]["threshold"][name] < ends[1]
        assert solve_example({other: bound, name: ends[1]}).feasible
        assert not solve_example({other: bound, name: ends[1] + 0.03 * (ends[1] - ends[0])}).feasible
        for row in sweep[::5]:
            assert row["kl"] == pytest.approx(solve_example(row["threshold"]).kl, abs=1e-6)


def test_many_objectives_are_moved_one_at_a_time_unless_combined(tmp_path):
    path = write(tmp_path / "five.json", win_rate=rates(5).tolist())
    report = run(tmp_path, path)
    assert len(report["front"]) == 4 * 21
    assert all(len(row["threshold"]) == 1 for row in report["front"])
    assert len(run(tmp_path, path, "--grid", 2)["front"]) == 16


def test_a_flat_objective_is_left_out_of_the_grid(tmp_path, capsys):
    win_rate = rates(3)
    win_rate[1] = 0.5
    report = run(tmp_path, write(tmp_path / "flat.json", win_rate=win_rate.tolist()))
    assert {tuple(row["threshold"]) for row in report["front"]} == {("objective_2",)}
    assert "no policy does better on objective_1 than the one without thresholds" in capsys.readouterr().out


def test_the_table_lists_the_front_and_the_chosen_solution(two, tmp_path, capsys):
    report = run(tmp_path, two, "--thresholds", "safety=0.5", "--grid", "safety=0.4:0.99:2")
    printed = capsys.readouterr().out
    assert "Front: 2 settings, 1 cannot be met" in printed
    row = report["front"][0]
    figures = [0.4, row["multiplier"]["safety"], *row["value"].values(), row["kl"], row["primal"]]
    assert " ".join([f"{value:.3f}" for value in figures] + ["*"]) in " ".join(printed.split())
    assert f"0.500 {report['chosen']['multiplier']['safety']:.3f} 0.500" in " ".join(printed.split())


def test_a_long_front_is_shortened_to_its_different_nondominated_points(tmp_path, capsys):
    report = run(tmp_path, EXAMPLE)
    printed = capsys.readouterr().out
    assert len(report["front"]) == 225
    assert 20 <= sum(line.rstrip().endswith("*") for line in printed.splitlines()) <= 40


# Thresholds that cannot be met


def solve_example(thresholds: dict[str, float]) -> tabular.TabularSolution:
    content = json.loads(EXAMPLE.read_text())
    named = {content["objectives"].index(name): bound for name, bound in thresholds.items()}
    win_rate = np.array(content["win_rate"])
    return tabular.solve(
        tabular.TabularProblem(
            win_rate=win_rate, reference=np.full(win_rate.shape[1:], 1 / win_rate.shape[2]), tau=0.05, thresholds=named
        )
    )


def test_thresholds_in_conflict_are_named_with_values_that_can_be_had(capsys):
    wanted = {"harmless": 0.73, "concise": 0.66}
    assert cli.main(["pareto", str(EXAMPLE), "--thresholds", "harmless=0.73,concise=0.66"]) == 2
    line = error_line(capsys)
    assert "thresholds: harmless >= 0.73 and concise >= 0.66 cannot be met together: " in line
    found = re.findall(r"(\w+) reaches at most ([\d.]+) with the other met, ([\d.]+) alone", line)
    assert [name for name, _, _ in found] == list(wanted)
    for name, held, alone in found:
        assert solve_example(wanted | {name: float(held)}).feasible
        assert not solve_example(wanted | {name: float(held) + 2e-3}).feasible
        assert solve_example({name: float(alone)}).feasible
        assert not solve_example({name: float(alone) + 1e-3}).feasible
    lowered = float(re.findall(r"once lowered by ([\d.]+)", line)[0])
    assert solve_example({name: bound - lowered for name, bound in wanted.items()}).feasible
    assert not solve_example({name: bound - lowered + 1e-3 for name, bound in wanted.items()}).feasible


def test_a_threshold_that_can_be_met_beside_the_others_is_not_blamed(tmp_path, capsys):
    # Between a and b every response trades one for one; c can be had with either.
    path = write(
        tmp_path / "p.json",
        objectives=["first", "a", "b", "c"],
        win_rate=[[[0.5, 0.5, 0.5, 0.5]], [[0.9, 0.1, 0.9, 0.1]], [[0.1, 0.9, 0.1, 0.9]], [[0.9, 0.9, 0.1, 0.1]]],
    )
    assert cli.main(["pareto", str(path), "--thresholds", "a=0.6,b=0.6,c=0.8"]) == 2
    line = error_line(capsys)
    assert (
        "a >= 0.6 and b >= 0.6 cannot be met together: a reaches at most 0.400 with the other met, 0.900 alone" in line
    )
    assert "c" not in re.findall(r"\w+", line.replace("cannot", ""))
    assert "lowered by 0.100" in line


def test_thresholds_of_which_any_two_clash_are_all_named_with_what_each_reaches_alone(tmp_path, capsys):
    win_rate = np.concatenate([np.full((1, 1, 3), 0.5), np.eye(3)[:, None] * 0.8 + 0.1])
    path = write(tmp_path / "p.json", objectives=["first", "a", "b", "c"], win_rate=win_rate.tolist())
    assert cli.main(["pareto", str(path), "--thresholds", "a=0.8,b=0.7,c=0.6"]) == 2
    line = error_line(capsys)
    assert "a >= 0.8 and b >= 0.7 and c >= 0.6 cannot be met together" in line
    assert "a reaches at most 0.900 alone; b reaches at most 0.900 alone; c reaches at most 0.900 alone" in line
    assert f"lowered by {(2.1 - 1.1) / 3 + 5e-4:.3f}" in line


def test_thresholds_that_none_of_the_policies_meets_are_all_named(capsys):
    assert cli.main(["pareto", str(EXAMPLE), "--thresholds", "harmless=0.8", "--thresholds", "concise=0.75"]) == 2
    line = error_line(capsys)
    assert "harmless >= 0.8 cannot be met: no policy attains more than 0.740" in line
    assert "concise >= 0.75 cannot be met: no policy attains more than 0.693" in line


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument"),
        (["absent.json"], "absent.json"),
        (["absent.npz"], "absent.npz"),
        (["absent.jsonl"], "absent.jsonl: no such file or folder"),
        (
            ["{two}", "--thresholds", "nothing=0.5"],
            "--thresholds: expected an objective of quality, safety; got 'nothing'",
        ),
        (
            ["{two}", "--thresholds", "quality=0.5"],
            "--thresholds: expected none for the primary objective 'quality', which is maximised; got 0.5",
        ),
        (["{two}", "--thresholds", "safety=1.5"], "--thresholds: expected win rates in [0, 1]; got 1.5 for 'safety'"),
        (["{two}", "--thresholds", "safety=nan"], "--thresholds['safety']: expected a finite number; got 'nan'"),
        (
            ["{two}", "--thresholds", "safety"],
            "--thresholds: expected a mapping of objective to number, or 'name=0.45,",
        ),
        (["{two}", "--thresholds", "safety=high"], "--thresholds: expected a mapping of objective to number"),
        (["{two}", "--thresholds", "safety=high"], "got 'high' for 'safety'"),
        (["{two}", "--thresholds", "{{"], "or 'name=0.45,other=0.5'; got '{{'"),
        (
            ["{two}", "--thresholds", "safety=0.4,safety=0.5"],
            "--thresholds: expected every objective once; got 'safety' twice",
        ),
        (
            ["{two}", "--thresholds", "safety=0.4", "--thresholds", "safety=0.5"],
            "--thresholds: expected every objective once; got 'safety' twice",
        ),
        (["{two}", "--primary", "nothing"], "primary: expected an objective of quality, safety; got 'nothing'"),
        (["{labels}", "--primary", "nothing"], "--primary: expected an objective of quality, safety, style"),
        (["{two}", "--tau", "0"], "tau: expected a finite number > 0; got 0.0"),
        (["{two}", "--tau", "much"], "--tau"),
        (["{two}", "--robustness", "-1"], "robustness: expected a finite radius >= 0 in nats; got -1.0"),
        (["{two}", "--grid", "0"], "--grid: expected at least 1 point; got 0"),
        (["{two}", "--grid", "safety=0.2:0.5:0"], "--grid: expected at least 1 point; got 0"),
        (["{two}", "--grid", "many"], "--grid: expected a number of points, or name=START:STOP:POINTS; got 'many'"),
        (["{two}", "--grid", "safety=0.5"], "got 'safety=0.5'"),
        (["{two}", "--grid", "safety=0.5:0.2:4"], "--grid: expected 0 <= START <= STOP <= 1"),
        (
            ["{two}", "--grid", "quality=0.2:0.5:4"],
            "--grid: expected none for the primary objective 'quality', which is maximised; got 0.2:0.5:4",
        ),
        (["{two}", "--grid", "nothing=0.2:0.5:4"], "--grid: expected an objective of quality, safety; got 'nothing'"),
        (["{two}", "--grid", "99999"], "grid: expected at most 20000 points in all; got 99999"),
        (["{two}", "--split", "train"], "--split: expected with preferences alone; got the finite problem"),
        (["{two}", "--output", "{dir}"], "{dir}"),
        (["{two}", "--columns", "prompt=q"], "--columns: expected with preferences alone"),
        (["{labels}", "--format", "csv"], "format: expected auto, canonical"),
        (["{labels}", "--columns", "prompt=q"], ":1: q: expected a string; got None"),
        (["{labels}", "--split", "test"], "no split 'test', there is: one without a name"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(two, labels, tmp_path, capsys, arguments, words):
    places = {"two": two, "labels": labels, "dir": tmp_path}
    assert cli.main(["pareto", *(item.format(**places) for item in arguments)]) == 2
    assert words.format(**places) in error_line(capsys)


GOOD: dict[str, Any] = {"win_rate": [[[0.2, 0.8]], [[0.7, 0.3]]]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ('{"win_rate": [}', ":1: not valid JSON: Expecting value at column 15"),
        (b'{"primary": "\xff"}', "not valid UTF-8"),
        ("[1, 2]", "expected an object; got int"),
        ({}, "expected either win_rate or preference; got neither"),
        (GOOD | {"preference": []}, "expected either win_rate or preference; got both"),
        (GOOD | {"objetives": ["a", "b"]}, "objetives: not a field of a finite problem, which has win_rate"),
        ({"win_rate": [[0.2, 0.8]]}, "win_rate: expected nested lists of numbers (K, X, Y); got shape (1, 2)"),
        ({"win_rate": []}, "win_rate: expected nested lists of numbers (K, X, Y); got shape (0,)"),
        (
            {"win_rate": [[[0.2, 0.8]], [[0.7]]]},
            "null where a prompt has fewer responses; got lists of unequal lengths",
        ),
        ({"win_rate": [[["0.2", 0.8]]]}, "got '0.2'"),
        ({"win_rate": [[[True, False]]]}, "got True"),
        ({"win_rate": [[[None, {}]]]}, "got {}"),
        ({"win_rate": [[[0.2, 1.8]]]}, "win_rate: expected a number in [0, 1]"),
        ({"win_rate": [[[0.2, 0.8], [None, None]]]}, "win_rate: expected a number for every prompt; got none for 1"),
        ({"preference": [[[[0.5, 0.9], [0.9, 0.5]]]]}, "to sum to 1; got 1.8"),
        ({"preference": [[[[0.5, 0.9]]]]}, "preference: expected shape"),
        (GOOD | {"behaviour": [[0.5, 0.5]]}, "behaviour: expected with preference only"),
        (GOOD | {"reference": [[0.5, 0.6]]}, "reference: expected probabilities that sum to 1"),
        (GOOD | {"reference": [0.5, 0.5]}, "reference: expected nested lists of numbers (X, Y); got shape (2,)"),
        (GOOD | {"prompt_weight": [1, 1]}, "prompt_weight: expected shape (1); got (2,)"),
        (GOOD | {"objectives": ["a"]}, "objectives: expected 2 different names, one for each; got a"),
        (GOOD | {"objectives": ["a", "a"]}, "objectives: expected 2 different names"),
        (GOOD | {"objectives": "ab"}, "objectives: expected a list of names; got 'ab'"),
        (GOOD | {"primary": 1}, "primary: expected an objective of objective_0, objective_1; got 1"),
        (GOOD | {"tau": "small"}, "tau: expected a number; got 'small'"),
        (GOOD | {"thresholds": [0.5]}, "thresholds: expected an object of objective to number; got [0.5]"),
        (GOOD | {"thresholds": {"objective_1": None}}, "thresholds.objective_1: expected a number; got None"),
        (
            GOOD | {"thresholds": {"objective_0": 0.5}},
            "thresholds: expected none for the primary objective",
        ),
    ],
)
def test_bad_problems_exit_2_with_one_line_that_names_file_and_field(tmp_path, capsys, content, words):
    path = tmp_path / "bad.json"
    raw = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    out = tmp_path / "out.json"
    assert cli.main(["pareto", str(path), "--output", str(out)]) == 2
    line = error_line(capsys)
    assert line.startswith(f"mopo: error: {path}:")
    assert words in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no usable row"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "p", "responses": [], "pairs": []}\n', "responses"),
    ],
)
def test_bad_preferences_exit_2_with_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert cli.main(["pareto", str(path)]) == 2
    line = error_line(capsys)
    assert str(path) in line
    assert words in line


@pytest.mark.parametrize("content", [b"", b"PK nothing", "objects"])
def test_a_broken_archive_exits_2_with_one_line(tmp_path, capsys, content):
    path = tmp_path / "bad.npz"
    if content == "objects":
        np.savez(path, win_rate=np.array([None, {}]))
    else:
        path.write_bytes(content)
    assert cli.main(["pareto", str(path)]) == 2
    assert "not a readable .npz file of plain arrays" in error_line(capsys)


def test_a_picture_needs_two_objectives(tmp_path, capsys):
    path = write(tmp_path / "one.json", win_rate=rates(1).tolist())
    assert cli.main(["pareto", str(path), "--plot", str(tmp_path / "p.png")]) == 2
    assert "--plot: expected two objectives at least to draw a front; got 'obj" in error_line(capsys)


def test_an_interruption_exits_130_and_a_failed_solution_1(two, tmp_path, monkeypatch, capsys):
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tabular, "pareto_front", stop)
    assert cli.main(["pareto", str(two), "--output", str(tmp_path / "o.json")]) == 130
    assert capsys.readouterr().err == "mopo: interrupted\n"
    assert not (tmp_path / "o.json").exists()

    def fail(*arguments: Any, **options: Any) -> None:
        raise ArithmeticError("the robust problem was not solved: its residual is 1e-3")

    monkeypatch.setattr(tabular, "pareto_front", fail)
    assert cli.main(["pareto", str(two)]) == 1
    assert error_line(capsys) == "mopo: error: the robust problem was not solved: its residual is 1e-3"


def test_missing_packages_exit_1_naming_their_extra(two, tmp_path, monkeypatch, capsys):
    real_import, real_find = builtins.__import__, importlib.util.find_spec

    def hide(name, *arguments, **options):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real_import(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", hide)
        assert cli.main(["pareto", str(two), "--plot", str(tmp_path / "p.png")]) == 1
        assert "pip install 'mopo-kernels[plot]'" in error_line(capsys)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "moocore" else real_find(name, *rest)
    )
    assert cli.main(["pareto", str(two)]) == 1
    assert "pip install 'mopo-kernels[pareto]'" in error_line(capsys)


def test_the_help_of_mopo_imports_no_solver():
    program = (
        "import sys\nfrom mopo_kernels import cli\ncode = cli.main(['--help'])\n"
        "print([m for m in ('scipy', 'moocore', 'matplotlib', 'datasets', 'transformers') if m in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "\n  pareto " in done.stdout
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout + done.stderr


# The picture


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, beside the files written from them."""
    drawn = []
    save = plots.save_figure

    def keep(figure, path):
        drawn.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return drawn


def lines_of(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axes.lines}


def test_the_picture_shows_front_thresholds_and_what_no_policy_attains(figures, tmp_path):
    png = tmp_path / "new" / "front.png"
    report = run(
        tmp_path,
        EXAMPLE,
        "--thresholds",
        "harmless=0.52,concise=0.55",
        "--grid",
        "harmless=0.5:0.55:3",
        "--plot",
        png,
    )
    (figure,) = figures
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 20_000
    tight = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert tight.x0 >= figure.bbox.x0 - 1
    assert tight.x1 <= figure.bbox.x1 + 1
    left, right, below, below_right = figure.axes
    assert left.get_title() == "harmless (held)"
    assert left.get_ylabel() == "helpful (maximised):\nwin rate - 0.05 KL"
    assert left.get_xlabel() == "harmless: win rate (0 to 1)"
    assert below.get_ylabel() == "multiplier (no unit)"
    assert below_right.get_xlabel() == "concise: threshold"
    for axes, name in ((left, "harmless"), (right, "concise")):
        drawn, sweep = lines_of(axes), report["sweeps"][name]
        expected = [(row["value"][name], row["primal"]) for row in sweep]
        np.testing.assert_allclose(drawn["front as this threshold alone moves"], expected)
        np.testing.assert_allclose(drawn["chosen threshold"][:, 0], report["chosen"]["threshold"][name])
        star = [report["chosen"]["value"][name], report["chosen"]["primal"]]
        np.testing.assert_allclose(drawn["chosen solution"], [star])
        np.testing.assert_allclose(
            drawn["reference policy"], [[report["reference"][name], report["reference"]["helpful"]]]
        )
        assert len(drawn["front on the grid"]) == sum(row["nondominated"] for row in report["front"])
        (region,) = axes.collections
        inside = region.get_paths()[0].contains_points
        assert not inside([*expected, star]).any()
        assert inside([(star[0], report["best_attainable"]["helpful"] + 1e-3)]).all()
        (low, high), (floor, top) = axes.get_xlim(), axes.get_ylim()
        assert all(low < x < high and floor < y < top for x, y in expected)
        assert inside([(report["best_attainable"][name] + 2e-3, y) for y in (floor + 1e-3, star[1])]).all()
    curve = [(row["threshold"]["harmless"], row["multiplier"]["harmless"]) for row in report["sweeps"]["harmless"]]
    assert any(len(line) == len(curve) and np.allclose(line, curve) for line in lines_of(below).values())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels))
    assert "no policy attains this, at any KL" in labels


def test_two_objectives_are_one_curve_and_six_fill_two_rows(figures, two, tmp_path):
    run(tmp_path, two, "--plot", tmp_path / "a.png")
    upper, lower = figures[0].axes
    assert len(lines_of(upper)["exact front"]) == 21
    assert "front on the grid" not in lines_of(upper)
    assert "chosen threshold" not in lines_of(lower)
    assert upper.get_title() == "safety"
    path = write(tmp_path / "six.json", win_rate=rates(6).tolist())
    run(tmp_path, path, "--thresholds", "objective_3=0.5", "--plot", tmp_path / "b.png")
    titles = [axes.get_title() for axes in figures[1].axes if axes.axison and axes.get_title()]
    assert titles == [f"objective_{k} ({'held' if k == 3 else 'watched'})" for k in range(1, 6)]
    assert sum(axes.axison for axes in figures[1].axes) == 10


def test_robust_thresholds_hold_in_the_worst_case_and_are_drawn_on_its_scale(
    figures, two, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(explore, "SWEEP_POINTS", 3)
    report = run(
        tmp_path,
        two,
        "--thresholds",
        "safety=0.4",
        "--robustness",
        0.01,
        "--grid",
        2,
        "--plot",
        tmp_path / "r.png",
    )
    assert report["chosen"]["constraint_value"]["safety"] == pytest.approx(0.4, abs=1e-8)
    assert report["chosen"]["value"]["safety"] > 0.41
    upper, lower = figures[0].axes
    assert "chosen threshold" not in lines_of(upper)
    np.testing.assert_allclose(lines_of(lower)["chosen threshold"][:, 0], 0.4)
    assert lower.get_xlabel() == "safety: threshold (worst case)"
    capsys.readouterr()
    assert cli.main(["pareto", str(two), "--thresholds", "safety=0.9", "--robustness", "0.01"]) == 2
    best = explore.round_down(report["best_attainable"]["safety"])
    assert f"no policy attains more than {best}" in error_line(capsys)


def test_a_front_of_one_objective_is_refused(tmp_path):
    problem = tabular.TabularProblem(win_rate=rates(1), reference=np.full((3, 4), 0.25), tau=0.1)
    front = tabular.pareto_front(problem, np.full((1, 1), np.nan))
    with pytest.raises(ValueError, match="at least two"):
        plots.plot_front(
            front,
            tmp_path / "p.png",
            objectives=["a"],
            primary="a",
            tau=0.1,
            sweeps={},
            boundary={},
            reference=[0.5],
            best=[0.9],
        )


def test_the_example_and_the_defaults_of_the_command_are_those_of_training():
    from mopo_kernels import MOPOConfig

    assert MOPOConfig.tau == pareto_file.DEFAULT_TAU
    assert json.loads(EXAMPLE.read_text())["objectives"] == ["helpful", "harmless", "concise"]
