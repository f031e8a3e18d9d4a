"""`mopo pareto`: the exact front of a finite problem, or of the labels of a preference file, and its multipliers.

scipy, moocore, matplotlib and the data loaders are imported when the command runs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mopo_kernels
from mopo_kernels.mappings import parse_mappings

if TYPE_CHECKING:
    from mopo_kernels.data import PreferenceData
    from mopo_kernels.tabular import ParetoFront, TabularProblem, TabularSolution

Array = npt.NDArray[np.float64]

DEFAULT_TAU = 0.1  # that of `mopo train`
# The default grid combines at most so many thresholds, in at most so many points, so many along one of them.
_TOGETHER, _DEFAULT_GRID, _POINTS = 3, 250, 21
_LARGEST_GRID = 20_000
_SHOWN_ROWS = 40
# How far along the way from the value without thresholds to the best attainable one the default grid goes: at the very
# end multipliers are infinite.
_REACH = 0.98
# Stands for tau = 0 where a linear programme is meant: a policy's value is then within tau * KL of the best.
_SMALL_TAU = 1e-4

_ARRAYS = ("win_rate", "preference", "behaviour", "reference", "prompt_weight")
_KEYS = (*_ARRAYS, "objectives", "primary", "thresholds", "tau", "robustness")


@dataclasses.dataclass(frozen=True)
class _Labels:
    """Pairs (P, 2) of responses, counted over the available ones of all prompts, their labels (P, K), weights (P,)."""

    pairs: npt.NDArray[np.int64]
    preference: Array
    weight: Array
    messages: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Input:
    """What a file says, under the options that override it. ``labels``: those of preferences."""

    problem: TabularProblem
    objectives: tuple[str, ...]
    thresholds: dict[str, float]
    labels: _Labels | None = None

    @property
    def primary(self) -> str:
        return self.objectives[self.problem.primary]

    @property
    def others(self) -> list[int]:
        """The objectives that can have a threshold."""
        return [k for k in range(len(self.objectives)) if k != self.problem.primary]

    def with_thresholds(self, thresholds: Mapping[int, float]) -> TabularProblem:
        """The same problem under other thresholds."""
        return self.problem.with_thresholds(thresholds)


@dataclasses.dataclass(frozen=True)
class _Found:
    """The solution at the chosen thresholds, the one without, what is attainable (K,), and the fronts."""

    solution: TabularSolution
    free: TabularSolution
    best: Array
    front: ParetoFront
    sweeps: dict[str, ParetoFront]
    notes: list[str]


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
        float | None, typer.Option(help=f"KL weight, win rate per nat. Default: the file's, or {DEFAULT_TAU}.")
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
    output_json: Annotated[Path | None, typer.Option("--output_json", help="Write everything as JSON.")] = None,
    output_png: Annotated[Path | None, typer.Option("--output_png", help="Draw the front.")] = None,
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
    from mopo_kernels.cli.data import _fail

    if importlib.util.find_spec("moocore") is None:
        raise ModuleNotFoundError("fronts need moocore: pip install 'mopo-kernels[pareto]'")
    if output_png is not None:
        from mopo_kernels.plots import require_matplotlib

        require_matplotlib()
    wanted = parse_mappings("--thresholds", thresholds or [])
    content = _problem_file(file)
    if content is None:
        given = _read_preferences(file, format, split, columns, group, primary, tau, robustness)
    else:
        options = {"--format": format, "--split": split, "--columns": columns, "--group": group or None}
        if unused := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"{unused[0]}: is for preferences, and {file} is a finite problem")
        given = _read_problem(file, content, primary, tau, robustness)
    if wanted:
        given = dataclasses.replace(given, thresholds=_check_thresholds("--thresholds", wanted, given))
    ranges = _parse_grid(grid or [], given)
    if output_png is not None and not given.others:
        raise ValueError(f"--output_png: there is no front to draw with one objective, {given.primary!r}")
    for path in (output_json, output_png):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = _solve(given, *ranges)
    except ArithmeticError as error:
        _fail(error, status=1)
    report = _report(file, given, found)
    if output_json is not None:
        output_json.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    if output_png is not None:
        from mopo_kernels.plots import plot_front

        plot_front(
            found.front,
            output_png,
            objectives=given.objectives,
            primary=given.primary,
            tau=given.problem.tau,
            sweeps=found.sweeps,
            boundary=_boundaries(given),
            reference=_win_rates(given.problem, given.problem.reference),
            best=found.best,
            solution=found.solution if given.thresholds else None,
            thresholds=given.thresholds,
            robust=given.problem.robustness > 0,
            title=Path(file).name,
        )
    _print(report, given, found.notes)


def _solve(given: _Input, count: int | None, ranges: Mapping[int, Array]) -> _Found:
    """Everything exact; ValueError where the chosen thresholds cannot be met."""
    from mopo_kernels.cli.data import _progress
    from mopo_kernels.tabular import pareto_front, solve

    chosen = {given.objectives.index(name): bound for name, bound in given.thresholds.items()}
    solution = solve(given.with_thresholds(chosen))
    best = _best_values(given)
    if not solution.feasible:
        raise ValueError(f"thresholds: {_conflict(given, chosen, solution, best)}")
    free = solve(given.with_thresholds({}))
    with _progress("each threshold alone", _POINTS * len(given.others)) as advance:
        sweeps = _sweeps(given, chosen, best, lambda done, total: advance())
    points, notes = _grid(count, ranges, given, chosen, free, best, sweeps)
    with _progress("together", len(points)) as advance:
        front = pareto_front(given.problem, points, progress=lambda done, total: advance())
    return _Found(solution, free, best, front, sweeps, notes)


# Input


def _problem_file(file: str) -> dict[str, Any] | None:
    """The fields of a finite problem, None where the file is something for load_preferences."""
    path = Path(file)
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: _plain(archive[name]) for name in archive.files}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file}: not a readable .npz file of plain arrays: {error}") from error
    if path.suffix != ".json" or path.is_dir():
        return None
    text = path.read_bytes()
    if not text.strip():
        raise ValueError(f"{file}: is empty")
    try:
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not valid UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None  # JSON Lines
        raise ValueError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    # Preferences can be one row, or an array of rows.
    return content if isinstance(content, dict) and "responses" not in content else None


def _plain(array: npt.NDArray[Any]) -> Any:
    """Names and numbers of an archive as JSON would have them."""
    return array if array.dtype.kind != "U" and array.ndim else array.tolist()


def _numbers(name: str, value: Any, dimensions: str) -> Array:
    """Nested lists as an array, null as NaN; ``dimensions`` are its letters."""
    expected = f"{name}: expected nested lists of numbers ({', '.join(dimensions)})"
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{expected}, null where a prompt has fewer responses; got lists of unequal lengths") from None
    if array.ndim != len(dimensions) or array.size == 0:
        raise ValueError(f"{expected}; got shape {array.shape}")
    if array.dtype.kind == "O":
        wrong = next((item for item in array.flat if item is not None and type(item) not in (int, float)), None)
        if wrong is not None:
            raise ValueError(f"{expected}; got {wrong!r}")
    elif array.dtype.kind not in "fiu":
        raise ValueError(f"{expected}; got {array.flat[0].item()!r}")
    return array.astype(np.float64)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number; got {value!r}")
    return float(value)


def _read_problem(
    file: str, content: Mapping[str, Any], primary: str | None, tau: float | None, robustness: float | None
) -> _Input:
    """A finite problem from the fields of its file."""
    try:
        return _build_problem(content, primary, tau, robustness)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _build_problem(
    content: Mapping[str, Any], primary: str | None, tau: float | None, robustness: float | None
) -> _Input:
    from mopo_kernels.tabular import TabularProblem

    if unknown := [name for name in content if name not in _KEYS]:
        raise ValueError(f"{unknown[0]}: not a field of a finite problem, which has {', '.join(_KEYS)}")
    if ("win_rate" in content) == ("preference" in content):
        raise ValueError(
            f"expected either win_rate or preference; got {'both' if 'win_rate' in content else 'neither'}"
        )
    letters = {"win_rate": "KXY", "preference": "KXYY", "behaviour": "XY", "reference": "XY", "prompt_weight": "X"}
    arrays = {name: _numbers(name, content[name], letters[name]) for name in _ARRAYS if name in content}
    if "win_rate" in arrays and "behaviour" in arrays:
        raise ValueError("behaviour: goes with preference, and win_rate was given")
    # A response that nobody has judged is padding.
    rates = arrays["win_rate"] if "win_rate" in arrays else np.nanmax(arrays["preference"], 3, initial=-np.inf)
    available: npt.NDArray[np.bool_] = np.asarray(np.isfinite(rates).any(0), dtype=np.bool_)
    if not available.any(1).all():
        raise ValueError(f"prompt {int(np.argmin(available.any(1)))} has no response with a number")
    uniform = available / available.sum(1, keepdims=True)
    arrays.setdefault("reference", uniform)
    if "preference" in arrays:
        arrays.setdefault("behaviour", uniform)
    count = len(rates)
    objectives = _objectives(content.get("objectives"), count)
    name = content.get("primary", objectives[0]) if primary is None else primary
    problem = TabularProblem(
        preference=arrays.get("preference"),
        behaviour=arrays.get("behaviour"),
        reference=arrays["reference"],
        prompt_weight=arrays.get("prompt_weight"),
        win_rate=arrays.get("win_rate"),
        primary=_index("primary", name, objectives),
        tau=_number("tau", content.get("tau", DEFAULT_TAU)) if tau is None else tau,
        robustness=_number("robustness", content.get("robustness", 0.0)) if robustness is None else robustness,
    )
    given = _Input(problem, objectives, {})
    thresholds = content.get("thresholds", {})
    if not isinstance(thresholds, Mapping):
        raise ValueError(f"thresholds: expected an object of objective to number; got {thresholds!r}")
    named = {key: _number(f"thresholds.{key}", value) for key, value in thresholds.items()}
    return dataclasses.replace(given, thresholds=_check_thresholds("thresholds", named, given))


def _objectives(value: Any, count: int) -> tuple[str, ...]:
    if value is None:
        return tuple(f"objective_{k}" for k in range(count))
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"objectives: expected a list of names; got {value!r}")
    if len(value) != count or len(set(value)) != count:
        raise ValueError(f"objectives: expected {count} different names, one for each; got {', '.join(value)}")
    return tuple(value)


def _index(option: str, name: object, objectives: Sequence[str]) -> int:
    if name not in objectives:
        raise ValueError(f"{option}: expected an objective of {', '.join(objectives)}; got {name!r}")
    return list(objectives).index(str(name))


def _read_preferences(
    file: str,
    format: str | None,
    split: str | None,
    columns: str | None,
    group: bool,
    primary: str | None,
    tau: float | None,
    robustness: float | None,
) -> _Input:
    """The labels of preferences as a finite problem, with the win rates that `mopo train` starts from."""
    from mopo_kernels.cli.data import _progress
    from mopo_kernels.data import load_preferences, win_rates
    from mopo_kernels.tabular import TabularProblem

    with _progress("reading") as advance:
        data = load_preferences(
            file, format=format or "auto", split=split, columns=columns, group=group, progress=advance
        )
    rates = win_rates(data)
    problem = TabularProblem(
        win_rate=rates.win_rate,
        reference=rates.reference,
        prompt_weight=rates.prompt_weight,
        tau=DEFAULT_TAU if tau is None else tau,
        primary=0 if primary is None else _index("--primary", primary, data.objectives),
        robustness=robustness or 0.0,
    )
    return _Input(problem, data.objectives, {}, _labels(data, problem.support))


def _labels(data: PreferenceData, support: npt.NDArray[np.bool_]) -> _Labels:
    from mopo_kernels.data import summarize

    number = np.cumsum(support).reshape(support.shape) - 1
    pairs, preference, weight = [], [], []
    # The columns as they are stored: a second validation of every row would cost more than the rest.
    for x, row in enumerate(data.dataset.select_columns(["pairs", "weight"])):
        for pair in row["pairs"]:
            pairs.append((number[x, pair["i"]], number[x, pair["j"]]))
            preference.append([pair["preference"][name] for name in data.objectives])
            weight.append(row["weight"])
    return _Labels(
        np.array(pairs, dtype=np.int64),
        np.array(preference, dtype=np.float64),
        np.array(weight, dtype=np.float64),
        summarize(data).messages,
    )


def _check_thresholds(option: str, thresholds: Mapping[str, float], given: _Input) -> dict[str, float]:
    """The thresholds in the order of the objectives, once each is for a secondary objective and within [0, 1]."""
    for name, bound in thresholds.items():
        _index(option, name, given.objectives)
        if name == given.primary:
            raise ValueError(f"{option}: the primary objective {name!r} is maximised and can have none; got {bound}")
        if not 0 <= bound <= 1:
            raise ValueError(f"{option}: expected win rates in [0, 1]; got {bound} for {name!r}")
    return {name: thresholds[name] for name in given.objectives if name in thresholds}


# Grid


def _best_values(given: _Input) -> Array:
    """(K,) the largest value of each objective that any policy attains, as thresholds are compared with it."""
    from mopo_kernels.tabular import solve

    problem = given.problem
    highest = np.where(problem.support, problem.win_rate, -np.inf).max(2) @ problem.prompt_weight
    if problem.robustness > 0:
        for k in given.others:
            shortfall = solve(given.with_thresholds({k: 1.0})).best_value
            highest[k] = 1.0 + (shortfall or 0.0)
    return np.asarray(highest, dtype=np.float64)


def _grid(
    count: int | None,
    ranges: Mapping[int, Array],
    given: _Input,
    chosen: Mapping[int, float],
    free: TabularSolution,
    best: Array,
    sweeps: Mapping[str, ParetoFront],
) -> tuple[Array, list[str]]:
    """(G, K) thresholds, NaN for none, and what the user should know about them.

    Every combination of ``ranges`` and, for the objectives that these leave out, of ``count`` points over the span that
    matters; without a count they have these only if ``ranges`` is empty, and are held at their chosen thresholds else.
    """
    rest = [k for k in given.others if k not in ranges] if count is not None or not ranges else []
    low, high = _span(given, free, best, rest)
    notes = []
    if flat := [k for k in rest if high[k] - low[k] < 1e-6]:
        names = ", ".join(given.objectives[k] for k in flat)
        notes.append(f"no policy does better on {names} than the one without thresholds: left out of the grid")
        rest = [k for k in rest if k not in flat]
    if count is None and len(rest) > _TOGETHER:
        notes.append(f"with {len(rest)} thresholds the front is along each alone; --grid POINTS combines them")
        return np.concatenate([sweep.threshold for sweep in sweeps.values()]), notes
    if count is None:
        count = min(_POINTS, int(_DEFAULT_GRID ** (1 / max(len(rest), 1)) + 1e-9))
    lines = {k: np.array([chosen.get(k, np.nan)]) for k in given.others}
    lines |= {k: np.linspace(low[k], high[k], count) for k in rest} | dict(ranges)
    size = math.prod(len(line) for line in lines.values())
    if size > _LARGEST_GRID:
        raise ValueError(f"--grid: expected at most {_LARGEST_GRID} points in all; got {size}")
    points = np.full((size, len(given.objectives)), np.nan)
    points[:, list(lines)] = list(itertools.product(*lines.values()))
    return points, notes


def _parse_grid(options: Sequence[str], given: _Input) -> tuple[int | None, dict[int, Array]]:
    """(points along every objective, {objective: its thresholds})."""
    count, ranges = None, {}
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
            k = _index("--grid", name, given.objectives)
            if name == given.primary:
                raise ValueError(f"--grid: the primary objective {name!r} is maximised and can have no thresholds")
            if not 0 <= low <= high <= 1:
                raise ValueError(f"--grid: expected 0 <= START <= STOP <= 1; got {value} for {name!r}")
            ranges[k] = np.linspace(low, high, points)
    return count, ranges


def _span(given: _Input, free: TabularSolution, best: Array, objectives: Sequence[int]) -> tuple[Array, Array]:
    """(K,) ends of the thresholds that matter: below the lower no front point lies, above the upper none is attainable.

    The lower is the least value that an objective has when none of the others, or one of them, is asked for as much
    as the upper end.
    """
    from mopo_kernels.tabular import solve

    floor = free.value.copy()
    if given.problem.robustness > 0:
        floor = solve(given.with_thresholds(dict.fromkeys(given.others, 0.0))).constraint_value.copy()
    high = floor + _REACH * np.maximum(best - floor, 0.0)
    low = floor.copy()
    for k in objectives if len(objectives) > 1 else []:
        bounds = dict.fromkeys(given.others, 0.0) | {k: float(high[k])}
        low = np.minimum(low, solve(given.with_thresholds(bounds)).constraint_value)
    return np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)


def _sweeps(
    given: _Input, chosen: Mapping[int, float], best: Array, progress: Callable[[int, int], object]
) -> dict[str, ParetoFront]:
    """For every secondary objective the front along its thresholds alone, the others' as chosen.

    From the value it has anyway to just below the most that the others leave it.
    """
    from mopo_kernels.tabular import pareto_front, solve

    sweeps = {}
    for k in given.others:
        held = {j: bound for j, bound in chosen.items() if j != k}
        low = float(solve(given.with_thresholds(held | {k: 0.0})).constraint_value[k])
        most = _most(given, k, held)
        high = low + _REACH * max((best[k] if most is None else most) - low, 0.0)
        points = np.full((_POINTS, len(given.objectives)), np.nan)
        points[:, list(held)] = list(held.values())
        points[:, k] = np.linspace(low, min(high, 1.0), _POINTS)
        sweeps[given.objectives[k]] = pareto_front(given.problem, points, progress=progress)
    return sweeps


# What cannot be met


def _conflict(given: _Input, thresholds: Mapping[int, float], solution: TabularSolution, best: Array) -> str:
    """Which of the thresholds cannot be met, alone or together, and what each of their objectives reaches at best."""

    def wanted(k: int) -> str:
        return f"{given.objectives[k]} >= {thresholds[k]:g}"

    if alone := [k for k in thresholds if thresholds[k] > best[k]]:
        parts = [f"{wanted(k)} cannot be met: no policy attains more than {_floor(best[k])}" for k in alone]
        return "; ".join(parts)
    clashing = solution.conflict
    reached = []
    for k in clashing:
        most = _most(given, k, {j: thresholds[j] for j in clashing if j != k})
        held = "" if most is None else f"{_floor(most)} with the {'others' if len(clashing) > 2 else 'other'} met, "
        reached.append(f"{given.objectives[k]} reaches at most {held}{_floor(best[k])} alone")
    assert solution.best_value is not None
    lowered = math.ceil(-1e3 * solution.best_value) / 1e3
    return (
        f"{' and '.join(map(wanted, clashing))} cannot be met together: {'; '.join(reached)}; all thresholds can be "
        f"met once lowered by {lowered:.3f}"
    )


def _most(given: _Input, k: int, held: Mapping[int, float]) -> float | None:
    """Largest value of objective k with the thresholds ``held`` met; None where they cannot be, or it is not known."""
    from mopo_kernels.tabular import TabularProblem, solve

    problem = given.problem
    if problem.robustness > 0:
        # The worst case of k is not linear in the policy, and cannot be the maximised objective.
        return None
    found = solve(
        TabularProblem(
            win_rate=problem.win_rate,
            reference=problem.reference,
            tau=_SMALL_TAU,
            thresholds=held,
            primary=k,
            prompt_weight=problem.prompt_weight,
        )
    )
    return float(found.value[k]) if found.feasible else None


def _floor(value: float) -> str:
    """Three decimals, rounded down: what is printed as attainable is."""
    return f"{math.floor(value * 1e3 + 1e-6) / 1e3:.3f}"


# Output


def _win_rates(problem: TabularProblem, policy: Array) -> Array:
    """(K,) win rates of a policy (X, Y)."""
    return np.asarray(np.einsum("kxy,xy->kx", problem.win_rate, policy) @ problem.prompt_weight, dtype=np.float64)


def _pair_satisfaction(given: _Input, policy: Array) -> Array:
    """(K,) what the estimator "pair", the default of `mopo train`, measures of a policy (X, Y) on the labels."""
    import torch

    from mopo_kernels import mopo_loss

    assert given.labels is not None
    support = given.problem.support
    ratio = np.log(np.maximum(policy[support], 1e-300)) - np.log(given.problem.reference[support])
    log_ratio = torch.from_numpy(ratio)
    output = mopo_loss(
        log_ratio,
        torch.zeros_like(log_ratio),
        torch.from_numpy(given.labels.pairs),
        torch.from_numpy(given.labels.preference),
        torch.ones(len(given.objectives), dtype=torch.float64),
        tau=given.problem.tau,
        pair_weight=torch.from_numpy(given.labels.weight),
        estimator="pair",
    )
    return np.asarray(output.satisfaction, dtype=np.float64)


def _boundaries(given: _Input) -> dict[str, Array]:
    """For every secondary objective the edge (F, 2) of the pairs (its, the primary's win rate) that policies attain."""
    from mopo_kernels.tabular import TabularProblem, linear_front

    problem = given.problem
    edges = {}
    for k in given.others:
        plane = TabularProblem(
            win_rate=problem.win_rate[[problem.primary, k]],
            reference=problem.reference,
            tau=problem.tau,
            prompt_weight=problem.prompt_weight,
        )
        edges[given.objectives[k]] = linear_front(plane).value[:, ::-1]
    return edges


def _report(file: str, given: _Input, found: _Found) -> dict[str, Any]:
    """Everything the command found, as plain values for JSON; NaN is null."""
    problem, chosen = given.problem, given.thresholds

    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    def named(values: Array) -> dict[str, float | None]:
        return {name: number(value) for name, value in zip(given.objectives, values, strict=True)}

    def solved(result: TabularSolution) -> dict[str, Any]:
        entry = {
            "multiplier": named(result.multiplier),
            "value": named(result.value),
            "constraint_value": named(result.constraint_value),
            "kl": result.kl,
            "primal": result.primal,
            "kkt_residual": result.kkt_residual,
            "gap": result.gap,
        }
        if given.labels is not None:
            entry["pair_satisfaction"] = named(_pair_satisfaction(given, result.policy))
        return entry

    def rows(points: ParetoFront) -> list[dict[str, Any]]:
        return [
            {
                "threshold": {name: bound for name, bound in named(points.threshold[g]).items() if bound is not None},
                "feasible": bool(points.feasible[g]),
                "nondominated": bool(points.nondominated[g]),
                "multiplier": named(points.multiplier[g]),
                "value": named(points.value[g]),
                "kl": number(points.kl[g]),
                "primal": number(points.primal[g]),
                "best_worst_slack": number(points.best_value[g]),
            }
            for g in range(len(points.threshold))
        ]

    return {
        "file": file,
        "kind": "problem" if given.labels is None else "preferences",
        "objectives": list(given.objectives),
        "primary": given.primary,
        "tau": problem.tau,
        "robustness": problem.robustness,
        "prompts": problem.reference.shape[0],
        "responses": int(problem.support.sum()),
        "reference": named(_win_rates(problem, problem.reference)),
        "best_attainable": named(found.best),
        "without_thresholds": solved(found.free),
        "chosen": None
        if not chosen
        else {"threshold": chosen, **solved(found.solution), "policy": found.solution.policy.tolist()},
        "front": rows(found.front),
        "sweeps": {name: rows(sweep) for name, sweep in found.sweeps.items()},
        "hypervolume": found.front.hypervolume,
        "reference_point": named(found.front.reference_point),
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


def _print(report: dict[str, Any], given: _Input, notes: Sequence[str]) -> None:
    for table in (_objective_table(report), _front_table(report)):
        # Figures that are cut or folded can't be read: where the terminal is too narrow its own wrapping is better.
        width = Console(width=10_000).measure(table).maximum
        console = Console()
        console.width = max(console.width, width)
        console.print(table)
    console = Console(soft_wrap=True, highlight=False)
    if given.labels is not None:
        notes = [*notes, *given.labels.messages]
        notes.append(
            "thresholds here are win rates, as for `mopo train --estimator snis` or closed_form; the same policy has "
            "the values under 'pair scale' for its default estimator"
        )
    for note in notes:
        console.print(f"note: {escape(note)}")
