"""The numbers on a device: against the oracle in fp64, within plain PyTorch's own error, the same bits twice.

Fresh memory is NaN in every test here, so that an element nobody wrote shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from places import cases, everywhere, moved, on
from samples import BUFFERS, HEADS, OPTIONS, Batch, make_batch
from torch import Tensor

from mopo_kernels import linear_logprob, linear_mopo_loss, linear_sequence_logprob
from mopo_kernels.naive import ESTIMATORS, LOSS_TYPES

ALL = ("hidden", "weight", "bias")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = ("logprob", "sequences", *LOSS_TYPES)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills fresh memory with NaN; that nothing here needs the mode is tested where it is off."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def answers(kind: str, batch: Batch, trained: tuple[str, ...] = ALL, **options: Any) -> list[Tensor]:
    """Log-probabilities or, for a kind of loss, log-ratios; then gradients of a scalar that weighs them unevenly."""
    leaves = batch.leaves(*trained)
    head = (batch.hidden, batch.weight, batch.target)
    if kind in LOSS_TYPES:
        given: dict[str, Any] = {"tau": 0.3} | batch.loss_options(kind) | options
        output = linear_mopo_loss(*batch.loss_arguments(), **given)
        value, scalar = output.log_ratio, output.loss * 3.0
    else:
        if kind == "logprob":
            value = linear_logprob(*head, batch.bias, **options)
        else:
            value = linear_sequence_logprob(*head, batch.cu_seqlens, batch.bias, **options)
        scalar = (value * torch.linspace(-1, 2, value.shape[0], dtype=value.dtype, device=value.device)).sum()
    return [value.detach(), *(torch.autograd.grad(scalar, leaves) if leaves else ())]


def assert_equal_to_oracle(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-9, atol=1e-9, equal_nan=True)


# ------------------------------------------------------------------------------------------------------ fp64, exactly


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "backend", "kind", "head", "buffer"),
    cases(
        [("logprob", "softcap", "narrow"), ("regression", "softcap", "chunks"), ("sigmoid", "plain", "tiny")],
        itertools.product(KINDS, HEADS, BUFFERS),
    ),
)
def test_every_function_equals_the_oracle_in_fp64(device: str, backend: str, kind: str, head: str, buffer: str) -> None:
    expected = answers(kind, make_batch(), backend="naive", **HEADS[head])
    options = {"backend": backend, "max_buffer_bytes": BUFFERS[buffer], **HEADS[head]}
    # With and without values of cu_seqlens and pairs that the host can read.
    for host in (True, False):
        assert_equal_to_oracle(answers(kind, on(make_batch(), device, host), **options), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "backend", "trained"),
    everywhere(((),), (("hidden",),), (("weight",),), (("bias",),), (("hidden", "weight"),)),
)
def test_what_is_trained_does_not_change_the_numbers_in_fp64(
    device: str, backend: str, trained: tuple[str, ...]
) -> None:
    for kind, buffer in itertools.product(("logprob", "regression"), ("whole", "narrow")):
        expected = answers(kind, make_batch(), trained, backend="naive")
        batch = on(make_batch(), device)
        got = answers(kind, batch, trained, backend=backend, max_buffer_bytes=BUFFERS[buffer])
        assert_equal_to_oracle(got, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "backend", "option"), everywhere(*((option,) for option in OPTIONS)))
def test_every_option_of_the_loss_has_the_same_meaning_in_fp64(device: str, backend: str, option: str) -> None:
    def run(batch: Batch, device: str, backend: str) -> list[Tensor]:
        filled = {"length": batch.length, "margin": batch.pair_weight - 1, "prompt_index": batch.prompt_index}
        given = {
            name: filled[name] if value is ... else moved(value, device) for name, value in OPTIONS[option].items()
        }
        leaves = batch.leaves("hidden", "weight")
        output = linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, backend=backend, **given)
        return [*output, *torch.autograd.grad(output.loss, leaves)]

    assert_equal_to_oracle(run(on(make_batch(), device), device, backend), run(make_batch(), "cpu", "naive"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "backend", "estimator"), everywhere(*((name,) for name in ESTIMATORS)))
def test_reference_hidden_states_and_estimators_in_fp64(device: str, backend: str, estimator: str) -> None:
    def run(batch: Batch, backend: str, own: bool) -> list[Tensor]:
        given = {"ref_hidden": batch.hidden + 0.1, "estimator": estimator, "prompt_index": batch.prompt_index}
        if own:
            given |= {"ref_weight": batch.weight * 0.9, "ref_bias": batch.bias}
        leaves = batch.leaves(*ALL)
        output = linear_mopo_loss(*batch.loss_arguments(), backend=backend, max_buffer_bytes=24_000, **given)
        return [*output, *torch.autograd.grad(output.loss, leaves)]

    for host, own in itertools.product((True, False), (True, False)):
        assert_equal_to_oracle(run(on(make_batch(), device, host), backend, own), run(make_batch(), "naive", own))


# A column short of, at and beyond every block there is.
VOCABULARIES = (1, 7, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1031, 4097)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "backend", "dtype"), cases([(FP64,), (BF16,)], [(FP64,), (FP32,), (BF16,), (FP16,)])
)
def test_ragged_vocabularies_and_one_token_responses(device: str, backend: str, dtype: torch.dtype) -> None:
    """verl's kernel was wrong when the block did not divide V. Half precision is held against the same numbers in
    fp64, with room for its rounding; a column left out or counted twice is a matter of tenths."""
    tolerance = {FP64: 1e-9, FP32: 1e-4}.get(dtype, 0.05)
    vocabularies = VOCABULARIES if device == "cuda" else VOCABULARIES[2:8:2]
    for vocabulary, longest in itertools.product(vocabularies, (1, 5)):
        batch = make_batch(vocabulary=vocabulary, longest=longest, responses=2, scale=0.5, dtype=dtype)
        exact = Batch(**{**vars(batch), **{name: getattr(batch, name).double() for name in ALL}})
        expected = answers("regression", exact, backend="naive")
        got = answers("regression", on(batch, device), backend=backend)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


# ------------------------------------------------------------------------------------------------- the error's budget

# tokens, hidden, vocabulary: none divided by a block; the widest needs several blocks of everything.
SHAPES = ((252, 507, 123), (64, 129, 1031), (17, 7, 40), (1500, 320, 3001))
# Bytes: all rows in one chunk; chunks of a few rows; the vocabulary in several tiles.
LIMITS = (64 << 20, 400_000, 60_000)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "backend", "dtype", "kind", "head", "shape", "limit"),
    cases(
        itertools.product((FP32, BF16, FP16), ("logprob", "regression"), ("softcap",), SHAPES[2:3], (1 << 20,)),
        [
            *itertools.product((FP32, BF16, FP16), KINDS, HEADS, SHAPES[1:2], LIMITS[:1]),
            *itertools.product((FP32, BF16, FP16), ("regression",), ("softcap",), (SHAPES[0], *SHAPES[2:]), LIMITS),
        ],
        [(BF16, "regression", "softcap", SHAPES[2], 1 << 20)],
    ),
)
def test_error_is_within_the_budget_of_plain_pytorch(
    device: str, backend: str, dtype: torch.dtype, kind: str, head: str, shape: tuple[int, int, int], limit: int
) -> None:
    """Against the fp64 truth, no worse than 1.1 x plain PyTorch in the same dtype on the same device; root mean square
    over seeds, since on small shapes a single rounding decides."""
    tokens, hidden, vocabulary = shape
    errors, budgets = [], []
    for seed in range(24 if tokens < 50 else 6):
        batch = on(
            make_batch(
                prompts=tokens // 16 + 1,
                responses=4,
                hidden=hidden,
                vocabulary=vocabulary,
                dtype=dtype,
                scale=hidden**-0.25,
                seed=seed,
            ),
            device,
            host=seed % 2 == 0,
        )
        exact = Batch(**{**vars(batch), **{name: getattr(batch, name).double() for name in ALL}})
        truth = answers(kind, exact, backend="naive", **HEADS[head])
        plain = answers(kind, batch, backend="naive", **HEADS[head])
        fused = answers(kind, batch, backend=backend, max_buffer_bytes=limit, **HEADS[head])
        errors.append(torch.stack([(a.double() - b).norm() ** 2 for a, b in zip(fused, truth, strict=True)]))
        budgets.append(torch.stack([(a.double() - b).norm() ** 2 for a, b in zip(plain, truth, strict=True)]))
    ratio = (torch.stack(errors).sum(0) / torch.stack(budgets).sum(0)).sqrt()
    assert (ratio <= 1.1).all(), f"value, dhidden, dweight, dbias: {ratio.tolist()} of plain PyTorch's error"


# ------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "backend", "dtype"), cases([(FP64,), (BF16,)], [(FP64,), (FP32,), (BF16,), (FP16,)])
)
def test_a_batch_without_anything_to_learn_has_loss_zero_and_zero_gradients(
    device: str, backend: str, dtype: torch.dtype
) -> None:
    masked, no_pairs, empty, unlabelled = (make_batch(dtype=dtype, prompts=p) for p in (4, 4, 0, 4))
    masked.target.fill_(-100)
    no_pairs.pairs, no_pairs.preference, no_pairs.pair_weight = (
        no_pairs.pairs[:0],
        no_pairs.preference[:0],
        no_pairs.pair_weight[:0],
    )
    unlabelled.preference.fill_(torch.nan)
    for batch, host in itertools.product((masked, no_pairs, empty, unlabelled), (True, False)):
        there = on(batch, device, host)
        leaves = there.leaves(*ALL)
        loss_type = "regression" if batch is masked else "sigmoid"
        output = linear_mopo_loss(
            *there.loss_arguments(), ref_logprob=there.ref_logprob, loss_type=loss_type, backend=backend
        )
        assert torch.isfinite(output.loss)
        for gradient in torch.autograd.grad(output.loss, leaves):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "backend", "dtype"), cases([(FP32,), (BF16,)], [(FP64,), (FP32,), (BF16,), (FP16,)], [(BF16,)])
)
def test_what_is_not_scored_leaves_the_rest_as_it_was(device: str, backend: str, dtype: torch.dtype) -> None:
    """NaN in hidden states of ignored tokens reaches nothing."""
    clean = make_batch(dtype=dtype, vocabulary=300, hidden=40)
    dirty = make_batch(dtype=dtype, vocabulary=300, hidden=40)
    ignored = clean.target == -100
    clean.hidden[ignored], dirty.hidden[ignored] = 0, torch.nan
    for kind in ("logprob", "regression"):
        expected = answers(kind, on(clean, device), ("hidden",), backend=backend)
        got = answers(kind, on(dirty, device), ("hidden",), backend=backend)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        assert not got[-1][ignored.to(device)].any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "backend", "dtype"), cases([(FP32,), (BF16,)], [(FP64,), (FP32,), (BF16,), (FP16,)], [(BF16,)])
)
def test_columns_of_minus_infinity_have_probability_zero(device: str, backend: str, dtype: torch.dtype) -> None:
    """A bias of -inf closes an entry of the vocabulary, whole blocks of them included."""
    batch = make_batch(dtype=dtype, vocabulary=700, hidden=24, scale=0.5)
    batch.bias[:300] = -torch.inf
    batch.target[(batch.target >= 0) & (batch.target < 300)] += 300
    exact = Batch(**{**vars(batch), **{name: getattr(batch, name).double() for name in ALL}})
    expected = answers("logprob", exact, ("hidden", "weight"), backend="naive")
    tolerance = {FP64: 1e-9, FP32: 1e-4}.get(dtype, 0.05)
    # Across the vocabulary in one, and in tiles of which some have no other column.
    for limit in (1 << 20, 20_000):
        there = on(batch, device)
        got = answers("logprob", there, ("hidden", "weight"), backend=backend, max_buffer_bytes=limit)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())
        assert not got[2][:300].any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "backend", "dtype"), cases([(FP32,), (BF16,)], [(FP32,), (BF16,)]))
def test_large_logits_overflow_nowhere(device: str, backend: str, dtype: torch.dtype) -> None:
    batch = on(make_batch(dtype=dtype, scale=40.0), device)
    exact = Batch(**{**vars(batch), **{name: getattr(batch, name).double() for name in ALL}})
    got, expected = answers("logprob", batch, backend=backend), answers("logprob", exact, backend="naive")
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-4, atol=0.1)
    assert all(torch.isfinite(t).all() for t in got)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "backend"), everywhere())
def test_autocast_gives_the_dtype_of_f_linear(device: str, backend: str) -> None:
    batch = on(make_batch(dtype=FP32), device)
    rounded = Batch(**{**vars(batch), **{name: getattr(batch, name).bfloat16() for name in ALL}})
    with torch.autocast(device, dtype=BF16):
        got = answers("regression", batch, backend=backend)
    expected = answers("regression", rounded, backend=backend)
    assert torch.equal(got[0], expected[0])
    assert [t.dtype for t in got] == [FP32] * 4
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b.float(), rtol=0.02, atol=0.02 * b.abs().max().item())
