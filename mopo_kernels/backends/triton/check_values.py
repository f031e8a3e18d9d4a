"""Checks the values of a call's arguments on the device: all of them in one launch, for which the host does not wait.

A program a block of elements, which are the same of every argument. One that is wrong fails a device-side assert, whose
message names the argument.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopo_kernels import checks
from mopo_kernels.arguments import CallValues
from mopo_kernels.backends.triton.math import OPTIONS, interpreted

# Elements of a program; fewer in the interpreter, where small tests cross their edges.
BLOCK = 64 if interpreted() else 1024
SMALLEST, LARGEST = tl.constexpr(checks.SMALLEST), tl.constexpr(checks.LARGEST)
_FROM_0 = f"expected a number in 0 .. {checks.LARGEST:g}"
_POSITIVE = f"expected a number in {checks.SMALLEST:g} .. {checks.LARGEST:g}"
# The kernel's tensors, in order.
ARGUMENTS = (
    "target",
    "cu_seqlens",
    "pairs",
    "preference",
    "objective_weight",
    "pair_weight",
    "label_rate",
    "margin",
    "length",
    "prompt_index",
    "normalizer",
)
# Sizes are left out: a message is compiled in.
TARGET = tl.constexpr("target: expected a number in 0 .. V - 1 or ignore_index")
FIRST_OFFSET = tl.constexpr("cu_seqlens[0]: expected 0")
LAST_OFFSET = tl.constexpr("cu_seqlens[-1]: expected N")
OFFSETS = tl.constexpr("cu_seqlens: expected offsets that do not decrease")
PAIRS = tl.constexpr("pairs: expected a number in 0 .. S - 1")
TWO = tl.constexpr("pairs: expected two different responses")
PROMPT = tl.constexpr("pairs: expected responses to one prompt, as prompt_index has it")
PREFERENCE = tl.constexpr("preference: expected a number in [0, 1] or NaN")
OBJECTIVE_WEIGHT = tl.constexpr(f"objective_weight: {_FROM_0}")
PAIR_WEIGHT = tl.constexpr(f"pair_weight: {_FROM_0}")
LABEL_RATE = tl.constexpr(f"label_rate: expected a number in {checks.SMALLEST:g} .. 1")
MARGIN = tl.constexpr(f"margin: expected a number in {-checks.LARGEST:g} .. {checks.LARGEST:g}")
LENGTH = tl.constexpr(f"length: {_POSITIVE}")
NORMALIZER = tl.constexpr(f"normalizer: expected 0 or a number in {checks.SMALLEST:g} .. {checks.LARGEST:g}")


@triton.jit
def _within(x: tl.tensor, n: tl.tensor, count: tl.int64, LOW: tl.constexpr, HIGH: tl.constexpr) -> tl.tensor:
    """Whether elements n of x lie in LOW .. HIGH; those beyond ``count`` do."""
    value = tl.load(x + n, mask=n < count, other=HIGH)
    return (value >= LOW) & (value <= HIGH)


@triton.jit(
    do_not_specialize=[
        *ARGUMENTS,
        "tokens",
        "vocabulary",
        "ignore_index",
        "sequences",
        "pair_count",
        "objectives",
    ]
)
def check_values_kernel(
    target: tl.tensor,
    cu_seqlens: tl.tensor,
    pairs: tl.tensor,
    preference: tl.tensor,
    objective_weight: tl.tensor,
    pair_weight: tl.tensor,
    label_rate: tl.tensor,
    margin: tl.tensor,
    length: tl.tensor,
    prompt_index: tl.tensor,
    normalizer: tl.tensor,
    tokens: tl.int64,
    vocabulary: tl.int64,
    ignore_index: tl.int64,
    sequences: tl.int64,
    pair_count: tl.int64,
    objectives: tl.int64,
    HAS_TARGET: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_PAIR_WEIGHT: tl.constexpr,
    HAS_LABEL_RATE: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_PROMPT_INDEX: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if HAS_TARGET:
        token = tl.load(target + n, mask=n < tokens, other=0)
        good = ((token >= 0) & (token < vocabulary)) | (token == ignore_index) | (n >= tokens)
        tl.device_assert(good, TARGET)
    if HAS_OFFSETS:
        offset = tl.load(cu_seqlens + n, mask=n <= sequences, other=0)
        after = tl.load(cu_seqlens + n + 1, mask=n < sequences, other=0)
        tl.device_assert((offset == 0) | (n != 0), FIRST_OFFSET)
        tl.device_assert((offset == tokens) | (n != sequences), LAST_OFFSET)
        tl.device_assert((after >= offset) | (n >= sequences), OFFSETS)
    if HAS_PAIRS:
        inside = n < pair_count
        i = tl.load(pairs + 2 * n, mask=inside, other=0)
        j = tl.load(pairs + 2 * n + 1, mask=inside, other=1)
        known = (i >= 0) & (i < sequences) & (j >= 0) & (j < sequences)
        tl.device_assert(known | (n >= pair_count), PAIRS)
        tl.device_assert(i != j, TWO)
        if HAS_PROMPT_INDEX:
            one = tl.load(prompt_index + i, mask=inside & known, other=0)
            other = tl.load(prompt_index + j, mask=inside & known, other=0)
            tl.device_assert(one == other, PROMPT)
        label = tl.load(preference + n, mask=n < pair_count * objectives, other=0.0)
        tl.device_assert(((label >= 0.0) & (label <= 1.0)) | (label != label), PREFERENCE)
        tl.device_assert(_within(objective_weight, n, objectives, 0.0, LARGEST), OBJECTIVE_WEIGHT)
    if HAS_PAIR_WEIGHT:
        tl.device_assert(_within(pair_weight, n, pair_count, 0.0, LARGEST), PAIR_WEIGHT)
    if HAS_LABEL_RATE:
        tl.device_assert(_within(label_rate, n, objectives, SMALLEST, 1.0), LABEL_RATE)
    if HAS_MARGIN:
        tl.device_assert(_within(margin, n, pair_count, -LARGEST, LARGEST), MARGIN)
    if HAS_LENGTH:
        tl.device_assert(_within(length, n, sequences, SMALLEST, LARGEST), LENGTH)
    if HAS_NORMALIZER:
        count = tl.load(normalizer)
        tl.device_assert((count == 0.0) | ((count >= SMALLEST) & (count <= LARGEST)), NORMALIZER)


def check_values(values: CallValues) -> None:
    """:meth:`mopo_kernels.backends.base.TileBackend.check_values` of tensors of one device; of the pairs' all but
    ``pairs`` and ``prompt_index`` in one dtype."""
    batch = values.batch
    of_pairs = {} if batch is None else {name: x for name, x in batch.keywords().items() if isinstance(x, Tensor)}
    given = {"target": values.target, "cu_seqlens": values.cu_seqlens, **of_pairs}
    present = {name: x.contiguous() for name, x in given.items() if x is not None}
    elements = max((x.numel() for x in present.values()), default=0)
    if elements == 0:
        return
    pair_count, objectives = (0, 0) if batch is None else batch.preference.shape
    with torch.cuda.device_of(next(iter(present.values()))):
        check_values_kernel[(triton.cdiv(elements, BLOCK),)](
            *map(present.get, ARGUMENTS),
            values.tokens,
            values.vocabulary,
            values.ignore_index,
            values.sequences,
            pair_count,
            objectives,
            HAS_TARGET="target" in present,
            HAS_OFFSETS="cu_seqlens" in present,
            HAS_PAIRS=batch is not None,
            HAS_PAIR_WEIGHT="pair_weight" in present,
            HAS_LABEL_RATE="label_rate" in present,
            HAS_MARGIN="margin" in present,
            HAS_LENGTH="length" in present,
            HAS_PROMPT_INDEX="prompt_index" in present,
            HAS_NORMALIZER="normalizer" in present,
            BLOCK=BLOCK,
            num_warps=4,
            # Without it asserts are left out; it would put others around every sum of integers.
            debug=True,
            sanitize_overflow=False,
            **OPTIONS,
        )
