"""The command line, installed as `mopo`: train, pareto, data, eval, doctor.

Sub-commands import what they need when they run, so that `mopo doctor` works where the training extra is missing.
Errors of the user's making end in one line on stderr: exit code 2 for bad arguments, values and files, 1 for a missing
package, 130 for Ctrl-C. `mopo --debug ...` or MOPO_TRACEBACK=1 shows the traceback instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import mopo_kernels
from mopo_kernels.cli.doctor import OPTIONAL_PACKAGES, diagnose, install_hint
from mopo_kernels.cli.eval import evaluate
from mopo_kernels.cli.pareto import exact_front

_TRACEBACK = "MOPO_TRACEBACK"

# train and data parse their own arguments, --help included.
_PASS_THROUGH: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
}

app = typer.Typer(
    name="mopo",
    help="Multi-objective preference optimisation: alignment under thresholds, from pairwise preferences.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("pareto")(exact_front)
app.command("eval")(evaluate)
app.command("doctor")(diagnose)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mopo {mopo_kernels.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (as MOPO_TRACEBACK=1).")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ[_TRACEBACK] = "1"


@app.command("train", help="Train a policy under thresholds.", **_PASS_THROUGH)
def _train(context: typer.Context) -> None:
    from mopo_kernels.cli.train import train

    train(list(context.args))


@app.command("data", help="Validate, convert and report on preferences.", **_PASS_THROUGH)
def _data(context: typer.Context) -> None:
    from mopo_kernels.cli.data import data_app

    command = typer.main.get_command(data_app)
    raise typer.Exit(command.main(args=list(context.args), prog_name="mopo data", standalone_mode=False) or 0)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fail(message: str, code: int) -> int:
    print(f"mopo: {_one_line(message)}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on argv (default: that of the process) and return its exit code."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=None if argv is None else list(argv), prog_name="mopo", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if os.environ.get(_TRACEBACK, "") not in ("", "0"):
            raise
        # Click's errors know their own wording; typer has moved their classes about, so they are told by that method.
        if hasattr(error, "format_message"):
            return _fail(f"error: {error.format_message()}", 2)
        if isinstance(error, (ValueError, OSError)):
            return _fail(f"error: {error}", 2)
        if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL_PACKAGES:
            return _fail(f"error: {error.name} is {install_hint(error.name)}", 1)
        if isinstance(error, ImportError):
            return _fail(f"error: {error} (MOPO_TRACEBACK=1 shows where)", 1)
        raise
    if code == 130:
        return _fail("interrupted", 130)
    return code if isinstance(code, int) else 0
