"""`mopo bench`: the benchmarks of a clone, which are not part of the package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import mopo_kernels

CLONE = Path(mopo_kernels.__file__).resolve().parents[1]


def run_benchmarks(arguments: list[str]) -> int:
    """Run ``bench.run`` beside the package on these arguments and return its exit code.

    Raises:
        ValueError: the package does not lie in a clone, or an argument is wrong.
    """
    if not (CLONE / "bench" / "run.py").is_file():
        raise ValueError("mopo bench runs from a clone of the repository")
    sys.path.insert(0, str(CLONE))
    code: int = importlib.import_module("bench.run").main(arguments, "mopo bench")
    return code
