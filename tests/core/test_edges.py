"""Uses at the edge of the public functions: inference and meta tensors, upstream gradients that are not finite, the
head of a reference, far-off importance weights, the memory of a softcap."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from counting import peak_bytes, units
from samples import CPU_BACKENDS, Batch, make_batch
from torch import Tensor

from mopo_kernels import (
    DualAscent,
    LinearMOPOLoss,
    linear_logprob,
    linear_mopo_loss,
    linear_sequence_logprob,
    mopo_loss,
    naive,
    pack_responses,
)
from mopo_kernels.arguments import HeadInputs, HeadOptions
from mopo_kernels.backends import availability
from mopo_kernels.backends.cpp import CppBackend, has_native_products
from mopo_kernels.fused import linear_logprob as fused_logprob
from mopo_kernels.fused.buffer_plan import Layout, layout_of, row_chunks
from mopo_kernels.fused.linear_logprob import LinearLogprob, LinearLogprobBackward, saves_logits
from mopo_kernels.fused.pair_groups import Group, closed_groups


def loss_of(batch: Batch, **options: Any) -> Tensor:
    return linear_mopo_loss(*batch.loss_arguments(), **({"ref_logprob": batch.ref_logprob} | options)).loss


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_labels_and_reference_made_in_inference_mode_are_as_good_as_others(backend: str) -> None:
    """Reference log-probabilities are computed under inference_mode as often as not; only what gradients flow through
    may not be an inference tensor, as everywhere in PyTorch."""
    batch = make_batch()
    leaves = batch.leaves("hidden", "weight", "bias")
    expected = torch.autograd.grad(loss_of(batch, backend=backend), leaves)
    with torch.inference_mode():
        for name in ("target", "cu_seqlens", "pairs", "preference", "objective_weight", "ref_logprob"):
            setattr(batch, name, getattr(batch, name).clone())
    loss = loss_of(batch, backend=backend)
    for _ in range(2):
        for got, want in zip(torch.autograd.grad(loss, leaves, retain_graph=True), expected, strict=True):
            assert torch.equal(got, want)
    logprob = linear_sequence_logprob(
        batch.hidden, batch.weight, batch.target, batch.cu_seqlens, batch.bias, backend=backend
    )
    output = mopo_loss(logprob, batch.ref_logprob, batch.pairs, batch.preference, batch.objective_weight)
    for got, want in zip(torch.autograd.grad(output.loss, leaves), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_meta_tensors_give_the_shapes() -> None:
    batch = make_batch(dtype=torch.float32)
    for name in vars(batch):
        setattr(batch, name, getattr(batch, name).to("meta"))
    batch.hidden.requires_grad_()
    loss = loss_of(batch)
    value = linear_sequence_logprob(batch.hidden, batch.weight, batch.target, batch.cu_seqlens, batch.bias)
    (gradient,) = torch.autograd.grad(loss + value.sum(), batch.hidden)
    assert value.shape == batch.ref_logprob.shape
    assert gradient.shape == batch.hidden.shape
    assert gradient.device.type == "meta"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("limit", [1 << 20, 6_000], ids=["whole", "narrow"])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_an_ignored_token_gets_no_gradient_whatever_comes_from_upstream(
    backend: str, limit: int, trained: tuple[str, ...]
) -> None:
    """0 x NaN: a function of the log-probabilities with no derivative at 0 must not reach the tokens not scored."""
    batch = make_batch()
    leaves = batch.leaves(*trained)
    upstream = torch.where(batch.target == -100, torch.nan, 1.0).double()
    results = []
    for name in ("naive", backend):
        value = linear_logprob(
            batch.hidden, batch.weight, batch.target, batch.bias, backend=name, max_buffer_bytes=limit
        )
        results.append(torch.autograd.grad(value, leaves, upstream))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["naive", *CPU_BACKENDS])
def test_the_bias_of_the_reference_is_used_when_its_weight_is_the_policys(backend: str) -> None:
    batch = make_batch()
    hidden, bias = batch.hidden + 0.1, batch.bias * 2 - 1
    logprob = linear_sequence_logprob(hidden, batch.weight, batch.target, batch.cu_seqlens, bias, backend="naive")
    got = loss_of(batch, ref_logprob=None, ref_hidden=hidden, ref_bias=bias, backend=backend)
    torch.testing.assert_close(got, loss_of(batch, ref_logprob=logprob, backend=backend))


WRONG_REFERENCE: dict[str, tuple[dict[str, Any], str]] = {
    "weight without hidden": ({"ref_weight": torch.zeros(37, 16)}, "ref_weight: expected None without ref_hidden"),
    "bias without hidden": ({"ref_bias": torch.zeros(37)}, "ref_bias: expected None without ref_hidden"),
    "hidden dimensions": ({"ref_hidden": torch.zeros(4)}, r"ref_hidden: expected shape \(N, H'\); got \(4,\)"),
    "hidden rows": ({"ref_hidden": torch.zeros(4, 16)}, r"ref_hidden: expected shape \(N, H'\) = \(59, 16\); got"),
    "hidden dtype": ({"ref_hidden": torch.zeros(59, 16).long()}, "ref_hidden: expected dtype float32.*; got int64"),
    "weight dimensions": (
        {"ref_hidden": torch.zeros(59, 16), "ref_weight": torch.zeros(16)},
        r"ref_weight: expected shape \(V, H'\); got \(16,\)",
    ),
    "weight dtype": ({"ref_hidden": torch.zeros(59, 16)}, "ref_weight: expected dtype float32; got float64"),
    "weight vocabulary": (
        {"ref_hidden": torch.zeros(59, 16), "ref_weight": torch.zeros(30, 16)},
        r"ref_weight: expected shape \(V, H'\) = \(37, 16\); got \(30, 16\)",
    ),
    "weight transposed": (
        {"ref_hidden": torch.zeros(59, 16), "ref_weight": torch.zeros(16, 37)},
        r"ref_weight: expected shape \(V, H'\) = \(37, 16\); got \(16, 37\)",
    ),
    "hidden columns": ({"ref_hidden": torch.zeros(59, 8)}, r"ref_hidden: expected shape \(N, H'\) = \(59, 16\); got"),
    "bias shape": (
        {"ref_hidden": torch.zeros(59, 8), "ref_weight": torch.zeros(37, 8), "ref_bias": torch.zeros(3)},
        r"ref_bias: expected shape \(V,\) = \(37,\); got \(3,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG_REFERENCE)
def test_a_wrong_argument_of_the_reference_is_named_as_such(case: str) -> None:
    options, message = WRONG_REFERENCE[case]
    batch = make_batch()
    if "ref_hidden" in options:
        options = options | {"ref_logprob": None}
    with pytest.raises(ValueError, match=message):
        loss_of(batch, **options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_ratio": -1.0}, "max_ratio: expected a number in 1 .. 1e.10; got -1.0"),
        ({"softcap": -1.0}, "softcap: expected a number in 1e-10 .. 100000; got"),
        ({"logit_scale": float("nan")}, "logit_scale: expected a number in -1e.10 .. 1e.10; got nan"),
        ({"temperature": 0.0}, "temperature: expected a number in 1e-10 .. 1e.10; got"),
        ({"max_buffer_bytes": 1e6}, "max_buffer_bytes: expected an integer; got 1000000.0"),
        ({"tau": "0.1"}, "tau: expected a number; got '0.1'"),
        ({"max_buffer_bytes": 0}, "max_buffer_bytes: expected a positive number; got 0"),
        ({"backend": "tpu"}, "backend: expected one of auto, naive, torch, cpp, triton, cuda; got 'tpu'"),
    ],
    ids=str,
)
def test_the_module_refuses_a_wrong_option_when_it_is_made(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearMOPOLoss(**option)


def test_a_margin_that_is_not_finite_is_refused() -> None:
    batch = make_batch()
    margin = torch.zeros(12)
    margin[3] = torch.nan
    with pytest.raises(ValueError, match=r"margin: expected a number in -1e\+10 .. 1e\+10; got nan at index 3"):
        loss_of(batch, loss_type="sigmoid", margin=margin)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_importance_weights_far_from_one_still_measure_every_objective(shift: float) -> None:
    """exp(-300) is 0 in fp32: a batch whose responses have all become unlikely must not count as unlabelled."""
    batch = make_batch(dtype=torch.float32)
    output = mopo_loss(
        batch.ref_logprob + shift,
        batch.ref_logprob,
        batch.pairs,
        batch.preference,
        batch.objective_weight,
        estimator="snis",
    )
    at_reference = mopo_loss(
        batch.ref_logprob, batch.ref_logprob, batch.pairs, batch.preference, batch.objective_weight, estimator="snis"
    )
    assert (output.labelled > 0).all()
    torch.testing.assert_close(output.satisfaction, at_reference.satisfaction)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_a_graph_that_is_dropped_frees_the_gradients_it_held(trained: tuple[str, ...]) -> None:
    """Without a garbage collection: a reference cycle would keep dweight of a dropped step alive beside the next."""
    batch = make_batch()
    batch.leaves(*trained)
    gc.collect()
    gc.disable()
    try:
        loss = loss_of(batch)
        value = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias)
        assert value.grad_fn is not None
        nodes = [weakref.ref(node) for node in (loss.grad_fn, value.grad_fn.next_functions[0][0])]
        del loss, value
        assert [node() for node in nodes] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_a_softcap_needs_no_more_memory_than_the_buffer(backend: str, trained: tuple[str, ...]) -> None:
    """Its slope is a temporary beside the tile; the last block's must be gone before the next one's is made."""
    batch = make_batch(prompts=12, responses=4, longest=9, hidden=64, vocabulary=2003, dtype=torch.float32)
    leaves, limit = batch.leaves(*trained), 1_200_000

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(batch, backend=backend, max_buffer_bytes=limit, softcap=3.0), leaves)

    call()
    peak, _ = peak_bytes(call)
    small = 96 * batch.hidden.shape[0] + 512 * batch.pairs.shape[0] + 8 * batch.bias.numel() + 4096
    assert peak <= limit + sum(4 * t.numel() for t in leaves) + small


def test_a_threshold_that_was_met_once_is_not_reported_with_that_value_as_the_best_seen() -> None:
    """ "cannot be met: best seen 0.7" about a threshold of 0.6 would contradict itself."""
    dual = DualAscent(["helpful", "plain"], "helpful", {"plain": 0.6}, lr=100.0, maximum=2.0, patience=2)
    for value in (0.7, 0.3, 0.4, 0.2):
        dual.update([0.5, value], [1.0, 1.0])
    (unmet,) = dual.unmet()
    assert unmet.best_seen == pytest.approx(0.4)


@pytest.mark.parametrize("options", [{"loss_type": "cloning"}, {"estimator": "closed_form"}, {}], ids=str)
def test_a_pair_of_responses_to_different_prompts_is_refused_where_prompts_are_told(options: dict[str, Any]) -> None:
    batch = make_batch()
    batch.pairs[4, 1] = 11
    with pytest.raises(ValueError, match=r"pairs: expected responses to one prompt, as prompt_index has it; got 3 at"):
        loss_of(batch, prompt_index=batch.prompt_index, **options)


def test_only_what_is_longer_than_the_buffer_is_recomputed() -> None:
    lengths = [2, 1, 9, 9, 1, 2, 3, 1]
    pairs = [[0, 1], [3, 2], [5, 4], [6, 7]]
    groups = closed_groups(pairs, lengths, largest=7)
    assert [(g.sequences, g.one_chunk) for g in groups] == [([0, 1], True), ([2, 3], False), ([4, 5, 6, 7], True)]


def test_rows_of_a_group_are_as_few_ranges_as_possible() -> None:
    first = [0, 2, 2, 5, 9, 10]
    assert Group([0, 1, 2], one_chunk=True).row_ranges(first) == [(0, 5)]
    assert Group([4, 0, 3], one_chunk=True).row_ranges(first) == [(0, 2), (5, 10)]
    assert Group([1], one_chunk=True).row_ranges(first) == []


def test_cloning_without_pairs_is_plain_cloning_of_the_data() -> None:
    batch = make_batch()
    logprob = batch.ref_logprob.clone().requires_grad_()
    output = mopo_loss(
        logprob,
        batch.ref_logprob,
        batch.pairs[:0],
        batch.preference[:0],
        batch.objective_weight,
        loss_type="cloning",
        prompt_index=batch.prompt_index,
    )
    torch.testing.assert_close(output.loss, -logprob.mean())


@pytest.mark.parametrize("limit", [1 << 20, 90_000, 20_000, 4_000])
def test_a_frozen_head_costs_two_products_whatever_the_buffer(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(vocabulary=300)
    batch.leaves("hidden")
    options: dict[str, Any] = {"backend": "torch", "max_buffer_bytes": limit}
    got = units(
        lambda: linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, **options).sum(),
        batch,
        monkeypatch,
    )
    assert got == pytest.approx(2.0)


@pytest.mark.parametrize("spread", [1.0, 60.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("limit", [200_000, 20_000, 5_000])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_gradient_streamed_over_the_vocabulary_is_as_exact_as_one_of_whole_rows(
    backend: str, limit: int, softcap: float | None, spread: float
) -> None:
    """Rows whose largest logit is in the first tile, in the last, and is the target, all but certain, or not."""
    generator = torch.Generator().manual_seed(0)
    rows, size, vocabulary = 70, 16, 501
    hidden = torch.randn(rows, size, generator=generator) * spread
    weight = torch.randn(vocabulary, size, generator=generator) / size**0.5
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    target[::3] = (hidden @ weight.T).argmax(dim=1)[::3]
    target[5] = -100
    weight[-1], weight[0], target[6], target[7] = hidden[6] / spread, hidden[7] / spread, vocabulary - 1, 0

    def gradient(dtype: torch.dtype, **options: Any) -> Tensor:
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        value = linear_logprob(leaf, weight.to(dtype), target, softcap=softcap, **options)
        (result,) = torch.autograd.grad(value, leaf, torch.linspace(-1, 1, rows, dtype=dtype))
        return result.double()

    exact = gradient(torch.float64, backend="naive")
    double = gradient(torch.float64, backend=backend, max_buffer_bytes=2 * limit)
    torch.testing.assert_close(double, exact, rtol=1e-11, atol=1e-13)
    plain = (gradient(torch.float32, backend="naive") - exact).norm()
    streamed = (gradient(torch.float32, backend=backend, max_buffer_bytes=limit) - exact).norm()
    assert streamed <= 1.5 * plain + 1e-7 * exact.norm()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_weight_without_unit_stride_is_copied_within_the_buffer(backend: str) -> None:
    batch = make_batch(prompts=12, responses=4, longest=9, hidden=64, vocabulary=2003, dtype=torch.float32)
    weight = torch.stack([batch.weight, batch.weight], dim=-1)[..., 0]
    assert 1 not in weight.stride()
    (hidden,) = batch.leaves("hidden")
    limit = 1 << 20

    def call(head: Tensor) -> tuple[Tensor, ...]:
        value = linear_logprob(hidden, head, batch.target, batch.bias, backend=backend, max_buffer_bytes=limit)
        return torch.autograd.grad(value.sum(), hidden)

    torch.testing.assert_close(call(weight), call(batch.weight))
    peak, _ = peak_bytes(lambda: call(weight))
    assert peak <= limit + 4 * hidden.numel() + 96 * hidden.shape[0] + 8 * batch.bias.numel() + 4096


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="the C++ extension is not built")
def test_threads_may_change_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the products' threads take, in bf16, may leave backward no room for what forward kept for it."""
    if not has_native_products(torch.bfloat16):
        pytest.skip("this processor multiplies bf16 in fp32")
    batch = make_batch(prompts=1, responses=2, longest=2, hidden=8, vocabulary=20_000, dtype=torch.bfloat16)
    leaves = batch.leaves("hidden", "weight")

    def gradients(limit: int, *scratch: int) -> tuple[Tensor, ...]:
        for bytes_ in scratch:
            monkeypatch.setattr(CppBackend, "product_scratch", lambda *_, bytes_=bytes_: bytes_)
            if bytes_ == scratch[0]:
                value = linear_logprob(batch.hidden, batch.weight, batch.target, max_buffer_bytes=limit)
        return torch.autograd.grad(value.sum(), leaves)

    limit = 1_000_000
    inputs = HeadInputs(batch.hidden[:3], batch.weight, batch.target[:3]).with_needs()
    assert saves_logits(inputs, HeadOptions(backend="cpp", max_buffer_bytes=limit))
    for got, want in zip(gradients(limit, 60_000, 120_000), gradients(64 << 20, 60_000), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_the_least_buffer_that_an_error_names_is_enough() -> None:
    batch = make_batch(prompts=2, responses=4, hidden=64, dtype=torch.float32)
    batch.target = batch.target.clamp(min=0)
    batch.pairs = torch.tensor([[0, 2], [1, 3], [4, 6], [5, 7]] * 3)  # rows of a pair do not follow one another
    leaves = batch.leaves("hidden", "weight")
    for changed in ({}, {"ref_hidden": batch.hidden.detach() + 1, "ref_logprob": None}):
        options = {**batch.loss_options("regression"), **changed}
        with pytest.raises(ValueError, match="max_buffer_bytes: expected at least") as error:
            linear_mopo_loss(*batch.loss_arguments(), **options, max_buffer_bytes=64)
        least = int(str(error.value).split("at least ")[1].split()[0])
        torch.autograd.grad(linear_mopo_loss(*batch.loss_arguments(), **options, max_buffer_bytes=least).loss, leaves)


@pytest.mark.parametrize("scale", [2.0**20, 1.0, 2.0**-30])
def test_fp16_products_stand_loss_scaling(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose products take fp16 factors: simulated by a layout that keeps them, and rounds the tile."""

    def unconverted(*arguments: Any, **options: Any) -> Layout:
        layout = layout_of(*arguments, **options)
        return dataclasses.replace(layout, matmul_dtype=torch.float16, copied=True, converted=False)

    monkeypatch.setattr("mopo_kernels.fused.buffer_plan.layout_of", unconverted)
    batch = make_batch(vocabulary=101, dtype=torch.float16)
    options = HeadOptions(backend="torch", max_buffer_bytes=100_000)
    inputs = HeadInputs(batch.hidden, batch.weight, batch.target, batch.bias, True, True, True)
    logprob, logsumexp, *_ = fused_logprob.linear_logprob(*LinearLogprob(inputs, options).flatten())
    ignored = batch.target == -100
    up = torch.linspace(-1, 1, logprob.shape[0]).where(~ignored, torch.inf)
    nothing = logprob[:0]
    upstream = LinearLogprobBackward(up * scale, inputs, logprob, logsumexp, nothing, nothing, options)
    got = fused_logprob.linear_logprob_backward(*upstream.flatten())
    leaves = [t.double().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
    oracle = linear_logprob(leaves[0], leaves[1], batch.target, leaves[2], backend="naive")
    for result, want in zip(got, torch.autograd.grad(oracle, leaves, up.where(~ignored, 0).double()), strict=True):
        assert (result.double() / scale - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_kept_products_and_what_turns_them_into_gradients_share_the_buffer(backend: str) -> None:
    batch = make_batch(prompts=12, responses=4, longest=9, hidden=64, vocabulary=2003, dtype=torch.float32)
    leaves = batch.leaves("hidden", "weight", "bias")
    limit = batch.hidden.shape[0] * 2003 * 4 * 4 // 3 + 4
    inputs = HeadInputs(batch.hidden, batch.weight, batch.target, batch.bias).with_needs()
    assert saves_logits(inputs, HeadOptions(backend=backend, max_buffer_bytes=limit))

    def call() -> tuple[Tensor, ...]:
        value = linear_logprob(
            batch.hidden, batch.weight, batch.target, batch.bias, backend=backend, max_buffer_bytes=limit
        )
        return torch.autograd.grad(value.sum(), leaves)

    call()
    peak, _ = peak_bytes(call)
    small = 96 * batch.hidden.shape[0] + 8 * batch.bias.numel() + 4096
    assert peak <= limit + sum(4 * t.numel() for t in leaves) + small


@pytest.mark.parametrize("fused", [False, True], ids=["mopo_loss", "linear_mopo_loss"])
def test_the_losses_refuse_gradients_of_gradients_as_well(fused: bool) -> None:
    batch = make_batch()
    (leaf,) = batch.leaves("hidden" if fused else "ref_logprob")
    labels = (batch.pairs, batch.preference, batch.objective_weight)
    ref_logprob = batch.ref_logprob.detach()
    loss = loss_of(batch) if fused else mopo_loss(leaf, ref_logprob, *labels).loss
    (gradient,) = torch.autograd.grad(loss.square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_frozen_ratio_is_capped_and_its_effective_sample_size_reported() -> None:
    """Numbers by hand: two prompts of two responses, the first of each always preferred, tau 1: rho = 2 sig(+-1)."""
    high, low = 2 / (1 + torch.e**-1), 2 / (1 + torch.e)
    logprob = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    arguments = (torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 1, dtype=torch.float64), torch.ones(1))
    options: dict[str, Any] = {"loss_type": "cloning", "tau": 1.0, "prompt_index": torch.tensor([5, 5, 2, 2])}
    for cap, top in ((None, high), (1.2, 1.2)):
        output = mopo_loss(logprob, torch.zeros_like(logprob), *arguments, max_ratio=cap, **options)
        assert output.loss.item() == pytest.approx((4 * top + 6 * low) / 4)
        assert output.effective_sample_size.item() == pytest.approx(
            (2 * top + 2 * low) ** 2 / (2 * top**2 + 2 * low**2)
        )


def test_a_response_without_a_label_counts_as_parity_in_the_frozen_ratio() -> None:
    got = naive.policy_ratio(
        torch.ones(1, 1), torch.tensor([[0, 1]]), torch.ones(1), 1.0, torch.zeros(3, dtype=torch.int64)
    )
    torch.testing.assert_close(got, 3 * torch.softmax(torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), 0))


@pytest.mark.parametrize("fused", [False, True], ids=["mopo_loss", "linear_mopo_loss"])
def test_a_normalizer_of_zero_counts_as_one(fused: bool) -> None:
    batch = make_batch()
    labels = (batch.pairs, batch.preference, batch.objective_weight)
    zero, one = (
        loss_of(batch, normalizer=value)
        if fused
        else mopo_loss(batch.ref_logprob * 2, batch.ref_logprob, *labels, normalizer=value).loss
        for value in (0.0, 1.0)
    )
    assert zero == one > 0


def test_a_missing_label_is_a_tie_to_the_regression_and_nothing_to_the_others() -> None:
    """As the docstring says. The pair without a label has margin 1, the other 2 and target 1/2."""
    logprob = torch.tensor([1.0, 0.0, 2.0, 0.0], requires_grad=True)
    pairs = torch.tensor([[0, 1], [2, 3]])

    def loss(label: float, loss_type: str, **options: Any) -> tuple[float, list[float]]:
        preference = torch.tensor([[label], [1.0]])
        output = mopo_loss(
            logprob, torch.zeros(4), pairs, preference, torch.ones(1), tau=1.0, loss_type=loss_type, **options
        )
        return output.loss.item(), torch.autograd.grad(output.loss, logprob)[0].tolist()

    nan = float("nan")
    assert loss(nan, "regression") == loss(0.5, "regression") == ((1.0 + 1.5**2) / 2, [1.0, -1.0, 1.5, -1.5])
    # One label in two: what there is counts twice, so that the mean target is that of full labels.
    assert loss(nan, "regression", label_rate=torch.tensor([0.5]))[0] == (1.0 + 1.0) / 2
    assert loss(nan, "sigmoid")[1][:2] == [0.0, 0.0]
    assert loss(0.5, "sigmoid")[1][0] > 0


def test_packing_takes_any_ignore_index() -> None:
    rows, target, cu_seqlens = pack_responses(torch.zeros(1, 4, 2), torch.tensor([[-1, 3, -1, 5]]), ignore_index=-1)
    assert (len(rows), target.tolist(), cu_seqlens.tolist()) == (2, [3, 5], [0, 2])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_a_unit_stride_are_as_good_as_others(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch(dtype=dtype, hidden=32)
    target = batch.target.clamp(min=0)
    hidden, weight = batch.hidden[:, ::2], batch.weight[:, ::2]
    expected = linear_logprob(hidden.contiguous(), weight.contiguous(), target, backend=backend)
    for h, w in ((hidden, weight.contiguous()), (hidden.contiguous(), weight), (hidden, weight)):
        torch.testing.assert_close(linear_logprob(h, w, target, backend=backend), expected, rtol=1e-5, atol=1e-5)


def test_hidden_states_of_size_zero_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"hidden: expected shape \(\.\.\., H\); got \(3, 0\)"):
        linear_logprob(torch.zeros(3, 0), torch.zeros(5, 0), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("multiple", [1, 8, 128])
def test_chunks_of_rows_are_the_fewest_that_fit_and_fill_the_blocks_of_products(multiple: int) -> None:
    for count, largest in itertools.product((0, 1, 7, 127, 128, 129, 1000, 8192, 8193), (1, 5, 128, 130, 300, 4096)):
        found = list(row_chunks(count, largest, multiple))
        sizes = [stop - start for start, stop in found]
        assert [0, *(stop for _, stop in found)] == [*(start for start, _ in found), count]
        assert all(0 < size <= largest for size in sizes)
        assert len(sizes) == -(-count // largest)
        # Where blocks are wasted, it is because a chunk that wastes none would be too large.
        if any(size % multiple for size in sizes[:-1]):
            assert multiple > largest - max(sizes)
        elif sizes:
            assert max(sizes) < count / len(sizes) + multiple


def test_rows_for_the_fused_product_go_in_whole_blocks() -> None:
    assert list(row_chunks(10_000, 4_200, 128)) == [(0, 3_456), (3_456, 6_784), (6_784, 10_000)]
    assert list(row_chunks(10_000, 4_200)) == [(0, 3_333), (3_333, 6_666), (6_666, 10_000)]


@pytest.mark.parametrize("trained", [("weight",), ("hidden",), ("hidden", "weight", "bias")], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "triton"])
def test_memory_that_nobody_wrote_is_not_read(backend: str, dtype: torch.dtype, trained: tuple[str, ...]) -> None:
    """Not where tokens are ignored, responses empty or without pairs, nor in chunks of a few rows."""
    if backend == "triton" and availability()["triton"] is not None:
        pytest.skip(str(availability()["triton"]))
    batch = make_batch(prompts=3, responses=3, longest=5, hidden=8, dtype=dtype)
    leaves = {name: getattr(batch, name).requires_grad_() for name in trained}
    batch = dataclasses.replace(batch, **leaves)

    def call() -> list[Tensor]:
        options = {**batch.loss_options("regression"), "backend": backend, "max_buffer_bytes": 4096}
        # The last prompt's responses are in no pair.
        options["pair_weight"] = batch.pair_weight[:-3]
        pairs = {"pairs": batch.pairs[:-3], "preference": batch.preference[:-3]}
        output = linear_mopo_loss(*dataclasses.replace(batch, **pairs).loss_arguments(), **options)
        return [*(x.detach() for x in output), *torch.autograd.grad(output.loss, list(leaves.values()))]

    expected = call()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        found = call()
    finally:
        torch.use_deterministic_algorithms(False)
    for value, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, equal_nan=True)
    assert all(bool(x.isfinite().all()) for x in expected[-len(leaves) :])
