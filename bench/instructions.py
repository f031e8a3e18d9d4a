"""Instructions that the C++ kernels and the loss over the head execute, counted by callgrind.

    python -m bench.instructions                     # --output FILE; needs valgrind and a C compiler

A count does not feel other processes, so it shows what timings on a busy machine hide. Under valgrind, a child process
runs each case once uncounted and once counted, from the call in Python to its return, on one thread in fp32.
valgrind 3.19 knows AVX2 and no AVX-512, so the capability is AVX2 at most and the AVX-512 kernels are not counted. Two
processes count everything, and nothing is reported if they differ by more than ``SPREAD``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.provenance import ROOT, origin
from mopo_kernels import linear_mopo_loss
from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends import cpp

RESULT = ROOT / "bench" / "results" / "instructions.json"
SPREAD = 0.01
TIMEOUT_SECONDS = 900
# Only machine code can speak to valgrind; this becomes a library that the child loads.
REQUESTS = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void end(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
CHILD = "import sys; from bench import instructions; instructions.run_cases(sys.argv[1], sys.argv[2:])"


class CannotCountError(RuntimeError):
    """Nothing can be counted here; the message is one line that says why."""


@dataclass(frozen=True)
class Case:
    """``prepare`` makes the inputs and returns the call; ``elements`` is the number of logits in it."""

    elements: int
    prepare: Callable[[], Callable[[], object]]


def numbers(*shape: int) -> torch.Tensor:
    """Between -1 and 1. No random numbers: those of a weight take longer under valgrind than the loss."""
    count = torch.Size(shape).numel()
    return torch.linspace(0, count, count).sin_().view(shape)


def kernel(name: str, rows: int = 64, columns: int = 4096, capped: bool = False) -> Case:
    """The operator ``lse_fwd`` or ``logits_bwd_`` on a tile (rows, columns); ``capped``: with a bias and a softcap."""

    def prepare() -> Callable[[], object]:
        tile, target = numbers(rows, columns), torch.arange(rows)
        bias, transform = (numbers(columns) if capped else None), LogitTransform(30.0 if capped else None, 1.0, 1.0)
        if name == "lse_fwd":
            statistics = torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows)
            return lambda: cpp.BACKEND.lse_fwd(tile, bias, target, 0, transform, *statistics)
        logsumexp, grad_logprob = torch.full((rows,), 9.0, dtype=torch.float64), numbers(rows)
        return lambda: cpp.BACKEND.logits_bwd_(tile, bias, target, 0, transform, logsumexp, grad_logprob)

    return Case(rows * columns, prepare)


def loss(trained: bool, rows: int = 32, hidden: int = 64, vocabulary: int = 2048) -> Case:
    """Forward and backward of the one-pass loss of four pairs, small: valgrind multiplies one number at a time."""

    def prepare() -> Callable[[], object]:
        states, weight = numbers(rows, hidden).requires_grad_(), numbers(vocabulary, hidden).requires_grad_(trained)
        target, cu_seqlens = torch.arange(rows), torch.arange(0, rows + 1, rows // 8)
        batch = states, weight, target, cu_seqlens, torch.arange(8).view(4, 2), torch.ones(4, 2), torch.ones(2)
        ref_logprob = torch.full((8,), -30.0)
        leaves = [states, weight] if trained else [states]

        def run() -> None:
            output = linear_mopo_loss(*batch, ref_logprob=ref_logprob, backend="cpp")
            torch.autograd.grad(output.loss, leaves)

        return run

    return Case(rows * vocabulary, prepare)


NOTHING = "nothing"
# By the names of the C++ operators where it is one, as the record has them.
CASES = {
    "fold": kernel("lse_fwd"),
    "fold, bias and softcap": kernel("lse_fwd", capped=True),
    "gradient_": kernel("logits_bwd_"),
    "gradient_, bias and softcap": kernel("logits_bwd_", capped=True),
    "loss, head frozen": loss(trained=False),
    "loss, head trained": loss(trained=True),
}
# What the regression gate must refuse in place of the case of that name: 77 rows are 1.2 x 64.
CONTROLS = {
    "fold": ("fold of 1.2 x the rows", kernel("lse_fwd", rows=77)),
    "gradient_": ("gradient_ of 1.2 x the rows", kernel("logits_bwd_", rows=77)),
}


def run_cases(library: str, names: Iterable[str]) -> None:
    """In the child: counts the cases or controls of these names, each under its name, and ends the process."""
    requests = ctypes.CDLL(library)
    torch.set_num_threads(1)
    cases = {NOTHING: Case(1, lambda: lambda: None), **CASES, **dict(CONTROLS.values())}
    gc.disable()
    for name in (NOTHING, *names):
        label, run = name.encode(), cases[name].prepare()
        run()
        requests.begin()
        run()
        requests.end(label)
    # Taking an interpreter down takes seconds under valgrind.
    os._exit(0)


def capability() -> str:
    """torch's CPU capability for what is counted: valgrind ends a program at its first AVX-512 instruction."""
    here = torch.backends.cpu.get_cpu_capability()
    return "AVX2" if here == "AVX512" else here


def reason_not_to_count() -> str | None:
    """None if valgrind, a C compiler and the C++ backend are here; otherwise one line that says what is not."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        return f"no C compiler was found (looked for {compiler[0]!r})"
    done = subprocess.run([*compiler, "-fsyntax-only", "-xc", "-"], input=REQUESTS, capture_output=True, text=True)
    if done.returncode:
        return f"valgrind/callgrind.h does not compile: {' '.join(done.stderr.split())[:200]}"
    return cpp.unavailable_reason()


def count(names: Iterable[str]) -> dict[str, int]:
    """Instructions of each case or control, counted in one process.

    Raises:
        CannotCountError: something is missing, or valgrind failed.
    """
    if (reason := reason_not_to_count()) is not None:
        raise CannotCountError(reason)
    names = list(names)
    with tempfile.TemporaryDirectory() as folder:
        library, out = Path(folder) / "requests.so", Path(folder) / "out"
        compiler = [*shlex.split(os.environ.get("CC", "cc")), "-shared", "-fPIC", "-xc", "-", "-o", str(library)]
        subprocess.run(compiler, input=REQUESTS, text=True, check=True)
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        # The hash seed decides the order of sets.
        settings = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        settings["ATEN_CPU_CAPABILITY"] = capability().lower()
        command = [*valgrind, sys.executable, "-c", CHILD, str(library), *names]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **settings},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise CannotCountError(f"valgrind took more than {TIMEOUT_SECONDS} seconds") from None
        counts = {}
        for part in Path(folder).glob("out.*"):
            text = part.read_text(encoding="utf-8")
            label = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
            summary = re.search(r"^summary: (\d+)$", text, re.MULTILINE)
            if label and summary:
                counts[label.group(1)] = int(summary.group(1))
    if done.returncode or counts.keys() != {NOTHING, *names}:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CannotCountError(f"valgrind failed with status {done.returncode}: {lines[-1][:200]}")
    return {name: counts[name] - counts[NOTHING] for name in names}


def built_with() -> str:
    """The compiler that the C++ extension was built with, as it stands in the file."""
    extension = importlib.util.find_spec("mopo_kernels._C")
    assert extension is not None
    assert extension.origin is not None
    found = re.search(rb"GCC: [^\0]+|clang version [^\0]+", Path(extension.origin).read_bytes())
    return found.group().decode() if found else "unknown"


def compiler_major(compiler: str) -> str:
    """``GCC 12`` of ``GCC: (name 12.2.0-1) 12.2.0``."""
    number = re.match(r"(GCC|clang)(?:: \(.*?\)| version) (\d+)", compiler)
    return " ".join(number.groups()) if number else compiler


def compiler_flags() -> list[str]:
    """Of the C++ extension, from setup.py."""
    line = re.search(r"^flags = .*\[(.*)\]$", (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    return re.findall(r'"(.*?)"', line.group(1))


def environment() -> dict[str, Any]:
    """What a count depends on."""
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "machine": platform.machine(),
        "cpu_capability": capability(),
        "compiler": built_with(),
        "flags": compiler_flags(),
        "torch": torch.__version__,
        "python": platform.python_version().rpartition(".")[0],
        "valgrind": version,
    }


def reason_not_to_compare(record: dict[str, Any]) -> str | None:
    """None if counts made here may be held against those of the record; otherwise one line that says why not."""
    if (reason := reason_not_to_count()) is not None:
        return reason
    for name, here in environment().items():
        there = record[name]
        if name == "compiler":
            here, there = compiler_major(here), compiler_major(there)
        if here != there:
            return f"the committed counts are of {name} {there}; here it is {here}"
    return None


def differences(counts: dict[str, int], record: dict[str, Any], tolerance: float) -> list[str]:
    """A line for each count that differs from the record's by more than ``tolerance``, relative, up or down."""
    lines = []
    for name, got in counts.items():
        expected = record["cases"][name]["instructions"]
        if not abs(got / expected - 1) <= tolerance:
            lines.append(f"{name}: {got} instructions, committed {expected}: {got / expected:.3f} x")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        first, second = count(CASES), count(CASES)
    except CannotCountError as error:
        print(f"instructions cannot be counted here: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    spread = max(abs(second[name] / first[name] - 1) for name in CASES)
    if not spread <= SPREAD:
        raise SystemExit(f"two runs differ by {spread:.1%}: nothing is reported")
    cases = {
        name: {"instructions": n, "elements": CASES[name].elements, "per_element": n / CASES[name].elements}
        for name, n in first.items()
    }
    table = Table(title="instructions, one thread, fp32, as under valgrind")
    for heading in ("case", "instructions", "elements", "per element"):
        table.add_column(heading, no_wrap=True)
    for name, row in cases.items():
        table.add_row(name, f"{row['instructions']}", f"{row['elements']}", f"{row['per_element']:.2f}")
    Console(width=max(100, Console().width)).print(table)
    record = {
        "cases": cases,
        "spread": spread,
        **environment(),
        "command": "python -m bench.instructions",
        **origin(),
    }
    print(json.dumps(record))
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
