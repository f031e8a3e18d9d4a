"""Four pictures: how constraints were held during training, policies between two objectives, the measured front of a
sweep's policies, an exact front.

matplotlib (extra `plot`) is imported when a picture is drawn. Figures are drawn without pyplot, straight into a file,
so no display is needed and the caller's own matplotlib state is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mopo_kernels.evaluation import WinRate

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mopo_kernels.tabular import ParetoFront, TabularSolution

# Okabe and Ito's palette: told apart under every common colour blindness. Vermilion is kept for thresholds.
BLUE, GREEN, VERMILION = "#0072B2", "#009E73", "#D55E00"
_POLICY_COLOURS = (BLUE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^v"
_LIGHT_BLUE, _GREY = "#56B4E9", "0.9"
_DPI = 150


def require_matplotlib() -> None:
    """Raise ImportError naming the extra if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'mopo-kernels[plot]'") from error


def make_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that no window shows."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy_axes(axes: Axes) -> None:
    """Leave out the frame above and to the right, and draw a pale grid behind the curves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [(float(row["step"]), float(row[key])) for row in history if key in row and "step" in row]
    return [step for step, _ in rows], [value for _, value in rows]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values, of fewer at the start."""
    return [sum(values[max(0, end - window) : end]) / (end - max(0, end - window)) for end in range(1, len(values) + 1)]


def plot_training(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    thresholds: Mapping[str, float] | None = None,
    primary: str | None = None,
    title: str | None = None,
) -> Path:
    """Draw satisfaction, threshold and multiplier of every objective over the optimiser steps.

    An objective with a threshold is held; the others are drawn without one and without a multiplier.

    Args:
        history: rows as in transformers' ``trainer_state.json`` (``log_history``), with "step",
            "dual/satisfaction/<objective>" and "dual/standard_error/<objective>", measured on prompts that the loss
            never fits, drawn with a band of two standard errors; where there is none,
            "in_sample/satisfaction/<objective>", drawn pale; "multiplier/<objective>" and, where the threshold moves,
            "threshold/<objective>".
        path: the PNG to write.
        thresholds: objective -> fixed threshold, for those that have none in the history.
        primary: the objective that is maximised, which is drawn first and named so.

    Returns:
        ``path``.

    Raises:
        ValueError: no row holds a satisfaction.
        ImportError: matplotlib is missing.
    """
    held_out, fitted = "dual/satisfaction/", "in_sample/satisfaction/"
    objectives = list(
        dict.fromkeys(
            key.removeprefix(held_out).removeprefix(fitted)
            for row in history
            for key in row
            if key.startswith((held_out, fitted))
        )
    )
    if not objectives:
        raise ValueError(f"history: expected rows with {fitted}<objective>; got {len(history)} rows without")
    fixed = thresholds or {}
    unknown = sorted(set(fixed) - set(objectives))
    if unknown:
        raise ValueError(f"thresholds: expected objectives of the history {objectives}; got {unknown}")
    bounds = {name: _series(history, f"threshold/{name}") for name in objectives}
    objectives.sort(key=lambda name: (name != primary, not (bounds[name][0] or name in fixed)))

    prices = {name: _series(history, f"multiplier/{name}") for name in objectives}
    heights = (3, 2) if any(values for _, values in prices.values()) else (3,)
    figure = make_figure(1.2 + 3.6 * len(objectives), 0.9 + 0.9 * sum(heights))
    grid = figure.subplots(len(heights), len(objectives), squeeze=False, sharex=True, height_ratios=heights)
    for axes in grid[0][1:]:
        axes.sharey(grid[0][0])
        axes.tick_params(labelleft=False)
    for column, name in enumerate(objectives):
        upper, lower = grid[0][column], grid[-1][column]
        steps, values = _series(history, held_out + name)
        if steps:
            error = dict(zip(*_series(history, f"dual/standard_error/{name}"), strict=True))
            upper.plot(steps, values, color=BLUE, linewidth=2.0, label="held-out prompts")
            spread = [2 * error.get(step, math.nan) for step in steps]
            low, high = (
                [value + sign * extra for value, extra in zip(values, spread, strict=True)] for sign in (-1, 1)
            )
            upper.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="2 standard errors")
        else:
            steps, values = _series(history, fitted + name)
            upper.plot(steps, values, color=_LIGHT_BLUE, alpha=0.5, linewidth=1.2, label="training pairs")
            if (window := len(values) // 10) > 1:
                label = f"training pairs, mean of the last {window}"
                upper.plot(steps, _running_mean(values, window), color=_LIGHT_BLUE, linewidth=2.0, label=label)
        upper.axhline(0.5, color="0.45", linestyle=":", linewidth=1.2, label="parity")
        bound_steps, bound = bounds[name]
        if not bound_steps and name in fixed:
            bound_steps, bound = [steps[0], steps[-1]], [fixed[name]] * 2
        if bound_steps:
            upper.plot(bound_steps, bound, color=VERMILION, linestyle="--", linewidth=1.8, label="threshold")
        role = "maximised" if name == primary else "held" if bound_steps else "watched"
        upper.set_title(f"{name} ({role})", fontsize=11)
        multiplier_steps, multiplier = prices[name]
        upper.xaxis.get_major_locator().set_params(integer=True)
        tidy_axes(upper)
        if multiplier:
            lower.plot(multiplier_steps, multiplier, color=GREEN, linewidth=2.0)
            # Not on a shared scale, where the largest would flatten the others.
            lower.set_ylim(0.0, 1.1 * max([*multiplier, 0.01]))
            lower.set_xlabel("optimiser step")
            lower.set_ylabel("multiplier (no unit)")
            tidy_axes(lower)
        else:
            if lower is not upper:
                lower.set_axis_off()
            upper.tick_params(labelbottom=True)
            upper.set_xlabel("optimiser step")
    grid[0][0].set_ylabel("satisfaction (probability)")
    labelled: dict[str, Artist] = {}
    for axes in grid[0]:
        handles, labels = axes.get_legend_handles_labels()
        labelled.update(zip(labels, handles, strict=True))
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def plot_plane(
    points: Mapping[str, Mapping[str, WinRate]],
    path: str | Path,
    *,
    x: str,
    y: str,
    thresholds: Mapping[str, float] | None = None,
    parity: str = "baseline",
    title: str | None = None,
) -> Path:
    """Draw policies in the plane of two objectives' win rates, with intervals, thresholds and parity.

    points: policy name -> objective -> WinRate, as `Comparison.win_rates`. path: the PNG to write.
    x, y: the objectives on the axes. thresholds: objective -> win rate to hold; the side that misses it is shaded.
    parity: name of the policy all the others are compared with, which stands at (0.5, 0.5).
    Returns path. Raises ValueError without points or for an objective a point lacks, ImportError without matplotlib.
    """
    if not points:
        raise ValueError("points: expected at least one policy; got none")
    for name, rates in points.items():
        for option, objective in (("x", x), ("y", y)):
            if objective not in rates:
                raise ValueError(f"{option}: expected an objective of policy {name!r} {list(rates)}; got {objective!r}")
    bounds = {name: bound for name, bound in (thresholds or {}).items() if name in (x, y)}

    figure = make_figure(6.4, 5.8)
    axes = figure.subplots()
    span = _limits(points, x, y, bounds)
    axes.set_xlim(*span[0])
    axes.set_ylim(*span[1])
    for objective, bound in bounds.items():
        line, fill = (axes.axvline, axes.axvspan) if objective == x else (axes.axhline, axes.axhspan)
        fill(span[0 if objective == x else 1][0], bound, color=VERMILION, alpha=0.08, linewidth=0)
        line(
            bound,
            color=VERMILION,
            linestyle="--",
            linewidth=1.6,
            label=f"{objective} threshold {bound:.3g} (missed: shaded)",
        )
    axes.axvline(0.5, color="0.45", linestyle=":", linewidth=1.2)
    axes.axhline(0.5, color="0.45", linestyle=":", linewidth=1.2)
    axes.plot(0.5, 0.5, marker="*", markersize=15, color="0.2", linestyle="none", label=f"{parity} (parity, 0.5)")
    for index, (name, rates) in enumerate(points.items()):
        across, up = rates[x], rates[y]
        axes.errorbar(
            across.mean,
            up.mean,
            xerr=[[across.mean - across.low], [across.high - across.mean]],
            yerr=[[up.mean - up.low], [up.high - up.mean]],
            color=_POLICY_COLOURS[index % len(_POLICY_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=8,
            linestyle="none",
            linewidth=1.8,
            capsize=4,
            label=name,
        )
    rate = next(iter(points.values()))[x]
    axes.set_xlabel(f"{x}: win rate over {parity} (0 to 1)")
    axes.set_ylabel(f"{y}: win rate over {parity} (0 to 1)")
    axes.set_title(title or f"Bars: {rate.confidence:.0%} intervals, {rate.prompts} prompts", fontsize=10)
    tidy_axes(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save_figure(figure, path)


def _limits(
    points: Mapping[str, Mapping[str, WinRate]], x: str, y: str, bounds: Mapping[str, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Axis limits that hold every interval, the thresholds and parity, with a margin, within [0, 1]."""
    limits = []
    for objective in (x, y):
        low = min([0.5, bounds.get(objective, 0.5), *(rates[objective].low for rates in points.values())])
        high = max([0.5, bounds.get(objective, 0.5), *(rates[objective].high for rates in points.values())])
        margin = max(0.02, 0.12 * (high - low))
        limits.append((max(-0.02, low - margin), min(1.02, high + margin)))
    return limits[0], limits[1]


def plot_policies(
    values: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    x: Sequence[str],
    y: str,
    nondominated: Collection[str],
    scale: str,
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    bounds: Mapping[str, Mapping[str, float]] | None = None,
    parity: str | None = None,
    title: str | None = None,
) -> Path:
    """Draw the measured front of several policies: a panel for every objective of `x`, `y` up in each.

    values: policy name -> objective -> what was measured. path: the PNG to write. nondominated: the policies on the
    front, drawn filled; the others are hollow. With one panel a line encloses what the policies attain.
    scale: what the axes measure. intervals: policy name -> objective -> (low, high).
    bounds: policy name -> objective -> its threshold, a tick that is joined to the policy.
    parity: name of the policy that stands at (0.5, 0.5), None for none.
    Returns path. Raises ValueError without policies or objectives or for an objective a policy lacks, ImportError
    without matplotlib.
    """
    if not values or not x:
        raise ValueError(f"values and x: expected at least one policy and objective; got {list(values)} and {list(x)}")
    for name, measured in values.items():
        if missing := [objective for objective in (*x, y) if objective not in measured]:
            raise ValueError(f"values: expected every objective drawn; got none of {missing} for policy {name!r}")
    columns, rows = min(3, len(x)), math.ceil(len(x) / 3)
    legend = math.ceil((len(values) + 2) / columns)
    figure = make_figure(1.0 + 4.6 * columns, 4.4 * rows + 0.25 * legend)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(x) :]:
        axes.set_axis_off()
    for axes, objective in zip(grid.flat, x, strict=False):
        tidy_axes(axes)
        if parity is not None:
            axes.axvline(0.5, color="0.45", linestyle=":", linewidth=1.2)
            axes.axhline(0.5, color="0.45", linestyle=":", linewidth=1.2)
            axes.plot(0.5, 0.5, marker="*", markersize=15, color="0.2", linestyle="none", label=f"{parity} (0.5, 0.5)")
        if len(x) == 1:
            front = sorted((values[name][objective], values[name][y]) for name in nondominated)
            axes.plot(
                [across for across, _ in front],
                [up for _, up in front],
                drawstyle="steps-pre",
                color="0.6",
                linewidth=1.2,
                zorder=1,
                label="attained: below and to the left",
            )
        for index, (name, measured) in enumerate(values.items()):
            across, up = measured[objective], measured[y]
            if (bound := (bounds or {}).get(name, {}).get(objective)) is not None:
                axes.plot([bound, across], [up, up], color=VERMILION, linewidth=1.0, zorder=1)
                tick: dict[str, Any] = {"marker": "|", "color": VERMILION, "linestyle": "none", "markersize": 12}
                axes.plot(bound, up, markeredgewidth=2.0, label="a policy's threshold", **tick)
            span = (intervals or {}).get(name, {})
            ranges = [
                None if key not in span else [[value - span[key][0]], [span[key][1] - value]]
                for key, value in ((objective, across), (y, up))
            ]
            colour = _POLICY_COLOURS[index % len(_POLICY_COLOURS)]
            axes.errorbar(
                across,
                up,
                xerr=ranges[0],
                yerr=ranges[1],
                color=colour,
                marker=_MARKERS[(index + index // len(_POLICY_COLOURS)) % len(_MARKERS)],
                markerfacecolor=colour if name in nondominated else "white",
                markersize=8,
                linestyle="none",
                linewidth=1.4,
                capsize=3,
                label=name if name in nondominated else f"{name} (dominated)",
            )
        axes.set_xlabel(f"{objective}: {scale}")
    for row in grid:
        row[0].set_ylabel(f"{y}: {scale}")
    labelled: dict[str, Artist] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        labelled.update(zip(labels, handles, strict=True))
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    if title:
        figure.suptitle(title, fontsize=11)
    return save_figure(figure, path)


def plot_front(
    front: ParetoFront,
    path: str | Path,
    *,
    objectives: Sequence[str],
    primary: str,
    tau: float,
    sweeps: Mapping[str, ParetoFront],
    boundary: Mapping[str, NDArray[np.float64]],
    reference: Sequence[float] | NDArray[np.float64],
    best: Sequence[float] | NDArray[np.float64],
    solution: TabularSolution | None = None,
    thresholds: Mapping[str, float] | None = None,
    robust: bool = False,
    title: str | None = None,
) -> Path:
    """Draw an exact front: a panel for every secondary objective, over one of its multiplier against its threshold.

    Args:
        front: from :func:`mopo_kernels.tabular.pareto_front`.
        path: the PNG to write.
        objectives: the K names, ``primary`` among them.
        tau: the strength of the KL term, which the vertical axis pays for.
        sweeps: objective -> the front along its own thresholds alone, rising, which is drawn as a curve.
        boundary: objective -> (F, 2) vertices (its win rate, the primary's), by falling primary, of what any policy
            attains: :func:`mopo_kernels.tabular.linear_front` of the two objectives. What lies beyond is shaded.
        reference: (K,) win rates of the reference policy.
        best: (K,) the largest threshold that can be met on its own.
        solution: the optimum at ``thresholds`` (objective -> win rate).
        robust: whether thresholds are compared with a worst case, which is not on the axes; they are then left out
            above.

    Returns:
        ``path``.

    Raises:
        ValueError: a single objective.
        ImportError: matplotlib is missing.
    """
    others = [k for k, name in enumerate(objectives) if name != primary]
    if not others:
        raise ValueError(f"objectives: expected at least two for a front; got {list(objectives)}")
    main = list(objectives).index(primary)
    bounds = thresholds or {}
    columns, blocks = min(4, len(others)), math.ceil(len(others) / 4)
    figure = make_figure(1.0 + 4.4 * columns, 0.9 + 5.6 * blocks)
    grid = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=(3, 2) * blocks)
    for axes in grid.flat:
        axes.set_axis_off()
    drawn = [front, *sweeps.values()]
    level = np.concatenate([points.primal[points.feasible] for points in drawn] + [[reference[main]]])
    top = max(edge[:, 1].max() for edge in boundary.values())
    margin = 0.06 * (top - level.min()) + 1e-3
    star: dict[str, Any] = {"marker": "*", "color": VERMILION, "markersize": 16, "markeredgecolor": "white"}
    for place, k in enumerate(others):
        upper, lower = grid[2 * (place // 4)][place % 4], grid[2 * (place // 4) + 1][place % 4]
        name, bound = objectives[k], bounds.get(objectives[k])
        edge, sweep = boundary[name], sweeps[name]
        values = np.concatenate([points.value[points.feasible, k] for points in (front, sweep)])
        values = np.concatenate([values, edge[-1:, 0], [reference[k]], [] if bound is None else [bound]])
        span = (values.min() - 0.05 * np.ptp(values) - 1e-3, values.max() + 0.06 * np.ptp(values) + 1e-3)
        for axes in (upper, lower):
            axes.set_axis_on()
            tidy_axes(axes)
        upper.set_xlim(*span)
        if robust:
            low, high = np.nanmin(sweep.threshold[:, k]), max(best[k], bound or 0.0)
            span_below = (low - 0.05 * (high - low) - 1e-3, high + 0.06 * (high - low) + 1e-3)
        else:
            span_below = span
        lower.set_xlim(*span_below)
        upper.set_ylim(level.min() - margin, top + margin)
        shade_unattainable(upper, edge, span, top + margin)
        lower.axvspan(best[k], span_below[1], color=_GREY, linewidth=0)
        if len(others) > 1:
            dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "alpha": 0.5}
            seen = front.nondominated
            upper.plot(front.value[seen, k], front.primal[seen], color=_LIGHT_BLUE, label="front on the grid", **dots)
            lower.plot(front.threshold[seen, k], front.multiplier[seen, k], color=_LIGHT_BLUE, **dots)
        curve: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.8}
        upper.plot(
            sweep.value[:, k],
            sweep.value[:, main],
            color=GREEN,
            linewidth=1.4,
            label=f"{primary} on the curve, its KL unpaid",
        )
        moved = "exact front" if len(others) == 1 else "front as this threshold alone moves"
        upper.plot(sweep.value[:, k], sweep.primal, color=BLUE, label=moved, **curve)
        upper.plot(reference[k], reference[main], marker="s", color="0.2", linestyle="none", label="reference policy")
        lower.plot(sweep.threshold[:, k], sweep.multiplier[:, k], color=BLUE, **curve)
        if bound is not None:
            for axes in (lower,) if robust else (upper, lower):
                axes.axvline(bound, color=VERMILION, linestyle="--", linewidth=1.6, label="chosen threshold")
        if solution is not None:
            upper.plot(solution.value[k], solution.primal, linestyle="none", zorder=5, label="chosen solution", **star)
            if bound is not None:
                lower.plot(bound, solution.multiplier[k], zorder=5, clip_on=False, **star)
        lower.set_ylim(bottom=-0.03 * lower.get_ylim()[1])
        upper.set_title(f"{name} ({'held' if bound is not None else 'watched'})" if bounds else name)
        upper.set_xlabel(f"{name}: win rate (0 to 1)")
        lower.set_xlabel(f"{name}: threshold{' (worst case)' if robust else ''}")
    for row in range(blocks):
        grid[2 * row][0].set_ylabel(f"{primary} (maximised):\nwin rate - {tau:g} KL")
        grid[2 * row + 1][0].set_ylabel("multiplier (no unit)")
    handles, labels = [], []
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, 1 + columns), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title)
    return save_figure(figure, path)


def shade_unattainable(axes: Axes, edge: NDArray[np.float64], span: tuple[float, float], top: float) -> None:
    """Shade what lies above or to the right of an edge (F, 2) of falling heights."""
    across = np.concatenate([[span[0]], np.maximum(edge[:, 0], span[0]), [edge[-1, 0], span[1]]])
    up = np.concatenate([[edge[0, 1]], edge[:, 1], [-1.0, -1.0]])
    axes.fill_between(across, up, top, color=_GREY, linewidth=0, label="no policy attains this, at any KL")
    axes.plot(across[:-1], up[:-1], color="0.55", linewidth=1.2)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG, its folder made if need be, no text of it read as a formula; returns ``path``."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # A "$" in a name is no formula.
        text.set_parse_math(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DPI)
    return path
