"""`mopo eval`: sample from two policies, judge the samples, report the win rate of one over the other by objective."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import mopo_kernels
from mopo_kernels.cli.doctor import installed_version
from mopo_kernels.cli.output import Chat, TemplateVariables, chat_options, literal, show
from mopo_kernels.evaluation import (
    Comparison,
    compare_with_baseline,
    is_adapter,
    is_sweep,
    load_judges,
    load_policy,
    load_prompts,
    load_sweep_policies,
    read_sweep,
)
from mopo_kernels.files import prepare_file
from mopo_kernels.mappings import parse_mapping


def _adapter(option: str) -> Any:
    return typer.Option(
        option,
        metavar="ADAPTER[=WEIGHT]",
        help="A peft adapter (folder or hub name) to put on it; repeat for the weighted sum of several.",
    )


def _scale(option: str) -> Any:
    return typer.Option(option, help="Factor of the update by its adapter, or adapters; 0 is the model alone.")


def evaluate(
    policy: Annotated[
        str, typer.Option(help="Model or adapter to judge: folder or hub name. Or a sweep's folder: all its points.")
    ],
    prompts: Annotated[Path, typer.Option(help='Held-out prompts: .jsonl with a "prompt" field, or .txt.')],
    judges: Annotated[str, typer.Option(help="package.module:ATTR or file.py:ATTR, a dict of objective -> judge.")],
    policy_adapter: Annotated[list[str] | None, _adapter("--policy_adapter")] = None,
    policy_scale: Annotated[float, _scale("--policy_scale")] = 1.0,
    baseline: Annotated[
        str | None,
        typer.Option(help="Model or adapter to compare with. Default: the policy's base model, its adapter off."),
    ] = None,
    baseline_adapter: Annotated[list[str] | None, _adapter("--baseline_adapter")] = None,
    baseline_scale: Annotated[float, _scale("--baseline_scale")] = 1.0,
    samples: Annotated[int, typer.Option(min=1, help="Responses drawn for each prompt from each policy.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1, help="Longest response, tokens.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top_p", min=0.0, max=1.0, help="Nucleus mass.")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Sequences decoded together.")] = 16,
    limit: Annotated[int | None, typer.Option(min=2, help="Use the first so many prompts only.")] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="OBJECTIVE=VALUE, a win rate to hold; repeat for several.")
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.0, max=1.0, help="Level of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and bootstrap.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: CUDA where there is one, else cpu.")] = None,
    chat: Chat = "auto",
    chat_template_kwargs: TemplateVariables = None,
    output: Annotated[Path | None, typer.Option(help="Write the report, samples and scores included, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the plane of two objectives.")] = None,
    x: Annotated[str | None, typer.Option(help="Objective on the plot's horizontal axis.")] = None,
    y: Annotated[str | None, typer.Option(help="Objective on the plot's vertical axis.")] = None,
) -> None:
    """Report win rates of one policy over another, or of all policies of a sweep over one.

    Samples from both, judges the samples, gives the win rate on every objective with a bootstrap interval by prompt.
    For a sweep also which points no other dominates; its picture has --y (default: the primary objective) over --x
    (default: every other that was held).
    """
    loading = {"device": device, **chat_options(chat, chat_template_kwargs)}
    judge_of = load_judges(judges)
    thresholds = _thresholds(threshold or [], list(judge_of))
    across = [] if x is None else [x]
    sweep = read_sweep(policy) if is_sweep(policy) else None
    compared = [name for name in judge_of if sweep is not None and name in sweep["compared"]] or list(judge_of)
    ours_on = adapters("--policy_adapter", policy_adapter)
    theirs_on = adapters("--baseline_adapter", baseline_adapter)
    if sweep is not None and (ours_on is not None or policy_scale != 1.0):
        raise ValueError(
            "--policy_adapter, --policy_scale: expected neither with a sweep, whose adapters are known; "
            f"got {', '.join(ours_on or [str(policy_scale)])}"
        )
    held_out = load_prompts(prompts)[:limit]
    if len(held_out) < 2:
        raise ValueError(f"--prompts {prompts}: expected at least 2 prompts; got {len(held_out)}")
    if plot is not None:
        # Before the long part: a missing package or a misspelt objective must not cost the samples.
        from mopo_kernels.plots import require_matplotlib

        require_matplotlib()
        if sweep is not None:
            y = y or sweep["primary"]
            if x is None:
                across = [name for name in compared if name != y]
        for option, objective in (("--x", across[0] if across else None), ("--y", y)):
            if objective not in judge_of:
                raise ValueError(f"{option}: expected one of {', '.join(judge_of)}; got {objective}")
    for option, path in (("--output", output), ("--plot", plot)):
        if path is not None:
            prepare_file(option, path)

    if sweep is not None:
        _nondominated(np.empty((0, 1)))  # a missing package shows before the work, not after it
        candidates = load_sweep_policies(policy, **loading)
    elif baseline is None and ours_on is None and not is_adapter(policy):
        raise ValueError("--baseline: expected a model, as the policy has no adapter, so no base model; got none")
    else:
        candidates = [load_policy(policy, ours_on, scale=policy_scale, **loading)]
    candidate = candidates[0]
    if baseline is None and theirs_on is None:
        if baseline_scale != 1.0:
            raise ValueError(
                f"--baseline_scale: expected 1 without --baseline or --baseline_adapter; got {baseline_scale}"
            )
        reference = candidate.base()
    else:
        reference = load_policy(
            baseline or candidate.source, theirs_on, share=candidate, scale=baseline_scale, **loading
        )

    ours, theirs = candidate.name, reference.name
    if ours == theirs:
        ours, theirs = f"{ours} (policy)", f"{theirs} (baseline)"

    comparisons = compare_with_baseline(
        candidates,
        reference,
        held_out,
        judge_of,
        samples_per_prompt=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        confidence=confidence,
    )
    comparison = comparisons[0]
    points = {candidate.name: each for candidate, each in zip(candidates, comparisons, strict=True)}
    front = _front(points, compared) if sweep is not None else []
    if output is not None:
        settings = {
            "policy": policy,
            "policy_adapter": ours_on,
            "policy_scale": policy_scale,
            "baseline": baseline,
            "baseline_adapter": theirs_on,
            "baseline_scale": baseline_scale,
            "prompts": str(prompts),
            "judges": judges,
            "samples": samples,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "batch_size": batch_size,
            "confidence": confidence,
            "seed": seed,
            "thresholds": thresholds,
        }
        report: dict[str, Any] = {"settings": settings, "versions": _versions()}
        if sweep is None:
            report |= comparison.as_dict()
        else:
            each = {name: {"nondominated": name in front, **point.as_dict()} for name, point in points.items()}
            report |= {"compared": compared, "points": each}
        output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot is not None:
        from mopo_kernels.plots import plot_plane, plot_policies

        assert y is not None  # checked above
        if sweep is None:
            plot_plane({ours: comparison.win_rates}, plot, x=across[0], y=y, thresholds=thresholds, parity=theirs)
        else:
            rates = {name: point.win_rates for name, point in points.items()}
            plot_policies(
                {name: {key: rate.mean for key, rate in found.items()} for name, found in rates.items()},
                plot,
                x=across,
                y=y,
                nondominated=front,
                scale=f"win rate over {theirs} (0 to 1)",
                intervals={
                    name: {key: (rate.low, rate.high) for key, rate in found.items()} for name, found in rates.items()
                },
                bounds=dict.fromkeys(points, thresholds),
                parity=theirs,
                title=f"Bars: {confidence:.0%} intervals, {len(held_out)} prompts",
            )
    if sweep is None:
        show(_table(comparison, ours, theirs, thresholds))
    else:
        show(_sweep_table(points, theirs, thresholds, compared, front))


def adapters(option: str, values: Sequence[str] | None) -> dict[str, float] | None:
    """ADAPTER or ADAPTER=WEIGHT, each once, as a mapping; a folder's own name may hold "="."""
    found: dict[str, float] = {}
    for value in values or ():
        folder, equals, weight = value.rpartition("=")
        if Path(value).exists() or not equals:
            folder, weight = value, "1"
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(f"{option}: expected ADAPTER or ADAPTER=WEIGHT; got {value!r}") from None
        if folder in found:
            raise ValueError(f"{option}: expected every adapter once; got {folder!r} twice")
        found[folder] = number
    return found or None


def _front(points: Mapping[str, Comparison], objectives: Sequence[str]) -> list[str]:
    """The points whose mean win rates no other point dominates."""
    means = [[point.win_rates[name].mean for name in objectives] for point in points.values()]
    return [name for name, mark in zip(points, _nondominated(means), strict=True) if mark]


def _nondominated(points: Any) -> np.ndarray:
    # Here, as its solvers take a while to import, and every command's --help reads this file.
    from mopo_kernels.tabular import nondominated

    return nondominated(points)


def _thresholds(options: list[str], objectives: list[str]) -> dict[str, float]:
    expected = (
        f"--threshold: expected OBJECTIVE=VALUE, an objective of {', '.join(objectives)} and a value in [0, 1]; got"
    )
    thresholds: dict[str, float] = {}
    for option in options:
        try:
            found = parse_mapping("--threshold", option)
        except ValueError:
            raise ValueError(f"{expected} {option!r}") from None
        if not all(name in objectives and 0.0 <= bound <= 1.0 for name, bound in found.items()):
            raise ValueError(f"{expected} {option!r}")
        if twice := [name for name in found if name in thresholds]:
            raise ValueError(f"--threshold: expected every objective once; got {twice[0]!r} twice")
        thresholds |= found
    return thresholds


def _versions() -> dict[str, str | None]:
    packages = {name: installed_version(name) for name in ("torch", "transformers", "peft")}
    return {"mopo-kernels": mopo_kernels.__version__, **packages}


def _sweep_table(
    points: Mapping[str, Comparison],
    baseline: str,
    thresholds: dict[str, float],
    compared: Sequence[str],
    front: Sequence[str],
) -> Table:
    """A row per point, a column per objective."""
    first = next(iter(points.values()))
    rates = first.win_rates
    level = next(iter(rates.values())).confidence
    table = Table(
        title=literal(f"{len(points)} policies over {baseline}: {len(first.prompts)} prompts"),
        caption=literal(
            f"Win rates with {level:.0%} intervals; 0.5 is parity. front: no other point has as high a mean win rate "
            f"on each of {', '.join(compared)} and a higher on one."
        ),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("point", overflow="fold", min_width=10)
    for name in rates:
        held = f" >= {thresholds[name]:.3f}" if name in thresholds else ""
        table.add_column(literal(name + held), justify="right")
    table.add_column("front", justify="right")
    for point, comparison in points.items():
        cells = []
        for name, rate in comparison.win_rates.items():
            missed = name in thresholds and rate.mean < thresholds[name]
            cells.append(f"{rate.mean:.3f} ({rate.low:.3f} to {rate.high:.3f}){' [red]missed[/]' if missed else ''}")
        table.add_row(literal(point), *cells, "yes" if point in front else "dominated")
    return table


def _table(comparison: Comparison, candidate: str, baseline: str, thresholds: dict[str, float]) -> Table:
    first = next(iter(comparison.win_rates.values()))
    ours, theirs = comparison.candidate_length, comparison.baseline_length
    table = Table(
        title=literal(f"{candidate} over {baseline}: {first.prompts} prompts, {first.samples} responses each side"),
        caption=f"0.5 is parity. Mean length {ours.mean:.1f} {ours.unit} against {theirs.mean:.1f}.",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("objective", overflow="fold", min_width=10)
    for heading in ("win rate", f"{first.confidence:.0%} interval", "ties", "mean scores"):
        table.add_column(heading, justify="right", no_wrap=True)
    if thresholds:
        table.add_column("threshold", justify="right", no_wrap=True)
    for name, rate in comparison.win_rates.items():
        scores = comparison.mean_score(name)
        row = [literal(name), f"{rate.mean:.3f}", f"{rate.low:.3f} to {rate.high:.3f}", f"{rate.ties:.1%}"]
        row.append(f"{scores[0]:.3g} : {scores[1]:.3g}")
        if name in thresholds:
            held = rate.mean >= thresholds[name]
            row.append(f"{thresholds[name]:.3f} {'[green]held[/]' if held else '[red]missed[/]'}")
        table.add_row(*row)
    return table
