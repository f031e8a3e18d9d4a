"""The commands of `mopo` and their arguments. Sub-commands import what they need when they run, so that `mopo doctor`
works where the training extra is missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import mopo_kernels
from mopo_kernels.cli import TRACEBACK
from mopo_kernels.cli.certify import certify_policies
from mopo_kernels.cli.doctor import diagnose
from mopo_kernels.cli.eval import evaluate
from mopo_kernels.cli.output import show_help
from mopo_kernels.cli.pareto import exact_front

# train, data and bench parse their own arguments, --help included.
_PASS_THROUGH: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
}

app = typer.Typer(
    name="mopo",
    help="Multi-objective preference optimisation: alignment under thresholds, from pairwise preferences.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("pareto")(exact_front)
app.command("eval")(evaluate)
app.command("certify")(certify_policies)
app.command("doctor")(diagnose)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mopo {mopo_kernels.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (as MOPO_TRACEBACK=1).")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ[TRACEBACK] = "1"
    show_help(context)


@app.command("train", help="Train a policy under thresholds.", **_PASS_THROUGH)
def _train(context: typer.Context) -> None:
    from mopo_kernels.cli.train import train

    train(list(context.args))


@app.command("data", help="Validate, convert and report on preferences.", **_PASS_THROUGH)
def _data(context: typer.Context) -> None:
    from mopo_kernels.cli.data import data_app

    command = typer.main.get_command(data_app)
    raise typer.Exit(command.main(args=list(context.args), prog_name="mopo data", standalone_mode=False) or 0)


@app.command("bench", help="Compare with plain PyTorch and peers on this machine.", **_PASS_THROUGH)
def _bench(context: typer.Context) -> None:
    from mopo_kernels.cli.bench import run_benchmarks

    run_benchmarks(list(context.args))


def run(argv: Sequence[str] | None) -> int:
    """Run the command line on argv (default: that of the process) and return its exit code. Errors are raised."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=None if argv is None else list(argv), prog_name="mopo", standalone_mode=False)
    except typer.Abort:
        code = 130
    if code == 130:
        # What typer makes of Ctrl-C, one way or the other.
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
