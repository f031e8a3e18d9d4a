"""`mopo pareto`: the exact front of a finite problem, or of the labels of a preference file, and its multipliers.

scipy, moocore, matplotlib and the data loaders are imported when the command runs.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import numpy.typing as npt
import typer

from mopo_kernels.cli.output import count_rows, fail
from mopo_kernels.files import prepare_file
from mopo_kernels.mappings import parse_mappings

if TYPE_CHECKING:
    from mopo_kernels.cli.pareto_report import Findings
    from mopo_kernels.tabular import NamedProblem

Array = npt.NDArray[np.float64]


def exact_front(
    file: Annotated[
        str,
        typer.Argument(
            help="A finite problem (.json, .npz), or preferences: a file, folder or hub name.",
            show_default=False,
        ),
    ],
    primary: Annotated[str | None, typer.Option(help="The maximised objective. Default: the file's, or its first.")] = (
        None
    ),
    thresholds: Annotated[
        list[str] | None,
        typer.Option(help="Lowest win rates: name=0.45,other=0.5; may be repeated. Default: the file's."),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="KL weight, win rate per nat. Default: the file's, or that of `mopo train`, 0.1."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="Thresholds of the front: points along each objective, or name=START:STOP:POINTS; may be repeated."
        ),
    ] = None,
    robustness: Annotated[
        float | None, typer.Option(help="Radius of the KL ball of the robust constraint, nats. Default: the file's, 0.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the front.")] = None,
    format: Annotated[str | None, typer.Option(help="Of preferences: auto, canonical, trl, hh-rlhf, ...")] = None,
    split: Annotated[str | None, typer.Option(help="Of preferences, when there are several splits.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="The preferences' own names of columns: prompt=question,system=persona.")
    ] = None,
    group: Annotated[bool, typer.Option("--group", help="Join the preference examples that share a prompt.")] = False,
) -> None:
    """Solve a finite problem exactly: its Pareto front, and the multipliers for chosen thresholds.

    A finite problem is a JSON object, or an .npz file, with win_rate (K, X, Y) or preference (K, X, Y, Y), for K
    objectives, X prompts and Y responses, null where a prompt has fewer. It may have objectives (their names), primary,
    thresholds, tau, robustness, prompt_weight (X), reference (X, Y) and, with preference, behaviour (X, Y); both are
    uniform by default.

    Preferences are solved on their own labels and responses, which is where training starts. Thresholds are win rates,
    the scale of the estimators snis and closed_form.
    """
    if importlib.util.find_spec("moocore") is None:
        raise ModuleNotFoundError("fronts need moocore: pip install 'mopo-kernels[pareto]'")
    if plot is not None:
        from mopo_kernels.plots import require_matplotlib

        require_matplotlib()
    from mopo_kernels.cli import pareto_file, pareto_report

    wanted = parse_mappings("--thresholds", thresholds or [])
    content = pareto_file.problem_file(file)
    notes: list[str] = []
    if content is None:
        named, messages = pareto_file.read_preferences(file, format, split, columns, group, primary, tau, robustness)
        notes += [*messages, pareto_report.SCALES]
    else:
        options = {"--format": format, "--split": split, "--columns": columns, "--group": group or None}
        if unused := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"{unused[0]}: expected with preferences alone; got the finite problem {file}")
        named = pareto_file.read_problem(file, content, primary, tau, robustness)
    if wanted:
        named = named.with_thresholds(wanted, "--thresholds")
    count, ranges = _parse_grid(grid or [], named)
    if plot is not None and not named.others:
        raise ValueError(f"--plot: expected two objectives at least to draw a front; got {named.primary!r} alone")
    for option, path in (("--output", output), ("--plot", plot)):
        if path is not None:
            prepare_file(option, path)
    try:
        found = _solve(named, count, ranges)
    except ArithmeticError as error:
        fail(error, status=1)
    report = pareto_report.report_findings(file, named, found)
    if output is not None:
        output.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    if plot is not None:
        from mopo_kernels.plots import plot_front
        from mopo_kernels.tabular.explore import win_rate_boundaries

        plot_front(
            found.front,
            plot,
            objectives=named.objectives,
            primary=named.primary,
            tau=named.problem.tau,
            sweeps=found.sweeps,
            boundary=win_rate_boundaries(named),
            reference=named.problem.value(named.problem.reference),
            best=found.best,
            solution=found.solution if named.thresholds else None,
            thresholds=named.thresholds,
            robust=named.problem.robustness > 0,
            title=Path(file).name,
        )
    pareto_report.print_report(report, [*pareto_report.notes_on_grid(found.grid), *notes])


def _solve(named: NamedProblem, count: int | None, ranges: Mapping[int, Array]) -> Findings:
    """Everything exact; ValueError where the chosen thresholds cannot be met."""
    from mopo_kernels.cli.pareto_report import Findings
    from mopo_kernels.tabular import pareto_front, solve
    from mopo_kernels.tabular.explore import (
        SWEEP_POINTS,
        best_values,
        describe_conflict,
        threshold_grid,
        threshold_sweeps,
    )

    solution = solve(named.with_bounds(named.bounds))
    best = best_values(named)
    if not solution.feasible:
        raise ValueError(f"thresholds: {describe_conflict(named, solution, best)}")
    free = solve(named.with_bounds({}))
    with count_rows("each threshold alone", SWEEP_POINTS * len(named.others)) as advance:
        sweeps = threshold_sweeps(named, best, lambda done, total: advance())
    grid = threshold_grid(named, free, best, sweeps, count, ranges)
    with count_rows("together", len(grid.points)) as advance:
        front = pareto_front(named.problem, grid.points, progress=lambda done, total: advance())
    return Findings(solution, free, best, sweeps, grid, front)


def _parse_grid(options: Sequence[str], named: NamedProblem) -> tuple[int | None, dict[int, Array]]:
    """(points along every objective, {objective: its thresholds})."""
    from mopo_kernels.tabular.named import objective_index

    count: int | None = None
    ranges: dict[int, Array] = {}
    for option in ",".join(options).split(",") if options else []:
        name, equals, value = option.strip().rpartition("=")
        try:
            if not equals:
                count = points = int(value)
            else:
                start, stop, last = value.split(":")
                low, high, points = float(start), float(stop), int(last)
        except ValueError:
            raise ValueError(
                f"--grid: expected a number of points, or name=START:STOP:POINTS; got {option!r}"
            ) from None
        if points < 1:
            raise ValueError(f"--grid: expected at least 1 point; got {points}")
        if equals:
            k = objective_index("--grid", name, named.objectives)
            if name == named.primary:
                raise ValueError(
                    f"--grid: expected none for the primary objective {name!r}, which is maximised; got {value}"
                )
            if not 0 <= low <= high <= 1:
                raise ValueError(f"--grid: expected 0 <= START <= STOP <= 1; got {value} for {name!r}")
            ranges[k] = np.linspace(low, high, points)
    return count, ranges
