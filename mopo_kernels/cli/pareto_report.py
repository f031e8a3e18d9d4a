"""What `mopo pareto` found: plain values for JSON, and tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mopo_kernels
from mopo_kernels.tabular import NamedProblem, ParetoFront, TabularSolution
from mopo_kernels.tabular.explore import ThresholdGrid

Array = npt.NDArray[np.float64]

# What a user who has preferences should know of the figures.
SCALES = (
    "thresholds here are win rates, as for `mopo train --estimator snis` or closed_form; the same policy has the "
    "values under 'pair scale' for its default estimator"
)
_SHOWN_ROWS = 40


@dataclasses.dataclass(frozen=True)
class Findings:
    """The solution at the chosen thresholds, the one without, what is attainable (K,), the front along each threshold
    alone, and that over a grid."""

    solution: TabularSolution
    free: TabularSolution
    best: Array
    sweeps: dict[str, ParetoFront]
    grid: ThresholdGrid
    front: ParetoFront


def report_findings(file: str, named: NamedProblem, found: Findings) -> dict[str, Any]:
    """Everything the command found, as plain values for JSON; NaN is null."""
    problem, chosen = named.problem, named.thresholds

    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    def by_name(values: Array) -> dict[str, float | None]:
        return {name: number(value) for name, value in zip(named.objectives, values, strict=True)}

    def solved(result: TabularSolution) -> dict[str, Any]:
        entry = {
            "multiplier": by_name(result.multiplier),
            "value": by_name(result.value),
            "constraint_value": by_name(result.constraint_value),
            "kl": result.kl,
            "primal": result.primal,
            "kkt_residual": result.kkt_residual,
            "gap": result.gap,
        }
        if named.labels is not None:
            entry["pair_satisfaction"] = by_name(named.pair_satisfaction(result.policy))
        return entry

    def rows(points: ParetoFront) -> list[dict[str, Any]]:
        return [
            {
                "threshold": {name: bound for name, bound in by_name(points.threshold[g]).items() if bound is not None},
                "feasible": bool(points.feasible[g]),
                "nondominated": bool(points.nondominated[g]),
                "multiplier": by_name(points.multiplier[g]),
                "value": by_name(points.value[g]),
                "kl": number(points.kl[g]),
                "primal": number(points.primal[g]),
                "best_worst_slack": number(points.best_value[g]),
            }
            for g in range(len(points.threshold))
        ]

    return {
        "file": file,
        "kind": "problem" if named.labels is None else "preferences",
        "objectives": list(named.objectives),
        "primary": named.primary,
        "tau": problem.tau,
        "robustness": problem.robustness,
        "prompts": problem.reference.shape[0],
        "responses": int(problem.support.sum()),
        "reference": by_name(problem.value(problem.reference)),
        "best_attainable": by_name(found.best),
        "without_thresholds": solved(found.free),
        "chosen": None
        if not chosen
        else {"threshold": dict(chosen), **solved(found.solution), "policy": found.solution.policy.tolist()},
        "front": rows(found.front),
        "sweeps": {name: rows(sweep) for name, sweep in found.sweeps.items()},
        "hypervolume": found.front.hypervolume,
        "reference_point": by_name(found.front.reference_point),
        "versions": {"mopo-kernels": mopo_kernels.__version__, "numpy": np.__version__},
    }


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _objective_table(report: dict[str, Any]) -> Table:
    """What there is to have of every objective, and at the chosen thresholds what it costs."""
    free, chosen = report["without_thresholds"], report["chosen"]
    size = f"{report['prompts']} prompts, {report['responses']} responses, tau {report['tau']:g}"
    if report["robustness"] > 0:
        size += f", robustness {report['robustness']:g} nats"
    result = chosen or free
    table = _table(
        escape(f"{Path(report['file']).name}: {size}"),
        f"Win rates, 0.5 is parity. {'At the thresholds' if chosen else 'Without thresholds'}: KL {result['kl']:.4f} "
        f"nats, {escape(report['primary'])} - tau KL {result['primal']:.4f}.",
    )
    table.add_column("objective", overflow="fold")
    headings = ["reference", "no thresholds", "best attainable"]
    if chosen:
        headings += ["threshold", "multiplier", "solution"]
    pair = "pair_satisfaction" in result
    if pair:
        headings.append("pair scale")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for name in report["objectives"]:
        values = [report["reference"][name], free["value"][name], report["best_attainable"][name]]
        if chosen:
            values += [chosen["threshold"].get(name), chosen["multiplier"][name], chosen["value"][name]]
        if pair:
            values.append(result["pair_satisfaction"][name])
        label = f"{name} (maximised)" if name == report["primary"] else name
        table.add_row(escape(label), *(_cell(value) for value in values))
    return table


def _front_table(report: dict[str, Any]) -> Table:
    rows = report["front"]
    held = [name for name in report["objectives"] if any(name in row["threshold"] for row in rows)]
    shown = rows
    if len(rows) > _SHOWN_ROWS:
        # Thresholds that do not bind repeat a solution.
        unique = {tuple(f"{value:.6f}" for value in row["value"].values()): row for row in rows if row["nondominated"]}
        shown = list(unique.values())[:: math.ceil(len(unique) / _SHOWN_ROWS) or 1]
    infeasible = sum(not row["feasible"] for row in rows)
    table = _table(
        f"Front: {len(rows)} settings, {infeasible} cannot be met",
        f"* non-dominated. {len(shown)} of {len(rows)} rows. Hypervolume {report['hypervolume']:.6f}.",
    )
    columns = [f"{name}\nthreshold" for name in held] + [f"{name}\nmultiplier" for name in held]
    columns += [f"{name}\nvalue" for name in report["objectives"]] + [
        "KL\nnats",
        f"{report['primary']}\n- tau KL",
        "\n",
    ]
    for column in columns:
        table.add_column(escape(column), justify="right", overflow="fold")
    for row in shown:
        cells = [_cell(row["threshold"].get(name)) for name in held]
        if row["feasible"]:
            cells += [_cell(row["multiplier"][name]) for name in held]
            cells += [_cell(row["value"][name]) for name in report["objectives"]]
            cells += [_cell(row["kl"]), _cell(row["primal"]), "[green]*[/]" if row["nondominated"] else ""]
        else:
            cells += ["[red]-[/]"] * (len(columns) - len(held))
        table.add_row(*cells)
    return table


def notes_on_grid(grid: ThresholdGrid) -> list[str]:
    """What the front does not show."""
    notes = []
    if grid.flat:
        names = ", ".join(grid.flat)
        notes.append(f"no policy does better on {names} than the one without thresholds: left out of the grid")
    if grid.alone:
        notes.append("with so many thresholds the front is along each alone; --grid POINTS combines them")
    return notes


def print_report(report: dict[str, Any], notes: Sequence[str]) -> None:
    """The tables on stdout, and below them the notes."""
    for table in (_objective_table(report), _front_table(report)):
        # Figures that are cut or folded can't be read: where the terminal is too narrow its own wrapping is better.
        width = Console(width=10_000).measure(table).maximum
        console = Console()
        console.width = max(console.width, width)
        console.print(table)
    console = Console(soft_wrap=True, highlight=False)
    for note in notes:
        console.print(f"note: {escape(note)}")
