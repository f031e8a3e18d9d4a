"""The exact solver, against scipy's general optimisers, conditions checked afresh, and cases solved by hand."""

from __future__ import annotations

import numpy as np
import pytest
from counting import calls_of
from scipy.optimize import linprog, minimize, minimize_scalar

from mopo_kernels.tabular import TabularProblem, TabularSolution, capped_multipliers, robust_value, solve
from mopo_kernels.tabular.dual import Dual


def random_problem(
    seed: int,
    objectives: int = 3,
    prompts: int = 5,
    responses: int = 4,
    tau: float = 0.1,
    hardness: float = 0.6,
    levels: int | None = None,
    robustness: float = 0.0,
) -> TabularProblem:
    """Random win rates (rounded to a few ``levels`` if given), padded prompts, thresholds a fixed share of the way from
    the reference's values to those of a policy that leans towards all constrained objectives: attainable by design."""
    rng = np.random.default_rng(seed)
    rate = rng.random((objectives, prompts, responses))
    if levels is not None:
        rate = np.round(rate * levels) / levels
    reference = rng.random((prompts, responses)) + 0.05
    reference[:, 2:][rng.random((prompts, responses - 2)) < 0.3] = 0
    reference /= reference.sum(1, keepdims=True)
    weight = rng.random(prompts) + 0.1
    weight /= weight.sum()
    lean = reference * np.exp(3 * rate[1:].mean(0))
    lean /= lean.sum(1, keepdims=True)
    policy = (1 - hardness) * reference + hardness * lean
    mass = weight[:, None] * reference
    ratio = np.divide(policy, reference, out=np.zeros_like(policy), where=reference > 0)
    bounds = [
        robust_value(ratio, rate[k], mass, robustness)[0] if robustness else float(weight @ (policy * rate[k]).sum(1))
        for k in range(1, objectives)
    ]
    return TabularProblem(
        win_rate=rate,
        reference=reference,
        tau=tau,
        thresholds=dict(enumerate(bounds, start=1)),
        prompt_weight=weight,
        robustness=robustness,
    )


def objective(problem: TabularProblem, policy: np.ndarray) -> float:
    """P_primary - tau KL, by its definition."""
    ratio = np.divide(policy, problem.reference, out=np.ones_like(policy), where=policy > 0)
    kl = problem.prompt_weight @ (policy * np.log(ratio)).sum(1)
    return float(problem.prompt_weight @ (policy * problem.win_rate[problem.primary]).sum(1) - problem.tau * kl)


def values(problem: TabularProblem, policy: np.ndarray) -> np.ndarray:
    return np.einsum("kxy,xy,x->k", problem.win_rate, policy, problem.prompt_weight)


def check_optimal(problem: TabularProblem, solution: TabularSolution, tolerance: float = 1e-9) -> None:
    """Feasibility, multiplier signs, complementarity and stationarity, from the problem's data alone."""
    policy, multiplier = solution.policy, solution.multiplier
    assert solution.feasible
    assert (policy >= 0).all()
    assert (policy[~problem.support] == 0).all()
    assert np.abs(policy.sum(1) - 1).max() < 1e-12
    assert np.abs(values(problem, policy) - solution.value).max() < 1e-12
    assert multiplier[problem.primary] == 1
    for k in range(len(multiplier)):
        if k == problem.primary:
            continue
        if k not in problem.thresholds:
            assert multiplier[k] == 0
            continue
        slack = solution.value[k] - problem.thresholds[k]
        assert multiplier[k] >= 0
        assert slack >= -tolerance
        assert multiplier[k] * abs(slack) <= tolerance
    # Stationarity: sum_k w_k s_k - tau log(policy / reference) is one constant per prompt on every response still
    # chosen.
    score = np.einsum("k,kxy->xy", multiplier, problem.win_rate)
    for x in range(len(policy)):
        chosen = policy[x] > 1e-250
        level = score[x, chosen] - problem.tau * np.log(policy[x, chosen] / problem.reference[x, chosen])
        assert np.ptp(level) < 1e-9 * max(1.0, float(multiplier.sum()))
    assert abs(solution.gap) < 1e-9
    assert solution.kkt_residual < 1e-9
    assert solution.primal == pytest.approx(objective(problem, policy), abs=1e-12)


def brute_force(problem: TabularProblem) -> np.ndarray:
    """The policy by scipy's SLSQP over the probabilities themselves."""
    cells = np.argwhere(problem.support)
    weight = problem.prompt_weight[cells[:, 0]]
    reference = problem.reference[tuple(cells.T)]
    rate = problem.win_rate[:, cells[:, 0], cells[:, 1]]
    total = (cells[:, 0][None] == np.arange(len(problem.prompt_weight))[:, None]).astype(float)

    def negative(policy: np.ndarray) -> tuple[float, np.ndarray]:
        log_ratio = np.log(policy / reference)
        gain = rate[problem.primary] - problem.tau * log_ratio
        return -float((weight * policy) @ gain), -weight * (gain - problem.tau)

    constraints = [{"type": "eq", "fun": lambda p: total @ p - 1, "jac": lambda p: total}]
    for k, bound in problem.thresholds.items():
        row = weight * rate[k]
        constraints.append({"type": "ineq", "fun": lambda p, r=row, b=bound: r @ p - b, "jac": lambda p, r=row: r})
    found = minimize(
        negative,
        reference,
        jac=True,
        bounds=[(1e-12, 1.0)] * len(cells),
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    policy = np.zeros_like(problem.reference)
    policy[tuple(cells.T)] = found.x
    return policy


def attainable_worst_slack(problem: TabularProblem) -> float:
    """The linear programme over all cells at once."""
    constrained = list(problem.thresholds)
    prompts, responses = problem.reference.shape
    size = prompts * responses
    rows = (problem.win_rate[constrained] * problem.prompt_weight[:, None]).reshape(len(constrained), size)
    equality = np.zeros((prompts, size + 1))
    equality[np.repeat(np.arange(prompts), responses), np.arange(size)] = 1
    found = linprog(
        np.r_[np.zeros(size), -1.0],
        A_ub=np.c_[-rows, np.ones(len(constrained))],
        b_ub=[-bound for bound in problem.thresholds.values()],
        A_eq=equality,
        b_eq=np.ones(prompts),
        bounds=[(0, float(open_)) for open_ in problem.support.ravel()] + [(None, None)],
    )
    return float(found.x[-1])


def with_thresholds(problem: TabularProblem, shift: float) -> TabularProblem:
    return problem.with_thresholds({k: bound + shift for k, bound in problem.thresholds.items()})


@pytest.mark.parametrize("tau", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_general_optimiser(seed: int, tau: float) -> None:
    problem = random_problem(seed, tau=tau)
    solution = solve(problem)
    general = brute_force(problem)
    assert (values(problem, general)[1:] >= [bound - 1e-9 for bound in problem.thresholds.values()]).all()
    assert objective(problem, general) <= solution.dual + 1e-9
    assert objective(problem, general) == pytest.approx(solution.primal, abs=1e-6)
    assert np.abs(general - solution.policy).max() < 2e-3


@pytest.mark.parametrize("levels", [None, 4, 1], ids=["continuous", "ties", "zero_one"])
@pytest.mark.parametrize("tau", [1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_optimality_conditions_hold_over_all_temperatures(tau: float, levels: int | None) -> None:
    bound = 0
    for seed, (objectives, prompts, responses) in enumerate([(2, 1, 3), (3, 5, 4), (5, 40, 8), (9, 60, 12)]):
        problem = random_problem(seed, objectives, prompts, responses, tau, levels=levels)
        solution = solve(problem)
        check_optimal(problem, solution)
        bound += int((solution.multiplier[1:] > 1e-6).sum())
    assert bound >= 3, "thresholds that never bind would test nothing"


def test_negative_controls_are_caught() -> None:
    """A multiplier of the wrong size or sign, or a policy moved by 1e-6, fails the checks the solver passes."""
    problem = random_problem(3)
    solution = solve(problem)
    check_optimal(problem, solution)
    assert solution.multiplier[1:].min() > 0.01

    def altered(scale: float, move: float = 0.0) -> TabularSolution:
        multiplier = solution.multiplier * np.where(np.arange(3) > 0, scale, 1.0)
        policy = (1 - move) * solution.policy + move * problem.reference
        changed = dict(vars(solution), multiplier=multiplier, policy=policy, value=values(problem, policy))
        return TabularSolution(**changed)

    for wrong in (altered(1.001), altered(-1.0), altered(1.0, 1e-6)):
        with pytest.raises(AssertionError):
            check_optimal(problem, wrong)


def test_one_threshold_in_closed_form() -> None:
    """Two responses, s = (1, 0) and (0, 1): a threshold b on the second gives lambda = 1 + tau logit b."""
    for tau in (1e-3, 0.1, 10.0):
        solution = solve(
            TabularProblem(win_rate=[[[1.0, 0.0]], [[0.0, 1.0]]], reference=[[0.5, 0.5]], tau=tau, thresholds={1: 0.7})
        )
        assert solution.policy[0] == pytest.approx([0.3, 0.7], abs=1e-9)
        assert solution.multiplier == pytest.approx([1.0, 1 + tau * np.log(0.7 / 0.3)], abs=1e-8)
        assert solution.kl == pytest.approx(0.3 * np.log(0.6) + 0.7 * np.log(1.4), abs=1e-9)


def test_cyclic_preferences_are_averaged_over_the_behaviour_policy() -> None:
    cycle = np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
    behaviour = np.array([[0.2, 0.3, 0.5]])
    problem = TabularProblem(
        preference=np.stack([cycle, cycle.T])[:, None], behaviour=behaviour, reference=behaviour, tau=0.5, thresholds={}
    )
    expected = cycle @ behaviour[0]
    assert problem.win_rate[:, 0] == pytest.approx(np.stack([expected, 1 - expected]), abs=1e-15)
    policy = behaviour[0] * np.exp(expected / 0.5)
    assert solve(problem).policy[0] == pytest.approx(policy / policy.sum(), abs=1e-14)


def test_padding_changes_nothing_and_may_be_nan() -> None:
    rng = np.random.default_rng(0)
    half = rng.random((3, 4, 5, 5))
    preference = (half + 1 - half.swapaxes(2, 3)) / 2
    behaviour = rng.dirichlet(np.ones(5), 4)
    options = {"tau": 0.2, "thresholds": {1: 0.52, 2: 0.5}}
    plain = solve(TabularProblem(preference, behaviour, behaviour, **options))
    padded = np.full((3, 4, 7, 7), np.nan)
    padded[:, :, :5, :5] = preference
    wide = np.pad(behaviour, ((0, 0), (0, 2)))
    solution = solve(TabularProblem(padded, wide, wide, **options))
    assert solution.policy[:, :5] == pytest.approx(plain.policy, abs=1e-12)
    assert (solution.policy[:, 5:] == 0).all()
    assert solution.multiplier == pytest.approx(plain.multiplier, abs=1e-9)
    assert plain.multiplier[1:].max() > 0.01


def test_responses_outside_the_reference_are_never_chosen_however_good() -> None:
    problem = TabularProblem(
        win_rate=[[[0.2, 0.4, 1.0]], [[0.6, 0.3, 1.0]]], reference=[[0.5, 0.5, 0.0]], tau=0.01, thresholds={1: 0.7}
    )
    solution = solve(problem)
    assert not solution.feasible
    assert solution.best_value == pytest.approx(-0.1, abs=1e-12)
    assert solution.policy[0] == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)


def test_best_policy_avoids_padding_even_where_every_response_always_loses() -> None:
    solution = solve(
        TabularProblem(win_rate=np.zeros((2, 1, 3)), reference=[[0.0, 0.5, 0.5]], tau=0.1, thresholds={1: 0.2})
    )
    assert solution.best_value == pytest.approx(-0.2, abs=1e-12)
    assert solution.policy[0, 0] == 0


@pytest.mark.parametrize("difference", [0.0, 0.01])
def test_identical_objectives(difference: float) -> None:
    base = random_problem(1, objectives=2, tau=0.2)
    bound = base.thresholds[1]
    problem = TabularProblem(
        win_rate=base.win_rate[[0, 1, 1]],
        reference=base.reference,
        tau=0.2,
        thresholds={1: bound, 2: bound - difference},
        prompt_weight=base.prompt_weight,
    )
    solution, single = solve(problem), solve(base)
    check_optimal(problem, solution)
    assert single.multiplier[1] > 0.01
    assert solution.multiplier[1:].sum() == pytest.approx(single.multiplier[1], abs=1e-7)
    assert difference == 0 or solution.multiplier[2] == 0
    assert solution.policy == pytest.approx(single.policy, abs=1e-8)


def test_constrained_objective_equal_to_the_primary() -> None:
    base = random_problem(1, objectives=2, tau=0.2)
    free = solve(with_thresholds(base, -base.thresholds[1])).value[0]
    problem = TabularProblem(
        win_rate=base.win_rate[[0, 0]], reference=base.reference, tau=0.2, thresholds={1: free + 0.02}
    )
    check_optimal(problem, solve(problem))


def test_flat_objective_is_met_or_impossible() -> None:
    base = random_problem(1, objectives=2, tau=0.2)
    rate = np.stack([base.win_rate[0], np.full_like(base.reference, 0.5)])
    met = TabularProblem(win_rate=rate, reference=base.reference, tau=0.2, thresholds={1: 0.5})
    check_optimal(met, solve(met), 1e-9)
    solution = solve(TabularProblem(win_rate=rate, reference=base.reference, tau=0.2, thresholds={1: 0.51}))
    assert not solution.feasible
    assert solution.best_value == pytest.approx(-0.01, abs=1e-12)


@pytest.mark.parametrize("levels", [None, 3], ids=["continuous", "ties"])
@pytest.mark.parametrize("tau", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 5, 4), (6, 40, 8)])
def test_feasibility_changes_exactly_at_the_attainable_boundary(
    shape: tuple[int, int, int], tau: float, levels: int | None
) -> None:
    """On the boundary itself, and 1e-12 inside it, where the multipliers reach 1e5, the answer is as good as elsewhere.

    It takes more than double precision: there the last bit of a multiplier moves the policy by more than the residual.
    """
    for seed in (0, 3, 5):
        problem = random_problem(seed, *shape, tau=tau, levels=levels)
        edge = attainable_worst_slack(problem)
        assert solve(with_thresholds(problem, edge - 1e-4)).feasible
        for shift in (0.0, 1e-12, 1e-8):
            on_it = solve(with_thresholds(problem, edge - shift))
            assert on_it.feasible
            assert on_it.kkt_residual < 1e-9
            assert abs(on_it.gap) < 1e-9
            bounds = list(with_thresholds(problem, edge - shift).thresholds.values())
            assert (values(problem, on_it.policy)[1:] >= np.array(bounds) - 1e-9).all()
        beyond = solve(with_thresholds(problem, edge + 1e-6))
        assert not beyond.feasible
        assert beyond.best_value == pytest.approx(-1e-6, abs=1e-10)


def test_policy_on_the_boundary_is_the_best_on_the_face_that_is_left() -> None:
    """Prompt 0 must take its only best response; prompt 1, whose responses tie on the threshold, keeps its softmax."""
    problem = TabularProblem(
        win_rate=[[[0.9, 0.1, 0.5], [0.2, 0.8, 0.6]], [[0.1, 0.4, 0.7], [0.6, 0.6, 0.6]]],
        reference=np.full((2, 3), 1 / 3),
        tau=0.3,
        thresholds={1: 0.65},
    )
    solution = solve(problem)
    assert solution.feasible
    assert solution.policy[0] == pytest.approx([0, 0, 1], abs=1e-9)
    free = np.exp(np.array([0.2, 0.8, 0.6]) / 0.3)
    assert solution.policy[1] == pytest.approx(free / free.sum(), abs=1e-9)


@pytest.mark.parametrize("tau", [1e-3, 0.1, 10.0])
def test_deterministic_preferences_total_orders_and_cycles(tau: float) -> None:
    """Preferences of 0 and 1 only, some of them cycles, and a behaviour policy that never writes some responses."""
    rng = np.random.default_rng(0)
    binding = 0
    for seed in range(4):
        above = np.triu(rng.random((3, 6, 5, 5)) < 0.5, 1).astype(float)
        if seed % 2:  # total orders: y beats z when its rank is higher
            rank = rng.permuted(np.broadcast_to(np.arange(5), (3, 6, 5)), axis=2)
            above = np.triu((rank[..., :, None] > rank[..., None, :]).astype(float), 1)
        below = np.tril(1 - above.swapaxes(2, 3), -1)
        preference = above + below + np.eye(5) / 2
        behaviour = rng.dirichlet(np.ones(5), 6)
        behaviour[:3, 4] = 0
        behaviour /= behaviour.sum(1, keepdims=True)
        reference = np.full((6, 5), 0.2)
        free = TabularProblem(preference, behaviour, reference, tau, {})
        assert free.win_rate == pytest.approx(np.einsum("kxyz,xz->kxy", preference, behaviour), abs=1e-15)
        bounds = solve(free).value + 0.4 * free.win_rate.max(2).mean(1) - 0.4 * solve(free).value
        problem = free.with_thresholds({1: float(bounds[1])})
        solution = solve(problem)
        check_optimal(problem, solution)
        binding += solution.multiplier[1] > 1e-3
    assert binding == 4


def test_multipliers_are_the_price_of_their_thresholds() -> None:
    """The optimum falls by ``multiplier`` per unit of threshold: central differences."""
    problem = random_problem(3)
    solution = solve(problem)
    assert solution.multiplier[1:].min() > 0.01
    for k, bound in problem.thresholds.items():
        primal = [solve(problem.with_thresholds({**problem.thresholds, k: bound + h})).primal for h in (1e-5, -1e-5)]
        assert (primal[1] - primal[0]) / 2e-5 == pytest.approx(solution.multiplier[k], abs=1e-5)


@pytest.mark.parametrize("tau", [1e-3, 0.1, 10.0])
def test_start_changes_nothing_but_the_time(tau: float) -> None:
    problem = random_problem(2, tau=tau)
    plain = solve(problem)
    assert plain.multiplier[1:].max() > 0.01
    for start in (plain.multiplier, plain.multiplier * 0.9, np.array([np.pi, 0, 1e4]), np.array([1.0, -2.0, 0.0])):
        solution = solve(problem, start=start)
        check_optimal(problem, solution)
        assert solution.multiplier == pytest.approx(plain.multiplier, rel=1e-6, abs=1e-7)
    impossible = with_thresholds(problem, 0.25)
    assert not solve(impossible).feasible
    assert solve(impossible, start=plain.multiplier).best_value == solve(impossible).best_value
    for wrong in (plain.multiplier[1:], plain.multiplier * np.nan):
        with pytest.raises(ValueError, match="start: expected 3 finite values"):
            solve(problem, start=wrong)


def test_other_thresholds_share_the_arrays_and_are_checked() -> None:
    problem = random_problem(0)
    other = problem.with_thresholds({2: 0.4})
    assert other.thresholds == {2: 0.4}
    assert set(problem.thresholds) == {1, 2}
    assert other.win_rate is problem.win_rate
    with pytest.raises(ValueError, match=r"thresholds: expected none for the primary objective 0; got 0\.4"):
        problem.with_thresholds({0: 0.4})


@pytest.mark.parametrize("seed", range(6))
def test_infeasible_certificate_proves_itself(seed: int) -> None:
    problem = with_thresholds(random_problem(seed, objectives=4, prompts=8, responses=5), 0.25)
    worst = attainable_worst_slack(problem)
    assert worst < -0.01
    solution = solve(problem)
    assert not solution.feasible
    assert np.isnan(solution.multiplier[1:]).all()
    assert solution.gap == solution.kkt_residual == np.inf
    assert solution.best_value == pytest.approx(worst, abs=1e-9)
    # The policy attains the value ...
    slack = [values(problem, solution.policy)[k] - bound for k, bound in problem.thresholds.items()]
    assert min(slack) == pytest.approx(worst, abs=1e-9)
    assert (solution.policy[~problem.support] == 0).all()
    # ... and the certificate's weighted thresholds exceed what any policy gives.
    certificate = solution.certificate
    assert certificate is not None
    assert certificate.min() >= 0
    assert certificate.sum() == pytest.approx(1)
    score = np.where(problem.support, np.einsum("k,kxy->xy", certificate, problem.win_rate), -np.inf)
    proof = problem.prompt_weight @ score.max(1) - sum(certificate[k] * b for k, b in problem.thresholds.items())
    assert proof == pytest.approx(solution.best_bound, abs=1e-12)
    assert proof == pytest.approx(worst, abs=1e-9)
    assert solution.conflict == tuple(np.flatnonzero(certificate > 1e-9))


def test_conflict_names_only_the_thresholds_in_conflict() -> None:
    rate = np.array([[[0.5, 0.5, 0.5]], [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[0.6, 0.6, 0.6]]])
    solution = solve(
        TabularProblem(win_rate=rate, reference=np.full((1, 3), 1 / 3), tau=0.1, thresholds={1: 0.6, 2: 0.5, 3: 0.55})
    )
    assert solution.conflict == (1, 2)
    assert solution.best_value == pytest.approx(-0.05, abs=1e-12)
    assert solution.policy[0] == pytest.approx([0.55, 0.45, 0.0], abs=1e-12)


def test_prompts_of_zero_weight_do_not_matter() -> None:
    problem = random_problem(2, objectives=2)
    weight = problem.prompt_weight.copy()
    weight[0] = 0
    changed = problem.win_rate.copy()
    changed[:, 0] = 1 - changed[:, 0]
    changed[:, ~problem.support] = 0
    options = {"reference": problem.reference, "tau": 0.1, "thresholds": {1: 0.6}, "prompt_weight": weight}
    first = solve(TabularProblem(win_rate=problem.win_rate, **options))
    second = solve(TabularProblem(win_rate=changed, **options))
    assert first.multiplier == pytest.approx(second.multiplier, abs=1e-9)


def test_capped_multipliers_agree_when_the_cap_does_not_bind_and_stop_there_when_it_does() -> None:
    problem = random_problem(3)
    exact = solve(problem).multiplier
    multiplier, value, _ = capped_multipliers(problem, 10.0)
    assert multiplier == pytest.approx(exact, abs=1e-9)
    assert value == pytest.approx(solve(problem).value, abs=1e-9)
    cap = float(exact[1:].max()) * 0.5
    multiplier, value, residual = capped_multipliers(problem, cap)
    assert residual < 1e-9
    assert multiplier[1:].max() == cap
    for k, bound in problem.thresholds.items():
        assert abs(value[k] - bound) < 1e-9 or (multiplier[k] == cap and value[k] < bound) or multiplier[k] == 0


def test_a_large_problem_takes_a_few_passes_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """10^4 prompts x 100 responses x 8 objectives: 5 passes where it is feasible, 33 where it is not."""
    passes = calls_of(monkeypatch, Dual, "evaluate", "support_function")
    problem = random_problem(0, 8, 10_000, 100)
    solution = solve(problem)
    assert 0 < len(passes) <= 10
    assert solution.multiplier[1:].min() > 1e-3
    assert solution.kkt_residual < 1e-9
    assert abs(solution.gap) < 1e-9
    del passes[:]
    impossible = solve(with_thresholds(problem, 0.3))
    assert 0 < len(passes) <= 60
    assert not impossible.feasible
    assert impossible.best_bound is not None
    assert impossible.best_value is not None
    assert impossible.best_bound - impossible.best_value < 1e-9


@pytest.mark.parametrize("radius", [1e-4, 0.05, 0.5])
def test_robust_value_is_the_worst_case_over_the_ball(radius: float) -> None:
    rng = np.random.default_rng(0)
    weight = rng.dirichlet(np.ones(6), 1)
    f = rng.random((1, 6))
    value, tilt = robust_value(np.ones((1, 6)), f, weight, radius)
    q = (weight * tilt)[0]
    assert q.sum() == pytest.approx(1)
    assert q @ np.log(q / weight[0]) == pytest.approx(radius, abs=1e-9)
    assert value == pytest.approx(q @ f[0], abs=1e-14)
    chi = np.geomspace(1e-6, 1e6, 200_001)
    formula = -chi * np.log(np.exp(-(f[0] - f.min()) / chi[:, None]) @ weight[0]) - chi * radius + f.min()
    assert value == pytest.approx(formula.max(), abs=1e-8)
    assert value >= formula.max() - 1e-12


def test_robust_value_of_a_huge_ball_is_the_worst_outcome_and_of_none_the_mean() -> None:
    f, weight = np.array([[0.3, 0.8, 0.5]]), np.array([[0.25, 0.25, 0.5]])
    assert robust_value(np.ones((1, 3)), f, weight, 2.0)[0] == pytest.approx(0.3, abs=1e-12)
    assert robust_value(np.ones((1, 3)), f, weight, 0.0)[0] == pytest.approx(weight[0] @ f[0], abs=1e-15)
    assert robust_value(np.ones((1, 3)), np.full((1, 3), 0.4), weight, 0.1)[0] == pytest.approx(0.4, abs=1e-12)


def robust_brute_force(problem: TabularProblem) -> tuple[float, np.ndarray]:
    """SLSQP over the policy alone, every robust constraint evaluated by a grid-free one-dimensional scipy search."""
    cells = np.argwhere(problem.support)
    weight = problem.prompt_weight[cells[:, 0]] * problem.reference[tuple(cells.T)]
    reference = problem.reference[tuple(cells.T)]
    rate = problem.win_rate[:, cells[:, 0], cells[:, 1]]
    total = (cells[:, 0][None] == np.arange(len(problem.prompt_weight))[:, None]).astype(float)

    def worst(ratio: np.ndarray, k: int) -> float:
        f = ratio * rate[k]

        def negative(log_chi: float) -> float:
            chi = np.exp(log_chi)
            return chi * np.log(weight @ np.exp(-(f - f.min()) / chi)) + chi * problem.robustness - f.min()

        return -float(
            minimize_scalar(
                negative, bounds=(np.log(1e-6), np.log(1e6)), method="bounded", options={"xatol": 1e-10}
            ).fun
        )

    def negative_objective(ratio: np.ndarray) -> float:
        return -float(weight @ (ratio * rate[problem.primary] - problem.tau * ratio * np.log(ratio)))

    constraints = [{"type": "eq", "fun": lambda r: total @ (r * reference) - 1}]
    for k, bound in problem.thresholds.items():
        constraints.append({"type": "ineq", "fun": lambda r, k=k, b=bound: worst(r, k) - b})
    found = minimize(
        negative_objective,
        np.ones(len(cells)),
        bounds=[(1e-9, None)] * len(cells),
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    policy = np.zeros_like(problem.reference)
    policy[tuple(cells.T)] = found.x * reference
    return -float(found.fun), policy


@pytest.mark.parametrize("radius", [0.01, 0.1])
@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(2))
def test_robust_problem_agrees_with_a_general_optimiser(seed: int, tau: float, radius: float) -> None:
    problem = random_problem(seed, prompts=2, tau=tau, robustness=radius)
    solution = solve(problem)
    assert solution.feasible
    assert solution.kkt_residual < 1e-9
    assert abs(solution.gap) < 1e-9
    best, policy = robust_brute_force(problem)
    assert solution.primal == pytest.approx(best, abs=2e-6)
    assert solution.policy == pytest.approx(policy, abs=1e-2)
    for k in problem.thresholds:
        assert solution.constraint_value[k] < solution.value[k]
    # Were the ball ignored, the policy would be another: the robust thresholds do bind here.
    plain = TabularProblem(
        win_rate=problem.win_rate,
        reference=problem.reference,
        tau=tau,
        thresholds=problem.thresholds,
        prompt_weight=problem.prompt_weight,
    )
    assert solve(plain).primal > solution.primal + 1e-4


@pytest.mark.parametrize("tau", [1e-3, 1e-2, 10.0])
def test_robust_problem_is_solved_at_extreme_temperatures(tau: float) -> None:
    for seed in range(3):
        problem = random_problem(seed, 4, 30, 8, tau, robustness=0.05)
        solution = solve(problem)
        assert solution.feasible
        assert solution.kkt_residual < 1e-9
        assert abs(solution.gap) < 1e-9
        mass = problem.prompt_weight[:, None] * problem.reference
        ratio = np.divide(solution.policy, problem.reference, out=np.zeros_like(mass), where=problem.support)
        for k, bound in problem.thresholds.items():
            achieved = robust_value(ratio, problem.win_rate[k], mass, 0.05)[0]
            assert achieved >= bound - 1e-9
            assert solution.multiplier[k] * (achieved - bound) < 1e-9


def test_vanishing_ball_gives_the_plain_problem() -> None:
    plain = random_problem(1)
    tiny = TabularProblem(
        win_rate=plain.win_rate,
        reference=plain.reference,
        tau=plain.tau,
        thresholds=plain.thresholds,
        prompt_weight=plain.prompt_weight,
        robustness=1e-12,
    )
    assert solve(tiny).policy == pytest.approx(solve(plain).policy, abs=1e-4)


@pytest.mark.parametrize("radius", [0.01, 0.15, 0.5])
def test_robust_infeasibility_is_bracketed_and_proved(radius: float) -> None:
    """The policy attains one end; weighted worst cases of single distributions, no better for any policy, the other."""
    for seed, shape in enumerate([(2, 1, 3), (2, 3, 4), (3, 5, 4), (4, 20, 6)]):
        base = random_problem(seed, *shape, robustness=radius)
        problem = with_thresholds(base, 0.3)
        solution = solve(problem)
        assert not solution.feasible
        assert solution.best_bound is not None
        assert solution.best_value is not None
        assert -1e-12 <= solution.best_bound - solution.best_value < 1e-9
        assert solution.best_bound < 0
        mass = problem.prompt_weight[:, None] * problem.reference
        ratio = np.divide(solution.policy, problem.reference, out=np.zeros_like(mass), where=problem.support)
        slack = [robust_value(ratio, problem.win_rate[k], mass, radius)[0] - b for k, b in problem.thresholds.items()]
        assert min(slack) == pytest.approx(solution.best_value, abs=1e-12)
        # Thresholds moved to both sides of it: one problem has an answer, the other has none.
        shift = solution.best_value
        assert solve(with_thresholds(problem, shift - 1e-3)).feasible
        assert not solve(with_thresholds(problem, shift + 1e-5)).feasible
        # No policy that leans towards the constrained objectives does better than the bound.
        for lean in np.linspace(0, 6, 25):
            other = problem.reference * np.exp(lean * problem.win_rate[1:].mean(0))
            other /= other.sum(1, keepdims=True)
            other_ratio = np.divide(other, problem.reference, out=np.zeros_like(mass), where=problem.support)
            worst = min(
                robust_value(other_ratio, problem.win_rate[k], mass, radius)[0] - b
                for k, b in problem.thresholds.items()
            )
            assert worst <= solution.best_bound


def test_radius_of_the_paper_is_infeasible_near_parity_on_eight_candidates() -> None:
    rng = np.random.default_rng(0)
    half = rng.random((2, 4, 8, 8))
    preference = (half + 1 - half.swapaxes(2, 3)) / 2
    uniform = np.full((4, 8), 1 / 8)
    solution = solve(TabularProblem(preference, uniform, uniform, 0.1, {1: 0.6}, robustness=0.15))
    assert not solution.feasible
    assert solution.best_value is not None
    assert solution.best_bound is not None
    assert solution.best_value <= solution.best_bound < 0
    slack = solution.constraint_value[1] - 0.6
    assert slack == pytest.approx(solution.best_value, abs=1e-12)
    assert solve(TabularProblem(preference, uniform, uniform, 0.1, {1: 0.6})).best_value != solution.best_value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": None}, r"reference: expected an \(X, Y\) array"),
        (
            {"reference": [[0.5, 0.6]]},
            "reference: expected probabilities that sum to 1 over the last axis; got a sum of 1.1",
        ),
        ({"reference": [[1.5, -0.5]]}, "reference: expected finite probabilities >= 0"),
        ({"reference": [0.5, 0.5]}, r"reference: expected shape \(any, any\); got \(2,\)"),
        ({"win_rate": None}, "preference, behaviour, win_rate: expected the first two"),
        ({"behaviour": [[0.5, 0.5]]}, r"expected the first two, or win_rate alone; got \['behaviour', 'win_rate'\]"),
        (
            {"win_rate": [[[0.5, 1.5]], [[0.5, 0.5]]]},
            r"win_rate: expected a number in \[0, 1\] where reference > 0; got 1.5",
        ),
        ({"win_rate": [[[0.5, np.nan]], [[0.5, 0.5]]]}, "win_rate: expected a number in .*got nan"),
        ({"win_rate": [[[0.5, 0.5, 0.5]]]}, r"win_rate: expected shape \(any, 1, 2\); got \(1, 1, 3\)"),
        ({"tau": 0.0}, "tau: expected a finite number > 0; got 0.0"),
        ({"tau": None}, "tau: expected a finite number > 0; got None"),
        ({"thresholds": {0: 0.5}}, "thresholds: expected none for the primary objective 0; got 0.5"),
        ({"thresholds": {2: 0.5}}, r"thresholds: expected objectives 0..1; got one for 2"),
        ({"thresholds": {1: 1.5}}, r"thresholds: expected a number in \[0, 1\]; got 1.5 for objective 1"),
        ({"primary": 2}, "primary: expected an objective index in 0..1; got 2"),
        ({"prompt_weight": [0.0]}, "prompt_weight: expected finite weights >= 0, not all zero"),
        ({"robustness": -0.1}, "robustness: expected a finite radius >= 0 in nats; got -0.1"),
    ],
)
def test_arguments_out_of_range_are_named(changes: dict, message: str) -> None:
    good = {"win_rate": [[[0.5, 0.5]], [[0.4, 0.6]]], "reference": [[0.5, 0.5]], "tau": 0.1, "thresholds": {1: 0.5}}
    solve(TabularProblem(**good))
    with pytest.raises(ValueError, match=message):
        TabularProblem(**(good | changes))


def test_preferences_that_are_not_antisymmetric_are_refused() -> None:
    preference = np.full((1, 1, 2, 2), 0.5)
    preference[0, 0, 0, 1] = 0.7
    behaviour = [[0.5, 0.5]]
    with pytest.raises(ValueError, match=r"preference: expected .* to sum to 1; got 1.2 at \[0, 0, 0, 1\]"):
        TabularProblem(preference, behaviour, behaviour, 0.1, {})
    preference[0, 0, 1, 0] = 1.3
    with pytest.raises(ValueError, match=r"preference: expected a number in \[0, 1\]; got 1.3"):
        TabularProblem(preference, behaviour, behaviour, 0.1, {})


def test_tolerance_must_be_positive() -> None:
    with pytest.raises(ValueError, match="tolerance: expected a number > 0; got 0"):
        solve(random_problem(0), tolerance=0)
