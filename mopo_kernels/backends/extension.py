"""The optional compiled extensions: whether one can be used here, and why not."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import torch

# Written by setup.py next to the extensions: for each, why it was not built or null; and the torch it was built with.
_RECORD = Path(__file__).resolve().parent.parent / "_build.json"
_NO_RECORD = "setup.py has not run here; install the package with pip"


def unavailable_reason(module: str, title: str, key: str, mode: str) -> str | None:
    """None if ``mopo_kernels.<module>`` is loaded, which this attempts; otherwise one line that says why not.

    ``title`` is what the line calls the extension, ``key`` is where setup.py records why it was not built, and ``mode``
    is the MOPO_BUILD that insists on it.
    """
    try:
        record: dict[str, str | None] = json.loads(_RECORD.read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = {}
    reason = record.get(key, _NO_RECORD)
    if reason is not None:
        return f"the {title} extension was not built: {reason}"
    try:
        import_module(f"mopo_kernels.{module}")
    except ImportError as error:
        detail = " ".join(str(error).split())[:200]
        return (
            f"the {title} extension was built with torch {record['torch']} and does not load with torch "
            f"{torch.__version__} ({detail}); reinstall with MOPO_BUILD={mode}"
        )
    return None
