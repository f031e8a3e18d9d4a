"""The mistakes of other libraries' loss kernels and of their integrations, each as a property that holds here.

Every test names the property and, in its docstring, who got it wrong; most show beside it what the mistake would give,
so that the test is known to see it. Two ranks run this file as a script.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import peak_bytes, units
from samples import CPU_BACKENDS, Batch, make_batch
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_samples import batch_of, gradients, lora, make_data, make_model, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from mopo_kernels import (
    LinearMOPOLoss,
    backends,
    linear_logprob,
    linear_mopo_loss,
    linear_sequence_logprob,
    mopo_loss,
    naive,
    pack_responses,
)
from mopo_kernels.naive import ESTIMATORS, LOSS_TYPES
from mopo_kernels.trainer import MOPOConfig

ROOT = Path(__file__).parents[2]
# What runs on a CPU at full speed; Triton's interpreter is tested with its kernels.
HIDDEN_SIZE, LARGE_VOCABULARY = 16, 20_011


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


def sequence_logprob(batch: Batch, **options: Any) -> Tensor:
    return linear_sequence_logprob(batch.hidden, batch.weight, batch.target, batch.cu_seqlens, batch.bias, **options)


def loss_of(batch: Batch, **options: Any) -> Tensor:
    return linear_mopo_loss(*batch.loss_arguments(), **({"ref_logprob": batch.ref_logprob} | options)).loss


def folds(patch: pytest.MonkeyPatch, backend: str) -> list[int]:
    """A list that grows by the rows of every tile that ``backend`` folds from now on."""
    served = type(backends.tile_backend(backend))
    original, seen = served.lse_fwd, []

    def counting(self: Any, tile: Tensor, *arguments: Any, **options: Any) -> None:
        seen.append(tile.shape[0])
        original(self, tile, *arguments, **options)

    patch.setattr(served, "lse_fwd", counting)
    return seen


# ---------------------------------------------------------------------------------------------------- the op: numbers


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_log_probabilities_are_right_and_never_positive_when_no_block_divides_the_vocabulary(backend: str) -> None:
    """verl: columns past the vocabulary's end entered the log-sum-exp, with log-probabilities of up to +123."""
    for vocabulary, limit in itertools.product((1, 2, 37, 127, 129, 1000, 1025), (3_000, 9_000, 1 << 20)):
        batch = make_batch(vocabulary=vocabulary, scale=2.0)
        options: dict[str, Any] = {"backend": backend, "max_buffer_bytes": limit}
        got = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, **options)
        arguments = (batch.hidden, batch.weight, batch.target, batch.bias)
        close(got, naive.linear_logprob(*arguments))
        assert (got <= 0).all()
    # What a block of 128 columns would read beyond 37 of them, were it not masked.
    batch = make_batch(vocabulary=37, scale=0.5)
    padded = F.pad(batch.weight, (0, 0, 0, 128 - 37))
    wrong = naive.linear_logprob(batch.hidden, padded, batch.target)
    assert (wrong - naive.linear_logprob(batch.hidden, batch.weight, batch.target)).abs().max() > 0.1


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("trained", [("bias",), ("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_the_bias_enters_before_scale_and_cap_and_gets_its_gradient(backend: str, trained: tuple[str, ...]) -> None:
    """CCE: its bias path gave wrong results."""
    batch = make_batch()
    leaves = batch.leaves(*trained)
    head: dict[str, Any] = {"softcap": 3.0, "logit_scale": 0.6, "temperature": 1.4}
    for limit in (3_000, 1 << 20):
        options = {**head, "backend": backend, "max_buffer_bytes": limit}
        token = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, **options)
        expected = naive.linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, **head)
        close(token, expected)
        for got, want in zip(
            torch.autograd.grad(token.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            close(got, want)
        loss, want_loss = loss_of(batch, **options), loss_of(batch, **head, backend="naive")
        for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want_loss, leaves), strict=True):
            close(got, want)
    without = naive.linear_logprob(batch.hidden, batch.weight, batch.target, **head)
    late = naive.linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias / 0.6, **head)
    assert (expected - without).abs().max() > 0.1
    assert (expected - late).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["naive", *CPU_BACKENDS])
@pytest.mark.parametrize("limit", [4_000, 1 << 20], ids=["narrow", "whole"])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_a_batch_without_a_scored_token_gives_a_differentiable_zero(
    backend: str, limit: int, trained: tuple[str, ...]
) -> None:
    """Liger: NaN, a mean over no token; or a constant without a graph, so that backward failed."""
    batch = make_batch()
    batch.target.fill_(-100)
    leaves = batch.leaves(*trained)
    options: dict[str, Any] = {"backend": backend, "max_buffer_bytes": limit}
    token = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, **options)
    assert torch.equal(token, torch.zeros_like(token))
    logprob = sequence_logprob(batch, **options)
    labels = (batch.pairs, batch.preference, batch.objective_weight)
    losses = [mopo_loss(logprob, batch.ref_logprob, *labels).loss]
    losses += [loss_of(batch, loss_type=kind, prompt_index=batch.prompt_index, **options) for kind in LOSS_TYPES]
    for value in (token.sum(), logprob.sum(), *losses):
        assert torch.isfinite(value)
        for gradient in torch.autograd.grad(value, leaves, retain_graph=True):
            assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.isnan(token.sum() / (batch.target != -100).sum()), "what a mean over no token would have given"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_response_without_a_scored_token_leaves_the_others_as_they_are(backend: str) -> None:
    """Liger: one all-masked sequence made the whole batch NaN."""
    batch = make_batch()
    leaves = batch.leaves("hidden", "weight", "bias")
    batch.target[int(batch.cu_seqlens[4]) : int(batch.cu_seqlens[5])] = -100
    assert (sequence_logprob(batch)[4] == 0).all()
    for limit in (4_000, 24_000, 1 << 20):
        results = [
            torch.autograd.grad(loss_of(batch, backend=name, max_buffer_bytes=limit), leaves)
            for name in ("naive", backend)
        ]
        for expected, got in zip(*results, strict=True):
            assert torch.isfinite(got).all()
            close(got, expected)


def test_a_model_gets_zero_gradients_from_a_batch_without_a_scored_token(tmp_path: Path) -> None:
    """Liger in TRL: such a batch had no gradient at all, which under DDP leaves the other ranks waiting."""
    trainer = make_trainer(tmp_path, make_model(dtype=torch.float64))
    batch = batch_of(trainer)
    batch["labels"].fill_(-100)
    loss = trainer.model(**batch, objective_weight=trainer.dual.weight)["loss"]
    assert torch.isfinite(loss)
    for value in gradients(trainer.model, loss).values():
        assert value is not None
        assert not value.any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("limit", [4_000, 1 << 20], ids=["recomputed", "kept"])
def test_weights_of_rows_are_applied_before_the_weights_gradient_is_summed(backend: str, limit: int) -> None:
    """Liger with reduction="none": dweight was summed over the rows and only then multiplied by what came back."""
    batch = make_batch()
    leaves = batch.leaves("weight", "bias")
    upstream = torch.linspace(-2.0, 3.0, batch.target.shape[0], dtype=torch.float64)
    arguments = (batch.hidden, batch.weight, batch.target, batch.bias)
    token = linear_logprob(*arguments, backend=backend, max_buffer_bytes=limit)
    got = torch.autograd.grad(token, leaves, upstream, retain_graph=True)
    expected = torch.autograd.grad(naive.linear_logprob(*arguments), leaves, upstream)
    summed_first = torch.autograd.grad(token, leaves, torch.ones_like(upstream))
    for value, want, wrong in zip(got, expected, summed_first, strict=True):
        close(value, want)
        assert (wrong * upstream.mean() - want).norm() > 0.1 * want.norm()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_logits_beyond_the_range_of_fp16_overflow_nowhere(backend: str) -> None:
    """Liger: products in fp16 became inf, and NaN after the softmax."""
    batch = make_batch(hidden=64, dtype=torch.float16, scale=60.0)
    assert torch.isinf(batch.hidden @ batch.weight.T).any()
    leaves = batch.leaves("hidden", "weight", "bias")
    truth = [t.detach().double().requires_grad_() for t in leaves]
    for limit in (40_000, 1 << 20):
        arguments = (batch.hidden, batch.weight, batch.target, batch.bias)
        token = linear_logprob(*arguments, backend=backend, max_buffer_bytes=limit)
        expected = naive.linear_logprob(truth[0], truth[1], batch.target, truth[2])
        assert expected.min() < -66_000
        torch.testing.assert_close(token.double(), expected, rtol=1e-5, atol=0.1)
        for got, want in zip(
            torch.autograd.grad(token.sum(), leaves), torch.autograd.grad(expected.sum(), truth), strict=True
        ):
            assert torch.isfinite(got).all()
            assert (got.double() - want).norm() < 2e-3 * want.norm()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_scaled_loss_gives_fp16_gradients_that_the_loss_itself_would_lose(backend: str) -> None:
    """Gradients held in fp16 before the loss scale is applied: each below 6e-8 is gone, the loss scale too late."""
    batch = make_batch(hidden=64, dtype=torch.float16, scale=64**-0.25)
    leaves = batch.leaves("hidden", "weight", "bias")
    scale, normalizer = 2.0**24, 1e8
    truth = make_batch(hidden=64, dtype=torch.float16, scale=64**-0.25)
    for name in ("hidden", "weight", "bias", "ref_logprob"):
        setattr(truth, name, getattr(truth, name).double())
    exact = truth.leaves("hidden", "weight", "bias")
    expected = torch.autograd.grad(loss_of(truth, normalizer=normalizer), exact)
    loss = loss_of(batch, backend=backend, normalizer=normalizer)
    for got, want in zip(torch.autograd.grad(loss * scale, leaves), expected, strict=True):
        assert torch.isfinite(got).all()
        assert (got.double() / scale - want).norm() < 2e-3 * want.norm()
        assert (want.half().double() - want).norm() > 0.01 * want.norm(), "too large to show what fp16 loses"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("limit", [12_000, 30_000], ids=["vocabulary tiled", "whole rows"])
@pytest.mark.parametrize("path", ["one pass", "any loss"])
def test_the_weights_gradient_of_many_bf16_chunks_is_rounded_once(
    backend: str, limit: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger and verl: dweight was accumulated over the chunks in bf16, each sum rounded."""
    batch = make_batch(prompts=96, responses=4, longest=8, hidden=24, vocabulary=61, dtype=torch.bfloat16)
    leaves = batch.leaves("hidden", "weight", "bias")
    rows = int((batch.target != -100).sum())

    def run(tensors: list[Tensor], name: str) -> tuple[Tensor, ...]:
        for field, tensor in zip(("hidden", "weight", "bias"), tensors, strict=True):
            setattr(batch, field, tensor)
        options: dict[str, Any] = {"backend": name, "max_buffer_bytes": limit, "temperature": 3.0}
        if path == "one pass":
            value = loss_of(batch, **options)
        else:
            value = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, **options).square().sum()
        return torch.autograd.grad(value, tensors)

    truth = run([t.detach().double().requires_grad_() for t in leaves], "naive")
    seen = folds(monkeypatch, backend)
    got = run(leaves, backend)
    assert len(seen) >= 24, "too few chunks to show"
    for value, want in zip(got, truth, strict=True):
        rounding = (want.bfloat16().double() - want).norm()
        assert (value.double() - want).norm() <= 1.1 * rounding
    # The mistake, on the true gradient of every 16 rows.
    scored = (batch.target != -100).nonzero()[:, 0]
    weight = leaves[1].detach().double().requires_grad_()
    total, exact = torch.zeros_like(leaves[1]), torch.zeros_like(weight)
    for part in scored.split(rows // 48):
        value = naive.linear_logprob(batch.hidden.double()[part], weight, batch.target[part])
        (share,) = torch.autograd.grad(value.sum(), weight)
        total, exact = total + share.bfloat16(), exact + share
    assert (total.double() - exact).norm() > 3 * (exact.bfloat16().double() - exact).norm()


@pytest.mark.parametrize("backend", ["naive", *CPU_BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_are_fp32_for_half_precision_input(backend: str, dtype: torch.dtype) -> None:
    """verl: log-probabilities came back in bf16, off by up to 1/16 nats a token near -11 nats."""
    batch = make_batch(hidden=16, vocabulary=509, dtype=dtype, scale=0.5)
    scored = batch.target != -100
    arguments = (batch.hidden, batch.weight, batch.target, batch.bias)
    for trained in (False, True):
        batch.hidden.requires_grad_(trained)
        token = linear_logprob(*arguments, backend=backend).detach()
        output = linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, backend=backend)
        assert sequence_logprob(batch, backend=backend).dtype == torch.float32
        assert token.dtype == torch.float32
        assert all(tensor.dtype == torch.float32 for tensor in output)
        assert (token[scored] != token[scored].to(dtype)).float().mean() > 0.9, "rounded on the way"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_logprob(*(t.float() if t.is_floating_point() else t for t in arguments)).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ the op: cost


@pytest.mark.parametrize("path", ["one pass", "any loss"])
def test_a_frozen_head_costs_no_product_and_no_memory_for_its_gradient(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger's fused cross-entropy: dweight was computed for a head that was frozen (LoRA)."""
    limit = 1_000_000

    def value(batch: Batch, backend: str) -> Tensor:
        if path == "one pass":
            return loss_of(batch, backend=backend, max_buffer_bytes=limit)
        return sequence_logprob(batch, backend=backend, max_buffer_bytes=limit).sum()

    small = make_batch()
    small.leaves("hidden")
    with monkeypatch.context() as patch:
        assert units(lambda: value(small, "torch"), small, patch) == pytest.approx(2.0)
    batch = make_batch(prompts=2, hidden=64, vocabulary=LARGE_VOCABULARY, dtype=torch.float32)
    for backend in CPU_BACKENDS:
        peaks = {}
        for trained in (("hidden",), ("hidden", "weight")):
            batch.weight.requires_grad_(False)
            leaves = batch.leaves(*trained)

            def call(leaves: list[Tensor] = leaves, backend: str = backend) -> tuple[Tensor, ...]:
                return torch.autograd.grad(value(batch, backend), leaves)

            call()
            peaks[len(trained)], _ = peak_bytes(call)
        dweight = batch.weight.numel() * 4
        # Beside the buffer: the bias in fp32 and a few tensors of N rows.
        assert peaks[1] <= limit + 8 * LARGE_VOCABULARY + 200_000 < dweight
        assert peaks[2] > dweight


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("path", ["one pass", "any loss"])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_the_buffer_setting_bounds_the_memory_of_training(backend: str, path: str, trained: tuple[str, ...]) -> None:
    """NeMo-RL: its chunk size was used for log-probabilities and ignored in the training path."""
    batch = make_batch(prompts=12, responses=4, hidden=32, vocabulary=4001, dtype=torch.float32)
    leaves = batch.leaves(*trained)
    fixed = sum(4 * leaf.numel() for leaf in leaves) + 8 * batch.bias.numel()
    fixed += 160 * batch.hidden.shape[0] + 512 * batch.pairs.shape[0] + 4096

    def peak(limit: int, name: str = backend) -> int:
        def call() -> tuple[Tensor, ...]:
            options: dict[str, Any] = {"backend": name, "max_buffer_bytes": limit}
            value = loss_of(batch, **options) if path == "one pass" else sequence_logprob(batch, **options).sum()
            return torch.autograd.grad(value, leaves)

        call()
        return peak_bytes(call)[0]

    peaks = {limit: peak(limit) for limit in (200_000, 1_000_000, 3_000_000)}
    for limit, found in peaks.items():
        assert found <= limit + fixed
    assert peaks[3_000_000] > peaks[200_000] + 500_000, "the setting has no effect"
    assert peak(200_000, "naive") > 3_000_000 + fixed, "plain PyTorch would pass too"


def packed_loss(
    weight: Tensor, hidden: Tensor, labels: Tensor, ref_logprob: Tensor, pairs: Tensor, preference: Tensor
) -> Tensor:
    """Compaction and loss of a padded batch, as a trainer would compile them."""
    rows, target, cu_seqlens = pack_responses(hidden, labels)
    labelled = (pairs, preference, torch.ones(2))
    return linear_mopo_loss(rows, weight, target, cu_seqlens, *labelled, ref_logprob=ref_logprob).loss


def padded_batch(seed: int) -> tuple[Tensor, ...]:
    """Another number of rows, of tokens a row and of scored tokens for every seed."""
    g = torch.Generator().manual_seed(seed)
    count, longest = 2 * (seed + 2), 7 + 3 * seed
    labels = torch.randint(0, 37, (count, longest), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.5] = -100
    hidden = torch.randn(count, longest, 8, generator=g).requires_grad_()
    ref_logprob = torch.randn(count, generator=g) - 10
    pairs = torch.arange(count).view(-1, 2)
    return hidden, labels, ref_logprob, pairs, torch.rand(count // 2, 2, generator=g)


def run_compiled(dynamic: bool | None) -> None:
    """Six batches through the compiled loss, which must agree with the eager one, the last four without recompiling."""
    torch._dynamo.reset()
    compiled = torch.compile(packed_loss, backend="aot_eager", dynamic=dynamic)
    weight = torch.randn(37, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for seed in range(6):
        with torch.compiler.set_stance("default" if seed < 2 else "fail_on_recompile"):
            batch = padded_batch(seed)
            results = []
            for function in (compiled, packed_loss):
                loss = function(weight, *batch)
                results.append([loss, *torch.autograd.grad(loss, [weight, batch[0]])])
            for got, want in zip(*results, strict=True):
                torch.testing.assert_close(got, want)


def test_compaction_under_torch_compile_does_not_recompile_for_every_batch() -> None:
    """TRL: 8 to 9 compilations where 0 to 2 would do, the number of scored rows being part of the program."""
    run_compiled(dynamic=None)
    with pytest.raises(RuntimeError, match="recompile"):
        run_compiled(dynamic=False)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- one equation


def full_options(batch: Batch, loss_type: str, estimator: str) -> dict[str, Any]:
    """Every option that goes with ``loss_type``, none at its default."""
    options: dict[str, Any] = {
        "tau": 0.3,
        "loss_type": loss_type,
        "estimator": estimator,
        "pair_weight": batch.pair_weight,
        "length": batch.length,
        "prompt_index": batch.prompt_index,
        "normalizer": 7.0,
    }
    if loss_type == "cloning":
        return options | {"max_ratio": 1.3}
    options["label_rate"] = torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
    return options | ({"margin": batch.pair_weight - 1} if loss_type == "sigmoid" else {})


def paths(batch: Batch, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Every public way to the loss of a batch."""
    labels = (batch.ref_logprob, batch.pairs, batch.preference, batch.objective_weight)
    fixed = {k: v for k, v in options.items() if k in ("tau", "loss_type", "estimator", "max_ratio")}
    given = {k: v for k, v in options.items() if k not in fixed}
    ways: dict[str, Callable[[], Any]] = {
        "naive": lambda: mopo_loss(sequence_logprob(batch, backend="naive"), *labels, **options),
    }
    for backend in CPU_BACKENDS:
        ways[f"composed, {backend}"] = lambda b=backend: mopo_loss(
            sequence_logprob(batch, backend=b), *labels, **options
        )
        for name, limit in (("whole", 1 << 20), ("chunks", 24_000), ("recomputed", 4_000)):
            ways[f"one pass, {backend}, {name}"] = lambda b=backend, m=limit: linear_mopo_loss(
                *batch.loss_arguments(), ref_logprob=batch.ref_logprob, backend=b, max_buffer_bytes=m, **options
            )
        ways[f"module, {backend}"] = lambda b=backend: LinearMOPOLoss(backend=b, **fixed)(
            *batch.loss_arguments(), ref_logprob=batch.ref_logprob, **given
        )
    return ways


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_path_has_the_loss_and_the_gradients_of_the_one_equation(loss_type: str, estimator: str) -> None:
    """TRL threw Liger's copy of its losses out because the two had drifted apart."""
    for seed in range(3):
        batch = make_batch(seed=seed, responses=2 + seed)
        leaves = batch.leaves("hidden", "weight", "bias")
        options = full_options(batch, loss_type, estimator)
        token = naive.linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias)
        expected = naive.mopo_loss(
            naive.segment_sum(token, batch.cu_seqlens),
            *(batch.ref_logprob, batch.pairs, batch.preference, batch.objective_weight),
            **options,
        )
        wanted = [*expected, *torch.autograd.grad(expected.loss, leaves)]
        for path in paths(batch, options).values():
            output = path()
            for got, want in zip([*output, *torch.autograd.grad(output.loss, leaves)], wanted, strict=True):
                close(got, want.to(got.dtype))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_change_of_the_one_equation_reaches_every_path(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no second copy that could drift: what is added to the equation is added to every path's loss."""
    batch = make_batch()
    ways = paths(batch, full_options(batch, loss_type, "pair"))
    before = {name: path().loss for name, path in ways.items()}
    original = naive.mopo_loss

    def changed(*arguments: Any, **options: Any) -> naive.PairLoss:
        output = original(*arguments, **options)
        return output._replace(loss=output.loss + 1)

    monkeypatch.setattr(naive, "mopo_loss", changed)
    for name, path in ways.items():
        close(path().loss, before[name] + 1)


def oracle_loss(model: nn.Module, batch: dict[str, Tensor], weight: Tensor, **options: Any) -> Tensor:
    """The loss from a model's own logits, by the one equation."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    token = torch.log_softmax(logits.double(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return naive.mopo_loss(
        (token * (labels != -100)).sum(1),
        *(batch["ref_logprob"].double(), batch["pairs"], batch["preference"].double(), weight.double()),
        pair_weight=batch["pair_weight"].double(),
        prompt_index=batch["prompt_index"],
        **options,
    ).loss


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_trainer_trains_the_loss_it_is_told_to(loss_type: str, tmp_path: Path) -> None:
    """ms-swift: a configuration that said IPO trained DPO, without a word."""
    trainer = make_trainer(tmp_path, make_model(dtype=torch.float64), loss_type=loss_type, tau=0.4)
    batch, weight = batch_of(trainer), trainer.dual.weight
    found = gradients(trainer.model, trainer.model(**batch, objective_weight=weight)["loss"])
    every = {kind: oracle_loss(trainer.model, batch, weight, loss_type=kind, tau=0.4) for kind in LOSS_TYPES}
    expected = {kind: gradients(trainer.model, loss) for kind, loss in every.items()}
    largest = max(float(value.abs().max()) for value in expected[loss_type].values())
    for name, value in found.items():
        torch.testing.assert_close(value, expected[loss_type][name], rtol=1e-9, atol=1e-11 * largest)
    for kind in set(LOSS_TYPES) - {loss_type}:
        assert any((found[name] - value).abs().max() > 1e-2 * largest for name, value in expected[kind].items()), kind


@pytest.mark.parametrize("backend", ["naive", *CPU_BACKENDS])
def test_regression_of_one_objective_is_ipo_and_sigmoid_is_dpo(backend: str) -> None:
    """ms-swift: IPO was trained as DPO. Both by the formulas of their papers, gradients included."""
    batch = make_batch(objectives=1, seed=2)
    batch.preference.fill_(1.0)
    batch.objective_weight.fill_(1.0)
    leaves = batch.leaves("hidden", "weight", "bias")
    logprob = sequence_logprob(batch, backend="naive")
    chosen, rejected = (logprob - batch.ref_logprob)[batch.pairs].unbind(1)
    beta = 0.2
    ipo = (chosen - rejected - 1 / (2 * beta)).square().mean()
    dpo = -torch.log(torch.sigmoid(beta * (chosen - rejected))).mean()
    found = {kind: loss_of(batch, backend=backend, loss_type=kind, tau=beta) for kind in ("regression", "sigmoid")}
    for kind, other, formula in (("regression", "sigmoid", ipo), ("sigmoid", "regression", dpo)):
        close(found[kind], formula)
        pairs = zip(
            torch.autograd.grad(found[kind], leaves, retain_graph=True),
            torch.autograd.grad(formula, leaves, retain_graph=True),
            torch.autograd.grad(found[other], leaves, retain_graph=True),
            strict=True,
        )
        for got, want, swapped in pairs:
            close(got, want)
            assert (swapped - want).norm() > 0.1 * want.norm()


@pytest.mark.parametrize("name", ["ipo", "dpo", "Sigmoid", ""])
def test_a_loss_by_an_unknown_name_is_refused_and_not_replaced(name: str, tmp_path: Path) -> None:
    """ms-swift: a name that the fused path did not know fell back to its default."""
    batch = make_batch()
    message = "loss_type"
    with pytest.raises(ValueError, match=message):
        loss_of(batch, loss_type=name)
    with pytest.raises(ValueError, match=message):
        LinearMOPOLoss(loss_type=name)
    with pytest.raises(ValueError, match=message):
        mopo_loss(batch.ref_logprob, batch.ref_logprob, batch.pairs, batch.preference, torch.ones(3), loss_type=name)
    with pytest.raises(ValueError, match=message):
        MOPOConfig(str(tmp_path), primary="helpful", loss_type=name)


# ---------------------------------------------------------------------------------------------------- the integration


def test_tied_embeddings_get_the_gradients_of_both_their_uses(tmp_path: Path) -> None:
    """A fused head whose gradient replaced, or never met, that of the embedding it is tied to."""
    model = make_model("llama-tied", dtype=torch.float64)
    trainer = make_trainer(tmp_path, model)
    batch, objectives = batch_of(trainer), trainer.dual.weight
    found = gradients(model, model(**batch, objective_weight=objectives)["loss"])["model.embed_tokens.weight"]
    weight = model.get_output_embeddings().weight
    assert weight is model.get_input_embeddings().weight
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    shares = []
    for rows_from, head in ((hidden, weight.detach()), (hidden.detach(), weight)):
        rows, target, cu_seqlens = pack_responses(rows_from, batch["labels"])
        token = naive.linear_logprob(rows, head, target)
        loss = naive.mopo_loss(
            naive.segment_sum(token, cu_seqlens),
            *(batch["ref_logprob"], batch["pairs"], batch["preference"].double(), objectives.double()),
            tau=trainer.args.tau,
            pair_weight=batch["pair_weight"].double(),
        ).loss
        shares.append(torch.autograd.grad(loss, weight, retain_graph=True)[0])
    assert all(share.norm() > 0.01 * found.norm() for share in shares)
    torch.testing.assert_close(found, shares[0] + shares[1], rtol=1e-9, atol=1e-11 * float(found.abs().max()))


@pytest.mark.parametrize("tied", [False, True], ids=["head alone", "tied head"])
def test_lora_on_the_head_is_trained_and_what_it_adapts_is_not(tied: bool, tmp_path: Path) -> None:
    """Fused losses that take ``lm_head.weight`` and so pass its adapter by: A and B stayed as they were."""
    model = lora(make_model("llama-tied" if tied else "llama", dtype=torch.float64), target_modules=["lm_head"])
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    trainer = make_trainer(tmp_path, model, max_steps=1, logging_steps=1)
    batch, weight = batch_of(trainer), trainer.dual.weight
    expected = gradients(model, oracle_loss(model, batch, weight, tau=trainer.args.tau))
    found = gradients(model, model(**batch, objective_weight=weight)["loss"])
    assert len(found) == 2
    for name, value in found.items():
        assert "lm_head" in name
        assert value is not None
        assert value.any()
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11 * float(value.abs().max()))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert changed == found.keys()


def large_vocabulary_model(kind: str) -> Any:
    """A tiny body under a head of LARGE_VOCABULARY x HIDDEN_SIZE, as it is or under LoRA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LARGE_VOCABULARY,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    return lora(model) if kind == "lora" else model


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_a_model_never_holds_logits_and_keeps_to_its_buffer(kind: str, tmp_path: Path) -> None:
    """LLaMA-Factory: memory did not drop with a fused loss, as the integration went on computing the logits. NeMo-RL:
    the buffer setting was ignored in training. LoRA: a gradient of the frozen head would be a fifth tensor."""
    buffer = 600_000
    trainer = make_trainer(
        tmp_path, large_vocabulary_model(kind), max_buffer_bytes=buffer, reference="model", learning_rate=0.0
    )
    batch = batch_of(trainer, 8)
    del batch["ref_logprob"]
    model, weight = trainer.model, trainer.dual.weight

    def call() -> None:
        model.zero_grad()
        model(**batch, objective_weight=weight)["loss"].backward()

    def plain() -> None:
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()

    call()
    peak, _ = peak_bytes(call)
    scored = int((batch["labels"][:, 1:] != -100).sum())
    logits = 4 * scored * LARGE_VOCABULARY
    gradient = 4 * LARGE_VOCABULARY * HIDDEN_SIZE
    activations = 6_000 * batch["input_ids"].numel()
    assert peak <= buffer + (2 * gradient if kind == "full" else 0) + activations < logits
    assert peak_bytes(plain)[0] > 2 * logits


# ---------------------------------------------------------------------------------------------------------- two ranks

WRAPS = ("ddp", "unwrapped", "shards")
# A smaller buffer than any prompt of more than a few tokens needs at once: the ranks' numbers of chunks differ.
RANK_BUFFER = 4_000
# The two ranks take about ten seconds.
HANG_SECONDS = 120.0


def rank_batches(trainer: Any, case: str, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Four prompts, and this rank's part of them: one on rank 0, which with "masked" has no scored token, and three."""
    data = trainer.train_dataset
    collate = replace(trainer.data_collator, shared_prompts=False)
    whole = collate([data[i] for i in range(4)])
    part = collate([data[i] for i in ((0,), (1, 2, 3))[rank]])
    if case == "masked":
        whole["labels"][whole["prompt_index"] == 0] = -100
        if rank == 0:
            part["labels"].fill_(-100)
    return whole, part


def rank_gradients(wrap: str, case: str, folder: Path) -> dict[str, Any]:
    """The errors of a rank's gradients, relative to the largest, and the tiles it folded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank = int(os.environ["RANK"])
    model = make_model(dtype=torch.float64)
    trainer = make_trainer(
        folder, model, make_data(8), reference="precomputed", backend="torch", max_buffer_bytes=RANK_BUFFER
    )
    trainer._prepare_references()
    weight = trainer.dual.weight
    whole, part = rank_batches(trainer, case, rank)
    normalizer = whole["pair_weight"].double().sum()
    model(**whole, objective_weight=weight, normalizer=normalizer)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    wrapped: nn.Module = model
    if wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    elif wrap == "shards":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        seen = folds(patch, "torch")
        # DDP and FSDP average over the ranks.
        (wrapped(**part, objective_weight=weight, normalizer=normalizer)["loss"] * 2).backward()
    largest = max(float(value.abs().max()) for value in expected.values())
    errors = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if wrap == "shards" else parameter.grad
        errors[name] = float((gradient - expected[name]).abs().max()) / largest
    return {"errors": errors, "tiles": len(seen)}


def distributed_tensor_errors() -> dict[str, str]:
    """What each function does with a sharded head and the rank's own rows, or distributed ones: the error, or none."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for rows, backend in itertools.product((False, True), CPU_BACKENDS):
        batch = make_batch(vocabulary=38, seed=0 if rows else int(os.environ["RANK"]))
        batch.weight = distribute_tensor(batch.weight, mesh, [Shard(0)])
        batch.bias = distribute_tensor(batch.bias, mesh, [Shard(0)])
        if rows:
            batch.hidden = distribute_tensor(batch.hidden, mesh, [Replicate()])
        batch.hidden.requires_grad_()
        functions: dict[str, Callable[..., Tensor]] = {
            "linear_logprob": lambda b=batch, **o: linear_logprob(b.hidden, b.weight, b.target, **o),
            "linear_mopo_loss": lambda b=batch, **o: loss_of(b, **o),
        }
        for name, function in functions.items():
            try:
                function(backend=backend)
                found[f"{name}, {backend}, rows {rows}"] = "no error"
            except Exception as error:
                found[f"{name}, {backend}, rows {rows}"] = f"{type(error).__name__}: {error}"
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for wrap, case in itertools.product(WRAPS, ("different", "masked")):
        results[f"{wrap}, {case}"] = rank_gradients(wrap, case, folder / f"{wrap}-{case}")
    results["distributed tensors"] = distributed_tensor_errors()
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    # As in trainer_ranks.py: gloo's threads now and then abort when they are taken down.
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """The results of both ranks, started without torchrun, whose children would outlive it after a hang."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    logs = [folder / f"{rank}.log" for rank in range(2)]
    children = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, __file__, str(folder)]
            children.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + HANG_SECONDS
        for child in children:
            try:
                code = child.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            # A rank that fails leaves the other waiting, so both say how far they came.
            output = "\n".join(log.read_text()[-4000:] for log in logs)
            assert code == 0, f"{'the ranks hang' if code is None else 'a rank failed'}: {output}"
        yield [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_gradients_are_reduced_under_ddp(ranks: list[dict[str, Any]]) -> None:
    """Liger in TRL: the loss ran on the unwrapped module, so nothing was reduced and 310 of 310 parameters differed."""
    for found in ranks:
        assert len(found["ddp, different"]["errors"]) == 21
        assert max(found["ddp, different"]["errors"].values()) < 1e-12
        assert sum(error > 1e-3 for error in found["unwrapped, different"]["errors"].values()) > 10


@pytest.mark.parametrize("wrap", ["ddp", "shards"])
def test_ranks_with_different_numbers_of_chunks_do_not_hang(wrap: str, ranks: list[dict[str, Any]]) -> None:
    """ZeRO-3 under a chunked loss: every chunk gathered the head, and the rank with fewer chunks stopped answering."""
    tiles = [found[f"{wrap}, different"]["tiles"] for found in ranks]
    assert 1 < tiles[0] < tiles[1]
    for found in ranks:
        assert max(found[f"{wrap}, different"]["errors"].values()) < 1e-12


@pytest.mark.parametrize("wrap", ["ddp", "shards"])
def test_a_rank_without_a_scored_token_neither_hangs_nor_spoils_the_others(
    wrap: str, ranks: list[dict[str, Any]]
) -> None:
    """Liger: a rank whose batch was all masked gave NaN, or no gradient for the others to be averaged with."""
    assert ranks[0][f"{wrap}, masked"]["tiles"] == 0
    for found in ranks:
        assert max(found[f"{wrap}, masked"]["errors"].values()) < 1e-12


def test_a_sharded_head_is_gathered_by_the_model_under_fsdp2(ranks: list[dict[str, Any]]) -> None:
    """Mixed tensors and DTensors: a loss outside the model's forward meets the head's shards; this one is inside."""
    for found in ranks:
        assert len(found["shards, different"]["errors"]) == 21
        assert max(found["shards, different"]["errors"].values()) < 1e-12


def test_a_distributed_tensor_is_refused_by_name_and_never_taken_for_its_shard(ranks: list[dict[str, Any]]) -> None:
    """FSDP2: with a head still sharded, the loss over a rank's own rows of the vocabulary is a plausible number."""
    for found in ranks:
        assert len(found["distributed tensors"]) == 4 * len(CPU_BACKENDS)
        for case, error in found["distributed tensors"].items():
            assert error != "no error", case
            expected = (
                "hidden: expected a plain tensor"
                if "rows True" in case
                else "expected the same hidden and target on every rank"
            )
            assert expected in error, (case, error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
