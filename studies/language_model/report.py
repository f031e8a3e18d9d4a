"""The study's tables, pictures and README, made from its bundle of results and from nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.language_model.explore import CENTRE, SEEDS, THRESHOLDS, explained, explore_table
from studies.language_model.problem import HELD, OBJECTIVES, PRIMARY
from studies.language_model.scheduler import pack, read_bundle, without_traces, write_atomically
from studies.language_model.statistics import Array, Estimate, estimate, rates, resamples
from studies.language_model.study import METHODS, Choice, choices

REFERENCE_POINT = 0.4
"""Win rate of every objective that hypervolumes are measured from: no policy that was chosen is to be below it."""
# Resamples of prompts for a hypervolume, which takes longer than a mean.
_VOLUMES = 500
FACTORS = ("constrained-1-s0", "rate", "batch", "tau", "rank", "prompts", "loss", "estimator")
"""Of the exploration: the centre, and how the names of the runs begin in which one thing differs from it."""
LONG_RUNS = (*(f"constrained-3-s{seed}" for seed in SEEDS), "judged-3-s0", "constrained-10-s0")
"""Of the exploration, whose multipliers are drawn."""
README = "README.md"
RESULTS, EXPLORED = "results.json.gz", "explored.json.gz"


@dataclass(frozen=True)
class Tested:
    """A chosen policy on the test prompts.

    Attributes:
        choice: of which method, for which thresholds.
        value: objective -> (X,) win rate over the base by prompt, mean over the seeds.
        by_seed: objective -> the mean of each seed.
        kl: mean divergence from the base, nats an answer; None where it was not measured.
    """

    choice: Choice
    value: Mapping[str, Array]
    by_seed: Mapping[str, Sequence[float]]
    kl: float | None

    @property
    def missed(self) -> list[str]:
        """Held objectives that are below their threshold."""
        return [name for name, bound in self.choice.thresholds.items() if self.value[name].mean() < bound]

    @property
    def seeds(self) -> int:
        return len(self.by_seed[PRIMARY])


def tested(results: Mapping[str, Any]) -> list[Tested]:
    """Every choice that has test results, by threshold vector and method."""
    found, seeds = results["jobs"], results["settings"]["seeds"]
    base = found.get("base.test", {}).get("result")
    if base is None:
        return []
    methods = {candidate["name"]: candidate["method"] for candidate in results["candidates"]}
    made = []
    for choice in choices(found, methods, results["thresholds"], seeds[0], results["margin"]):
        records = [found.get(f"{choice.candidate}.s{seed}.test", {}).get("result") for seed in seeds]
        judged = [record for record in records if record is not None]
        if not judged:
            continue
        by_prompt = [rates(record["scores"], base["scores"]) for record in judged]
        kl = [float(np.mean(record["kl"])) for record in judged if record["kl"] is not None]
        made.append(
            Tested(
                choice,
                {name: np.mean([value[name] for value in by_prompt], 0) for name in by_prompt[0]},
                {name: [float(value[name].mean()) for value in by_prompt] for name in by_prompt[0]},
                float(np.mean(kl)) if kl else None,
            )
        )
    return made


@dataclass(frozen=True)
class Row:
    """A method over all threshold vectors for which it and MOPO were tested.

    Attributes:
        method: a key of ``METHODS``.
        vectors: number of threshold vectors.
        primary: mean over the vectors.
        behind: what MOPO has more of the primary, paired by prompt, mean over the vectors; None for MOPO itself.
        missed: vectors at which a held objective is below its threshold.
        worst: the largest shortfall of a held objective, 0 if none.
        infeasible: vectors for which no candidate kept the rule on validation.
        volume: hypervolume of the chosen policies, with its interval; None without moocore.
        volume_behind: what MOPO has more of it.
        kl: mean over the vectors, nats.
        seeds: fewest of any vector.
        candidates: that were judged on validation, where a deadline may have cut some off.
    """

    method: str
    vectors: int
    primary: Estimate
    behind: Estimate | None
    missed: int
    worst: float
    infeasible: int
    volume: Estimate | None
    volume_behind: Estimate | None
    kl: float | None
    seeds: int
    candidates: int


def _key(thresholds: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(thresholds[name] for name in HELD)


def volumes(policies: Sequence[Tested], seed: int = 0) -> Array | None:
    """(1 + resamples,) hypervolume of the policies' win rates on all objectives: of the prompts, then of resamples of
    them. None where moocore is missing."""
    from mopo_kernels.tabular.front import hypervolume

    try:
        importlib.import_module("moocore")
    except ModuleNotFoundError:
        return None
    value = np.stack([[policy.value[name] for name in OBJECTIVES] for policy in policies])  # (F, K, X)
    drawn = resamples(value.shape[2], _VOLUMES, seed)
    origin = np.full(len(OBJECTIVES), REFERENCE_POINT)
    points = [value.mean(2), *(value[:, :, index].mean(2) for index in drawn)]
    return np.array([hypervolume(point, origin) for point in points])


def _interval(values: Array, level: float = 0.95) -> Estimate:
    """The first value, with the percentile interval of the rest."""
    tail = (1 - level) / 2
    low, high = np.quantile(values[1:], [tail, 1 - tail])
    return Estimate(float(values[0]), float(values[1:].std(ddof=1)), float(low), float(high), level)


def rows(found: Sequence[Tested]) -> list[Row]:
    """One row a method, MOPO first; each is compared with MOPO at the same threshold vectors on the same prompts."""
    own = {_key(policy.choice.thresholds): policy for policy in found if policy.choice.method == "mopo"}
    made = []
    for method in METHODS:
        theirs = [p for p in found if p.choice.method == method and _key(p.choice.thresholds) in own]
        if not theirs:
            continue
        ours = [own[_key(policy.choice.thresholds)] for policy in theirs]
        shortfalls = [
            bound - float(policy.value[name].mean())
            for policy in theirs
            for name, bound in policy.choice.thresholds.items()
        ]
        difference = np.mean([a.value[PRIMARY] - b.value[PRIMARY] for a, b in zip(ours, theirs, strict=True)], 0)
        volume, rival = volumes(ours), volumes(theirs)
        kl = [policy.kl for policy in theirs if policy.kl is not None]
        made.append(
            Row(
                method,
                len(theirs),
                estimate(np.mean([policy.value[PRIMARY] for policy in theirs], 0)),
                None if method == "mopo" else estimate(difference),
                sum(bool(policy.missed) for policy in theirs),
                max(0.0, *shortfalls),
                sum(not policy.choice.kept for policy in theirs),
                None if rival is None else _interval(rival),
                None if rival is None or volume is None or method == "mopo" else _interval(volume - rival),
                float(np.mean(kl)) if kl else None,
                min(policy.seeds for policy in theirs),
                theirs[0].choice.among,
            )
        )
    return made


# ------------------------------------------------------------------------------------------------------------ in words


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others are numbers."""
    rule = "|" + "---|" + "---:|" * (len(header) - 1)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""]


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def _signed(value: Estimate | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def main_table(made: Sequence[Row]) -> list[str]:
    """A row a method, over all threshold vectors."""
    header = [
        "method",
        f"{PRIMARY} over the base",
        "MOPO minus it",
        "vectors missed",
        "worst shortfall",
        "none kept on validation",
        "KL",
        "hypervolume x 1000",
        "MOPO minus it",
        "candidates",
        "seeds",
    ]

    def thousand(value: Estimate | None, signed: bool = False) -> str:
        if value is None:
            return "-"
        sign = "+" if signed else ""
        return f"{1000 * value.mean:{sign}.2f} [{1000 * value.low:{sign}.2f}, {1000 * value.high:{sign}.2f}]"

    return table(
        header,
        (
            [
                METHODS[row.method],
                str(row.primary),
                _signed(row.behind),
                f"{row.missed} of {row.vectors}",
                f"{row.worst:.3f}",
                str(row.infeasible),
                "-" if row.kl is None else f"{row.kl:.2f}",
                thousand(row.volume),
                thousand(row.volume_behind, signed=True),
                str(row.candidates),
                str(row.seeds),
            ]
            for row in made
        ),
    )


def vector_table(found: Sequence[Tested], bounds: Mapping[str, float]) -> list[str]:
    """Every method at one threshold vector."""
    here = [policy for policy in found if _key(policy.choice.thresholds) == _key(bounds)]
    own = next((policy for policy in here if policy.choice.method == "mopo"), None)
    lines = []
    for policy in here:
        behind = None
        if own is not None and policy is not own:
            behind = estimate(own.value[PRIMARY] - policy.value[PRIMARY])
        cells = [str(estimate(policy.value[PRIMARY])), _signed(behind)]
        for name in HELD:
            value = estimate(policy.value[name])
            cells.append(f"**{value}**" if name in policy.missed else str(value))
        spread = policy.by_seed[PRIMARY]
        cells += [
            "-" if policy.kl is None else f"{policy.kl:.2f}",
            ", ".join(f"{mean:.3f}" for mean in spread),
            policy.choice.candidate + ("" if policy.choice.kept else " (kept nothing on validation)"),
        ]
        lines.append([METHODS[policy.choice.method], *cells])
    return table(["method", PRIMARY, "MOPO minus it", *HELD, "KL", f"{PRIMARY} by seed", "chosen"], lines)


def sentences(made: Sequence[Row]) -> list[str]:
    """Five, of what the figures say."""
    by_method = {row.method: row for row in made}
    own = by_method["mopo"]
    rivals = [row for row in made if row.method != "mopo"]
    ahead = [row for row in rivals if row.behind is not None and row.behind.low > 0]
    beaten_by = [row for row in rivals if row.behind is not None and row.behind.high < 0]
    level = [row for row in rivals if row not in ahead and row not in beaten_by]

    def names(some: Sequence[Row]) -> str:
        return listed(
            [
                f"{METHODS[row.method]} ({row.behind.mean:+.3f}, misses {row.missed})"
                for row in some
                if row.behind is not None
            ]
        )

    first = (
        f"MOPO and {len(rivals)} rivals tune SmolLM2-135M-Instruct on the same pairs: {PRIMARY} is maximised, "
        f"{listed(HELD)} are held above {own.vectors} threshold vectors, each method is tuned on validation prompts by "
        "the same rule, and all figures are win rates over the base on test prompts that nothing was chosen by."
    )
    second = (
        f"Over the vectors MOPO has {own.primary} of {PRIMARY} and misses a threshold at {own.missed} of {own.vectors} "
        f"(at most by {own.worst:.3f})."
    )
    simple = by_method.get("scaled")
    third = "The simplest rival, the unconstrained adapter scaled down, was not tested."
    if simple is not None and simple.behind is not None:
        relation = (
            "is behind MOPO" if simple.behind.low > 0 else "is ahead of MOPO" if simple.behind.high < 0 else "is level"
        )
        third = (
            f"The simplest rival, the unconstrained adapter scaled down, {relation}: MOPO has "
            f"{_signed(simple.behind)} more {PRIMARY}, paired by prompt, and it misses {simple.missed} of "
            f"{simple.vectors} vectors."
        )
    others = [row for row in ahead if row.method != "scaled"]
    fourth = f"MOPO has more {PRIMARY} than {names(others)}." if others else "MOPO is ahead of no other rival."
    parts = []
    if beaten_by:
        parts.append(f"{names(beaten_by)} {'has' if len(beaten_by) == 1 else 'have'} more {PRIMARY}")
    if level:
        parts.append(f"{names(level)} cannot be told from it")
    fifth = "No rival has as much by its interval."
    if parts:
        fifth = f"**Where MOPO does not win**: {'; '.join(parts)}."
    return [first, second, third, fourth, fifth]


def summary(results: Mapping[str, Any]) -> str:
    """The tables as text, as far as there are results."""
    found = tested(results)
    made = rows(found)
    if not made:
        return "no test results yet"
    lines = main_table(made)
    for bounds in results["thresholds"]:
        lines += ["", str(bounds), *vector_table(found, bounds)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- in pictures


def _colours() -> dict[str, Any]:
    palette = importlib.import_module("matplotlib").colormaps["tab20"]
    return {method: palette(index % 20) for index, method in enumerate(METHODS)}


def plot_differences(made: Sequence[Row], path: Path) -> None:
    """What MOPO has more of the primary than each rival, with its interval; missed vectors beside it."""
    from matplotlib.figure import Figure

    rivals = [row for row in made if row.behind is not None][::-1]
    figure = Figure(figsize=(8, 0.45 * len(rivals) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rivals):
        assert row.behind is not None
        colour = "tab:green" if row.behind.low > 0 else "tab:red" if row.behind.high < 0 else "tab:grey"
        axes.plot([row.behind.low, row.behind.high], [place, place], color=colour, linewidth=2)
        axes.plot(row.behind.mean, place, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{METHODS[row.method]} ({row.missed} of {row.vectors} missed)" for row in rivals]
    axes.set_yticks(range(len(rivals)), labels)
    axes.set_xlabel(f"{PRIMARY}: MOPO minus the rival, 95% by prompt")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def plot_policies_tested(found: Sequence[Tested], path: Path) -> None:
    """Every chosen policy: the primary over each held objective."""
    from matplotlib.figure import Figure

    colours = _colours()
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(HELD), sharey=True)
    for axes, held in zip(panels, HELD, strict=True):
        for method in METHODS:
            mine = {p.choice.candidate: p for p in found if p.choice.method == method}.values()
            x = [float(policy.value[held].mean()) for policy in mine]
            y = [float(policy.value[PRIMARY].mean()) for policy in mine]
            if x:
                style = {"marker": "*", "s": 150} if method == "mopo" else {"marker": "o", "s": 35}
                axes.scatter(x, y, color=colours[method], label=METHODS[method], zorder=3, **style)
        axes.axvline(0.5, color="black", linewidth=0.6, linestyle=":")
        axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
        axes.set_xlabel(f"{held}: win rate over the base")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"{PRIMARY}: win rate over the base")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def plot_vectors(found: Sequence[Tested], thresholds: Sequence[Mapping[str, float]], path: Path) -> None:
    """The primary of every method at every threshold vector; hollow where a threshold is missed."""
    from matplotlib.figure import Figure

    colours = _colours()
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(METHODS)
    for index, method in enumerate(METHODS):
        shown = False
        for place, bounds in enumerate(thresholds):
            for policy in found:
                if policy.choice.method != method or _key(policy.choice.thresholds) != _key(bounds):
                    continue
                value = estimate(policy.value[PRIMARY])
                x = place + (index - len(METHODS) / 2) * width
                axes.plot([x, x], [value.low, value.high], color=colours[method], linewidth=1.2)
                fill = "white" if policy.missed else colours[method]
                axes.plot(
                    x,
                    value.mean,
                    "*" if method == "mopo" else "o",
                    markersize=10 if method == "mopo" else 5,
                    markerfacecolor=fill,
                    markeredgecolor=colours[method],
                    label=None if shown else METHODS[method],
                )
                shown = True
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
    axes.set_xticks(range(len(thresholds)), ["\n".join(f"{n} {b:g}" for n, b in t.items()) for t in thresholds])
    axes.set_ylabel(f"{PRIMARY}: win rate over the base")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8, title="hollow: misses a threshold")
    figure.savefig(path, dpi=110)


def plot_control(explored: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """Multipliers of long runs, the held objectives on the dual data with their standard errors, and what of the labels
    is explained, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(names), 7.5), layout="constrained")
    panels = figure.subplots(3, len(names), sharex="col", sharey="row", squeeze=False)
    for column, name in enumerate(names):
        history = explored["jobs"][name]["result"]["history"]
        for colour, held in zip(("tab:blue", "tab:orange"), HELD, strict=True):
            for row, key in enumerate((f"multiplier/{held}", f"dual/satisfaction/{held}")):
                lines = [line for line in history if key in line and line[key] is not None]
                steps, values = [line["step"] for line in lines], np.array([line[key] for line in lines])
                panels[row, column].plot(steps, values, color=colour, label=held)
                if row and lines:
                    error = np.array([line.get(f"dual/standard_error/{held}") or 0.0 for line in lines])
                    panels[row, column].fill_between(steps, values - error, values + error, color=colour, alpha=0.2)
        bounds = explored["jobs"][name]["spec"]["run"]["thresholds"]
        for bound in sorted(set(bounds.values())):
            panels[1, column].axhline(bound, color="black", linewidth=0.6, linestyle=":")
        for key, label, colour in (
            ("in_sample/r_squared", "training pairs", "tab:grey"),
            ("eval_r_squared", "pairs of other prompts", "tab:green"),
        ):
            lines = [line for line in history if key in line]
            steps, shares = [line["step"] for line in lines], [line[key] for line in lines]
            panels[2, column].plot(steps, shares, color=colour, label=label)
        panels[2, column].axhline(0.0, color="black", linewidth=0.6, linestyle=":")
        panels[0, column].set_title(name, fontsize=10)
        panels[2, column].set_xlabel("optimiser steps")
    panels[0, 0].set_ylabel("multiplier")
    panels[1, 0].set_ylabel("value on the dual data")
    panels[2, 0].set_ylabel("R\N{SUPERSCRIPT TWO}")
    for row in (0, 2):
        panels[row, 0].legend(frameon=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


# -------------------------------------------------------------------------------------------------------------- README


def _conditions(results: Mapping[str, Any]) -> list[str]:
    settings, versions = results["settings"], results["versions"]
    return [
        f"Every run: {settings['epochs']:g} epochs ({results['scale']['epoch']} optimiser steps of "
        f"{results['scale']['prompts_per_step']} prompts each), "
        f"LoRA rank {settings['lora_rank']}, learning rate {settings['learning_rate']:g} (cosine), tau or beta "
        f"{settings['tau']:g}; {len(results['candidates'])} candidates in all. A candidate is taken for a vector if it "
        f"keeps each threshold by {results['margin']:g} standard errors on validation and has the highest {PRIMARY} "
        f"there. Test: {results['scale']['test_samples']} answers a prompt, seeds "
        f"{listed([str(seed) for seed in settings['seeds']])}; the base model's "
        f"{results['scale']['base_samples']} answers a prompt are the same for all. Intervals are of new "
        "prompts: they resample prompts, and neither seeds nor the choice. KL is "
        "of the policy's own answers, nats an answer; hypervolume is of "
        f"{listed(OBJECTIVES)} above {REFERENCE_POINT:g} each.",
        "",
        f"Made by `{' '.join(results['command'])}` at commit {results['commit']} in {results['seconds'] / 60:.0f} "
        f"minutes on {versions['gpu'] or 'a CPU'} ({results['workers']} processes, {results['precision']}; torch "
        f"{versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}).",
        "",
    ]


_COMMANDS = """## Commands

```bash
python -m studies.language_model explore --device cuda      # what limits a policy, validation prompts only
python -m studies.language_model study --device cuda        # MOPO and its rivals; goes on where it was stopped
python -m studies.language_model study --small              # about three hours on 2 CPU cores
python -m studies.language_model report --explored runs/study/explore/results.json.gz
```

`--deadline SECONDS` begins no job after so long, and bundles what there is; `--list` shows the jobs. The model is the
demo's (`examples/demo/make_model.py`), prompts and judges are, too. Pairs are of the base model's answers as they
stand, unfinished ones too: answers.jsonl, drawn by `python -m studies.language_model sample --device cuda` at commit
34122e32d5ed on an NVIDIA H100 with torch 2.11.
"""


def _judged(found: Mapping[str, Any], name: str) -> dict[str, Array] | None:
    """objective -> (X,) win rates by prompt of a judged policy of the exploration, if it is there."""
    record = found.get(f"{name}.validation", {}).get("result")
    return None if record is None else rates(record["scores"], found["base.validation"]["result"]["scores"])


def _on_held_out_pairs(found: Mapping[str, Any], name: str) -> dict[str, float] | None:
    """objective -> win rate of a run's last policy by the pairs of other prompts, which it is not asked to answer: as
    the importance-weighted estimate of its log has it."""
    history = found.get(name, {}).get("result", {}).get("history", [])
    lines = [line for line in history if f"eval_satisfaction/{PRIMARY}" in line]
    return {objective: lines[-1][f"eval_satisfaction/{objective}"] for objective in OBJECTIVES} if lines else None


def control_table(found: Mapping[str, Any]) -> list[str]:
    """How well and how long the held objectives stay at what was asked for: a row a kind of control and a length, mean
    over its seeds."""
    lines = []
    for kind in ("constrained", "judged", "fixed", "unconstrained"):
        for epochs in (1, 3, 10):
            names = [f"{kind}-{epochs}-s{seed}" for seed in SEEDS]
            value = [judged for name in names if (judged := _judged(found, name)) is not None]
            pairs = [rate for name in names if (rate := _on_held_out_pairs(found, name)) is not None]
            if not value and not pairs:
                continue
            cells, farthest = ["-"] * len(OBJECTIVES), "-"
            if value:
                cells = [str(estimate(np.mean([by_prompt[name] for by_prompt in value], 0))) for name in OBJECTIVES]
            if value and kind in ("constrained", "judged"):
                off = [abs(float(rate[name].mean()) - bound) for rate in value for name, bound in THRESHOLDS.items()]
                farthest = f"{max(off):.3f}"
            means = [f"{np.mean([rate[name] for rate in pairs]):.3f}" for name in OBJECTIVES] if pairs else ["-"]
            seeds = str(len(value)) if len(value) == len(pairs) else f"{len(value)} answered, {len(pairs)} trained"
            lines.append([kind, str(epochs), seeds, *cells, farthest, ", ".join(means)])
    return table(
        ["multipliers", "epochs", "seeds", *OBJECTIVES, "farthest from what was asked", "by held-out pairs"], lines
    )


def factor_table(found: Mapping[str, Any]) -> list[str]:
    """One factor at a time: what a policy has, and which part of the labels' gain at the same thresholds and tau."""
    lines = []
    for name, record in found.items():
        if record["kind"] != "train" or not record["name"].startswith(FACTORS):
            continue
        value = _judged(found, name)
        if value is None:
            continue
        run = record["spec"]["run"]
        labels = found.get(f"labels.tau-{run['tau']:g}", {}).get("result")
        share = "-"
        if labels is not None:
            best, rival = (labels[kind]["satisfaction"][PRIMARY] for kind in ("constrained", "turned_down"))
            share = f"{(float(value[PRIMARY].mean()) - rival) / (best - rival):.0%}"
        multipliers = ", ".join(f"{key} {number:.2f}" for key, number in record["result"]["multiplier"].items())
        held_out = explained(record["result"])
        lines.append(
            [
                name,
                *(str(estimate(value[objective])) for objective in OBJECTIVES),
                multipliers,
                "-" if held_out is None else f"{held_out:.3f}",
                share,
            ]
        )
    heads = ["multipliers at the end", "R^2 of held-out pairs", f"share of the labels' gain in {PRIMARY}"]
    return table(["run", *OBJECTIVES, *heads], lines)


def explored_lines(content: Mapping[str, Any], out: Path) -> list[str]:
    """The section on the exploration; its picture goes into ``out``."""
    found = content["jobs"]
    asked = listed([f"{name} at least {bound:g}" for name, bound in THRESHOLDS.items()])
    lines = [
        "## What limits a policy (validation prompts)",
        "",
        f"{asked[0].upper()}{asked[1:]}. Multipliers that follow dual data's labels (constrained) or fresh judged "
        "answers (judged), fixed at the labels' solution, and none. Win rates over the base of sampled answers; in the "
        "last column what pairs of base answers to other prompts say of the same, by importance weights:",
        "",
        *control_table(found),
    ]
    if long := [name for name in LONG_RUNS if "result" in found.get(name, {})]:
        plot_control(content, long, out / "control.png")
        lines += ["![Multipliers and what they hold, over the steps](control.png)", ""]
    centre = ", ".join(f"{name} {value:g}" for name, value in CENTRE.items())
    lines += [f"One factor at a time, about {centre}, 1 epoch:", "", *factor_table(found)]
    lines += [
        f"Made by `{' '.join(content['command'])}` at commit {content['commit']} on "
        f"{content['versions']['gpu'] or 'a CPU'}. Everything that was judged:",
        "",
    ]
    return [*lines, "```", explore_table(found), "```", ""]


def write_report(results_file: Path, out: Path, explored: Path | None = None) -> None:
    """README, pictures and the results themselves in the folder ``out``; of the exploration alone as long as the study
    has no file of results.

    Raises:
        ValueError: there are no test results, and no exploration.
    """
    out.mkdir(parents=True, exist_ok=True)
    if explored is not None and not results_file.is_file():
        content = read_bundle(explored)
        lines = ["# What limits a language model's policy", "", *explored_lines(content, out)[2:], _COMMANDS]
        write_atomically(out / EXPLORED, pack(without_traces(content)))
        write_atomically(out / README, ("\n".join(lines).rstrip() + "\n").encode())
        return
    results = read_bundle(results_file)
    found = tested(results)
    made = rows(found)
    if not made or made[0].method != "mopo":
        raise ValueError(f"results: expected MOPO judged on test; got none in {results_file}")
    plot_differences(made, out / "differences.png")
    plot_policies_tested(found, out / "policies.png")
    plot_vectors(found, results["thresholds"], out / "vectors.png")
    lines = ["# MOPO against its rivals on a language model", "", " ".join(sentences(made)), ""]
    lines += main_table(made)
    lines += ["![What MOPO has more of the primary](differences.png)", "", *_conditions(results)]
    lines += ["![Primary by threshold vector](vectors.png)", "", "![Chosen policies](policies.png)", ""]
    lines += ["## By threshold vector", "", "Bold: below its threshold on test.", ""]
    for bounds in results["thresholds"]:
        shown = listed([f"{name} at least {bound:g}" for name, bound in bounds.items()])
        lines += [f"### {shown[0].upper()}{shown[1:]}", "", *vector_table(found, bounds)]
    lines.append(_COMMANDS)
    if explored is not None:
        content = read_bundle(explored)
        lines += explored_lines(content, out)
        write_atomically(out / EXPLORED, pack(without_traces(content)))
    write_atomically(out / README, ("\n".join(lines).rstrip() + "\n").encode())
    write_atomically(out / RESULTS, pack(without_traces(results)))
