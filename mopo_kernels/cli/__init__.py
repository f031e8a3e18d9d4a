"""The command line, installed as `mopo`: train, pareto, data, eval, certify, bench, doctor.

Errors of the user's making end in one line on stderr: exit code 2 for bad arguments, values and files, 1 for a missing
package, 130 for Ctrl-C. `mopo --debug ...` or MOPO_TRACEBACK=1 shows the traceback instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mopo_kernels.text import one_line

TRACEBACK = "MOPO_TRACEBACK"


def _fail(message: str, code: int) -> int:
    print(f"mopo: {one_line(' '.join(message.split()))}", file=sys.stderr)
    return code


def _report(error: Exception) -> int:
    """One line for an error of the user's making, and the exit code; any other is raised again."""
    from mopo_kernels.backends import BackendUnavailableError
    from mopo_kernels.cli.doctor import OPTIONAL_PACKAGES, install_hint

    # Click's errors know their own wording; typer has moved their classes about, so they are told by that method.
    if hasattr(error, "format_message"):
        return _fail(f"error: {error.format_message()}", 2)
    if isinstance(error, (ValueError, OSError, BackendUnavailableError)):
        return _fail(f"error: {error}", 2)
    if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL_PACKAGES:
        return _fail(f"error: {error.name} is {install_hint(error.name)}", 1)
    if isinstance(error, ImportError):
        return _fail(f"error: {error} (MOPO_TRACEBACK=1 shows where)", 1)
    raise error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on argv (default: that of the process) and return its exit code."""
    try:
        # Here, so that Ctrl-C while packages are imported is caught as well.
        from mopo_kernels.cli.app import run

        return run(argv)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get(TRACEBACK, "") not in ("", "0"):
            raise
        return _report(error)
