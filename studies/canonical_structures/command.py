"""Run the study and write its results: JSON, tables and pictures.

    python -m studies.canonical_structures          # everything, into results beside this (`make structures`)
    python -m studies.canonical_structures --fast   # small sizes, into runs/structures: does everything work?
    python -m studies.canonical_structures --only exact --structures flat_faces condorcet_within

Each part (a section of a structure) is kept as it finishes; --resume does not repeat those that the same commit made
with the same options. Tables and pictures are made from all the JSON in the output folder; `--only` without a section
does no more than that.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.provenance import ROOT
from studies.canonical_structures import report
from studies.canonical_structures.run import Part, PartsFailed, provenance, run_parts
from studies.canonical_structures.sections import FAST_STRUCTURES, SECTIONS, structures_of, study
from studies.canonical_structures.structures import STRUCTURES

RESULTS = Path(__file__).with_name("results")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.canonical_structures", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--fast", action="store_true", help="small sizes, few seeds and structures")
    parser.add_argument(
        "--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS)
    )
    parser.add_argument("--structures", nargs="+", choices=list(STRUCTURES), metavar="NAME", help="default all")
    parser.add_argument("--seeds", type=int, help="data sets of every setting (default 10, with --fast 3)")
    parser.add_argument("--output", type=Path, help="folder (default results beside this, with --fast runs/structures)")
    parser.add_argument("--jobs", type=int, default=2, help="parts at once, one thread each (default 2)")
    parser.add_argument("--resume", action="store_true", help="keep what the same commit made with the same options")
    options = parser.parse_args(arguments)
    if options.structures is None:
        options.structures = list(FAST_STRUCTURES if options.fast else STRUCTURES)
    if options.seeds is None:
        options.seeds = 3 if options.fast else 10
    for name, least in (("seeds", 2), ("jobs", 1)):
        if getattr(options, name) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {getattr(options, name)}")
    if options.output is None:
        options.output = ROOT / "runs" / "structures" if options.fast else RESULTS
    return options


def _run(options: argparse.Namespace, command: str, console: Console) -> None:
    """Run what was asked for, with a bar for the whole and one for each part that runs."""
    parts = [
        Part(section, name, options.seeds, options.fast)
        for section in SECTIONS
        if section in options.only
        for name in structures_of(section, options.structures)
    ]
    origin = provenance(command)
    if options.resume:
        parts = [part for part in parts if not part.is_kept(options.output, origin["commit"])]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        contextlib.closing(run_parts(study, parts, options.output, origin, options.jobs)) as events,
    ):
        whole = progress.add_task("all parts", total=len(parts))
        bars: dict[Part, TaskID] = {}
        for event in events:
            if event.kind == "started":
                bars[event.part] = progress.add_task(event.part.name, total=None)
            elif event.kind == "progress":
                progress.update(bars[event.part], completed=event.done, total=event.total)
            else:
                progress.remove_task(bars.pop(event.part))
                progress.advance(whole)
                console.print(f"{event.part.name}: {event.kind} in {event.seconds:.0f} s", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(stderr=True)
    status = 0
    try:
        _run(options, shlex.join(["python", "-m", "studies.canonical_structures", *given]), console)
    except KeyboardInterrupt:
        console.print("interrupted; finished parts are kept, --resume goes on from them", highlight=False)
        return 130
    except PartsFailed as failed:
        for part, reason in failed.failures.items():
            console.print(f"{part.name} failed:\n{reason}", markup=False, highlight=False)
        status = 1
    written = report.write(options.output)
    console.print(f"{len(written)} tables and pictures in {options.output}", highlight=False)
    return status
