"""Backend "cpp": tile work in vectorised, threaded C++ on the CPU (csrc/cpu), in the extension ``mopo_kernels._C``.

The extension is optional: where it was not built, or does not load, :func:`unavailable_reason` says why.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from mopo_kernels.backends.tile import Head

# Written by setup.py next to the extension: {"reason": why it was not built or null, "torch": the version built with}.
_RECORD = Path(__file__).resolve().parent.parent / "_build.json"


def _recorded() -> dict[str, str | None]:
    try:
        record: dict[str, str | None] = json.loads(_RECORD.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"reason": "setup.py has not run here; install the package with pip", "torch": None}
    return record


@cache
def unavailable_reason() -> str | None:
    """None if the extension is loaded, which the first call attempts; otherwise one line that says why not."""
    record = _recorded()
    if record["reason"] is not None:
        return f"the C++ extension was not built: {record['reason']}"
    try:
        import_module("mopo_kernels._C")
    except ImportError as error:
        detail = " ".join(str(error).split())[:200]
        return (
            f"the C++ extension was built with torch {record['torch']} and does not load with torch "
            f"{torch.__version__} ({detail}); reinstall with MOPO_BUILD=cpu"
        )
    return None


class CppBackend:
    def fold(
        self,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        head: Head,
        maximum: Tensor,
        total: Tensor,
        picked: Tensor,
    ) -> None:
        torch.ops.mopo_tile.fold(
            tile, bias, target, start, head.softcap, head.logit_scale, head.temperature, maximum, total, picked
        )

    def gradient_(
        self,
        tile: Tensor,
        bias: Tensor | None,
        target: Tensor,
        start: int,
        head: Head,
        logsumexp: Tensor,
        coefficient: Tensor | None,
    ) -> None:
        torch.ops.mopo_tile.gradient_(
            tile, bias, target, start, head.softcap, head.logit_scale, head.temperature, logsumexp, coefficient
        )


BACKEND = CppBackend()
