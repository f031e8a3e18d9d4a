"""Section "tests": every test that runs on the device, in waves, each shared out over a few processes.

What a release would stand or fall by comes first, so that a section cut short has said the most it could. Each process
reports a test as it ends. One that dies, hangs, or loses its device is followed by another, which goes on after the
test that was running; so one bad kernel costs one test, and not all that follow it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench.device import building, pytest_plugin, subprocesses
from bench.device.record import NotHere, Section

FILES = ("tests/gpu", "tests/kernels/test_triton.py", "tests/kernels/test_cuda.py")
# Failures whose messages are kept, and names of tests that are printed.
MESSAGES, PRINTED = 80, 25


class Wave(NamedTuple):
    """Tests that run beside each other, by :func:`bench.device.pytest_plugin.stage`, in processes of their own.

    Attributes:
        stages: the first comes first.
        reserve: seconds that the waves before it leave it.
        alone: one process, as a test takes most of a device's memory.
        built: a backend's availability is asked as tests are collected, so that its wave waits for the build.
    """

    stages: tuple[str, ...]
    reserve: float = 0.0
    alone: bool = False
    built: bool = False


WAVES = (
    Wave(("parity", "triton", "torch")),
    Wave(("cuda",), reserve=25.0, built=True),
    Wave(("large",), reserve=25.0, alone=True),
    Wave(("fp64",), reserve=20.0),
)


class Outcomes:
    """What is known of the tests; written by several threads."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.lock = threading.Lock()
        self.shared: set[str] = set()
        self.results: dict[str, dict[str, Any]] = {}
        self.output = ""

    def put(self, name: str, outcome: str, seconds: float, why: str) -> None:
        with self.lock:
            # A teardown that fails after a call that passed is a failure.
            if self.results.get(name, {}).get("outcome") != "failed":
                self.results[name] = {"outcome": outcome, "seconds": seconds, "why": why}
            if len(self.results) % 50 == 0:
                self.summarise()

    def summarise(self) -> None:
        """Counts, failures with their messages, reasons of skips, the slowest."""
        counts = Counter(result["outcome"] for result in self.results.values())
        missing = sorted(self.shared - self.results.keys())
        failed = {name: r["why"] for name, r in self.results.items() if r["outcome"] in ("failed", "crashed")}
        skipped = Counter(r["why"] for r in self.results.values() if r["outcome"] == "skipped")
        slowest = sorted(self.results, key=lambda name: -self.results[name]["seconds"])[:10]
        self.section.data |= {
            "counts": {**counts, "not run": len(missing)},
            "failed": dict(list(failed.items())[:MESSAGES]),
            "skipped": dict(skipped),
            "not_run": missing[:20],
            "slowest": {name: self.results[name]["seconds"] for name in slowest},
        }
        self.section.save()


def work(outcomes: Outcomes, share: str, stages: list[str], files: tuple[str, ...], folder: str, until: float) -> None:
    """One share of the tests of some stages until a time, in as many processes after one another as it takes."""
    section, done = outcomes.section, Path(folder) / "-".join((*stages, share.replace("/", "-")))
    mine: set[str] = set()
    running: str | None = None

    def left() -> float:
        return until - time.monotonic()

    def each(fields: dict[str, Any]) -> None:
        nonlocal running
        if "share" in fields:
            mine.update(fields["share"])
            with outcomes.lock:
                outcomes.shared |= mine
        elif "begun" in fields:
            running = fields["begun"]
        else:
            outcomes.put(fields["test"], fields["outcome"], fields["seconds"], fields["why"])

    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
    command += ["-p", "bench.device.pytest_plugin", "-p", "no:cacheprovider", *files]
    while left() > 5 and not subprocesses.stopped.is_set():
        finished_before = mine & outcomes.results.keys()
        done.write_text("".join(f"{name}\n" for name in sorted(finished_before)), encoding="utf-8")
        environment = {
            pytest_plugin.SHARE: share,
            pytest_plugin.STAGES: ",".join(stages),
            pytest_plugin.DONE: str(done),
            pytest_plugin.SECONDS: str(left() - 3),
            pytest_plugin.DEVICE: section.device,
        }
        if section.dry:
            environment[pytest_plugin.MOST] = "1"
        running = None
        ended = subprocesses.run(
            command, left(), each, environment, section.options.get("silence", subprocesses.SILENCE)
        )
        # Where a stage has no test for this device, pytest ends with 5.
        if ended.failure is not None and ended.code != 5:
            with outcomes.lock:
                outcomes.output = ended.output
        ours = left() > 0 and not subprocesses.stopped.is_set()
        if running is not None and running not in outcomes.results and ours:
            why = f"{'it hung' if ended.code is None else ended.failure}\n{ended.output[-1500:]}"
            outcomes.put(running, "crashed", round(ended.seconds, 2) if ended.code is None else 0.0, why)
        remaining = mine - outcomes.results.keys()
        if not remaining or (mine & outcomes.results.keys()) == finished_before:
            return


def run(section: Section) -> None:
    """With the option ``build`` the section "build" runs behind the first wave; ``stages`` are those to run, all
    without it."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    files = tuple(
        name for name in section.options.get("files", FILES) if (subprocesses.ROOT / name.split("::")[0]).exists()
    )
    workers = min(section.options.get("workers", 4), max(1, (os.cpu_count() or 1) * 3 // 4))
    section.data |= {"files": [Path(name).name for name in files], "workers": workers}
    outcomes = Outcomes(section)
    end = time.monotonic() + section.left
    waves = []
    for wave in WAVES:
        stages = [name for name in wave.stages if name in section.options.get("stages", wave.stages)]
        if stages:
            waves.append((wave, stages))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers + 1) as pool:
        build = None
        if section.options.get("build"):
            options = {**section.options, "jobs": max(1, (os.cpu_count() or 1) // 4)}
            seconds = section.left - sum(wave.reserve for wave, _ in waves)
            build = pool.submit(section.record.run, "build", building.run, section.device, seconds, options)
        for number, (wave, stages) in enumerate(waves):
            if wave.built and build is not None:
                build.result()
            count = 1 if wave.alone else workers
            until = end - sum(later.reserve for later, _ in waves[number + 1 :])
            shares = [pool.submit(work, outcomes, f"{i}/{count}", stages, files, folder, until) for i in range(count)]
            for share in shares:
                share.result()
    with outcomes.lock:
        outcomes.summarise()
    for name, why in list(section.data["failed"].items())[:PRINTED]:
        print(f"  {name}: {(why.strip().splitlines() or [''])[-1][:200]}", flush=True)
    counts = section.data["counts"]
    for outcome in ("failed", "crashed", "not run"):
        if counts.get(outcome):
            section.failures.append(f"{counts[outcome]} tests {outcome}")
    if not counts.get("passed"):
        section.failures.append("no test passed")
        section.data["output"] = outcomes.output
