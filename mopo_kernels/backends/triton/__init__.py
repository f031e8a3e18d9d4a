"""Backend "triton": tile work in Triton kernels, on NVIDIA GPUs and in Triton's interpreter on the CPU.

One file a kernel: the kernel, its launch configuration and the function that launches it, on the device of the tensors,
whichever is the current one. :mod:`mopo_kernels.backends.triton.backend` puts them together; it imports Triton, this
module does not. Every kernel runs on NVIDIA GPUs from compute capability 8.0 on and in Triton's interpreter
(``TRITON_INTERPRET=1``, set before Triton is imported), is deterministic (no atomics, fixed order), never waits for the
device, and computes row offsets in 64 bits. Sizes that change from batch to batch are neither constants of the compiled
code nor specialised on, so that a new number of tokens compiles nothing.
"""

from __future__ import annotations

import os
from functools import cache

import torch


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def unavailable_reason() -> str | None:
    """None where Triton imports and there is a GPU or its interpreter is on; otherwise one line that says why not."""
    interpreting = _interpreting()
    if not interpreting and (not torch.cuda.is_available() or torch.version.cuda is None):
        return "there is no NVIDIA GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    try:
        from mopo_kernels.backends.triton.math import interpreted
    except ImportError as error:
        detail = " ".join(str(error).split())[:200]
        return f"Triton does not import ({detail}); install triton"
    if interpreting != interpreted():
        return "TRITON_INTERPRET changed after Triton was imported; set it before"
    return None


def serves() -> tuple[str, ...]:
    """Kinds of device: the interpreter takes CPU tensors as well."""
    return ("cuda", "cpu") if _interpreting() else ("cuda",)
