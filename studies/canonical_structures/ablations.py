"""How what is learned depends on the method's settings, one at a time, beside what exact solutions say it should be.

=============  =========================================================================================================
``tau``        strength of the KL term, in multiples of the structure's; thresholds stay
``reference``  the lagged reference: every t0 steps pi_ref becomes the policy as it was and thresholds become beta times
               the win rates it had then (SPEC section 1); "never" is the plain problem
``dual_step``  a fixed step of the multipliers, in place of one as long as it can be
``noise``      each label flipped with some probability
``robustness``  exact only: the radius of the KL ball of the robust constraint, which radii can be met and at what price
=============  =========================================================================================================

Learned rows are by the training of :mod:`studies.canonical_structures.baselines`, all data sets of an instance at once,
and over several instances of a structure; robustness is of the first instance. With a lagged reference, steps are
shortened to a share of Newton's, as the optimiser of a large model takes many steps to solve one problem, too: with
whole steps each problem would be solved at once and t0 = 1 would be as many problems as steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_kernels import tabular
from studies.canonical_structures.asymptotics import total_variation
from studies.canonical_structures.baselines import TOLERANCE, Multipliers, Task, mean_interval, rate_interval, train
from studies.canonical_structures.exact import worst_slack
from studies.canonical_structures.pairs import sample_pairs
from studies.canonical_structures.structures import Structure

__all__ = [
    "BETAS",
    "DUAL_STEPS",
    "NOISE",
    "RADII",
    "STRUCTURES",
    "T0S",
    "TAUS",
    "ablate",
    "lagged_sequence",
    "largest_radius",
    "noisy_problem",
    "pool_problem",
]

Array = npt.NDArray[np.float64]

# One of each kind; the others have nothing to add.
STRUCTURES = (
    "bradley_terry_opposed",
    "bradley_terry_independent",
    "condorcet_within",
    "rare_catastrophe",
    "flat_faces",
)
PAIRS = 5_000
TAUS = (0.25, 0.5, 1.0, 2.0, 4.0)
# The paper's.
BETAS = (0.9, 0.95, 0.99, 0.999)
T0S: tuple[int | None, ...] = (1, 100, 1000, None)
LAG_STEPS = 2000
LAG_SHARE = 0.05
DUAL_STEPS = (0.01, 0.1, 1.0, 10.0, 100.0)
NOISE = (0.0, 0.05, 0.1, 0.2, 0.3)
# The last is the paper's, in nats.
RADII = (0.0, 1e-4, 1e-3, 1e-2, 0.05, 0.15)
POOL = 8
# Multipliers over the last quarter of training that differ by more than this have not settled.
_SETTLED = 0.01


def _learned(
    structure: Structure,
    log_policy: Array,
    multipliers: Multipliers,
    exact: tabular.TabularSolution | None,
    tau: float,
) -> dict[str, Any]:
    """What a row says of the policies (B, X, Y) that one setting has given, one a data set."""
    policy = np.exp(log_policy)
    value = np.array([structure.value(each) for each in policy])
    kl = np.array([structure.kl(each) for each in policy])
    weight = multipliers.weight()
    row: dict[str, Any] = {
        "value": value.mean(0),
        "primary": mean_interval(value[:, structure.primary]),
        "slack": mean_interval(worst_slack(structure, value)),
        "kl": mean_interval(kl),
        "primal": mean_interval(value[:, structure.primary] - structure.tau * kl),
        "multiplier": weight.mean(0),
        "largest_multiplier": mean_interval(np.delete(weight, structure.primary, 1).max(1)),
        "distance": None,
        "exact": None,
    }
    if structure.features is not None:
        exact = None  # of all tables, which a restricted class has no reason to reach
    if exact is not None and exact.feasible:
        row["distance"] = mean_interval([total_variation(structure, each, exact.policy) for each in policy])
        row["exact"] = {
            "value": exact.value,
            "slack": float(worst_slack(structure, exact.value)),
            "kl": structure.kl(exact.policy),
            "multiplier": exact.multiplier,
            "tau": tau,
        }
    elif exact is not None:
        row["exact"] = {"infeasible_by": -float(exact.best_value or 0.0), "tau": tau}
    plain: dict[str, Any] = _plain(row)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


def _tau_rows(task: Task) -> Iterator[dict[str, Any]]:
    structure = task.structure
    for factor in TAUS:
        tau = structure.tau * factor
        multipliers = Multipliers(structure, structure.thresholds, len(task.pairs))
        learned = train(task, None, tau, controller=multipliers)[0]
        exact = tabular.solve(structure.problem(tau=tau))
        yield {"ablation": "tau", "setting": {"tau": tau}, **_learned(structure, learned, multipliers, exact, tau)}


def lagged_sequence(structure: Structure, beta: float, rounds: int) -> tabular.TabularSolution:
    """The last of the problems that a lagged reference makes of one, each solved exactly.

    The first is the structure's own. Each of the ``rounds`` that follow has the last one's optimum as its reference and
    beta times that one's win rates as its thresholds.
    """
    solution = tabular.solve(structure.problem())
    for _ in range(rounds):
        thresholds = {k: beta * float(solution.value[k]) for k in structure.thresholds}
        problem = tabular.TabularProblem(
            win_rate=structure.win_rate,
            # An optimum has every response of its reference, if only at the smallest positive number.
            reference=np.maximum(solution.policy, np.finfo(float).tiny),
            tau=structure.tau,
            thresholds=thresholds,
            primary=structure.primary,
            prompt_weight=structure.prompt_weight,
        )
        solution = tabular.solve(problem, tolerance=1e-9)
    return solution


def _reference_rows(task: Task, steps: int, share: float) -> Iterator[dict[str, Any]]:
    structure = task.structure
    long = Task(structure, task.pairs, steps)
    for t0 in T0S:
        for beta in BETAS if t0 is not None else (None,):
            multipliers = Multipliers(structure, structure.thresholds, len(task.pairs))
            learned = train(long, None, structure.tau, controller=multipliers, share=share, every=t0, beta=beta)[0]
            # The last of the problems that training has had time to solve; after one step none is.
            solved = 0 if t0 is None else steps // t0 - 1
            exact = None if t0 == 1 else lagged_sequence(structure, beta or 1.0, solved)
            row = _learned(structure, learned, multipliers, exact, structure.tau)
            own = float(multipliers.bounds[:, 0].mean())
            setting = {"t0": "never" if t0 is None else t0, "beta": "-" if beta is None else beta}
            yield {"ablation": "reference", "setting": setting, "threshold": own, "steps": steps, **row}


def _dual_rows(task: Task) -> Iterator[dict[str, Any]]:
    structure = task.structure
    exact = tabular.solve(structure.problem())
    for step in (None, *DUAL_STEPS):
        multipliers = Multipliers(structure, structure.thresholds, len(task.pairs), step)
        learned = train(task, None, structure.tau, controller=multipliers)[0]
        row = _learned(structure, learned, multipliers, exact, structure.tau)
        # A run that stopped early stood still: its last weights stand for the rest.
        trace = np.array(multipliers.trace + [multipliers.weight()] * (task.steps - len(multipliers.trace)))
        spread = np.ptp(trace[-task.steps // 4 :], axis=0).max(1)
        yield {
            "ablation": "dual_step",
            "setting": {"dual_step": "own" if step is None else step},
            "steps": len(multipliers.trace),
            "spread": mean_interval(spread),
            "unsettled": rate_interval(int((spread > _SETTLED).sum()), len(spread)),
            **row,
        }


def noisy_problem(structure: Structure, noise: float) -> tabular.TabularProblem:
    """The problem whose labels are the structure's, each flipped with probability ``noise``: every preference, and so
    every win rate, is drawn towards 1/2 by the factor ``1 - 2 noise``."""
    return tabular.TabularProblem(
        win_rate=0.5 + (1 - 2 * noise) * (structure.win_rate - 0.5),
        reference=structure.reference,
        tau=structure.tau,
        thresholds=structure.thresholds,
        primary=structure.primary,
        prompt_weight=structure.prompt_weight,
    )


def _noise_rows(task: Task, count: int, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    structure = task.structure
    clean = tabular.solve(structure.problem())
    for noise in NOISE:
        pairs = tuple(sample_pairs(structure, count, seed, label_noise=noise) for seed in seeds)
        multipliers = Multipliers(structure, structure.thresholds, len(pairs))
        learned = train(Task(structure, pairs, task.steps), None, structure.tau, controller=multipliers)[0]
        exact = tabular.solve(noisy_problem(structure, noise))
        row = _learned(structure, learned, multipliers, exact, structure.tau)
        away = [total_variation(structure, each, clean.policy) for each in np.exp(learned)]
        if row["exact"] is not None and exact.feasible:
            row["exact"]["value"] = structure.value(exact.policy).tolist()
            row["exact"]["slack"] = float(worst_slack(structure, structure.value(exact.policy)))
        yield {
            "ablation": "noise",
            "setting": {"noise": noise},
            "distance_to_clean": mean_interval(away),
            **row,
        }


def pool_problem(structure: Structure, size: int = POOL, seed: int = 0) -> tabular.TabularProblem:
    """A pool of ``size`` candidates drawn from the behaviour for each prompt, all equally likely in the reference, and
    the thresholds that this reference itself just meets when there is no robustness."""
    rng = np.random.default_rng(seed)
    prompts = len(structure.prompt_weight)
    drawn = np.stack([rng.choice(structure.behaviour.shape[1], size, p=each) for each in structure.behaviour])
    win_rate = np.take_along_axis(
        structure.win_rate, np.broadcast_to(drawn, (len(structure.objectives), *drawn.shape)), 2
    )
    value = win_rate.mean(2) @ structure.prompt_weight
    return tabular.TabularProblem(
        win_rate=win_rate,
        reference=np.full((prompts, size), 1.0 / size),
        tau=structure.tau,
        thresholds={k: float(value[k]) for k in structure.thresholds},
        primary=structure.primary,
        prompt_weight=structure.prompt_weight,
    )


def _with_radius(problem: tabular.TabularProblem, radius: float) -> tabular.TabularProblem:
    return tabular.TabularProblem(
        win_rate=problem.win_rate,
        reference=problem.reference,
        tau=problem.tau,
        thresholds=problem.thresholds,
        primary=problem.primary,
        prompt_weight=problem.prompt_weight,
        robustness=radius,
    )


def _solve_at(problem: tabular.TabularProblem, radius: float) -> tabular.TabularSolution | None:
    """The exact solution with this radius; None where the solver cannot tell, next to the largest that can be met."""
    try:
        return tabular.solve(_with_radius(problem, radius), tolerance=1e-8)
    except ArithmeticError:
        return None


def largest_radius(problem: tabular.TabularProblem, ratio: float = 1.1) -> float:
    """The largest radius found at which the thresholds can be met, to within a factor of ``ratio``; 0 below 1e-8."""
    low, high = 1e-8, 1.0

    def met(radius: float) -> bool:
        solution = _solve_at(problem, radius)
        return solution is not None and solution.feasible

    if not met(low):
        return 0.0
    while high / low > ratio:
        middle = float(np.sqrt(low * high))
        if met(middle):
            low = middle
        else:
            high = middle
    return low


def _robustness_rows(structure: Structure) -> Iterator[dict[str, Any]]:
    for name, problem in (("default", structure.problem()), (f"pool of {POOL}", pool_problem(structure))):
        plain = tabular.solve(problem)
        largest = largest_radius(problem)
        weight = problem.prompt_weight[:, None] * problem.reference
        for radius in RADII:
            solution = _solve_at(problem, radius)
            met = solution is not None and solution.feasible
            # The reference's own worst slack: its density ratio is 1.
            reference_slack = min(
                tabular.robust_value(np.ones_like(weight), problem.win_rate[k], weight, radius)[0] - bound
                for k, bound in problem.thresholds.items()
            )
            row = {
                "ablation": "robustness",
                "setting": {"problem": name, "radius": radius},
                "feasible": met if solution is not None else None,
                "largest_radius": largest,
                "reference_slack": reference_slack,
                "best_slack": None if solution is None else solution.best_value,
                "price": plain.primal - solution.primal if solution is not None and met else None,
                "value": None if solution is None else solution.value,
                "kl": None if solution is None else solution.kl,
                "multiplier": solution.multiplier if solution is not None and met else None,
            }
            yield _plain(row)


def _merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the same setting on several instances: intervals over all data sets, means of exact numbers."""
    row = dict(rows[0])
    runs = sum(len(each["slack"]["each"]) for each in rows)
    for key, entry in rows[0].items():
        if isinstance(entry, dict) and "each" in entry:
            found = [each[key] for each in rows]
            row[key] = mean_interval([each["each"] for each in found]) if all(found) else None
        elif isinstance(entry, dict) and "count" in entry:
            row[key] = rate_interval(sum(each[key]["count"] for each in rows), runs)
    every = [each["exact"] for each in rows]
    short = [exact["infeasible_by"] for exact in every if exact and "infeasible_by" in exact]
    if short:
        row["exact"] = {"infeasible_by": max(short), "tau": every[0]["tau"]}
        row["distance"] = None
    elif all(every):
        row["exact"] = {key: np.mean([exact[key] for exact in every], axis=0) for key in every[0]}
    for key in ("value", "multiplier"):
        row[key] = np.mean([each[key] for each in rows], axis=0)
    row["lost"] = row["slack"]["mean"] < -TOLERANCE
    merged: dict[str, Any] = _plain(row)
    return merged


def ablate(
    structures: Sequence[Structure],
    seeds: Sequence[int],
    *,
    count: int = PAIRS,
    steps: int = LAG_STEPS,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """One setting at a time away from the structure's default, on ``count`` pairs drawn with each of the seeds.

    Args:
        structures: instances of one structure.
        seeds: of the data sets of each; intervals are over them.
        count: pairs in each data set.
        steps: optimiser steps where the reference lags.
        progress: called with (settings done, settings in all).

    Returns:
        Rows with "ablation" and "setting". Learned ones have the mean "value" and "multiplier", "primary", "slack"
        (worst, against the structure's own thresholds), "kl" (to the first reference) and "primal" with intervals,
        and, where the setting makes a problem that can be solved, "exact", its solution, and "distance", the total
        variation to it; "lost" says that on average a threshold is missed by more than :data:`TOLERANCE`, so that the
        row's primary win rate is no achievement. Robustness has the exact solution at each radius and whether there is
        one.
    """
    learned = len(TAUS) + (len(T0S) - 1) * len(BETAS) + 1 + len(DUAL_STEPS) + 1 + len(NOISE)
    total, done = len(structures) * learned + 2 * len(RADII), 0
    instances: list[list[dict[str, Any]]] = []
    for structure in structures:
        task = Task(structure, tuple(sample_pairs(structure, count, seed) for seed in seeds))
        parts = (
            _tau_rows(task),
            _reference_rows(task, steps, LAG_SHARE * LAG_STEPS / steps),
            _dual_rows(task),
            _noise_rows(task, count, seeds),
        )
        instances.append([])
        for part in parts:
            for row in part:
                instances[-1].append(row)
                progress(done := done + 1, total)
    rows = [_merged(same) for same in zip(*instances, strict=True)]
    for row in _robustness_rows(structures[0]):
        rows.append(row)
        progress(done := done + 1, total)
    return [{"structure": structures[0].name, **row} for row in rows]
