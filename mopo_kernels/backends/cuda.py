"""Backend "cuda": tile work in CUDA C++ (csrc/cuda), in the extension ``mopo_kernels._cuda``: the fallback where Triton
is missing.

The extension is optional: where it was not built, or does not load, :func:`unavailable_reason` says why. It implements
the operators that ``mopo_kernels._C`` defines, and so needs that one as well.
"""

from __future__ import annotations

from functools import cache

import torch

from mopo_kernels.backends import cpp, extension


@cache
def unavailable_reason() -> str | None:
    """None if the extension is loaded, which the first call attempts, and finds a device; otherwise one line that says
    why not."""
    reason = extension.unavailable_reason("_cuda", "CUDA", "cuda_reason", "cuda")
    if reason is None and cpp.unavailable_reason() is not None:
        reason = f"its operators are defined in the C++ extension; {cpp.unavailable_reason()}"
    # device_count leaves the driver uninitialised, so that this process can still fork.
    if reason is None and torch.cuda.device_count() == 0:
        reason = f"torch was built for CUDA {torch.version.cuda} but finds no usable device"
    return reason


class CudaBackend(cpp.CppBackend):
    """The same operators: torch takes the implementation for the device of the tile."""


BACKEND = CudaBackend()
