"""Backends: who does the tile work of a transform, and whether they can here."""

from __future__ import annotations

from importlib import import_module

import torch

from mopo_kernels.backends import cpp, cuda, torch_ops, triton
from mopo_kernels.backends.base import TileBackend

__all__ = ["NAMES", "BackendUnavailableError", "TileBackend", "availability", "resolve", "tile_backend"]

_BACKENDS: dict[str, TileBackend] = {
    "cpp": cpp.BACKEND,
    "cuda": cuda.BACKEND,
    "torch": torch_ops.BACKEND,
}
_REASONS: dict[str, str | None] = {
    "naive": None,
    "torch": torch_ops.unavailable_reason(),
    "cpp": cpp.unavailable_reason(),
    "triton": triton.unavailable_reason(),
    "cuda": cuda.unavailable_reason(),
}
NAMES = ("auto", *_REASONS)
# For each kind of device what "auto" means: the first of these that is available.
_PREFERRED = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}


class BackendUnavailableError(RuntimeError):
    """A backend asked for by name cannot run in this process, or not on that device; the message says why."""


def availability() -> dict[str, str | None]:
    """Every backend by name: None where it can be used in this process, else one line that says why not."""
    return dict(_REASONS)


def _serves(name: str) -> tuple[str, ...] | None:
    """The kinds of device a backend serves; None for all."""
    if name == "triton":
        return triton.serves()
    return {"cpp": ("cpu",), "cuda": ("cuda",)}.get(name)


def resolve(name: str, device: torch.device) -> str:
    """The backend that serves ``name`` on ``device``. Only "auto" falls back; any other name is itself or an error."""
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {name!r}")
    if name == "auto":
        return next(b for b in _PREFERRED.get(device.type, ("torch",)) if _REASONS[b] is None)
    if _REASONS[name] is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {_REASONS[name]}")
    kinds = _serves(name)
    if kinds is not None and device.type not in kinds:
        raise BackendUnavailableError(
            f"backend {name!r} serves {' and '.join(kinds).upper()} tensors; got tensors on {device}"
        )
    return name


def tile_backend(name: str) -> TileBackend:
    """The tile work behind a resolved name."""
    if name not in _BACKENDS:
        # The one that imports more than torch.
        _BACKENDS[name] = import_module(f"mopo_kernels.backends.{name}.backend").BACKEND
    return _BACKENDS[name]
