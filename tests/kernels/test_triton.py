"""Triton kernels against plain PyTorch in fp64: on a GPU where there is one, else in Triton's interpreter.

Error is held as a budget: at most 1.1 times that of plain PyTorch in the same dtype.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mopo_kernels import linear_logprob, naive
from mopo_kernels.arguments import CallValues, LogitTransform, LossOptions, PairBatch
from mopo_kernels.backends.base import NOT_SCORED
from mopo_kernels.backends.triton import unavailable_reason

pytest.importorskip("triton")
from mopo_kernels.backends.triton.backend import TritonBackend

ROOT = Path(__file__).resolve().parents[2]
REASON = unavailable_reason()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"triton: {REASON}"),
    # numpy's, in the interpreter, for infinities and NaN that are meant.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = TritonBackend()
START = 1000
# In the interpreter a block of the product is 32 rows x 64 columns x 32 components. Empty, one, a few, more than a
# block; columns and components below, at and beyond a block; 208 columns end within a block, but at a multiple of 16.
ROWS = (0, 1, 3, 33)
COLUMNS = (1, 7, 64, 130, 208, 507)
HIDDEN = (1, 5, 64, 67)
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
FULL = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float64, id="fp64")]
HALF = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """In the interpreter a row of a small tile is several blocks, as a row of a vocabulary is on a GPU."""
    if DEVICE.type == "cpu" and REASON is None:
        from mopo_kernels.backends.triton import logits_bwd, lse_fwd

        for module in (lse_fwd, logits_bwd):
            table = {dtype: c._replace(block=request.param) for dtype, c in module.CONFIGURATIONS.items()}
            monkeypatch.setattr(module, "CONFIGURATIONS", table)


def in_blocks(columns: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("small_blocks", [columns], indirect=True, ids=[""])


# Elements to the left of a matrix: with 8 its rows start at multiples of 16 bytes, and large blocks are used.
MARGINS = [pytest.param(8, id="aligned"), pytest.param(3, id="unaligned")]


def surrounded(x: Tensor, margin: int, around: float = torch.nan) -> Tensor:
    """The same matrix inside a larger block: a row stride beyond its columns, and a value that shows what is read."""
    rows, columns = x.shape
    stride = -(-(margin + columns + 1) // margin) * margin
    block = torch.full((rows + 2, stride), around, dtype=x.dtype, device=DEVICE)
    part = block[1 : rows + 1, margin : margin + columns]
    part.copy_(x)
    return part


class Case(NamedTuple):
    """``tile`` are the products, or ``hidden`` and ``weight`` their factors."""

    margin: int
    target: Tensor
    bias: Tensor | None
    grad_logprob: Tensor
    tile: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None

    def products(self, dtype: torch.dtype) -> Tensor:
        if self.tile is not None:
            return self.tile.to(dtype)
        assert self.hidden is not None
        assert self.weight is not None
        return self.hidden.to(dtype) @ self.weight.to(dtype).T

    @property
    def columns(self) -> int:
        return self.products(torch.float64).shape[1]


def make_case(
    rows: int,
    columns: int,
    bias: bool,
    dtype: torch.dtype,
    hidden_size: int = 0,
    spread: float = 3.0,
    margin: int = 8,
) -> Case:
    """Logits of about the given standard deviation; targets in the tile, below it, above it, and none."""
    g = torch.Generator().manual_seed(1000 * rows + columns + hidden_size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    target = START + torch.randint(0, columns, (rows,), generator=g)
    target[1::4] = START - 1
    target[2::4] = START + columns
    target[3::8] = NOT_SCORED
    target[11::16] = -100  # as ignore_index has it
    real = dtype if dtype == torch.float64 else torch.float32
    b = normal(columns).to(real).to(DEVICE) if bias else None
    common = margin, target.to(DEVICE), b, normal(rows).to(real).to(DEVICE)
    if hidden_size == 0:
        return Case(*common, tile=surrounded((spread * normal(rows, columns)).to(dtype), margin))
    hidden, weight = normal(rows, hidden_size), spread * normal(columns, hidden_size) / hidden_size**0.5
    return Case(*common, hidden=surrounded(hidden.to(dtype), margin), weight=surrounded(weight.to(dtype), margin))


def logits(x: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    z = (x if bias is None else x + bias.to(x.dtype)) * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


class Answer(NamedTuple):
    """A target outside the tile has logprob 0 and no one-hot; a row that is not scored is 0 throughout."""

    logsumexp: Tensor
    logprob: Tensor
    gradient: Tensor


def plain(case: Case, transform: LogitTransform, dtype: torch.dtype) -> Answer:
    """What plain PyTorch answers in ``dtype``; log-probabilities of half precision logits in fp32, as everywhere."""
    x = case.products(dtype).detach().requires_grad_()
    column = case.target - START
    scored = case.target >= 0
    within = (column >= 0) & (column < x.shape[1])
    at = column.clamp(0, x.shape[1] - 1)[:, None]
    z = logits(x, case.bias, transform)
    wide = z.detach().to(torch.promote_types(dtype, torch.float32))
    logprob = torch.log_softmax(wide, dim=1)
    onehot = torch.zeros_like(logprob).scatter(1, at, within[:, None].to(wide.dtype))
    row = (onehot - logprob.exp()) * case.grad_logprob.to(wide.dtype)[:, None]
    (gradient,) = torch.autograd.grad(z, x, row.to(dtype))
    return Answer(
        torch.logsumexp(wide, dim=1).where(scored, 0.0),
        logprob.gather(1, at)[:, 0].where(within & scored, 0.0),
        gradient.where(scored[:, None], 0.0),
    )


class Statistics(NamedTuple):
    row_max: Tensor
    sum_exp: Tensor
    target_logit: Tensor

    @staticmethod
    def empty(rows: int, dtype: torch.dtype) -> Statistics:
        return Statistics(*(torch.full((rows,), v, dtype=dtype, device=DEVICE) for v in (-torch.inf, 0.0, 0.0)))

    def finished(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and log-sum-exp as of rows that are all scored."""
        logprob = torch.full_like(self.row_max, torch.nan)
        logsumexp = torch.full_like(self.row_max, torch.nan, dtype=torch.float64)
        BACKEND.row_statistics(*self, torch.zeros_like(self.row_max, dtype=torch.int64), logprob, logsumexp)
        return logprob, logsumexp

    def logsumexp(self) -> Tensor:
        return self.finished()[1]

    def logprob(self) -> Tensor:
        return self.finished()[0]


def pieces(case: Case, cuts: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor | None]]:
    for a, b in itertools.pairwise((0, *cuts, case.columns)):
        yield a, b, None if case.bias is None else case.bias[a:b]


def lse_fwd(
    case: Case, transform: LogitTransform, cuts: tuple[int, ...] = (), backend: TritonBackend = BACKEND
) -> Statistics:
    """The statistics of a case of either kind, nothing stored."""
    statistics = Statistics.empty(case.target.shape[0], case.grad_logprob.dtype)
    if case.hidden is not None and backend.row_offsets(case.hidden.dtype):
        assert case.weight is not None
        row_offset = backend.row_offset(case.hidden, case.weight, case.bias, case.target, START, transform)
        statistics = Statistics(*row_offset)
    for a, b, bias in pieces(case, cuts):
        at = bias, case.target, START + a, transform, *statistics
        if case.tile is not None:
            backend.lse_fwd(case.tile[:, a:b], *at)
        else:
            assert case.hidden is not None
            assert case.weight is not None
            backend.linear_lse_fwd(case.hidden, case.weight[a:b], *at)
    return statistics


def answer(
    case: Case, transform: LogitTransform, cuts: tuple[int, ...] = (), backend: TritonBackend = BACKEND
) -> Answer:
    """The kernels' answers, combined as the head combines them; leaves the case as it was."""
    gradient, statistics = (tiles if case.tile is not None else exp_logits)(case, transform, cuts, backend)
    column = case.target - START
    within = (column >= 0) & (column < case.columns) & (case.target >= 0)
    return Answer(
        statistics.logsumexp().where(case.target >= 0, 0.0), statistics.logprob().where(within, 0.0), gradient
    )


def tiles(
    case: Case, transform: LogitTransform, cuts: tuple[int, ...], backend: TritonBackend
) -> tuple[Tensor, Statistics]:
    assert case.tile is not None
    statistics, gradient = lse_fwd(case, transform, cuts, backend), surrounded(case.tile, case.margin)
    lse = statistics.logsumexp()
    for a, b, bias in pieces(case, cuts):
        backend.logits_bwd_(gradient[:, a:b], bias, case.target, START + a, transform, lse, case.grad_logprob)
    return gradient, statistics


def exp_logits(
    case: Case, transform: LogitTransform, cuts: tuple[int, ...], backend: TritonBackend
) -> tuple[Tensor, Statistics]:
    assert case.hidden is not None
    assert case.weight is not None
    rows = case.hidden.shape[0]
    gradient = surrounded(torch.full((rows, case.columns), torch.nan, dtype=case.hidden.dtype), case.margin)
    if backend.row_offsets(case.hidden.dtype):
        return with_row_offsets(case, transform, cuts, backend, gradient)
    statistics, offsets = Statistics.empty(rows, torch.float32), {}
    for a, b, bias in pieces(case, cuts):
        offsets[a] = torch.full((backend.offset_blocks(b - a), rows), torch.nan, device=DEVICE)
        at = bias, case.target, START + a, transform, *statistics
        backend.linear_lse_fwd(case.hidden, case.weight[a:b], *at, gradient[:, a:b], offsets[a])
    folded = statistics.logsumexp(), statistics.logprob(), case.grad_logprob
    for a, b, _ in pieces(case, cuts):
        backend.exp_logits_bwd_(gradient[:, a:b], offsets[a], case.target, START + a, transform, *folded)
    return gradient, statistics


def with_row_offsets(
    case: Case, transform: LogitTransform, cuts: tuple[int, ...], backend: TritonBackend, tile: Tensor
) -> tuple[Tensor, Statistics]:
    """As the head does it where the vocabulary is tiled: products once for the log-sum-exp and once more after it."""
    assert case.hidden is not None
    assert case.weight is not None
    statistics = lse_fwd(case, transform, cuts, backend)
    lse, lp = statistics.logsumexp(), statistics.logprob()
    offset, factors = statistics.row_max, torch.empty_like(statistics.row_max)
    if cuts:
        offset = lse.float()
    gradient = torch.empty(*tile.shape, device=DEVICE)
    for a, b, bias in pieces(case, cuts):
        if cuts or a == 0:
            again = Statistics(offset.clone(), *Statistics.empty(len(offset), torch.float32)[1:])
            backend.linear_lse_fwd(
                case.hidden, case.weight[a:b], bias, case.target, START + a, transform, *again, tile[:, a:b]
            )
        factors.fill_(torch.nan)
        backend.mark_target_(tile[:, a:b], case.target, START + a, transform, offset, lse, lp, factors)
        gradient[:, a:b] = tile[:, a:b].float() * (factors * case.grad_logprob)[:, None]
    return gradient, statistics


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def check_within_budget(got: Answer, case: Case, transform: LogitTransform, dtype: torch.dtype, floor: float) -> None:
    """RMS error at most 1.1 times plain PyTorch's, or ``floor`` machine epsilons of the truth's size where that is
    more: on few elements plain PyTorch is exact by chance, in fp64 it is the truth itself."""
    truth, budget = plain(case, transform, torch.float64), plain(case, transform, dtype)
    for name in Answer._fields:
        exact = getattr(truth, name)
        error, allowed = rms(getattr(got, name) - exact), 1.1 * rms(getattr(budget, name).double() - exact)
        allowed = max(allowed, floor * torch.finfo(dtype).eps * rms(exact))
        assert error <= allowed, f"{name}: error {error:.3g} against fp64, allowed {allowed:.3g}"


def grid(*sizes: tuple[int, ...]) -> Any:
    return [pytest.param(*p, id="x".join(map(str, p))) for p in itertools.product(*sizes)]


@in_blocks(256)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize(("rows", "columns"), grid(ROWS, COLUMNS))
def test_tiles_match_fp64_in_every_shape(rows: int, columns: int, dtype: torch.dtype) -> None:
    case = make_case(rows, columns, bias=True, dtype=dtype)
    check_within_budget(answer(case, EVERYTHING), case, EVERYTHING, dtype, floor=3.0)


@pytest.mark.parametrize(("rows", "columns", "hidden_size"), grid(ROWS, COLUMNS, HIDDEN))
def test_exponentials_match_fp64_in_every_shape(rows: int, columns: int, hidden_size: int) -> None:
    case = make_case(rows, columns, bias=True, dtype=torch.bfloat16, hidden_size=hidden_size)
    check_within_budget(answer(case, EVERYTHING), case, EVERYTHING, torch.bfloat16, floor=1.0)


# So many elements are enough for a fair comparison; half an epsilon is what rounding the exact answer costs.


@pytest.mark.parametrize(("transform", "bias"), HEADS)
def test_error_of_tiles_is_within_plain_pytorchs_for_every_head(transform: LogitTransform, bias: bool) -> None:
    case = make_case(130, 4099, bias, torch.float32)
    check_within_budget(answer(case, transform), case, transform, torch.float32, floor=0.5)


@pytest.mark.parametrize(("dtype", "margin"), [(torch.bfloat16, 3), (torch.float16, 8)], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("transform", "bias"), HEADS)
def test_error_of_exponentials_is_within_plain_pytorchs_for_every_head(
    transform: LogitTransform, bias: bool, dtype: torch.dtype, margin: int
) -> None:
    case = make_case(200, 507, bias, dtype, hidden_size=67, margin=margin)
    check_within_budget(answer(case, transform), case, transform, dtype, floor=0.5)


def check_near_fp32(logprob: Tensor, case: Case, transform: LogitTransform) -> None:
    truth, fp32 = plain(case, transform, torch.float64).logprob, plain(case, transform, torch.float32).logprob
    error, allowed = rms(logprob - truth), 2.0 * rms(fp32 - truth)
    assert error <= allowed, f"logprob: error {error:.3g} against fp64, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("transform", "bias"), HEADS)
def test_logprobs_of_half_precision_are_nearly_those_of_fp32_products(
    transform: LogitTransform, bias: bool, dtype: torch.dtype
) -> None:
    case = make_case(200, 507, bias, dtype, hidden_size=67)
    check_near_fp32(answer(case, transform).logprob, case, transform)


@in_blocks(256)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("hidden_size", [0, 67], ids=["tile", "exp_logits"])
def test_tiles_in_sequence_are_one_wide_tile(hidden_size: int) -> None:
    dtype = torch.bfloat16 if hidden_size else torch.float32
    case = make_case(13, 507, True, dtype, hidden_size)
    # A single column, a ragged few, and a boundary inside a block.
    got = answer(case, EVERYTHING, cuts=(1, 66, 300))
    check_within_budget(got, case, EVERYTHING, dtype, floor=0.5)


@in_blocks(256)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("hidden_size", [0, 67], ids=["tile", "exp_logits"])
def test_two_runs_are_bitwise_equal_and_storing_changes_nothing(hidden_size: int) -> None:
    case = make_case(9, 507, True, torch.bfloat16 if hidden_size else torch.float32, hidden_size)
    first, second = answer(case, EVERYTHING), answer(case, EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(lse_fwd(case, EVERYTHING).logsumexp().where(case.target >= 0, 0.0), first.logsumexp)


@pytest.mark.parametrize("hidden_size", [0, 67], ids=["tile", "exp_logits"])
def test_huge_logits_stay_finite_and_exact(hidden_size: int) -> None:
    dtype = torch.bfloat16 if hidden_size else torch.float32
    case = make_case(33, 130, False, dtype, hidden_size, spread=1e4)
    got = answer(case, PLAIN)
    assert all(torch.isfinite(part).all() for part in got)
    check_within_budget(got, case, PLAIN, dtype, floor=0.5)
    capped = answer(case, LogitTransform(30.0))
    assert all(torch.isfinite(part).all() for part in capped)


@in_blocks(64)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("hidden_size", [0, 5], ids=["tile", "exp_logits"])
def test_logits_of_minus_infinity_have_probability_zero(hidden_size: int) -> None:
    dtype = torch.bfloat16 if hidden_size else torch.float32
    case = make_case(33, 130, True, dtype, hidden_size)
    assert case.bias is not None
    case.bias[:70] = -torch.inf  # a whole block and the beginning of the next
    case = case._replace(target=case.target.where(case.target >= START + 70, START + 100))
    check_within_budget(answer(case, PLAIN), case, PLAIN, dtype, floor=3.0)
    check_within_budget(answer(case, PLAIN, cuts=(65,)), case, PLAIN, dtype, floor=3.0)
    row_max, sum_exp, _ = lse_fwd(case._replace(bias=torch.full_like(case.bias, -torch.inf)), PLAIN)
    assert (row_max == -torch.inf).all()
    assert (sum_exp == 0).all()


@pytest.mark.parametrize("hidden_size", [0, 5], ids=["tile", "exp_logits"])
def test_a_nan_logit_is_not_lost(hidden_size: int) -> None:
    case = make_case(3, 70, False, torch.bfloat16 if hidden_size else torch.float32, hidden_size)
    case = case._replace(target=torch.full_like(case.target, START))
    before = answer(case, PLAIN)
    (case.hidden if hidden_size else case.tile)[1, -1] = torch.nan  # type: ignore[index]
    assert lse_fwd(case, PLAIN).sum_exp.isnan().tolist() == [False, True, False]
    after = answer(case, PLAIN)
    assert after.gradient[1].isnan().any()
    for row in (0, 2):
        assert all(torch.equal(a[row], b[row]) for a, b in zip(before, after, strict=True))


def test_rows_not_scored_are_exact_zeros_whatever_the_tile_holds() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tile, target = torch.full((33, 70), torch.nan), torch.full((33,), NOT_SCORED)
        tile[5], target[5] = 0.25, START
        got, target, nan = surrounded(tile.to(dtype), 8), target.to(DEVICE), torch.full((33,), torch.nan, device=DEVICE)
        lse = nan.double().index_fill(0, torch.tensor(5, device=DEVICE), 9.0)
        if dtype == torch.bfloat16:
            offsets = torch.zeros(BACKEND.offset_blocks(70), 33, device=DEVICE)
            BACKEND.exp_logits_bwd_(got, offsets, target, START, EVERYTHING, lse, 0.5 - lse.float(), None)
        else:
            BACKEND.logits_bwd_(got, None, target, START, EVERYTHING, lse, None)
        assert torch.isfinite(got).all()
        assert (got[5] != 0).all()
        assert (got != 0).any(dim=1).nonzero().tolist() == [[5]]


def test_a_block_without_a_scored_row_leaves_finite_statistics_and_no_picked() -> None:
    case = make_case(70, 130, False, torch.bfloat16, hidden_size=5)
    assert case.hidden is not None
    case.hidden.fill_(torch.nan)
    case.hidden[64:] = 1.0
    target = torch.full_like(case.target, NOT_SCORED)
    target[65] = START  # in the last block of rows, with rows beside it that are not scored
    got, statistics = exp_logits(case._replace(target=target), EVERYTHING, (), BACKEND)
    assert all(torch.isfinite(part).all() for part in statistics)
    assert (statistics.target_logit != 0).nonzero().tolist() == [[65]]
    assert torch.isfinite(got).all()
    assert (got != 0).any(dim=1).nonzero().tolist() == [[65]]


def test_a_confident_targets_gradient_keeps_its_digits() -> None:
    # 63 other logits of 0 and one of 20: 1 - p is 1.3e-7, about an epsilon of fp32.
    z = torch.zeros(1, 64, dtype=torch.float64)
    z[0, 7] = 20.0
    lse, target = torch.logsumexp(z, 1).to(DEVICE), torch.tensor([START + 7], device=DEVICE)
    exact = -torch.expm1(20.0 - lse).item()
    tile = z.float().to(DEVICE)
    BACKEND.logits_bwd_(tile, None, target, START, PLAIN, lse, None)
    assert tile[0, 7].item() == pytest.approx(exact, rel=1e-5)
    offsets = torch.full((BACKEND.offset_blocks(64), 1), 20.0, device=DEVICE)
    tile = torch.exp(z - 20.0).bfloat16().to(DEVICE)
    BACKEND.exp_logits_bwd_(tile, offsets, target, START, PLAIN, lse, (20.0 - lse).float(), None)
    assert tile[0, 7].item() == pytest.approx(exact, rel=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["tile", "exp_logits"])
def test_no_coefficient_stands_for_one(dtype: torch.dtype) -> None:
    target, lse = torch.tensor([START, START + 1, START + 2], device=DEVICE), torch.full((3,), 9.0, device=DEVICE)
    results = []
    for grad_logprob in (None, torch.ones(3, device=DEVICE)):
        tile = torch.linspace(0, 1, 3 * 70).view(3, 70).to(dtype).to(DEVICE)
        if dtype == torch.float32:
            BACKEND.logits_bwd_(tile, None, target, START, PLAIN, lse.double(), grad_logprob)
        else:
            offsets = torch.zeros(BACKEND.offset_blocks(70), 3, device=DEVICE)
            BACKEND.exp_logits_bwd_(tile, offsets, target, START, PLAIN, lse.double(), -lse, grad_logprob)
        results.append(tile)
    assert torch.equal(*results)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@in_blocks(64)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("columns", [70, 80])
@pytest.mark.parametrize("hidden_size", [0, 67], ids=["tile", "exp_logits"])
def test_nothing_outside_the_arguments_is_read_or_written(hidden_size: int, columns: int, margin: int) -> None:
    rows, dtype = 5, torch.bfloat16 if hidden_size else torch.float32
    case, results = make_case(rows, columns, True, dtype, hidden_size), []
    # NaN shows what is read, a number what is overwritten by something computed from it.
    for around in (torch.nan, 7.0):

        def vector(x: Tensor, around: float = around) -> Tensor:
            value = around if x.is_floating_point() else START  # a column of the tile
            block = torch.full((x.shape[0] + 4,), value, dtype=x.dtype, device=DEVICE)
            block[1:-3] = x
            return block[1:-3]

        products = case.tile if case.tile is not None else torch.ones(rows, columns, dtype=dtype)
        matrix = surrounded(products, margin, around)
        factors = [surrounded(x, margin, around) for x in (case.hidden, case.weight) if x is not None]
        assert case.bias is not None
        bias, target, grad_logprob = vector(case.bias), vector(case.target), vector(case.grad_logprob)
        statistics = [vector(x) for x in Statistics.empty(rows, torch.float32)]
        lse, logprob = vector(torch.full((rows,), 9.0, dtype=torch.float64)), vector(torch.full((rows,), -9.0))
        offsets = vector(torch.zeros(BACKEND.offset_blocks(columns) * rows))
        arguments = [matrix, *factors, bias, target, grad_logprob, *statistics, lse, logprob, offsets]
        blocks = [x._base if x._base is not None else x for x in arguments]
        before = [block.clone() for block in blocks]
        at = bias, target, START, EVERYTHING
        if hidden_size:
            blocked = offsets.view(-1, rows)
            BACKEND.linear_lse_fwd(*factors, *at, *statistics, matrix, blocked)
            BACKEND.exp_logits_bwd_(matrix, blocked, target, START, EVERYTHING, lse, logprob, grad_logprob)
        else:
            BACKEND.lse_fwd(matrix, *at, *statistics)
            assert torch.equal(bits(blocks[0]), bits(before[0])), "fold changed the tile"
            BACKEND.logits_bwd_(matrix, *at, lse, grad_logprob)
        for block, old, argument in zip(blocks, before, arguments, strict=True):
            offset = argument.storage_offset()
            old.as_strided(argument.shape, argument.stride(), offset).copy_(argument)
            assert torch.equal(bits(block), bits(old)), "something outside an argument was written"
        results.append([matrix, *statistics])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_of_another_layout_are_refused() -> None:
    case = make_case(3, 130, False, torch.float16, hidden_size=5)
    blocks = BACKEND.offset_blocks(130)
    tile, offsets = torch.zeros(3, 130, dtype=torch.float16, device=DEVICE), torch.zeros(blocks + 1, 3, device=DEVICE)
    at, statistics = (None, case.target, START, PLAIN), Statistics.empty(3, torch.float32)
    message = rf"offsets: expected shape \(blocks, R\) = \({blocks}, 3\); got \({blocks + 1}, 3\)"
    with pytest.raises(ValueError, match=message):
        BACKEND.linear_lse_fwd(case.hidden, case.weight, *at, *statistics, tile, offsets)
    with pytest.raises(ValueError, match=message):
        BACKEND.exp_logits_bwd_(
            tile, offsets, case.target, START, PLAIN, torch.zeros(3), torch.zeros(3), case.grad_logprob
        )
    with pytest.raises(ValueError, match="offsets: expected a tensor with exponentials, and only then; got None"):
        BACKEND.linear_lse_fwd(case.hidden, case.weight, *at, *statistics, tile)


def test_statistics_take_no_more_room_than_is_set_aside_for_them() -> None:
    from mopo_kernels.backends.triton.linear_lse_fwd import CONFIGURATIONS, OTHER
    from mopo_kernels.fused.buffer_plan import STATISTICS_BYTES

    for configuration in (*CONFIGURATIONS.values(), OTHER):
        assert 2 * 4 / configuration.block_v <= STATISTICS_BYTES


# One offset a row.


FAR = slice(0, 8)
SURE = slice(8, 16)
BESIDE = slice(16, 24)
NEVER = slice(24, 32)


def far_case(spread: float) -> Case:
    """Rows whose target lies ``spread`` nats below the others, as far above them, below another one that far above,
    or has probability 0; then rows like any other, some of them not scored."""
    case = make_case(40, 130, True, torch.bfloat16, hidden_size=64)
    assert case.bias is not None
    assert case.hidden is not None
    assert case.weight is not None
    target = START + torch.arange(40, device=DEVICE) % 90
    for rows, column, bias in ((FAR, 100, -spread), (SURE, 101, 0.0), (NEVER, 102, -torch.inf)):
        target[rows] = START + column
        case.bias[column] = bias
    case.hidden[:, 0] = 0.0
    case.weight[:, 0] = 0.0
    case.weight[101, 0] = 1.0
    case.hidden[SURE, 0] = case.hidden[BESIDE, 0] = spread
    target[33::3] = NOT_SCORED
    return case._replace(target=target)


# Beyond 44 nats a row is computed again; beyond 88 fp32 has no number for its sum.
@pytest.mark.parametrize("spread", [30.0, 60.0, 200.0, 1e4])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(None, 0.7, 1.3)], ids=["plain", "scaled"])
def test_rows_far_from_their_offset_are_as_good_as_others(transform: LogitTransform, spread: float) -> None:
    case = far_case(spread)
    got = answer(case, transform)
    assert (got.logprob[NEVER] == -torch.inf).all()
    case.target[NEVER] = START + 1
    kept = answer(case, transform)
    check_within_budget(kept, case, transform, torch.bfloat16, floor=1.0)
    others = torch.ones(40, dtype=torch.bool, device=DEVICE)
    others[NEVER] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, answer(case, transform), strict=True))


def test_rows_are_computed_again_where_they_must_and_nowhere_else() -> None:
    case = far_case(200.0)
    assert case.hidden is not None
    assert case.weight is not None
    at = case.bias, case.target, START, PLAIN
    statistics = Statistics(*BACKEND.row_offset(case.hidden, case.weight, *at))
    offset = statistics.row_max.clone()
    BACKEND.linear_lse_fwd(case.hidden, case.weight, *at, *statistics)
    again = (statistics.row_max != offset).nonzero()[:, 0].tolist()
    assert again == [*range(40)[FAR], *range(40)[BESIDE]]


@pytest.mark.parametrize("limit", [1 << 20, 12_000], ids=["whole", "tiles"])
def test_a_tile_without_any_probability_leaves_the_others_gradients_alone(limit: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=g), torch.randn(320, 16, generator=g) / 4
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    weight[192:, 0] = -300.0  # a probability of e^-300, which fp32 does not have
    target = torch.randint(0, 192, (40,), generator=g)
    gradients = []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float64, "naive")):
        leaves = [x.bfloat16().to(DEVICE, dtype).requires_grad_() for x in (hidden, weight)]
        loss = linear_logprob(*leaves, target.to(DEVICE), backend=backend, max_buffer_bytes=limit).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for got, exact in zip(*gradients, strict=True):
        assert rms(got - exact) <= 0.01 * rms(exact)


@pytest.mark.parametrize("dtype", FULL)
def test_a_row_that_is_not_scored_has_logprob_0(dtype: torch.dtype) -> None:
    statistics = Statistics(*torch.tensor([[1.0, torch.nan, 2.0], [2.0, 0.0, 3.0], [0.5, 7.0, 2.5]]).to(DEVICE, dtype))
    logprob, logsumexp = torch.full((3,), torch.nan).to(DEVICE, dtype), torch.zeros(3, device=DEVICE).double()
    BACKEND.row_statistics(*statistics, torch.tensor([0, -100, NOT_SCORED], device=DEVICE), logprob, logsumexp)
    assert logprob.tolist() == pytest.approx([-0.5 - math.log(2), 0.0, 0.0], rel=1e-6)
    assert logsumexp[0].item() == pytest.approx(1 + math.log(2), rel=1e-6)


@pytest.mark.parametrize("sharpness", [1.0, 4.0, 16.0])
def test_gradients_from_row_offsets_are_within_plain_pytorchs_at_every_sharpness(sharpness: float) -> None:
    case = make_case(200, 507, False, torch.bfloat16, hidden_size=67, spread=sharpness)
    check_within_budget(answer(case, PLAIN), case, PLAIN, torch.bfloat16, floor=0.5)


# Broken on purpose: the budget must notice.


class DropsLastColumn(TritonBackend):
    def lse_fwd(self, tile: Tensor, bias: Tensor | None, *rest: Any) -> None:
        super().lse_fwd(tile[:, :-1], None if bias is None else bias[:-1], *rest)

    def linear_lse_fwd(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> None:
        *at, tile, offsets = rest if len(rest) == 8 else (*rest, None, None)[:8]
        tile = None if tile is None else tile[:, : weight.shape[0] - 1]
        super().linear_lse_fwd(hidden, weight[:-1], None if bias is None else bias[:-1], *at, tile, offsets)


class ForgetsTheSoftcapsSlope(TritonBackend):
    def logits_bwd_(self, tile: Tensor, bias: Tensor | None, *rest: Any) -> None:
        target, start, transform, lse, grad_logprob = rest
        tile.copy_(logits(tile, bias, transform))
        super().logits_bwd_(tile, None, target, start, PLAIN, lse, grad_logprob)

    def exp_logits_bwd_(self, tile: Tensor, offsets: Tensor, *rest: Any) -> None:
        target, start, transform, *folded = rest
        super().exp_logits_bwd_(tile, offsets, target, start, replace(transform, softcap=None), *folded)

    def mark_target_(self, tile: Tensor, target: Tensor, start: int, transform: LogitTransform, *rest: Any) -> None:
        super().mark_target_(tile, target, start, replace(transform, softcap=None), *rest)


class ShiftsLogSumExp(TritonBackend):
    def logits_bwd_(self, *rest: Any) -> None:
        *at, lse, grad_logprob = rest
        super().logits_bwd_(*at, lse + 2e-6, grad_logprob)

    def exp_logits_bwd_(self, *rest: Any) -> None:
        *at, lse, logprob, grad_logprob = rest
        super().exp_logits_bwd_(*at, lse + 0.1, logprob, grad_logprob)

    def mark_target_(self, *rest: Any) -> None:
        *at, lse, logprob, scale = rest
        super().mark_target_(*at, lse + 0.1, logprob, scale)


class MixesUpOffsets(TritonBackend):
    def logits_bwd_(self, tile: Tensor, *rest: Any) -> None:
        super().logits_bwd_(tile, *rest)
        tile.mul_(1 + 1e-6)

    def exp_logits_bwd_(self, tile: Tensor, offsets: Tensor, *rest: Any) -> None:
        super().exp_logits_bwd_(tile, offsets.roll(1, 0), *rest)

    def mark_target_(self, *rest: Any) -> None:
        super().mark_target_(*rest)
        rest[-1].copy_(rest[-1].roll(1))


@in_blocks(256)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["tile", "fp16", "bf16"])
@pytest.mark.parametrize(
    "broken", [DropsLastColumn, ForgetsTheSoftcapsSlope, ShiftsLogSumExp, MixesUpOffsets], ids=lambda b: b.__name__
)
def test_negative_control_a_broken_kernel_exceeds_the_budget(broken: type[TritonBackend], dtype: torch.dtype) -> None:
    case = make_case(
        17, 450, True, dtype, 0 if dtype == torch.float32 else 67
    )  # dropping the last column leaves as many blocks
    case.bias[-1] = 3.0  # type: ignore[index]
    with pytest.raises(AssertionError, match=r"error .* against fp64"):
        check_within_budget(answer(case, EVERYTHING, backend=broken()), case, EVERYTHING, dtype, floor=1.0)


def test_negative_control_logprobs_of_half_precision_logits_are_not_near_fp32s() -> None:
    case = make_case(33, 507, True, torch.bfloat16, hidden_size=67)
    with pytest.raises(AssertionError, match=r"error .* against fp64"):
        check_near_fp32(plain(case, EVERYTHING, torch.bfloat16).logprob, case, EVERYTHING)


# Sequences and pairs.


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_segment_sum_matches_fp64(dtype: torch.dtype, index: torch.dtype) -> None:
    # Empty ones first, in the middle and last; one longer than two blocks of 1024.
    lengths = torch.tensor([0, 1, 5, 0, 2300, 1024, 7, 0])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(index).to(DEVICE)
    block = torch.randn(int(lengths.sum()) + 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block[[0, -1]] = torch.nan
    value = block.to(dtype).to(DEVICE)[1:-1]
    got, again = BACKEND.segment_sum(value, cu_seqlens), BACKEND.segment_sum(value, cu_seqlens)
    assert got.dtype == dtype
    assert torch.equal(got, again)
    edges = cu_seqlens.tolist()
    truth = torch.tensor([math.fsum(value[a:b].tolist()) for a, b in itertools.pairwise(edges)], dtype=torch.float64)
    error = (got.double().cpu() - truth).abs()
    assert (error <= 1.1 * (naive.segment_sum(value, cu_seqlens.long()).double().cpu() - truth).abs().max()).all()
    value[3] = torch.nan
    assert BACKEND.segment_sum(value, cu_seqlens).isnan().nonzero().tolist() == [[2]]


def test_segment_sum_of_nothing() -> None:
    value, none = torch.zeros(0, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert BACKEND.segment_sum(value, none).shape == (0,)
    assert BACKEND.segment_sum(value, none.expand(4)).tolist() == [0.0, 0.0, 0.0]


OPTIONS = ("pair_weight", "label_rate", "margin", "length", "normalizer")


def make_pairs(
    options: tuple[str, ...], loss_type: str, dtype: torch.dtype, sequences: int = 40, pairs: int = 300
) -> tuple[Tensor, Tensor, PairBatch]:
    """(logprob, ref_logprob, data): more pairs and sequences than a block, a quarter of the labels missing."""
    g = torch.Generator().manual_seed(sequences + pairs)

    def uniform(*shape: int) -> Tensor:
        return (0.5 + torch.rand(*shape, generator=g, dtype=torch.float64)).to(dtype).to(DEVICE)

    i = torch.randint(0, max(sequences, 1), (pairs,), generator=g)
    j = (i + torch.randint(1, max(sequences, 2), (pairs,), generator=g)) % max(sequences, 1)
    preference = torch.randint(0, 5, (pairs, 3), generator=g).double() / 4
    preference[torch.rand(pairs, 3, generator=g) < 0.25] = torch.nan
    given = {
        "pair_weight": uniform(pairs),
        "label_rate": uniform(3) / 1.5,
        "margin": uniform(pairs),
        "length": 20 * uniform(sequences),
        "normalizer": uniform(1)[0] * 100,
    }
    batch = PairBatch(
        pairs=torch.stack([i, j], dim=1).to(DEVICE),
        preference=preference.to(dtype).to(DEVICE),
        objective_weight=uniform(3),
        **{name: given[name] if name in options else None for name in OPTIONS},
        options=LossOptions(0.3, loss_type),
    )
    return -10 * uniform(sequences), -10 * uniform(sequences), batch


def autograd_coefficient(logprob: Tensor, ref_logprob: Tensor, batch: PairBatch, dtype: torch.dtype) -> Tensor:
    """The gradient of the reference's loss in ``dtype``."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    fields = {name: cast(value) for name, value in batch.keywords().items()}
    x = logprob.to(dtype).requires_grad_()
    positional = [fields.pop(name) for name in ("pairs", "preference", "objective_weight")]
    loss = naive.mopo_loss(x, ref_logprob.to(dtype), *positional, **fields).loss
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("loss_type", ["regression", "sigmoid"])
@pytest.mark.parametrize("options", [(), *((o,) for o in OPTIONS), OPTIONS], ids=lambda o: "+".join(o) or "none")
def test_pair_loss_bwd_is_the_losss_gradient(options: tuple[str, ...], loss_type: str, dtype: torch.dtype) -> None:
    arguments = make_pairs(options, loss_type, dtype)
    got, again = BACKEND.pair_loss_bwd(*arguments), BACKEND.pair_loss_bwd(*arguments)
    assert torch.equal(got, again)
    truth = autograd_coefficient(*arguments, dtype=torch.float64)
    budget = rms(autograd_coefficient(*arguments, dtype=dtype).double() - truth)
    assert rms(got.double() - truth) <= max(1.1 * budget, 4 * torch.finfo(dtype).eps * rms(truth))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("loss_type", ["regression", "sigmoid", "cloning"])
def test_token_grad_logprob_is_that_of_the_tokens_sequence(loss_type: str, index: torch.dtype) -> None:
    logprob, ref_logprob, batch = make_pairs(("length",), loss_type, torch.float32)
    batch = replace(batch, prompt_index=torch.zeros(40, dtype=torch.int64, device=DEVICE))
    lengths = torch.arange(40, device=DEVICE) * 37 % 23  # empty ones among them, more than a block's tokens in all
    lengths[5] = 300
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(index)
    got = BACKEND.token_grad_logprob(logprob, ref_logprob, batch, cu_seqlens, int(cu_seqlens[-1]))
    assert torch.equal(got, BACKEND.pair_loss_bwd(logprob, ref_logprob, batch).repeat_interleave(lengths))


def losses(logprob: Tensor, ref_logprob: Tensor, batch: PairBatch, dtype: torch.dtype) -> naive.PairLoss:
    """What the reference makes of the same numbers in ``dtype``."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    fields = {name: cast(value) for name, value in batch.keywords().items()}
    return naive.mopo_loss(logprob.to(dtype), ref_logprob.to(dtype), **fields)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("estimator", ["pair", "snis"])
@pytest.mark.parametrize("loss_type", ["regression", "sigmoid"])
@pytest.mark.parametrize("options", [(), *((o,) for o in OPTIONS), OPTIONS], ids=lambda o: "+".join(o) or "none")
def test_pair_loss_fwd_is_the_loss(
    options: tuple[str, ...], loss_type: str, estimator: str, dtype: torch.dtype
) -> None:
    logprob, ref_logprob, batch = make_pairs(options, loss_type, dtype, sequences=140)
    batch.preference[:, 1] = torch.nan  # an objective without a label
    batch = replace(batch, options=replace(batch.options, estimator=estimator))
    got, again = (BACKEND.pair_loss_fwd(logprob, ref_logprob, batch) for _ in range(2))
    truth, plain = (losses(logprob, ref_logprob, batch, d) for d in (torch.float64, dtype))
    for name in naive.PairLoss._fields:
        value, exact = getattr(got, name), getattr(truth, name)
        assert value.dtype == dtype
        assert value.shape == exact.shape
        assert torch.equal(value.isnan(), exact.isnan()), name
        assert torch.equal(value.nan_to_num(), getattr(again, name).nan_to_num()), name
        error, allowed = (rms((x.double() - exact).nan_to_num()) for x in (value, getattr(plain, name)))
        assert error <= max(1.1 * allowed, 4 * torch.finfo(dtype).eps * rms(exact.nan_to_num())), name


@pytest.mark.parametrize("estimator", ["pair", "snis"])
@pytest.mark.parametrize("loss_type", ["regression", "sigmoid"])
@pytest.mark.parametrize("case", ["nothing", "no pairs", "no weight", "sure", "far", "NaN", "infinite"])
def test_pair_loss_fwd_of_odd_batches_is_the_losss(case: str, loss_type: str, estimator: str) -> None:
    sequences, count = {"nothing": (0, 0), "no pairs": (3, 0)}.get(case, (4, 6))
    options = ("pair_weight",) if case == "no weight" else ()
    logprob, ref_logprob, batch = make_pairs(options, loss_type, torch.float32, sequences, count)
    batch = replace(batch, options=replace(batch.options, estimator=estimator))
    if batch.pair_weight is not None:
        batch.pair_weight.zero_()
    if case == "sure":
        batch.preference.fill_(1.0)
    if sequences == 4:
        logprob[2] += {"sure": 70.0, "far": -500.0, "NaN": torch.nan, "infinite": torch.inf}.get(case, 0.0)
    got, expected = (
        BACKEND.pair_loss_fwd(logprob, ref_logprob, batch),
        losses(logprob, ref_logprob, batch, torch.float32),
    )
    for name in naive.PairLoss._fields:
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), equal_nan=True, rtol=2e-6, atol=1e-30, msg=name
        )


def test_pair_loss_bwd_of_empty_batches_is_zero() -> None:
    assert BACKEND.pair_loss_bwd(*make_pairs(OPTIONS[:4], "regression", torch.float32, 3, 0)).tolist() == [0.0] * 3
    assert BACKEND.pair_loss_bwd(*make_pairs((), "sigmoid", torch.float32, 0, 0)).shape == (0,)
    logprob, ref_logprob, batch = make_pairs(("pair_weight",), "sigmoid", torch.float32, 4, 5)
    assert batch.pair_weight is not None
    batch.pair_weight.zero_()
    assert BACKEND.pair_loss_bwd(logprob, ref_logprob, batch).tolist() == [0.0] * 4


@pytest.mark.parametrize("loss_type", ["regression", "sigmoid"])
def test_a_nan_logprob_reaches_those_it_is_paired_with_and_no_other(loss_type: str) -> None:
    logprob, ref_logprob, batch = make_pairs((), loss_type, torch.float32, 40, 20)
    bad = int(batch.pairs[0, 0])
    logprob[bad] = torch.nan
    touched = {s for pair in batch.pairs.tolist() if bad in pair for s in pair}
    assert set(BACKEND.pair_loss_bwd(logprob, ref_logprob, batch).isnan().nonzero()[:, 0].tolist()) == touched


def test_a_sure_preference_keeps_the_digits_of_what_is_left() -> None:
    # u = 0.3 * 66.7 = 20: sigmoid(u) - 1 is -2.06e-9, which fp32 cannot tell from 0 next to 1.
    _, _, batch = make_pairs((), "sigmoid", torch.float32, 2, 1)
    batch = replace(batch, pairs=torch.tensor([[0, 1]], device=DEVICE))
    batch.preference.fill_(1.0)
    logprob, ref_logprob = torch.tensor([20 / 0.3, 0.0], device=DEVICE), torch.zeros(2, device=DEVICE)
    got = BACKEND.pair_loss_bwd(logprob, ref_logprob, batch)
    truth = autograd_coefficient(logprob, ref_logprob, batch, torch.float64)
    assert got.tolist() == pytest.approx(truth.tolist(), rel=1e-4)


def test_the_frozen_ratio_is_left_to_torch() -> None:
    logprob, ref_logprob, batch = make_pairs((), "cloning", torch.float32, 4, 6)
    batch = replace(batch, prompt_index=torch.zeros(4, dtype=torch.int64, device=DEVICE))
    for options in (batch.options, replace(batch.options, loss_type="sigmoid", estimator="closed_form")):
        other = replace(batch, options=options)
        got, expected = (
            BACKEND.pair_loss_fwd(logprob, ref_logprob, other),
            losses(logprob, ref_logprob, other, torch.float32),
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    truth = autograd_coefficient(logprob, ref_logprob, batch, torch.float32)
    torch.testing.assert_close(BACKEND.pair_loss_bwd(logprob, ref_logprob, batch), truth)


# Values of arguments.


def put(position: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[position] = value
        return x

    return change


# What is wrong with which argument, beyond a program's block where there is more than one, and what is said of it.
BAD_VALUES = {
    "large target": ("target", put((150,), 37), "target: expected a number in 0 .. V - 1 or ignore_index"),
    "negative target": ("target", put((0,), -1), "target: expected a number in 0 .. V - 1 or ignore_index"),
    "first offset": ("cu_seqlens", put((0,), 1), "cu_seqlens[0]: expected 0"),
    "last offset": ("cu_seqlens", put((100,), 299), "cu_seqlens[-1]: expected N"),
    "decreasing offsets": ("cu_seqlens", put((70,), 0), "cu_seqlens: expected offsets that do not decrease"),
    "large pair": ("pairs", put((290, 1), 100), "pairs: expected a number in 0 .. S - 1"),
    "negative pair": ("pairs", put((5, 0), -1), "pairs: expected a number in 0 .. S - 1"),
    "pair of one": ("pairs", lambda x: x[:, :1].expand(-1, 2), "pairs: expected two different responses"),
    "pair of two prompts": (
        "prompt_index",
        put((9,), 2),
        "pairs: expected responses to one prompt, as prompt_index has",
    ),
    "preference": ("preference", put((299, 2), 1.5), "preference: expected a number in [0, 1] or NaN"),
    "negative preference": ("preference", put((0, 0), -0.5), "preference: expected a number in [0, 1] or NaN"),
    "objective_weight": ("objective_weight", put((1,), torch.nan), "objective_weight: expected a number in 0 .. 1e+10"),
    "pair_weight": ("pair_weight", put((100,), -1.0), "pair_weight: expected a number in 0 .. 1e+10"),
    "label_rate": ("label_rate", put((2,), 0.0), "label_rate: expected a number in 1e-10 .. 1"),
    "margin": ("margin", put((100,), torch.inf), "margin: expected a number in -1e+10 .. 1e+10"),
    "length": ("length", put((99,), 0.0), "length: expected a number in 1e-10 .. 1e+10"),
    "normalizer": ("normalizer", put((), 1e-11), "normalizer: expected 0 or a number in 1e-10 .. 1e+10"),
}


def call_values(index: torch.dtype = torch.int64) -> CallValues:
    """Values that are right, the limits among them."""
    _, _, batch = make_pairs(OPTIONS, "sigmoid", torch.float32, 100)
    target = torch.arange(300) % 37
    target[7::9] = -100
    cu_seqlens = (torch.arange(101) * 3).to(index)
    batch.preference[0] = torch.tensor([0.0, 1.0, torch.nan])
    assert batch.label_rate is not None
    batch.label_rate[0] = 1.0
    batch = replace(batch, prompt_index=torch.zeros(100, dtype=torch.int64, device=DEVICE))
    return CallValues(target.to(DEVICE), 37, -100, cu_seqlens.to(DEVICE), 300, batch, 100)


@pytest.fixture
def asserting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter asserts as a kernel compiled for it does."""
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    options = replace(interpreter.interpreter_builder.options, debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assert ends the process: tests/gpu has them")
@pytest.mark.usefixtures("asserting")
@pytest.mark.parametrize("case", BAD_VALUES)
def test_check_values_asserts(case: str) -> None:
    from mopo_kernels.backends.triton.check_values import check_values

    name, change, message = BAD_VALUES[case]
    values = call_values()
    batch = values.batch
    assert batch is not None
    if hasattr(values, name):
        values = replace(values, **{name: change(getattr(values, name))})
    else:
        values = replace(values, batch=replace(batch, **{name: change(getattr(batch, name))}))
    with pytest.raises(Exception, match=re.escape(message)):
        check_values(values)
    with pytest.raises(ValueError, match=re.escape(message.split(" or ")[0])):
        BACKEND.check_values(values)


@pytest.mark.usefixtures("asserting")
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_check_values_lets_right_ones_pass_whatever_is_given(index: torch.dtype) -> None:
    from mopo_kernels.backends.triton.check_values import check_values

    values = call_values(index)
    _, _, bare = make_pairs((), "regression", torch.float64, 100)
    _, _, empty = make_pairs(OPTIONS, "regression", torch.float32, 0, 0)
    every: list[CallValues] = [
        values,
        CallValues(),
        CallValues(target=values.target, vocabulary=37, ignore_index=-100, tokens=300),
        CallValues(cu_seqlens=values.cu_seqlens, tokens=300, sequences=100),
        CallValues(cu_seqlens=torch.zeros(1, dtype=index, device=DEVICE)),
        CallValues(batch=bare, sequences=100),
        CallValues(batch=empty),
    ]
    for given in every:
        check_values(given)
        BACKEND.check_values(given)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# What is compiled anew.


def kernel_modules() -> list[ModuleType]:
    from mopo_kernels.backends.triton import (
        check_values,
        exp_logits_bwd,
        linear_lse_fwd,
        logits_bwd,
        lse_fwd,
        mark_target,
        pair_loss_bwd,
        pair_loss_fwd,
        row_offset,
        row_statistics,
        scale_rows,
        segment_sum,
    )

    by_row = [row_offset, row_statistics, mark_target, scale_rows]
    return [
        exp_logits_bwd,
        lse_fwd,
        logits_bwd,
        linear_lse_fwd,
        *by_row,
        pair_loss_fwd,
        pair_loss_bwd,
        segment_sum,
        check_values,
    ]


def kernels() -> dict[str, Any]:
    return {name: v for m in kernel_modules() for name, v in vars(m).items() if name.endswith("_kernel")}


# Arguments that belong to the model or to the plan of its buffer: whether they are multiples of 16 may be compiled in.
# x and out are rows of hidden, or of a gradient.
MODELS = {"tile", "exp_logits", "hidden", "weight", "columns", "hidden_size", "blocks", "x", "out"}


def test_nothing_that_changes_with_the_batch_is_compiled_in() -> None:
    found = kernels()
    assert len(found) == 15
    for name, kernel in found.items():
        options = kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel)
        for argument, parameter in inspect.signature(kernel.fn).parameters.items():
            annotation = str(parameter.annotation)
            if argument.isupper():
                assert annotation == "tl.constexpr", f"{name}: {argument}"
                assert argument.startswith(("HAS_", "BLOCK", "GROUP")) or argument in (
                    "CAPPED",
                    "SCALED",
                    "STORE",
                    "ROW_OFFSETS",
                    "EVEN_H",
                    "EVEN_V",
                    "SIGMOID",
                    "SNIS",
                ), f"{name}: {argument}"
            elif "stride" in argument:
                assert annotation == "tl.int64", f"{name}: {argument}"
            elif argument not in MODELS and annotation != "tl.float64":
                assert argument in options["do_not_specialize"], f"{name}: {argument}"
        assert set(options["do_not_specialize"]) <= set(inspect.signature(kernel.fn).parameters), name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels do not run in the interpreter")
def test_a_range_over_what_a_kernel_loads_runs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton 3.6 leaves it: numpy is asked for the integer of an array of one element, and 2.4 has none."""
    from triton.runtime import interpreter as its_interpreter

    from mopo_kernels.backends.triton import interpreter

    patch = its_interpreter._patch_lang_tensor

    def of_triton_3_6(tensor: Any, scope: Any) -> None:
        def index(self: Any) -> int:
            if self.handle.data.ndim > 0:
                raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
            return int(self.handle.data)

        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", index)

    value, cu_seqlens = torch.arange(5.0), torch.tensor([0, 2, 2, 5])
    monkeypatch.setattr(its_interpreter, "_patch_lang_tensor", of_triton_3_6)
    with pytest.raises(Exception, match="only 0-dimensional arrays"):
        BACKEND.segment_sum(value, cu_seqlens)
    interpreter.repair()
    assert BACKEND.segment_sum(value, cu_seqlens).tolist() == [1.0, 0.0, 9.0]


# Where Triton is missing.

ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
LATE = "import os, triton.language; os.environ['TRITON_INTERPRET'] = '1'"
ASK = "\nfrom mopo_kernels.backends.triton import unavailable_reason; print(unavailable_reason())"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU makes Triton available")
@pytest.mark.parametrize(
    ("program", "interpret", "reason"),
    [
        pytest.param(
            "", "0", r"there is no NVIDIA GPU \(TRITON_INTERPRET=1 runs the kernels on the CPU.*\)", id="no_gpu"
        ),
        pytest.param(ABSENT, "0", "there is no NVIDIA GPU", id="no_gpu_no_triton"),
        pytest.param(
            ABSENT, "1", r"Triton does not import \(No module named 'triton'\); install triton", id="no_triton"
        ),
        pytest.param(LATE, "0", "TRITON_INTERPRET changed after Triton was imported; set it before", id="late"),
    ],
)
def test_one_line_says_why_the_backend_is_not_available(program: str, interpret: str, reason: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program + ASK], env=env, capture_output=True, text=True, timeout=120)
    (line,) = done.stdout.splitlines() or [done.stderr]
    assert line.startswith(reason.split("\\")[0].split(".*")[0])
