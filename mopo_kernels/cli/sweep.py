"""Sweeps on the command line: ``mopo train --sweep FILE``, and ``mopo eval`` of the policies that it made."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mopo_kernels.cli.output import literal, show
from mopo_kernels.data import PreferenceData
from mopo_kernels.text import markdown, one_line
from mopo_kernels.trainer import MOPOConfig, TrainingInterrupted
from mopo_kernels.trainer.checkpoint import write_atomically
from mopo_kernels.trainer.sweep import Sweep, load_sweep

TABLE_FILE, PICTURE_FILE = "sweep.md", "front.png"
_PARTS = {"train": "in-sample (running means in training)", "eval": "on held-out data"}


def train_sweep(
    file: str,
    config: MOPOConfig,
    load_model: Callable[[], Any],
    tokenizer: Any,
    train_data: PreferenceData,
    eval_data: PreferenceData | None,
    *,
    save: Callable[..., Mapping[str, Any]],
    settings: Mapping[str, Any],
    started: float,
) -> None:
    """Train an adapter for every point of ``file``; writes ``sweep.json``, ``sweep.md`` and ``front.png``.

    Args:
        file: see ``load_sweep``; the configuration's thresholds hold where it says nothing.
        config: of every point. With ``resume_from_checkpoint=false`` finished points are trained anew, not skipped.
        load_model: the model with a fresh adapter.
        tokenizer, train_data, eval_data: what it is trained on.
        save, settings: see ``Sweep``.
        started: when loading began, ``time.perf_counter`` seconds.

    Raises:
        ValueError: a bad sweep file or argument, or a ``sweep.json`` of another sweep.
        SystemExit: 128 and the signal's number after one, 1 when no point could be trained.
    """
    resume = str(config.resume_from_checkpoint or "auto").lower()
    if resume not in ("auto", "true", "false"):
        raise ValueError(
            f"resume_from_checkpoint: expected auto, true or false with sweep, whose points have checkpoints of their "
            f"own; got {resume!r}"
        )
    assert isinstance(config.thresholds, dict)
    points = load_sweep(file, config.thresholds)
    model = load_model()
    sweep = Sweep(
        points,
        model,
        config,
        train_data,
        eval_data,
        tokenizer,
        save,
        settings=settings,
        afresh=resume == "false",
        loading_seconds=time.perf_counter() - started,
    )
    main_process = config.process_index == 0

    def progress(index: int, record: Mapping[str, Any]) -> None:
        if main_process:
            print(f"[{index + 1}/{len(points)}] {one_line(_line(record, sweep.primary))}", flush=True)

    try:
        report = sweep.run(progress)
    except TrainingInterrupted as error:
        if main_process:
            print("mopo: sweep interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + error.signal) from None
    if main_process:
        _write(report, Path(str(config.output_dir)))
    if not any(record["status"] == "trained" for record in report["points"]):
        raise SystemExit(1)


def _line(record: Mapping[str, Any], primary: str) -> str:
    """A point in one line."""
    if record["status"] != "trained":
        return f"{record['name']}: {record['status']}: {record['message']}"
    part = _part_of(record)
    values, slack = record["satisfaction"][part], record["slack"][part]
    shown = [f"{primary} {_number(values.get(primary))}"]
    for name, multiplier in record["multiplier"].items():
        shown.append(
            f"{name} {_number(values.get(name))} (slack {_number(slack.get(name), '+.3f')}, multiplier "
            f"{multiplier:.3g})"
        )
    return f"{record['name']}: {record['steps']} steps, {', '.join(shown)}, {record['seconds']:.0f} s"


def _part_of(record: Mapping[str, Any]) -> str:
    return "eval" if record["satisfaction"]["eval"] else "train"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _columns(report: Mapping[str, Any], part: str) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of what every point measured on one part of the data."""
    held = [name for name in report["compared"] if name != report["primary"]]
    headings = ["point", report["primary"]]
    for name in held:
        headings += [name, "threshold", "slack", "multiplier"]
    headings += ["KL", "front", "time", "peak memory"]
    rows = []
    for record in report["points"]:
        bounds = record.get("threshold", record["thresholds"])
        values, slack = (record.get(key, {}).get(part, {}) for key in ("satisfaction", "slack"))
        row = [record["name"], _number(values.get(report["primary"]))]
        for name in held:
            multiplier = record.get("multiplier", {}).get(name)
            row += [_number(values.get(name)), _number(bounds.get(name), "g"), _number(slack.get(name), "+.3f")]
            row += [_number(multiplier)]
        kl = record.get("kl", {}).get(part)
        mark = {True: "yes", False: "dominated", None: record["status"]}[record.get("nondominated")]
        row += [_number(kl), mark, f"{record['seconds']:.0f} s", f"{record['peak_memory_mib']:.0f} MiB"]
        rows.append(row)
    return headings, rows


def _table(title: str, caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=literal(title),
        caption=literal(caption),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(headings):
        table.add_column(literal(heading), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(literal, row))
    return table


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [map(markdown, headings), ["---", *["---:"] * (len(headings) - 1)], *(map(markdown, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _write(report: Mapping[str, Any], folder: Path) -> None:
    """The tables and the picture of a finished sweep."""
    shared, estimator = report["shared"], report["estimator"]
    cost = (
        f"Once for all points: loading {shared['loading_seconds']:.0f} s, reference log-probabilities "
        f"{shared['reference_seconds']:.0f} s; frozen weights {shared['backbone_bytes'] / 2**20:.0f} MiB, an adapter "
        f"{shared['adapter_bytes'] / 2**20:.1f} MiB."
    )
    front = (
        f"front: no other point has as much of {', '.join(report['compared'])} and more of one, "
        f"{_PARTS[report['front']]}; noise is not accounted for."
    )
    text = f"# Sweep\n\nSatisfaction by the estimator `{estimator}`. {cost}\n\n{markdown(front)}\n"
    for part, where in _PARTS.items():
        if part == "train" or report["front"] == "eval":
            text += f"\n## Measured {where}\n\n{_markdown(*_columns(report, part))}"
    refused = [record for record in report["points"] if record["status"] != "trained"]
    text += "".join(
        f"\n* {markdown(record['name'])}: {record['status']}: {markdown(record['message'])}\n" for record in refused
    )
    write_atomically(folder / TABLE_FILE, text)
    headings, rows = _columns(report, report["front"])
    title = f"Sweep of {len(rows)} points, measured {_PARTS[report['front']]} (estimator {estimator})"
    show(_table(title, f"{front} {cost}", headings, rows))
    print(f"saved {folder / TABLE_FILE}{_draw(report, folder / PICTURE_FILE)}")


def _intervals(trained: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Two standard errors by prompt to either side, by point and objective."""
    return {
        record["name"]: {
            name: (record["satisfaction"]["eval"][name] - 2 * error, record["satisfaction"]["eval"][name] + 2 * error)
            for name, error in record.get("standard_error", {}).items()
        }
        for record in trained
    }


def _draw(report: Mapping[str, Any], path: Path) -> str:
    """The measured front as a picture; returns what to say of it."""
    trained = [record for record in report["points"] if record["status"] == "trained"]
    values = {record["name"]: record["satisfaction"][report["front"]] for record in trained}
    others = [name for name in report["compared"] if name != report["primary"]]
    others = [name for name in others if all(name in point for point in values.values())]
    if not trained or not others:
        return ""
    if importlib.util.find_spec("matplotlib") is None:
        return "; a picture needs matplotlib: pip install 'mopo-kernels[plot]'"
    from mopo_kernels.plots import plot_policies

    plot_policies(
        values,
        path,
        x=others,
        y=report["primary"],
        nondominated=[record["name"] for record in trained if record["nondominated"]],
        intervals=_intervals(trained) if report["front"] == "eval" else None,
        bounds={record["name"]: record["threshold"] for record in trained},
        scale=f"satisfaction ({report['estimator']})",
        parity=None if report["estimator"] == "closed_form" else "reference",
        title=f"Measured {_PARTS[report['front']]}",
    )
    return f" and {path}"
