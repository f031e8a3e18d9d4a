"""Backend "cpp": tile work in vectorised, threaded C++ on the CPU (csrc/cpu), in the extension ``mopo_kernels._C``.

The extension is optional: where it was not built, or does not load, :func:`unavailable_reason` says why.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mopo_kernels.backends import extension
from mopo_kernels.backends.tile import Head, TileBackend


@cache
def unavailable_reason() -> str | None:
    """None if the extension is loaded, which the first call attempts; otherwise one line that says why not."""
    return extension.unavailable_reason("_C", "C++", "reason", "cpu")


class CppBackend(TileBackend):
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
