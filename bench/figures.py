"""Pictures of the benchmarks: how time and memory grow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopo_kernels.plots import BLUE, GREEN, VERMILION, make_figure, save_figure, tidy_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's palette; each implementation has a marker of its own as well.
_BARE = "0.35"
_COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX"
_LABELS = {"N": "scored tokens N", "V": "vocabulary V", "K": "objectives K", "prompt share": "prompt's share of a row"}
_RATIO_TICKS = (0.5, 0.7, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 20.0, 50.0)
_ROWS = {
    "seconds": "time, s",
    "ratio": "time / bare products",
    "beyond_mib": "peak memory of the call, MiB",
}


def plot_scaling_curves(record: dict[str, Any], dtype: str, path: Path) -> Path:
    """Draw the curves of a dtype: a column for each axis; time, time / bare products and peak memory below each other.

    Args:
        record: what ``bench.scaling_curves`` writes.
        path: the PNG to write.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing.
    """
    curves = [curve for curve in record["curves"] if curve["dtype"] == dtype]
    axes_names = list(dict.fromkeys(curve["axis"] for curve in curves))
    names = list(dict.fromkeys(name for curve in curves for point in curve["points"] for name in point["results"]))
    figure = make_figure(3.6 * len(axes_names), 3.0 * len(_ROWS) + 0.8)
    grid = figure.subplots(len(_ROWS), len(axes_names), squeeze=False, sharex="col", sharey="row")
    for curve in curves:
        column = axes_names.index(curve["axis"])
        values = [point["value"] for point in curve["points"]]
        for row, key in enumerate(_ROWS):
            axes = grid[row][column]
            for number, name in enumerate(names):
                measured = [point["results"].get(name, {}).get(key) for point in curve["points"]]
                if None in measured or (key == "ratio" and number == 0):
                    continue
                colour = _BARE if number == 0 else _COLOURS[(number - 1) % len(_COLOURS)]
                axes.plot(
                    values,
                    measured,
                    color=colour,
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=5,
                    linewidth=1.5,
                    linestyle="-" if curve["trained"] else "--",
                    markerfacecolor=colour if curve["trained"] else "white",
                    label=f"{name}{'' if curve['trained'] else ', head frozen'}",
                )
    for row, key in enumerate(_ROWS):
        for column, axis in enumerate(axes_names):
            _scales(grid[row][column], axis, [point["value"] for point in _curve(curves, axis)["points"]], key)
        grid[row][0].set_ylabel(_ROWS[key])
    for column, axis in enumerate(axes_names):
        grid[-1][column].set_xlabel(_LABELS[axis])
    plan = record["plan"]
    figure.suptitle(
        f"{dtype}: H {plan['hidden']}, otherwise N {plan['tokens']}, V {plan['vocabulary']}, K {plan['objectives']}, "
        f"prompt share {plan['share']:g}; {record['threads']} threads ({record['cpu_capability']}), "
        f"medians of {record['rounds']} rounds",
        fontsize=11,
    )
    labelled: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    figure.legend(
        labelled.values(), labelled, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9
    )
    return save_figure(figure, path)


def _curve(curves: list[dict[str, Any]], axis: str) -> dict[str, Any]:
    return next(curve for curve in curves if curve["axis"] == axis)


def _scales(axes: Axes, axis: str, values: list[float], key: str) -> None:
    """Logarithms but for the share; a tick at each point."""
    tidy_axes(axes)
    if axis != "prompt share":
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.minorticks_off()
    axes.set_yscale("log")
    if key == "ratio":
        axes.axhline(1.0, color=_BARE, linewidth=1.0, linestyle=":")
        ticks = [tick for tick in _RATIO_TICKS if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
