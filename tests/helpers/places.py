"""Where a test runs: a device and a backend that serves it.

Every test here takes its device as an argument. On a GPU it is marked ``gpu`` and runs in full; on the CPU its body
runs on a few small cases, so that the tests themselves are known to work where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from samples import Batch
from torch import Tensor

from mopo_kernels import backends

# cpp has tests of its own.
BACKENDS = {"cpu": ("torch",), "cuda": ("torch", "triton", "cuda")}


def unavailable(backend: str, device: str) -> str | None:
    """Why the backend does not serve the device here, None if it does."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        backends.resolve(backend, torch.device(device))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def _label(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "none"
    return str(value)


Rows = Iterable[tuple[Any, ...]]


def cases(cpu: Rows, cuda: Rows, interpreted: Rows = ()) -> list[Any]:
    """Parameters ``(device, backend, *row)``: the rows of each device under every backend that serves it, and on the
    CPU those for Triton's interpreter, which is slow. A GPU's are collected everywhere, and skipped with the reason
    where a backend does not serve it; the CPU's only where they run."""
    places = [
        *itertools.product(("cpu",), BACKENDS["cpu"], list(cpu)),
        *itertools.product(("cpu",), ("triton",), list(interpreted)),
        *itertools.product(("cuda",), BACKENDS["cuda"], list(cuda)),
    ]
    parameters = []
    for device, backend, row in places:
        reason = unavailable(backend, device)
        if device == "cpu" and reason is not None:
            continue
        marks = [] if device == "cpu" else [pytest.mark.gpu]
        if reason is not None:
            marks.append(pytest.mark.skip(reason=reason))
        name = "-".join(map(_label, (device, backend, *row)))
        parameters.append(pytest.param(device, backend, *row, marks=marks, id=name))
    return parameters


def everywhere(*rows: tuple[Any, ...]) -> list[Any]:
    """:func:`cases` with the same rows on every device."""
    return cases(rows or ((),), rows or ((),))


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def on(batch: Batch, device: str, host: bool = False) -> Batch:
    """The batch on a device; with ``host``, cu_seqlens and pairs stay on the CPU."""
    kept = ("cu_seqlens", "pairs") if host else ()
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{name: value if name in kept else value.to(device) for name, value in fields.items()})
