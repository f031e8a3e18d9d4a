"""docs/method.md: its equations are found from the code and the code from them, and its figures and claims hold."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from certify_samples import CASES
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from mopo_kernels import mopo_loss, naive
from mopo_kernels.arguments import LogitTransform
from mopo_kernels.certify import certificate
from mopo_kernels.fused.fp16_scaling import FP16_SCALE
from mopo_kernels.tabular import TabularProblem, robust_value, solve
from mopo_kernels.trainer.config import MOPOConfig
from mopo_kernels.trainer.control import gain
from studies.certificate_coverage.coverage import AIMS, RESPONSES

Array = NDArray[np.float64]

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/method.md").read_text(encoding="utf-8")
WORDS = " ".join(DOCUMENT.split())
EQUATION = re.compile(r"\$\$[^$]*\\tag\{(\d+)\}\s*\$\$\n\n\*(Code|Check):\* ([^\n]+)")
# What a docstring says to point at equations: one form, so that it can be searched for.
MENTION = re.compile(r"[Ee]q\. (\(\d+\)(?:(?:, | and )\(\d+\))*) of docs/method\.md")


def equations() -> list[tuple[int, str, list[str]]]:
    """Number, "Code" or "Check", and the names beside it."""
    return [(int(n), kind, re.findall(r"`([\w.]+)`", line)) for n, kind, line in EQUATION.findall(DOCUMENT)]


NUMBERS = [number for number, _, _ in equations()]
CODE = [(number, name) for number, kind, names in equations() if kind == "Code" for name in names]


def resolve(name: str) -> object:
    """What ``mopo_kernels.<name>`` is: the longest module, then attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(["mopo_kernels", *parts[:length]]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("mopo_kernels"):
                raise
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def mentioned(docstring: str | None) -> set[int]:
    found = MENTION.findall(" ".join((docstring or "").split()))
    return {int(number) for group in found for number in re.findall(r"\d+", group)}


def test_equations_are_numbered_in_order_and_each_says_where_it_is_computed_or_checked() -> None:
    assert len(NUMBERS) >= 30
    assert list(range(1, len(NUMBERS) + 1)) == NUMBERS
    assert DOCUMENT.count("$$") == 2 * len(NUMBERS)
    assert all(names for _, _, names in equations())
    for _, kind, names in equations():
        for name in names:
            assert kind == "Code" or callable(globals()[name]), name


@pytest.mark.parametrize(("number", "name"), CODE)
def test_what_computes_an_equation_exists_and_its_docstring_names_the_equation(number: int, name: str) -> None:
    assert number in mentioned(inspect.getdoc(resolve(name)))


def test_every_mention_of_the_document_in_the_code_is_of_an_equation_it_has() -> None:
    count = 0
    for path in sorted((ROOT / "mopo_kernels").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        nodes = (node for node in ast.walk(ast.parse(source)))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        mentions = [mentioned(ast.get_docstring(node)) for node in nodes if isinstance(node, kinds)]
        assert set().union(*mentions) <= set(NUMBERS), path
        written = re.findall(r"[Ee]q\.\s+\(\d+\)[^.]*?\s+of\s+docs/method\.md", source)
        assert len(re.findall(r"[Ee]q\.\s+\(\d+\)", source)) == len(written), f"{path}: a mention of another form"
        count += len(written)
    assert count >= 25


def test_numbers_in_brackets_are_of_equations_that_exist() -> None:
    prose = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", "", DOCUMENT, flags=re.DOTALL)
    assert {int(n) for n in re.findall(r"(?<![\w)])\((\d+)\)", prose)} <= set(NUMBERS)


def test_formulas_survive_markdown() -> None:
    """Markdown drops the backslash of an escaped punctuation mark and takes < for the beginning of a tag."""
    formulas = re.findall(r"\$\$(.*?)\$\$|\$([^$]+)\$", DOCUMENT, flags=re.DOTALL)
    for formula in (display or inline for display, inline in formulas):
        assert not re.search(r"\\[^A-Za-z]|[<>*|]", formula), formula
    inline = re.sub(r"\$\$.*?\$\$", "", DOCUMENT, flags=re.DOTALL)
    assert all(line.count("$") % 2 == 0 for line in inline.splitlines())


# ---- sections 2 and 3


def random_problem(seed: int, objectives: int = 3, tau: float = 0.2, **changes: object) -> TabularProblem:
    """Two prompts, four responses, preferences without any structure, two thresholds that bind."""
    rng = np.random.default_rng(seed)
    half = rng.random((objectives, 2, 4, 4))
    behaviour = rng.dirichlet(np.ones(4), 2)
    arguments: dict = {
        "preference": (half + 1 - half.swapaxes(2, 3)) / 2,
        "behaviour": behaviour,
        "reference": behaviour,
        "tau": tau,
        "thresholds": {k: 0.52 for k in range(1, objectives)},
        "prompt_weight": [0.3, 0.7],
    }
    return TabularProblem(**{**arguments, **changes})


def tilted(problem: TabularProblem, weight: Array) -> tuple[Array, Array]:
    """Eq. (4): the policy (X, Y), and the log of each prompt's normaliser (X,)."""
    share = problem.reference * np.exp(np.einsum("k,kxy->xy", weight, problem.win_rate) / problem.tau)
    return share / share.sum(1, keepdims=True), np.log(share.sum(1))


def divergence(problem: TabularProblem, policy: Array, other: Array) -> float:
    return float(problem.prompt_weight @ (policy * np.log(policy / other)).sum(1))


def value(problem: TabularProblem, policy: Array) -> Array:
    """Eq. (2), (K,)."""
    return np.einsum("kxy,xy,x->k", problem.win_rate, policy, problem.prompt_weight)


def test_the_lagrangian_is_the_dual_minus_a_divergence() -> None:
    problem = random_problem(0)
    rng = np.random.default_rng(1)
    bounds = np.array(list(problem.thresholds.values()))
    for _ in range(5):
        multiplier, policy = rng.random(2), rng.dirichlet(np.ones(4), 2)
        best, normaliser = tilted(problem, np.r_[1.0, multiplier])
        dual = problem.tau * problem.prompt_weight @ normaliser - multiplier @ bounds
        for pi in (policy, best):
            values = value(problem, pi)
            lagrangian = values[0] - problem.tau * divergence(problem, pi, problem.reference)
            lagrangian += multiplier @ (values[1:] - bounds)
            assert lagrangian == pytest.approx(dual - problem.tau * divergence(problem, pi, best), abs=1e-13)


def test_exact_steps_below_the_stated_size_find_the_multipliers() -> None:
    problem = random_problem(3, tau=0.05)
    bounds, exact = np.array(list(problem.thresholds.values())), solve(problem)
    assert exact.multiplier[1:].max() > 0.1
    multiplier = np.zeros(2)
    for _ in range(4000):
        gap = bounds - value(problem, tilted(problem, np.r_[1.0, multiplier])[0])[1:]
        multiplier = np.maximum(multiplier + 0.99 * 8 * problem.tau / 2 * gap, 0)
    assert multiplier == pytest.approx(exact.multiplier[1:], abs=1e-8)


# ---- section 5: the robust constraint on 8 candidates in a total order

ORDER = (np.arange(8) + 0.5) / 8
POOL = np.full((1, 8), 1 / 8)


def least_radius(score: Array, worth: float) -> float:
    """Radius from which on no policy is worth more than ``worth``, by eq. (14): the nearest q to uniform with
    q <= worth / (8 score)."""
    cap = worth / (len(score) * np.maximum(score, 1e-12))
    level = brentq(lambda c: np.minimum(c / len(score), cap).sum() - 1, 0.5, 1e3)
    q = np.minimum(level / len(score), cap)
    return float((q * np.log(len(score) * q)).sum())


def best_robust(radius: float) -> float:
    """The largest robust value of any policy."""
    if radius == 0:
        return float(ORDER.max())
    return brentq(lambda v: least_radius(ORDER, v) - radius, 0.3, ORDER.max())


def order_problem(threshold: float, radius: float) -> TabularProblem:
    flat = np.full((1, 8), 0.5)
    return TabularProblem(
        win_rate=np.stack([flat, ORDER[None]]),
        reference=POOL,
        tau=0.1,
        thresholds={1: threshold},
        robustness=radius,
    )


def robust_figures() -> list[str]:
    rows = []
    for radius in (0.0, 0.01, 0.05, 0.15):
        own = robust_value(np.ones((1, 8)), ORDER[None], POOL, radius)[0]
        rows.append(f"| {radius:g} | {own:.3f} | {best_robust(radius):.3f} |")
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(1000):
        won = np.triu(rng.random((8, 8)) < 0.5, 1).astype(float)
        score = (won + np.tril(1 - won.T, -1) + 0.5 * np.eye(8)).mean(1)
        worst = max(worst, least_radius(score, 0.5) if np.ptp(score) > 0 else 0.0)
    return [
        *rows,
        f"log(8/7) = {math.log(8 / 7):.3f} nats",
        f"out of reach from radius {least_radius(ORDER, 0.5):.3f} on",
        f"that radius is never above {math.ceil(worst * 1000) / 1000:.3f}",
    ]


@pytest.mark.parametrize(("radius", "threshold"), [(0.01, 0.93), (0.15, 0.5)])
def test_robust_figures_follow_from_the_minimum_over_the_ball(radius: float, threshold: float) -> None:
    solution = solve(order_problem(threshold, radius))
    assert not solution.feasible
    assert solution.best_value is not None
    assert solution.best_bound is not None
    assert solution.best_value <= best_robust(radius) - threshold + 1e-7
    assert solution.best_bound >= best_robust(radius) - threshold - 1e-7
    assert solution.best_bound - solution.best_value < 1e-4


def test_parity_is_within_reach_below_the_stated_radius() -> None:
    assert solve(order_problem(0.5, 0.05)).feasible
    assert 0.05 < least_radius(ORDER, 0.5) < 0.15


def test_losers_of_comparisons_bound_the_robust_value_by_parity() -> None:
    rng = np.random.default_rng(0)
    half = rng.random((8, 8)) < 0.5
    score = (np.triu(half, 1) + np.tril(~half.T, -1) + 0.5 * np.eye(8)).mean(1)
    loser = 2 * (1 - score) / 8
    assert loser.sum() == pytest.approx(1)
    assert (8 * loser * score).max() <= 0.5
    wide = float((loser * np.log(8 * np.maximum(loser, 1e-300))).sum())
    problem = TabularProblem(
        win_rate=np.stack([np.full((1, 8), 0.5), score[None]]), reference=POOL, tau=0.1, thresholds={1: 0.501}
    )
    assert solve(problem).feasible
    problem.robustness = wide
    assert not solve(problem).feasible


# ---- section 6


def lag_figures() -> list[str]:
    rows = []
    for beta in (0.9, 0.99, 0.999, 0.9995):
        rows.append(f"| {beta:g} | " + " | ".join(f"{beta**updates:.3f}" for updates in (10, 20, 100, 10000)) + " |")
    return rows


def test_rounds_with_a_moved_reference_add_up_to_a_lower_temperature() -> None:
    problem = random_problem(0, thresholds={})
    for _ in range(3):
        policy = solve(problem).policy
        problem.reference = policy
    assert solve(random_problem(0, tau=0.2 / 3, thresholds={})).policy == pytest.approx(policy, abs=1e-13)


def test_a_reference_of_the_period_before_adds_up_half_as_many_rounds() -> None:
    problem = random_problem(0, thresholds={})
    # The policies at the ends of periods: in the first period and at the end of it there is the first reference alone.
    ends = [problem.reference]
    for period in range(5):
        problem.reference = ends[max(0, period - 1)]
        ends.append(solve(problem).policy)
    for periods, policy in enumerate(ends[1:], 1):
        rounds = math.ceil(periods / 2)
        expected = solve(random_problem(0, tau=0.2 / rounds, thresholds={})).policy
        assert policy == pytest.approx(expected, abs=1e-12)


# ---- section 7: least squares. A population is every pair of responses with every labelling of it, each as one
# weighted pair of an explicit batch.

CYCLE = np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])
CYCLE_BEHAVIOUR = np.array([0.2, 0.3, 0.5])


def population(preference: Array, behaviour: Array) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (P, 2), 0/1 labels (P, K) and probabilities (P,) of one prompt: preference (K, Y, Y), behaviour (Y,)."""
    objectives, size = preference.shape[:2]
    pairs, labels, probability = [], [], []
    for i, j in itertools.product(range(size), repeat=2):
        for label in itertools.product((0.0, 1.0), repeat=objectives):
            chance = [p if z else 1 - p for z, p in zip(label, preference[:, i, j], strict=True)]
            pairs.append((i, j))
            labels.append(label)
            probability.append(behaviour[i] * behaviour[j] * math.prod(chance))
    return torch.tensor(pairs), torch.tensor(labels).double(), torch.tensor(probability)


def least_squares(
    log_ratio: Array, pairs: Tensor, labels: Tensor, probability: Tensor, weight: Array, tau: float
) -> tuple[float, Array]:
    """Expected loss, but for the constant of pairs of equal responses, and its gradient."""
    different = pairs[:, 0] != pairs[:, 1]
    logprob = torch.tensor(log_ratio, requires_grad=True)
    loss = mopo_loss(
        logprob,
        torch.zeros_like(logprob),
        pairs[different],
        labels[different],
        torch.tensor(weight),
        tau=tau,
        pair_weight=probability[different],
        normalizer=1.0,
    ).loss
    (slope,) = torch.autograd.grad(loss, logprob)
    return loss.item(), slope.numpy()


def gradient(log_ratio: Array, pairs: Tensor, labels: Tensor, probability: Tensor, weight: Array, tau: float) -> Array:
    return least_squares(log_ratio, pairs, labels, probability, weight, tau)[1]


def test_the_normal_equations_hold_at_the_closed_form_for_cycles() -> None:
    against = np.stack([CYCLE, 0.7 * CYCLE.T + 0.15])
    weight, tau = np.array([1.0, 0.6]), 0.5
    problem = TabularProblem(against[:, None], CYCLE_BEHAVIOUR[None], CYCLE_BEHAVIOUR[None], tau)
    log_ratio = np.log(tilted(problem, weight)[0][0] / CYCLE_BEHAVIOUR)
    data = population(against, CYCLE_BEHAVIOUR)
    assert np.abs(gradient(log_ratio, *data, weight, tau)).max() < 1e-12
    # Negative controls: another policy, another temperature, pairs that are not drawn from the behaviour policy.
    assert np.abs(gradient(log_ratio + np.array([0.1, 0, 0]), *data, weight, tau)).max() > 1e-2
    assert np.abs(gradient(log_ratio, *data, weight, 0.4)).max() > 1e-2
    assert np.abs(gradient(log_ratio, *population(against, np.full(3, 1 / 3)), weight, tau)).max() > 1e-2


def test_pairs_shown_equally_often_hide_a_cycle() -> None:
    data = population(CYCLE[None], np.full(3, 1 / 3))
    assert np.abs(gradient(np.zeros(3), *data, np.ones(1), 0.5)).max() < 1e-14


def test_excess_loss_is_twice_the_variance_of_the_log_ratio() -> None:
    weight, tau = np.array([1.0]), 0.5
    problem = TabularProblem(CYCLE[None, None], CYCLE_BEHAVIOUR[None], CYCLE_BEHAVIOUR[None], tau)
    best = np.log(tilted(problem, weight)[0][0] / CYCLE_BEHAVIOUR)
    other = np.log(np.random.default_rng(0).dirichlet(np.ones(3)) / CYCLE_BEHAVIOUR)
    data = population(CYCLE[None], CYCLE_BEHAVIOUR)
    excess = least_squares(other, *data, weight, tau)[0] - least_squares(best, *data, weight, tau)[0]
    difference = other - best
    variance = CYCLE_BEHAVIOUR @ difference**2 - (CYCLE_BEHAVIOUR @ difference) ** 2
    assert variance > 0.01
    assert excess == pytest.approx(2 * variance, rel=1e-12)


def cycle_figures() -> list[str]:
    problem = TabularProblem(CYCLE[None, None], CYCLE_BEHAVIOUR[None], CYCLE_BEHAVIOUR[None], 0.5)

    def row(numbers: Array) -> str:
        return "(" + ", ".join(f"{number:.3f}" for number in numbers) + ")"

    return [
        f"win rates are {row(problem.win_rate[0, 0])}",
        f"single 0/1 labels ends at {row(solve(problem).policy[0])}",
    ]


def test_a_label_rate_restores_the_mean_and_costs_no_more_spread_than_stated() -> None:
    chance, rate, weight, tau = 0.8, 0.25, 0.7, 0.5
    outcomes = torch.tensor([[1.0], [0.0], [torch.nan]], dtype=torch.float64)
    probability = torch.tensor([rate * chance, rate * (1 - chance), 1 - rate], dtype=torch.float64)
    w, q = torch.tensor([[weight], [rate]], dtype=torch.float64)
    mean = weight * (chance - 0.5) / tau
    plain, weighted = naive.pair_target(outcomes, w, tau), naive.pair_target(outcomes, w, tau, q)
    assert (probability @ plain).item() == pytest.approx(rate * mean)
    assert (probability @ weighted).item() == pytest.approx(mean)
    assert (probability @ weighted.square()).item() == pytest.approx(weight**2 / (4 * rate * tau**2))


# ---- section 8: cloning. Two kinds of response, equally likely; the first beats the second with probability 0.7.

FIRST_BEATS_SECOND, CLONING_TAU = 0.7, 0.1
EXACT = 1 / (1 + math.exp(-(0.6 - 0.4) / CLONING_TAU))


def learned_in_a_large_pool(labels: int) -> float:
    """Eq. (23): probability of the first kind, with so many labels a response."""
    log_ratio = [labels * math.log(1 - s + s * math.exp(1 / CLONING_TAU / labels)) for s in (0.6, 0.4)]
    return 1 / (1 + math.exp(log_ratio[1] - log_ratio[0]))


def learned_in_pools(size: int) -> float:
    """The same by the library's own ratio: the mean over all pools of that size and all labels of all their pairs."""
    pairs = np.array(list(itertools.combinations(range(size), 2)))
    kinds = np.array(list(itertools.product((0, 1), repeat=size)))
    outcomes = np.array(list(itertools.product((0.0, 1.0), repeat=len(pairs))))
    kind = np.repeat(kinds, len(outcomes), axis=0)
    label = np.tile(outcomes, (len(kinds), 1))
    cases = len(kind)
    chance = 0.5 + (FIRST_BEATS_SECOND - 0.5) * (kind[:, pairs[:, 1]] - kind[:, pairs[:, 0]])
    probability = 0.5**size * np.where(label == 1, chance, 1 - chance).prod(1)
    rho = naive.policy_ratio(
        torch.tensor(label.reshape(-1, 1)),
        torch.tensor((np.arange(cases)[:, None, None] * size + pairs).reshape(-1, 2)),
        torch.ones(1, dtype=torch.float64),
        CLONING_TAU,
        torch.arange(cases).repeat_interleave(size),
    )
    return float(probability @ (rho.numpy().reshape(cases, size) * (kind == 0)).sum(1) / size)


def cloning_figures() -> list[str]:
    def row(numbers: list[float]) -> str:
        return "| probability learned | " + " | ".join(f"{number:.3f}" for number in numbers) + " |"

    return [
        f"the optimum gives the first {EXACT:.3f}",
        "| labels a response | 1 | 2 | 4 | 8 | 32 | 128 |",
        row([learned_in_a_large_pool(m) for m in (1, 2, 4, 8, 32, 128)]),
        "| responses a prompt | 2 | 3 | 4 | 5 |",
        row([learned_in_pools(n) for n in (2, 3, 4, 5)]),
    ]


def test_cloning_is_biased_by_as_much_as_the_document_says() -> None:
    # Eq. (23) against draws: labels a response, two large halves of one pool, the ratio of their mean exponentials.
    rng = np.random.default_rng(0)
    for labels in (1, 8):
        drawn = [np.exp(rng.binomial(labels, s, 200_000) / labels / CLONING_TAU).mean() for s in (0.6, 0.4)]
        assert drawn[0] / sum(drawn) == pytest.approx(learned_in_a_large_pool(labels), abs=0.005)
    # The optimum it misses is the one least squares finds on single labels.
    preference = np.array([[[0.5, FIRST_BEATS_SECOND], [1 - FIRST_BEATS_SECOND, 0.5]]])
    data = population(preference, np.array([0.5, 0.5]))
    optimum = np.log(np.array([EXACT, 1 - EXACT]) / 0.5)
    assert np.abs(gradient(optimum, *data, np.ones(1), CLONING_TAU)).max() < 1e-12
    assert learned_in_pools(2) < 0.61 < 0.85 < EXACT
    # The leading term of the difference, where it is small.
    a, s, m = 0.3, 0.2, 50
    difference = m * math.log(1 - s + s * math.exp(a / m)) - a * s
    assert difference == pytest.approx(a**2 * s * (1 - s) / (2 * m), rel=0.01)


def test_a_pool_that_is_the_whole_list_leaves_out_the_tie_with_itself() -> None:
    preference = 0.5 * np.eye(8) + (np.arange(8)[:, None] > np.arange(8))
    pairs = np.array(list(itertools.combinations(range(8), 2)))
    labels = torch.tensor(preference[pairs[:, 0], pairs[:, 1]])[:, None]
    mean = naive.mean_label(labels, torch.tensor(pairs), 8)[:, 0].numpy()
    assert mean - 0.5 == pytest.approx(8 / 7 * (ORDER - 0.5))


# ---- section 9


def test_a_pairs_optimum_under_sigmoid_is_the_log_odds_of_the_weighted_mean_label() -> None:
    beta, weight = 0.3, torch.tensor([1.0, 2.0], dtype=torch.float64)
    preference = torch.tensor([[0.9, 0.2]], dtype=torch.float64)
    mean = (preference @ weight).item() / 3
    best = math.log(mean / (1 - mean)) / beta
    for scale in (1, 10):
        logprob = torch.tensor([best, 0.0], dtype=torch.float64, requires_grad=True)
        loss = mopo_loss(
            logprob,
            torch.zeros(2, dtype=torch.float64),
            torch.tensor([[0, 1]]),
            preference,
            scale * weight,
            tau=beta,
            loss_type="sigmoid",
        ).loss
        assert torch.autograd.grad(loss, logprob)[0].abs().max() < 1e-14


# ---- section 10: one response in ten is a catastrophe that loses to all others, which tie.

CATASTROPHE = np.array([[0.5, 0.0], [1.0, 0.5]])
RARE = np.array([0.1, 0.9])


def measured(probability: float, estimator: str) -> float:
    """Satisfaction of a policy that gives catastrophes this probability, on the population of pairs."""
    pairs, labels, mass = population(CATASTROPHE[None], RARE)
    log_ratio = torch.tensor(np.log(np.array([probability, 1 - probability]) / RARE))
    return naive.satisfaction(log_ratio, pairs, labels, mass, estimator)[0].item()


def estimator_figures() -> list[str]:
    levels = (0.01, 0.1, 0.2, 0.5, 0.9)

    def row(name: str, numbers: list[float]) -> str:
        return f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |"

    allowed = [brentq(lambda q, e=e: measured(q, e) - 0.45, 0.05, 0.95) for e in ("snis", "pair")]
    pair = torch.tensor([[0, 1]])
    one = torch.ones(1, dtype=torch.float64)
    values = []
    for label in (0.0, 1.0):
        z = torch.full((1, 1), label, dtype=torch.float64)
        rho = naive.policy_ratio(z, pair, one, 0.1, torch.zeros(2, dtype=torch.int64))
        values.append(naive.satisfaction(torch.log(rho), pair, z, one, "closed_form", rho)[0].item())
    return [
        "| probability | " + " | ".join(f"{level:g}" for level in levels) + " |",
        row("win rate", [measured(level, "snis") for level in levels]),
        row("pair", [measured(level, "pair") for level in levels]),
        f"catastrophes a probability of {allowed[0]:.2f} on the scale of win rates, and {allowed[1]:.2f} on that",
        f"it reports {sum(values) / 2:.5f}",
    ]


def test_two_estimators_are_a_half_at_the_reference_and_snis_is_the_win_rate() -> None:
    score = CATASTROPHE @ RARE
    for probability in (0.01, 0.1, 0.7):
        policy = np.array([probability, 1 - probability])
        assert measured(probability, "snis") == pytest.approx(policy @ score, abs=1e-13)
    for estimator in ("pair", "snis"):
        assert measured(0.1, estimator) == pytest.approx(0.5, abs=1e-15)
    assert measured(1 - 1e-9, "pair") > 0.4  # so a threshold of 0.40 forbids nothing


def test_pair_and_win_rate_scales_agree_to_first_order() -> None:
    rng = np.random.default_rng(0)
    half = rng.random((5, 5))
    preference, behaviour = (half + 1 - half.T) / 2, rng.dirichlet(np.ones(5))
    pairs, labels, mass = population(preference[None], behaviour)
    score, direction = preference @ behaviour, rng.normal(size=5)
    slope = behaviour @ (direction * score) - (behaviour @ direction) * (behaviour @ score)
    for estimator in ("pair", "snis"):
        both = [
            naive.satisfaction(torch.tensor(step * direction), pairs, labels, mass, estimator)[0].item()
            for step in (1e-4, -1e-4)
        ]
        assert (both[0] - both[1]) / 2e-4 == pytest.approx(slope, rel=1e-6)


# ---- section 12


def test_agreeing_objectives_leave_thresholds_slack_at_every_temperature() -> None:
    rng = np.random.default_rng(0)
    first = np.sort(rng.random((3, 6)), axis=1)
    rate = np.stack([first, np.sort(rng.random((3, 6)), axis=1), 1 - first])
    uniform = np.full((3, 6), 1 / 6)
    own = rate.mean((1, 2))
    for tau in (10.0, 1.0, 0.1, 0.01):
        problem = TabularProblem(win_rate=rate, reference=uniform, tau=tau, thresholds={1: own[1] - 1e-9})
        solution = solve(problem)
        assert solution.multiplier[1] == 0
        assert solution.value[2] == pytest.approx(1 - solution.value[0])
        opposed = solve(TabularProblem(win_rate=rate, reference=uniform, tau=tau, thresholds={2: own[2] - 1e-9}))
        assert opposed.multiplier[2] > 0
        # Eq. (30), by differences.
        near = TabularProblem(win_rate=rate, reference=uniform, tau=1 / (1 / tau + 1e-5), thresholds={})
        slope = (solve(near).value[1] - solution.value[1]) / 1e-5
        policy = solution.policy
        covariance = (policy * rate[0] * rate[1]).sum(1) - (policy * rate[0]).sum(1) * (policy * rate[1]).sum(1)
        assert slope == pytest.approx(covariance.mean(), rel=1e-2, abs=1e-7)


# ---- section 13


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_gradient_rescaled_from_tile_to_tile_is_the_gradient(softcap: float | None) -> None:
    """Eq. (33) to (37) as they stand in the document, over uneven tiles and two ranks, against autograd."""
    generator = torch.Generator().manual_seed(0)
    rows, size, vocabulary = 5, 4, 23
    hidden = torch.randn(rows, size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = 3 * torch.randn(vocabulary, size, generator=generator, dtype=torch.float64)
    target = torch.randint(vocabulary, (rows,), generator=generator)
    logprob = naive.linear_logprob(hidden, weight, target, softcap=softcap, logit_scale=0.7, temperature=1.3)
    (expected,) = torch.autograd.grad(logprob.sum(), hidden)

    logits = naive.head_logits(hidden.detach(), weight, None, softcap, 0.7, 1.3)
    slope = LogitTransform(softcap, 0.7, 1.3).slope(logits)
    onehot = torch.nn.functional.one_hot(target, vocabulary)
    final = torch.logsumexp(logits, 1, keepdim=True)
    gradient = torch.zeros_like(expected)
    parts = []
    for first, last in ((0, 9), (9, vocabulary)):
        level = torch.full((rows, 1), -torch.inf, dtype=torch.float64)
        at_target, own = level.clone(), torch.zeros_like(expected)
        for start in range(first, last, 4):
            tile = slice(start, min(start + 4, last))
            moved = torch.logaddexp(level, torch.logsumexp(logits[:, tile], 1, keepdim=True))
            entries = (onehot[:, tile] - torch.exp(logits[:, tile] - moved)) * slope[:, tile]
            own = torch.exp(level - moved) * own + entries @ weight[tile]
            level = moved
            at_target = torch.where(onehot[:, tile].any(1, keepdim=True), level, at_target)
        here = onehot[:, first:last].any(1, keepdim=True)
        missing = torch.where(here, 1 - torch.exp(at_target - final), 0)
        own = torch.exp(level - final) * own
        at_target_slope = slope.gather(1, target[:, None])
        gradient += own + missing * at_target_slope * weight[target]
        parts.append(logits[:, first:last])
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)

    maxima = [part.amax(1) for part in parts]
    top = torch.stack(maxima).amax(0)
    total = sum(torch.exp(m - top) * torch.exp(part - m[:, None]).sum(1) for m, part in zip(maxima, parts, strict=True))
    torch.testing.assert_close(top + torch.log(total), final[:, 0])


def test_numbers_in_the_section_on_numerics() -> None:
    assert {float(np.spacing(np.float32(z))) for z in (16.0, 20.0, 31.9)} == {2.0**-19}
    assert FP16_SCALE == 2.0**14
    assert torch.finfo(torch.float16).max > FP16_SCALE


# ---- section 14

LEVELS = (0.3, 1.0, 2.0, 3.0)
DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(MOPOConfig)}


def held_out(divergence: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """(score, log-ratio), both (X, Y), of 2000 prompts with 256 responses that the reference writes alike."""
    score = rng.standard_normal((2000, 256))
    rank = score.argsort(1).argsort(1) / 255
    direction = (rank - 0.5) * np.sqrt(12 / 4) + np.sqrt(3 / 4) * rng.standard_normal(score.shape)

    def tilted(size: float) -> Array:
        return size * direction - np.log(np.exp(size * direction).mean(1, keepdims=True))

    size = brentq(lambda a: (np.exp(tilted(a)) * tilted(a)).mean() - divergence, 0, 30, xtol=1e-6)
    return score, tilted(size)


def estimates(score: Array, ratio: Array) -> dict[str, float]:
    """Of one data set, score and log-ratio (100, 4): by name the value; and the effective number of prompts."""
    i, j = np.triu_indices(4, 1)
    first = np.arange(100)[:, None] * 4
    pairs = torch.tensor(np.stack([(first + i).ravel(), (first + j).ravel()], 1))
    label = torch.tensor((score[:, i] > score[:, j]).ravel(), dtype=torch.float64)[:, None]
    r, one = torch.tensor(ratio.ravel()), torch.ones(600, dtype=torch.float64)
    found = {}
    for name, estimator, log_weight in (
        ("snis", "snis", r),
        ("capped", "snis", naive.capped_log_ratio(r)),
        ("pair", "pair", r),
    ):
        terms = naive.satisfaction_terms(log_weight, pairs, label, one, estimator)
        by_prompt = [part.reshape(100, 6, 1).sum(1) for part in terms]
        value, _, effective = naive.ratio_estimate(naive.ratio_moments(*by_prompt))
        found[name] = value.item()
        if name == "snis":
            found["effective"] = effective.item()
            found["within"] = (by_prompt[0] / by_prompt[1]).mean().item()
    return found


def control_figures() -> list[str]:
    rng = np.random.default_rng(0)
    truth, pair, found = [], [], []
    for level in LEVELS:
        score, ratio = held_out(level, rng)
        rank = score.argsort(1).argsort(1) / 255
        truth.append(float((np.exp(ratio) * rank).mean()))
        i, j = rng.integers(256, size=(2, 2000, 400))
        x = np.arange(2000)[:, None]
        z = np.where(i == j, 0.5, score[x, i] > score[x, j])
        chosen = 1 / (1 + np.exp(ratio[x, j] - ratio[x, i]))
        distinct = i != j
        pair.append(float((chosen * z + (1 - chosen) * (1 - z))[distinct].mean()))
        sets = []
        for _ in range(200):
            prompt, drawn = rng.integers(2000, size=100)[:, None], rng.integers(256, size=(100, 4))
            sets.append(estimates(score[prompt, drawn], ratio[prompt, drawn]))
        found.append(sets)

    def row(name: str, numbers: list[float], digits: int = 2) -> str:
        return f"| {name} | " + " | ".join(f"{round(number, digits) + 0.0:.{digits}f}" for number in numbers) + " |"

    rows = [row("win rate", truth)]
    for title, name, right in (
        ("snis, over all", "snis", truth),
        ("the same, capped", "capped", truth),
        ("within prompts", "within", truth),
        ("pair (its own scale)", "pair", pair),
    ):
        values = [np.array([each[name] for each in sets]) for sets in found]
        rows.append(row(f"{title}: error", [float(v.mean() - t) for v, t in zip(values, right, strict=True)]))
        rows.append(row(f"{title}: spread", [float(v.std()) for v in values]))
    rows.append(row("effective prompts", [float(np.mean([each["effective"] for each in sets])) for sets in found], 0))
    steps = [gain(error, 0.01, 1.0) for error in (0.03, 0.06)]
    return [
        *rows,
        f"For s = 0.03 that is {steps[0]:.2f}, for 0.06 {steps[1]:.2f}.",
        f"with z the normal quantile ({NormalDist().inv_cdf(0.95):.3f} at 0.95)",
    ]


def one_pair_a_prompt(divergence: float, shift: float, rng: np.random.Generator) -> tuple[float, float, bool, bool]:
    """Of 128 prompts with one pair each, labelled by a toss that follows the score: snis, pair, and whether each may
    move multipliers.

    The policy's log-ratio follows score and noise alike; whoever wrote the responses has that noise ``shift`` away from
    the reference's.
    """
    score, noise = rng.standard_normal((128, 2)), rng.standard_normal((128, 2)) + shift
    r = torch.tensor((np.sqrt(divergence) * (score + noise) - divergence).ravel())
    label = rng.random(128) < 1 / (1 + np.exp(score[:, 1] - score[:, 0]))
    args = torch.arange(256).view(-1, 2), torch.tensor(label, dtype=torch.float64)[:, None], torch.ones(128).double()

    def estimate(log_weight: Tensor, estimator: str) -> tuple[float, float]:
        terms = naive.satisfaction_terms(log_weight, *args, estimator)
        value, _, effective = naive.ratio_estimate(naive.ratio_moments(*terms))
        return value.item(), effective.item()

    covered = r.exp().mean().item() >= DEFAULTS["dual_coverage"]
    enough = DEFAULTS["dual_effective_prompts"]
    pair, behind = estimate(r, "pair")
    snis = estimate(naive.capped_log_ratio(r), "snis")[0]
    return snis, pair, covered and estimate(r, "snis")[1] >= enough, behind >= enough


def writer_figures() -> list[str]:
    rng = np.random.default_rng(0)

    def row(name: str, numbers: list[float]) -> str:
        return f"| {name} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |"

    rows = []
    for writer, shift in (("the reference", 0.0), ("another", -0.5)):
        sets = np.array([[one_pair_a_prompt(level, shift, rng) for _ in range(400)] for level in (0.3, 1.0, 2.0, 4.0)])
        rows.append(row(f"snis, {writer} wrote: may move", list(sets[..., 2].mean(1))))
    return [
        *rows,
        row("snis: spread", list(sets[..., 0].std(1))),
        row("pair, whoever wrote: may move", list(sets[..., 3].mean(1))),
        row("pair: spread", list(sets[..., 1].std(1))),
    ]


def largest_deviation(value: Array, total: Array, rng: np.random.Generator) -> Array:
    """(K,) lower bounds by the largest studentised deviation over the objectives in 500 resamples of the prompts."""
    mean, error, _ = (np.asarray(part) for part in estimate(value, total))
    count = len(value)
    times = rng.multinomial(count, np.full(count, 1 / count), size=500).astype(np.float64)
    drawn = times @ value / (times @ total)
    square = times @ value**2 - 2 * drawn * (times @ (value * total)) + drawn**2 * (times @ total**2)
    spread = np.sqrt(square.clip(1e-12) * count / (count - 1)) / (times @ total)
    return np.asarray(mean - np.quantile(((drawn - mean) / spread).max(1), 0.95) * error)


def estimate(value: Array, total: Array) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return naive.ratio_estimate(naive.ratio_moments(torch.from_numpy(value), torch.from_numpy(total)))


def certificate_figures() -> list[str]:
    rows = []
    for case, draw in CASES.items():
        rng = np.random.default_rng(0)
        wrong, room = np.zeros(4), []
        for _ in range(600):
            sums, truth = draw(rng)
            mean, error, effective = (np.asarray(part) for part in estimate(sums.value, sums.total))
            bounds = [
                mean - stats.norm.ppf(0.975) * error,
                mean - stats.t.ppf(0.975, effective - 1) * error,
                largest_deviation(sums.value, sums.total, rng),
                np.array([bound.lower for bound in certificate(sums, dict.fromkeys(sums.objectives, 0.5)).bounds]),
            ]
            wrong += [bool((bound > np.array(truth)).any()) for bound in bounds]
            room.append([float(np.mean(np.array(truth) - bounds[index].clip(0.0))) for index in (1, 2, 3)])
        cells = [*(f"{share:.1%}".replace("%", "") for share in wrong / 600), *(f"{x:.3f}" for x in np.median(room, 0))]
        rows.append(f"| {case} | " + " | ".join(cells) + " |")
    return rows


def certified_structures() -> list[str]:
    """What the records of `python -m studies.certificate_coverage` say; that they were made with what the text says."""
    lines = []
    for prompts in (1000, 200):
        file = ROOT / "studies/certificate_coverage" / f"prompts_{prompts}.json"
        record = json.loads(file.read_text(encoding="utf-8"))
        expected = {"instances": 200, "pairs": 5000, "prompts": prompts, "confidence": 0.95}
        assert {key: record["settings"][key] for key in expected} == expected
        found = dict(record["results"])
        shifted = found.pop("shifted_reference")
        assert len(found) == 12
        assert all(each["wrong"] <= record["allowed"] for each in found.values())
        assert not any(each["false"] for each in (*found.values(), shifted))
        wrong, certified, careless = ([each[key] for each in found.values()] for key in ("wrong", "certified", "naive"))
        cells = [
            f"{prompts:,}",
            f"{min(wrong):.1%} to {max(wrong):.1%}",
            f"{shifted['wrong']:.1%}",
            f"0 of {len(record['results']) * record['settings']['instances']:,}",
            f"{min(careless):.1%} to {max(careless):.1%}",
            f"{min(certified):.1%} to {max(certified):.1%}, median {np.median(certified):.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("%", " %"))
    lines.append(f"{max(AIMS):.2f} above them; held-out prompts have {RESPONSES} responses each")
    return [*lines, f"two standard errors ({record['allowed']:.1%})".replace("%", " %")]


# ---- all figures

# Settings of the examples, and figures that are quoted.
GIVEN = {
    *("2505.10892", "0.1", "0.01", "0.001", "0.15", "0.9995", "0.9", "0.999", "0.99", "0.5", "0.2", "0.3", "0.7"),
    *("0.6", "0.4", "0.45", "0.40", "0.95", "2411.09009"),
}

COMPUTED = (
    robust_figures,
    lag_figures,
    cycle_figures,
    cloning_figures,
    estimator_figures,
    control_figures,
    writer_figures,
    certificate_figures,
    certified_structures,
)
FIGURES = [cache(f) for f in COMPUTED]


@pytest.mark.parametrize("computed", FIGURES, ids=lambda computed: computed.__name__)
def test_figures_are_what_the_code_computes(computed: Callable[[], list[str]]) -> None:
    assert [line for line in computed() if line not in WORDS] == []


def test_no_figure_is_left_unchecked() -> None:
    decimals = set(re.findall(r"\d+\.\d+", WORDS))
    lines = [line for computed in FIGURES for line in computed()]
    assert decimals - GIVEN <= set(re.findall(r"\d+\.\d+", " ".join(lines)))
