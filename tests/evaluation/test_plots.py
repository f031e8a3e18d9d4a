"""The two pictures: the figures hold the numbers they were given, are labelled, and nothing is cut off."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest

from mopo_kernels import plots
from mopo_kernels.evaluation import WinRate

HISTORY = [
    {
        "step": step,
        "loss": 1.0 / step,
        "dual/satisfaction/detail": 0.5 + 0.002 * step,
        "dual/standard_error/detail": 0.01,
        "multiplier/detail": 1.0,
        "in_sample/satisfaction/plain": 0.5 - 0.001 * step,
        "multiplier/plain": 0.05 * step,
        "threshold/plain": 0.48 - 0.0001 * step,
    }
    for step in range(1, 31)
] + [{"step": 30, "eval_loss": 0.1}, {"train_runtime": 3.0}]


def rate(objective: str, mean: float, low: float, high: float) -> WinRate:
    return WinRate(objective, mean, low, high, prompts=40, samples=160)


POINTS = {
    "constrained": {"detail": rate("detail", 0.57, 0.53, 0.61), "plain": rate("plain", 0.49, 0.45, 0.52)},
    "free": {"detail": rate("detail", 0.64, 0.60, 0.69), "plain": rate("plain", 0.40, 0.36, 0.45)},
}


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, beside the files written from them."""
    drawn = []
    save = plots.save_figure

    def keep(figure, path):
        drawn.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    return drawn


def lines_of(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_xydata()) for line in axes.lines}


def texts_of(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def assert_png_and_nothing_cut_off(figure, path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    canvas = figure.bbox
    tight = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert tight.x0 >= canvas.x0 - 1
    assert tight.y0 >= canvas.y0 - 1
    assert tight.x1 <= canvas.x1 + 1
    assert tight.y1 <= canvas.y1 + 1


def test_training_shows_satisfaction_threshold_and_multiplier_of_every_objective(figures, tmp_path):
    path = plots.plot_training(HISTORY, tmp_path / "new" / "training.png", title="a run", primary="detail")
    (figure,) = figures
    assert_png_and_nothing_cut_off(figure, path)
    top_detail, top_plain, bottom_detail, bottom_plain = figure.axes
    steps = np.arange(1, 31)
    plain = lines_of(top_plain)
    np.testing.assert_allclose(plain["training pairs"], np.c_[steps, 0.5 - 0.001 * steps])
    np.testing.assert_allclose(plain["threshold"], np.c_[steps, 0.48 - 0.0001 * steps])
    np.testing.assert_allclose(plain["training pairs, mean of the last 3"][4], [5, 0.5 - 0.001 * 4])
    detail = lines_of(top_detail)
    np.testing.assert_allclose(detail["held-out prompts"], np.c_[steps, 0.5 + 0.002 * steps])
    assert not any("training" in label for label in detail)
    (band,) = top_detail.collections
    corners = band.get_paths()[0].vertices
    for offset in (-0.02, 0.02):
        assert any(np.allclose(corner, [30, 0.56 + offset]) for corner in corners)
    np.testing.assert_allclose(bottom_plain.lines[0].get_xydata(), np.c_[steps, 0.05 * steps])
    assert bottom_plain.get_ylim()[1] > 1.5  # the whole multiplier is inside the picture
    np.testing.assert_allclose(bottom_detail.lines[0].get_ydata(), 1.0)
    assert "threshold" not in lines_of(top_detail)
    assert [axes.get_title() for axes in (top_detail, top_plain)] == ["detail (maximised)", "plain (held)"]


def test_training_axes_are_labelled_with_units_and_the_legend_lists_each_line_once(figures, tmp_path):
    plots.plot_training(HISTORY, tmp_path / "training.png")
    (figure,) = figures
    top, _, bottom, bottom_right = figure.axes
    assert top.get_ylabel() == "satisfaction (probability)"
    assert bottom.get_ylabel() == "multiplier (no unit)"
    assert bottom.get_xlabel() == bottom_right.get_xlabel() == "optimiser step"
    assert sorted(texts_of(figure)) == [
        "2 standard errors",
        "held-out prompts",
        "parity",
        "threshold",
        "training pairs",
        "training pairs, mean of the last 3",
    ]


def test_a_fixed_threshold_is_drawn_over_the_whole_run(figures, tmp_path):
    history = [{key: value for key, value in row.items() if "threshold" not in key} for row in HISTORY]
    plots.plot_training(history, tmp_path / "training.png", thresholds={"plain": 0.45}, primary="detail")
    np.testing.assert_allclose(lines_of(figures[0].axes[1])["threshold"], [[1, 0.45], [30, 0.45]])


def test_panels_without_anything_to_show_are_left_out(figures, tmp_path):
    free = [{key: value for key, value in row.items() if "multiplier" not in key} for row in HISTORY]
    held = [row | {"in_sample/satisfaction/warmth": 0.5, "multiplier/plain": 0.1} for row in free]
    plots.plot_training(free, tmp_path / "free.png", primary="detail")
    plots.plot_training(held, tmp_path / "held.png", primary="detail")
    assert len(figures[0].axes) == 2
    assert [axes.get_title() for axes in figures[1].axes[:3]] == [
        "detail (maximised)",
        "plain (held)",
        "warmth (watched)",
    ]
    assert [axes.axison for axes in figures[1].axes[3:]] == [False, True, False]


def test_training_refuses_a_history_without_satisfaction_and_an_unknown_threshold(tmp_path):
    with pytest.raises(ValueError, match="satisfaction/<objective>; got 1 rows without"):
        plots.plot_training([{"step": 1, "loss": 2.0}], tmp_path / "p.png")
    with pytest.raises(ValueError, match=r"\['detail', 'plain'\]; got \['warmth'\]"):
        plots.plot_training(HISTORY, tmp_path / "p.png", thresholds={"warmth": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_the_plane_shows_every_policy_with_its_intervals_the_thresholds_and_parity(figures, tmp_path):
    path = plots.plot_plane(
        POINTS, tmp_path / "plane.png", x="detail", y="plain", thresholds={"plain": 0.47, "other": 0.1}, parity="base"
    )
    (figure,) = figures
    assert_png_and_nothing_cut_off(figure, path)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "detail: win rate over base (0 to 1)"
    assert axes.get_ylabel() == "plain: win rate over base (0 to 1)"
    assert sorted(texts_of(figure)) == sorted(
        ["plain threshold 0.47 (missed: shaded)", "base (parity, 0.5)", "constrained", "free"]
    )
    bars = {container.get_label(): container for container in axes.containers}
    for name, rates in POINTS.items():
        point, _, (across, up) = bars[name]
        np.testing.assert_allclose(point.get_xydata(), [[rates["detail"].mean, rates["plain"].mean]])
        np.testing.assert_allclose(across.get_segments()[0][:, 0], [rates["detail"].low, rates["detail"].high])
        np.testing.assert_allclose(up.get_segments()[0][:, 1], [rates["plain"].low, rates["plain"].high])
    np.testing.assert_allclose(lines_of(axes)["base (parity, 0.5)"], [[0.5, 0.5]])
    np.testing.assert_allclose(lines_of(axes)["plain threshold 0.47 (missed: shaded)"][:, 1], 0.47)
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    assert low_x < 0.5
    assert high_x > 0.69
    assert low_y < 0.36
    assert high_y > 0.52


def test_thresholds_shade_the_side_that_misses_them(figures, tmp_path):
    plots.plot_plane(POINTS, tmp_path / "p.png", x="detail", y="plain", thresholds={"detail": 0.55, "plain": 0.47})
    boxes = [patch.get_bbox() for patch in figures[0].axes[0].patches]
    assert (boxes[0].x1, boxes[1].y1) == (0.55, 0.47)
    assert boxes[0].x0 < 0.5
    assert boxes[1].y0 < 0.36


def test_the_plane_refuses_no_points_and_unknown_objectives(tmp_path):
    with pytest.raises(ValueError, match="at least one policy"):
        plots.plot_plane({}, tmp_path / "p.png", x="detail", y="plain")
    with pytest.raises(ValueError, match=r"y: expected an objective of policy 'constrained'.*got 'warmth'"):
        plots.plot_plane(POINTS, tmp_path / "p.png", x="detail", y="warmth")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def hide(name, *args, **options):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", hide)
    with pytest.raises(ImportError, match=r"pip install 'mopo-kernels\[plot\]'"):
        plots.plot_training(HISTORY, tmp_path / "p.png")


def test_drawing_leaves_pyplot_and_its_backend_alone(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    plots.plot_plane(POINTS, tmp_path / "p.png", x="detail", y="plain")
    assert ("matplotlib.pyplot" in sys.modules) == loaded
