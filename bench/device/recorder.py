"""Pytest plugin of section "tests": takes this worker's share of the tests and reports each as it ends.

A test after which the device no longer answers ends the worker: what would follow in it would fail for nothing.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.device import children

# Environment of a worker: "i/n", a file of the tests that are done, seconds it has, "cuda" or "cpu".
SHARE, DONE, SECONDS, DEVICE = ("MOPO_DEVICE_" + name for name in ("SHARE", "DONE", "SECONDS", "TESTED"))


def wanted(item: Any, device: str) -> bool:
    """Whether the test runs on the device, as tests/gpu and the kernels' own tests name it."""
    if item.path.parent.name == "gpu":
        on_gpu = item.get_closest_marker("gpu") is not None
        return on_gpu if device == "cuda" else f"[{device}-" in item.name
    if item.path.name == "test_cuda_kernels.py":
        return device == "cuda" and "gpu" in item.name
    return True


def device_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Recorder:
    def __init__(self) -> None:
        self.index, self.workers = map(int, os.environ[SHARE].split("/"))
        self.done = set(Path(os.environ[DONE]).read_text(encoding="utf-8").splitlines())
        self.deadline = time.monotonic() + float(os.environ[SECONDS])
        self.session: Any = None

    def put(self, test: str, outcome: str, seconds: float, why: str) -> None:
        children.report(test=test, outcome=outcome, seconds=round(seconds, 2), why=why)

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        mine = [item for item in items if wanted(item, os.environ[DEVICE])][self.index :: self.workers]
        children.report(share=[item.nodeid for item in mine])
        items[:] = [item for item in mine if item.nodeid not in self.done]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.put(report.nodeid, "failed", 0.0, str(report.longrepr)[-1500:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        children.report(begun=nodeid)

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
