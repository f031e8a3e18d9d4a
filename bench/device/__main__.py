"""``python -m bench.device``: build, test, time and check everything on the CUDA device of this machine.

Sections run one after the other, each within its share of ``--budget``; what one leaves goes to those after it. A
section that fails is recorded and the next still runs. Exit code 0: none failed; 1: one did; 2: this is not such a
machine.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.device import children
from bench.device.children import ROOT
from bench.device.record import Record, Section, description

# Module and share of the time.
SECTIONS = {
    "build": ("bench.device.building", 4.0),
    "tests": ("bench.device.testing", 5.0),
    "time": ("bench.device.timing", 5.0),
    "sanitize": ("bench.device.sanitizing", 2.0),
    "tune": ("bench.device.tuning", 4.0),
}
DEFAULT = ("build", "tests", "time", "sanitize")
NEEDED = {"torch": (2, 11), "triton": (3, 6)}


def missing(device: str) -> str | None:
    """Why the suite cannot run here, None if it can."""
    for name, least in NEEDED.items():
        if name == "triton" and device == "cpu":
            continue
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed for {sys.executable}"
        version = importlib.import_module(name).__version__
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < least:
            return f"{name} {version} is older than {'.'.join(map(str, least))}"
    if device == "cuda":
        import torch

        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no CUDA device"
    return None


def stop(signum: int, frame: Any) -> None:
    """So that a run that is told to end ends its children and writes what it has."""
    children.stopped.set()
    raise SystemExit(128 + signum)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="SECTIONS", help=f"some of {','.join(SECTIONS)}, separated by commas")
    parser.add_argument("--tune", action="store_true", help="also try launch configurations of linear_fold")
    parser.add_argument(
        "--budget", type=float, default=525.0, metavar="SECONDS", help="for the whole run [%(default)s]"
    )
    parser.add_argument("--output", type=Path, help="the JSON to write [bench/results/device_<name of the GPU>.json]")
    parser.add_argument("--commit", help="what to record as the commit where git cannot tell")
    # A dry run, for the tests of this suite.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else [*DEFAULT, *(["tune"] if options.tune else [])]
    for name in names:
        if name not in SECTIONS:
            parser.error(f"argument --only: there is no section {name!r}; choose from {', '.join(SECTIONS)}")
    options.sections = [name for name in SECTIONS if name in names]
    if options.budget <= 0:
        parser.error(f"argument --budget: must be positive; got {options.budget}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    reason = missing(options.device)
    if reason is not None:
        print(f"bench.device needs a CUDA device, torch >= 2.11 and triton >= 3.6: {reason}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    found = description(options)
    name = re.sub(r"[^a-z0-9]+", "_", found["device"]["name"].lower()).strip("_")
    record = Record(options.output or ROOT / "bench" / "results" / f"device_{name}.json", found)
    print(f"{found['device']}\n{found['versions']}\ncommit {found['commit']}\nwriting {record.path}", flush=True)
    for i, section in enumerate(options.sections):
        module, share = SECTIONS[section]
        shares = sum(SECTIONS[later][1] for later in options.sections[i:])
        seconds = max(0.0, options.budget - record.elapsed) * share / shares
        run: Callable[[Section], None] = importlib.import_module(module).run
        outcome = record.run(section, run, options.device, seconds, {})
        data = record.data["sections"][section]
        print(f"{section}: {outcome} in {data['seconds']} s {data.get('reason', '')}".rstrip(), flush=True)
        if "counts" in data:
            print(f"  {data['counts']}")
        for line in data["failures"]:
            print(f"  {line}", flush=True)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
