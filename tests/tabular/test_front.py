"""Fronts: against every deterministic policy, linear programmes over all policies, separate solutions, and by hand."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from counting import calls_of
from scipy.optimize import linprog

from mopo_kernels.tabular import (
    ParetoFront,
    TabularProblem,
    hypervolume,
    linear_front,
    nondominated,
    pareto_front,
    solve,
)
from mopo_kernels.tabular.dual import Dual


def random_problem(
    seed: int,
    objectives: int = 2,
    prompts: int = 4,
    responses: int = 4,
    tau: float = 0.1,
    levels: int | None = None,
    thresholds: dict[int, float] | None = None,
    primary: int = 0,
) -> TabularProblem:
    """Random win rates (of a few ``levels`` if given), prompts of unequal weights and numbers of responses."""
    rng = np.random.default_rng(seed)
    rate = rng.random((objectives, prompts, responses))
    if levels is not None:
        rate = np.round(rate * levels) / levels
    reference = rng.random((prompts, responses)) + 0.05
    reference[:, 2:][rng.random((prompts, responses - 2)) < 0.3] = 0
    return TabularProblem(
        win_rate=rate,
        reference=reference / reference.sum(1, keepdims=True),
        tau=tau,
        thresholds=thresholds or {},
        prompt_weight=rng.random(prompts) + 0.1,
        primary=primary,
    )


def values(problem: TabularProblem, policy: np.ndarray) -> np.ndarray:
    return np.einsum("kxy,xy,x->k", problem.win_rate, policy, problem.prompt_weight)


def deterministic_values(problem: TabularProblem) -> np.ndarray:
    """(D, K) win rates of every deterministic policy: their convex hull is what any policy can attain."""
    choices = itertools.product(*(np.flatnonzero(row) for row in problem.support))
    prompt = np.arange(len(problem.prompt_weight))
    return np.array([problem.win_rate[:, prompt, list(choice)] @ problem.prompt_weight for choice in choices])


def shortfall(point: np.ndarray, others: np.ndarray) -> float:
    """How far, in its worst objective, the best mixture of ``others`` (F, K) is below ``point``: <= 0 if covered."""
    count, objectives = others.shape
    found = linprog(
        np.r_[np.zeros(count), 1.0],
        A_ub=np.c_[-others.T, -np.ones(objectives)],
        b_ub=-point,
        A_eq=np.r_[np.ones(count), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
    )
    return float(found.fun)


def best_primary(problem: TabularProblem, bounds: dict[int, float]) -> float | None:
    """The largest P_primary of any policy that meets ``bounds``: one linear programme over all cells."""
    prompts, responses = problem.reference.shape
    rows = (problem.win_rate * problem.prompt_weight[:, None]).reshape(len(problem.win_rate), -1)
    equality = np.zeros((prompts, prompts * responses))
    equality[np.repeat(np.arange(prompts), responses), np.arange(prompts * responses)] = 1
    found = linprog(
        -rows[problem.primary],
        A_ub=-rows[list(bounds)] if bounds else None,
        b_ub=[-bound for bound in bounds.values()] if bounds else None,
        A_eq=equality,
        b_eq=np.ones(prompts),
        bounds=[(0, float(available)) for available in problem.support.ravel()],
    )
    return -float(found.fun) if found.status == 0 else None


CASES = [
    pytest.param(objectives, levels, id=f"{objectives}_objectives_{levels or 'no'}_levels")
    for objectives in (1, 2, 3, 4)
    for levels in (None, 3, 10)
]


@pytest.mark.parametrize(("objectives", "levels"), CASES)
def test_vertices_are_all_extreme_points_of_what_deterministic_policies_attain(
    objectives: int, levels: int | None
) -> None:
    """They cover every deterministic policy, are deterministic themselves, and none is covered by the others."""
    several = 0
    for seed in range(4):
        problem = random_problem(seed, objectives, prompts=3, responses=4, levels=levels, primary=seed % objectives)
        front = linear_front(problem)
        everything = deterministic_values(problem)
        assert front.complete
        assert front.vertex.all()
        assert np.isnan(front.threshold).all()
        assert (np.diff(front.value[:, problem.primary]) <= 0).all()
        for value in front.value:
            assert np.abs(everything - value).max(1).min() < 1e-12
        assert max(shortfall(point, front.value) for point in everything) < 1e-9
        several += len(front.value) > 1
        for index in range(len(front.value) if len(front.value) > 1 else 0):
            assert shortfall(front.value[index], np.delete(front.value, index, 0)) > 1e-6
    assert objectives == 1 or several >= 3


@pytest.mark.parametrize(("objectives", "prompts", "responses"), [(2, 30, 8), (3, 6, 5), (6, 6, 5)])
def test_weights_support_and_policies_attain_every_point(objectives: int, prompts: int, responses: int) -> None:
    problem = random_problem(1, objectives, prompts, responses)
    front = linear_front(problem, {1: [0.4, 0.55], objectives - 1: [0.5, 0.6]})
    assert front.vertex.any()
    assert not front.vertex.all()
    assert front.complete == (objectives <= 4)
    assert front.weight.min() >= 0
    assert np.abs(front.weight.sum(1) - 1).max() < 1e-12
    score = np.einsum("fk,kxy->fxy", front.weight, problem.win_rate)
    most = np.where(problem.support, score, -np.inf).max(2) @ problem.prompt_weight
    assert np.abs((front.weight * front.value).sum(1) - most).max() < 1e-9
    assert nondominated(np.round(front.value[front.vertex], 9)).all()
    for index in range(len(front.value)):
        policy = front.policy(index)
        assert np.abs(policy.sum(1) - 1).max() < 1e-12
        assert policy.min() >= 0
        assert (policy[~problem.support] == 0).all()
        assert np.abs(values(problem, policy) - front.value[index]).max() < 1e-12
        mixed = ((policy > 1e-9).sum(1) > 1).sum()
        assert mixed == 0 if front.vertex[index] else mixed < objectives
    assert np.array_equal(front.policy(-1), front.policy(len(front.value) - 1))
    with pytest.raises(IndexError):
        front.policy(len(front.value))


def test_faces_shared_by_prompts_are_one_face_and_thresholds_reach_its_inside() -> None:
    """Two prompts trade one objective for the other at the same rate: a weighted sum only ever has the corners."""
    problem = TabularProblem(
        win_rate=[[[0.9, 0.3], [0.8, 0.2]], [[0.1, 0.7], [0.2, 0.8]]],
        reference=np.full((2, 2), 0.5),
        tau=0.1,
        thresholds={},
    )
    front = linear_front(problem, {1: [0.0, 0.3, 0.45, 0.75, 0.76]})
    assert front.value[front.vertex] == pytest.approx(np.array([[0.85, 0.15], [0.25, 0.75]]), abs=1e-15)
    reached = np.array([[0.85, 0.15], [0.7, 0.3], [0.55, 0.45], [0.25, 0.75]])
    assert front.value[~front.vertex] == pytest.approx(reached, abs=1e-9)
    assert front.threshold[~front.vertex, 1].tolist() == [0.0, 0.3, 0.45, 0.75]
    assert front.unattainable[:, 1].tolist() == [0.76]
    assert front.weight[3] == pytest.approx([0.5, 0.5])


def test_agreeing_flat_and_identical_objectives_have_a_single_point() -> None:
    rate = np.random.default_rng(0).random((1, 5, 4))
    for stacked in (
        np.repeat(rate, 2, 0),
        np.repeat(rate, 3, 0),
        np.concatenate([rate, np.full_like(rate, 0.5)]),
        np.concatenate([rate, np.full_like(rate, 0.5), rate / 2]),
    ):
        problem = TabularProblem(win_rate=stacked, reference=np.full((5, 4), 0.25), tau=0.1, thresholds={})
        front = linear_front(problem)
        assert front.complete
        assert len(front.value) == 1
        assert front.value[0, 0] == pytest.approx(rate[0].max(1).mean(), abs=1e-15)


def test_ties_within_rounding_are_ties_in_every_prompt() -> None:
    """Permutations of one triple tie in a plain sum, up to its rounding; the sum of the hexagons is a hexagon."""
    triples = np.array(list(itertools.permutations([0.1, 0.2, 0.3]))).T
    rng = np.random.default_rng(0)
    rate = np.stack([triples[:, rng.permutation(6)] for _ in range(20)], axis=1)
    front = linear_front(TabularProblem(win_rate=rate, reference=np.full((20, 6), 1 / 6), tau=0.1, thresholds={}))
    assert front.complete
    assert sorted(np.round(front.value, 12).tolist()) == sorted(np.round(triples.T, 12).tolist())


def test_unavailable_responses_are_not_taken_even_where_every_response_always_loses() -> None:
    for objectives in (2, 3):
        reference = [[0.0, 0.5, 0.5], [0.0, 0.2, 0.8]]
        problem = TabularProblem(win_rate=np.zeros((objectives, 2, 3)), reference=reference, tau=0.1, thresholds={})
        front = linear_front(problem, {1: [0.0]})
        assert front.value.tolist() == [[0.0] * objectives] * 2
        assert (front.policy(0)[:, 0] == 0).all()
        assert (front.policy(1)[:, 0] == 0).all()


def test_prompts_of_zero_weight_add_no_vertices() -> None:
    problem = random_problem(2, prompts=6)
    weight = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    options = {"tau": 0.1, "thresholds": {}}
    whole = TabularProblem(win_rate=problem.win_rate, reference=problem.reference, prompt_weight=weight, **options)
    keep = weight > 0
    part = TabularProblem(win_rate=problem.win_rate[:, keep], reference=problem.reference[keep], **options)
    assert linear_front(whole).value == pytest.approx(linear_front(part).value, abs=1e-15)
    assert len(linear_front(part).value) > 2


@pytest.mark.parametrize("objectives", [2, 3])
def test_grid_points_are_the_best_of_any_policy_and_dominated_by_none(objectives: int) -> None:
    unmet = 0
    for seed in range(3):
        problem = random_problem(seed, objectives, levels=(None, 2, 3)[seed], thresholds={objectives - 1: 0.35})
        grid = {1: [0.2, 0.5, 0.62, 0.9]}
        front = linear_front(problem, grid)
        points = np.flatnonzero(~front.vertex)
        assert len(points) + len(front.unattainable) == 4
        for index in points:
            bounds = {k: b for k, b in enumerate(front.threshold[index]) if not np.isnan(b)}
            assert set(bounds) == {1, objectives - 1}
            assert front.value[index, 0] == pytest.approx(best_primary(problem, bounds), abs=1e-7)
            assert all(front.value[index, k] >= bound - 1e-9 for k, bound in bounds.items())
            # No policy has more of one objective and no less of the others.
            for k in range(objectives):
                others = {j: front.value[index, j] - 1e-9 for j in range(objectives) if j != k}
                turned = TabularProblem(
                    win_rate=problem.win_rate,
                    reference=problem.reference,
                    tau=0.1,
                    thresholds={},
                    prompt_weight=problem.prompt_weight,
                    primary=k,
                )
                assert best_primary(turned, others) <= front.value[index, k] + 1e-5
        for row in front.unattainable:
            assert best_primary(problem, {k: b for k, b in enumerate(row) if not np.isnan(b)}) is None
            unmet += 1
    assert unmet >= 2


@pytest.mark.parametrize("tau", [1e-3, 0.1, 10.0])
def test_points_of_the_front_are_separate_solutions(tau: float) -> None:
    problem = random_problem(3, 3, 8, 5, tau, thresholds={1: 0.99, 2: 0.5})
    calls: list[tuple[int, int]] = []
    grid = {1: [0.3, 0.5, 0.6, 0.65, 0.9]}
    front = pareto_front(problem, grid, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 5) for done in range(1, 6)]
    assert front.threshold[:, 1].tolist() == grid[1]
    assert front.threshold[:, 2].tolist() == [0.5] * 5
    assert np.isnan(front.threshold[:, 0]).all()
    for index, bound in enumerate(grid[1]):
        alone = solve(problem.with_thresholds({1: bound, 2: 0.5}))
        assert front.feasible[index] == alone.feasible
        if alone.feasible:
            assert front.multiplier[index] == pytest.approx(alone.multiplier, abs=1e-6)
            assert front.value[index] == pytest.approx(alone.value, abs=1e-8)
            assert front.primal[index] == pytest.approx(alone.primal, abs=1e-8)
            assert front.kl[index] == pytest.approx(alone.kl, abs=1e-6)
            assert np.isnan(front.best_value[index])
        else:
            for part in (front.multiplier, front.value, front.kl, front.primal):
                assert np.isnan(part[index]).all()
            assert front.best_value[index] == pytest.approx(alone.best_value, abs=1e-10)
            assert not front.nondominated[index]
    assert front.feasible.any()
    assert not front.feasible.all()
    assert (front.multiplier[front.feasible, 1] > 0.01).any()


def test_grid_is_a_product_or_an_array_of_thresholds() -> None:
    problem = random_problem(3, 3, thresholds={1: 0.5})
    product = pareto_front(problem, {1: [0.3, 0.4], 2: [0.2, 0.45, 0.5]})
    rows = [[a, b] for a in (0.3, 0.4) for b in (0.2, 0.45, 0.5)]
    assert product.threshold[:, 1:].tolist() == rows
    array = pareto_front(problem, np.array([[np.nan, np.nan, np.nan], [np.nan, 0.3, np.nan], [np.nan, 0.4, 0.45]]))
    assert array.multiplier[0].tolist() == [1, 0, 0]
    assert array.value[2] == pytest.approx(product.value[4], abs=1e-9)
    assert array.multiplier[1, 2] == 0


@pytest.mark.parametrize("tau", [1e-3, 0.05])
def test_front_lies_between_the_linear_front_and_the_price_of_its_kl(tau: float) -> None:
    """The unregularised optimum at the same thresholds has more P_primary, and as a policy cannot beat the optimum."""
    problem = random_problem(5, 2, 20, 6, tau)
    grid = {1: np.linspace(0.4, 0.7, 7)}
    front, linear = pareto_front(problem, grid), linear_front(problem, grid)
    feasible = np.flatnonzero(front.feasible)
    points = np.flatnonzero(~linear.vertex)
    assert len(points) == len(feasible) >= 5
    for index, point in zip(feasible, points, strict=True):
        assert front.value[index, 0] <= linear.value[point, 0] + 1e-9
        policy = linear.policy(int(point))
        ratio = np.divide(policy, problem.reference, out=np.ones_like(policy), where=policy > 0)
        kl = problem.prompt_weight @ (policy * np.log(ratio)).sum(1)
        assert front.primal[index] >= linear.value[point, 0] - tau * kl - 1e-9
    if tau == 1e-3:
        assert np.abs(front.value[feasible, 0] - linear.value[points, 0]).max() < 3e-3
    # A point of the linear front moved outwards is beyond every policy: the first bound is not vacuous.
    assert shortfall(linear.value[points[2]] + 1e-3, linear.value[linear.vertex]) > 1e-4


def staircase(points: np.ndarray, origin: np.ndarray) -> float:
    """The area of two objectives, strip by strip."""
    area, height = 0.0, origin[1]
    for across, up in sorted(points.tolist(), reverse=True):
        if across > origin[0] and up > height:
            area += (across - origin[0]) * (up - height)
            height = up
    return area


def test_hypervolume_is_of_the_points_above_the_worst_attainable_or_the_given_one() -> None:
    problem = random_problem(4, 2, 6, 5)
    grid = {1: np.linspace(0.3, 0.7, 9)}
    front = pareto_front(problem, grid)
    points = np.stack([front.primal, front.value[:, 1]], 1)[front.feasible]
    worst = np.where(problem.support, problem.win_rate, np.inf).min(2) @ problem.prompt_weight
    assert front.reference_point == pytest.approx(worst, abs=1e-15)
    assert front.hypervolume == pytest.approx(staircase(points, worst), abs=1e-12)
    origin = np.array([0.4, 0.45])
    moved = pareto_front(problem, grid, reference_point=origin)
    assert moved.hypervolume == pytest.approx(staircase(points, origin), abs=1e-12)
    assert 0 < moved.hypervolume < front.hypervolume
    more = pareto_front(problem, {1: np.linspace(0.3, 0.7, 33)})
    assert front.hypervolume < more.hypervolume < hypervolume([[1.0, 1.0]], worst)
    assert pareto_front(problem, {1: [0.99]}).hypervolume == 0


def test_nondominated_points_of_a_front_are_marked_and_copies_spare_each_other() -> None:
    """Thresholds that do not bind give one optimum over and over."""
    problem = random_problem(0, 2, 6, 5)
    free = solve(problem).value[1]
    front = pareto_front(problem, {1: [0.0, free / 2, free - 1e-3, free + 0.05, free + 0.1]})
    assert (front.multiplier[:3, 1] == 0).all()
    assert front.feasible.all()
    assert front.nondominated.all()
    # One optimum by way of either of two identical objectives, whose copies differ in rounding.
    base = random_problem(1, 2, 20, 5)
    twice = TabularProblem(
        win_rate=base.win_rate[[0, 1, 1]], reference=base.reference, tau=0.1, thresholds={}, prompt_weight=np.ones(20)
    )
    bounds = [0.5, 0.57, 0.6, 0.63]
    again = pareto_front(twice, {1: bounds, 2: bounds})
    assert 4 <= len(np.unique(again.primal)) > len(np.unique(np.round(again.primal, 9)))
    assert again.nondominated.all()
    three = random_problem(6, 3, 5, 4, tau=0.02)
    points = pareto_front(three, {1: np.linspace(0.2, 0.7, 12), 2: np.linspace(0.2, 0.7, 5)})
    table = np.concatenate([points.primal[:, None], points.value[:, 1:]], 1)[points.feasible]
    for marked, point in zip(points.nondominated[points.feasible], table, strict=True):
        beaten = ((table >= point - 1e-9).all(1) & (table > point + 1e-7).any(1)).any()
        assert marked != beaten
    assert points.nondominated.any()


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_nondominated_and_hypervolume_agree_with_their_definitions(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    points = np.round(rng.random((40, objectives)) * 6) / 6
    dominated = [((points >= point).all(1) & (points > point).any(1)).any() for point in points]
    assert nondominated(points).tolist() == (~np.array(dominated)).tolist()
    assert any(dominated)
    few = rng.random((6, objectives))
    few[0, 0] = 0.1  # below the reference point in one objective: it adds nothing
    origin = np.full(objectives, 0.15)
    above = few[(few > origin).all(1)]
    volume = 0.0
    for size in range(1, len(above) + 1):
        for chosen in itertools.combinations(above, size):
            volume += (-1) ** (size + 1) * float(np.prod(np.min(chosen, 0) - origin))
    assert hypervolume(few, origin) == pytest.approx(volume, abs=1e-12)
    assert volume > 0


def test_no_points_dominate_nothing_and_have_no_volume() -> None:
    assert nondominated(np.zeros((0, 3))).tolist() == []
    assert hypervolume(np.zeros((0, 2)), [0, 0]) == 0
    assert nondominated([[0.5, 0.5], [0.5, 0.5], [0.4, 0.5]]).tolist() == [True, True, False]


def test_a_point_of_a_front_takes_a_few_evaluations_of_the_dual(monkeypatch: pytest.MonkeyPatch) -> None:
    """132 of them for 21 points, as each starts where its neighbour ended; the vertices of two objectives take none."""
    problem = random_problem(0, 2, 100, 20, tau=0.01)
    evaluations = calls_of(monkeypatch, Dual, "evaluate")
    front = pareto_front(problem, {1: np.linspace(0.5, 0.95, 21)})
    assert 0 < len(evaluations) < 10 * 21
    del evaluations[:]
    linear = linear_front(problem)
    assert not evaluations
    assert front.feasible.sum() > 10
    assert len(linear.value) > 50


def test_three_objectives_beyond_the_limit_are_said_to_be_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(0, 3, 12, 6)
    whole = linear_front(problem)
    monkeypatch.setattr("mopo_kernels.tabular.front._HULL_VERTICES", 20)
    part = linear_front(problem)
    assert whole.complete
    assert not part.complete
    assert 20 < len(part.value) < len(whole.value)


def test_a_missing_moocore_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moocore", None)
    problem = random_problem(0)
    for call in (
        lambda: nondominated([[0.0, 1.0]]),
        lambda: hypervolume([[0.0, 1.0]], [0.0, 0.0]),
        lambda: pareto_front(problem, {1: [0.5]}),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'mopo-kernels\[pareto\]'"):
            call()
    assert linear_front(problem).complete


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({2: [0.5]}, r"grid: expected objectives 0..1; got one for 2"),
        ({1: []}, r"grid: expected a list of thresholds for objective 1; got \[\]"),
        ({1: 0.5}, "grid: expected a list of thresholds for objective 1; got 0.5"),
        ({0: [0.5]}, "thresholds: expected none for the primary objective 0"),
        ({1: [0.5, 1.5]}, r"thresholds: expected a number in \[0, 1\]; got 1.5 for objective 1"),
        (np.zeros((2, 3)), r"grid: expected shape \(any, 2\); got \(2, 3\)"),
        (np.zeros((0, 2)), r"grid: expected shape \(any, 2\); got \(0, 2\)"),
    ],
)
def test_grids_out_of_range_are_named(grid: object, message: str) -> None:
    problem = random_problem(0)
    for call in (pareto_front, linear_front):
        with pytest.raises(ValueError, match=message):
            call(problem, grid)


def test_points_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"points: expected shape \(any, K\), one objective a column; got \(2,\)"):
        nondominated([0.5, 0.5])
    with pytest.raises(ValueError, match="points: expected a finite number; got nan"):
        hypervolume([[0.5, np.nan]], [0, 0])
    with pytest.raises(ValueError, match=r"reference_point: expected 2 finite values; got \[0.0\]"):
        hypervolume([[0.5, 0.5]], [0.0])
    with pytest.raises(ValueError, match=r"reference_point: expected 2 finite values; got \[0.0, nan\]"):
        pareto_front(random_problem(0), {1: [0.5]}, reference_point=[0.0, np.nan])


def test_negative_control_a_wrong_front_is_caught() -> None:
    """A vertex left out, or moved inside by 1e-5, fails the test that the vertices cover every policy."""
    problem = random_problem(0, prompts=3)
    front, everything = linear_front(problem), deterministic_values(problem)
    assert max(shortfall(point, front.value) for point in everything) < 1e-9
    for wrong in (np.delete(front.value, 1, 0), front.value - 1e-5):
        assert max(shortfall(point, wrong) for point in everything) > 1e-6


def test_robust_fronts_are_below_plain_ones() -> None:
    plain = random_problem(1, 2, 4, 5)
    robust = TabularProblem(
        win_rate=plain.win_rate,
        reference=plain.reference,
        tau=plain.tau,
        thresholds={},
        prompt_weight=plain.prompt_weight,
        robustness=0.02,
    )
    grid = {1: [0.3, 0.4, 0.45]}
    fronts: list[ParetoFront] = [pareto_front(problem, grid) for problem in (plain, robust)]
    both = fronts[0].feasible & fronts[1].feasible
    assert both.any()
    assert (fronts[1].primal[both] <= fronts[0].primal[both] + 1e-9).all()
    assert (fronts[1].primal[both] < fronts[0].primal[both] - 1e-4).any()
