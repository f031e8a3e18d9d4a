"""Log-probability per token: the custom op, its fake kernel, its backward.

Forward leaves what makes backward cheap:

* head frozen: the rows ``d logprob / d hidden`` (N, H), so that backward only scales them (2 products in all);
* head trained: the tile (N, V), scored rows first, and its offsets or scale, if it fits the buffer (3 products in all),
  else nothing (4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mopo_kernels.arguments import HeadInputs, HeadOptions, OpArguments, bundle
from mopo_kernels.backends import tile_backend
from mopo_kernels.fused.buffer_plan import accumulation_dtype, buffer_bytes, layout_of
from mopo_kernels.fused.chunked_head import ChunkedHead, Tile, TokenLogprob, readable
from mopo_kernels.fused.custom_ops import (
    check_values,
    fake_gradients,
    no_autocast,
    save_arguments,
    saved_arguments,
    scale_last,
    shard_of,
    take_gradients,
)
from mopo_kernels.fused.fp16_scaling import grad_scale
from mopo_kernels.fused.scored_rows import scored_grad


@bundle
@dataclass(frozen=True)
class LinearLogprob(OpArguments):
    """Arguments of :func:`linear_logprob`."""

    inputs: HeadInputs
    options: HeadOptions


@bundle
@dataclass(frozen=True)
class LinearLogprobBackward(OpArguments):
    """Arguments of :func:`linear_logprob_backward`: upstream gradients (N,), the inputs, and what forward left."""

    grad: Tensor
    inputs: HeadInputs
    logprob: Tensor
    logsumexp: Tensor
    logits: Tensor
    offsets: Tensor
    options: HeadOptions


def _saved_budget(max_buffer_bytes: int) -> int:
    """What is left of the buffer beside a saved tile: see :func:`saves_logits`."""
    return max_buffer_bytes // 4


def saves_logits(inputs: HeadInputs, options: HeadOptions) -> bool:
    """Whether a trained head's tile is saved for backward: it fits three quarters of the buffer, the last quarter being
    left for turning it into gradients."""
    if not inputs.trained or options.process_group is not None:
        return False
    max_buffer_bytes = buffer_bytes(options, inputs.weight)
    budget = _saved_budget(max_buffer_bytes)
    filtered = options.gradient_filter is not None
    layout = layout_of(inputs.weight, tile_backend(options.backend), budget, filtered=filtered)
    assert layout.tile_dtype is not None
    tokens, vocabulary = inputs.target.shape[0], inputs.weight.shape[0]
    if tokens * vocabulary * layout.tile_dtype.itemsize > max_buffer_bytes - budget:
        return False
    return budget >= layout.min_buffer_bytes() and layout.full_vocab_rows(budget) >= 1


@torch.library.custom_op(
    "mopo::linear_logprob",
    mutates_args=(),
    schema=f"({LinearLogprob.schema()}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_logprob(*flat: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability (N,), log-sum-exp (N,) in fp64, d logprob / d hidden (N, H) or nothing, and the saved tile (N, V)
    and its offsets or scale, or nothing."""
    call = LinearLogprob.unflatten(flat)
    shard = shard_of(call.inputs, call.options)
    check_values(call.inputs, call.options, shard)
    inputs, options = readable(call.inputs, call.options), call.options
    hidden, limit = inputs.hidden, buffer_bytes(options, inputs.weight)
    save = saves_logits(inputs, options)
    budget = _saved_budget(limit) if save else limit
    with no_autocast(hidden):
        head = ChunkedHead(inputs, options, shard, budget, full_vocab=save, save_logits=save or inputs.frozen)
        unit, _, _ = head.allocate(inputs.frozen, False, False)
        saved = head.new_tile(hidden.shape[0]) if save else None
        token = head.new_token_logprob()
        for chunk in head.chunks():
            tile = None if saved is None else saved.rows(chunk.start, chunk.stop)
            head.forward(chunk, token, tile, backward=inputs.frozen)
            if saved is not None and tile is not None:
                saved.keep_offsets(tile, chunk.start, chunk.stop)
        head.finish()
        empty = token.logprob.new_empty(0)
        if saved is None:
            return *token, unit, empty, empty.clone()
        saved.values[head.scored.count :].zero_()
        beside = saved.scale if saved.offsets is None else saved.offsets
        return *token, unit, saved.values, empty if beside is None else beside


@linear_logprob.register_fake
def _(*flat: object) -> tuple[Tensor, ...]:
    call = LinearLogprob.unflatten(flat)
    inputs, options = call.inputs, call.options
    hidden, weight = inputs.hidden, inputs.weight
    dtype, tokens, vocabulary = accumulation_dtype(hidden.dtype), hidden.shape[0], weight.shape[0]
    logprob, empty = hidden.new_empty(tokens, dtype=dtype), hidden.new_empty(0, dtype=dtype)
    logsumexp = hidden.new_empty(tokens, dtype=torch.float64)
    if inputs.frozen:
        return logprob, logsumexp, hidden.new_empty(hidden.shape, dtype=dtype), empty, torch.empty_like(empty)
    if not saves_logits(inputs, options):
        return logprob, logsumexp, *(torch.empty_like(empty) for _ in range(3))
    backend = tile_backend(options.backend)
    if not backend.fuses(weight.dtype):
        values, offsets = weight.new_empty((tokens, vocabulary), dtype=dtype), empty
    else:
        values = weight.new_empty((tokens, vocabulary))
        blocks = () if backend.row_offsets(weight.dtype) else (backend.offset_blocks(vocabulary),)
        offsets = weight.new_empty((*blocks, tokens), dtype=torch.float32)
    return logprob, logsumexp, torch.empty_like(empty), values, offsets


@torch.library.custom_op(
    "mopo::linear_logprob_backward",
    mutates_args=(),
    schema=f"({LinearLogprobBackward.schema()}) -> (Tensor, Tensor, Tensor)",
)
def linear_logprob_backward(*flat: object) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum grad * logprob``, in the accumulation dtype."""
    call = LinearLogprobBackward.unflatten(flat)
    shard = shard_of(call.inputs, call.options)
    inputs, options = readable(call.inputs, call.options), call.options
    limit, saved = buffer_bytes(options, inputs.weight), None
    if call.logits.dim() == 2:
        by_row = tile_backend(options.backend).row_offsets(call.logits.dtype)
        offsets = call.offsets if by_row or call.offsets.dim() == 2 else None
        saved = Tile(call.logits, scale=offsets) if by_row else Tile(call.logits, offsets)
    with no_autocast(inputs.hidden):
        budget = limit if saved is None else _saved_budget(limit)
        head = ChunkedHead(inputs, options, shard, budget, full_vocab=saved is not None)
        gradients = head.allocate(*inputs.needs)
        grad, unit = scored_grad(call.grad, inputs.target, options.ignore_index), None
        if head.layout.matmul_dtype == torch.float16 and grad.numel():
            unit = grad_scale(grad)
            grad = grad / unit
        if saved is not None and not head.full_vocab:
            saved = None  # there are more threads than in forward, whose own memory left room for it
        for chunk in head.chunks():
            tile = None
            if saved is not None:
                tile = saved.rows(chunk.start, chunk.stop)
                if tile.scale is None:
                    # A copy: a second backward will want what was saved.
                    tile = head.tile(chunk.stop - chunk.start, inputs.weight.shape[0])
                    tile.copy_(saved.rows(chunk.start, chunk.stop))
            token = TokenLogprob(call.logprob, call.logsumexp).at(chunk.rows)
            head.backward(chunk, token, grad[chunk.rows], tile)
        head.finish()
        if unit is not None:
            for gradient in gradients:
                gradient.mul_(unit)
    return gradients


@linear_logprob_backward.register_fake
def _(*flat: object) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(LinearLogprobBackward.unflatten(flat).inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, logsumexp, unit, logits, offsets = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logsumexp, unit, logits, offsets)
    save_arguments(ctx, LinearLogprob.NAMES, inputs, logprob, logsumexp, logits, offsets)
    ctx.gradients = [unit] if unit.dim() == 2 else None


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return LinearLogprob.gradients()
    flat, (logprob, logsumexp, logits, offsets) = saved_arguments(ctx)
    call = LinearLogprob.unflatten(flat)
    inputs, options = call.inputs, call.options
    gradients = take_gradients(ctx)
    if gradients is not None:
        grad = scored_grad(grad, inputs.target, options.ignore_index)
        return LinearLogprob.gradients(
            hidden=scale_last(gradients, grad[:, None], inputs.hidden.dtype, options.backend)
        )
    upstream = LinearLogprobBackward(grad, inputs, logprob, logsumexp, logits, offsets, options)
    dhidden, dweight, dbias = linear_logprob_backward(*upstream.flatten())
    return LinearLogprob.gradients(
        hidden=dhidden.to(inputs.hidden.dtype) if inputs.need_hidden else None,
        weight=dweight.to(inputs.weight.dtype) if inputs.need_weight else None,
        bias=dbias.to(inputs.hidden.dtype) if inputs.need_bias else None,
    )


linear_logprob.register_autograd(_backward, setup_context=_setup)
