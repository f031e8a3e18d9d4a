"""Backends: who does the tile work of the driver.

A *tile* is an (R, W) block of ``hidden @ weight.T`` (rows: scored tokens, columns: vocabulary entries ``start`` to
``start + W``) in the accumulation dtype: fp32, or fp64 for fp64 input. A backend folds a tile into running statistics and
turns a tile into its gradient in place; products, chunking and the order of accumulation belong to
:mod:`mopo_kernels.driver`.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Head(NamedTuple):
    """From products to logits: ``z = softcap * tanh(logit_scale * (product + bias) / softcap) / temperature``."""

    softcap: float | None
    logit_scale: float
    temperature: float


class TileBackend(Protocol):
    """Tile work. ``tile`` (R, W), ``bias`` (W,) or None, ``target`` (R,) int64 in 0 .. V - 1; the rest (R,)."""

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
        """Fold the tile's logits z into ``maximum``, ``total = sum exp(z - maximum)`` and, where the target lies in the
        tile, ``picked = z[target]``. The tile is left as it was. First call: maximum -inf, total 0."""

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
        """Overwrite the tile with ``coefficient * d logprob / d product``, i.e. with
        ``coefficient * (onehot(target) - exp(z - logsumexp)) * dz/dproduct``; ``coefficient`` None stands for 1."""


# In the order in which "auto" tries them, for each kind of device.
_MODULES = {"cpp": "mopo_kernels.backends.cpp", "torch": "mopo_kernels.backends.torch_ops"}
_AUTO = {"cpu": ("cpp", "torch")}
NAMES = ("auto", "reference", *_MODULES)


def unavailable_reason(name: str) -> str | None:
    """None if the backend can be used in this process, otherwise one line that says why not."""
    if name == "reference":
        return None
    reason: str | None = import_module(_MODULES[name]).unavailable_reason()
    return reason


def availability() -> dict[str, str | None]:
    """Every backend by name: None where it can be used, else the reason why not."""
    return {name: unavailable_reason(name) for name in NAMES if name != "auto"}


def resolve(name: str, device: torch.device) -> str:
    """The backend that serves ``name`` on ``device``. Only "auto" falls back; any other name is itself or an error."""
    if name == "auto":
        return next(b for b in _AUTO.get(device.type, ("torch",)) if unavailable_reason(b) is None)
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if name == "cpp" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpp' serves CPU tensors; got tensors on {device}")
    return name


def tile_backend(name: str) -> TileBackend:
    """The tile work behind a resolved name."""
    backend: TileBackend = import_module(_MODULES[name]).BACKEND
    return backend
