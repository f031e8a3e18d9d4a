"""``g = d loss / d logprob`` of every sequence, or of every token, for "regression" and "sigmoid".

One program a block of sequences. It looks through all pairs for its own, so that the order is fixed, and computes the
derivative of their losses by their margins; there are thousands of pairs at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.arguments import PairBatch
from mopo_kernels.backends.triton.math import OPTIONS
from mopo_kernels.backends.triton.pair_loss_fwd import contiguous, label_weight, log_ratio

# Pairs that a program takes at a time, sequences, and their tokens.
BLOCK_P, BLOCK_S, BLOCK_N = 128, 16, 128


@triton.jit(
    do_not_specialize=[
        "logprob",
        "ref_logprob",
        "pairs",
        "preference",
        "objective_weight",
        "pair_weight",
        "label_rate",
        "margin",
        "length",
        "normalizer",
        "cu_seqlens",
        "g",
        "sequences",
        "pair_count",
        "objectives",
    ]
)
def pair_loss_bwd_kernel(
    logprob: tl.tensor,
    ref_logprob: tl.tensor,
    pairs: tl.tensor,
    preference: tl.tensor,
    objective_weight: tl.tensor,
    pair_weight: tl.tensor,
    label_rate: tl.tensor,
    margin: tl.tensor,
    length: tl.tensor,
    normalizer: tl.tensor,
    cu_seqlens: tl.tensor,
    g: tl.tensor,
    sequences: tl.int32,
    pair_count: tl.int32,
    objectives: tl.int32,
    tau: tl.float64,
    SIGMOID: tl.constexpr,
    HAS_PAIR_WEIGHT: tl.constexpr,
    HAS_LABEL_RATE: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``g``: (S,), or with HAS_TOKENS (N,)."""
    first_sequence = tl.program_id(0) * BLOCK_S
    s = first_sequence + tl.arange(0, BLOCK_S)
    dtype: tl.constexpr = logprob.dtype.element_ty
    temperature = tl.full((), tau, tl.float64).to(dtype)
    summed = tl.zeros((BLOCK_S,), dtype)
    mass = tl.zeros((BLOCK_P,), dtype)
    for first in range(0, pair_count, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = p < pair_count
        i = tl.load(pairs + 2 * p, mask=inside, other=-1)
        j = tl.load(pairs + 2 * p + 1, mask=inside, other=-1)
        weight = inside.to(dtype)
        if HAS_PAIR_WEIGHT:
            weight = tl.load(pair_weight + p, mask=inside, other=0.0)
        mass += weight
        own = (i >= first_sequence) & (i < first_sequence + BLOCK_S)
        own |= (j >= first_sequence) & (j < first_sequence + BLOCK_S)
        # Pairs of other programs' sequences are passed over.
        if tl.max(own.to(tl.int32), axis=0) > 0:
            h = log_ratio(logprob, ref_logprob, length, i, own, HAS_LENGTH)
            h -= log_ratio(logprob, ref_logprob, length, j, own, HAS_LENGTH)
            u = temperature * h
            if HAS_MARGIN:
                u -= tl.load(margin + p, mask=own, other=0.0)
            # Of 1 + exp(u) and 1 + exp(-u) neither loses the other's digits.
            above, below = 1.0 / (1.0 + tl.exp(-u)), 1.0 / (1.0 + tl.exp(u))
            terms = tl.zeros((BLOCK_P,), dtype)
            for k in range(objectives):
                z = tl.load(preference + p * objectives + k, mask=own, other=0.0)
                term = (1.0 - z) * above - z * below if SIGMOID else z - 0.5
                # A missing label is NaN and contributes nothing.
                terms += tl.where(z == z, term * label_weight(objective_weight, label_rate, k, HAS_LABEL_RATE), 0.0)
            slope = temperature * terms if SIGMOID else 2.0 * (h - terms / temperature)
            slope = (slope * weight)[None, :]
            parts = tl.where(i[None, :] == s[:, None], slope, 0.0) - tl.where(j[None, :] == s[:, None], slope, 0.0)
            summed += tl.sum(parts, axis=1)
    count = tl.sum(mass, axis=0)
    if HAS_NORMALIZER:
        count = tl.load(normalizer)
    # An empty batch has gradient 0.
    result = summed / tl.where(count == 0, 1.0, count)
    if HAS_LENGTH:
        result /= tl.load(length + s, mask=s < sequences, other=1.0)
    if HAS_TOKENS:
        start = tl.load(cu_seqlens + s, mask=s < sequences, other=0)
        stop = tl.load(cu_seqlens + s + 1, mask=s < sequences, other=0)
        last = tl.load(cu_seqlens + tl.minimum(first_sequence + BLOCK_S, sequences))
        for first in range(tl.load(cu_seqlens + first_sequence), last, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            its = (n[None, :] >= start[:, None]) & (n[None, :] < stop[:, None])
            tl.store(g + n, tl.sum(tl.where(its, result[:, None], 0.0), axis=0), mask=n < last)
    else:
        tl.store(g + s, result, mask=s < sequences)


def pair_loss_bwd(
    logprob: Tensor, ref_logprob: Tensor, batch: PairBatch, cu_seqlens: Tensor | None = None, tokens: int = 0
) -> Tensor:
    """:meth:`mopo_kernels.backends.base.TileBackend.pair_loss_bwd` in fp32 or fp64, (S,) -> (S,), or with
    ``cu_seqlens`` (N,) as :meth:`mopo_kernels.backends.base.TileBackend.token_grad_logprob` has it; not for "cloning",
    whose g does not depend on the log-probabilities."""
    (pair_count, objectives), sequences = batch.preference.shape, logprob.shape[0]
    g = logprob.new_empty(sequences if cu_seqlens is None else tokens)
    with torch.cuda.device_of(logprob):
        if sequences > 0:
            pair_loss_bwd_kernel[(triton.cdiv(sequences, BLOCK_S),)](
                logprob.contiguous(),
                ref_logprob.contiguous(),
                batch.pairs.contiguous(),
                batch.preference.contiguous(),
                batch.objective_weight.contiguous(),
                contiguous(batch.pair_weight),
                contiguous(batch.label_rate),
                contiguous(batch.margin),
                contiguous(batch.length),
                batch.normalizer,
                contiguous(cu_seqlens),
                g,
                sequences,
                pair_count,
                objectives,
                batch.options.tau,
                SIGMOID=batch.options.loss_type == "sigmoid",
                HAS_PAIR_WEIGHT=batch.pair_weight is not None,
                HAS_LABEL_RATE=batch.label_rate is not None,
                HAS_MARGIN=batch.margin is not None,
                HAS_LENGTH=batch.length is not None,
                HAS_NORMALIZER=batch.normalizer is not None,
                HAS_TOKENS=cu_seqlens is not None,
                BLOCK_P=BLOCK_P,
                BLOCK_S=BLOCK_S,
                BLOCK_N=BLOCK_N,
                num_warps=4,
                **OPTIONS,
            )
    return g
