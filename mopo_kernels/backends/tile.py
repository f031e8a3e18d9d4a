"""What a tile backend is: :class:`TileBackend`, and the map from products to logits, :class:`Head`.

A *tile* is an (R, W) block of ``hidden @ weight.T`` (rows: scored tokens, columns: vocabulary entries ``start`` to
``start + W``) in the accumulation dtype: fp32, or fp64 for fp64 input. A backend folds a tile into running statistics
and turns a tile into its gradient in place; products, chunking and the order of accumulation belong to
:mod:`mopo_kernels.driver`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

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
        ``coefficient * (onehot(target) - exp(z - logsumexp)) * dz/dproduct``; ``logsumexp`` is in fp64, and
        ``coefficient`` None stands for 1."""
