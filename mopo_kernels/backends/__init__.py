"""Backends: who does the tile work of the driver, and whether they can here."""

from __future__ import annotations

import torch

from mopo_kernels.backends import cpp, torch_ops
from mopo_kernels.backends.tile import Head, TileBackend

__all__ = ["NAMES", "Head", "TileBackend", "availability", "resolve", "tile_backend"]

_BACKENDS: dict[str, TileBackend] = {"cpp": cpp.BACKEND, "torch": torch_ops.BACKEND}
_REASONS: dict[str, str | None] = {
    "reference": None,
    "torch": torch_ops.unavailable_reason(),
    "cpp": cpp.unavailable_reason(),
}
NAMES = ("auto", *_REASONS)


def availability() -> dict[str, str | None]:
    """Every backend by name: None where it can be used in this process, else one line that says why not."""
    return dict(_REASONS)


def resolve(name: str, device: torch.device) -> str:
    """The backend that serves ``name`` on ``device``. Only "auto" falls back; any other name is itself or an error."""
    if name == "auto":
        return "cpp" if device.type == "cpu" and _REASONS["cpp"] is None else "torch"
    if name not in _REASONS:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")
    if _REASONS[name] is not None:
        raise RuntimeError(f"backend {name!r} is not available: {_REASONS[name]}")
    if name == "cpp" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpp' serves CPU tensors; got tensors on {device}")
    return name


def tile_backend(name: str) -> TileBackend:
    """The tile work behind a resolved name."""
    return _BACKENDS[name]
