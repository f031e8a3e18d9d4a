"""Child processes with a time limit, which report as they go: what a child found survives its end, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Names the file to which a child appends its reports, one JSON object a line.
VARIABLE = "MOPO_DEVICE_REPORTS"
# Of a child's output, what is kept.
TAIL = 6000
# Once set, running children are ended and no other is started, whichever thread waits for them.
stopped = threading.Event()


class Finished(NamedTuple):
    """``code`` is None where the child was stopped: its time was up, or it reported nothing for too long."""

    code: int | None
    seconds: float
    output: str

    @property
    def failure(self) -> str | None:
        if self.code == 0:
            return None
        return "stopped: out of time" if self.code is None else f"exit code {self.code}"


def report(**fields: Any) -> None:
    """Report to the parent, from the child; without a parent, print."""
    line = json.dumps(fields)
    path = os.environ.get(VARIABLE)
    if path is None:
        print(line, flush=True)
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def run(
    command: list[str],
    seconds: float,
    each: Callable[[dict[str, Any]], None] | None = None,
    environment: dict[str, str] | None = None,
    silence: float = float("inf"),
) -> Finished:
    """Run ``command`` in the repository's root until it ends, its time is up, or it reported nothing for ``silence``
    seconds. ``each`` is called with every report."""
    begun = last = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        reports, log = Path(folder) / "reports", Path(folder) / "log"
        reports.touch()
        with log.open("wb") as output, reports.open(encoding="utf-8") as lines:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **(environment or {}), VARIABLE: str(reports)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group of its own, so that its children end with it.
                start_new_session=True,
            )
            unfinished = ""
            try:
                while True:
                    # Before reading: what was reported before the end is read after it.
                    code = process.poll()
                    while chunk := lines.readline():
                        unfinished += chunk
                        if unfinished.endswith("\n"):
                            last = time.monotonic()
                            if each is not None:
                                each(json.loads(unfinished))
                            unfinished = ""
                    now = time.monotonic()
                    if code is not None or stopped.is_set() or now - begun > seconds or now - last > silence:
                        break
                    time.sleep(0.05)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
    return Finished(code, time.monotonic() - begun, text[-TAIL:])
