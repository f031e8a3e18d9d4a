"""``gradient_filter``: which elements of the gradient are left out, and that nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from samples import CPU_BACKENDS, make_batch
from torch import Tensor

from bench.head import peak_mib
from mopo_kernels import LinearMOPOLoss, linear_logprob, linear_mopo_loss, linear_sequence_logprob, mopo_loss
from mopo_kernels.fused.buffer_plan import FILTER_ROWS, row_chunks
from mopo_kernels.fused.chunked_head import FILTER_LARGEST_SHARE

pytestmark = pytest.mark.parametrize("backend", CPU_BACKENDS)

N, V, H = 300, 1500, 24
HEADS: list[dict[str, Any]] = [
    {},
    {"softcap": 30.0, "logit_scale": 1.3, "temperature": 0.8},
    {"logit_scale": 0.7, "temperature": 1.2},
]


def peaked(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states that point to a few rows of the weight, the weight, targets (some ignored), bias, and gradients of
    very different size from upstream."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    target = torch.randint(V, (N,), generator=g)
    hidden = 0.8 * weight[target] + 0.5 * weight[torch.randint(V, (N,), generator=g)]
    target[torch.rand(N, generator=g) < 0.1] = -100
    bias = 0.3 * torch.randn(V, generator=g, dtype=torch.float64)
    upstream = torch.randn(N, generator=g, dtype=torch.float64) * torch.logspace(0, -5, N, dtype=torch.float64)
    upstream[5] = 0.0
    return hidden.to(dtype), weight.to(dtype), target, bias.to(dtype), upstream.to(dtype)


def expected(
    share: float | None, trained: bool, softcap: float | None = None, logit_scale: float = 1.0, temperature: float = 1.0
) -> tuple[list[Tensor], float]:
    """Gradients of hidden, and with a trained head of weight and bias, from all logits, with zeros where (43) says so;
    and the largest part of the vocabulary that a group of rows keeps."""
    hidden, weight, target, bias, upstream = peaked()
    scored = (target != -100).nonzero()[:, 0]
    rows, y = hidden[scored], target[scored]
    z = logit_scale * (rows @ weight.T + bias)
    slope = torch.full_like(z, logit_scale / temperature)
    if softcap is not None:
        slope *= 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    probability = (z / temperature).softmax(-1)
    g = upstream[scored]
    factor = g if trained else torch.ones_like(g)
    kept = torch.ones_like(z, dtype=torch.bool)
    if share is not None:
        large = factor.abs()[:, None] * probability >= share * factor.abs().max()
        large[torch.arange(y.shape[0]), y] = True
        for a, b in row_chunks(y.shape[0], FILTER_ROWS):
            kept[a:b] = large[a:b].any(0)
    gradient = g[:, None] * (torch.nn.functional.one_hot(y, V) - probability) * slope * kept
    dhidden = torch.zeros_like(hidden)
    dhidden[scored] = gradient @ weight
    return [dhidden, *([gradient.T @ rows, gradient.sum(0)] if trained else [])], float(kept.double().mean(1).max())


def found(
    backend: str, share: float | None, trained: bool, dtype: torch.dtype = torch.float64, **options: Any
) -> list[Tensor]:
    """The same by :func:`linear_logprob`, after the log-probabilities."""
    hidden, weight, target, bias, upstream = peaked(dtype)
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_(), bias.requires_grad_()] if trained else [])]
    logprob = linear_logprob(hidden, weight, target, bias, backend=backend, gradient_filter=share, **options)
    return [logprob.detach(), *torch.autograd.grad(logprob, leaves, upstream.to(logprob.dtype))]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("head", HEADS, ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("share", [2.0**-4, 2.0**-6])
def test_what_is_kept_is_what_the_equation_says(
    backend: str, share: float, trained: bool, head: dict[str, Any]
) -> None:
    """And the log-probabilities are those of no filter, bit for bit."""
    want, kept = expected(share, trained, **head)
    assert 0.0 < kept < FILTER_LARGEST_SHARE
    logprob, *got = found(backend, share, trained, **head)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    exact, _ = expected(None, trained, **head)
    assert any(error(one, other) > 1e-6 for one, other in zip(got, exact, strict=True)), "the filter left nothing out"
    torch.testing.assert_close(logprob, found(backend, None, trained, **head)[0], rtol=0, atol=0)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("limit", [200_000, 60_000])
def test_small_buffers_keep_the_bound(backend: str, trained: bool, limit: int) -> None:
    """Chunks of rows and tiles of the vocabulary have groups of their own; every element left out is still below the
    share, so that a column sum is off by at most N of them."""
    share = 2.0**-8
    exact, _ = expected(None, trained)
    _, *got = found(backend, share, trained, max_buffer_bytes=limit)
    largest = float(peaked()[4].abs().max()) if trained else 1.0
    assert error(got[0], exact[0]) < 0.25
    if trained:
        assert float((got[2] - exact[2]).abs().max()) <= N * share * largest
        assert error(got[1], exact[1]) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_fine_filter_costs_less_than_the_rounding_of_half_precision(
    backend: str, trained: bool, dtype: torch.dtype
) -> None:
    """What is right for bf16 is 2^-14 here; a share of 2^-4 is not (so the measure can tell)."""

    def filters_error(share: float) -> float:
        exact = found(backend, None, trained, dtype)[1:]
        got = found(backend, share, trained, dtype)[1:]
        return max(error(one, other) for one, other in zip(got, exact, strict=True))

    assert filters_error(2.0**-14) < 2.0**-8
    assert filters_error(2.0**-4) > 2.0**-6


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_loss_filters_as_its_parts_do(backend: str, trained: bool) -> None:
    hidden, weight, target, _, _ = peaked()
    cu_seqlens = torch.tensor([0, 70, 150, 220, N])
    pairs = torch.tensor([[0, 1], [2, 3]])
    preference = torch.tensor([[0.9, 0.2], [0.1, 0.7]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.4], dtype=torch.float64)
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trained else [])]
    reference = torch.full((4,), -300.0, dtype=torch.float64)
    loss = LinearMOPOLoss(tau=0.5, backend=backend, gradient_filter=2.0**-6)
    batch = (hidden, weight, target, cu_seqlens, pairs, preference, weights)
    got = torch.autograd.grad(loss(*batch, ref_logprob=reference).loss, leaves)
    logprob = linear_sequence_logprob(hidden, weight, target, cu_seqlens, backend=backend, gradient_filter=2.0**-6)
    parts = torch.autograd.grad(mopo_loss(logprob, reference, pairs, preference, weights, tau=0.5).loss, leaves)
    exact = torch.autograd.grad(linear_mopo_loss(*batch, ref_logprob=reference, tau=0.5, backend=backend).loss, leaves)
    for one, other, unfiltered in zip(got, parts, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert error(one, unfiltered) > 1e-6


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_flat_distributions_are_not_filtered(backend: str, trained: bool) -> None:
    """Most of the vocabulary would be kept: the gradient is the exact one, bit for bit."""

    def gradients(share: float | None) -> tuple[Tensor, ...]:
        hidden, weight, target, _, upstream = peaked(torch.float32)
        leaves = [(0.01 * hidden).requires_grad_(), *([weight.requires_grad_()] if trained else [])]
        logprob = linear_logprob(leaves[0], weight, target, backend=backend, gradient_filter=share)
        return torch.autograd.grad(logprob, leaves, upstream)

    for one, other in zip(gradients(2.0**-12), gradients(None), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_buffer_holds_what_is_gathered(backend: str, trained: bool) -> None:
    """2 MiB, of which 4.6 KiB for each entry that is kept; beyond it gradients and a few bytes a token."""
    g = torch.Generator().manual_seed(0)
    weight, limit = torch.randn(2000, 512, generator=g), 2 << 20
    target = torch.randint(2000, (500,), generator=g)
    hidden = (0.02 * weight[target] + 0.3 * torch.randn(500, 512, generator=g)).requires_grad_()
    weight.requires_grad_(trained)

    def call(share: float | None) -> list[Tensor]:
        logprob = linear_logprob(hidden, weight, target, backend=backend, gradient_filter=share, max_buffer_bytes=limit)
        return list(torch.autograd.grad(logprob.sum(), [hidden, *([weight] if trained else [])]))

    gradients = sum(tensor.nbytes for tensor in call(2.0**-6))
    assert error(call(2.0**-6)[0], call(None)[0]) > 1e-6
    assert peak_mib(lambda: call(2.0**-6)) * 2**20 < limit + 2 * gradients + 200 * 500


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_many_small_elements_are_not_nothing(backend: str, trained: bool) -> None:
    """Every probability is far below the share, which would leave nothing but the targets: the exact gradient."""
    hidden, weight, target, _, upstream = peaked(torch.float32)
    leaves = [(0.01 * hidden).requires_grad_(), *([weight.requires_grad_()] if trained else [])]

    def gradients(share: float | None) -> tuple[Tensor, ...]:
        logprob = linear_logprob(leaves[0], weight, target, backend=backend, gradient_filter=share)
        return torch.autograd.grad(logprob, leaves, upstream)

    for one, other in zip(gradients(2.0**-4), gradients(None), strict=True):
        assert torch.equal(one, other)


def test_calls_repeat_bit_for_bit(backend: str) -> None:
    first, second = (found(backend, 2.0**-8, True, torch.float32) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_is_not_a_number_is_not_left_out(backend: str) -> None:
    """From upstream into every gradient of its row; a NaN in a row of the weight into every row of dhidden."""
    hidden, weight, target, _, upstream = peaked(torch.float32)
    hidden.requires_grad_()
    upstream[7] = torch.nan
    target[7] = 3
    logprob = linear_logprob(hidden, weight, target, backend=backend, gradient_filter=2.0**-8)
    assert torch.autograd.grad(logprob, hidden, upstream)[0][7].isnan().all()
    weight[9] = torch.nan
    logprob = linear_logprob(hidden, weight, target, backend=backend, gradient_filter=2.0**-8)
    gradient = torch.autograd.grad(logprob, hidden, torch.ones_like(upstream))[0]
    assert gradient[target != -100].isnan().all()


def test_no_upstream_gradient_is_no_gradient(backend: str) -> None:
    hidden, weight, target, _, _ = peaked(torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logprob = linear_logprob(hidden, weight, target, backend=backend, gradient_filter=2.0**-8)
    assert all(not part.any() for part in torch.autograd.grad(logprob, leaves, torch.zeros(N)))


def test_nothing_scored(backend: str) -> None:
    hidden, weight, target, _, upstream = peaked(torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logprob = linear_logprob(hidden, weight, torch.full_like(target, -100), backend=backend, gradient_filter=0.01)
    assert all(not part.any() for part in torch.autograd.grad(logprob, leaves, upstream))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan, math.inf, "half", True])
def test_other_shares_are_refused(backend: str, share: Any) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="gradient_filter: expected"):
        linear_logprob(batch.hidden, batch.weight, batch.target, backend=backend, gradient_filter=share)
    with pytest.raises(ValueError, match="gradient_filter: expected"):
        LinearMOPOLoss(backend=backend, gradient_filter=share)
