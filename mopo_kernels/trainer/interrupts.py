"""Signals that ask a run to end: it finishes its optimiser step and writes a checkpoint first."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What a terminal that closes and what batch systems send (SLURM: TERM, or by --signal one of the user's own).
_ASKING = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Interrupts:
    """The first signal while :meth:`deferred`.

    Attributes:
        signal: its number, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait for who looks at ``signal``. The second Ctrl-C stops at once; other signals that come again, as
        from a launcher and a batch system both, change nothing.

        A signal that the program ignores or handles already is left to it, but for Ctrl-C. Only the main thread can
        handle signals.
        """
        self.signal = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[int, Any] = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
        for name in _ASKING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.SIG_DFL

        def handler(number: int, frame: FrameType | None) -> None:
            first, self.signal = self.signal is None, self.signal or number
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, previous[signal.SIGINT])
            elif number == getattr(signal, "SIGHUP", None):
                _leave_terminal()
            if first:
                with contextlib.suppress(OSError, ValueError):
                    print("\nfinishing this step and writing a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

        for number in previous:
            signal.signal(number, handler)
        try:
            yield
        finally:
            for number, before in previous.items():
                signal.signal(number, before)


def _leave_terminal() -> None:
    """A write to a terminal that is gone would fail, and the run with it: it goes nowhere instead."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def signal_name(number: int) -> str:
    """SIGTERM and the like."""
    return signal.Signals(number).name
