"""All benchmarks of this machine: what `mopo bench` and `make bench` run.

    mopo bench                      # everything, into bench/results; --only NAME for some of it
    mopo bench --quick              # small sizes, into runs/bench, in under three minutes on 2 cores

First come tests that fast results equal the plain ones: if one is red, nothing is reported. Every section is a process
of its own that writes its JSON; one that fails is named at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from bench import instructions

ROOT = Path(__file__).resolve().parent.parent
# Values and gradients against the oracle, the error budget in every dtype, and that two runs are bitwise equal.
PARITY = (
    "tests/core/test_functional.py::test_linear_logprob_equals_the_oracle_for_any_upstream_gradient",
    "tests/core/test_functional.py::test_linear_mopo_loss_equals_the_oracle",
    "tests/core/test_functional.py::test_error_is_within_the_budget_of_plain_pytorch",
    "tests/core/test_functional.py::test_two_runs_are_bitwise_equal",
)
# How long an interrupted section may take to end its own processes and remove its files.
PATIENCE = 10.0


@dataclass(frozen=True)
class Section:
    """``python -m bench.<module> <arguments> --output <folder>/<name>.json``."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()

    def command(self, folder: Path) -> list[str]:
        output = str(folder / f"{self.name}.json")
        return [sys.executable, "-m", f"bench.{self.module}", *self.arguments, "--output", output]


def _head(name: str, *arguments: str) -> Section:
    return Section(name, "head", arguments)


def _layout(responses: int, pairs: str) -> Section:
    """Eight rows a step; prompts computed once or not."""
    only = ("mopo_kernels", "mopo_kernels, a row a response")
    shares = ("0.2", "0.5", "0.8")
    arguments = ("--responses", str(responses), "--pairs", pairs, "--prompt_share", *shares, "--tuning", "LoRA")
    return Section(f"step_layout_n{responses}_cpu", "step", (*arguments, "--implementations", *only))


_V51200 = ("--hidden", "2048", "--vocabulary", "51200", "--rounds", "3")
# Plain logits of this vocabulary take 2 GiB and more; compiled, half of that.
_V128256 = (
    "--hidden",
    "2048",
    "--vocabulary",
    "128256",
    "--rounds",
    "3",
    "--implementations",
    "mopo_kernels cpp",
    "compiled",
)
_SMALL = ("--hidden", "512", "--vocabulary", "8111", "--length", "128", "--rounds", "3")
FULL = (
    Section("accuracy_cpu", "accuracy"),
    _head("head_cpu", "--rounds", "3"),
    _head("head_frozen_cpu", "--rounds", "3", "--frozen"),
    _head("head_bf16_cpu", "--rounds", "5", "--dtype", "bfloat16"),
    _head("head_bf16_frozen_cpu", "--rounds", "5", "--dtype", "bfloat16", "--frozen"),
    _head("head_v51200_cpu", *_V51200),
    _head("head_v51200_frozen_cpu", *_V51200, "--frozen"),
    _head("head_v128256_cpu", *_V128256),
    _head("head_v128256_frozen_cpu", *_V128256, "--frozen"),
    Section("scaling_curves_cpu", "scaling_curves"),
    Section("step_cpu", "step"),
    Section("step_demo_cpu", "step", ("--demo",)),
    _layout(2, "4"),
    _layout(4, "12"),
    _layout(8, "28"),
    Section("instructions", "instructions"),
)
QUICK = (
    Section("accuracy_cpu", "accuracy", ("--draws", "3")),
    _head("head_cpu", *_SMALL),
    _head("head_frozen_cpu", *_SMALL, "--frozen"),
    _head("head_bf16_cpu", *_SMALL, "--dtype", "bfloat16"),
    Section("scaling_curves_cpu", "scaling_curves", ("--quick",)),
    Section("step_cpu", "step", ("--quick",)),
)


class BenchError(Exception):
    """Nothing, or not all, could be reported; the message is one line that says why."""


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    code: int
    stdout: str
    stderr: str

    def reason(self) -> str:
        """One line: how it ended."""
        how = f"ended by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        last = (self.stderr.strip() or self.stdout.strip()).splitlines()[-1:]
        return " ".join([f"{how}:", *last[0].split()]) if last else how


def run_process(command: Sequence[str]) -> Done:
    """Run a command in the repository, in a process group of its own: with whatever ends this, that group is ended."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return Done(process.returncode, stdout, stderr)


def require_parity(tests: Sequence[str]) -> str:
    """Run these tests and return pytest's last line.

    Raises:
        BenchError: not all of them passed.
    """
    done = run_process([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests])
    if done.code:
        last = (done.stdout.strip() or done.stderr.strip() or "no message").splitlines()[-1]
        raise BenchError(f"parity tests are not green, nothing is reported: {last}")
    return done.stdout.strip().splitlines()[-1]


def load(folder: Path, name: str) -> dict[str, Any] | None:
    """What a section of this run wrote; None if it did not."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def head_table(record: dict[str, Any], accuracy: dict[str, Any] | None) -> Table:
    """Time / bare products, memory and the error against fp64 of every implementation; reasons stand below the table.

    Args:
        accuracy: what ``bench.accuracy`` wrote, if it did.
    """
    work = record["workload"]
    dtype = work["dtype"].removeprefix("torch.")
    errors: dict[str, Any] = next(
        (
            group["results"]
            for group in (accuracy or {}).get("groups", [])
            if (group["dtype"], group["trained"]) == (dtype, work["trained"])
        ),
        {},
    )
    table = Table(
        title=f"{dtype}, head {'trained' if work['trained'] else 'frozen'}: N {work['scored']}, H {work['hidden']}, "
        f"V {work['vocabulary']}, K {work['objectives']}, {record['threads']} threads, medians of {record['rounds']} "
        "rounds"
    )
    table.add_column("implementation", no_wrap=True)
    for heading in ("time / bare", "seconds", "peak MiB", "error, fp64", "x plain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in record["results"].items():
        title = name if row["loss"] in ("none", "regression") else f"{name} (its own loss, {row['loss']})"
        error = errors.get(name)
        table.add_row(
            title,
            f"{row['ratio']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['peak_mib']:.0f}",
            "-" if error is None else f"{error['gradient']:.1e}",
            "-" if error is None else f"{error['times_plain']:.2f}",
        )
    return table


def report(section: Section, done: Done, folder: Path, made: Sequence[str], console: Console) -> None:
    """Print what a section found: its own tables, or the one of all figures of the head."""
    if section.module != "head":
        lines = [line for line in done.stdout.splitlines() if not line.startswith("{")]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        return
    record = load(folder, section.name)
    assert record is not None
    console.print(head_table(record, load(folder, "accuracy_cpu") if "accuracy_cpu" in made else None))


def run_sections(sections: Sequence[Section], folder: Path, progress: Console, console: Console) -> dict[str, str]:
    """Run them one after another; returns those that failed, with the reason."""
    failed: dict[str, str] = {}
    absent: dict[str, str] = {}
    made: list[str] = []
    for number, section in enumerate(sections, start=1):
        label = f"{number} of {len(sections)}: {section.name}"
        if section.module == "instructions" and (reason := instructions.reason_not_to_count()) is not None:
            progress.print(f"{label} left out: {reason}", markup=False, highlight=False)
            continue
        progress.print(f"{label} ...", markup=False, highlight=False)
        start = time.monotonic()
        done = run_process(section.command(folder))
        if done.code:
            failed[section.name] = done.reason()
            progress.print(f"{label} failed: {failed[section.name]}", markup=False, highlight=False, soft_wrap=True)
            continue
        made.append(section.name)
        progress.print(f"{label} took {time.monotonic() - start:.0f} s", markup=False, highlight=False)
        report(section, done, folder, made, console)
        if section.module == "head":
            absent.update((load(folder, section.name) or {}).get("unavailable", {}))
    if any(section.module == "head" for section in sections):
        console.print(
            "time / bare: over that of the matrix products alone, in the same rounds; peak: the allocator's during the "
            "call, gradients included; error: of the gradients against fp64 in bench.accuracy, and its multiple of "
            "plain PyTorch's",
            highlight=False,
            soft_wrap=True,
        )
    for name, reason in absent.items():
        console.print(f"{name}: cannot run here: {reason}", markup=False, highlight=False, soft_wrap=True)
    return failed


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print below its usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def make_parser() -> argparse.ArgumentParser:
    """The arguments of ``mopo bench``."""
    parser = _Parser(prog="mopo bench", description=(__doc__ or "").splitlines()[0])
    names = [section.name for section in FULL]
    parser.add_argument("--quick", action="store_true", help="small sizes, under three minutes on 2 cores")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--output", type=Path, help="folder (default bench/results, with --quick runs/bench)")
    return parser


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    options = make_parser().parse_args(arguments)
    if options.output is None:
        options.output = ROOT / "runs" / "bench" if options.quick else ROOT / "bench" / "results"
    options.output = options.output.resolve()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"argument --output: cannot make the folder {options.output}: {error.strerror}") from error
    if not os.access(options.output, os.W_OK):
        raise ValueError(f"argument --output: no permission to write in {options.output}")
    return options


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmarks and return the exit code: 1 if tests are red or a section failed.

    Raises:
        ValueError: an argument is wrong.
        KeyboardInterrupt: interrupted; no process is left.
    """
    options = _options(arguments)
    sections = [section for section in (QUICK if options.quick else FULL) if section.name in options.only]
    if not sections:
        raise ValueError(f"argument --only: with --quick there is no {' '.join(options.only)}")
    signal.signal(signal.SIGTERM, _terminated)
    progress = Console(stderr=True)
    start = time.monotonic()
    progress.print("parity tests ...", highlight=False)
    try:
        progress.print(f"parity tests: {require_parity(PARITY)}", markup=False, highlight=False)
    except BenchError as error:
        progress.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    failed = run_sections(sections, options.output, progress, Console(width=max(150, Console().width)))
    for name, reason in failed.items():
        progress.print(f"{name} failed: {reason}", markup=False, highlight=False, soft_wrap=True)
    seconds = time.monotonic() - start
    progress.print(
        f"{len(sections) - len(failed)} of {len(sections)} sections in {seconds:.0f} s, in {options.output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 1 if failed else 0


def run_command(arguments: Sequence[str]) -> int:
    """Run the benchmarks and return the exit code: what :func:`main` raises becomes a line, and 2 or 130."""
    try:
        return main(arguments)
    except ValueError as error:
        print(f"mopo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mopo: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:]))
