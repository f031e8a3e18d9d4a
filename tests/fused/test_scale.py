"""Sizes at the ends of what is promised: vocabularies from 7 to 262144, thousands of ragged sequences, pairs longer
than the buffer, batches of nothing; and what another objective costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from counting import operations
from samples import CPU_BACKENDS, Batch, make_batch
from torch import Tensor

from mopo_kernels import linear_mopo_loss


def numbers(batch: Batch, backend: str, limit: int | None = None, trained: bool = True) -> list[Tensor]:
    leaves = batch.leaves("hidden", "weight", "bias") if trained else batch.leaves("hidden")
    output = linear_mopo_loss(
        *batch.loss_arguments(), **batch.loss_options("regression"), backend=backend, max_buffer_bytes=limit
    )
    return [output.loss.detach(), output.log_ratio, output.satisfaction, *torch.autograd.grad(output.loss, leaves)]


def assert_oracle(make: dict[str, int], backend: str, limit: int | None = None, trained: bool = True) -> None:
    expected = numbers(make_batch(**make), "naive", trained=trained)
    for got, want in zip(numbers(make_batch(**make), backend, limit, trained), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("vocabulary", [7, 50257, 262144])
def test_any_vocabulary(backend: str, vocabulary: int, trained: bool) -> None:
    """50257 is prime to every block size; at 262144 the buffer of 8 MiB holds three rows."""
    sizes = {"prompts": 2, "responses": 2, "longest": 5, "hidden": 8, "vocabulary": vocabulary}
    assert_oracle(sizes, backend, 8 << 20, trained)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("limit", [None, 100_000], ids=["default buffer", "small buffer"])
def test_thousands_of_ragged_sequences(backend: str, limit: int | None) -> None:
    sizes = {"prompts": 2048, "responses": 2, "longest": 4, "hidden": 8, "vocabulary": 37}
    batch = make_batch(**sizes)
    assert batch.cu_seqlens.shape[0] - 1 == 4096
    assert {0, 1} <= set(batch.cu_seqlens.diff().tolist())
    assert_oracle(sizes, backend, limit)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_pairs_longer_than_the_buffer(backend: str, trained: bool) -> None:
    """700 tokens in a pair, of which the buffer holds fewer than 50."""
    sizes = {"prompts": 2, "responses": 3, "longest": 900, "hidden": 8, "vocabulary": 501}
    assert_oracle(sizes, backend, 150_000, trained)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_batch_of_nothing(backend: str, trained: bool) -> None:
    """No sequence at all; and sequences without a token."""
    for prompts in (0, 2):
        batch = make_batch(prompts=prompts, responses=2)
        batch.hidden, batch.target = batch.hidden[:0], batch.target[:0]
        batch.cu_seqlens = torch.zeros_like(batch.cu_seqlens)
        loss, _, _, *gradients = numbers(batch, backend, trained=trained)
        assert torch.isfinite(loss)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_another_objective_adds_numbers_a_pair_and_no_pass_over_the_head(backend: str) -> None:
    """Not timed, as that depends on what else the machine does; `python -m bench.scaling_curves` does."""
    batch = make_batch(prompts=8, responses=2, longest=40, hidden=16, vocabulary=512, objectives=8)
    first = replace(batch, preference=batch.preference[:, :1], objective_weight=batch.objective_weight[:1])
    found = []
    for some in (first, batch):
        numbers(some, backend)  # what is done once a process
        done = operations(lambda some=some: numbers(some, backend))
        found.append([(name, size) for name, size in done if name.startswith("aten") and size >= 512])
    assert found[0] == found[1]
    assert {"aten::mm", "aten::addmm"} & {name for name, _ in found[0]}
