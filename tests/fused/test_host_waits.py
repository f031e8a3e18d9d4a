"""No call makes the host wait for a GPU, in any mode: the code that runs there, run on tensors that have no values.

Under the custom ops, whose registered fakes would be all that runs on such tensors, and through the triton backend up
to its launches. What CUDA itself waits for inside an operation is the device suite's to find, on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, HostWait, fake_cuda, run_as_on_a_gpu
from samples import Batch, make_batch
from torch import Tensor

from mopo_kernels import (
    backends,
    linear_logprob,
    linear_mopo_loss,
    linear_sequence_logprob,
    mopo_loss,
    naive,
    pack_responses,
)
from mopo_kernels.naive import ESTIMATORS, LOSS_TYPES

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(backends.availability()[name] is not None, reason=f"{name} is not available"),
    )
    for name in ("torch", "triton")
]
DTYPES = [
    pytest.param(dtype, id=name)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16"))
]
# A chunk for all, several chunks, the vocabulary tiled as well.
BUFFERS = {"one chunk": 1 << 20, "chunks": 24_000, "tiles": 7_000}
TRAINED = {"no gradient": (), "frozen head": ("hidden",), "trained head": ("hidden", "weight", "bias")}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return run_as_on_a_gpu(monkeypatch)


def small_batch(dtype: torch.dtype, trained: tuple[str, ...], keep: tuple[str, ...] = ()) -> Batch:
    """On the device, but for what to ``keep`` on the host."""
    batch = make_batch(prompts=2, longest=4, hidden=8, dtype=dtype)
    moved = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved = {name: value if name in keep else value.to("meta") for name, value in moved.items()}
    result = replace(batch, **moved)
    result.leaves(*trained)
    return result


def given(batch: Batch, loss_type: str, estimator: str) -> dict[str, dict[str, Any]]:
    """Arguments of the loss besides its batch, none of the optional ones or all of them, and each kind of reference."""
    with fake_cuda():
        rate, normalizer = torch.ones_like(batch.objective_weight), torch.full((), 3.0, device=DEVICE)
        margin, other = batch.pair_weight - 1, {"ref_hidden": batch.hidden.detach() + 1}
    own = {"ref_weight": batch.weight.detach(), "ref_bias": batch.bias.detach()}
    none: dict[str, Any] = {"loss_type": loss_type, "estimator": estimator, "prompt_index": batch.prompt_index}
    every = none | {"pair_weight": batch.pair_weight, "length": batch.length, "max_ratio": 2.0, "softcap": 4.0}
    every |= {"label_rate": rate} if loss_type != "cloning" else {}
    every |= {"margin": margin} if loss_type == "sigmoid" else {}
    return {
        "log-probabilities": none | {"ref_logprob": batch.ref_logprob},
        "log-probabilities, every option": every | {"ref_logprob": batch.ref_logprob, "normalizer": 3.0},
        "hidden states": every | other | {"normalizer": normalizer},
        "hidden states, a head of their own": none | other | own,
    }


def run(batch: Batch, trained: tuple[str, ...], **options: Any) -> None:
    with fake_cuda():
        loss = linear_mopo_loss(*batch.loss_arguments(), **options).loss
        assert loss.device == DEVICE
        if trained:
            torch.autograd.backward(loss)
    assert all(getattr(batch, name).grad is not None for name in trained)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_mode_of_the_loss_waits(loss_type: str, estimator: str, launches: list[str]) -> None:
    for trained in TRAINED.values():
        batch = small_batch(torch.float32, trained)
        for options in given(batch, loss_type, estimator).values():
            run(batch, trained, backend="torch", max_buffer_bytes=BUFFERS["chunks"], **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", TRAINED)
def test_no_path_through_a_head_waits(backend: str, dtype: torch.dtype, trained: str, launches: list[str]) -> None:
    """Plans made on the host and not, chunks and tiles; what changes the path, and a loss that is known beforehand."""
    for keep, buffer in itertools.product(((), ("cu_seqlens", "pairs")), BUFFERS.values()):
        batch = small_batch(dtype, TRAINED[trained], keep)
        for loss_type, known in (("regression", "hidden states"), ("cloning", "log-probabilities")):
            options = given(batch, loss_type, "pair")[known]
            run(batch, TRAINED[trained], backend=backend, max_buffer_bytes=buffer, **options)
    assert bool(launches) == (backend == "triton")


@pytest.mark.parametrize("trained", ["frozen head", "trained head"])
def test_a_second_backward_does_not_wait(trained: str, launches: list[str]) -> None:
    """It computes anew what the first has handed over."""
    batch = small_batch(torch.float32, TRAINED[trained])
    with fake_cuda():
        loss = linear_mopo_loss(*batch.loss_arguments(), **batch.loss_options("sigmoid"), backend="torch").loss
        torch.autograd.backward(loss, retain_graph=True)
        torch.autograd.backward(loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", TRAINED)
def test_log_probabilities_wait_for_nothing(
    backend: str, dtype: torch.dtype, trained: str, launches: list[str]
) -> None:
    for keep, buffer in zip(((), ("cu_seqlens",), ()), BUFFERS.values(), strict=True):
        batch = small_batch(dtype, TRAINED[trained], keep)
        linear = (batch.hidden, batch.weight, batch.target)
        options: dict[str, Any] = {"softcap": 4.0, "backend": backend, "max_buffer_bytes": buffer}
        with fake_cuda():
            token = linear_logprob(*linear, batch.bias, **options)
            sequence = linear_sequence_logprob(*linear, batch.cu_seqlens, batch.bias, **options)
            assert token.device == sequence.device == DEVICE
            if TRAINED[trained]:
                torch.autograd.backward(token.sum() + sequence.sum())
        assert all(getattr(batch, name).grad is not None for name in TRAINED[trained])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_of_log_probabilities_waits_for_nothing(loss_type: str, estimator: str, launches: list[str]) -> None:
    batch = small_batch(torch.float32, ())
    arguments = (batch.ref_logprob, batch.pairs, batch.preference, batch.objective_weight)
    options = batch.loss_options(loss_type) | {"estimator": estimator, "max_ratio": 2.0, "length": batch.length}
    del options["ref_logprob"]
    for normalizer in (None, 3.0):
        logprob = batch.ref_logprob.clone().requires_grad_()
        with fake_cuda():
            torch.autograd.backward(mopo_loss(logprob, *arguments, **options, normalizer=normalizer).loss)
        assert logprob.grad is not None


@pytest.mark.parametrize("placed", ["labels on the host", "labels on the device"])
def test_responses_are_packed_without_waiting_where_their_labels_are_on_the_host(placed: str) -> None:
    hidden, labels = torch.empty(2, 5, 3, device="meta", requires_grad=True), torch.tensor([[-100, 1, 2, 3, -100]] * 2)
    if placed == "labels on the device":
        labels = labels.to("meta")
        with fake_cuda(), pytest.raises(HostWait, match="nonzero"):
            pack_responses(hidden, labels)
        return
    with fake_cuda():
        rows, target, cu_seqlens = pack_responses(hidden, labels)
        assert rows.device == target.device == DEVICE
        assert cu_seqlens.tolist() == [0, 3, 6]
        torch.autograd.backward(rows.sum())


WAITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a float": lambda device, host: float(device.sum()),
    "a branch": lambda device, host: bool((device > 0).all()),
    "a list": lambda device, host: device.tolist(),
    "an element": lambda device, host: device[0].item(),
    "a comparison": lambda device, host: torch.equal(device, device),
    "a mask": lambda device, host: device[device > 0],
    "writing by a mask": lambda device, host: device.__setitem__(device > 0, device),
    "positions": lambda device, host: device.nonzero(),
    "distinct values": lambda device, host: torch.unique(device),
    "repeating": lambda device, host: torch.repeat_interleave(device.long()),
    "to the host": lambda device, host: device.cpu(),
    "to the host, unblocked": lambda device, host: device.to("cpu", non_blocking=True),
    "into the host's": lambda device, host: host.copy_(device),
    "to the device": lambda device, host: host.to(DEVICE),
    "to the device, unblocked but not pinned": lambda device, host: host.to(DEVICE, non_blocking=True),
    "to the device, pinned but blocking": lambda device, host: host.pin_memory().to(DEVICE),
    "into the device's": lambda device, host: device.copy_(host),
    "a scalar to the device": lambda device, host: torch.as_tensor(3.0).to(device),
    "numbers to the device": lambda device, host: torch.tensor([1.0, 2.0], device=DEVICE),
    "a number to the device": lambda device, host: device.new_tensor(1.0),
    "an index of the host": lambda device, host: device[host.long()],
    "both in one operation": lambda device, host: torch.cat([device, host]),
    "a scalar of both": lambda device, host: torch.stack([device.sum(), host.sum()]),
}


@pytest.mark.parametrize("case", WAITS)
def test_negative_control_a_wait_is_noticed(case: str) -> None:
    device, host = torch.ones(4, device="meta"), torch.ones(4)
    with fake_cuda(), pytest.raises(HostWait):
        WAITS[case](device, host)


def test_what_does_not_wait_passes() -> None:
    device, host = torch.ones(4, device="meta"), torch.ones(4)
    with fake_cuda():
        assert device.is_cuda
        assert host.pin_memory().to(DEVICE, non_blocking=True).device == DEVICE
        assert (device * host.sum() + device.new_full((), 2.0)).device == DEVICE
        assert torch.repeat_interleave(device.long(), output_size=9).shape == (9,)
        assert device[device.long()].device == torch.zeros(3, device=DEVICE).device == DEVICE
        assert host.tolist() == [1.0] * 4


def test_negative_control_the_cloning_losss_old_divisor_is_noticed(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scalar made on the host and copied: what this test was written for."""
    batch = small_batch(torch.float32, ("hidden",))
    loss = naive.mopo_loss

    def copied(logprob: Tensor, *rest: Any, **options: Any) -> Any:
        options["normalizer"] = torch.as_tensor(float(logprob.shape[0])).to(logprob)
        return loss(logprob, *rest, **options)

    monkeypatch.setattr(naive, "mopo_loss", copied)
    with fake_cuda(), pytest.raises(HostWait, match="copies to the device and blocks"):
        linear_mopo_loss(*batch.loss_arguments(), **batch.loss_options("cloning"), backend="torch")
