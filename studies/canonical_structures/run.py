"""Parts of the study, each in a process of its own, and what is kept of them.

A part is one section (exact front, learning, baselines or ablations) of one structure. It ends in one JSON file,
written whole or not at all, so an interrupted run leaves what was finished.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import numpy as np

from bench.provenance import origin

PACKAGES = ("mopo-kernels", "torch", "numpy", "scipy", "moocore", "matplotlib")
# What differs between two runs with the same seeds.
RUN_FIELDS = ("commit", "command", "date", "seconds", "versions", "machine")
# Read by torch, numpy and their libraries when they are loaded: one thread a part, as several parts run at once, and
# the same order of summation whatever the machine's cores.
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Progress = Callable[[int, int], None]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One section of one structure. ``seeds``: independent data sets; ``fast``: small sizes, to see that all works."""

    section: str
    structure: str
    seeds: int = 10
    fast: bool = False

    @property
    def name(self) -> str:
        return f"{self.section} {self.structure}"

    def path(self, output: Path) -> Path:
        return output / self.section / f"{self.structure}.json"

    def is_kept(self, output: Path, commit: str) -> bool:
        """Whether ``output`` holds this very part, made by the same commit."""
        try:
            record = json.loads(self.path(output).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return (record["commit"], record["seeds"], record["fast"]) == (commit, list(range(self.seeds)), self.fast)


def provenance(command: str) -> dict[str, Any]:
    """What was run, by which commit, with which versions, where and when."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {
        **origin(),
        "command": command,
        "versions": versions,
        "machine": platform.machine(),
    }


def plain(value: Any) -> Any:
    """``value`` in JSON's types; NaN and infinities, which JSON has not, become None."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save(record: Mapping[str, Any], path: Path) -> None:
    """Write a record, one line a field and a row, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = plain(record)
    lines = [
        f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items() if key != "rows"
    ]
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in record["rows"])
    lines.append(f' "rows": [\n{rows}\n ]')
    beside = path.with_name(f".{path.name}.part")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(beside, path)


def load(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Section -> structure -> record, of every part in a folder of results."""
    records: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        records.setdefault(record["section"], {})[record["structure"]] = record
    return records


class PartsFailed(Exception):
    """Some parts failed; ``failures``: part -> traceback."""

    def __init__(self, failures: Mapping[Part, str]) -> None:
        self.failures = failures
        super().__init__(", ".join(part.name for part in failures))


@dataclass(frozen=True)
class Event:
    """What became of a part: ``kind`` "started", "progress" (``done`` of ``total``), "finished" or "failed"."""

    part: Part
    kind: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0


def _work(
    study: Callable[[Part, Progress], dict[str, Any]], part: Part, channel: multiprocessing.connection.Connection
) -> None:
    """In the worker: run a part and send what it made, or the traceback."""
    try:
        import torch

        torch.set_num_threads(1)
        result = study(part, lambda done, total: channel.send(("progress", (done, total))))
        channel.send(("finished", result))
    except BrokenPipeError:
        return  # The parent is gone.
    except Exception:
        channel.send(("failed", traceback.format_exc()))


def run_parts(
    study: Callable[[Part, Progress], dict[str, Any]],
    parts: Sequence[Part],
    output: Path,
    origin: Mapping[str, Any],
    jobs: int = 2,
) -> Generator[Event, None, None]:
    """Run parts, at most ``jobs`` at once, in the order given, and write the JSON of each as it finishes.

    Args:
        study: importable function that makes a part's fields, "rows" (a list of dicts) among them; it runs in a fresh
            process with one thread.
        parts: what to run.
        output: folder of results.
        origin: fields that every record gets; see :func:`provenance`.
        jobs: processes at once.

    Yields:
        An event for each start, step and end.

    Raises:
        PartsFailed: after all parts have ended, if some failed.
    """
    if not parts:
        return
    waiting = list(parts)
    running: dict[multiprocessing.connection.Connection, tuple[Part, ForkServerProcess, float]] = {}
    failures: dict[Part, str] = {}
    start = _starter()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                part = waiting.pop(0)
                here, there = multiprocessing.Pipe(duplex=False)
                running[here] = (part, start(study, part, there), time.monotonic())
                there.close()
                yield Event(part, "started")
            for channel in multiprocessing.connection.wait(list(running)):
                assert isinstance(channel, multiprocessing.connection.Connection)
                part, process, begun = running[channel]
                try:
                    kind, content = channel.recv()
                except EOFError:
                    process.join()
                    kind, content = "failed", f"the worker ended with exit code {process.exitcode}"
                if kind == "progress":
                    yield Event(part, kind, *content)
                    continue
                seconds = round(time.monotonic() - begun, 1)
                process.join()
                channel.close()
                del running[channel]
                if kind == "failed":
                    failures[part] = content
                else:
                    save(_record(part, content, {**origin, "seconds": seconds}), part.path(output))
                yield Event(part, kind, seconds=seconds)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for channel, (_, process, _) in running.items():
            process.join()
            channel.close()
    if failures:
        raise PartsFailed(failures)


def _record(part: Part, content: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    seeds = {"seeds": list(range(part.seeds)), "fast": part.fast}
    return {"section": part.section, "structure": part.structure, **origin, **seeds, **content}


def _starter() -> Callable[..., ForkServerProcess]:
    """Starts a worker from a server that has loaded torch already and that Ctrl-C does not reach: the terminal sends it
    to every process, and ending the workers is the parent's part."""
    context = multiprocessing.get_context("forkserver")
    # torch loads the second by itself, for seconds, when an operator is first called.
    context.set_forkserver_preload(["studies.canonical_structures.sections", "torch._dynamo"])
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    # Starting the tracker, which the server does first, would lift the mask.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

    def start(*arguments: Any) -> ForkServerProcess:
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        return process

    return start
