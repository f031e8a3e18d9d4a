"""The public functions against the unchunked oracle in fp64, gradcheck, repeatability and behaviour at the edges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from samples import BUFFERS, CPU_BACKENDS, HEADS, OPTIONS, Batch, make_batch
from torch import Tensor
from torch.nn import functional as F

from mopo_kernels import (
    LinearMOPOLoss,
    linear_logprob,
    linear_mopo_loss,
    linear_sequence_logprob,
    mopo_loss,
    naive,
    pack_responses,
)
from mopo_kernels.naive import ESTIMATORS, LOSS_TYPES


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias"), ("weight",), ("bias",)], ids="+".join)
def test_linear_logprob_equals_the_oracle_for_any_upstream_gradient(
    backend: str, buffer: str, head: str, trained: tuple[str, ...]
) -> None:
    batch = make_batch()
    leaves = batch.leaves(*trained)
    upstream = torch.randn(batch.target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for name, limit in (("naive", None), (backend, BUFFERS[buffer])):
        value = linear_logprob(
            batch.hidden, batch.weight, batch.target, batch.bias, backend=name, max_buffer_bytes=limit, **HEADS[head]
        )
        results.append([value, *gradients((value * upstream).sum(), leaves)])
    for expected, got in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_linear_mopo_loss_equals_the_oracle(
    backend: str, buffer: str, loss_type: str, estimator: str, trained: tuple[str, ...]
) -> None:
    batch = make_batch()
    leaves = batch.leaves(*trained)
    options = batch.loss_options(loss_type) | {"estimator": estimator, "tau": 0.3, **HEADS["softcap"]}
    results = []
    for name, limit in (("naive", None), (backend, BUFFERS[buffer])):
        output = linear_mopo_loss(*batch.loss_arguments(), backend=name, max_buffer_bytes=limit, **options)
        results.append([*output, *gradients(output.loss * 3.0, leaves)])
    for expected, got in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_option_of_the_loss_has_the_same_meaning_in_one_pass(option: str, backend: str) -> None:
    batch = make_batch()
    leaves = batch.leaves("hidden", "weight")
    arguments = dict(OPTIONS[option])
    filled = {"length": batch.length, "margin": batch.pair_weight - 1, "prompt_index": batch.prompt_index}
    arguments |= {name: filled[name] for name, value in arguments.items() if value is ...}
    logprob = linear_sequence_logprob(
        batch.hidden, batch.weight, batch.target, batch.cu_seqlens, batch.bias, backend="naive"
    )
    expected = naive.mopo_loss(
        logprob, batch.ref_logprob, batch.pairs, batch.preference, batch.objective_weight, **arguments
    )
    separate = mopo_loss(logprob, batch.ref_logprob, batch.pairs, batch.preference, batch.objective_weight, **arguments)
    fused = linear_mopo_loss(
        *batch.loss_arguments(), ref_logprob=batch.ref_logprob, backend=backend, max_buffer_bytes=24_000, **arguments
    )
    for output in (separate, fused):
        for got, want in zip(output, expected, strict=True):
            close(got, want.to(got.dtype))
        for got, want in zip(gradients(output.loss, leaves), gradients(expected.loss, leaves), strict=True):
            close(got, want)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_mopo_loss_passes_gradcheck(loss_type: str) -> None:
    batch = make_batch()
    logprob = (batch.ref_logprob + 0.3).requires_grad_()

    def loss(value: Tensor) -> Tensor:
        return mopo_loss(
            value,
            batch.ref_logprob,
            batch.pairs,
            batch.preference,
            batch.objective_weight,
            loss_type=loss_type,
            prompt_index=batch.prompt_index,
            tau=0.5,
        ).loss

    assert torch.autograd.gradcheck(loss, (logprob,))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("buffer", ["whole", "narrow"])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_the_linear_functions_pass_gradcheck(backend: str, buffer: str, trained: tuple[str, ...]) -> None:
    batch = make_batch(prompts=2, responses=2, longest=3, hidden=5, vocabulary=7)
    leaves = batch.leaves(*trained)
    common = {"backend": backend, "max_buffer_bytes": BUFFERS[buffer], "softcap": 3.0}

    def logprob(*_: Tensor) -> Tensor:
        return linear_sequence_logprob(batch.hidden, batch.weight, batch.target, batch.cu_seqlens, batch.bias, **common)

    def loss(*_: Tensor) -> Tensor:
        return linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, tau=0.5, **common).loss

    for function in (logprob, loss):
        assert torch.autograd.gradcheck(
            lambda *leaf, f=function: _with(batch, trained, leaf, f), tuple(leaves), atol=1e-6
        )


def _with(batch: Batch, names: tuple[str, ...], tensors: tuple[Tensor, ...], function: Any) -> Tensor:
    for name, tensor in zip(names, tensors, strict=True):
        setattr(batch, name, tensor)
    return function()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(252, 507, 123), (64, 129, 1031), (17, 7, 40)], ids=str)
def test_error_is_within_the_budget_of_plain_pytorch(
    dtype: torch.dtype, backend: str, shape: tuple[int, int, int]
) -> None:
    """Against the fp64 truth, no worse than 1.1 x plain PyTorch in the same dtype; root mean square over seeds, since
    on small shapes a single rounding decides."""
    tokens, hidden, vocabulary = shape
    errors = torch.zeros(4, dtype=torch.float64)
    budgets = torch.zeros(4, dtype=torch.float64)
    for seed in range(24 if tokens < 100 else 8):
        batch = make_batch(
            prompts=tokens // 16 + 1,
            responses=4,
            hidden=hidden,
            vocabulary=vocabulary,
            dtype=dtype,
            scale=hidden**-0.25,
            seed=seed,
        )

        def run(name: str, cast: torch.dtype, batch: Batch = batch) -> list[Tensor]:
            leaves = [t.detach().to(cast).requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
            output = linear_mopo_loss(
                *leaves[:2],
                batch.target,
                batch.cu_seqlens,
                batch.pairs,
                batch.preference,
                batch.objective_weight,
                leaves[2],
                ref_logprob=batch.ref_logprob,
                backend=name,
                max_buffer_bytes=1 << 20,
            )
            return [output.log_ratio, *torch.autograd.grad(output.loss, leaves)]

        truth, plain, fused = run("naive", torch.float64), run("naive", dtype), run(backend, dtype)
        errors += torch.stack([(a.double() - b).norm() ** 2 for a, b in zip(fused, truth, strict=True)])
        budgets += torch.stack([(a.double() - b).norm() ** 2 for a, b in zip(plain, truth, strict=True)])
    ratio = (errors / budgets).sqrt()
    assert (ratio <= 1.1).all(), f"log_ratio, dhidden, dweight, dbias: {ratio.tolist()} of plain PyTorch's error"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("buffer", BUFFERS)
def test_two_runs_are_bitwise_equal(backend: str, buffer: str) -> None:
    def run() -> list[Tensor]:
        batch = make_batch(dtype=torch.float32, prompts=8, hidden=33, vocabulary=201)
        leaves = batch.leaves("hidden", "weight", "bias")
        output = linear_mopo_loss(
            *batch.loss_arguments(), ref_logprob=batch.ref_logprob, backend=backend, max_buffer_bytes=BUFFERS[buffer]
        )
        return [*output, *torch.autograd.grad(output.loss, leaves)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_a_second_backward_through_a_retained_graph_gives_the_same_gradients(trained: tuple[str, ...]) -> None:
    batch = make_batch()
    leaves = batch.leaves(*trained)
    value = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, backend="torch").sum()
    loss = linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, backend="torch").loss
    for scalar in (value, loss):
        first = [g.clone() for g in torch.autograd.grad(scalar * 2.0, leaves, retain_graph=True)]
        second = torch.autograd.grad(scalar * 4.0, leaves)
        for a, b in zip(first, second, strict=True):
            close(b, 2 * a)


def test_gradients_of_a_gradient_are_refused_not_wrong() -> None:
    batch = make_batch()
    (hidden,) = batch.leaves("hidden")
    value = linear_logprob(hidden, batch.weight, batch.target).square().sum()
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_hidden_states_stand_for_reference_logprobs(dtype: torch.dtype) -> None:
    batch = make_batch(dtype=dtype)
    leaves = batch.leaves("hidden", "weight", "bias")
    ref_hidden = batch.hidden.detach() + 0.1
    wide = torch.randn(batch.hidden.shape[0], 11, dtype=dtype)
    ref_weight = torch.randn(batch.weight.shape[0], 11, dtype=dtype)
    cases = (
        ({"ref_hidden": ref_hidden}, (ref_hidden, batch.weight, batch.bias)),
        ({"ref_hidden": wide, "ref_weight": ref_weight}, (wide, ref_weight, None)),
        (
            {"ref_hidden": wide, "ref_weight": ref_weight, "ref_bias": batch.bias},
            (wide, ref_weight, batch.bias),
        ),
    )
    for arguments, (h, w, b) in cases:
        with torch.no_grad():
            ref_logprob = linear_sequence_logprob(h, w, batch.target, batch.cu_seqlens, b)
        given = linear_mopo_loss(*batch.loss_arguments(), ref_logprob=ref_logprob)
        computed = linear_mopo_loss(*batch.loss_arguments(), **arguments)
        # Not bitwise: under the same head both go through one product, which may round its rows differently.
        torch.testing.assert_close(computed.loss, given.loss)
        for a, b_ in zip(gradients(given.loss, leaves), gradients(computed.loss, leaves), strict=True):
            torch.testing.assert_close(b_, a)


def test_module_and_function_are_the_same() -> None:
    batch = make_batch()
    module = LinearMOPOLoss(tau=0.4, loss_type="sigmoid", estimator="snis", max_buffer_bytes=24_000, softcap=3.0)
    expected = linear_mopo_loss(
        *batch.loss_arguments(),
        ref_logprob=batch.ref_logprob,
        tau=0.4,
        loss_type="sigmoid",
        estimator="snis",
        max_buffer_bytes=24_000,
        softcap=3.0,
    )
    got = module(*batch.loss_arguments(), ref_logprob=batch.ref_logprob)
    assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(got, expected, strict=True))
    assert "loss_type='sigmoid'" in repr(module)


@pytest.mark.parametrize("backend", ["naive", *CPU_BACKENDS])
def test_a_batch_without_anything_to_learn_has_loss_zero_and_zero_gradients(backend: str) -> None:
    """All-masked sequences, no pairs, no tokens at all: a differentiable zero, never NaN."""
    masked = make_batch()
    masked.target.fill_(-100)
    no_pairs = make_batch()
    no_pairs.pairs, no_pairs.preference, no_pairs.pair_weight = (
        no_pairs.pairs[:0],
        no_pairs.preference[:0],
        no_pairs.pair_weight[:0],
    )
    empty = make_batch(prompts=0)
    unlabelled = make_batch()
    unlabelled.preference.fill_(torch.nan)
    for batch in (masked, no_pairs, empty, unlabelled):
        leaves = batch.leaves("hidden", "weight", "bias")
        output = linear_mopo_loss(
            *batch.loss_arguments(), ref_logprob=batch.ref_logprob, loss_type="sigmoid", backend=backend
        )
        assert torch.isfinite(output.loss)
        output.loss.backward()
        for leaf in leaves:
            assert leaf.grad is not None
            assert torch.isfinite(leaf.grad).all()
            if batch is not masked:
                assert leaf.grad.abs().sum() == 0
        if batch is masked:
            assert all(leaf.grad is not None and leaf.grad.abs().sum() == 0 for leaf in leaves)


def test_regression_with_one_objective_is_ipo_and_sigmoid_is_dpo() -> None:
    batch = make_batch(objectives=1, seed=2)
    batch.preference.fill_(1.0)
    logprob = batch.ref_logprob + torch.randn_like(batch.ref_logprob)
    one = torch.ones(1, dtype=torch.float64)
    h = (logprob - batch.ref_logprob)[batch.pairs]
    h = h[:, 0] - h[:, 1]
    arguments = (logprob, batch.ref_logprob, batch.pairs, batch.preference, one)
    close(mopo_loss(*arguments, tau=0.2).loss, (h - 1 / (2 * 0.2)).square().mean())
    close(mopo_loss(*arguments, tau=0.2, loss_type="sigmoid").loss, -F.logsigmoid(0.2 * h).mean())


def test_micro_batches_with_a_common_normalizer_add_up_to_the_whole_batch() -> None:
    batch = make_batch(prompts=4, responses=3)
    (hidden,) = batch.leaves("hidden")
    whole = linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, pair_weight=batch.pair_weight)
    total = batch.pair_weight.sum()
    parts = []
    for first, last in ((0, 3), (3, 12)):
        rows = slice(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]))
        inside = (batch.pairs[:, 0] >= first) & (batch.pairs[:, 0] < last)
        parts.append(
            linear_mopo_loss(
                hidden[rows],
                batch.weight,
                batch.target[rows],
                batch.cu_seqlens[first : last + 1] - batch.cu_seqlens[first],
                batch.pairs[inside] - first,
                batch.preference[inside],
                batch.objective_weight,
                batch.bias,
                ref_logprob=batch.ref_logprob[first:last],
                pair_weight=batch.pair_weight[inside],
                normalizer=total,
            )
        )
    summed = parts[0].loss + parts[1].loss
    close(summed, whole.loss)
    close(gradients(summed, [hidden])[0], gradients(whole.loss, [hidden])[0])
    labelled = parts[0].labelled + parts[1].labelled
    merged = sum(torch.nan_to_num(p.satisfaction) * p.labelled for p in parts) / labelled
    close(merged, whole.satisfaction)


def test_label_rate_makes_the_target_unbiased_when_labels_are_missing_at_random() -> None:
    g = torch.Generator().manual_seed(0)
    z = (torch.rand(400_000, 2, generator=g, dtype=torch.float64) < torch.tensor([0.8, 0.3])).double()
    rate = torch.tensor([0.25, 0.6], dtype=torch.float64)
    w = torch.tensor([1.0, 0.7], dtype=torch.float64)
    seen = z.where(torch.rand(z.shape, generator=g, dtype=torch.float64) < rate, torch.nan)
    full = naive.pair_target(z, w, 0.5).mean()
    assert (naive.pair_target(seen, w, 0.5, rate).mean() - full).abs() < 0.02
    assert (naive.pair_target(seen, w, 0.5).mean() - full).abs() > 0.1


def test_pack_responses_keeps_scored_rows_shifted_by_one_and_is_differentiable() -> None:
    hidden = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[5, -100, 7, 8, -100, -100], [-100] * 6, [-100, 1, 2, 3, 4, 5]])
    rows, target, cu_seqlens = pack_responses(hidden, labels)
    assert target.tolist() == [7, 8, 1, 2, 3, 4, 5]
    assert cu_seqlens.tolist() == [0, 2, 2, 7]
    assert torch.equal(rows, torch.cat([hidden[0, 1:3], hidden[2, 0:5]]))
    rows.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.sum() == 7 * 4


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ragged_vocabularies_and_one_token_responses(backend: str) -> None:
    """verl's kernel was wrong when the block did not divide V."""
    for vocabulary, longest in itertools.product((1, 7, 127, 128, 129, 1031), (1, 5)):
        batch = make_batch(vocabulary=vocabulary, longest=longest, responses=2)
        leaves = batch.leaves("hidden", "weight", "bias")
        results = []
        for name, limit in (("naive", None), (backend, 3_000)):
            output = linear_mopo_loss(
                *batch.loss_arguments(), ref_logprob=batch.ref_logprob, backend=name, max_buffer_bytes=limit
            )
            results.append([output.loss, output.log_ratio, *gradients(output.loss, leaves)])
        for expected, got in zip(*results, strict=True):
            close(got, expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_large_logits_overflow_nowhere(backend: str) -> None:
    batch = make_batch(dtype=torch.float32, scale=40.0)
    leaves = batch.leaves("hidden", "weight", "bias")
    value = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, backend=backend)
    expected = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, backend="naive")
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-2)
    assert all(torch.isfinite(g).all() for g in gradients(value.sum(), leaves))


def test_autocast_gives_the_dtype_of_f_linear_and_gradients_in_the_parameter_dtype() -> None:
    batch = make_batch(dtype=torch.float32)
    leaves = batch.leaves("hidden", "weight", "bias")
    arguments = (batch.hidden, batch.weight, batch.target, batch.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_logprob(*arguments, backend="torch")
        plain = linear_logprob(*arguments, backend="naive")
    cast = linear_logprob(*(t if t.dtype == torch.int64 else t.bfloat16() for t in arguments), backend="torch")
    assert value.dtype == torch.float32
    assert torch.equal(value, cast)
    assert not torch.equal(value, linear_logprob(*arguments, backend="torch"))
    torch.testing.assert_close(value, plain, rtol=0.05, atol=0.2)
    assert all(g.dtype == torch.float32 for g in gradients(value.sum(), leaves))
