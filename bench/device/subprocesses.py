"""Child processes with a time limit, which report as they go: what a child found survives its end, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Names the file to which a child appends its reports, one JSON object a line.
VARIABLE = "MOPO_DEVICE_REPORTS"
# Of a child's output, what is kept.
TAIL = 6000
# Seconds after which a child that reports nothing is taken for dead: a kernel that never ends says nothing either.
SILENCE = 40.0
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


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else 'no message'}"


def report(**fields: Any) -> None:
    """Report to the parent, from the child; without a parent, print. ``patience``: seconds until the next report that
    do not yet mean that the child is dead, for what compiles."""
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
    silence: float = SILENCE,
) -> Finished:
    """Run ``command`` in the repository's root until it ends, its time is up, or it reported nothing for ``silence``
    seconds, or for as long as its last report asked for. ``each`` is called with every report."""
    begun = last = time.monotonic()
    patience = silence
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
                            fields = json.loads(unfinished)
                            last, patience = time.monotonic(), float(fields.pop("patience", silence))
                            if each is not None and fields:
                                each(fields)
                            unfinished = ""
                    now = time.monotonic()
                    if code is not None or stopped.is_set() or now - begun > seconds or now - last > patience:
                        break
                    time.sleep(0.05)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
    return Finished(code, time.monotonic() - begun, text[-TAIL:])


def device_answers() -> bool:
    """False after an error that took the CUDA context with it: nothing more can run in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


# ----------------------------------------------------------------------------------------- pieces of work, one by one


def run_pieces(
    module: str,
    plan: dict[str, Any],
    names: Iterable[str],
    left: Callable[[], float],
    each: Callable[[dict[str, Any]], None],
) -> dict[str, str]:
    """Have ``python -m module PLAN`` take the named pieces one after the other (:func:`take_pieces`). A child that
    dies is followed by another, which goes on after the piece that was running: so a bad kernel costs one piece.

    Args:
        plan: what the child is told, beside the names of its pieces and its seconds.
        left: seconds that are left.
        each: is called with every report of a piece.

    Returns:
        Why each piece that failed did, its name -> one line. One that was not reached is not among them.
    """
    waiting, failed = list(names), {}
    running: str | None = None

    def hear(fields: dict[str, Any]) -> None:
        nonlocal running
        if "begun" in fields:
            running = fields["begun"]
        elif "ended" in fields:
            waiting.remove(fields["ended"])
            running = None
            if fields["why"] is not None:
                failed[fields["ended"]] = fields["why"]
        else:
            each(fields)

    while waiting and left() > 5 and not stopped.is_set():
        running, before = None, len(waiting)
        told = json.dumps({**plan, "names": waiting, "seconds": left() - 3})
        ended = run([sys.executable, "-m", module, told], left(), hear, silence=SILENCE)
        out_of_time = left() <= 0 or stopped.is_set()
        if running is not None and not out_of_time:
            waiting.remove(running)
            how = "it reported nothing for too long" if ended.code is None else ended.failure
            failed[running] = f"took the process with it: {how}: {ended.output[-300:]}"
        elif len(waiting) == before:
            if not out_of_time and ended.failure is not None:
                failed |= dict.fromkeys(waiting, f"its process did not begin: {ended.failure}: {ended.output[-300:]}")
            break
    return failed


def take_pieces(plan: dict[str, Any], take: Callable[[str], None]) -> None:
    """In the child of :func:`run_pieces`: ``take`` the pieces until the time is up. One that raises has failed; one
    that takes the device with it ends this process."""
    deadline = time.monotonic() + plan["seconds"]
    for name in plan["names"]:
        if time.monotonic() > deadline:
            return
        report(begun=name)
        why = None
        try:
            take(name)
        except Exception as error:
            why = first_line(error)
        answers = device_answers()
        report(ended=name, why=why if answers else f"took the device with it: {why}")
        if not answers:
            sys.exit(3)
