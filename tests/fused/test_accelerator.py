"""What the fused path does on an accelerator, run on the CPU: rows that are not scored go through the products with
grad_logprob 0, and plans follow from what is on the host. (That nothing waits for the device: test_host_waits.py.)"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from counting import units
from samples import CPU_BACKENDS, Batch, make_batch
from torch import Tensor

from mopo_kernels import linear_logprob, linear_mopo_loss, naive
from mopo_kernels.fused import scored_rows

# A chunk for all, several chunks, the vocabulary tiled as well.
BUFFERS = {"one chunk": 1 << 20, "chunks": 24_000, "tiles": 5_000}
TRAINED = [("hidden",), ("hidden", "weight", "bias"), ("weight",)]


def pretend(monkeypatch: pytest.MonkeyPatch, on_host: Iterable[Tensor] = ()) -> None:
    """Only these tensors are on the host."""
    known = [t.data_ptr() for t in on_host]
    monkeypatch.setattr(scored_rows, "on_host", lambda tensor: tensor.data_ptr() in known)


def numbers(batch: Batch, trained: tuple[str, ...], mode: str, **options: Any) -> list[Tensor]:
    leaves = batch.leaves(*trained)
    if mode == "logprob":
        value = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, softcap=4.0, **options)
        upstream = torch.linspace(-1, 2, value.shape[0], dtype=value.dtype)
        return [value.detach(), *torch.autograd.grad((value * upstream).sum(), leaves)]
    given = batch.loss_options("cloning" if mode == "cloning" else "regression")
    if mode == "reference states":
        given |= {"ref_logprob": None, "ref_hidden": batch.hidden.detach() + 0.1}
    output = linear_mopo_loss(*batch.loss_arguments(), **given, **options)
    return [output.loss.detach(), output.log_ratio, *torch.autograd.grad(output.loss, leaves)]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("mode", ["logprob", "regression", "cloning", "reference states"])
@pytest.mark.parametrize("planned", [False, True], ids=["all on the device", "plan on the host"])
def test_numbers_are_the_oracles(
    backend: str, buffer: str, mode: str, planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trained in TRAINED:
        expected = numbers(make_batch(), trained, mode, backend="naive")
        batch = make_batch()
        with monkeypatch.context() as context:
            pretend(context, [batch.cu_seqlens, batch.pairs] if planned else [])
            got = numbers(batch, trained, mode, backend=backend, max_buffer_bytes=BUFFERS[buffer])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


COSTS = {
    # buffer, trained, plan on the host -> units
    "one chunk": (1 << 20, ("hidden", "weight"), False, 3.0),
    "chunks, planned": (20_000, ("hidden", "weight"), True, 3.0),
    "chunks, not planned": (20_000, ("hidden", "weight"), False, 4.0),
    "chunks, frozen head, not planned": (20_000, ("hidden",), False, 2.0),
}


@pytest.mark.parametrize("case", COSTS)
def test_products_per_plan(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, trained, planned, expected = COSTS[case]
    batch = make_batch()
    batch.target.clamp_(min=0)
    batch.leaves(*trained)
    pretend(monkeypatch, [batch.cu_seqlens, batch.pairs] if planned else [])
    options = batch.loss_options("regression") | {"backend": "torch", "max_buffer_bytes": limit}
    got = units(lambda: linear_mopo_loss(*batch.loss_arguments(), **options).loss, batch, monkeypatch)
    assert got == pytest.approx(expected)


def test_prompts_are_numbered_like_unique_does() -> None:
    index = torch.tensor([7, -3, 7, 100, 0, -3])
    assert torch.equal(naive.prompt_number(index), torch.unique(index, return_inverse=True)[1])
    assert naive.prompt_number(index[:0]).shape == (0,)
