"""``g = d loss / d logprob`` of every sequence, for "regression" and "sigmoid".

``pair_slope_kernel``: the derivative of every pair's loss by its margin. ``pair_loss_bwd_kernel``: one program a block
of sequences, which looks through all pairs for its own, so that the order is fixed; there are thousands of pairs at
most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels.arguments import PairBatch
from mopo_kernels.backends.triton.math import OPTIONS

# Pairs that a program takes at a time, and sequences.
BLOCK_P, BLOCK_S = 128, 16


@triton.jit
def _log_ratio(
    logprob: tl.tensor,
    ref_logprob: tl.tensor,
    length: tl.tensor,
    s: tl.tensor,
    inside: tl.tensor,
    HAS_LENGTH: tl.constexpr,
) -> tl.tensor:
    ratio = tl.load(logprob + s, mask=inside, other=0.0) - tl.load(ref_logprob + s, mask=inside, other=0.0)
    if HAS_LENGTH:
        ratio /= tl.load(length + s, mask=inside, other=1.0)
    return ratio


@triton.jit(
    do_not_specialize=[
        "logprob",
        "ref_logprob",
        "pairs",
        "preference",
        "objective_weight",
        "pair_weight",
        "margin",
        "length",
        "slope",
        "pair_count",
        "objectives",
    ]
)
def pair_slope_kernel(
    logprob: tl.tensor,
    ref_logprob: tl.tensor,
    pairs: tl.tensor,
    preference: tl.tensor,
    objective_weight: tl.tensor,
    pair_weight: tl.tensor,
    margin: tl.tensor,
    length: tl.tensor,
    slope: tl.tensor,
    pair_count: tl.int32,
    objectives: tl.int32,
    tau: tl.float64,
    SIGMOID: tl.constexpr,
    HAS_PAIR_WEIGHT: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    inside = p < pair_count
    dtype: tl.constexpr = logprob.dtype.element_ty
    temperature = tl.full((), tau, tl.float64).to(dtype)
    i = tl.load(pairs + 2 * p, mask=inside, other=0)
    j = tl.load(pairs + 2 * p + 1, mask=inside, other=0)
    h = _log_ratio(logprob, ref_logprob, length, i, inside, HAS_LENGTH)
    h -= _log_ratio(logprob, ref_logprob, length, j, inside, HAS_LENGTH)
    u = temperature * h
    if HAS_MARGIN:
        u -= tl.load(margin + p, mask=inside, other=0.0)
    # Of 1 + exp(u) and 1 + exp(-u) neither loses the other's digits.
    above, below = 1.0 / (1.0 + tl.exp(-u)), 1.0 / (1.0 + tl.exp(u))
    summed = tl.zeros((BLOCK_P,), dtype)
    for k in range(objectives):
        z = tl.load(preference + p * objectives + k, mask=inside, other=0.0)
        weight = tl.load(objective_weight + k)
        term = (1.0 - z) * above - z * below if SIGMOID else z - 0.5
        # A missing label is NaN and contributes nothing.
        summed += tl.where(z == z, term * weight, 0.0)
    result = temperature * summed if SIGMOID else 2.0 * (h - summed / temperature)
    if HAS_PAIR_WEIGHT:
        result *= tl.load(pair_weight + p, mask=inside, other=0.0)
    tl.store(slope + p, result, mask=inside)


@triton.jit(do_not_specialize=["slope", "pairs", "pair_weight", "length", "normalizer", "g", "sequences", "pair_count"])
def pair_loss_bwd_kernel(
    slope: tl.tensor,
    pairs: tl.tensor,
    pair_weight: tl.tensor,
    length: tl.tensor,
    normalizer: tl.tensor,
    g: tl.tensor,
    sequences: tl.int32,
    pair_count: tl.int32,
    HAS_PAIR_WEIGHT: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    dtype: tl.constexpr = slope.dtype.element_ty
    summed = tl.zeros((BLOCK_S,), dtype)
    mass = tl.zeros((BLOCK_P,), dtype)
    for first in range(0, pair_count, BLOCK_P):
        p = (first + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = p < pair_count
        i = tl.load(pairs + 2 * p, mask=inside, other=-1)
        j = tl.load(pairs + 2 * p + 1, mask=inside, other=-1)
        value = tl.load(slope + p, mask=inside, other=0.0)[None, :]
        own = tl.where(i[None, :] == s[:, None], value, 0.0) - tl.where(j[None, :] == s[:, None], value, 0.0)
        summed += tl.sum(own, axis=1)
        if HAS_PAIR_WEIGHT:
            mass += tl.load(pair_weight + p, mask=inside, other=0.0)
        else:
            mass += inside.to(dtype)
    count = tl.sum(mass, axis=0)
    if HAS_NORMALIZER:
        count = tl.load(normalizer)
    # An empty batch has gradient 0.
    result = summed / tl.where(count == 0, 1.0, count)
    if HAS_LENGTH:
        result /= tl.load(length + s, mask=s < sequences, other=1.0)
    tl.store(g + s, result, mask=s < sequences)


def pair_loss_bwd(logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> Tensor:
    """:meth:`mopo_kernels.backends.base.TileBackend.pair_loss_bwd` in fp32 or fp64, (S,) -> (S,); not for
    "cloning", whose g does not depend on the log-probabilities."""
    pair_count, objectives = batch.preference.shape
    sequences = logprob.shape[0]
    objective_weight = batch.objective_weight if batch.label_rate is None else batch.objective_weight / batch.label_rate
    pairs, slope, g = batch.pairs.contiguous(), logprob.new_empty(pair_count), logprob.new_empty(sequences)
    with torch.cuda.device_of(logprob):
        if pair_count > 0:
            pair_slope_kernel[(triton.cdiv(pair_count, BLOCK_P),)](
                logprob.contiguous(),
                ref_logprob.contiguous(),
                pairs,
                batch.preference.contiguous(),
                objective_weight.contiguous(),
                _contiguous(batch.pair_weight),
                _contiguous(batch.margin),
                _contiguous(batch.length),
                slope,
                pair_count,
                objectives,
                batch.options.tau,
                SIGMOID=batch.options.loss_type == "sigmoid",
                HAS_PAIR_WEIGHT=batch.pair_weight is not None,
                HAS_MARGIN=batch.margin is not None,
                HAS_LENGTH=batch.length is not None,
                BLOCK_P=BLOCK_P,
                num_warps=4,
                **OPTIONS,
            )
        if sequences > 0:
            pair_loss_bwd_kernel[(triton.cdiv(sequences, BLOCK_S),)](
                slope,
                pairs,
                _contiguous(batch.pair_weight),
                _contiguous(batch.length),
                batch.normalizer,
                g,
                sequences,
                pair_count,
                HAS_PAIR_WEIGHT=batch.pair_weight is not None,
                HAS_LENGTH=batch.length is not None,
                HAS_NORMALIZER=batch.normalizer is not None,
                BLOCK_P=BLOCK_P,
                BLOCK_S=BLOCK_S,
                num_warps=4,
                **OPTIONS,
            )
    return g


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
