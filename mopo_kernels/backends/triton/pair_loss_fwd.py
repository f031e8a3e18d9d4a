"""The loss of sequences' log-probabilities and what is reported beside it, for "regression" and "sigmoid", measured by
"pair" or "snis".

One program for the loss, and one for each objective's satisfaction. Each passes over all pairs, so that the order is
fixed; there are thousands of them at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels import naive
from mopo_kernels.arguments import PairBatch
from mopo_kernels.backends.triton.math import OPTIONS, interpreted

# Pairs, and sequences, that a program takes at a time; fewer in the interpreter, where small tests cross their edges.
BLOCK = 64 if interpreted() else 512
MAX_LOG_IMPORTANCE = tl.constexpr(naive.MAX_LOG_IMPORTANCE)


@triton.jit
def log_ratio(
    logprob: tl.tensor,
    ref_logprob: tl.tensor,
    length: tl.tensor,
    s: tl.tensor,
    inside: tl.tensor,
    HAS_LENGTH: tl.constexpr,
) -> tl.tensor:
    """Of sequences s, in nats, per token with lengths; 0 where they are not ``inside``."""
    policy = tl.load(logprob + s, mask=inside, other=0.0)
    reference = tl.load(ref_logprob + s, mask=inside, other=0.0)
    if HAS_LENGTH:
        tokens = tl.load(length + s, mask=inside, other=1.0)
        policy, reference = policy / tokens, reference / tokens
    return policy - reference


@triton.jit
def label_weight(
    objective_weight: tl.tensor, label_rate: tl.tensor, k: tl.int32, HAS_LABEL_RATE: tl.constexpr
) -> tl.tensor:
    """What a label of objective k counts in the loss."""
    weight = tl.load(objective_weight + k)
    if HAS_LABEL_RATE:
        weight /= tl.load(label_rate + k)
    return weight


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x in 0 .. 1: what rounding 1 + x does to the logarithm is divided out again."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


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
        "loss",
        "ratio",
        "difference",
        "satisfaction",
        "labelled",
        "sample_size",
        "sequences",
        "pair_count",
        "objectives",
    ]
)
def pair_loss_fwd_kernel(
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
    loss: tl.tensor,
    ratio: tl.tensor,
    difference: tl.tensor,
    satisfaction: tl.tensor,
    labelled: tl.tensor,
    sample_size: tl.tensor,
    sequences: tl.int32,
    pair_count: tl.int32,
    objectives: tl.int32,
    tau: tl.float64,
    tiny: tl.float64,
    SIGMOID: tl.constexpr,
    SNIS: tl.constexpr,
    HAS_PAIR_WEIGHT: tl.constexpr,
    HAS_LABEL_RATE: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    dtype: tl.constexpr = logprob.dtype.element_ty
    objective = tl.program_id(0) - 1
    lanes = tl.arange(0, BLOCK)
    temperature = tl.full((), tau, tl.float64).to(dtype)
    first_sum = tl.zeros((BLOCK,), dtype)
    second_sum = tl.zeros((BLOCK,), dtype)
    for first in range(0, pair_count, BLOCK):
        p = (first + lanes).to(tl.int64)
        inside = p < pair_count
        i = tl.load(pairs + 2 * p, mask=inside, other=0)
        j = tl.load(pairs + 2 * p + 1, mask=inside, other=0)
        r_i = log_ratio(logprob, ref_logprob, length, i, inside, HAS_LENGTH)
        r_j = log_ratio(logprob, ref_logprob, length, j, inside, HAS_LENGTH)
        h = r_i - r_j
        weight = inside.to(dtype)
        if HAS_PAIR_WEIGHT:
            weight = tl.load(pair_weight + p, mask=inside, other=0.0)
        if objective < 0:
            tl.store(difference + p, h, mask=inside)
            summed = tl.zeros((BLOCK,), dtype)
            if SIGMOID:
                u = temperature * h
                if HAS_MARGIN:
                    u -= tl.load(margin + p, mask=inside, other=0.0)
                tail = _log1p(tl.exp(-tl.abs(u)))
                above, below = tl.where(u < 0.0, u, 0.0) - tail, tl.where(u > 0.0, -u, 0.0) - tail
            for k in range(objectives):
                z = tl.load(preference + p * objectives + k, mask=inside, other=0.5)
                counts = label_weight(objective_weight, label_rate, k, HAS_LABEL_RATE)
                # A missing label is NaN and contributes nothing.
                if SIGMOID:
                    y = tl.where(z == z, z, 0.5)
                    term = (y * above + (1.0 - y) * below) * (z == z).to(dtype)
                    summed -= term * counts
                else:
                    summed += tl.where(z == z, z - 0.5, 0.0) * counts
            value = summed
            if not SIGMOID:
                value = (h - summed / temperature) * (h - summed / temperature)
            first_sum += weight * value
            second_sum += weight
        else:
            z = tl.load(preference + p * objectives + objective, mask=inside, other=0.5)
            mass = weight * (z == z).to(dtype)
            y = tl.where(z == z, z, 0.5)
            if SNIS:
                limit = tl.full((), MAX_LOG_IMPORTANCE, dtype)
                chosen = tl.exp(tl.where(r_i > limit, limit, tl.where(r_i < -limit, -limit, r_i)))
                other = tl.exp(tl.where(r_j > limit, limit, tl.where(r_j < -limit, -limit, r_j)))
            else:
                chosen = 1.0 / (1.0 + tl.exp(-h))
                other = 1.0 - chosen
            first_sum += mass * (chosen * y + other * (1.0 - y))
            second_sum += mass * (chosen + other)
    numerator, denominator = tl.sum(first_sum, axis=0), tl.sum(second_sum, axis=0)
    if objective >= 0:
        least = tl.full((), tiny, tl.float64).to(dtype)
        tl.store(satisfaction + objective, numerator / denominator)
        kept = tl.where((denominator != 0.0) & (denominator < least), least, denominator)
        tl.store(labelled + objective, kept)
        return
    if HAS_NORMALIZER:
        denominator = tl.load(normalizer)
    # An empty batch has loss 0.
    tl.store(loss, numerator / tl.where(denominator == 0.0, 1.0, denominator))

    top = tl.full((BLOCK,), -float("inf"), dtype)
    for first in range(0, sequences, BLOCK):
        s = (first + lanes).to(tl.int64)
        r = log_ratio(logprob, ref_logprob, length, s, s < sequences, HAS_LENGTH)
        tl.store(ratio + s, r, mask=s < sequences)
        top = tl.maximum(top, tl.where(s < sequences, r, -float("inf")))
    largest = tl.max(top, axis=0)
    first_sum = tl.zeros((BLOCK,), dtype)
    second_sum = tl.zeros((BLOCK,), dtype)
    for first in range(0, sequences, BLOCK):
        s = (first + lanes).to(tl.int64)
        r = log_ratio(logprob, ref_logprob, length, s, s < sequences, HAS_LENGTH)
        w = tl.where(s < sequences, tl.exp(r - largest), 0.0)
        first_sum += w
        second_sum += w * w
    summed, squares = tl.sum(first_sum, axis=0), tl.sum(second_sum, axis=0)
    tl.store(sample_size, tl.where(sequences == 0, 0.0, summed * summed / tl.where(sequences == 0, 1.0, squares)))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """As kernels that take no strides read it."""
    return None if tensor is None else tensor.contiguous()


def pair_loss_fwd(logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> naive.PairLoss:
    """:meth:`mopo_kernels.backends.base.TileBackend.pair_loss_fwd` in fp32 or fp64; not for what takes the frozen
    ratio: "cloning" and "closed_form"."""
    (pair_count, objectives), sequences = batch.preference.shape, logprob.shape[0]
    sizes: tuple[tuple[int, ...], ...] = ((), (sequences,), (pair_count,), (objectives,), (objectives,), ())
    result = naive.PairLoss(*(logprob.new_empty(size) for size in sizes))
    with torch.cuda.device_of(logprob):
        pair_loss_fwd_kernel[(1 + objectives,)](
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
            *result,
            sequences,
            pair_count,
            objectives,
            batch.options.tau,
            torch.finfo(logprob.dtype).tiny,
            SIGMOID=batch.options.loss_type == "sigmoid",
            SNIS=batch.options.estimator == "snis",
            HAS_PAIR_WEIGHT=batch.pair_weight is not None,
            HAS_LABEL_RATE=batch.label_rate is not None,
            HAS_MARGIN=batch.margin is not None,
            HAS_LENGTH=batch.length is not None,
            HAS_NORMALIZER=batch.normalizer is not None,
            BLOCK=BLOCK,
            num_warps=4,
            **OPTIONS,
        )
    return result
