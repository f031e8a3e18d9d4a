"""Time and memory of the loss over the head, as a ratio to the bare products of the same run.

    python -m bench.head                     # the shape of the README's table; --help for others

Implementations take turns, each with fresh inputs; medians are over rounds, and every implementation's result is
compared with plain PyTorch's, in fp32 on the same numbers, before it is timed. Memory is the allocator's peak during
the call, gradients included. What cannot run here is listed with the reason.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.implementations import BARE, Implementation, Inputs, Workload, available
from bench.provenance import provenance
from mopo_kernels.files import prepare_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative, of the loss and of each gradient. In bf16 a log-probability near -11 nats is rounded to 1/16 nats by a peer
# that returns it in the inputs' dtype; a token, a pair or an objective left out makes a difference of tenths.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def peak_mib(call: Callable[[], Any]) -> float:
    """The allocator's peak during a call, MiB."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del result
    return peak / 2**20


def check(work: Workload, implementations: dict[str, Implementation]) -> dict[str, float]:
    """Largest relative difference of each implementation's loss and gradients from plain PyTorch's with the same loss,
    in fp32.

    Raises:
        SystemExit: one is above ``TOLERANCE``.
    """
    inputs = Inputs.make(work, 0)
    expected = {}
    errors = {}
    for name, implementation in implementations.items():
        if implementation.expected is None:
            continue
        if implementation.loss not in expected:
            expected[implementation.loss] = implementation.expected(inputs.in_fp32())
        got = implementation.run(inputs)
        errors[name] = max(
            ((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, expected[implementation.loss], strict=True)
        )
        if not errors[name] < TOLERANCE[work.dtype]:
            raise SystemExit(f"{name} disagrees with plain PyTorch by {errors[name]:.1e}: nothing is reported")
    return errors


def measure(work: Workload, implementations: dict[str, Implementation], rounds: int) -> dict[str, dict[str, Any]]:
    """Per implementation: seconds (median, p20, p80), ratio to bare products (median over rounds), peak MiB, loss."""
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    for seed in track(range(rounds + 1), description="rounds"):
        inputs = Inputs.make(work, seed)
        for name, implementation in implementations.items():
            start = time.perf_counter()
            implementation.run(inputs)
            seconds[name].append(time.perf_counter() - start)
    # The first round warms up.
    floor = seconds[BARE][1:]
    inputs = Inputs.make(work, 0)
    results = {}
    for name, implementation in implementations.items():
        taken = seconds[name][1:]
        cuts = statistics.quantiles(taken, n=10, method="inclusive")
        results[name] = {
            "loss": implementation.loss,
            "seconds": statistics.median(taken),
            "p20": cuts[1],
            "p80": cuts[7],
            "ratio": statistics.median(a / b for a, b in zip(taken, floor, strict=True)),
            "peak_mib": peak_mib(functools.partial(implementation.run, inputs)),
        }
    return results


def show(work: Workload, results: dict[str, dict[str, Any]], unavailable: dict[str, str]) -> None:
    """The table, and below it whose loss is another and what could not run."""
    table = Table(
        title=f"N {work.scored} scored tokens, H {work.hidden}, V {work.vocabulary}, {work.units} units, "
        f"{torch.get_num_threads()} threads, {str(work.dtype).removeprefix('torch.')}"
    )
    for heading in ("implementation", "time / bare", "seconds", "p20 to p80", "peak MiB"):
        table.add_column(heading, no_wrap=True)
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['ratio']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['p20']:.2f} to {row['p80']:.2f}",
            f"{row['peak_mib']:.0f}",
        )
    for name in unavailable:
        table.add_row(name, *["-"] * 4)
    console = Console(width=max(100, Console().width))
    console.print(table)
    for name, row in results.items():
        if row["loss"] not in ("none", "regression"):
            console.print(f"{name}: its own loss, {row['loss']}, on the same rows", highlight=False)
    for name, reason in unavailable.items():
        console.print(f"{name}: cannot run here: {reason}", markup=False, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--objectives", type=int, default=2)
    parser.add_argument("--frozen", action="store_true", help="freeze the head")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of hidden states and head")
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument(
        "--implementations", nargs="+", default=[], metavar="NAME", help="only those whose name contains one of these"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    for name, least in (
        ("hidden", 1),
        ("vocabulary", 1),
        ("prompts", 1),
        ("length", 1),
        ("objectives", 1),
        ("rounds", 2),
    ):
        if (got := getattr(options, name)) < least:
            parser.error(f"argument --{name}: expected at least {least}; got {got}")
    if options.output is not None:
        try:
            prepare_file("--output", options.output)
        except ValueError as error:
            parser.error(str(error))
    try:
        implementations, unavailable = available(tuple(options.implementations))
    except ValueError as error:
        parser.error(f"argument --implementations: {error}")
    work = Workload(
        hidden=options.hidden,
        vocabulary=options.vocabulary,
        prompts=options.prompts,
        length=options.length,
        objectives=options.objectives,
        trained=not options.frozen,
        dtype=DTYPES[options.dtype],
    )
    errors = check(work, implementations)
    results = measure(work, implementations, options.rounds)
    show(work, results, unavailable)
    record = {
        "workload": {**work.__dict__, "dtype": str(work.dtype), "scored": work.scored},
        "results": results,
        "unavailable": unavailable,
        "difference_from_plain": errors,
        "rounds": options.rounds,
        **provenance("bench.head", sys.argv[1:] if arguments is None else arguments),
    }
    print(json.dumps(record))
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
