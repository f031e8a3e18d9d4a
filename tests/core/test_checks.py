"""Wrong arguments raise an error that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from samples import Batch, make_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from mopo_kernels import (
    LinearMOPOLoss,
    checks,
    linear_logprob,
    linear_mopo_loss,
    linear_sequence_logprob,
    mopo_loss,
    pack_responses,
)


def changed(batch: Batch, **changes: Any) -> Batch:
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch


def with_value(tensor: torch.Tensor, position: Any, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


WRONG: dict[str, tuple[Callable[[Batch], dict[str, Any]], str]] = {
    "hidden dimensions": (lambda b: {"hidden": b.hidden[0]}, r"hidden: expected shape \(N, H\); got \(16,\)"),
    "hidden dtype": (lambda b: {"hidden": b.hidden.long()}, "hidden: expected dtype float32.*got int64"),
    "weight shape": (
        lambda b: {"weight": b.weight[:, :3]},
        r"weight: expected H = 16 columns, as hidden has; got \(37, 3\)",
    ),
    "weight transposed": (
        lambda b: {"weight": b.weight.T},
        r"weight: expected H = 16 columns, as hidden has; got \(16, 37\)",
    ),
    "weight dtype": (lambda b: {"weight": b.weight.float()}, "weight: expected dtype float64; got float32"),
    "bias shape": (lambda b: {"bias": b.bias[:5]}, r"bias: expected shape \(V,\) = \(37,\); got \(5,\)"),
    "target shape": (lambda b: {"target": b.target[1:]}, r"target: expected shape \(N,\)"),
    "target dtype": (lambda b: {"target": b.target.int()}, "target: expected dtype int64; got int32"),
    "target too large": (
        lambda b: {"target": with_value(b.target, 4, 37)},
        r"target: expected a number in 0 .. V - 1 = 36 or ignore_index = -100; got 37 at index 4",
    ),
    "target negative": (
        lambda b: {"target": with_value(b.target, 2, -1)},
        "target: expected a number in .*got -1 at index 2",
    ),
    "cu_seqlens dtype": (lambda b: {"cu_seqlens": b.cu_seqlens.double()}, "cu_seqlens: expected dtype int64, int32"),
    "cu_seqlens start": (
        lambda b: {"cu_seqlens": with_value(b.cu_seqlens, 0, 1)},
        r"cu_seqlens\[0\]: expected 0; got 1",
    ),
    "cu_seqlens end": (lambda b: {"cu_seqlens": with_value(b.cu_seqlens, -1, 3)}, r"cu_seqlens\[-1\]: expected N = "),
    "cu_seqlens order": (
        lambda b: {"cu_seqlens": with_value(b.cu_seqlens, 3, 0)},
        "cu_seqlens: expected offsets that do not decrease; got -[0-9]+ at step 2",
    ),
    "cu_seqlens is lengths": (
        lambda b: {"cu_seqlens": b.cu_seqlens.diff()},
        r"cu_seqlens\[0\]: expected 0; got [1-9]",
    ),
    "cu_seqlens is lengths, the first 0": (
        lambda b: {"cu_seqlens": with_value(b.cu_seqlens.diff(), 0, 0)},
        r"cu_seqlens\[-1\]: expected N = ",
    ),
    "pairs shape": (lambda b: {"pairs": b.pairs[:, :1]}, r"pairs: expected shape \(P, 2\) = \(12, 2\); got \(12, 1\)"),
    "pairs dtype": (lambda b: {"pairs": b.pairs.int()}, "pairs: expected dtype int64; got int32"),
    "pairs range": (
        lambda b: {"pairs": with_value(b.pairs, (3, 1), 12)},
        r"pairs: expected a number in 0 .. S - 1 = 11; got 12 at index \(3, 1\)",
    ),
    "pairs negative": (lambda b: {"pairs": with_value(b.pairs, (0, 0), -1)}, "pairs: expected a number in .*got -1"),
    "pairs of one response": (lambda b: {"pairs": with_value(b.pairs, (1, 1), 0)}, "pairs: expected two different"),
    "preference shape": (
        lambda b: {"preference": b.preference[1:]},
        r"preference: expected shape \(P, K\) = \(12, 3\)",
    ),
    "preference range": (
        lambda b: {"preference": with_value(b.preference, (5, 1), 1.5)},
        r"preference: expected a number in \[0, 1\] or NaN; got 1.5 at index \(5, 1\)",
    ),
    "objective_weight shape": (
        lambda b: {"objective_weight": b.objective_weight[:2]},
        r"objective_weight: expected shape \(K,\) = \(3,\); got \(2,\)",
    ),
    "objective_weight negative": (
        lambda b: {"objective_weight": with_value(b.objective_weight, 2, -0.5)},
        "objective_weight: expected a number in 0 .. 1e.10; got -0.5 at index 2",
    ),
    "objective_weight infinite": (
        lambda b: {"objective_weight": with_value(b.objective_weight, 1, torch.inf)},
        "objective_weight: expected a number in 0 .. 1e.10; got inf",
    ),
    "device": (
        lambda b: {"pairs": b.pairs.to("meta")},
        "pairs: expected a tensor on cpu, as hidden or logprob is; got meta",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_a_wrong_tensor_is_named_with_expectation_and_value(case: str, backend: str) -> None:
    change, message = WRONG[case]
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        linear_mopo_loss(
            *changed(batch, **change(batch)).loss_arguments(), ref_logprob=batch.ref_logprob, backend=backend
        )


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "tau": ({"tau": 0.0}, "tau: expected a number in 1e-10 .. 1e.10; got 0.0"),
    "tau is text": ({"tau": "0.1"}, "tau: expected a number; got '0.1'"),
    "loss_type": ({"loss_type": "ppo"}, "loss_type: expected one of regression, cloning, sigmoid; got 'ppo'"),
    "estimator": ({"estimator": "mean"}, "estimator: expected one of pair, snis, closed_form; got 'mean'"),
    "prompt_index missing": ({"loss_type": "cloning"}, "prompt_index: expected a tensor for loss_type"),
    "prompt_index missing for the estimator": ({"estimator": "closed_form"}, "prompt_index: expected a tensor"),
    "margin without sigmoid": ({"margin": torch.zeros(12)}, 'margin: expected None unless loss_type is "sigmoid"'),
    "pair_weight shape": ({"pair_weight": torch.ones(3)}, r"pair_weight: expected shape \(P,\) = \(12,\); got \(3,\)"),
    "pair_weight negative": (
        {"pair_weight": -torch.ones(12)},
        "pair_weight: expected a number in 0 .. 1e.10; got -1.0",
    ),
    "label_rate range": (
        {"label_rate": torch.tensor([1.0, 0.0, 1.0])},
        "label_rate: expected a number in 1e-10 .. 1; got 0.0",
    ),
    "length zero": ({"length": torch.zeros(12)}, "length: expected a number in 1e-10 .. 1e.10; got 0.0 at index 0"),
    "max_ratio": ({"max_ratio": -1.0}, "max_ratio: expected a number in 1 .. 1e.10; got -1.0"),
    "max_ratio below 1": ({"max_ratio": 0.5}, "max_ratio: expected a number in 1 .. 1e.10; got 0.5"),
    "max_ratio infinite": ({"max_ratio": float("inf")}, "max_ratio: expected a number in 1 .. 1e.10; got inf"),
    "max_ratio is text": ({"max_ratio": "2"}, "max_ratio: expected a number; got '2'"),
    "normalizer is a list": ({"normalizer": [3.0]}, r"normalizer: expected a number; got \[3.0\]"),
    "normalizer": ({"normalizer": -3.0}, "normalizer: expected 0 or a number in 1e-10 .. 1e.10; got -3.0"),
    "softcap": ({"softcap": 0.0}, "softcap: expected a number in 1e-10 .. 100000; got"),
    "softcap is text": ({"softcap": "30"}, "softcap: expected a number; got '30'"),
    "temperature is text": ({"temperature": "1"}, "temperature: expected a number; got '1'"),
    "temperature": ({"temperature": -1.0}, "temperature: expected a number in 1e-10 .. 1e.10; got"),
    "logit_scale": ({"logit_scale": float("nan")}, "logit_scale: expected a number in -1e.10 .. 1e.10; got nan"),
    "logit_scale missing": ({"logit_scale": None}, "logit_scale: expected a number; got None"),
    "ignore_index is no integer": ({"ignore_index": -100.0}, "ignore_index: expected an integer; got -100.0"),
    "max_buffer_bytes is no integer": (
        {"max_buffer_bytes": 1e6},
        "max_buffer_bytes: expected an integer; got 1000000.0",
    ),
    "ignore_index": ({"ignore_index": 3}, "ignore_index: expected a number outside 0 .. V - 1 = 36; got 3"),
    "max_buffer_bytes": ({"max_buffer_bytes": 0}, "max_buffer_bytes: expected a positive number; got 0"),
    "backend": ({"backend": "tpu"}, "backend: expected one of auto, naive, torch, cpp, triton, cuda; got 'tpu'"),
    "length shape": ({"length": torch.ones(3)}, r"length: expected shape \(S,\) = \(12,\); got \(3,\)"),
    "reference NaN": (
        {"ref_logprob": torch.tensor([-1.0] * 11 + [torch.nan])},
        "ref_logprob: expected a finite number; got nan at index 11",
    ),
    "reference infinite": (
        {"ref_logprob": torch.full((12,), -torch.inf)},
        "ref_logprob: expected a finite number; got -inf",
    ),
    "both references": ({"ref_hidden": torch.zeros(3, 3)}, "ref_logprob and ref_hidden: expected one without"),
    "reference shape": ({"ref_logprob": torch.zeros(3)}, r"ref_logprob: expected shape \(S,\) = \(12,\); got \(3,\)"),
}


NO_NUMBERS = (True, "1", b"1", 1j, [1.0], (1.0,), np.zeros(2), np.array(2.0), np.True_, Fraction(1, 2), Decimal(2))
NUMBERS = ("tau", "max_ratio", "normalizer", "softcap", "logit_scale", "temperature")


@pytest.mark.parametrize("name", [*NUMBERS, "max_buffer_bytes", "ignore_index"])
def test_what_is_no_number_is_named(name: str) -> None:
    batch = make_batch()
    kind = "a number" if name in NUMBERS else "an integer"
    for value in (*NO_NUMBERS, torch.tensor(2.0), torch.tensor(2)):
        if name == "normalizer" and isinstance(value, torch.Tensor):
            continue
        with pytest.raises(ValueError, match=f"^{name}: expected {kind}; got "):
            linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, **{name: value})


@pytest.mark.parametrize("name", ["loss_type", "estimator", "backend", "process_group"])
def test_what_is_no_choice_is_named(name: str) -> None:
    batch = make_batch()
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, **{name: value})


# In fp32 each gave NaN, another number, or an error from inside PyTorch.
EXTREMES: dict[str, tuple[float, ...]] = {
    "tau": (1e-320, 1e-40, 1e40, 1e308, 10**400),
    "softcap": (1e-320, 1e-40, 1e6, 1e40, 1e308, 10**400),
    "logit_scale": (1e40, -1e308, 10**400),
    "temperature": (1e-320, 1e-40, 1e308, 10**400),
    "max_ratio": (1e40, 1e308, 10**400),
    "normalizer": (1e-320, 1e-40, 1e40, 1e308, 10**400),
    "max_buffer_bytes": (2**63, 10**400),
    "ignore_index": (2**63, -(10**400)),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_a_number_that_the_precision_cannot_hold_is_named(name: str) -> None:
    batch = make_batch(dtype=torch.float32)
    for value in EXTREMES[name]:
        with pytest.raises(ValueError, match=f"^{name}: expected (0 or )?a number (in|of 64 bits)"):
            linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, **{name: value})


@pytest.mark.parametrize("name", ["objective_weight", "pair_weight", "label_rate", "margin", "length", "normalizer"])
def test_a_tensor_that_the_precision_cannot_hold_is_named(name: str) -> None:
    batch = make_batch(dtype=torch.float32)
    arguments = {
        "objective_weight": batch.objective_weight,
        "pair_weight": batch.pair_weight,
        "label_rate": torch.ones(3),
        "margin": torch.zeros(12),
        "length": batch.length,
        "normalizer": torch.ones(1),
    }
    values = {"label_rate": (1e-40,), "length": (1e-40, 3e38), "normalizer": (1e-40, 3e38)}.get(name, (3e38,))
    labels = {"pairs": batch.pairs, "preference": batch.preference, "loss_type": "sigmoid"}
    for value in values:
        wrong = {**arguments, name: with_value(arguments[name], 0, value)}
        with pytest.raises(ValueError, match=f"^{name}: expected (0 or )?a number in"):
            mopo_loss(batch.ref_logprob * 2, batch.ref_logprob, **labels, **wrong)
    imaginary = {**arguments, name: arguments[name].to(torch.cfloat)}
    with pytest.raises(ValueError, match=f"^{name}: expected (a real dtype|dtype float32)"):
        mopo_loss(batch.ref_logprob * 2, batch.ref_logprob, **labels, **imaginary)


def test_a_sparse_tensor_is_named() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=r"^weight: expected a dense tensor; got one of layout torch.sparse_coo"):
        linear_logprob(batch.hidden, batch.weight.to_sparse(), batch.target)


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_a_wrong_option_is_named_with_expectation_and_value(case: str) -> None:
    options, message = WRONG_OPTIONS[case]
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        linear_mopo_loss(*batch.loss_arguments(), **({"ref_logprob": batch.ref_logprob} | options))


def test_the_unfused_loss_checks_as_well() -> None:
    batch = make_batch()
    arguments = (batch.pairs, batch.preference, batch.objective_weight)
    with pytest.raises(ValueError, match=r"ref_logprob: expected shape \(S,\) = \(12,\); got \(11,\)"):
        mopo_loss(batch.ref_logprob, batch.ref_logprob[1:], *arguments)
    with pytest.raises(ValueError, match="ref_logprob: expected a finite number; got inf at index 3"):
        mopo_loss(batch.ref_logprob, with_value(batch.ref_logprob, 3, torch.inf), *arguments)
    with pytest.raises(ValueError, match=r"pairs: expected a number in 0 .. S - 1 = 4; got 5"):
        mopo_loss(batch.ref_logprob[:5], batch.ref_logprob[:5], *arguments)


REQUIRED = ("hidden", "weight", "target", "cu_seqlens", "pairs", "preference", "objective_weight")
OPTIONAL = ("bias", "ref_logprob", "ref_weight", "ref_bias", "pair_weight", "label_rate", "margin", "length")


@pytest.mark.parametrize("name", [*REQUIRED, *OPTIONAL, "ref_hidden", "prompt_index"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    batch = make_batch()
    arguments = {argument: getattr(batch, argument) for argument in REQUIRED}
    options: dict[str, Any] = {"ref_logprob": batch.ref_logprob, "loss_type": "sigmoid"}
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor; got list$"):
        linear_mopo_loss(**arguments | options | {name: [1.0, 1.0]})
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor; got float$"):
        linear_mopo_loss(**arguments | options | {name: 0.5})


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_tensor_is_named(name: str) -> None:
    batch = make_batch()
    arguments = {argument: getattr(batch, argument) for argument in REQUIRED}
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor; got NoneType$"):
        linear_mopo_loss(**arguments | {name: None}, ref_logprob=batch.ref_logprob)


NO_TENSOR: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "linear_logprob": (linear_logprob, ("hidden", "weight", "target", "bias")),
    "linear_sequence_logprob": (linear_sequence_logprob, ("hidden", "weight", "target", "cu_seqlens", "bias")),
    "mopo_loss": (mopo_loss, ("logprob", "ref_logprob", "pairs", "preference", "objective_weight")),
    "pack_responses": (pack_responses, ("hidden", "labels")),
}


@pytest.mark.parametrize("function", NO_TENSOR)
def test_every_function_names_what_is_no_tensor(function: str) -> None:
    batch = make_batch()
    call, names = NO_TENSOR[function]
    others = {"logprob": batch.ref_logprob, "labels": torch.zeros(1, 1, dtype=torch.int64)}
    arguments = {name: others.get(name, getattr(batch, name, None)) for name in names}
    for name in names:
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor; got ndarray$"):
            call(**arguments | {name: arguments[name].numpy()})


def test_numbers_of_numpy_are_numbers() -> None:
    batch = make_batch()
    options = {"tau": 0.5, "temperature": 2.0, "softcap": 4.0, "logit_scale": 0.5, "normalizer": 3.0}
    expected = linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, **options)
    scalars: dict[str, Any] = {name: np.float32(value) for name, value in options.items()}
    scalars |= {"max_buffer_bytes": np.int64(10**6), "ignore_index": np.int64(-100), "max_ratio": np.float32(2)}
    got = linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, **scalars)
    assert got.loss == expected.loss


def every_option(batch: Batch) -> dict[str, Any]:
    return batch.loss_options("cloning") | {
        "length": batch.length,
        "tau": 0.5,
        "max_ratio": 2.0,
        "normalizer": 3.0,
        "softcap": 4.0,
        "max_buffer_bytes": 10**6,
    }


def test_a_compiled_call_is_one_graph_that_still_refuses_a_reference_of_nan() -> None:
    batch = make_batch()

    def call(ref_logprob: torch.Tensor) -> torch.Tensor:
        return linear_mopo_loss(*batch.loss_arguments(), **every_option(batch) | {"ref_logprob": ref_logprob}).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert compiled(batch.ref_logprob) == call(batch.ref_logprob)
    with pytest.raises(ValueError, match="ref_logprob: expected a finite number; got nan at index 2"):
        compiled(with_value(batch.ref_logprob, 2, torch.nan))


def test_numbers_may_change_from_call_to_call_of_a_compiled_function() -> None:
    batch = make_batch()

    def call(number: float, limit: int) -> torch.Tensor:
        names = ("tau", "normalizer", "softcap", "logit_scale", "temperature")
        options = every_option(batch) | dict.fromkeys(names, number) | {"max_ratio": 1 + number}
        return linear_mopo_loss(*batch.loss_arguments(), **options | {"max_buffer_bytes": limit}).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number, limit in ((0.5, 10**6), (0.75, 10**6 + 1), (1.5, 10**5)):
        assert compiled(number, limit) == call(number, limit)


def test_fake_tensors_are_checked_for_shape_and_no_values_are_read() -> None:
    mode = FakeTensorMode()
    batch = make_batch()
    for name, tensor in vars(batch).items():
        setattr(batch, name, mode.from_tensor(tensor))
    with mode:
        assert linear_mopo_loss(*batch.loss_arguments(), **every_option(batch)).loss.shape == ()
        batch.cu_seqlens = batch.cu_seqlens[1:]
        with pytest.raises(ValueError, match=r"ref_logprob: expected shape \(S,\) = \(11,\); got \(12,\)"):
            linear_mopo_loss(*batch.loss_arguments(), **every_option(batch))


def test_a_reference_of_nan_fails_no_assert_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would end the process, where a loss of NaN lets the trainer stop and tell."""

    def never(*arguments: object) -> None:
        raise AssertionError("asserted")

    monkeypatch.setattr(torch, "_assert_async", never)
    checks.ref_logprob(torch.full((2,), torch.nan, device="meta"))


def test_packing_and_the_module_check_as_well() -> None:
    with pytest.raises(ValueError, match=r"labels: expected shape \(B, T\) = \(2, 3\); got \(2, 4\)"):
        pack_responses(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="ignore_index: expected an integer; got None"):
        pack_responses(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), ignore_index=None)
    with pytest.raises(ValueError, match="loss_type: expected one of"):
        LinearMOPOLoss(loss_type="dpo")


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from mopo_kernels import backends

    monkeypatch.setitem(backends._REASONS, "cpp", "the C++ extension was not built: for this test")
    batch = make_batch()
    assert issubclass(backends.BackendUnavailableError, RuntimeError)
    with pytest.raises(
        backends.BackendUnavailableError, match="backend 'cpp' is not available: the C\\+\\+ extension was not built"
    ):
        linear_logprob(batch.hidden, batch.weight, batch.target, backend="cpp")
    assert backends.resolve("auto", torch.device("cpu")) == "torch"
    monkeypatch.setitem(backends._REASONS, "cpp", None)
    with pytest.raises(backends.BackendUnavailableError, match="backend 'cpp' serves CPU tensors; got tensors on meta"):
        backends.resolve("cpp", torch.device("meta"))
