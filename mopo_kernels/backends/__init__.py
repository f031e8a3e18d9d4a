"""Backends: who does the tile work of the driver.

A *tile* is an (R, W) block of ``hidden @ weight.T`` (rows: scored tokens, columns: vocabulary entries ``start`` to
``start + W``) in the accumulation dtype: fp32, or fp64 for fp64 input. A backend folds a tile into running statistics
and turns a tile into its gradient in place; products, chunking and the order of accumulation belong to
:mod:`mopo_kernels.driver`.
"""

from __future__ import annotations

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


from mopo_kernels.backends import cpp, torch_ops  # noqa: E402  (they need the names above)

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
