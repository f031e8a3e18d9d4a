"""Legal inputs that are unlike most: any strides, the smallest buffer, ratios beyond the range of fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import CPU_BACKENDS, make_batch
from torch import Tensor

from mopo_kernels import backends, linear_logprob, linear_sequence_logprob, mopo_loss
from mopo_kernels.fused.buffer_plan import MIN_CONVERTED
from mopo_kernels.fused.chunked_head import FARTHEST_ROWS, ChunkedHead, row_major
from mopo_kernels.naive import LOSS_TYPES

# numpy's, in the interpreter of Triton, for what a mask leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EVERY_BACKEND = [*CPU_BACKENDS, *(["triton"] if backends.availability()["triton"] is None else [])]
# Layouts of a matrix that are not its rows one after the other.
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "column-major": lambda x: x.T.contiguous().T,
    "apart": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "expanded rows": lambda x: x[:1].expand_as(x),
    "expanded columns": lambda x: x[:, :1].expand_as(x),
}


def _apart(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 1000)], dim=-1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", MATRICES)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_strides_change_no_number(backend: str, layout: str, dtype: torch.dtype) -> None:
    """hidden, weight, bias, target and cu_seqlens, all of them and each alone."""
    batch = make_batch(prompts=1, responses=3, longest=4, hidden=6, vocabulary=11, dtype=dtype)
    target = batch.target.clamp(min=0)
    plain = {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias, "target": target}
    plain["cu_seqlens"] = batch.cu_seqlens
    strided = {name: MATRICES[layout](x) if x.dim() == 2 else _apart(x) for name, x in plain.items()}
    everything = [list(plain)] if backend == "triton" else [list(plain), *([name] for name in plain)]

    def call(arguments: dict[str, Tensor]) -> list[Tensor]:
        leaves = [arguments[name].detach().requires_grad_() for name in ("hidden", "weight", "bias")]
        rows = (arguments["target"], arguments["cu_seqlens"])
        value = linear_sequence_logprob(*leaves[:2], *rows, leaves[2], backend=backend)
        return [value, *torch.autograd.grad(value.sum(), leaves)]

    for names in everything:
        given = plain | {name: strided[name] for name in names}
        torch.testing.assert_close(call(given), call({name: x.contiguous() for name, x in given.items()}))


def test_rows_too_far_apart_for_offsets_of_32_bits_are_copied() -> None:
    near, far = (torch.empty_strided((3, 5), (step, 1), device="meta") for step in (FARTHEST_ROWS - 1, FARTHEST_ROWS))
    assert row_major(near) is near
    assert row_major(far).stride() == (5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_least_buffer_cuts_a_small_problem_into_few_tiles(
    backend: str, trained: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocabulary = 5, 3000
    hidden = torch.randn(rows, 16).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 16).to(dtype).requires_grad_(trained)
    target = torch.randint(0, vocabulary, (rows,))
    products = []
    multiply = ChunkedHead._product_

    def counted(*arguments: Any, **options: Any) -> None:
        products.append(1)
        multiply(*arguments, **options)

    def call(limit: int) -> None:
        linear_logprob(hidden, weight, target, backend=backend, max_buffer_bytes=limit).sum().backward()

    monkeypatch.setattr(ChunkedHead, "_product_", counted)
    with pytest.raises(ValueError, match="max_buffer_bytes: expected at least") as error:
        call(1)
    call(int(str(error.value).split("at least ")[1].split()[0]))
    assert len(products) <= 4 * rows * (vocabulary / MIN_CONVERTED + 1)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_objective_is_lost_to_underflow_of_the_frozen_ratio(loss_type: str) -> None:
    """The second objective has labels of the two worst of three responses alone, whose ratios fp32 has as 0."""
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    preference = torch.tensor([[1.0, torch.nan], [1.0, torch.nan], [torch.nan, 0.75]], dtype=torch.float64)
    arguments = (pairs, preference, torch.tensor([1.0, 0.1], dtype=torch.float64))
    options: dict[str, Any] = {"tau": 0.005, "loss_type": loss_type, "estimator": "closed_form"}
    options["prompt_index"] = torch.zeros(3, dtype=torch.int64)
    logprob = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    exact = mopo_loss(logprob, -torch.ones_like(logprob), *arguments, **options)
    single = mopo_loss(
        logprob.float(), -torch.ones(3), pairs, *(argument.float() for argument in arguments[1:]), **options
    )
    # Each of the two by its own ratio: u is 10 apart, so that their weights are sig(10) and sig(-10).
    share = 1 / (1 + math.exp(-10.0))
    assert exact.satisfaction[1].item() == pytest.approx(0.75 * share + 0.25 * (1 - share))
    torch.testing.assert_close(single.satisfaction, exact.satisfaction.float())
    assert exact.labelled[1] < 1e-80
    assert single.labelled[1] > 0
