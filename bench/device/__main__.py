"""``python -m bench.device``: build, test, time and check everything on the CUDA device of this machine.

Sections run one after the other, each within its share of ``--budget``; what one leaves goes to those after it. A
section that fails is recorded and the next still runs. Exit code 0: none failed; 1: one did; 2: this is not such a
machine.

A slice is a choice of sections that fits a card borrowed for minutes, and is of use alone: ``smoke`` (does it work, and
what bounds it), ``compare`` (does it work, and the head beside every peer), ``full`` (every test, and the same),
``step`` (whole training steps). docs/gpu.md says what each decides.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.device import subprocesses, wheels
from bench.device.record import Record, Section, description
from bench.device.subprocesses import ROOT

# Module and share of the time.
SECTIONS = {
    "build": ("bench.device.building", 4.0),
    "tests": ("bench.device.testing", 5.0),
    "probe": ("bench.device.probing", 3.0),
    "time": ("bench.device.timing", 5.0),
    "sanitize": ("bench.device.sanitizing", 2.0),
    "tune": ("bench.device.tuning", 4.0),
    "step": ("bench.device.stepping", 5.0),
}
DEFAULT = ("build", "tests", "time", "sanitize")
# Those that run peers.
WITH_PEERS = {"time", "step"}
NEEDED = {"torch": (2, 11), "triton": (3, 6)}


class Slice(NamedTuple):
    """Seconds for all of it, and its sections: share of the time, options."""

    budget: float
    sections: dict[str, tuple[float, dict[str, Any]]]


SLICES = {
    "smoke": Slice(
        190.0, {"tests": (60.0, {"stages": ("parity",), "workers": 12}), "tune": (60.0, {}), "probe": (70.0, {})}
    ),
    "compare": Slice(140.0, {"tests": (60.0, {"stages": ("parity",), "workers": 12}), "time": (80.0, {"most": 4})}),
    "full": Slice(280.0, {"tests": (150.0, {"workers": 12, "build": True}), "time": (130.0, {"most": 4})}),
    "step": Slice(180.0, {"step": (1.0, {})}),
}


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
    subprocesses.stopped.set()
    raise SystemExit(128 + signum)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.splitlines()[0])
    parser.add_argument(
        "slice", nargs="?", choices=SLICES, help="a choice of sections for a borrowed card, with a budget of its own"
    )
    parser.add_argument("--only", metavar="SECTIONS", help=f"some of {','.join(SECTIONS)}, separated by commas")
    parser.add_argument("--tune", action="store_true", help="also try launch configurations of linear_lse_fwd")
    budgets = ", ".join(f"{name} {one.budget:g}" for name, one in SLICES.items())
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"for the whole run [525; {budgets}]")
    parser.add_argument(
        "--output",
        type=Path,
        help="the JSON to write [device_<slice>_<name of the GPU>.json, in the folder that OUT names, else in "
        "bench/results]",
    )
    parser.add_argument("--commit", help="what to record as the commit where git cannot tell")
    # A dry run, for the tests of this suite.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.slice and (options.only or options.tune):
        parser.error(f"argument slice: {options.slice} has its own sections; got --only or --tune as well")
    names = options.only.split(",") if options.only else [*DEFAULT, *(["tune"] if options.tune else [])]
    for name in names:
        if name not in SECTIONS:
            parser.error(f"argument --only: there is no section {name!r}; choose from {', '.join(SECTIONS)}")
    options.sections = [name for name in SECTIONS if name in names]
    options.shares = {name: (SECTIONS[name][1], {}) for name in options.sections}
    if options.slice:
        options.shares = SLICES[options.slice].sections
        options.sections = list(options.shares)
    if options.budget is None:
        options.budget = SLICES[options.slice].budget if options.slice else 525.0
    if options.budget <= 0:
        parser.error(f"argument --budget: expected a positive number; got {options.budget}")
    return options


def output(options: argparse.Namespace, device: str) -> Path:
    """Where the JSON goes: runs of other slices, sections or GPUs go elsewhere. A borrowed machine sends back what is
    in the folder that OUT names."""
    if options.output:
        return Path(options.output)
    which = options.slice or (options.only and "+".join(options.sections))
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "bench" / "results"
    return folder / f"{'_'.join(filter(None, ('device', which, name)))}.json"


def section_of(module: str) -> Callable[[Section], None]:
    """What runs a section; it is imported then, so that a package which it lacks costs the section and no other."""

    def run(section: Section) -> None:
        importlib.import_module(module).run(section)

    return run


def tell(record: Record, told: set[str]) -> None:
    """Print the outcome of each section that has ended and was not told yet."""
    for section, data in record.data["sections"].items():
        if section in told:
            continue
        told.add(section)
        print(f"{section}: {data['outcome']} in {data['seconds']} s {data.get('reason', '')}".rstrip(), flush=True)
        if "counts" in data:
            print(f"  {data['counts']}")
        for line in data["failures"]:
            print(f"  {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    options = parse(arguments)
    reason = missing(options.device)
    if reason is not None:
        print(f"bench.device needs a CUDA device, torch >= 2.11 and triton >= 3.6: {reason}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory() as folder:
        peers = wheels.install(Path(folder)) if WITH_PEERS & {*options.sections} else {"reason": "no section runs any"}
        found = {**description(options), "peers": peers}
        record = Record(output(options, found["device"]["name"]), found, begun)
        print(f"{found['device']}\n{found['versions']}\ncommit {found['commit']}\nwriting {record.path}", flush=True)
        if found["commit"] == "unknown":
            print("git cannot tell the commit: pass --commit, or no figure can be traced to its code", flush=True)
        print(f"wheels of peers: {peers.get('reason') or ', '.join(peers['installed'])}", flush=True)
        told: set[str] = set()
        shares = [share for share, _ in options.shares.values()]
        for i, (section, (share, choices)) in enumerate(options.shares.items()):
            seconds = max(0.0, options.budget - record.elapsed) * share / sum(shares[i:])
            dry = {"dry": True} if options.slice and options.device == "cpu" else {}
            record.run(section, section_of(SECTIONS[section][0]), options.device, seconds, {**choices, **dry})
            tell(record, told)
        return record.finish()


if __name__ == "__main__":
    sys.exit(main())
