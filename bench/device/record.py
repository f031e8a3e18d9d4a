"""The one JSON of a run, written anew after every step, so that a run that is killed leaves what it has."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.device.subprocesses import ROOT, first_line

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pytest",
    "setuptools",
    "ninja",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
)


class NotHere(Exception):
    """What a section needs is not on this machine: the section is left out, with the reason, and did not fail."""


class Section:
    """What a section of the run knows and finds.

    Attributes:
        options: what a slice wants of it, by name; each section says what it knows.
        data: what is written under the section's name; JSON values.
        failures: one line each; none means that the section passed.
    """

    def __init__(self, record: Record, device: str, seconds: float, options: dict[str, Any]) -> None:
        self.record = record
        self.device = device
        self.options = options
        self.data: dict[str, Any] = {"outcome": "running", "limit_s": round(seconds, 1)}
        self.failures: list[str] = []
        self._deadline = time.monotonic() + seconds

    @property
    def dry(self) -> bool:
        """Whether this is a slice's dry run, on the CPU: the least that shows that the section works."""
        return bool(self.options.get("dry"))

    @property
    def left(self) -> float:
        """Seconds until the section's time is up."""
        return self._deadline - time.monotonic()

    def save(self) -> None:
        self.data["failures"] = self.failures
        self.record.write()


class Record:
    """``data`` as it stands in the file at ``path``; ``begun``: the run's start, by ``time.monotonic``. Sections may
    run beside each other."""

    def __init__(self, path: Path, data: dict[str, Any], begun: float | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = {**data, "outcome": "running", "seconds": 0.0, "sections": {}}
        self._begun = time.monotonic() if begun is None else begun
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begun

    def _text(self) -> str:
        while True:
            try:
                return json.dumps(self.data, indent=1) + "\n"
            except RuntimeError:  # another section put something in meanwhile
                continue

    def write(self) -> None:
        with self._lock:
            self.data["seconds"] = round(self.elapsed, 1)
            beside = self.path.with_name(f".{self.path.name}.part")
            beside.write_text(self._text(), encoding="utf-8")
            # Whole or not at all: whoever reads the file meanwhile, or after a kill, finds valid JSON.
            os.replace(beside, self.path)

    def run(
        self, name: str, section: Callable[[Section], None], device: str, seconds: float, options: dict[str, Any]
    ) -> str:
        """Run a section and record its outcome: passed, failed, not here, or interrupted, which is raised on."""
        step = Section(self, device, seconds, options)
        self.data["sections"][name] = step.data
        step.save()
        begun = time.monotonic()
        step.data["outcome"] = "interrupted"
        try:
            section(step)
            step.data["outcome"] = "failed" if step.failures else "passed"
        except NotHere as reason:
            step.data |= {"outcome": "not here", "reason": str(reason)}
        except Exception as error:
            step.failures.append(first_line(error))
            step.data |= {"outcome": "failed", "traceback": traceback.format_exc()[-3000:]}
        finally:
            step.data["seconds"] = round(time.monotonic() - begun, 1)
            step.save()
        return str(step.data["outcome"])

    def finish(self) -> int:
        """The exit code: 0 where no section failed."""
        failed = [name for name, data in self.data["sections"].items() if data["outcome"] not in ("passed", "not here")]
        self.data["outcome"] = "failed" if failed else "passed"
        self.write()
        return 1 if failed else 0


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    nvcc = _output("nvcc", "--version")
    if nvcc is not None:
        versions["nvcc"] = next((line.strip() for line in nvcc.splitlines() if "release" in line), "unknown")
    return versions


def description(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, the software and the code of a run, and what was asked of it."""
    import torch

    found: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    chosen = options.slice or f"--only {','.join(options.sections)}"
    return {
        "device": found,
        "versions": {**_versions(), "torch": torch.__version__},
        "processors": os.cpu_count(),
        "commit": options.commit or _output("git", "describe", "--always", "--dirty=+", "--abbrev=12") or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m bench.device {chosen} --budget {options.budget:g}",
    }
