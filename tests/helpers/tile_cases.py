"""Tiles, and what plain PyTorch and a backend answer for them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends import TileBackend

START = 1000
# Empty, one row, an odd few, more than one block of rows; widths below, at and beyond a vector, a group of vectors and
# the C++ kernel's block of 2048 columns, none of them a multiple of all.
SHAPES = [(r, w) for r in (0, 1, 3, 130) for w in (1, 7, 64, 1000, 4099)]
PLAIN = LogitTransform()
EVERYTHING = LogitTransform(5.0, 0.7, 1.3)
# Each part of the head alone, then all; (transform, with a bias). A softcap of 5 bends logits of standard deviation 3.
HEADS = [
    pytest.param(PLAIN, False, id="plain"),
    pytest.param(PLAIN, True, id="bias"),
    pytest.param(LogitTransform(5.0), False, id="softcap"),
    pytest.param(LogitTransform(None, 0.7, 1.0), False, id="scale"),
    pytest.param(LogitTransform(None, 1.0, 1.3), False, id="temperature"),
    pytest.param(EVERYTHING, True, id="everything"),
]


class Case(NamedTuple):
    tile: Tensor
    bias: Tensor | None
    target: Tensor
    grad_logprob: Tensor


def make_case(rows: int, width: int, bias: bool, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Case:
    """A tile inside a larger NaN-filled block (row stride > width); targets in the tile, below and above it."""
    g = torch.Generator().manual_seed(1000 * rows + width)
    block = torch.full((rows + 2, width + 5), torch.nan, dtype=dtype)
    tile = block[1 : rows + 1, 3 : 3 + width]
    tile.copy_(spread * torch.randn(rows, width, generator=g))
    target = START + torch.randint(0, width, (rows,), generator=g)
    target[1::4] = START - 1
    target[2::4] = START + width
    b = torch.randn(width, generator=g).to(dtype) if bias else None
    return Case(tile, b, target, torch.randn(rows, generator=g).to(dtype))


def logits(x: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    z = (x if bias is None else x + bias) * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


class Answer(NamedTuple):
    logsumexp: Tensor
    logprob: Tensor
    target_logit: Tensor
    gradient: Tensor


def plain(case: Case, transform: LogitTransform, dtype: torch.dtype) -> Answer:
    """What plain PyTorch answers in ``dtype``. A target outside the tile has logprob 0 and no one-hot."""
    x = case.tile.to(dtype).requires_grad_()
    column = case.target - START
    inside = (column >= 0) & (column < x.shape[1])
    at = column.clamp(0, x.shape[1] - 1)[:, None]
    z = logits(x, None if case.bias is None else case.bias.to(dtype), transform)
    logprob = torch.log_softmax(z.detach(), dim=1)
    onehot = torch.zeros_like(logprob).scatter(1, at, inside[:, None].to(dtype))
    # The backward formula of log_softmax, which also says what a row contributes whose target lies in another tile.
    (gradient,) = torch.autograd.grad(z, x, (onehot - logprob.exp()) * case.grad_logprob.to(dtype)[:, None])
    return Answer(
        torch.logsumexp(z.detach(), dim=1),
        logprob.gather(1, at)[:, 0].where(inside, 0.0),
        z.detach().gather(1, at)[:, 0].where(inside, 0.0),
        gradient,
    )


def lse_fwd(
    backend: TileBackend, case: Case, transform: LogitTransform, cuts: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_max, sum_exp, target_logit) after folding the tile in pieces, cut at the given columns."""
    rows, width = case.tile.shape
    row_max = case.tile.new_full((rows,), -torch.inf)
    sum_exp, target_logit = torch.zeros_like(row_max), torch.zeros_like(row_max)
    edges = (0, *cuts, width)
    for a, b in itertools.pairwise(edges):
        bias = None if case.bias is None else case.bias[a:b]
        backend.lse_fwd(case.tile[:, a:b], bias, case.target, START + a, transform, row_max, sum_exp, target_logit)
    return row_max, sum_exp, target_logit


def answer(backend: TileBackend, case: Case, transform: LogitTransform, cuts: tuple[int, ...] = ()) -> Answer:
    """The backend's answers, combined as the driver combines them; leaves the case as it was."""
    row_max, sum_exp, target_logit = lse_fwd(backend, case, transform, cuts)
    logsumexp = row_max.double() + torch.log(sum_exp.double())
    column = case.target - START
    inside = (column >= 0) & (column < case.tile.shape[1])
    logprob = torch.where(inside, (target_logit - row_max) - torch.log(sum_exp), 0.0)
    gradient = case.tile.clone()
    edges = (0, *cuts, case.tile.shape[1])
    for a, b in itertools.pairwise(edges):
        bias = None if case.bias is None else case.bias[a:b]
        backend.logits_bwd_(gradient[:, a:b], bias, case.target, START + a, transform, logsumexp, case.grad_logprob)
    return Answer(logsumexp.to(row_max), logprob, target_logit, gradient)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def errors(got: Answer, case: Case, transform: LogitTransform) -> dict[str, tuple[float, float, float]]:
    """For each field: error against the fp64 truth, plain PyTorch's error in the tile's dtype, and the truth's size."""
    truth, reference = plain(case, transform, torch.float64), plain(case, transform, case.tile.dtype)
    return {
        name: (rms(g.double() - t), rms(p.double() - t), rms(t))
        for name, g, p, t in zip(Answer._fields, got, reference, truth, strict=True)
    }


def check_within_budget(got: Answer, case: Case, transform: LogitTransform, floor: float, factor: float = 1.1) -> None:
    """RMS error at most ``factor`` times plain PyTorch's, or ``floor`` machine epsilons of the truth's size
    where that is more: on few elements plain PyTorch is exact by chance, in fp64 it is the truth itself."""
    epsilon = torch.finfo(case.tile.dtype).eps
    for name, (error, budget, size) in errors(got, case, transform).items():
        allowed = max(factor * budget, floor * epsilon * size)
        assert error <= allowed, f"{name}: error {error:.3g} against fp64, allowed {allowed:.3g}"
