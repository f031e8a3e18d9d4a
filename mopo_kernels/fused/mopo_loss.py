"""Sums over packed sequences, and the loss of sequence log-probabilities: custom ops, fake kernels, backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mopo_kernels import checks, naive_grad
from mopo_kernels.arguments import CallValues, OpArguments, PairBatch, bundle
from mopo_kernels.backends import tile_backend
from mopo_kernels.fused.buffer_plan import accumulation_dtype
from mopo_kernels.fused.custom_ops import constant


@torch.library.custom_op(
    "mopo::segment_sum", mutates_args=(), schema="(Tensor value, Tensor cu_seqlens, str backend) -> Tensor"
)
def segment_sum(value: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    tiles = tile_backend(backend)
    tiles.check_values(CallValues(cu_seqlens=cu_seqlens, tokens=value.shape[0], sequences=cu_seqlens.shape[0] - 1))
    return tiles.segment_sum(value, cu_seqlens)


@segment_sum.register_fake
def _(value: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    return value.new_empty(cu_seqlens.shape[0] - 1)


def _segment_sum_setup(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(constant(inputs[1]))
    ctx.tokens = inputs[0].shape[0]


def _segment_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    return naive_grad.token_grad(grad, cu_seqlens, ctx.tokens), None, None


segment_sum.register_autograd(_segment_sum_backward, setup_context=_segment_sum_setup)


@bundle
@dataclass(frozen=True)
class MOPOLoss(OpArguments):
    """Arguments of :func:`mopo_loss`."""

    logprob: Tensor
    ref_logprob: Tensor
    batch: PairBatch
    backend: str


def fake_loss(like: Tensor, sequences: int, batch: PairBatch) -> tuple[Tensor, ...]:
    """What :meth:`mopo_kernels.backends.base.TileBackend.pair_loss_fwd` returns, empty."""
    dtype, (pairs, objectives) = accumulation_dtype(like.dtype), batch.preference.shape
    sizes: tuple[tuple[int, ...], ...] = ((), (sequences,), (pairs,), (objectives,), (objectives,), ())
    return tuple(like.new_empty(size, dtype=dtype) for size in sizes)


@torch.library.custom_op(
    "mopo::mopo_loss",
    mutates_args=(),
    schema=f"({MOPOLoss.schema()}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def mopo_loss(*flat: object) -> tuple[Tensor, ...]:
    """What :meth:`mopo_kernels.backends.base.TileBackend.pair_loss_fwd` returns, and d loss / d logprob."""
    call = MOPOLoss.unflatten(flat)
    checks.ref_logprob(call.ref_logprob)
    batch = call.batch.to(call.ref_logprob.dtype, call.ref_logprob.device)
    backend, logprobs = tile_backend(call.backend), (call.logprob, call.ref_logprob)
    backend.check_values(CallValues(batch=batch, sequences=call.ref_logprob.shape[0]))
    return (*backend.pair_loss_fwd(*logprobs, batch), backend.pair_loss_bwd(*logprobs, batch))


@mopo_loss.register_fake
def _(*flat: object) -> tuple[Tensor, ...]:
    call = MOPOLoss.unflatten(flat)
    return (*fake_loss(call.logprob, call.logprob.shape[0], call.batch), torch.empty_like(call.logprob))


def _mopo_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1])


@once_differentiable
def _mopo_loss_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return MOPOLoss.gradients()
    (grad_logprob,) = ctx.saved_tensors
    return MOPOLoss.gradients(logprob=grad * grad_logprob)


mopo_loss.register_autograd(_mopo_loss_backward, setup_context=_mopo_loss_setup)
