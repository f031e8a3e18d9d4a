"""Pictures of the study: methods beside the exact front, error against sample size, ablations side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mopo_kernels.plots import BLUE, GREEN, VERMILION, make_figure, save_figure, shade_unattainable, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's palette; markers do not repeat with the colours, so that no two curves look the same.
_COLOURS = (BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "0.2", "#B8A800")
_MARKERS = "osD^vPX<>*hpd8"
_DOTS: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5, "color": BLUE}
_CROSSES: dict[str, Any] = {
    "linestyle": "none",
    "marker": "x",
    "markersize": 6,
    "markeredgewidth": 1.6,
    "color": "#CC79A7",
    "zorder": 4,
}

Points = Sequence[Sequence[float]]


class Dot(NamedTuple):
    """A point of a curve: the value of a setting, mean, low and high, None where there is nothing; ``lost``: drawn
    hollow."""

    value: str
    mean: float | None
    low: float | None
    high: float | None
    lost: bool = False


Series = dict[str, list[Dot]]


@dataclass(frozen=True)
class Curve:
    """Error of one way to learn.

    Attributes:
        name: for the legend.
        points: (pairs, mean, least, largest) over data sets.
        expected: (pairs, error) by theory, or none.
        bias: the error that infinitely many pairs would leave, drawn as a line; None or 0: none.
    """

    name: str
    points: Sequence[tuple[float, float, float, float]]
    expected: Sequence[tuple[float, float]] = ()
    bias: float | None = None


def _colour(number: int) -> str:
    """The first curve's colour is its own, the others share the rest."""
    return _COLOURS[0] if number == 0 else _COLOURS[1 + (number - 1) % (len(_COLOURS) - 1)]


def _legend(figure: Any, panels: Sequence[Axes], columns: int) -> None:
    """One legend below all panels, each label once."""
    labelled: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        labelled.update(zip(labels, handles, strict=True))
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def plot_methods(
    path: Path,
    *,
    title: str,
    across: str,
    up: str,
    front: Points,
    attainable: Points,
    points: Mapping[str, Points],
    taken: Mapping[str, Points],
) -> Path:
    """Draw a panel for every method: its policies over the exact front.

    Args:
        path: PNG to write.
        title: of the picture.
        across, up: labels of the axes: the worst slack, and what is maximised.
        front: points (across, up) of the exact front.
        attainable: the most that any policy has, by rising ``across``; what lies beyond is shaded.
        points: method -> what it makes of one data set.
        taken: method -> the policy that its user takes, of every data set.
    """
    columns = math.ceil(len(points) / 2)
    rows = math.ceil(len(points) / columns)
    figure = make_figure(2.6 * columns + 0.6, 2.5 * rows + 1.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    curve, most = np.array(front), np.array(attainable)
    curve = curve[curve[:, 0].argsort()]
    shown = np.concatenate([curve, *(np.array(each) for each in (*points.values(), *taken.values()))])
    low, high = _span(np.append(shown[:, 0], 0.0)), _span(np.append(shown[:, 1], most[:, 1]))
    for axes in grid.flat[len(points) :]:
        axes.set_axis_off()
    panels = list(grid.flat[: len(points)])
    for axes, (method, policies) in zip(panels, points.items(), strict=True):
        axes.set_xlim(*low)
        axes.set_ylim(*high)
        tidy_axes(axes)
        shade_unattainable(axes, most, low, high[1])
        axes.axvline(0.0, color=VERMILION, linestyle="--", linewidth=1.4, label="left of it a threshold is missed")
        axes.plot(*curve.T, color="0.15", linewidth=1.6, label="exact front")
        axes.plot(*np.array(policies).T, label="policies, first data set", markeredgecolor="white", **_DOTS)
        axes.plot(*np.array(taken[method]).T, label="policy taken, every data set", **_CROSSES)
        axes.set_title(method, fontsize=10)
        axes.tick_params(labelsize=8, labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(up, fontsize=9)
    for axes in panels[-columns:]:
        axes.set_xlabel(across, fontsize=9)
    _legend(figure, panels[:1], 5)
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def plot_overview(path: Path, *, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Path:
    """Draw what each method has by several measures: a dot a structure, a bar for the mean, the first method in its own
    colour.

    Args:
        path: PNG to write.
        panels: measure -> method -> a value for each structure.
    """
    figure = make_figure(2.7 * len(panels) + 1.2, 3.6)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (measure, methods) in zip(grid, panels.items(), strict=True):
        tidy_axes(axes)
        for place, values in enumerate(methods.values()):
            colour = BLUE if place == 0 else "0.45"
            # Beside each other, so that equal values show.
            beside = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
            axes.plot(values, place + np.array(beside), "o", color=colour, markersize=3.5, alpha=0.6)
            axes.plot([float(np.mean(values))] * 2, [place - 0.36, place + 0.36], color=colour, linewidth=3)
        axes.set_title(measure, fontsize=9.5)
        axes.tick_params(labelsize=8)
        axes.set_yticks(range(len(methods)), list(methods))
        axes.set_ylim(len(methods) - 0.4, -0.6)
    return save_figure(figure, path)


def _span(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis with room on both sides."""
    room = 0.05 * (np.nanmax(values) - np.nanmin(values)) + 1e-3
    return float(np.nanmin(values) - room), float(np.nanmax(values) + room)


def plot_rates(path: Path, *, title: str, panels: Mapping[str, Sequence[Curve]]) -> Path:
    """Draw error against the number of pairs on logarithmic axes, a panel for every group of ways to learn.

    Args:
        path: PNG to write.
        title: of the picture.
        panels: group -> curves. A curve is drawn in the same way wherever it occurs.
    """
    figure = make_figure(3.1 * len(panels) + 0.6, 4.3)
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    names = list(dict.fromkeys(curve.name for curves in panels.values() for curve in curves))
    for axes, (group, curves) in zip(grid, panels.items(), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        tidy_axes(axes)
        for beside, curve in enumerate(curves):
            number = names.index(curve.name)
            colour = _colour(number)
            count, mean, low, high = np.array(curve.points, dtype=float).T
            axes.errorbar(
                # Apart from each other, or the bars would cover one another.
                count * 1.08 ** (beside - (len(curves) - 1) / 2),
                mean,
                yerr=[mean - low, high - mean],
                color=colour,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.4,
                capsize=2,
                label=curve.name,
            )
            if curve.expected:
                expected = np.array(curve.expected, dtype=float)
                axes.plot(*expected.T, color="0.3", linestyle=":", linewidth=1.6, label="expected, slope -1/2")
            if curve.bias:
                axes.axhline(curve.bias, color=colour, linestyle="--", linewidth=1.0)
        axes.set_title(group, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("labelled pairs", fontsize=9)
    grid[0].set_ylabel("total variation to the exact optimum", fontsize=9)
    _legend(figure, list(grid), 4)
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)


def plot_multiples(path: Path, *, title: str, panels: Mapping[str, Mapping[str, Series]]) -> Path:
    """Draw small multiples: a row for every measure, a column for every ablated setting.

    Args:
        path: PNG to write.
        title: of the picture.
        panels: measure -> setting -> curve -> its points.
    """
    columns = list(dict.fromkeys(setting for settings in panels.values() for setting in settings))
    # A curve looks the same in every panel.
    names = list(dict.fromkeys(name for settings in panels.values() for curves in settings.values() for name in curves))
    style = {name: number for number, name in enumerate(name for name in names if name != "exact")}
    figure = make_figure(2.5 * len(columns) + 0.6, 2.0 * len(panels) + 1.0)
    grid = figure.subplots(len(panels), len(columns), squeeze=False, sharex="col", sharey="row")
    for line, (measure, settings) in zip(grid, panels.items(), strict=True):
        for axes, setting in zip(line, columns, strict=True):
            if setting not in settings:
                axes.set_axis_off()
                continue
            tidy_axes(axes)
            axes.tick_params(labelsize=8, labelbottom=True)
            curves = settings[setting]
            values = list(dict.fromkeys(point.value for name in curves for point in curves[name]))
            learned = [name for name in curves if name != "exact"]
            for beside, name in enumerate(learned):
                number, points = style[name], curves[name]
                place = [values.index(point.value) + 0.12 * (beside - (len(learned) - 1) / 2) for point in points]
                mean, low, high = np.array([point[1:4] for point in points], dtype=float).T
                lost = np.array([point.lost for point in points])
                axes.errorbar(
                    place,
                    mean,
                    yerr=[mean - low, high - mean],
                    color=_colour(number),
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=4,
                    linewidth=1.2,
                    capsize=2,
                    label=name,
                )
                if lost.any():
                    axes.plot(
                        np.array(place)[lost],
                        mean[lost],
                        linestyle="none",
                        marker=_MARKERS[number % len(_MARKERS)],
                        markersize=4,
                        markerfacecolor="white",
                        markeredgecolor=_colour(number),
                        zorder=4,
                    )
                    axes.plot([], [], "o", markerfacecolor="white", color="0.3", label="hollow: constraint lost")
            for point in curves.get("exact", ()):
                axes.plot(
                    values.index(point.value),
                    point.mean,
                    "_",
                    color=VERMILION,
                    markersize=14,
                    markeredgewidth=2,
                    label="exact",
                )
            if measure == "worst slack":
                axes.axhline(0.0, color="0.45", linestyle=":", linewidth=1.2)
            axes.set_xticks(range(len(values)), values)
            axes.set_xlim(-0.5, len(values) - 0.5)
        line[0].set_ylabel(measure, fontsize=9)
    for axes, setting in zip(grid[0], columns, strict=True):
        axes.set_title(setting, fontsize=9)
    _legend(figure, list(grid.flat), 6)
    figure.suptitle(title, fontsize=12)
    return save_figure(figure, path)
