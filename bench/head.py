"""Time and memory of the loss over the head, as a ratio to the bare products of the same run.

    python -m bench.head                     # the shape of the README's table; --help for others

Contenders take turns, each with fresh inputs; medians are over rounds, and every contender's result is compared with
plain PyTorch's before it is timed. Memory is the allocator's peak during the call, gradients included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.contenders import CONTENDERS, Inputs, Workload


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


def check(work: Workload) -> dict[str, float]:
    """Largest relative difference of each contender's loss and gradients from plain PyTorch's; raises above 1e-3."""
    inputs = Inputs.make(work, 0)
    expected = CONTENDERS["plain PyTorch, scored rows"](inputs)
    errors = {}
    for name, run in CONTENDERS.items():
        if name == "bare products":
            continue
        got = run(inputs)
        errors[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))
        if not errors[name] < 1e-3:
            raise SystemExit(f"{name} disagrees with plain PyTorch by {errors[name]:.1e}: nothing is reported")
    return errors


def measure(work: Workload, rounds: int) -> dict[str, dict[str, float]]:
    """Per contender: seconds (median, p20, p80), ratio to bare products (median over rounds), peak MiB."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for seed in track(range(rounds + 1), description="rounds"):
        inputs = Inputs.make(work, seed)
        for name, run in CONTENDERS.items():
            start = time.perf_counter()
            run(inputs)
            seconds[name].append(time.perf_counter() - start)
    floor = seconds["bare products"][1:]
    inputs = Inputs.make(work, 0)
    results = {}
    for name, run in CONTENDERS.items():
        taken = seconds[name][1:]
        cuts = statistics.quantiles(taken, n=10)
        results[name] = {
            "seconds": statistics.median(taken),
            "p20": cuts[1],
            "p80": cuts[7],
            "ratio": statistics.median(a / b for a, b in zip(taken, floor, strict=True)),
            "peak_mib": peak_mib(lambda run=run: run(inputs)),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--objectives", type=int, default=2)
    parser.add_argument("--frozen", action="store_true", help="freeze the head")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    work = Workload(
        hidden=arguments.hidden,
        vocabulary=arguments.vocabulary,
        prompts=arguments.prompts,
        length=arguments.length,
        objectives=arguments.objectives,
        trained=not arguments.frozen,
    )
    errors = check(work)
    results = measure(work, arguments.rounds)
    table = Table(
        title=f"N {work.scored} scored tokens, H {work.hidden}, V {work.vocabulary}, {work.units} units, "
        f"{torch.get_num_threads()} threads, fp32"
    )
    for heading in ("contender", "time / bare", "seconds", "p20 to p80", "peak MiB"):
        table.add_column(heading)
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['ratio']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['p20']:.2f} to {row['p80']:.2f}",
            f"{row['peak_mib']:.0f}",
        )
    Console().print(table)
    record = {
        "workload": {**work.__dict__, "dtype": str(work.dtype), "scored": work.scored},
        "results": results,
        "difference_from_plain": errors,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], capture_output=True, text=True
        ).stdout.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print(json.dumps(record))
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
