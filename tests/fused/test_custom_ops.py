"""The custom ops under opcheck and torch.compile, what they cost in products and bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from counting import peak_bytes, units
from samples import CPU_BACKENDS, Batch, make_batch
from torch import Tensor

from mopo_kernels import linear_logprob, linear_mopo_loss, linear_sequence_logprob, mopo_loss
from mopo_kernels.arguments import HeadInputs, HeadOptions, LogitTransform, LossOptions, PairBatch
from mopo_kernels.fused import linear_logprob as fused_logprob
from mopo_kernels.fused import linear_mopo_loss as fused_loss
from mopo_kernels.fused import mopo_loss as pair_loss


@pytest.mark.parametrize("limit", [1 << 20, 6_000], ids=["whole", "narrow"])
@pytest.mark.parametrize(
    "trained", [(), ("hidden",), ("hidden", "weight", "bias")], ids=lambda t: "+".join(t) or "none"
)
def test_ops_pass_opcheck(limit: int, trained: tuple[str, ...]) -> None:
    batch = make_batch(prompts=2, responses=2, hidden=8, vocabulary=11)
    batch.leaves(*trained)
    options = HeadOptions(-100, LogitTransform(3.0), "torch", limit)
    inputs = HeadInputs(batch.hidden, batch.weight, batch.target, batch.bias).with_needs()
    torch.library.opcheck(fused_logprob.linear_logprob, fused_logprob.LinearLogprob(inputs, options).flatten())
    constants = replace(inputs, hidden=batch.hidden.detach(), weight=batch.weight.detach(), bias=batch.bias.detach())
    logsumexp = torch.zeros(batch.hidden.shape[0], dtype=torch.float64)
    backward = fused_logprob.LinearLogprobBackward(
        logsumexp + 1.0, constants, logsumexp, logsumexp, logsumexp[:0], logsumexp[:0], options
    )
    torch.library.opcheck(fused_logprob.linear_logprob_backward, backward.flatten())
    value = torch.randn(batch.hidden.shape[0], dtype=torch.float64, requires_grad="hidden" in trained)
    torch.library.opcheck(pair_loss.segment_sum, (value, batch.cu_seqlens, "torch"))
    pair_batch = PairBatch(
        batch.pairs,
        torch.nan_to_num(batch.preference, nan=0.5),
        batch.objective_weight,
        batch.pair_weight,
        length=batch.length,
        prompt_index=batch.prompt_index,
        options=LossOptions(tau=0.3, estimator="snis"),
    )
    logprob = batch.ref_logprob.clone().requires_grad_("hidden" in trained)
    torch.library.opcheck(
        pair_loss.mopo_loss, pair_loss.MOPOLoss(logprob, batch.ref_logprob, pair_batch, "torch").flatten()
    )
    ref_hidden = batch.hidden.detach() + 0.1
    for reference in ((batch.ref_logprob, None), (None, ref_hidden)):
        call = fused_loss.LinearMOPOLoss(inputs, batch.cu_seqlens, *reference, pair_batch, options)
        torch.library.opcheck(fused_loss.linear_mopo_loss, call.flatten())


def fused(batch: Batch) -> Tensor:
    return linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, tau=0.5).loss * 2.0


def composed(batch: Batch) -> Tensor:
    logprob = linear_sequence_logprob(batch.hidden, batch.weight, batch.target, batch.cu_seqlens, batch.bias)
    arguments = (batch.ref_logprob, batch.pairs, batch.preference, batch.objective_weight)
    return mopo_loss(logprob, *arguments, tau=0.5, pair_weight=batch.pair_weight).loss * 2.0


@pytest.mark.parametrize("function", [fused, composed])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_compile_takes_the_full_graph_and_does_not_recompile_per_batch(
    function: Callable[[Batch], Tensor], trained: tuple[str, ...]
) -> None:
    """Sizes differ from batch to batch; TRL's compaction recompiled 8 to 9 times here."""
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    names: tuple[str, ...] = ("hidden", "weight", "target", "cu_seqlens", "pairs", "preference", "objective_weight")
    names += ("bias", "ref_logprob", "pair_weight", "prompt_index", "length")

    def call(*tensors: Tensor) -> Tensor:
        return function(Batch(**dict(zip(names, tensors, strict=True))))

    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for seed in range(6):
        batch = make_batch(prompts=3 + seed, seed=seed)
        leaves = batch.leaves(*trained)
        tensors = [getattr(batch, name) for name in names]
        expected, got = call(*tensors), compiled(*tensors)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b)
    # One for the first sizes, one for sizes that vary.
    assert graphs <= 2


def test_values_are_checked_inside_compiled_graphs_too() -> None:
    batch = make_batch()
    compiled = torch.compile(
        lambda t: linear_logprob(batch.hidden, batch.weight, t), fullgraph=True, backend="aot_eager"
    )
    compiled(batch.target)
    with pytest.raises(ValueError, match="target: expected a number in"):
        compiled(batch.target + 100)


COSTS = {
    # what is called, what is trained, buffer in bytes -> units of products
    "no gradient": ("logprob", (), 1 << 20, 1.0),
    "loss without gradient": ("loss", (), 1 << 20, 1.0),
    "frozen head, any loss": ("logprob", ("hidden",), 1 << 20, 2.0),
    "frozen head, one pass": ("loss", ("hidden",), 1 << 20, 2.0),
    "frozen head, a prompt longer than the buffer": ("loss", ("hidden",), 14_000, 2.0),
    "frozen head, the reference in one product": ("with reference", ("hidden",), 1 << 20, 3.0),
    "trained head, the reference in one product": ("with reference", ("hidden", "weight"), 1 << 20, 4.0),
    "trained head, the reference apart": ("with reference", ("hidden", "weight"), 24_000, 4.0),
    "frozen head, cloning": ("cloning", ("hidden",), 1 << 20, 2.0),
    "trained head, one pass": ("loss", ("hidden", "weight"), 1 << 20, 3.0),
    "trained head, one pass in chunks": ("loss", ("hidden", "weight"), 24_000, 3.0),
    "trained head, cloning": ("cloning", ("hidden", "weight"), 24_000, 3.0),
    "trained head, any loss, products kept": ("logprob", ("hidden", "weight"), 1 << 20, 3.0),
    "trained head, any loss, overflow": ("logprob", ("hidden", "weight"), 16_000, 4.0),
    "trained head, a prompt longer than the buffer": ("loss", ("hidden", "weight"), 4_000, 4.0),
}


@pytest.mark.parametrize("case", COSTS)
def test_products_are_as_few_as_the_cost_model_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, trained, limit, expected = COSTS[case]
    batch = make_batch()
    batch.leaves(*trained)
    common = {"backend": "torch", "max_buffer_bytes": limit}
    if what == "logprob":
        got = units(
            lambda: linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, **common).sum(),
            batch,
            monkeypatch,
        )
    else:
        options = batch.loss_options("cloning" if what == "cloning" else "regression")
        if what == "with reference":
            options |= {"ref_logprob": None, "ref_hidden": batch.hidden.detach() + 0.1}
        got = units(lambda: linear_mopo_loss(*batch.loss_arguments(), **options, **common).loss, batch, monkeypatch)
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [8 << 20, 2 << 20, 300_000, 60_000])
@pytest.mark.parametrize("mode", ["none", "frozen", "trained", "loss frozen", "loss trained", "loss none", "cloning"])
def test_memory_beyond_inputs_outputs_and_gradients_stays_within_the_buffer(
    backend: str, dtype: torch.dtype, limit: int, mode: str
) -> None:
    """NeMo-RL ignored its setting in the training path. 250 rows x 2003 logits are 2 MB in fp32."""
    batch = make_batch(prompts=12, responses=4, longest=9, hidden=64, vocabulary=2003, dtype=dtype)
    trained = {"none": (), "loss none": (), "frozen": ("hidden",), "loss frozen": ("hidden",)}.get(
        mode, ("hidden", "weight", "bias")
    )
    leaves = batch.leaves(*trained)
    common = {"backend": backend, "max_buffer_bytes": limit}

    def call() -> list[Tensor]:
        if mode in ("none", "frozen", "trained"):
            value = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, **common)
            scalar = value.sum()
        else:
            options = batch.loss_options("cloning" if mode == "cloning" else "regression")
            scalar = linear_mopo_loss(*batch.loss_arguments(), **options, **common).loss
        return list(torch.autograd.grad(scalar, leaves)) if leaves else [scalar]

    call()
    peak, _ = peak_bytes(call)
    # Gradients accumulate in fp32 and are cast once, so that half precision holds both for a moment.
    gradients = sum(t.numel() * (4 + (t.element_size() if t.element_size() != 4 else 0)) for t in leaves)
    # Outputs, indices and statistics: a few dozen bytes a token, a sequence and a pair; the bias in fp32.
    small = 96 * batch.hidden.shape[0] + 512 * batch.pairs.shape[0] + 8 * batch.bias.numel() + 4096
    assert peak <= limit + gradients + small


def test_the_memory_test_can_fail() -> None:
    """Plain PyTorch on the same batch is far over the bound that the fused functions keep."""
    batch = make_batch(prompts=12, responses=4, hidden=64, vocabulary=2003, dtype=torch.float32)
    (hidden,) = batch.leaves("hidden")
    peak, _ = peak_bytes(
        lambda: torch.autograd.grad(
            linear_logprob(hidden, batch.weight, batch.target, batch.bias, backend="naive").sum(), hidden
        )
    )
    assert peak > 3 * batch.hidden.shape[0] * 2003 * 4


def test_an_impossible_buffer_is_refused_with_the_least_that_works() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=r"max_buffer_bytes: expected at least \d+ for hidden size 16; got 100"):
        linear_logprob(batch.hidden, batch.weight, batch.target, max_buffer_bytes=100)
