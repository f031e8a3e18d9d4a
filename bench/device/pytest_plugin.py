"""Pytest plugin of section "tests": takes this worker's share of a wave's tests and reports each as it ends.

A test after which the device no longer answers ends the worker: what would follow in it would fail for nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench.device import subprocesses
from bench.device.subprocesses import device_answers

# Environment of a worker: "i/n", names of stages, a file of the tests that are done, seconds it has, "cuda" or "cpu",
# most tests to take.
SHARE, STAGES, DONE, SECONDS, DEVICE, MOST = (
    "MOPO_DEVICE_" + name for name in ("SHARE", "STAGES", "DONE", "SECONDS", "TESTED", "MOST")
)


def wanted(item: Any, device: str) -> bool:
    """Whether the test runs on the device, as tests/gpu and the kernels' own tests name it."""
    if item.path.parent.name == "gpu":
        on_gpu = item.get_closest_marker("gpu") is not None
        return on_gpu if device == "cuda" else f"[{device}-" in item.name
    if item.path.name == "test_cuda.py":
        return device == "cuda" and "gpu" in item.name
    return True


def parameters(item: Any) -> dict[str, Any]:
    """The test's, its dtype by name: nothing here imports torch, so that a worker has soon said that it is there."""
    values = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    return {**values, "dtype": str(values["dtype"]).removeprefix("torch.")} if "dtype" in values else values


def stage(item: Any) -> str:
    """What the test is about: "parity" (Triton's numbers in bf16), "triton" (all else about it), "torch", "cuda",
    "large" (more memory than several tests can have at a time), "fp64" (slow, and nothing that training uses)."""
    values = parameters(item)
    dtype, name = values.get("dtype"), item.name.partition("[")[0]
    if "two_to_the_31" in name:
        return "large"
    if dtype == "float64" or "in_fp64" in name:
        return "fp64"
    if item.path.name == "test_cuda.py":
        return "cuda"
    if values.get("backend") in ("torch", "cuda"):
        return str(values["backend"])
    # The kernels' own tests take exponentials, which are bf16, where there is a hidden size.
    half = dtype == "bfloat16" or (dtype is None and values.get("hidden_size", 0) > 0)
    return "parity" if half and item.path.name in ("test_device_parity.py", "test_triton.py") else "triton"


def urgency(item: Any, stages: list[str]) -> tuple[int, bool, bool]:
    """What sorts first: the stages in their order, in each bf16 before the rest, what compiles whole graphs last."""
    half = parameters(item).get("dtype", "bfloat16") == "bfloat16"
    return stages.index(stage(item)), "compile" in item.name, not half


def shared_out(items: list[Any], index: int, workers: int) -> list[Any]:
    """A worker's part of sorted tests: those of a function with the same head and dtype, whose kernels are the same,
    go to one worker, so that they are compiled once."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        values = parameters(item)
        same = "head" in values and (item.location[2].partition("[")[0], values["head"], values.get("dtype"))
        groups.setdefault((same, values.get("backend")) if same else item.nodeid, []).append(item)
    return [item for group in list(groups.values())[index::workers] for item in group]


class Recorder:
    def __init__(self) -> None:
        self.index, self.workers = map(int, os.environ[SHARE].split("/"))
        self.stages = os.environ[STAGES].split(",")
        self.done = set(Path(os.environ[DONE]).read_text(encoding="utf-8").splitlines())
        self.deadline = time.monotonic() + float(os.environ[SECONDS])
        self.most = int(os.environ[MOST]) if MOST in os.environ else None
        self.session: Any = None

    def put(self, test: str, outcome: str, seconds: float, why: str) -> None:
        subprocesses.report(test=test, outcome=outcome, seconds=round(seconds, 2), why=why)

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        here = [item for item in items if wanted(item, os.environ[DEVICE]) and stage(item) in self.stages]
        here.sort(key=lambda item: urgency(item, self.stages))
        mine = shared_out(here, self.index, self.workers)[: self.most]
        subprocesses.report(share=[item.nodeid for item in mine])
        items[:] = [item for item in mine if item.nodeid not in self.done]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.put(report.nodeid, "failed", 0.0, str(report.longrepr)[-1500:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        subprocesses.report(begun=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed) or report.failed:
            why = ""
            if report.skipped and isinstance(report.longrepr, tuple):
                why = report.longrepr[2].removeprefix("Skipped: ")
            elif report.failed:
                why = str(report.longrepr)[-1500:]
            self.put(report.nodeid, report.outcome, report.duration, why)
        if report.failed and not device_answers():
            self.session.shouldstop = "the device no longer answers"
        if time.monotonic() > self.deadline:
            self.session.shouldstop = "out of time"


def pytest_configure(config: Any) -> None:
    if SHARE in os.environ:
        config.pluginmanager.register(Recorder(), "mopo-device-recorder")
