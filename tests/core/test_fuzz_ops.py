"""The public ops on inputs of any size, dtype, layout and option, against the plain functions of
:mod:`mopo_kernels.naive` in fp64: the same numbers and gradients, or an error that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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

# The interpreter runs Triton's kernels on the CPU, where they read whatever memory strides say.
BACKENDS = [name for name in ("torch", "cpp", "triton") if backends.availability()[name] is None]
pytestmark = [
    # numpy's, in the interpreter, for infinities that are meant.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of the norm of the result, or of 1. Half precision: gradients, and exponentials that a fused tile holds, are rounded.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def _apart(x: Tensor) -> Tensor:
    """Every second element of the last dimension of a larger tensor, what is between being no legal value."""
    room = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan if x.is_floating_point() else 1 << 30)
    part = room[..., 1::2]
    return part.copy_(x)


def _transposed(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def _unaligned(x: Tensor) -> Tensor:
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


def _negated(x: Tensor) -> Tensor:
    """Memory that holds the numbers with the other sign, as the imaginary part of a conjugate does."""
    return torch._neg_view(-x) if x.is_floating_point() else x


def _expanded(x: Tensor) -> Tensor:
    """Its first row, again and again."""
    return x[:1].expand_as(x) if x.shape[0] else x


# Layouts of the same numbers, and then those of others.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "apart": _apart,
    "transposed": _transposed,
    "unaligned": _unaligned,
    "negated": _negated,
}


class Drawn(NamedTuple):
    """Tensors as the op gets them, and what the oracle computes with."""

    given: dict[str, Tensor]
    plain: dict[str, Tensor]


def leaves(tensors: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """The named tensors made leaves that require grad, their strides kept."""
    for name in names:
        tensors[name] = tensors[name].detach().requires_grad_()
    return [tensors[name] for name in names]


@st.composite
def layouts(draw: st.DrawFn, tensors: dict[str, Tensor]) -> Drawn:
    """Every tensor in a layout of its own."""
    given, plain = {}, {}
    for name, tensor in tensors.items():
        source = _expanded(tensor) if name in ("hidden", "weight", "bias") and draw(st.integers(0, 7)) == 0 else tensor
        given[name] = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)), label=name)](source)
        plain[name] = source.double() if source.is_floating_point() else source
    return Drawn(given, plain)


@st.composite
def heads(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "softcap": draw(st.none() | st.floats(0.5, 50.0)),
        "logit_scale": draw(st.just(1.0) | st.floats(-2.0, 2.0)),
        "temperature": draw(st.just(1.0) | st.floats(0.3, 3.0)),
    }


class Batch(NamedTuple):
    dtype: torch.dtype
    lengths: list[int]
    prompt: list[int]
    tensors: Drawn
    generator: torch.Generator


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Packed responses, some empty, some tokens ignored, of prompts in any order."""
    dtype = draw(st.sampled_from(DTYPES))
    lengths = draw(st.lists(st.integers(0, 6), max_size=6))
    prompt = [draw(st.integers(0, 2)) for _ in lengths]
    size, vocabulary = draw(st.integers(1, 40)), draw(st.integers(1, 80))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    tokens = sum(lengths)
    target = torch.randint(0, vocabulary, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = -100
    tensors = {
        "hidden": torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype),
        "weight": torch.randn(vocabulary, size, generator=generator, dtype=torch.float64).to(dtype) / size**0.5,
        "bias": torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype),
        "target": target,
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)]).to(
            draw(st.sampled_from((torch.int64, torch.int32)))
        ),
    }
    return Batch(dtype, lengths, prompt, draw(layouts(tensors)), generator)


def buffers(batch: Batch) -> st.SearchStrategy[int | None]:
    """The default, and sizes that cut the rows, the vocabulary, or both."""
    return st.none() | st.integers(30_000, 60_000) | st.just(1 << 20)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    got = got.double()
    assert torch.equal(got.isfinite(), want.isfinite())
    difference = (got - want)[want.isfinite()].norm()
    assert difference <= TOLERANCE[dtype] * max(1.0, float(want[want.isfinite()].norm()))


def wanted(head: dict[str, Any], tensors: dict[str, Tensor], bias: bool) -> Tensor:
    arguments = (tensors["hidden"], tensors["weight"], tensors["target"], tensors["bias"] if bias else None)
    return naive.linear_logprob(*arguments, **head)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_log_probabilities_and_gradients_are_those_of_the_oracle(backend: str, data: st.DataObject) -> None:
    batch, head, bias = data.draw(batches()), data.draw(heads()), data.draw(st.booleans())
    names = data.draw(st.lists(st.sampled_from(["hidden", "weight"] + ["bias"] * bias), unique=True))
    sums = data.draw(st.booleans())
    options = head | {"backend": backend, "max_buffer_bytes": data.draw(buffers(batch))}
    got_leaves, want_leaves = leaves(batch.tensors.given, names), leaves(batch.tensors.plain, names)
    tensors = batch.tensors.given
    want, got_bias = wanted(head, batch.tensors.plain, bias), tensors["bias"] if bias else None
    arguments: tuple[Any, ...] = (tensors["hidden"], tensors["weight"], tensors["target"])
    if sums:
        got = linear_sequence_logprob(*arguments, tensors["cu_seqlens"], got_bias, **options)
        want = naive.segment_sum(want, batch.tensors.plain["cu_seqlens"])
    else:
        got = linear_logprob(*arguments, got_bias, **options)
    close(got.detach(), want.detach(), batch.dtype)
    if names:
        upstream = data.draw(layouts({"upstream": torch.randn(want.shape, generator=batch.generator).to(got.dtype)}))
        pairs = zip(
            torch.autograd.grad(got, got_leaves, upstream.given["upstream"]),
            torch.autograd.grad(want, want_leaves, upstream.plain["upstream"]),
            strict=True,
        )
        for gradient, expected in pairs:
            close(gradient, expected, batch.dtype)


class Labels(NamedTuple):
    tensors: Drawn
    options: dict[str, Any]


@st.composite
def labels(draw: st.DrawFn, prompt: list[int], dtype: torch.dtype, generator: torch.Generator) -> Labels:
    """Pairs within prompts, any labels with ties and gaps, and any options that go together."""
    inside = [(i, j) for i in range(len(prompt)) for j in range(len(prompt)) if i != j and prompt[i] == prompt[j]]
    pairs = draw(st.lists(st.sampled_from(inside), max_size=6)) if inside else []
    objectives = draw(st.integers(0, 3))
    preference = torch.randint(0, 5, (len(pairs), objectives), generator=generator).to(dtype) / 4
    preference[torch.rand(preference.shape, generator=generator) < draw(st.sampled_from((0.0, 0.5)))] = torch.nan
    loss_type = draw(st.sampled_from(naive.LOSS_TYPES))
    estimator = draw(st.sampled_from(naive.ESTIMATORS))

    def positive(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.25).to(dtype)

    tensors = {
        "pairs": torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        "preference": preference,
        "objective_weight": positive(objectives) - 0.25,
        "ref_logprob": (torch.randn(len(prompt), generator=generator) - 4).to(dtype),
    }
    optional = {"pair_weight": positive(len(pairs)) - 0.25, "length": torch.ceil(positive(len(prompt)) * 8)}
    if loss_type != "cloning":
        optional["label_rate"] = positive(objectives).clamp(max=1)
    if loss_type == "sigmoid":
        optional["margin"] = positive(len(pairs)) - 0.7
    tensors |= {name: tensor for name, tensor in optional.items() if draw(st.booleans(), label=name)}
    if loss_type == "cloning" or estimator == "closed_form" or draw(st.booleans()):
        tensors["prompt_index"] = torch.tensor(prompt, dtype=torch.int64)
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "estimator": estimator,
        "tau": draw(st.floats(0.02, 5.0)),
        "max_ratio": draw(st.none() | st.floats(1.0, 4.0)),
        "normalizer": draw(st.none() | st.sampled_from((0.0, 2.5, 3))),
    }
    return Labels(draw(layouts(tensors)), options)


def same_loss(got: Any, want: naive.PairLoss, dtype: torch.dtype) -> None:
    for result, expected in zip(got, want, strict=True):
        close(result.detach(), expected.detach(), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_the_one_pass_loss_is_that_of_the_oracle(backend: str, data: st.DataObject) -> None:
    batch, head, bias = data.draw(batches()), data.draw(heads()), data.draw(st.booleans())
    accumulation = torch.float64 if batch.dtype == torch.float64 else torch.float32
    given = data.draw(labels(batch.prompt, accumulation, batch.generator))
    names = data.draw(st.lists(st.sampled_from(["hidden", "weight"] + ["bias"] * bias), unique=True))
    got_leaves, want_leaves = leaves(batch.tensors.given, names), leaves(batch.tensors.plain, names)
    token = wanted(head, batch.tensors.plain, bias)
    logprob = naive.segment_sum(token, batch.tensors.plain["cu_seqlens"])
    want = naive.mopo_loss(logprob, **given.tensors.plain, **given.options)
    tensors = batch.tensors.given
    got = linear_mopo_loss(
        tensors["hidden"],
        tensors["weight"],
        tensors["target"],
        tensors["cu_seqlens"],
        bias=tensors["bias"] if bias else None,
        backend=backend,
        max_buffer_bytes=data.draw(buffers(batch)),
        **given.tensors.given,
        **given.options,
        **head,
    )
    same_loss(got, want, batch.dtype)
    if names:
        gradients = torch.autograd.grad(got.loss * 1.5, got_leaves)
        for gradient, expected in zip(gradients, torch.autograd.grad(want.loss * 1.5, want_leaves), strict=True):
            close(gradient, expected, batch.dtype)


@given(data=st.data())
def test_the_loss_of_log_probabilities_is_that_of_the_oracle(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from((torch.float32, torch.float64)))
    prompt = data.draw(st.lists(st.integers(-2, 2), max_size=8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    given = data.draw(labels(prompt, dtype, generator))
    logprob = data.draw(layouts({"logprob": (torch.randn(len(prompt), generator=generator) * 3 - 4).to(dtype)}))
    (got_leaf,), (want_leaf,) = leaves(logprob.given, ["logprob"]), leaves(logprob.plain, ["logprob"])
    got = mopo_loss(got_leaf, **given.tensors.given, **given.options)
    want = naive.mopo_loss(want_leaf, **given.tensors.plain, **given.options)
    same_loss(got, want, dtype)
    (gradient,) = torch.autograd.grad(got.loss, got_leaf)
    close(gradient, torch.autograd.grad(want.loss, want_leaf)[0], dtype)


@given(data=st.data())
def test_packed_rows_are_the_scored_ones_in_order(data: st.DataObject) -> None:
    rows, columns, size = (data.draw(st.integers(0, 5)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    tensors = {
        "hidden": torch.randn(rows, columns, size, generator=generator),
        "labels": torch.randint(-1, 3, (rows, columns), generator=generator),
    }
    drawn = data.draw(layouts(tensors))
    hidden, target, cu_seqlens = pack_responses(**drawn.given, ignore_index=-1)
    at = [(b, t) for b in range(rows) for t in range(columns - 1) if tensors["labels"][b, t + 1] != -1]
    assert target.tolist() == [int(tensors["labels"][b, t + 1]) for b, t in at]
    assert hidden.tolist() == [drawn.plain["hidden"][b, t].tolist() for b, t in at]
    assert cu_seqlens.tolist() == [sum(b < row for b, _ in at) for row in range(rows + 1)]


# Everything that a number may be taken for, and numbers at the ends of every range.
ANYTHING = (
    st.sampled_from([None, True, "0.1", b"1", 1j, [0.1], (), torch.tensor(0.1), torch.zeros(2), object()])
    | st.floats()
    | st.floats(1e-10, 1e10)
    | st.floats(0.1, 10.0)
    | st.integers(-(1 << 70), 1 << 70)
    | st.sampled_from([1e-320, 1e-45, 1e-38, 1e-10, 1e10, 1e38, 1e39, 1e308, math.inf, 0.0, -0.0])
)
NUMBERS = ("tau", "max_ratio", "normalizer", "softcap", "logit_scale", "temperature")
OTHERS = ("max_buffer_bytes", "ignore_index", "loss_type", "estimator", "backend", "process_group")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@given(name=st.sampled_from(NUMBERS + OTHERS), value=ANYTHING, loss_type=st.sampled_from(naive.LOSS_TYPES))
def test_an_option_of_any_type_and_size_is_refused_by_name_or_gives_the_numbers_of_the_oracle(
    backend: str, name: str, value: Any, loss_type: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 3, generator=generator), torch.randn(5, 3, generator=generator)
    target, cu_seqlens = torch.tensor([0, 4, 2, 1, 1, 3]), torch.tensor([0, 2, 3, 6])
    labels = {
        "pairs": torch.tensor([[0, 1], [2, 0]]),
        "preference": torch.tensor([[1.0, 0.0], [0.5, torch.nan]]),
        "objective_weight": torch.tensor([1.0, 0.5]),
        "ref_logprob": torch.tensor([-2.0, -1.0, -4.0]),
        "prompt_index": torch.zeros(3, dtype=torch.int64),
    }
    options: dict[str, Any] = {"backend": backend, "loss_type": loss_type, "estimator": "closed_form", name: value}
    leaf = hidden.clone().requires_grad_()
    refusal, got = None, None
    try:
        got = linear_mopo_loss(leaf, weight, target, cu_seqlens, **labels, **options)
    except ValueError as error:
        refusal = str(error)
    if got is None:
        assert refusal is not None
        assert refusal.startswith(f"{name}: expected ")
        return
    head = {key: options[key] for key in ("softcap", "logit_scale", "temperature", "ignore_index") if key in options}
    loss = {key: options[key] for key in ("tau", "loss_type", "estimator", "max_ratio", "normalizer") if key in options}
    exact = hidden.double().requires_grad_()
    token = naive.linear_logprob(exact, weight.double(), target, **head)
    plain = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in labels.items()}
    want = naive.mopo_loss(naive.segment_sum(token, cu_seqlens), **plain, **loss)
    same_loss(got, want, torch.float32)
    gradients = torch.autograd.grad(got.loss, leaf)[0], torch.autograd.grad(want.loss, exact)[0]
    close(*gradients, torch.float32)
