"""A Triton kernel that stores outside its tensor: the planted error of :mod:`bench.device.sanitizing`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store(x: tl.tensor, beyond: tl.int32) -> None:
    tl.store(x + beyond + tl.arange(0, 16), tl.full((16,), 1.0, tl.float32))
