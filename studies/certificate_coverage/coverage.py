"""How often certificates are wrong on the 13 canonical structures, where every win rate is known.

    python -m studies.certificate_coverage      # 200 instances a structure, a few minutes on one core
    python -m studies.certificate_coverage --structures condorcet_within shifted_reference --instances 50

An instance is a data set of its own. Candidates are learned from ``--pairs`` labelled pairs: exact solutions on the
labels' own win rates, with every threshold raised by each of ``AIMS`` (where the labels allow it). Held-out prompts
have four responses of the behaviour policy each and a label for every pair and objective. What is counted, over
instances:

    wrong     a bound of the policy that aims at the thresholds themselves is above what it has (all held-out prompts)
    certified of the candidates the one chosen on one half of the prompts is certified on the other half
    false     it is certified and misses a threshold, by however little
    naive     the policy with the most of the primary objective, among those whose estimates on all held-out prompts
              keep every threshold, misses one: choice and measurement on the same prompts, without bounds
    refused   no certificate is given, whatever the bounds

and how far the certified ones' win rates of the primary objective are below the exact optimum's at the thresholds, on
average (above it where raised thresholds serve the primary as well). The thresholds are the structures' own: the
optimum lies exactly on those that bind. On ``shifted_reference`` another policy than the reference wrote the responses,
which the bounds assume it did not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from bench.provenance import provenance
from mopo_kernels import naive
from mopo_kernels.certify import PromptSums, certificate, certify
from mopo_kernels.tabular import TabularProblem, solve
from studies.canonical_structures.learning import Pools, sample_pools
from studies.canonical_structures.pairs import Pairs, sample_pairs
from studies.canonical_structures.structures import STRUCTURES, Structure, make

Array = npt.NDArray[np.float64]

# What candidates aim at, above the thresholds.
AIMS = (0.0, 0.01, 0.02, 0.04, 0.08)
RESPONSES = 4


def labelled_win_rate(structure: Structure, pairs: Pairs) -> Array:
    """(K, X, Y) mean labels of every response against those it was paired with, 1/2 where there is none."""
    shape = structure.reference.shape
    count = np.zeros(shape)
    total = np.zeros((pairs.label.shape[1], *shape))
    for response, label in ((pairs.first, pairs.label), (pairs.second, 1 - pairs.label)):
        np.add.at(count, (pairs.prompt, response), 1.0)
        for k in range(len(total)):
            np.add.at(total[k], (pairs.prompt, response), label[:, k])
    return np.where(count > 0, total / np.maximum(count, 1.0), 0.5)


def learned(structure: Structure, pairs: Pairs) -> list[Array]:
    """A policy (X, Y) for every aim that the labels allow, at least one."""
    win_rate = labelled_win_rate(structure, pairs)
    solutions = [
        solve(
            TabularProblem(
                win_rate=win_rate,
                reference=structure.reference,
                tau=structure.tau,
                thresholds={k: min(bound + aim, 1.0) for k, bound in structure.thresholds.items()},
                primary=structure.primary,
                prompt_weight=structure.prompt_weight,
            )
        )
        for aim in AIMS
    ]
    # The first is of the search for a policy that comes near, if even the thresholds themselves cannot be met.
    return [solutions[0].policy, *(solution.policy for solution in solutions[1:] if solution.feasible)]


def measured(structure: Structure, pools: Pools, policy: Array) -> PromptSums:
    """A pool is a prompt: what each adds to the importance-weighted win rates of a policy (X, Y)."""
    prompts, size = pools.response.shape
    first, second = np.triu_indices(size, 1)
    ratio = np.log(policy / structure.reference)[pools.prompt[:, None], pools.response]
    start = np.arange(prompts)[:, None] * size
    pairs = np.stack([(start + first).ravel(), (start + second).ravel()], axis=1)
    label = pools.label.reshape(len(pairs), -1)
    terms = naive.satisfaction_terms(
        torch.from_numpy(ratio.ravel()),
        torch.from_numpy(pairs),
        torch.from_numpy(label),
        torch.ones(len(pairs), dtype=torch.float64),
        "snis",
    )
    value, total = (part.reshape(prompts, len(first), -1).sum(1).numpy() for part in terms)
    return PromptSums(
        structure.objectives, value, total, np.full(prompts, float(size)), np.exp(ratio).sum(1).astype(np.float64)
    )


def rows_of(sums: PromptSums, rows: Sequence[int]) -> PromptSums:
    """The same of some prompts."""
    chosen = list(rows)
    assert sums.importance is not None
    return PromptSums(
        sums.objectives, sums.value[chosen], sums.total[chosen], sums.responses[chosen], sums.importance[chosen]
    )


def instance(structure: Structure, seed: int, pairs: int, prompts: int, confidence: float) -> dict[str, Any]:
    """What became of one data set."""
    names, primary = structure.objectives, structure.primary
    policies = learned(structure, sample_pairs(structure, pairs, seed))
    held = sample_pools(structure, prompts * math.comb(RESPONSES, 2), RESPONSES, seed)
    sums = [measured(structure, held, policy) for policy in policies]
    truth = structure.value(np.stack(policies))
    thresholds = {names[k]: bound for k, bound in structure.thresholds.items()}

    def misses(index: int) -> bool:
        return any(truth[index, k] < bound for k, bound in structure.thresholds.items())

    whole = [certificate(each, thresholds, confidence=confidence) for each in sums]
    decision = certify(
        lambda candidate, rows, part: rows_of(sums[candidate], rows),
        len(policies),
        [f"{number:06}" for number in range(prompts)],
        thresholds,
        names[primary],
        confidence=confidence,
        seed=seed,
    )
    values = [sums[index].value[:, primary].sum() / sums[index].total[:, primary].sum() for index in range(len(sums))]
    keeping = [index for index, found in enumerate(whole) if all(b.value >= b.threshold for b in found.bounds)]
    naive = max(keeping, key=lambda index: values[index], default=None)
    first = whole[0]
    certified = decision.certificate.certified
    return {
        "wrong": any(bound.lower > truth[0, names.index(bound.objective)] for bound in first.bounds),
        "refused": bool(decision.certificate.refused),
        "certified": certified,
        "false": certified and misses(decision.chosen),
        "naive": None if naive is None else misses(naive),
        "effective_prompts": min(bound.effective_prompts for bound in decision.certificate.bounds),
        "primary": float(truth[decision.chosen, primary]) if certified else None,
    }


def study(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Shares over the instances of one structure."""
    structure = make(name)
    found = [
        instance(structure, seed, options.pairs, options.prompts, options.confidence)
        for seed in range(options.instances)
    ]
    best = float(solve(structure.problem()).value[structure.primary])
    primaries = [each["primary"] for each in found if each["primary"] is not None]
    naive = [each["naive"] for each in found if each["naive"] is not None]
    shares = {key: float(np.mean([each[key] for each in found])) for key in ("wrong", "certified", "false", "refused")}
    return {
        **shares,
        "naive": float(np.mean(naive)) if naive else None,
        "effective_prompts": float(np.median([each["effective_prompts"] for each in found])),
        "cost": best - float(np.mean(primaries)) if primaries else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies.certificate_coverage", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), metavar="NAME", default=list(STRUCTURES))
    parser.add_argument("--instances", type=int, default=200, help="data sets a structure")
    parser.add_argument("--pairs", type=int, default=5000, help="that policies are learned from")
    parser.add_argument("--prompts", type=int, default=1000, help="held out, with four responses each")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args(arguments)
    if options.instances < 1 or options.prompts < 4:
        parser.error("argument --instances: expected at least 1, and --prompts at least 4")
    torch.set_num_threads(1)
    results = {}
    for name in options.structures:
        results[name] = study(name, options)
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    risk = 1 - options.confidence
    allowed = risk + 2 * math.sqrt(risk * (1 - risk) / options.instances)
    table = Table(title=f"{options.instances} instances a structure; allowed are {allowed:.1%}", title_justify="left")
    columns = ("wrong", "certified", "false", "naive", "refused", "effective_prompts", "cost")
    for heading in ("structure", *columns):
        table.add_column(heading.replace("_", " "), justify="left" if heading == "structure" else "right")
    for name, found in results.items():
        cells = []
        for key in columns:
            form = {"cost": "{:.3f}", "effective_prompts": "{:.0f}"}.get(key, "{:.1%}")
            cells.append("-" if found[key] is None else form.format(found[key]))
        table.add_row(name, *cells)
    Console(width=110).print(table)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    given = sys.argv[1:] if arguments is None else list(arguments)
    report = {
        "settings": settings,
        "allowed": allowed,
        "results": results,
        **provenance("studies.certificate_coverage", given),
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0
