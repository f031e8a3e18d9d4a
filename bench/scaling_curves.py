"""How time and memory of the loss over the head grow with tokens N, vocabulary V, objectives K and the prompt's share.

    python -m bench.scaling_curves     # about 9 minutes on 2 cores; --quick for small sizes, half a minute

One of the four moves and the others stay; the prompt's share moves at the same number of scored tokens. At each point
implementations are checked, take turns and are timed as in ``bench.head``, with the allocator's peak. Afterwards each
runs every point once more in a process of its own, for that process's high-water mark during the call (``VmHWM``, reset
before; where that is not permitted, the greatest resident size since it began) beyond what was held before it.

Over N and V a power is fitted, by least squares in the logarithms: 1 is proportional, 0 is constant. Over K and the
share stands the quotient of the last point to the first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import figures
from bench.head import DTYPES, check, measure
from bench.implementations import BARE, IMPLEMENTATIONS, Inputs, Workload, available
from bench.provenance import ROOT, provenance
from bench.step import Meter
from mopo_kernels import backends
from mopo_kernels.files import prepare_file

ALL_ROWS = "plain PyTorch, all rows"
COMPILED = "plain PyTorch, scored rows, compiled"
# What is freed goes back to the system at once, and MKL keeps nothing: no point's memory is lent to the next.
CHILD_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10), "MKL_DISABLE_FAST_MM": "1"}
PATIENCE = 900.0
AXES = ("N", "V", "K", "prompt share")
MEASURES = ("seconds", "ratio", "peak_mib", "beyond_mib")


@dataclass(frozen=True)
class Plan:
    """The values of each axis. ``tokens``, ``vocabulary``, ``objectives`` and ``share`` are those of the base."""

    hidden: int = 256
    tokens: int = 1024
    vocabulary: int = 8192
    objectives: int = 2
    share: float = 0.5
    # The fp32 logits of the last of each take 512 MiB, twice this library's buffer.
    axis_tokens: tuple[int, ...] = (256, 1024, 4096, 16384)
    axis_vocabulary: tuple[int, ...] = (2048, 8192, 32768, 131072)
    axis_objectives: tuple[int, ...] = (1, 2, 4, 8)
    axis_share: tuple[float, ...] = (0.0, 0.5, 0.8)

    def work(self, tokens: int, vocabulary: int, objectives: int, share: float) -> Workload:
        """Four pairs with that many scored tokens in all, and prompts of that share in front of them."""
        prompts = 4
        made = Workload(
            hidden=self.hidden,
            vocabulary=vocabulary,
            prompts=prompts,
            length=round(tokens / (2 * prompts) / (1 - share)),
            prompt_share=share,
            objectives=objectives,
        )
        assert made.scored == tokens, (made, tokens)
        return made

    def is_small(self, work: Workload) -> bool:
        """Not larger than the base: it gets thrice the rounds, as it takes little time."""
        return work.scored * work.vocabulary <= self.tokens * self.vocabulary

    def curves(self) -> dict[str, dict[float, Workload]]:
        """Axis -> value -> the work there, head trained, fp32."""
        n, v, k, share = self.tokens, self.vocabulary, self.objectives, self.share
        return {
            "N": {value: self.work(value, v, k, share) for value in self.axis_tokens},
            "V": {value: self.work(n, value, k, share) for value in self.axis_vocabulary},
            "K": {value: self.work(n, v, value, share) for value in self.axis_objectives},
            "prompt share": {value: self.work(n, v, k, value) for value in self.axis_share},
        }


FULL = Plan()
QUICK = Plan(
    hidden=256,
    tokens=256,
    vocabulary=2048,
    axis_tokens=(128, 256, 512, 1024),
    axis_vocabulary=(1024, 2048, 4096, 8192),
    axis_objectives=(1, 8),
    axis_share=(0.0, 0.8),
)


def defaults(quick: bool) -> tuple[str, ...]:
    """Names: bare products, this library as "auto" has it here, plain PyTorch; compiled only if there is time."""
    here = backends.resolve("auto", torch.device("cpu"))
    names = (BARE, f"mopo_kernels {here}", "plain PyTorch, scored rows", ALL_ROWS)
    return names if quick else (*names[:3], COMPILED, ALL_ROWS)


def power(values: Sequence[float], measured: Sequence[float]) -> float | None:
    """The exponent p of the c * values**p nearest in the logarithms; None where something measured is not above 0."""
    if min(measured) <= 0:
        return None
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])


def quotient(measured: Sequence[float]) -> float | None:
    """The last over the first; None where either is not above 0."""
    return measured[-1] / measured[0] if measured[0] > 0 and measured[-1] > 0 else None


def fits(axis: str, points: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Implementation -> measure -> power (N, V) or quotient (K, prompt share), of those measured at every point."""
    found: dict[str, dict[str, float | None]] = {}
    for name in points[0]["results"]:
        if any(name not in point["results"] for point in points):
            continue
        found[name] = {}
        for key in MEASURES:
            measured = [point["results"][name][key] for point in points]
            values = [point["value"] for point in points]
            found[name][key] = power(values, measured) if axis in ("N", "V") else quotient(measured)
    return found


# ------------------------------------------------------------------------------------------ an implementation's process


def child() -> None:
    """Reads an implementation's name and its works, one JSON on stdin; answers with a JSON line a work."""
    job = json.load(sys.stdin)
    run = IMPLEMENTATIONS[job["implementation"]].run
    for fields in job["works"]:
        work = Workload(**{**fields, "dtype": DTYPES[fields["dtype"]]})
        meter = Meter("cpu")
        inputs = Inputs.make(work, 0)
        # What is loaded or compiled at the first call is not the call's.
        run(inputs)
        before = meter.held_mib()
        meter.start()
        result = run(inputs)
        _, peak = meter.stop()
        del result, inputs
        answer = {"hwm_mib": peak, "beyond_mib": peak - before, "memory_method": meter.method}
        print(json.dumps(answer), flush=True)


def high_water(name: str, works: list[Workload]) -> list[dict[str, Any]]:
    """Of an implementation, at each work: the high-water mark, and what of it was not held before the call, MiB.

    Raises:
        SystemExit: its process failed.
    """
    fields = [{**asdict(work), "dtype": dtype_name(work)} for work in works]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.scaling_curves", "--child"],
            cwd=ROOT,
            env={**os.environ, **CHILD_ENVIRONMENT},
            input=json.dumps({"implementation": name, "works": fields}),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name}: its process took more than {PATIENCE:.0f} s: nothing is reported") from None
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(answers) != len(works):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"{name}: its process ended with status {done.returncode}: {last}: nothing is reported")
    return answers


# ----------------------------------------------------------------------------------------------------------- the parent


def dtype_name(work: Workload) -> str:
    return str(work.dtype).removeprefix("torch.")


def groups(dtypes: Sequence[str]) -> Iterator[tuple[str, bool]]:
    for dtype in dtypes:
        for trained in (True, False):
            yield dtype, trained


def explore(plan: Plan, names: Sequence[str], dtypes: Sequence[str], rounds: int, console: Console) -> dict[str, Any]:
    """Curves with their fits, and the largest difference of each implementation from plain PyTorch.

    Raises:
        SystemExit: an implementation disagrees with plain PyTorch, or its process failed.
    """
    chosen = {name: IMPLEMENTATIONS[name] for name in names}
    measured: dict[Workload, dict[str, dict[str, Any]]] = {}
    differences: dict[str, float] = {}
    axes = plan.curves()
    for dtype, trained in groups(dtypes):
        works = {
            axis: {value: replace(work, trained=trained, dtype=DTYPES[dtype]) for value, work in curve.items()}
            for axis, curve in axes.items()
        }
        distinct = list(dict.fromkeys(work for curve in works.values() for work in curve.values()))
        # Each group compiles anew: past a limit of variants torch.compile would go on uncompiled.
        torch._dynamo.reset()
        title = f"{dtype}, head {'trained' if trained else 'frozen'}"
        for work in track(distinct, description=title, console=console):
            # Beyond the scored rows there is something to see only where prompts move.
            there = work in works["prompt share"].values()
            implementations = {name: one for name, one in chosen.items() if there or not name.endswith("all rows")}
            with (
                contextlib.redirect_stdout(io.StringIO()),
                torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
            ):
                for name, difference in check(work, implementations).items():
                    differences[name] = max(difference, differences.get(name, 0.0))
                measured[work] = measure(work, implementations, rounds * (3 if plan.is_small(work) else 1))
    for name in track(chosen, description="high-water marks", console=console):
        works_of = [work for work, results in measured.items() if name in results]
        for work, answer in zip(works_of, high_water(name, works_of), strict=True):
            measured[work][name].update(answer)
    curves = []
    for dtype, trained in groups(dtypes):
        for axis, curve in axes.items():
            points = []
            for value, work in curve.items():
                moved = replace(work, trained=trained, dtype=DTYPES[dtype])
                points.append(
                    {
                        "value": value,
                        "rows": 2 * work.prompts * work.length,
                        "rounds": rounds * (3 if plan.is_small(work) else 1),
                        "results": measured[moved],
                    }
                )
            curves.append(
                {"axis": axis, "dtype": dtype, "trained": trained, "points": points, "fits": fits(axis, points)}
            )
    return {"curves": curves, "difference_from_plain": differences}


def show(record: dict[str, Any], console: Console) -> None:
    """A table of powers and quotients for each dtype and head."""
    plan = record["plan"]
    ends = {
        axis: (record["curves"][i]["points"][0]["value"], record["curves"][i]["points"][-1]["value"])
        for i, axis in enumerate(AXES)
    }
    over = [f"N^, {ends['N'][0]:g} to {ends['N'][1]:g}", f"V^, {ends['V'][0]:g} to {ends['V'][1]:g}"]
    over += [
        f"K {ends['K'][1]:g} / {ends['K'][0]:g}",
        f"share {ends['prompt share'][1]:g} / {ends['prompt share'][0]:g}",
    ]
    for start in range(0, len(record["curves"]), len(AXES)):
        four = record["curves"][start : start + len(AXES)]
        table = Table(
            title=f"{four[0]['dtype']}, head {'trained' if four[0]['trained'] else 'frozen'}; otherwise N "
            f"{plan['tokens']}, V {plan['vocabulary']}, K {plan['objectives']}, prompt share {plan['share']:g}, H "
            f"{plan['hidden']}, {record['threads']} threads"
        )
        table.add_column("implementation", no_wrap=True)
        for what in ("time", "peak"):
            for heading in over:
                table.add_column(f"{what}\n{heading}", justify="right")
        for name in dict.fromkeys(name for curve in four for name in curve["fits"]):
            cells = []
            for what in ("time", "peak"):
                for curve in four:
                    # At the same number of products, time / bare products is surer than seconds.
                    time = "seconds" if curve["axis"] in ("N", "V") else "ratio"
                    key = time if what == "time" else "beyond_mib"
                    got = curve["fits"].get(name, {}).get(key)
                    cells.append("-" if got is None else f"{got:.2f}")
            table.add_row(name, *cells)
        console.print(table)
    console.print(
        "N^ and V^: power fitted to the points; K and share: the last point over the first, at the same number of "
        "scored tokens; peak: the process's high-water mark beyond what was held before the call",
        highlight=False,
        soft_wrap=True,
    )
    for name, reason in record["unavailable"].items():
        console.print(f"{name}: cannot run here: {reason}", markup=False, highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing compiled")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3, help="at least 2 (default 3); small points get thrice as many")
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=[],
        metavar="NAME",
        help="those whose name contains one of these instead",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write, and beside it a picture for each dtype")
    options = parser.parse_args(arguments)
    if options.child:
        child()
        return
    if options.rounds < 2:
        parser.error(f"argument --rounds: expected at least 2; got {options.rounds}")
    if options.output is not None:
        try:
            prepare_file("--output", options.output)
        except ValueError as error:
            parser.error(str(error))
    try:
        runs, reasons = available(tuple(options.implementations))
    except ValueError as error:
        parser.error(f"argument --implementations: {error}")
    asked = [*runs, *reasons] if options.implementations else defaults(options.quick)
    plan = QUICK if options.quick else FULL
    dtypes = list(dict.fromkeys(options.dtype))
    explored = explore(plan, [name for name in asked if name in runs], dtypes, options.rounds, Console(stderr=True))
    record = {
        "plan": asdict(plan),
        **explored,
        "unavailable": {name: reasons[name] for name in asked if name in reasons},
        "rounds": options.rounds,
        **provenance("bench.scaling_curves", sys.argv[1:] if arguments is None else arguments),
    }
    show(record, Console(width=max(130, Console().width)))
    print(json.dumps(record))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        try:
            for dtype in dtypes:
                figures.plot_scaling_curves(
                    record, dtype, options.output.with_name(f"{options.output.stem}_{dtype}.png")
                )
        except ModuleNotFoundError as error:
            print(f"no picture was drawn: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
