"""What the commands share: how prompts are written, tables on stdout, errors and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from mopo_kernels.mappings import parse_json
from mopo_kernels.text import one_line

Chat = Annotated[
    str, typer.Option(help="Prompts that are strings as user turns of the chat template: auto, always or never.")
]
TemplateVariables = Annotated[
    str | None, typer.Option("--chat_template_kwargs", help="Variables for the chat template, as a JSON object.")
]


def chat_options(chat: str, chat_template_kwargs: str | None) -> dict[str, Any]:
    """How prompts are written, as ``evaluation.load_policy`` takes it."""
    return {"chat": chat, "chat_template_kwargs": parse_json("--chat_template_kwargs", chat_template_kwargs)}


def show_help(context: typer.Context) -> None:
    """The help of a command of commands, where none of them was named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def literal(text: str) -> str:
    """``text`` as a cell or a title that shows it as it is, in one line: no markup, no terminal code."""
    return escape(one_line(text))


def show(part: RenderableType) -> None:
    """Print a table or a text. In a pipe or a file no line is folded, and none ends in spaces."""
    if sys.stdout.isatty():
        Console(highlight=False, emoji=False).print(part)
        return
    console = Console(width=10_000, highlight=False, emoji=False)
    with console.capture() as captured:
        console.print(part)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def print_line(text: str, console: Console) -> None:
    """A line as it is: names from data are neither markup nor what a terminal acts on."""
    console.print(Text(one_line(text)), highlight=False)


def fail(message: object, status: int = 2) -> NoReturn:
    """One clear line on stderr, then the exit status."""
    print_line(f"mopo: error: {' '.join(str(message).split())}", Console(stderr=True, soft_wrap=True))
    raise typer.Exit(status)


@contextmanager
def count_rows(description: str, total: int | None = None) -> Iterator[Any]:
    """A bar on stderr; yields the callable that counts one row, or so many."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # Where nobody watches, a bar would leave stray lines in the log.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count=1: bar.advance(task, count)
