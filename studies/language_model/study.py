"""The study: MOPO and its rivals, each tuned on validation prompts in the same way, then judged once on test prompts.

A *candidate* is a policy that a method offers, by its own knobs: aims, weights, factors, checkpoints. For every
threshold vector the candidate of each method with the highest primary on validation is taken, among those that keep
the thresholds there by ``MARGIN`` standard errors. Only what was taken is trained with further seeds, and judged on
test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mopo_kernels.data import PreferenceData
from studies.language_model.jobs import Scale, base_job, judge_job, ratios_job, train_job
from studies.language_model.labels import label_solutions
from studies.language_model.problem import HELD, PRIMARY
from studies.language_model.runs import Run
from studies.language_model.scheduler import Job
from studies.language_model.statistics import Array, rates

MARGIN = 0.5
"""Standard errors by prompt above a threshold that a candidate must have on validation. Of two policies that sit on a
threshold one misses it on other prompts; the rule is the same for every method."""

THRESHOLDS: tuple[dict[str, float], ...] = tuple(
    dict(zip(HELD, bounds, strict=True))
    for bounds in ((0.50, 0.50), (0.48, 0.48), (0.45, 0.50), (0.50, 0.45), (0.45, 0.45), (0.52, 0.52))
)
"""Least win rates over the base of brevity and plain; the last asks for more than the base has."""

METHODS = {
    "mopo": "MOPO",
    "scaled": "unconstrained, scaled down",
    "early": "unconstrained, early-stopped",
    "one_shot": "one-shot dual (fixed multipliers)",
    "scalarised_ipo": "scalarised IPO",
    "scalarised_dpo": "scalarised DPO",
    "sigmoid_dual": "sigmoid loss, dual ascent",
    "modpo": "MODPO",
    "soup": "rewarded soup",
    "mixture": "log-linear mixture",
    "sacpo": "stepwise (SACPO)",
    "single_ipo": "IPO, one objective",
    "single_dpo": "DPO, one objective",
}
"""In the order of their importance to the question, in which a deadline cuts them."""


Multipliers = Mapping[tuple[float, float], tuple[float, float]]
"""Aim for (brevity, plain) -> the labels' own multipliers at it."""

# Candidates of a method that are made before the next method's turn.
_ROUND = 3


@dataclass(frozen=True)
class Settings:
    """What all methods share, and their grids.

    Attributes:
        epochs, tau, learning_rate, lora_rank: of every run; tau is beta of the sigmoid loss.
        aims: thresholds that MOPO, the sigmoid loss with dual ascent, and the one-shot dual are trained for.
        weights: multipliers of (brevity, plain) beside 1 for the primary, for whatever scalarises.
        betas: factors on tau that the sigmoid loss is tried with, as hard labels pull it further than the regression;
            its methods have each of them on the first half of ``aims`` and ``weights``, to have as many candidates.
        factors: on the unconstrained adapter.
        stops: shares of the unconstrained run after which it is stopped.
        seeds: of the final table; choices are made with the first.
    """

    epochs: float = 1
    tau: float = 0.15
    learning_rate: float = 5e-4
    lora_rank: int = 16
    aims: Sequence[tuple[float, float]] = (
        (0.50, 0.50),
        (0.52, 0.52),
        (0.47, 0.50),
        (0.52, 0.48),
        (0.47, 0.47),
        (0.54, 0.54),
        (0.50, 0.52),
        (0.49, 0.49),
    )
    weights: Sequence[tuple[float, float]] = (
        (0.3, 0.1),
        (0.4, 0.1),
        (0.2, 0.1),
        (0.55, 0.1),
        (0.3, 0.25),
        (0.4, 0.25),
        (0.2, 0.25),
        (0.55, 0.25),
    )
    betas: Sequence[float] = (1.0, 3.0)
    factors: Sequence[float] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
    stops: Sequence[float] = (0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
    seeds: Sequence[int] = (0, 1, 2)


SMALL = Settings(
    aims=((0.50, 0.50), (0.54, 0.52), (0.47, 0.50)),
    weights=((0.3, 0.1), (0.4, 0.1), (0.4, 0.25)),
    betas=(1.0,),
    factors=(0.1, 0.2, 0.4),
    stops=(0.1, 0.2, 0.4),
    seeds=(0,),
)
"""For about three hours on 2 CPU cores."""


@dataclass(frozen=True)
class Candidate:
    """A policy that a method offers: what is trained for it, and how the adapters make it.

    Attributes:
        name: unique, without the seed.
        method: a key of ``METHODS``.
        runs: names without the seed -> fields of ``Run``, in the order of their dependence.
        weights: run (or ``run@stop``, a share of it) -> factor on its update.
        mixture: whether the factors are on logits.
    """

    name: str
    method: str
    runs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, float]
    mixture: bool = False


class Study:
    """The candidates, and their jobs for a seed.

    Args:
        settings: the grids.
        scale: how many steps, prompts and samples.
        multipliers: by aim, the labels' solution (brevity, plain), for the one-shot dual.
    """

    def __init__(
        self, settings: Settings, scale: Scale, multipliers: Mapping[tuple[float, float], tuple[float, float]]
    ):
        self.settings, self.scale = settings, scale
        self.candidates = _candidates(settings, multipliers)
        self.by_name = {candidate.name: candidate for candidate in self.candidates}

    def runs(self, candidate: Candidate, seed: int) -> list[Run]:
        """The runs behind a candidate, with names of their own for this seed."""
        found = []
        for name, fields in candidate.runs.items():
            fields = dict(fields)
            for key in ("start", "margins"):
                if key in fields:
                    fields[key] = {f"{other}.s{seed}": factor for other, factor in fields[key].items()}
            shared = {"tau": self.settings.tau, "method": candidate.method}
            shared |= {"learning_rate": self.settings.learning_rate, "lora_rank": self.settings.lora_rank}
            found.append(self.scale.run(f"{name}.s{seed}", self.settings.epochs, seed=seed, **{**shared, **fields}))
        return found

    def adapters(self, candidate: Candidate, seed: int) -> dict[str, float]:
        """Adapter -> factor of the candidate's policy."""
        total = self.scale.steps(self.settings.epochs)
        found = {}
        for part, factor in candidate.weights.items():
            name, _, stop = part.partition("@")
            step = max(1, round(float(stop or 1) * total))
            found[f"{name}.s{seed}" + (f"/step-{step}" if step < total else "")] = factor
        return found

    def training(self, candidate: Candidate, seed: int) -> list[Job]:
        """Training jobs of a candidate, those of what its rewards need included."""
        jobs: list[Job] = []
        for run in self.runs(candidate, seed):
            jobs += [ratios_job(name) for name in run.margins]
            jobs.append(train_job(run))
        return jobs

    def judging(self, candidate: Candidate, split: str, seed: int) -> Job:
        name = f"{candidate.name}.s{seed}"
        return judge_job(name, self.adapters(candidate, seed), split, self.scale, seed, candidate.mixture)

    def tuning(self) -> list[Job]:
        """Every candidate trained with the first seed and judged on validation: round after round through the methods,
        so that a deadline leaves as many candidates to each."""
        queues = {method: [c for c in self.candidates if c.method == method] for method in METHODS}
        jobs = [base_job("validation", self.scale)]
        while any(queues.values()):
            for queue in queues.values():
                for candidate in queue[:_ROUND]:
                    jobs += [*self.training(candidate, self.first), self.judging(candidate, "validation", self.first)]
                del queue[:_ROUND]
        return unique(jobs)

    def about(self) -> dict[str, Any]:
        """What the report needs beside the results."""
        return {
            "settings": asdict(self.settings),
            "scale": asdict(self.scale),
            "margin": MARGIN,
            "thresholds": [dict(thresholds) for thresholds in THRESHOLDS],
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }

    @property
    def first(self) -> int:
        return self.settings.seeds[0]

    def choices(self, found: Mapping[str, Mapping[str, Any]]) -> list[Choice]:
        """For every method and threshold vector, the candidate to be judged on test: from validation results alone."""
        methods = {candidate.name: candidate.method for candidate in self.candidates}
        return choices(found, methods, THRESHOLDS, self.first, MARGIN)

    def testing(self, found: Mapping[str, Mapping[str, Any]]) -> list[Job]:
        """What was chosen, judged on test: first of all with the seed it was chosen with, then trained with others."""
        names = list(dict.fromkeys(choice.candidate for choice in self.choices(found)))
        names.sort(key=lambda name: list(METHODS).index(self.by_name[name].method))
        jobs = [base_job("test", self.scale)]
        for seed in self.settings.seeds:
            for name in names:
                candidate = self.by_name[name]
                jobs += [*self.training(candidate, seed), self.judging(candidate, "test", seed)]
        return unique(jobs)


@dataclass(frozen=True)
class Choice:
    """The candidate of a method for a threshold vector; ``kept``: whether the rule's thresholds were kept on
    validation; ``among``: how many candidates there were."""

    method: str
    thresholds: Mapping[str, float]
    candidate: str
    kept: bool
    among: int


def choose(
    by_prompt: Mapping[str, Mapping[str, Array]], thresholds: Mapping[str, float], margin: float = MARGIN
) -> tuple[str, bool]:
    """The candidate with the highest primary among those that keep the thresholds by ``margin`` standard errors; where
    none does, the one whose worst slack is largest, and False.

    Args:
        by_prompt: candidate -> objective -> (X,) win rates by prompt.
    """

    def worst(name: str) -> float:
        slacks = []
        for objective, bound in thresholds.items():
            value = by_prompt[name][objective]
            error = float(value.std(ddof=1) / np.sqrt(len(value)))
            slacks.append(float(value.mean()) - bound - margin * error)
        return min(slacks)

    keeping = [name for name in by_prompt if worst(name) >= 0]
    if not keeping:
        return max(by_prompt, key=worst), False
    return max(keeping, key=lambda name: float(by_prompt[name][PRIMARY].mean())), True


def choices(
    found: Mapping[str, Mapping[str, Any]],
    methods: Mapping[str, str],
    thresholds: Sequence[Mapping[str, float]],
    seed: int,
    margin: float,
) -> list[Choice]:
    """For every threshold vector and method, what :func:`choose` takes of its candidates, by validation results alone.

    Args:
        found: records by job.
        methods: candidate -> its method.
        seed: of the runs that were tuned.
    """
    base = found.get("base.validation", {}).get("result")
    if base is None:
        return []
    by_prompt: dict[str, dict[str, dict[str, Array]]] = {method: {} for method in METHODS}
    for name, method in methods.items():
        record = found.get(f"{name}.s{seed}.validation", {})
        if "result" in record:
            by_prompt[method][name] = rates(record["result"]["scores"], base["scores"])
    return [
        Choice(method, dict(bounds), *choose(judged, bounds, margin), len(judged))
        for bounds in thresholds
        for method, judged in by_prompt.items()
        if judged
    ]


def unique(jobs: Sequence[Job]) -> list[Job]:
    """The jobs in the order of their first appearance, each once."""
    by_name: dict[str, Job] = {}
    for job in jobs:
        if by_name.setdefault(job.name, job) != job:
            raise ValueError(f"jobs: expected names of their own; got two of {job.name}")
    return list(by_name.values())


def _candidates(settings: Settings, multipliers: Mapping[tuple[float, float], tuple[float, float]]) -> list[Candidate]:
    found: list[Candidate] = []

    def held(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(HELD, values, strict=True))

    def label(values: Sequence[float]) -> str:
        return "-".join(f"{value:g}" for value in values)

    def add(
        method: str,
        name: str,
        runs: Mapping[str, Mapping[str, Any]],
        weights: Mapping[str, float],
        mixture: bool = False,
    ) -> None:
        found.append(Candidate(name, method, runs, weights, mixture))

    def halved(grid: Sequence[tuple[float, float]]) -> list[tuple[tuple[float, float], float]]:
        """A grid's first part with every beta: as many as the grid has."""
        return [(values, beta) for values in grid[: -(-len(grid) // len(settings.betas))] for beta in settings.betas]

    def sigmoid(beta: float) -> dict[str, Any]:
        return {"loss_type": "sigmoid", "tau": beta * settings.tau}

    # Policies of one objective each: candidates of their own, and what others are made of. A run's fields may not
    # depend on the method that asks for it.
    def ipo(objective: str) -> dict[str, dict[str, Any]]:
        fields: dict[str, Any] = {"primary": objective, "method": "single_ipo"}
        if objective == PRIMARY:
            fields["checkpoints"] = [stop * settings.epochs for stop in settings.stops]
        return {f"ipo-{objective}": fields}

    def dpo_name(objective: str, beta: float) -> str:
        return f"dpo-{objective}-b{beta:g}"

    def dpo(objective: str, beta: float) -> dict[str, dict[str, Any]]:
        return {dpo_name(objective, beta): {"primary": objective, "method": "single_dpo", **sigmoid(beta)}}

    free = ipo(PRIMARY)
    for aim in settings.aims:
        name = f"mopo-{label(aim)}"
        add("mopo", name, {name: {"thresholds": held(aim)}}, {name: 1.0})
        name = f"one-shot-{label(aim)}"
        add("one_shot", name, {name: {"multipliers": held(multipliers[aim])}}, {name: 1.0})
    for aim, beta in halved(settings.aims):
        name = f"sigmoid-dual-{label(aim)}-b{beta:g}"
        add("sigmoid_dual", name, {name: {"thresholds": held(aim), **sigmoid(beta)}}, {name: 1.0})
    for factor in settings.factors:
        add("scaled", f"scaled-{factor:g}", free, {f"ipo-{PRIMARY}": factor})
    for stop in settings.stops:
        add("early", f"early-{stop:g}", free, {f"ipo-{PRIMARY}@{stop:g}": 1.0})
    for weights in settings.weights:
        name = f"scalarised-ipo-{label(weights)}"
        add("scalarised_ipo", name, {name: {"multipliers": held(weights)}}, {name: 1.0})
        share = 1.0 / (1.0 + sum(weights))
        parts = {f"ipo-{objective}": share * weight for objective, weight in {PRIMARY: 1.0, **held(weights)}.items()}
        singles = {run: fields for objective in (PRIMARY, *HELD) for run, fields in ipo(objective).items()}
        add("soup", f"soup-{label(weights)}", singles, parts)
        add("mixture", f"mixture-{label(weights)}", singles, parts, mixture=True)
    for weights, beta in halved(settings.weights):
        name = f"scalarised-dpo-{label(weights)}-b{beta:g}"
        add("scalarised_dpo", name, {name: {"multipliers": held(weights), **sigmoid(beta)}}, {name: 1.0})
        # beta / w_1 with weights that sum to 1, and the rewards beta r of the others in the margin.
        name = f"modpo-{label(weights)}-b{beta:g}"
        rewards = {run: fields for objective in HELD for run, fields in dpo(objective, beta).items()}
        modpo: dict[str, Any] = sigmoid(beta * (1.0 + sum(weights)))
        modpo["margins"] = {
            dpo_name(objective, beta): beta * settings.tau * weight for objective, weight in held(weights).items()
        }
        add("modpo", name, {**rewards, name: modpo}, {name: 1.0})
        # After the first objective's step one on the next, whose own regularisation is beta over its multiplier.
        start, first, second = (
            dpo_name(PRIMARY, beta),
            f"sacpo-{weights[0]:g}-b{beta:g}",
            f"sacpo-{label(weights)}-b{beta:g}",
        )
        runs: dict[str, dict[str, Any]] = {
            **dpo(PRIMARY, beta),
            first: {"primary": HELD[0], **sigmoid(beta / weights[0]), "start": {start: 1.0}},
            second: {"primary": HELD[1], **sigmoid(beta / weights[1]), "start": {start: 1.0, first: 1.0}},
        }
        add("sacpo", second, runs, {start: 1.0, first: 1.0, second: 1.0})
    for objective in (PRIMARY, *HELD):
        add("single_ipo", f"single-ipo-{objective}", ipo(objective), {f"ipo-{objective}": 1.0})
        for beta in settings.betas:
            name = dpo_name(objective, beta)
            add("single_dpo", f"single-{name}", dpo(objective, beta), {name: 1.0})
    return found


def label_multipliers(data: PreferenceData, settings: Settings) -> Multipliers:
    """The exact dual's solution on the labels of the pairs that the loss fits, for every aim."""
    found = {}
    for aim in settings.aims:
        solution = label_solutions(data, PRIMARY, dict(zip(HELD, aim, strict=True)), settings.tau, data.objectives)
        brevity, plain = (round(solution["multiplier"][name], 4) for name in HELD)
        found[aim] = (brevity, plain)
    return found
