"""``mopo data``: check, convert and describe preference data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mopo_kernels.cli.output import (
    Chat,
    TemplateVariables,
    chat_options,
    count_rows,
    fail,
    literal,
    print_line,
    show,
    show_help,
)
from mopo_kernels.data.converters import CONVERTERS
from mopo_kernels.data.dataset import PreferenceData
from mopo_kernels.data.loaders import load_preferences
from mopo_kernels.data.report import PreferenceReport, summarize
from mopo_kernels.data.schema import DataError, judged_text
from mopo_kernels.evaluation import Prompt, load_judges, load_policy, load_prompts
from mopo_kernels.files import prepare_file
from mopo_kernels.mappings import parse_mapping

data_app = typer.Typer(
    help="Check, convert and describe preference data.",
    invoke_without_command=True,
    callback=show_help,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Sources = Annotated[
    list[str],
    typer.Argument(
        help="File, folder or hub name; several, each as objective=path, are merged by prompt.", show_default=False
    ),
]
Format = Annotated[str, typer.Option(help=f"auto, {', '.join(CONVERTERS)}.")]
Split = Annotated[str | None, typer.Option(help="Which split, when there are several.")]
Config = Annotated[str | None, typer.Option("--name", help="Configuration of a hub data set.")]
DataDir = Annotated[str | None, typer.Option("--data_dir", help="Sub-folder, such as harmless-base.")]
Objectives = Annotated[str | None, typer.Option(help="Comma-separated objectives, in order.")]
Objective = Annotated[str | None, typer.Option(help="Name of the objective (hh-rlhf, trl, summarize-from-feedback).")]
Negative = Annotated[
    list[str] | None, typer.Option(help="Attribute of which less is better (helpsteer); may be repeated.")
]
Conversational = Annotated[
    bool | None,
    typer.Option("--conversational/--transcript", help="Turns as messages, or the text as it is (hh-rlhf)."),
]
PromptChars = Annotated[int | None, typer.Option("--max_prompt_chars", min=1, help="Characters a prompt may have.")]
ResponseChars = Annotated[
    int | None, typer.Option("--max_response_chars", min=1, help="Characters a response may have.")
]
MaxRows = Annotated[int | None, typer.Option("--max_rows", min=1, help="Read this many rows at most.")]
ColumnNames = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="The rows' own names of columns: prompt=question,system=persona; prompt=a+b joins two, prompt= has none.",
    ),
]


def _parse_sources(sources: list[str]) -> Any:
    """A path or name as it is, or {objective: path} for ``objective=path`` arguments."""
    if len(sources) == 1 and ("=" not in sources[0] or Path(sources[0]).exists()):
        return sources[0]
    named: dict[str, str] = {}
    for item in sources:
        objective, sign, path = item.partition("=")
        if not (objective and sign and path):
            fail(f"SOURCES: expected objective=path for each, to merge several; got {item!r}")
        if objective in named:
            fail(f"SOURCES: expected every objective once; got {objective!r} twice")
        named[objective] = path
    return named


def _prepare(option: str, path: Path) -> None:
    """``prepare_file``; what it refuses ends the command with status 2."""
    try:
        prepare_file(option, path)
    except ValueError as error:
        fail(error)


def _load(
    sources: list[str],
    format: str,
    split: str | None,
    name: str | None,
    data_dir: str | None,
    objectives: str | None,
    objective: str | None,
    negative: list[str] | None,
    conversational: bool | None,
    max_prompt_chars: int | None,
    max_response_chars: int | None,
    max_rows: int | None,
    columns: str | None,
    on_error: str,
    group: bool = False,
) -> PreferenceData:
    """``load_preferences`` with the command line's options; what it refuses ends the command with status 2."""
    options: dict[str, Any] = {}
    if objective is not None:
        options["objective"] = objective
    if negative:
        options["signs"] = dict.fromkeys(negative, -1)
    if conversational is not None:
        options["conversational"] = conversational
    names = [item.strip() for item in objectives.split(",")] if objectives is not None else None
    if on_error not in ("raise", "skip"):
        fail(f"--on_error: expected raise or skip; got {on_error!r}")
    try:
        with count_rows("reading") as advance:
            return load_preferences(
                _parse_sources(sources),
                format=format,
                split=split,
                name=name,
                data_dir=data_dir,
                objectives=names,
                on_error="skip" if on_error == "skip" else "raise",
                max_prompt_chars=max_prompt_chars,
                max_response_chars=max_response_chars,
                max_rows=max_rows,
                columns=columns,
                group=group,
                progress=advance,
                **options,
            )
    except ImportError as error:
        fail(error, status=1)
    except (ValueError, OSError) as error:
        skipped = error.skipped if isinstance(error, DataError) else ()
        if not skipped:
            fail(error)
        _print_skipped(skipped, Console(soft_wrap=True), 50)
        fail(f"no usable row, {len(skipped)} bad ones", status=1)


def _print_skipped(skipped: Sequence[DataError], console: Console, shown: int) -> None:
    for error in skipped[:shown]:
        print_line(str(error), console)
    if len(skipped) > shown:
        print_line(f"... and {len(skipped) - shown} more", console)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _print_report(report: PreferenceReport) -> None:
    show(
        f"{report.examples} examples, {report.prompts} distinct prompts, {report.responses} responses, "
        f"{report.pairs} pairs"
    )
    table = Table("objective", "labelled pairs", "coverage", "ties", "soft", "cycles / triples", title="Labels")
    for item in report.objectives:
        cells = (_percent(item.coverage), _percent(item.ties), _percent(item.soft))
        table.add_row(literal(item.objective), str(item.labelled), *cells, f"{item.cycles} / {item.triples}")
    show(table)
    if report.agreement:
        table = Table("objectives", "pairs with both", "correlation", "in conflict", title="Agreement within prompts")
        for entry in report.agreement:
            correlation = "-" if entry.correlation is None else f"{entry.correlation:+.3f}"
            table.add_row(
                literal(f"{entry.first}, {entry.second}"), str(entry.pairs), correlation, _percent(entry.conflict)
            )
        show(table)
    for message in report.messages:
        show(literal(f"note: {message}"))


@data_app.command()
def validate(
    sources: Sources,
    format: Format = "auto",
    split: Split = None,
    name: Config = None,
    data_dir: DataDir = None,
    objectives: Objectives = None,
    objective: Objective = None,
    negative: Negative = None,
    conversational: Conversational = None,
    max_prompt_chars: PromptChars = None,
    max_response_chars: ResponseChars = None,
    max_rows: MaxRows = None,
    columns: ColumnNames = None,
    shown: Annotated[int, typer.Option(min=1, help="List this many bad rows at most.")] = 50,
) -> None:
    """Check every row. Lists the bad ones as file:line: field: problem; exits 1 when there are any."""
    data = _load(
        sources, format, split, name, data_dir, objectives, objective, negative, conversational, max_prompt_chars,
        max_response_chars, max_rows, columns, "skip",
    )  # fmt: skip
    console = Console(soft_wrap=True)
    _print_skipped(data.skipped, console, shown)
    print_line(
        f"{len(data)} good examples, {len(data.skipped)} bad rows; objectives: {', '.join(data.objectives)}", console
    )
    if data.skipped:
        raise typer.Exit(1)


@data_app.command()
def convert(
    sources: Sources,
    output: Annotated[Path, typer.Option(help="Target, .jsonl or .parquet.")],
    format: Format = "auto",
    split: Split = None,
    name: Config = None,
    data_dir: DataDir = None,
    objectives: Objectives = None,
    objective: Objective = None,
    negative: Negative = None,
    conversational: Conversational = None,
    max_prompt_chars: PromptChars = None,
    max_response_chars: ResponseChars = None,
    max_rows: MaxRows = None,
    columns: ColumnNames = None,
    on_error: Annotated[
        str, typer.Option("--on_error", help="raise: stop at a bad row. skip: leave it out and list it.")
    ] = "raise",
    group: Annotated[bool, typer.Option("--group", help="Join the examples that share a prompt.")] = False,
) -> None:
    """Write preference data in the canonical schema."""
    if output.suffix not in (".jsonl", ".parquet"):
        fail(f"--output: expected a name ending in .jsonl or .parquet; got {output.name!r}")
    _prepare("--output", output)
    data = _load(
        sources, format, split, name, data_dir, objectives, objective, negative, conversational, max_prompt_chars,
        max_response_chars, max_rows, columns, on_error, group,
    )  # fmt: skip
    try:
        data.save(output)
    except OSError as error:
        fail(error)
    _print_skipped(data.skipped, Console(stderr=True, soft_wrap=True), 50)
    print_line(
        f"wrote {len(data)} examples to {output}, left out {len(data.skipped)} bad rows; "
        f"objectives: {', '.join(data.objectives)}",
        Console(soft_wrap=True),
    )


@data_app.command()
def report(
    sources: Sources,
    format: Format = "auto",
    split: Split = None,
    name: Config = None,
    data_dir: DataDir = None,
    objectives: Objectives = None,
    objective: Objective = None,
    negative: Negative = None,
    conversational: Conversational = None,
    max_prompt_chars: PromptChars = None,
    max_response_chars: ResponseChars = None,
    max_rows: MaxRows = None,
    columns: ColumnNames = None,
    on_error: Annotated[
        str, typer.Option("--on_error", help="raise: stop at a bad row. skip: leave it out and count it.")
    ] = "skip",
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this file, as JSON.")] = None,
) -> None:
    """Label coverage, ties, cycles, and how strongly the objectives agree within prompts."""
    if output is not None:
        _prepare("--output", output)
    data = _load(
        sources, format, split, name, data_dir, objectives, objective, negative, conversational, max_prompt_chars,
        max_response_chars, max_rows, columns, on_error,
    )  # fmt: skip
    with count_rows("counting", total=len(data)) as advance:
        findings = summarize(data, progress=advance)
    _print_report(findings)
    if output is not None:
        try:
            output.write_text(json.dumps(findings.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            fail(error)


@data_app.command()
def label(
    source: Annotated[
        str,
        typer.Argument(
            help="Prompts (.jsonl with a prompt field, or .txt) to answer with --policy; without it preference data in "
            "any format, whose responses are labelled anew.",
            show_default=False,
        ),
    ],
    judges: Annotated[str, typer.Option(help="package.module:ATTR or file.py:ATTR, a dict of objective -> judge.")],
    output: Annotated[Path, typer.Option(help="Target, .jsonl; an interrupted run goes on with it.")],
    policy: Annotated[str | None, typer.Option(help="Model or adapter that writes the responses.")] = None,
    policy_adapter: Annotated[str | None, typer.Option("--policy_adapter", help="A peft adapter to put on it.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Responses drawn for each prompt.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1, help="Longest response, tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top_p", min=0.0, max=1.0, help="Nucleus mass.")] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Sequences decoded together.")] = 16,
    stop: Annotated[str | None, typer.Option(help="A response ends before this text; \\n is a new line.")] = None,
    unfinished: Annotated[str, typer.Option(help="Responses cut at --max_new_tokens: drop or keep.")] = "drop",
    scale: Annotated[
        str, typer.Option(help="Difference of scores that wins 73 of 100: a number, or OBJECTIVE=NUMBER,...")
    ] = "1",
    hard: Annotated[bool, typer.Option("--hard", help="Labels 0, 1/2 and 1 by the order of the scores.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts only.")] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Prompts written together; an interruption costs one such part.")
    ] = 64,
    device: Annotated[
        str | None, typer.Option(help="For the policy. Default: CUDA where there is one, else cpu.")
    ] = None,
    chat: Chat = "auto",
    chat_template_kwargs: TemplateVariables = None,
    format: Format = "auto",
    split: Split = None,
    name: Config = None,
    data_dir: DataDir = None,
    conversational: Conversational = None,
    columns: ColumnNames = None,
) -> None:
    """Label pairs of responses by judges or reward models: P(i beats j) by the difference of their scores.

    With --policy the responses are drawn from a model, without it they are those of a data set. Rows stream to
    --output; beside it OUTPUT.label.json has the settings and how far the run has come.
    """
    from mopo_kernels.labelling import Sampler, Source, label_file

    if output.suffix != ".jsonl":
        fail(f"--output: expected a name ending in .jsonl; got {output.name!r}")
    if unfinished not in ("drop", "keep"):
        fail(f"--unfinished: expected drop or keep; got {unfinished!r}")
    _prepare("--output", output)
    prompts: list[Prompt]
    responses: Source
    try:
        judge_of = load_judges(judges)
        scales = _scales(scale, list(judge_of), hard)
        settings: dict[str, Any] = {"judges": judges, "policy": policy}
        if policy is None:
            data = _load(
                [source], format, split, name, data_dir, None, None, None, conversational, None, None, None, columns,
                "raise", group=True,
            )  # fmt: skip
            if data.template_columns:
                raise ValueError(
                    f"SOURCE: expected rows without {data.template_columns[0]}, which judges are not shown"
                )
            examples = list(data)[:limit]
            prompts = [example.prompt for example in examples]
            texts = [
                [judged_text(response, f"responses[{place}]") for place, response in enumerate(example.responses)]
                for example in examples
            ]

            def stored(first: int, part: Sequence[Prompt]) -> list[list[str]]:
                return texts[first : first + len(part)]

            responses = stored
            settings["source"] = _digest([prompts, texts])
        else:
            given: dict[str, Any] = {"--split": split, "--name": name, "--data_dir": data_dir, "--columns": columns}
            given |= {"--format": None if format == "auto" else format, "--conversational": conversational}
            if unused := [option for option, value in given.items() if value is not None]:
                raise ValueError(
                    f"{unused[0]}: expected it without --policy only, which answers a file of prompts; got it"
                )
            prompts = load_prompts(source)[:limit]
            writing = chat_options(chat, chat_template_kwargs)
            loaded = load_policy(policy, policy_adapter, device=device, **writing)
            sampling: dict[str, Any] = {
                "samples": samples,
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "batch_size": batch_size,
                "seed": seed,
                "stop": None if stop is None else stop.replace("\\n", "\n"),
                "keep_unfinished": unfinished == "keep",
            }
            responses = Sampler(loaded, **sampling)
            settings |= {"policy_adapter": policy_adapter, "source": _digest(prompts), **sampling, **writing}
        with count_rows("labelling", total=len(prompts)) as advance:
            progress = label_file(
                output,
                prompts,
                responses,
                judge_of,
                scales,
                settings=settings,
                chunk=chunk,
                advance=advance,
            )
    except ImportError as error:
        fail(error, status=1)
    except (ValueError, OSError) as error:
        fail(error)
    more = "" if policy is None or unfinished == "keep" else "; more of them end with more --max_new_tokens"
    show(
        literal(
            f"{progress.rows} rows in {output}, {progress.left_out} prompts left out with fewer than two "
            f"responses{more if progress.left_out else ''}; objectives: {', '.join(judge_of)}"
        )
    )


def _scales(text: str, objectives: list[str], hard: bool) -> dict[str, float | None]:
    """Objective -> scale of its soft labels; None for hard ones."""
    if hard:
        return dict.fromkeys(objectives)
    expected = f"--scale: expected a positive number, or one for each of {', '.join(objectives)}"
    try:
        found = dict.fromkeys(objectives, float(text))
    except ValueError:
        found = parse_mapping("--scale", text)
    if set(found) != set(objectives) or not all(0 < value < float("inf") for value in found.values()):
        raise ValueError(f"{expected}; got {text}")
    return dict(found)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
