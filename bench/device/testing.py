"""Section "tests": every test that runs on the device, shared out over a few processes.

Each process reports a test as it ends. One that dies, hangs, or loses its device is followed by another, which goes on
after the test that was running; so one bad kernel costs one test, and not all that follow it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.device import children, recorder
from bench.device.record import NotHere, Section

FILES = ("tests/gpu", "tests/test_kernels.py", "tests/test_cuda_kernels.py")
# Failures whose messages are kept, and names of tests that are printed.
MESSAGES, PRINTED = 80, 25
# Seconds that one test may take.
SILENCE = 150.0


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


def work(outcomes: Outcomes, share: str, files: tuple[str, ...], folder: str) -> None:
    """One share of the tests, in as many processes after one another as it takes."""
    section, done = outcomes.section, Path(folder) / share.replace("/", "-")
    mine: set[str] = set()
    running: str | None = None

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
    command += ["-p", "bench.device.recorder", "-p", "no:cacheprovider", *files]
    while section.left > 10 and not children.stopped.is_set():
        finished_before = mine & outcomes.results.keys()
        done.write_text("".join(f"{name}\n" for name in sorted(finished_before)), encoding="utf-8")
        environment = {
            recorder.SHARE: share,
            recorder.DONE: str(done),
            recorder.SECONDS: str(section.left - 5),
            recorder.DEVICE: section.device,
        }
        running = None
        ended = children.run(command, section.left, each, environment, SILENCE)
        if ended.failure is not None:
            with outcomes.lock:
                outcomes.output = ended.output
        ours = section.left > 0 and not children.stopped.is_set()
        if running is not None and running not in outcomes.results and ours:
            why = f"{'it hung' if ended.code is None else ended.failure}\n{ended.output[-1500:]}"
            outcomes.put(running, "crashed", SILENCE if ended.code is None else 0.0, why)
        remaining = mine - outcomes.results.keys()
        if not remaining or (mine & outcomes.results.keys()) == finished_before:
            return


def run(section: Section) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise NotHere("pytest is not installed")
    files = tuple(
        name for name in section.options.get("files", FILES) if (children.ROOT / name.split("::")[0]).exists()
    )
    workers = min(section.options.get("workers", 4), max(1, (os.cpu_count() or 1) // 2))
    section.data |= {"files": [Path(name).name for name in files], "workers": workers}
    outcomes = Outcomes(section)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        shares = [pool.submit(work, outcomes, f"{i}/{workers}", files, folder) for i in range(workers)]
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
