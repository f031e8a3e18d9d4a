"""The C++ product of bf16 matrices with fp32 results, against fp64 and against plain fp32 products."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mopo_kernels.backends import cpp

ROOT = Path(__file__).resolve().parents[2]


def reason_to_skip() -> str | None:
    reason = cpp.unavailable_reason()
    if reason is None and not cpp.has_native_products(torch.bfloat16):
        capability = torch.backends.cpu.get_cpu_capability()
        reason = f"needs a processor with avx512_bf16 and the CPU capability AVX512; it is {capability}"
    return reason


REASON = reason_to_skip()
needs_products = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BF16, FP32 = torch.bfloat16, torch.float32
# One, a few; around the kernel's 6 rows, 16 numbers of a vector, 32 of a packed line, 64 columns of a tile; beyond two.
SIZES = (1, 2, 3, 15, 17, 31, 63, 65, 130)
# The same, and around 192 and 384, where sums are cut; odd ones are filled up with a zero.
DEPTHS = (*SIZES, 191, 383, 384, 385, 769)
# Where the stride is 1: the first letter for a, the second for b; "r" along rows, "c" along columns.
LAYOUTS = ("rr", "rc", "cr", "cc")
# The head's three products, of bf16 and of a gradient in fp32: (layout, dtype of a, accumulate).
USES = {"logits": ("rc", BF16, False), "dhidden": ("rr", FP32, True), "dweight": ("cr", FP32, True)}


def embedded(values: Tensor, layout: str, canary: float = torch.nan) -> Tensor:
    """The values inside a larger block of canaries: an odd leading dimension, an unaligned start."""
    rows, columns = values.shape if layout == "r" else values.shape[::-1]
    block = values.new_full((rows + 2, columns + 5 + columns % 2), canary)
    inside = block[1 : rows + 1, 3 : 3 + columns]
    inside = inside if layout == "r" else inside.T
    return inside.copy_(values)


def factors(m: int, n: int, k: int, layout: str, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
    a = torch.randn(m, k, generator=g).to(dtype)
    b = torch.randn(k, n, generator=g).to(BF16)
    return embedded(a, layout[0]), embedded(b, layout[1])


def added(m: int, n: int, accumulate: bool) -> Tensor | None:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m * 1009 + n)) if accumulate else None


def product(a: Tensor, b: Tensor, added_to: Tensor | None = None, scratch_bytes: int | None = None) -> Tensor:
    """What product_ leaves in the middle of a block of NaN, of which nothing else may change."""
    out = embedded(torch.full((a.shape[0], b.shape[1]), torch.nan) if added_to is None else added_to, "r")
    block = out._base
    assert block is not None
    cpp.BACKEND.product_(out, a, b, added_to is not None, scratch_bytes)
    result = out.clone()
    out.fill_(torch.nan)
    assert block.isnan().all(), "product_ wrote outside out"
    return result


class Errors(NamedTuple):
    """Of elements of products: the squares of the error against fp64, of a plain fp32 product's error, and of the size
    of the sum if its terms had random signs."""

    error: Tensor
    plain: Tensor
    size: Tensor


def errors(got: Tensor, a: Tensor, b: Tensor, added_to: Tensor | None = None) -> Errors:
    """An fp32 ``a`` counts as rounded to bf16."""
    a, b = a.to(BF16), b.to(BF16)
    start = torch.zeros_like(got) if added_to is None else added_to
    truth = start.double() + a.double() @ b.double()
    plain = torch.addmm(start, a.float(), b.float())
    size = start.double().square() + a.double().square() @ b.double().square()
    return Errors((got - truth).square().flatten(), (plain - truth).square().flatten(), size.flatten())


def check_within_budget(e: Errors, floor: float = 6.0) -> None:
    """RMS error at most 1.1 times plain fp32's, or ``floor`` machine epsilons of the sums' size where that is more: on
    few elements the plain one is exact by chance."""
    error, plain, size = (x.mean().sqrt().item() for x in e)
    allowed = max(1.1 * plain, floor * torch.finfo(FP32).eps * size)
    assert error <= allowed, f"error {error:.3g} against fp64, allowed {allowed:.3g}"


@needs_products
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_size_in_every_layout_is_as_exact_as_fp32(layout: str, dtype: torch.dtype, accumulate: bool) -> None:
    """Each product by itself, and those of one depth together, which are so many elements that chance says little."""
    for i, k in enumerate(DEPTHS):
        pool = []
        for m, n in itertools.product(SIZES[i % 2 :: 2], SIZES):
            a, b = factors(m, n, k, layout, dtype)
            added_to = added(m, n, accumulate)
            pool.append(errors(product(a, b, added_to), a, b, added_to))
            check_within_budget(pool[-1])
        check_within_budget(Errors(*(torch.cat(x) for x in zip(*pool, strict=True))), floor=0.0)


# More than a block of 1026 rows, of 1024 columns, many slabs of 384, with remainders.
@needs_products
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1031, 70, 130), (70, 1031, 130), (9, 65, 100003)], ids=["rows", "columns", "depth"]
)
@pytest.mark.parametrize("use", USES)
def test_more_than_a_block_is_as_exact_as_fp32(use: str, m: int, n: int, k: int) -> None:
    layout, dtype, accumulate = USES[use]
    a, b = factors(m, n, k, layout, dtype)
    added_to = added(m, n, accumulate)
    check_within_budget(errors(product(a, b, added_to), a, b, added_to), floor=0.0)


@needs_products
def test_sums_of_one_sign_are_as_exact_as_fp32() -> None:
    """Where nothing cancels, what is rounded away grows with the number of terms most."""
    for k in (384, 1024, 20000):
        a, b = factors(60, 64, k, "rr")
        a, b = a.abs(), b.abs()
        check_within_budget(errors(product(a, b), a, b), floor=0.0)


@needs_products
def test_the_budget_rejects_results_stored_in_bf16_and_swapped_pairs() -> None:
    """Negative control: what torch.mm offers in bf16, and a mistake in the order of k."""
    a, b = factors(130, 65, 130, "rr")
    with pytest.raises(AssertionError, match="against fp64"):
        check_within_budget(errors(torch.mm(a, b).float(), a, b))
    swapped = a.unflatten(1, (-1, 2)).flip(-1).flatten(1)
    with pytest.raises(AssertionError, match="against fp64"):
        check_within_budget(errors(product(swapped, b), a, b))


@needs_products
def test_an_empty_sum_is_zero_or_leaves_out_as_it_was() -> None:
    a, b = torch.empty(5, 0, dtype=BF16), torch.empty(0, 7, dtype=BF16)
    assert product(a, b).eq(0).all()
    before = torch.randn(5, 7)
    assert product(a, b, before).equal(before)


@needs_products
@pytest.mark.parametrize(("m", "n"), [(0, 7), (5, 0), (0, 0)])
def test_nothing_to_write_is_fine(m: int, n: int) -> None:
    a, b = torch.ones(m, 3, dtype=BF16), torch.ones(3, n, dtype=BF16)
    cpp.BACKEND.product_(torch.empty(m, n), a, b, False)


@needs_products
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_rounds_to_the_nearest_bf16_ties_to_even(layout: str) -> None:
    unit = 2.0**-7
    # Between 1 and 1 + unit and beyond: a tie to below, a tie to above, just above and below a tie, too large for bf16.
    a = torch.tensor([[1 + unit / 2, 1 + 3 * unit / 2, 1 + unit * 0.51, 1 + unit * 0.49, 3.4e38, -3.4e38]])
    a = embedded(a.tile(2, 1), layout[0])
    b = embedded(torch.eye(6).to(BF16), layout[1])
    want = [1.0, 1 + 2 * unit, 1 + unit, 1.0, torch.inf, -torch.inf]
    assert a[0].to(BF16).tolist() == want
    for column, value in enumerate(want):
        # One at a time: infinity times 0 is NaN.
        single = torch.zeros_like(a)
        single[:, column] = a[:, column]
        assert product(embedded(single, layout[0]), b)[:, column].tolist() == [value, value]


@needs_products
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_reach_their_rows_and_columns_only(layout: str, dtype: torch.dtype) -> None:
    a, b = factors(20, 70, 401, layout, dtype)
    a.abs_()
    b.abs_()
    # In the last k, which is odd, beside the zero it is filled up with; in both slabs; NaN whose bits end in zeros.
    a[3, 400], a[7, 5], a[11, 390] = torch.nan, torch.inf, -torch.inf
    b[399, 13], b[400, 69] = torch.nan, torch.inf
    got, want = product(a, b), a.to(BF16).double() @ b.double()
    assert got.isnan().equal(want.isnan())
    assert got.isinf().equal(want.isinf())
    infinite = want.isinf()
    assert got[infinite].double().equal(want[infinite])
    finite = want.isfinite()
    torch.testing.assert_close(got[finite].double(), want[finite], rtol=1e-5, atol=0.0)


@needs_products
def test_a_nan_of_any_bits_stays_nan_when_it_is_rounded() -> None:
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int64).to(torch.int32)
    a = bits.view(FP32)[:, None]
    assert a.isnan().all()
    assert product(a.repeat(1, 3), torch.ones(3, 5, dtype=BF16)).isnan().all()


@needs_products
@pytest.mark.parametrize("use", USES)
def test_results_are_bitwise_the_same_on_one_and_on_more_threads(use: str) -> None:
    layout, dtype, accumulate = USES[use]
    before = torch.get_num_threads()
    try:
        for m, n, k in ((130, 700, 1000), (1031, 130, 385), (7, 1100, 2001)):
            a, b = factors(m, n, k, layout, dtype)
            added_to = added(m, n, accumulate)
            torch.set_num_threads(1)
            once = product(a, b, added_to)
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                assert product(a, b, added_to).equal(once), f"{threads} threads, {(m, n, k)}"
    finally:
        torch.set_num_threads(before)


@needs_products
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_working_memory_keeps_its_bound_and_changes_no_bit(use: str, threads: int) -> None:
    layout, dtype, accumulate = USES[use]
    a, b = factors(300, 700, 1000, layout, dtype)
    into = added(300, 700, accumulate)
    want = product(a, b, into)
    out = want.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for scratch in (cpp.LEAST_PRODUCT_SCRATCH_BYTES, 100_000, 200_000, 500_000, 1_000_000, None):
            assert product(a, b, into, scratch).equal(want), scratch
            with torch.profiler.profile(profile_memory=True) as profile:
                cpp.BACKEND.product_(out, a, b, accumulate, scratch)
            events = profile.profiler.kineto_results.events()
            taken = sum(max(0, e.nbytes()) for e in events if e.name() == "[memory]")
            bound = threads * cpp.PRODUCT_SCRATCH_BYTES if scratch is None else scratch
            assert 0 < taken <= bound, scratch
    finally:
        torch.set_num_threads(before)


@needs_products
def test_too_little_working_memory_is_an_error() -> None:
    a, b = factors(8, 9, 1000, "rr")
    # Slabs of 334, in whole vectors 352.
    with pytest.raises(
        ValueError, match=r"scratch_bytes: expected at least 49280 for a of shape \[8, 1000\]; got 49279"
    ):
        product(a, b, scratch_bytes=49279)
    check_within_budget(errors(product(a, b, scratch_bytes=49280), a, b))


@needs_products
def test_an_element_does_not_depend_on_the_matrix_around_it() -> None:
    """So that a chunk of rows, or a tile of columns, gives what the whole would give."""
    a, b = factors(100, 200, 777, "rc")
    whole = product(a, b)
    assert product(a[37:41], b[:, 99:164]).equal(whole[37:41, 99:164])


@needs_products
def test_any_stride_does_where_there_is_one_row_or_column() -> None:
    a, b = factors(130, 70, 65, "rr")
    for x, y in ((a[::130], b), (a, b[:, ::70]), (a[:, ::65], b[::65]), (a[::130], b[:, ::70])):
        check_within_budget(errors(product(x, y), x, y))


@needs_products
def test_expanded_factors_are_read_as_they_stand() -> None:
    a, b = factors(1, 1, 33, "rr")
    x, y = a.expand(9, 33), b.expand(33, 20)
    # Columns of y have stride 0 and rows an odd one: no stride is 1.
    with pytest.raises(ValueError, match="b: expected stride 1 in one dimension"):
        product(x, y)
    y = y.contiguous()
    check_within_budget(errors(product(x, y), x, y))


def mistakes() -> dict[str, tuple[tuple[Tensor, Tensor, Tensor], str]]:
    out, a, b = torch.zeros(4, 6), torch.zeros(4, 5, dtype=BF16), torch.zeros(5, 6, dtype=BF16)
    rows = torch.zeros(1, 6).expand(4, 6)
    return {
        "out_dtype": ((out.to(BF16), a, b), r"out: expected a float32 matrix; got shape \[4, 6\] and dtype BFloat16"),
        "out_dim": ((out[0], a, b), r"out: expected a float32 matrix; got shape \[6\]"),
        "out_column_stride": ((torch.zeros(6, 4).T, a, b), r"out: expected column stride 1.*strides \[1, 4\]"),
        "out_rows_overlap": ((rows, a, b), r"rows that do not overlap; got shape \[4, 6\], strides \[0, 1\]"),
        "a_dtype": ((out, a.to(torch.float16), b), "a: expected bfloat16 or float32; got Half"),
        "a_dim": ((out, a[0], b), r"a: expected a matrix on cpu; got shape \[5\]"),
        "a_strides": ((out, torch.zeros(8, 10, dtype=BF16)[::2, ::2], b), r"a: expected stride 1.*strides \[20, 2\]"),
        "a_device": ((out, a.to("meta"), b), r"a: expected a matrix on cpu; got shape \[4, 5\] on meta"),
        "b_dtype": ((out, a, b.float()), "b: expected bfloat16; got Float"),
        "b_strides": ((out, a, torch.zeros(10, 12, dtype=BF16)[::2, ::2]), r"b: expected stride 1.*strides \[24, 2\]"),
        "depth": (
            (out, a[:, :3], b),
            r"expected shapes \(M, N\), \(M, K\), \(K, N\); got \[4, 6\], \[4, 3\], \[5, 6\]",
        ),
        "rows": ((out[:3], a, b), r"got \[3, 6\], \[4, 5\], \[5, 6\]"),
        "columns": ((out, a, b[:, :2]), r"got \[4, 6\], \[4, 5\], \[5, 2\]"),
    }


@needs_products
@pytest.mark.parametrize("name", mistakes())
def test_mistakes_are_named_with_what_came(name: str) -> None:
    arguments, message = mistakes()[name]
    # A tensor on another device never reaches the CPU's product.
    error = NotImplementedError if name == "a_device" else ValueError
    with pytest.raises(error, match=None if name == "a_device" else message):
        cpp.BACKEND.product_(*arguments, False)


@needs_products
def test_out_may_not_share_memory_with_a_factor() -> None:
    out = torch.zeros(8, 8)
    with pytest.raises(RuntimeError, match="written-to tensor refer"):
        cpp.BACKEND.product_(out, out, torch.zeros(8, 8, dtype=BF16), False)


@pytest.mark.skipif(cpp.unavailable_reason() is not None, reason=str(cpp.unavailable_reason()))
def test_products_follow_the_cpu_capability_and_say_so() -> None:
    script = (
        "import torch\n"
        "from mopo_kernels.backends import cpp\n"
        "assert cpp.unavailable_reason() is None\n"
        "print([cpp.has_native_products(d) for d in (torch.bfloat16, torch.float16, torch.float32)])\n"
        "try:\n"
        "    cpp.BACKEND.product_(torch.ones(1, 1), *[torch.ones(1, 1, dtype=torch.bfloat16)] * 2, False)\n"
        "except NotImplementedError as error:\n"
        "    print(str(error).splitlines()[0])\n"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    answers, message = done.stdout.splitlines()
    assert answers == "[False, False, False]"
    assert message.startswith("product_ needs a processor with avx512_bf16 and a CPU capability of AVX512; it is ")


@needs_products
def test_only_bf16_has_native_products() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [cpp.has_native_products(d) for d in dtypes] == [True, False, False, False]
