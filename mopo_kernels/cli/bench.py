"""`mopo bench`: the benchmarks of a clone, which are not part of the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import mopo_kernels

CLONE = Path(mopo_kernels.__file__).resolve().parents[1]


def run_benchmarks(arguments: list[str]) -> NoReturn:
    """Become ``python -m bench.run`` of the clone that the package lies in, with these arguments.

    Raises:
        ValueError: the package does not lie in a clone.
    """
    if not (CLONE / "bench" / "run.py").is_file():
        raise ValueError("mopo bench runs from a clone of the repository")
    path = [str(CLONE), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The second, since Python 3.11: whatever is called bench in the working directory is not meant.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "bench.run", *arguments], environment)
