"""Every way in which PyTorch differentiates: the right numbers, or one error that names the argument; never a 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import CPU_BACKENDS, Batch, make_batch
from torch import Tensor
from torch.autograd import forward_ad

from mopo_kernels import linear_logprob, linear_mopo_loss, linear_sequence_logprob, mopo_loss


def token_loss(batch: Batch, hidden: Tensor, backend: str) -> Tensor:
    return linear_logprob(hidden, batch.weight, batch.target, batch.bias, backend=backend).square().sum()


def sequence_loss(batch: Batch, hidden: Tensor, backend: str) -> Tensor:
    arguments = (batch.weight, batch.target, batch.cu_seqlens, batch.bias)
    return linear_sequence_logprob(hidden, *arguments, backend=backend).square().sum()


def one_pass_loss(batch: Batch, hidden: Tensor, backend: str) -> Tensor:
    arguments = batch.loss_arguments()[1:]
    return linear_mopo_loss(hidden, *arguments, backend=backend, **batch.loss_options("sigmoid")).loss


LOSSES: dict[str, Callable[[Batch, Tensor, str], Tensor]] = {
    "linear_logprob": token_loss,
    "linear_sequence_logprob": sequence_loss,
    "linear_mopo_loss": one_pass_loss,
}


@pytest.fixture
def batch() -> Batch:
    return make_batch(prompts=2, responses=2, longest=4, hidden=5, vocabulary=7)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias"), ("weight",)], ids="+".join)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_batched_upstream_gradients_are_right(backend: str, loss: str, trained: tuple[str, ...], batch: Batch) -> None:
    leaves = batch.leaves(*trained)
    upstream = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    want = torch.autograd.grad(LOSSES[loss](batch, batch.hidden, "naive"), leaves)
    value = LOSSES[loss](batch, batch.hidden, backend)
    # The second goes through the same graph, whose gradients the first must have left as they were.
    for _ in range(2):
        got = torch.autograd.grad(value, leaves, upstream, is_grads_batched=True, retain_graph=True)
        for result, expected in zip(got, want, strict=True):
            torch.testing.assert_close(result, torch.stack([u * expected for u in upstream]))


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias"), ("weight",)], ids="+".join)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_vmap_and_the_gradients_behind_it_are_right(
    backend: str, loss: str, trained: tuple[str, ...], batch: Batch
) -> None:
    batch.hidden = torch.stack([batch.hidden, batch.hidden + 1.0, batch.hidden * 2.0])
    leaves = batch.leaves(*trained)
    with warnings.catch_warnings():
        # There is no batching rule: PyTorch calls the op once for each.
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        got = torch.vmap(lambda hidden: LOSSES[loss](batch, hidden, backend))(batch.hidden)
    want = torch.stack([LOSSES[loss](batch, hidden, "naive") for hidden in batch.hidden])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


def forward_mode(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


OTHER_MODES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "forward_ad": forward_mode,
    "forward_ad of a leaf": lambda function, x: forward_mode(function, x.clone().requires_grad_()),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vjp": lambda function, x: torch.func.vjp(function, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "hessian": lambda function, x: torch.func.hessian(function)(x),
    "grad of vmap": lambda function, x: torch.func.grad(lambda x: torch.vmap(function)(x[None]).sum())(x),
    "vmap of grad": lambda function, x: torch.vmap(torch.func.grad(function))(x[None]),
}


@pytest.mark.parametrize("mode", OTHER_MODES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_forward_mode_and_torch_func_are_refused_by_name(backend: str, loss: str, mode: str, batch: Batch) -> None:
    with pytest.raises(NotImplementedError, match="hidden: expected reverse mode of torch"):
        OTHER_MODES[mode](lambda hidden: LOSSES[loss](batch, hidden, backend), batch.hidden)


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_the_loss_of_log_probabilities_refuses_them_too(mode: str, batch: Batch) -> None:
    labels = (batch.pairs, batch.preference, batch.objective_weight)
    with pytest.raises(NotImplementedError, match="logprob: expected reverse mode of torch"):
        OTHER_MODES[mode](lambda x: mopo_loss(x, batch.ref_logprob, *labels).loss, batch.ref_logprob * 2)


@pytest.mark.parametrize("mode", OTHER_MODES)
@pytest.mark.parametrize("loss", ["linear_logprob", "linear_sequence_logprob"])
def test_the_plain_log_probabilities_take_every_mode(mode: str, loss: str, batch: Batch) -> None:
    def function(hidden: Tensor) -> Tensor:
        return LOSSES[loss](batch, hidden, "naive")

    got = OTHER_MODES[mode](function, batch.hidden)
    if mode == "hessian":
        want = torch.autograd.functional.hessian(function, batch.hidden)
    else:
        want = torch.autograd.functional.jacobian(function, batch.hidden)
        want = want.sum() if got.dim() == 0 else want.expand_as(got)
    torch.testing.assert_close(got.detach(), want)


def test_what_is_no_input_of_the_op_may_be_differentiated_in_any_mode(batch: Batch) -> None:
    value = token_loss(batch, batch.hidden, "auto")
    factor = torch.tensor(2.0, dtype=torch.float64)
    assert torch.func.grad(lambda x: x * token_loss(batch, batch.hidden, "auto"))(factor) == value
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(factor, torch.ones_like(factor))
        assert forward_ad.unpack_dual(dual * token_loss(batch, batch.hidden, "auto")).tangent == value


@pytest.mark.parametrize("name", ["preference", "objective_weight", "pair_weight", "length", "margin", "label_rate"])
def test_a_constant_that_requires_grad_is_refused_as_no_gradient_would_reach_it(name: str, batch: Batch) -> None:
    arguments = {
        "logprob": batch.ref_logprob * 2,
        "ref_logprob": batch.ref_logprob,
        "pairs": batch.pairs,
        "preference": batch.preference,
        "objective_weight": batch.objective_weight,
        "pair_weight": batch.pair_weight,
        "length": batch.length,
        "margin": batch.pair_weight - 1,
        "label_rate": batch.objective_weight,
    }
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: expected a constant, as no gradient reaches it; got one"):
        mopo_loss(**arguments, loss_type="sigmoid")
    with torch.no_grad():
        assert mopo_loss(**arguments, loss_type="sigmoid").loss.isfinite()
