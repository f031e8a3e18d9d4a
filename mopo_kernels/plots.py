"""Two pictures: how the constraints were held during training, and where policies stand between two objectives.

matplotlib (extra `plot`) is imported when a picture is drawn. Figures are drawn without pyplot, straight into a file,
so no display is needed and the caller's own matplotlib state is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopo_kernels.evaluation import WinRate

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart under every common colour blindness. Vermilion is kept for thresholds.
_BLUE, _GREEN, _VERMILION = "#0072B2", "#009E73", "#D55E00"
_POLICY_COLOURS = (_BLUE, _GREEN, "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = "osD^v"
_DPI = 150


def require_matplotlib() -> None:
    """Raise ImportError naming the extra if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'mopo-kernels[plot]'") from error


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
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

    history: rows as in transformers' `trainer_state.json` (`log_history`), with "step", "satisfaction/<objective>",
        "multiplier/<objective>" and, where the threshold moves, "threshold/<objective>".
    path: the PNG to write. thresholds: objective -> fixed threshold, for those that have none in the history.
    primary: the objective that is maximised, which is drawn first and named so.
    An objective with a threshold is held; the others are drawn without one and without a multiplier.
    Returns path. Raises ValueError if no row holds a satisfaction, ImportError without matplotlib.
    """
    prefix = "satisfaction/"
    objectives = list(dict.fromkeys(key[len(prefix) :] for row in history for key in row if key.startswith(prefix)))
    if not objectives:
        raise ValueError(f"history must have rows with {prefix}<objective>, got {len(history)} rows without")
    fixed = thresholds or {}
    unknown = sorted(set(fixed) - set(objectives))
    if unknown:
        raise ValueError(f"thresholds must name objectives of the history {objectives}, got {unknown}")
    bounds = {name: _series(history, f"threshold/{name}") for name in objectives}
    objectives.sort(key=lambda name: (name != primary, not (bounds[name][0] or name in fixed)))

    prices = {name: _series(history, f"multiplier/{name}") for name in objectives}
    heights = (3, 2) if any(values for _, values in prices.values()) else (3,)
    figure = _figure(1.2 + 3.6 * len(objectives), 0.9 + 0.9 * sum(heights))
    grid = figure.subplots(len(heights), len(objectives), squeeze=False, sharex=True, height_ratios=heights)
    for axes in grid[0][1:]:
        axes.sharey(grid[0][0])
        axes.tick_params(labelleft=False)
    for column, name in enumerate(objectives):
        upper, lower = grid[0][column], grid[-1][column]
        steps, values = _series(history, prefix + name)
        window = max(1, len(values) // 10)
        upper.plot(steps, values, color=_BLUE, alpha=0.35 if window > 1 else 1.0, linewidth=1.2, label="as logged")
        if window > 1:
            label = f"mean of the last {window}"
            upper.plot(steps, _running_mean(values, window), color=_BLUE, linewidth=2.0, label=label)
        upper.axhline(0.5, color="0.45", linestyle=":", linewidth=1.2, label="parity")
        bound_steps, bound = bounds[name]
        if not bound_steps and name in fixed:
            bound_steps, bound = [steps[0], steps[-1]], [fixed[name]] * 2
        if bound_steps:
            upper.plot(bound_steps, bound, color=_VERMILION, linestyle="--", linewidth=1.8, label="threshold")
        role = "maximised" if name == primary else "held" if bound_steps else "watched"
        upper.set_title(f"{name} ({role})", fontsize=11)
        multiplier_steps, multiplier = prices[name]
        upper.xaxis.get_major_locator().set_params(integer=True)
        _tidy(upper)
        if multiplier:
            lower.plot(multiplier_steps, multiplier, color=_GREEN, linewidth=2.0)
            # Not on a shared scale, where the largest would flatten the others.
            lower.set_ylim(0.0, 1.1 * max([*multiplier, 0.01]))
            lower.set_xlabel("optimiser step")
            lower.set_ylabel("multiplier (no unit)")
            _tidy(lower)
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
    return _save(figure, path)


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
        raise ValueError("points must hold at least one policy, got none")
    for name, rates in points.items():
        for option, objective in (("x", x), ("y", y)):
            if objective not in rates:
                raise ValueError(f"{option} must be an objective of policy {name!r} {list(rates)}, got {objective!r}")
    bounds = {name: bound for name, bound in (thresholds or {}).items() if name in (x, y)}

    figure = _figure(6.4, 5.8)
    axes = figure.subplots()
    span = _limits(points, x, y, bounds)
    axes.set_xlim(*span[0])
    axes.set_ylim(*span[1])
    for objective, bound in bounds.items():
        line, fill = (axes.axvline, axes.axvspan) if objective == x else (axes.axhline, axes.axhspan)
        fill(span[0 if objective == x else 1][0], bound, color=_VERMILION, alpha=0.08, linewidth=0)
        line(
            bound,
            color=_VERMILION,
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
    _tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _save(figure, path)


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


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DPI)
    return path
