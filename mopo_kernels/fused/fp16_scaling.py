"""fp16's narrow range: what stays outside of the numbers that are rounded to it.

The upstream gradient loses a power of two before anything is computed (:func:`grad_scale`); each row's factor is split
into a mantissa, which goes into the tile, and an exponent, which goes into the other factor of the products
(:func:`split`, :class:`RowPowers`). All of it is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Gradients in fp16 are multiplied by this before they are rounded: they lie between -1 and 1, and what is below 2^-24
# would be lost.
FP16_SCALE = 2.0**14


def grad_scale(grad: Tensor) -> Tensor:
    """The power of two (1,) by which grad (N,) is divided to lie within -1 .. 1: loss scaling, or a mean over many
    tokens, leaves the range of fp16."""
    return torch.ldexp(torch.ones_like(grad[:1]), torch.frexp(grad.abs().amax(0, keepdim=True)).exponent)


def split(grad_logprob: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissas (R,), times ``FP16_SCALE``, and exponents (R,) of the rows' factors."""
    mantissa, exponent = torch.frexp(grad_logprob)
    return mantissa * FP16_SCALE, exponent


class RowPowers(NamedTuple):
    """The rows' exponents as factors: ``power`` (R, 1), and ``hidden`` (R, H) and ``ones`` (R, 1) times it, in hidden's
    dtype; products with a tile of :func:`split` are too large by ``1 / alpha``."""

    power: Tensor
    hidden: Tensor
    ones: Tensor
    alpha: float

    @classmethod
    def of(cls, hidden: Tensor, exponent: Tensor, acc_dtype: torch.dtype) -> RowPowers:
        power = torch.ldexp(torch.ones_like(hidden[:, :1], dtype=acc_dtype), exponent[:, None])
        return cls(power, (hidden * power).to(hidden.dtype), power.to(hidden.dtype), 1 / FP16_SCALE)
