"""What the driver does on an accelerator, run on the CPU: nothing it calls may read a value from the device, rows that
are not scored go through the products with coefficient 0, and plans follow from what is on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from samples import CPU_BACKENDS, Batch, make_batch
from test_ops import units
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mopo_kernels import driver, linear_logprob, linear_mopo_loss, ops, reference
from mopo_kernels.head import accumulation_dtype

# A chunk for all, several chunks, the vocabulary tiled as well.
BUFFERS = {"one chunk": 1 << 20, "chunks": 24_000, "tiles": 5_000}
TRAINED = [("hidden",), ("hidden", "weight", "bias"), ("weight",)]


def pretend(monkeypatch: pytest.MonkeyPatch, on_host: Iterable[Tensor] = ()) -> None:
    """Only these tensors are on the host."""
    known = [t.data_ptr() for t in on_host]
    monkeypatch.setattr(driver, "on_host", lambda tensor: tensor.data_ptr() in known)


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
        expected = numbers(make_batch(), trained, mode, backend="reference")
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


class Reads(TorchDispatchMode):
    """Records the operations that wait for a device: those that read a value or whose result has a size that depends on
    values."""

    WAITS = ("local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0].strip("_2")
        by_mask = name in ("index", "index_put") and any(t is not None and t.dtype == torch.bool for t in args[1])
        sized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in self.WAITS or by_mask or sized:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def reads(function: Callable[[], object]) -> list[str]:
    # On the CPU tolist looks at memory without an operation.
    with Reads() as mode, patch.object(Tensor, "tolist", lambda tensor: mode.found.append("tolist")):
        function()
    return mode.found


def call(backend: str, limit: int, *needs: bool) -> driver.Call:
    return ops._call(-100, 4.0, 1.0, 1.0, backend, limit, None, *needs)


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("needs", [(False,) * 3, (True, False, False), (True,) * 3], ids=["none", "frozen", "trained"])
@pytest.mark.parametrize("loss_type", ["regression", "sigmoid", "cloning"])
@pytest.mark.parametrize("estimator", ["pair", "snis", "closed_form"])
def test_nothing_is_read_from_the_device(
    buffer: str, needs: tuple[bool, ...], loss_type: str, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the custom ops, whose checks are asynchronous asserts there; on a GPU the device suite asks CUDA itself."""
    batch = make_batch()
    pretend(monkeypatch)
    options = call("torch", BUFFERS[buffer], *needs)
    data = ops._pair_data(
        batch.ref_logprob.shape[0],
        accumulation_dtype(batch.hidden.dtype),
        batch.pairs,
        batch.preference,
        batch.objective_weight,
        batch.pair_weight,
        None,
        None,
        batch.length,
        batch.prompt_index,
        None,
        0.3,
        loss_type,
        2.0,
        estimator,
    )
    arguments = (batch.hidden, batch.weight, batch.target, batch.cu_seqlens, batch.bias)
    for given in ((batch.ref_logprob, None), (None, batch.hidden + 0.1)):
        assert not reads(
            lambda given=given: driver.linear_mopo_loss(*arguments, *given, data, batch.pairs, options, None)
        )
    linear = (batch.hidden, batch.weight, batch.target, batch.bias)
    assert not reads(lambda: driver.linear_logprob(*linear, options, None))


def test_negative_control_reading_is_noticed() -> None:
    value = torch.arange(3)
    for function in (
        lambda: value.tolist(),
        lambda: value[value > 1],
        lambda: torch.unique(value),
        lambda: torch.repeat_interleave(value),
        lambda: bool((value > 0).all()),
    ):
        assert reads(function), function


def test_prompts_are_numbered_like_unique_does() -> None:
    index = torch.tensor([7, -3, 7, 100, 0, -3])
    assert torch.equal(reference.prompt_number(index), torch.unique(index, return_inverse=True)[1])
    assert reference.prompt_number(index[:0]).shape == (0,)
