"""The loss straight from hidden states, in one pass: the custom op, the order of its chunks, its backward.

Rows are scored tokens. Nothing here waits for an accelerator: a plan that needs values (which sequences a chunk holds,
which pairs close in it) is made from ``cu_seqlens`` and ``pairs`` where those are on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mopo_kernels import checks, naive_grad
from mopo_kernels.arguments import HeadInputs, HeadOptions, OpArguments, PairBatch, bundle
from mopo_kernels.fused import scored_rows
from mopo_kernels.fused.buffer_plan import accumulation_dtype, buffer_bytes
from mopo_kernels.fused.chunked_head import Chunk, ChunkedHead, TokenLogprob, readable
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
from mopo_kernels.fused.mopo_loss import fake_loss
from mopo_kernels.fused.pair_groups import closed_groups
from mopo_kernels.fused.scored_rows import Rows
from mopo_kernels.transfer import to_device


@bundle
@dataclass(frozen=True)
class LinearMOPOLoss(OpArguments):
    """Arguments of :func:`linear_mopo_loss`: the packed batch, the reference as ``ref_logprob`` (S,) or as
    ``ref_hidden`` (N, H) under the same head, the pairs, on the CPU if they can be read."""

    inputs: HeadInputs
    cu_seqlens: Tensor
    ref_logprob: Tensor | None
    ref_hidden: Tensor | None
    batch: PairBatch
    options: HeadOptions


@dataclass(frozen=True)
class ChunkGroup:
    """Rows that are finished together: their positions among the scored ones, and whether one chunk holds them all."""

    positions: Rows
    one_chunk: bool


def _schedule(head: ChunkedHead, cu_seqlens: Tensor, pairs: Tensor) -> Iterator[ChunkGroup]:
    """The groups of a pass in which every sequence's grad_logprob is known before its rows are left behind.

    Where lengths and pairs can be read, rows of sequences that no pair leaves are put together until they fill a chunk.
    Where they cannot, all rows are one group.
    """
    largest = head.plan.rows if head.full_vocab else 0
    if not (scored_rows.on_host(cu_seqlens) and scored_rows.on_host(pairs)):
        yield ChunkGroup(slice(0, head.scored.count), head.scored.count <= largest)
        return
    first = head.scored.offsets(cu_seqlens).tolist()
    lengths = [stop - start for start, stop in pairwise(first)]
    for group in closed_groups(pairs.tolist(), lengths, largest):
        ranges = group.row_ranges(first)
        if len(ranges) == 1:
            yield ChunkGroup(slice(*ranges[0]), group.one_chunk)
        elif ranges:
            positions = torch.cat([torch.arange(start, stop) for start, stop in ranges])
            yield ChunkGroup(to_device(positions, head.hidden.device), group.one_chunk)


@torch.library.custom_op(
    "mopo::linear_mopo_loss",
    mutates_args=(),
    schema=f"({LinearMOPOLoss.schema()}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_mopo_loss(*flat: object) -> tuple[Tensor, ...]:
    """What :meth:`mopo_kernels.backends.base.TileBackend.pair_loss_fwd` returns, and the loss's gradients for hidden,
    weight and bias (size 0 where not needed).

    Three products with a trained head: a chunk of logits is saved until the pairs of its sequences close, grad_logprob
    follows from the pairs, and the chunk becomes ``grad_logprob * J`` in place. Sequences tied together by pairs that
    need more rows than the buffer has go forward first and are computed again afterwards: one product more for their
    rows, the same numbers. Two with a frozen head, whose rows of dhidden are scaled by grad_logprob at the end, and one
    without gradients. The reference's hidden states take one more product: in one with the policy's where the buffer
    holds both.
    """
    call = LinearMOPOLoss.unflatten(flat)
    options, ref_hidden = call.options, call.ref_hidden
    shard = shard_of(call.inputs, options)
    batch = call.batch.to(accumulation_dtype(call.inputs.hidden.dtype), call.inputs.hidden.device)
    check_values(call.inputs, options, shard, call.cu_seqlens, batch)
    if call.ref_logprob is not None:
        checks.ref_logprob(call.ref_logprob)
    inputs = readable(call.inputs, options)
    with no_autocast(inputs.hidden):
        hidden, limit = inputs.hidden, buffer_bytes(options, inputs.weight)
        sequences, tokens = call.cu_seqlens.shape[0] - 1, hidden.shape[0]
        host_cu_seqlens = call.cu_seqlens.contiguous()
        cu_seqlens = to_device(host_cu_seqlens, hidden.device)

        def new_head(copies: int, gathered_rows: bool = False) -> ChunkedHead:
            save = any(inputs.needs)
            return ChunkedHead(
                inputs, options, shard, limit, copies=copies, save_logits=save, gathered_rows=gathered_rows
            )

        head = new_head(copies=1)
        together = False
        if ref_hidden is not None and head.full_vocab and head.scored.count <= head.plan.rows:
            both = new_head(copies=2)
            if both.full_vocab and 2 * both.scored.count <= both.plan.rows:
                head, together = both, True
        planned = inputs.trained and batch.options.loss_type != "cloning"
        groups = list(_schedule(head, host_cu_seqlens, call.batch.pairs)) if planned else []
        if not together and any(isinstance(group.positions, Tensor) for group in groups):
            head = new_head(copies=1, gathered_rows=True)
            groups = list(_schedule(head, host_cu_seqlens, call.batch.pairs))
        backend = head.backend
        gradients = head.allocate(*inputs.needs)
        policy = head.new_token_logprob()
        reference = None if ref_hidden is None else head.new_token_logprob()
        ref_logprob = call.ref_logprob

        def forward(chunk: Chunk, backward: bool = False) -> TokenLogprob:
            if not together or ref_hidden is None or reference is None:
                return head.forward(chunk, policy, backward=backward)
            token = head.forward_with_reference(chunk, policy, ref_hidden, reference.logprob)
            if backward:
                head.backward(chunk, token, None, head.saved_tile(chunk, 2))
            return token

        if ref_hidden is not None and reference is not None and not together:
            reference_head = head
            if head.fused and head.save_logits:
                # Without a tile to save, more rows go at a time.
                reference_inputs = replace(inputs, hidden=ref_hidden)
                reference_head = ChunkedHead(reference_inputs, options, shard, limit, save_logits=False)
            for chunk in reference_head.chunks(of=ref_hidden):
                reference_head.forward(chunk, reference, store=False)
            ref_logprob = backend.segment_sum(reference.logprob, cu_seqlens)

        def sums() -> tuple[Tensor, Tensor]:
            logprob = backend.segment_sum(policy.logprob, cu_seqlens)
            if ref_logprob is not None:
                return logprob, ref_logprob
            assert reference is not None
            return logprob, backend.segment_sum(reference.logprob, cu_seqlens)

        # Of the rows that went forward so far.
        latest: tuple[Tensor, Tensor] | None = None
        copies = 2 if together else 1
        if planned:
            for group in groups:
                for chunk in head.chunks(group.positions):
                    token = forward(chunk)
                    if group.one_chunk:
                        latest = sums()
                        grad = backend.token_grad_logprob(*latest, batch, cu_seqlens, tokens)
                        head.backward(chunk, token, grad[chunk.rows], head.saved_tile(chunk, copies))
                if not group.one_chunk:
                    latest = sums()
                    grad = backend.token_grad_logprob(*latest, batch, cu_seqlens, tokens)
                    for chunk in head.chunks(group.positions):
                        head.backward(chunk, policy.at(chunk.rows), grad[chunk.rows], None)
        else:
            # Either grad_logprob is known beforehand, or it only scales the rows of dhidden, which can wait.
            known = None
            if inputs.trained:
                known = naive_grad.token_grad(naive_grad.cloning_grad_logprob(batch, sequences), cu_seqlens, tokens)
            for chunk in head.chunks():
                token = forward(chunk, backward=inputs.frozen)
                if known is not None:
                    head.backward(chunk, token, known[chunk.rows], head.saved_tile(chunk, copies))
            latest = sums()
        scale = None
        if inputs.frozen and latest is not None:
            scale = backend.token_grad_logprob(*latest, batch, cu_seqlens, tokens)
        head.finish(scale)
        return (*backend.pair_loss_fwd(*(latest or sums()), batch), *gradients)


@linear_mopo_loss.register_fake
def _(*flat: object) -> tuple[Tensor, ...]:
    call = LinearMOPOLoss.unflatten(flat)
    loss = fake_loss(call.inputs.hidden, call.cu_seqlens.shape[0] - 1, call.batch)
    return (*loss, *fake_gradients(call.inputs))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    save_arguments(ctx, LinearMOPOLoss.NAMES, inputs)
    ctx.gradients = list(output[-3:])


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return LinearMOPOLoss.gradients()
    flat, _outputs = saved_arguments(ctx)
    call = LinearMOPOLoss.unflatten(flat)
    inputs, dtype, backend = call.inputs, call.inputs.hidden.dtype, call.options.backend
    gradients = take_gradients(ctx)
    if gradients is None:
        gradients = list(linear_mopo_loss(*flat)[-3:])
    # From the last to the first, so that none is there longer than it must.
    dbias = scale_last(gradients, grad, dtype, backend)
    dweight = scale_last(gradients, grad, dtype, backend)
    dhidden = scale_last(gradients, grad, dtype, backend)
    return LinearMOPOLoss.gradients(
        hidden=dhidden if inputs.need_hidden else None,
        weight=dweight if inputs.need_weight else None,
        bias=dbias if inputs.need_bias else None,
    )


linear_mopo_loss.register_autograd(_backward, setup_context=_setup)
