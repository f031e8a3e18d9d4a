"""`mopo certify`: whether a policy keeps its thresholds on prompts to come, with a chosen probability."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

import mopo_kernels
from mopo_kernels.certify import ESTIMATORS, certify, measure_judged, measure_pairs
from mopo_kernels.cli.doctor import installed_version
from mopo_kernels.cli.output import Chat, TemplateVariables, chat_options, literal, show
from mopo_kernels.evaluation import is_adapter, is_sweep, load_judges, load_policy, load_prompts, read_sweep
from mopo_kernels.files import prepare_file
from mopo_kernels.mappings import parse_mappings


def certify_policies(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="POLICY[=SCALE]...",
            help="Model or adapter, folder or hub name; of several, one half of the prompts chooses which. "
            "SCALE multiplies an adapter's update.",
        ),
    ],
    thresholds: Annotated[list[str], typer.Option(help="OBJECTIVE=VALUE,..., the lowest values allowed.")],
    data: Annotated[
        str | None, typer.Option(help="Held-out labelled pairs whose responses the base model wrote: file or hub name.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="With --data: which split, when there are several.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="With --data: the rows' own names of columns: prompt=question,system=persona.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Or held-out prompts, answered afresh: .jsonl or .txt.")] = None,
    judges: Annotated[
        str | None, typer.Option(help="With --prompts: package.module:ATTR or file.py:ATTR, objective -> judge.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Probability that all bounds hold.")] = 0.95,
    primary: Annotated[
        str | None, typer.Option(help="What a choice among several maximises; default: the first without a threshold.")
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="With --data: snis (win rates over the base model) or pair (a scale of its own).")
    ] = "snis",
    baseline: Annotated[
        str | None, typer.Option(help="The model that wrote the responses. Default: the policy's base, adapter off.")
    ] = None,
    max_response_length: Annotated[
        int | None,
        typer.Option(
            "--max_response_length", min=1, help="With --data: tokens after which every response was cut, EOS included."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="With --prompts: responses a prompt from each policy.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1, help="Longest such response, tokens.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top_p", min=0.0, max=1.0, help="Nucleus mass.")] = 1.0,
    batch_size: Annotated[
        int, typer.Option("--batch_size", min=1, help="Sequences decoded, or prompts scored, together.")
    ] = 16,
    effective_prompts: Annotated[
        float,
        typer.Option(
            "--effective_prompts", min=2.0, help="Effective number of prompts below which nothing is certified."
        ),
    ] = 30.0,
    coverage: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Mean importance weight below which nothing is certified.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="Of the two halves, and of sampling.")] = 0,
    device: Annotated[str | None, typer.Option(help="Default: CUDA where there is one, else cpu.")] = None,
    chat: Chat = "auto",
    chat_template_kwargs: TemplateVariables = None,
    output: Annotated[Path | None, typer.Option(help="Write the record as JSON.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Write it into the model card in the policy's folder.")] = False,
) -> None:
    """Certify that a policy keeps thresholds on prompts to come. Exit code 0: certified; 1: not.

    Nothing may have been trained or chosen on the prompts given here. Lower bounds hold together with the probability
    --confidence; with several policies one half of the prompts chooses, the other half certifies.
    """

    if (data is None) == (prompts is None):
        raise ValueError(f"--data, --prompts: expected one of them; got {'neither' if data is None else 'both'}")
    if (prompts is None) != (judges is None):
        raise ValueError("--judges: expected with --prompts, and only then; got one without the other")
    for option, value in (("--split", split), ("--columns", columns)):
        if data is None and value is not None:
            raise ValueError(f"{option}: expected it with --data only; got {value!r}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"--estimator: expected one of {', '.join(ESTIMATORS)}; got {estimator}")
    if not 0.5 < confidence < 1.0:
        raise ValueError(f"--confidence: expected a number in (0.5, 1); got {confidence}")
    bounds = parse_mappings("--thresholds", thresholds)
    places = [place for policy in policies for place in _places(policy)]
    if card and (absent := [place for place, _ in places if not Path(place).is_dir()]):
        raise ValueError(f"--card: expected the policy in a folder of this machine; got {absent[0]}")
    held: Any
    if data is not None:
        from mopo_kernels.data import load_preferences

        held = load_preferences(data, split=split, columns=columns)
        objectives: Sequence[str] = held.objectives
    else:
        assert prompts is not None
        assert judges is not None
        held, judge_of = load_prompts(prompts), load_judges(judges)
        objectives = list(judge_of)
    _check_thresholds(bounds, objectives)
    if primary is None:
        primary = next((name for name in objectives if name not in bounds), objectives[0])
    if primary not in objectives:
        raise ValueError(f"--primary: expected one of {', '.join(objectives)}; got {primary}")
    if output is not None:
        prepare_file("--output", output)

    loading = {"device": device, **chat_options(chat, chat_template_kwargs)}
    candidates = [load_policy(places[0][0], scale=places[0][1], **loading)]
    for place, scale in places[1:]:
        candidates.append(load_policy(place, scale=scale, share=candidates[0], **loading))
    if baseline is not None:
        against = load_policy(baseline, share=candidates[0], **loading)
    elif all(is_adapter(place) for place, _ in places) and len({policy.source for policy in candidates}) == 1:
        against = candidates[0].base()
    else:
        raise ValueError("--baseline: expected a model, as the policies are not all adapters on one; got none")
    if data is not None:
        asked, measure = measure_pairs(
            candidates, against, held, estimator, max_response_length=max_response_length, batch_size=batch_size
        )
    else:
        asked, measure = measure_judged(
            candidates,
            against,
            held,
            judge_of,
            seed=seed,
            samples_per_prompt=samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
        )
    decision = certify(
        measure,
        len(candidates),
        asked,
        bounds,
        primary,
        confidence=confidence,
        effective_prompts=effective_prompts,
        coverage=coverage,
        seed=seed,
    )
    place, scale = places[decision.chosen]
    settings: dict[str, Any] = {"data": data, "estimator": estimator, "max_response_length": max_response_length}
    if data is None:
        settings = {"prompts": str(prompts), "judges": judges, "samples": samples, "max_new_tokens": max_new_tokens}
        settings |= {"temperature": temperature, "top_p": top_p, "batch_size": batch_size}
    settings |= {"primary": primary, "effective_prompts": effective_prompts, "least_coverage": coverage, "seed": seed}
    versions = {name: installed_version(name) for name in ("torch", "transformers", "peft")}
    record = {
        "policy": place,
        "scale": scale,
        "weights": _digest(Path(place)),
        "baseline": against.source,
        **decision.certificate.as_dict(),
        "candidates": [
            {"policy": name, "scale": factor, **found.as_dict()}
            for (name, factor), found in zip(places, decision.choice, strict=False)
        ],
        "settings": settings,
        "versions": {"mopo-kernels": mopo_kernels.__version__, **versions},
    }
    if output is not None:
        output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if card:
        from mopo_kernels.trainer.model_card import add_certificate

        add_certificate(Path(place), record)
    show(_table(record, candidates[decision.chosen].name))
    if decision.choice:
        show(f"chosen among {len(candidates)} policies on {decision.choice[0].prompts} other prompts")
    for reason in record["refused"]:
        show(literal(f"nothing is certified: {reason}"))
    raise typer.Exit(0 if record["certified"] else 1)


def _places(policy: str) -> list[tuple[str, float]]:
    """(folder or hub name, scale) of POLICY or POLICY=SCALE; of a sweep's folder, those of its trained points."""
    name, equals, factor = policy.rpartition("=")
    scale = 1.0
    if equals and not Path(policy).exists():
        try:
            policy, scale = name, float(factor)
        except ValueError:
            raise ValueError(f"POLICY: expected a folder, a hub name or either with =SCALE; got {policy!r}") from None
    if not is_sweep(policy):
        return [(policy, scale)]
    points = [
        str(Path(policy) / point["name"]) for point in read_sweep(policy)["points"] if point["status"] == "trained"
    ]
    if not points:
        raise ValueError(f"POLICY {policy}: expected a sweep with a trained point; got none")
    return [(point, scale) for point in points]


def _check_thresholds(bounds: Mapping[str, float], objectives: Sequence[str]) -> None:
    if not bounds:
        raise ValueError("--thresholds: expected at least one OBJECTIVE=VALUE; got none")
    for name, bound in bounds.items():
        if name not in objectives or not 0.0 <= bound <= 1.0:
            raise ValueError(
                f"--thresholds: expected OBJECTIVE=VALUE, an objective of {', '.join(objectives)} and a value in "
                f"[0, 1]; got {name}={bound:g}"
            )


def _digest(folder: Path) -> str | None:
    """Tells the weights in a folder apart from any others; None for what is not in one."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _table(record: Mapping[str, Any], name: str) -> Table:
    table = Table(
        title=literal(f"{name} over {record['baseline']}: {record['prompts']} prompts"),
        caption=f"{'Certified' if record['certified'] else 'Not certified'}. All lower bounds hold with probability "
        f"{record['confidence']:g}.",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("objective", overflow="fold", min_width=10)
    for heading in ("threshold", "measured", "lower bound", "effective prompts"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for bound in record["bounds"]:
        table.add_row(
            literal(bound["objective"]),
            f"{bound['threshold']:.3f}",
            "no labels" if bound["value"] is None else f"{bound['value']:.3f} ± {bound['standard_error'] or 0:.3f}",
            "none" if bound["lower"] is None else f"{bound['lower']:.3f}",
            f"{bound['effective_prompts']:.0f}",
            "[green]kept[/]" if bound["kept"] else "[red]not shown[/]",
        )
    return table
