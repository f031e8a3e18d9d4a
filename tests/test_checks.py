"""Wrong arguments raise an error that names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import Batch, make_batch

from mopo_kernels import LinearMOPOLoss, linear_logprob, linear_mopo_loss, mopo_loss, pack_responses


def changed(batch: Batch, **changes: Any) -> Batch:
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch


def with_value(tensor: torch.Tensor, position: Any, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


WRONG: dict[str, tuple[Callable[[Batch], dict[str, Any]], str]] = {
    "hidden dimensions": (lambda b: {"hidden": b.hidden[0]}, r"hidden must have shape \(N, H\); got \(16,\)"),
    "hidden dtype": (lambda b: {"hidden": b.hidden.long()}, "hidden must have dtype float32.*got int64"),
    "weight shape": (
        lambda b: {"weight": b.weight[:, :3]},
        r"weight must have shape \(V, H\) = \(37, 16\); got \(37, 3\)",
    ),
    "weight dtype": (lambda b: {"weight": b.weight.float()}, "weight must have dtype float64; got float32"),
    "bias shape": (lambda b: {"bias": b.bias[:5]}, r"bias must have shape \(V,\) = \(37,\); got \(5,\)"),
    "target shape": (lambda b: {"target": b.target[1:]}, r"target must have shape \(N,\)"),
    "target dtype": (lambda b: {"target": b.target.int()}, "target must have dtype int64; got int32"),
    "target too large": (
        lambda b: {"target": with_value(b.target, 4, 37)},
        r"target must lie in 0 .. V - 1 = 36 or equal ignore_index = -100; got 37 at index 4",
    ),
    "target negative": (lambda b: {"target": with_value(b.target, 2, -1)}, "target must lie in .*got -1 at index 2"),
    "cu_seqlens dtype": (lambda b: {"cu_seqlens": b.cu_seqlens.double()}, "cu_seqlens must have dtype int64, int32"),
    "cu_seqlens start": (lambda b: {"cu_seqlens": with_value(b.cu_seqlens, 0, 1)}, r"cu_seqlens\[0\] must be 0; got 1"),
    "cu_seqlens end": (lambda b: {"cu_seqlens": with_value(b.cu_seqlens, -1, 3)}, r"cu_seqlens\[-1\] must be N = "),
    "cu_seqlens order": (
        lambda b: {"cu_seqlens": with_value(b.cu_seqlens, 3, 0)},
        "cu_seqlens must not decrease; got -[0-9]+ at step 2",
    ),
    "pairs shape": (lambda b: {"pairs": b.pairs[:, :1]}, r"pairs must have shape \(P, 2\) = \(12, 2\); got \(12, 1\)"),
    "pairs dtype": (lambda b: {"pairs": b.pairs.int()}, "pairs must have dtype int64; got int32"),
    "pairs range": (
        lambda b: {"pairs": with_value(b.pairs, (3, 1), 12)},
        r"pairs must lie in 0 .. S - 1 = 11; got 12 at index \(3, 1\)",
    ),
    "pairs negative": (lambda b: {"pairs": with_value(b.pairs, (0, 0), -1)}, "pairs must lie in .*got -1"),
    "pairs of one response": (lambda b: {"pairs": with_value(b.pairs, (1, 1), 0)}, "pairs must name two different"),
    "preference shape": (
        lambda b: {"preference": b.preference[1:]},
        r"preference must have shape \(P, K\) = \(12, 3\)",
    ),
    "preference range": (
        lambda b: {"preference": with_value(b.preference, (5, 1), 1.5)},
        r"preference must lie in \[0, 1\] or be NaN; got 1.5 at index \(5, 1\)",
    ),
    "objective_weight shape": (
        lambda b: {"objective_weight": b.objective_weight[:2]},
        r"objective_weight must have shape \(K,\) = \(3,\); got \(2,\)",
    ),
    "objective_weight negative": (
        lambda b: {"objective_weight": with_value(b.objective_weight, 2, -0.5)},
        "objective_weight must be finite and not negative; got -0.5 at index 2",
    ),
    "objective_weight infinite": (
        lambda b: {"objective_weight": with_value(b.objective_weight, 1, torch.inf)},
        "objective_weight must be finite",
    ),
    "device": (lambda b: {"pairs": b.pairs.to("meta")}, "pairs must be on cpu, as hidden or logprob is; got meta"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_wrong_tensor_is_named_with_expectation_and_value(case: str, backend: str) -> None:
    change, message = WRONG[case]
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        linear_mopo_loss(
            *changed(batch, **change(batch)).loss_arguments(), ref_logprob=batch.ref_logprob, backend=backend
        )


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "tau": ({"tau": 0.0}, "tau must be positive and finite; got 0.0"),
    "loss_type": ({"loss_type": "ppo"}, "loss_type must be one of regression, cloning, sigmoid; got 'ppo'"),
    "estimator": ({"estimator": "mean"}, "estimator must be one of pair, snis, closed_form; got 'mean'"),
    "prompt_index missing": ({"loss_type": "cloning"}, "prompt_index must be given for loss_type"),
    "prompt_index missing for the estimator": ({"estimator": "closed_form"}, "prompt_index must be given"),
    "margin without sigmoid": ({"margin": torch.zeros(12)}, 'margin must be None unless loss_type is "sigmoid"'),
    "pair_weight shape": ({"pair_weight": torch.ones(3)}, r"pair_weight must have shape \(P,\) = \(12,\); got \(3,\)"),
    "pair_weight negative": ({"pair_weight": -torch.ones(12)}, "pair_weight must be finite and not negative; got -1.0"),
    "label_rate range": ({"label_rate": torch.tensor([1.0, 0.0, 1.0])}, r"label_rate must lie in \(0, 1\]; got 0.0"),
    "length zero": ({"length": torch.zeros(12)}, "length must be positive and finite; got 0.0 at index 0"),
    "max_ratio": ({"max_ratio": -1.0}, "max_ratio must be positive"),
    "normalizer": ({"normalizer": -3.0}, "normalizer must be finite and not negative; got -3.0"),
    "softcap": ({"softcap": 0.0}, "softcap must be positive"),
    "temperature": ({"temperature": -1.0}, "temperature must be positive"),
    "logit_scale": ({"logit_scale": float("nan")}, "logit_scale must be finite; got nan"),
    "ignore_index": ({"ignore_index": 3}, "ignore_index must lie outside 0 .. V - 1 = 36; got 3"),
    "max_buffer_bytes": ({"max_buffer_bytes": 0}, "max_buffer_bytes must be positive; got 0"),
    "backend": ({"backend": "tpu"}, "backend must be one of auto, reference, torch, cpp, triton, cuda; got 'tpu'"),
    "both references": ({"ref_hidden": torch.zeros(3, 3)}, "ref_logprob and ref_hidden must be given one without"),
    "reference shape": ({"ref_logprob": torch.zeros(3)}, r"ref_logprob must have shape \(S,\) = \(12,\); got \(3,\)"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_a_wrong_option_is_named_with_expectation_and_value(case: str) -> None:
    options, message = WRONG_OPTIONS[case]
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        linear_mopo_loss(*batch.loss_arguments(), **({"ref_logprob": batch.ref_logprob} | options))


def test_the_unfused_loss_checks_as_well() -> None:
    batch = make_batch()
    arguments = (batch.pairs, batch.preference, batch.objective_weight)
    with pytest.raises(ValueError, match=r"ref_logprob must have shape \(S,\) = \(12,\); got \(11,\)"):
        mopo_loss(batch.ref_logprob, batch.ref_logprob[1:], *arguments)
    with pytest.raises(ValueError, match=r"pairs must lie in 0 .. S - 1 = 4; got 5"):
        mopo_loss(batch.ref_logprob[:5], batch.ref_logprob[:5], *arguments)


def test_packing_and_the_module_check_as_well() -> None:
    with pytest.raises(ValueError, match=r"labels must have shape \(B, T\) = \(2, 3\); got \(2, 4\)"):
        pack_responses(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="loss_type must be one of"):
        LinearMOPOLoss(loss_type="dpo")


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from mopo_kernels import backends

    monkeypatch.setitem(backends._REASONS, "cpp", "the C++ extension was not built: for this test")
    batch = make_batch()
    with pytest.raises(RuntimeError, match="backend 'cpp' is not available: the C\\+\\+ extension was not built"):
        linear_logprob(batch.hidden, batch.weight, batch.target, backend="cpp")
    assert backends.resolve("auto", torch.device("cpu")) == "torch"
