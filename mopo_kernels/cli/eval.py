"""`mopo eval`: sample from two policies, judge the samples, report the win rate of one over the other by objective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

import mopo_kernels
from mopo_kernels.cli.doctor import installed_version
from mopo_kernels.cli.output import prepare_file, show
from mopo_kernels.evaluation import Comparison, compare_policies, is_adapter, load_judges, load_policy, load_prompts
from mopo_kernels.mappings import parse_mapping

Adapter = Annotated[str | None, typer.Option(help="A peft adapter (folder or hub name) to put on it.")]


def evaluate(
    policy: Annotated[str, typer.Option(help="Model or adapter to judge: folder or hub name.")],
    prompts: Annotated[Path, typer.Option(help='Held-out prompts: .jsonl with a "prompt" field, or .txt.')],
    judges: Annotated[str, typer.Option(help="package.module:ATTR or file.py:ATTR, a dict of objective -> judge.")],
    policy_adapter: Adapter = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Model or adapter to compare with. Default: the policy's base model, its adapter off."),
    ] = None,
    baseline_adapter: Adapter = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses drawn for each prompt from each policy.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, tokens.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus mass.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 16,
    limit: Annotated[int | None, typer.Option(min=2, help="Use the first so many prompts only.")] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="OBJECTIVE=VALUE, a win rate to hold; repeat for several.")
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.0, max=1.0, help="Level of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and bootstrap.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: CUDA where there is one, else cpu.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the report, samples and scores included, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the plane of two objectives.")] = None,
    x: Annotated[str | None, typer.Option(help="Objective on the plot's horizontal axis.")] = None,
    y: Annotated[str | None, typer.Option(help="Objective on the plot's vertical axis.")] = None,
) -> None:
    """Report win rates of one policy over another.

    Samples from both, judges the samples, gives the win rate on every objective with a bootstrap interval by prompt.
    """
    judge_of = load_judges(judges)
    thresholds = _thresholds(threshold or [], list(judge_of))
    held_out = load_prompts(prompts)[:limit]
    if len(held_out) < 2:
        raise ValueError(f"--prompts {prompts} must hold at least 2 prompts, got {len(held_out)}")
    if plot is not None:
        # Before the long part: a missing package or a misspelt objective must not cost the samples.
        from mopo_kernels.plots import require_matplotlib

        require_matplotlib()
        for option, objective in (("--x", x), ("--y", y)):
            if objective not in judge_of:
                raise ValueError(f"{option} must be one of {', '.join(judge_of)}, got {objective}")
    for option, path in (("--output", output), ("--plot", plot)):
        if path is not None:
            prepare_file(option, path)

    if baseline is None and policy_adapter is None and not is_adapter(policy):
        raise ValueError("--baseline is needed: the policy has no adapter, so no base model to be compared with")

    candidate = load_policy(policy, policy_adapter, device=device)
    if baseline is None and baseline_adapter is None:
        reference = candidate.base()
    else:
        reference = load_policy(baseline or candidate.source, baseline_adapter, device=device, share=candidate)

    ours, theirs = candidate.name, reference.name
    if ours == theirs:
        ours, theirs = f"{ours} (policy)", f"{theirs} (baseline)"

    comparison = compare_policies(
        candidate,
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
    if output is not None:
        settings: dict[str, Any] = {
            "policy": policy,
            "policy_adapter": policy_adapter,
            "baseline": baseline,
            "baseline_adapter": baseline_adapter,
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
        report = {"settings": settings, "versions": _versions(), **comparison.as_dict()}
        output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if plot is not None:
        assert x is not None
        assert y is not None  # both checked above
        from mopo_kernels.plots import plot_plane

        plot_plane({ours: comparison.win_rates}, plot, x=x, y=y, thresholds=thresholds, parity=theirs)
    show(_table(comparison, ours, theirs, thresholds))


def _thresholds(options: list[str], objectives: list[str]) -> dict[str, float]:
    expected = (
        f"--threshold must be OBJECTIVE=VALUE, an objective of {', '.join(objectives)} and a value in [0, 1], got"
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
            raise ValueError(f"--threshold: {twice[0]!r} is given twice")
        thresholds |= found
    return thresholds


def _versions() -> dict[str, str | None]:
    packages = {name: installed_version(name) for name in ("torch", "transformers", "peft")}
    return {"mopo-kernels": mopo_kernels.__version__, **packages}


def _table(comparison: Comparison, candidate: str, baseline: str, thresholds: dict[str, float]) -> Table:
    first = next(iter(comparison.win_rates.values()))
    ours, theirs = comparison.candidate_length, comparison.baseline_length
    table = Table(
        title=escape(f"{candidate} over {baseline}: {first.prompts} prompts, {first.samples} responses each side"),
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
        row = [escape(name), f"{rate.mean:.3f}", f"{rate.low:.3f} to {rate.high:.3f}", f"{rate.ties:.1%}"]
        row.append(f"{scores[0]:.3g} : {scores[1]:.3g}")
        if name in thresholds:
            held = rate.mean >= thresholds[name]
            row.append(f"{thresholds[name]:.3f} {'[green]held[/]' if held else '[red]missed[/]'}")
        table.add_row(*row)
    return table
