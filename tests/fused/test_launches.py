"""How many kernels a call launches on a GPU: so few that what stands between the products is hardly noticed. Counted on
tensors without values, through the triton backend up to its launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, Launches, fake_cuda, run_as_on_a_gpu
from samples import Batch, make_batch
from torch import Tensor

from mopo_kernels import MOPOLossOutput, backends, linear_logprob, linear_mopo_loss
from mopo_kernels.fused.chunked_head import Chunk, ChunkedHead

pytestmark = pytest.mark.skipif(
    backends.availability()["triton"] is not None, reason=f"triton: {backends.availability()['triton']}"
)

TRAINED = {"none": (), "frozen": ("hidden",), "trained": ("hidden", "weight")}
# One chunk, several, more; the vocabulary is not tiled. Half precision takes less.
BUFFERS = {2: (1 << 20, 60_000, 30_000), 4: (1 << 20, 60_000, 45_000)}
# Launches a chunk of rows, and a call besides: copies to the device and the upstream 1 included, and with a frozen head
# the last scale of its rows.
CHUNK_AND_CALL = {
    torch.bfloat16: {"none": (4, 5), "frozen": (7, 10), "trained": (11, 8)},
    torch.float16: {"none": (5, 5), "frozen": (18, 10), "trained": (20, 9)},
    torch.float32: {"none": (5, 5), "frozen": (7, 10), "trained": (10, 8)},
}
# A call whose reference comes as hidden states sums its log-probabilities too.
REFERENCE_CALL = 1
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in CHUNK_AND_CALL]


@pytest.fixture
def of_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return run_as_on_a_gpu(monkeypatch)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose chunk went forward, each time."""
    found: list[str] = []
    forward = ChunkedHead.forward

    def noted(head: ChunkedHead, *arguments: Any, **options: Any) -> Any:
        found.append("policy" if options.get("store", True) else "reference")
        return forward(head, *arguments, **options)

    monkeypatch.setattr(ChunkedHead, "forward", noted)
    return found


def device_batch(dtype: torch.dtype, trained: str, vocabulary: int = 64, keep: tuple[str, ...] = ()) -> Batch:
    """On the device, but for what to ``keep`` on the host."""
    batch = make_batch(60, responses=2, longest=4, hidden=8, vocabulary=vocabulary, dtype=dtype)
    moved = {f.name: getattr(batch, f.name) for f in fields(batch)}
    batch = replace(batch, **{name: x if name in keep else x.to("meta") for name, x in moved.items()})
    batch.leaves(*TRAINED[trained])
    return batch


def count(of_triton: list[str], call: Callable[[], Tensor | MOPOLossOutput], trained: str) -> int:
    """Launches of a call, and of the backward from what it returns."""
    of_triton.clear()
    with fake_cuda(), Launches() as launches:
        output = call()
        result = output if isinstance(output, Tensor) else output.loss
        assert result.device == DEVICE
        if TRAINED[trained]:
            torch.autograd.backward(result)
    return len(launches.names) + len(of_triton)


def options_of(batch: Batch, loss_type: str) -> dict[str, Any]:
    """All that a loss takes besides its batch, or nothing."""
    if loss_type == "regression":
        return {"loss_type": loss_type}
    return {
        "loss_type": loss_type,
        "estimator": "snis",
        "pair_weight": batch.pair_weight,
        "label_rate": torch.empty_like(batch.objective_weight),
        "margin": torch.empty_like(batch.pair_weight),
        "length": batch.length,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("loss_type", ["regression", "sigmoid"])
def test_a_loss_launches_few_kernels_a_chunk_and_few_a_call(
    loss_type: str, trained: str, dtype: torch.dtype, of_triton: list[str], chunks: list[str]
) -> None:
    a_chunk, a_call = CHUNK_AND_CALL[dtype][trained]
    of_reference = CHUNK_AND_CALL[dtype]["none"][0]
    numbers = set()
    for buffer, reference in itertools.product(BUFFERS[dtype.itemsize], ("ref_logprob", "ref_hidden")):
        batch = device_batch(dtype, trained, keep=("cu_seqlens", "pairs"))
        options = options_of(batch, loss_type) | {"backend": "triton", "max_buffer_bytes": buffer}
        options[reference] = batch.ref_logprob if reference == "ref_logprob" else batch.hidden.detach()
        chunks.clear()
        launched = count(of_triton, partial(linear_mopo_loss, *batch.loss_arguments()[:-1], **options), trained)
        of_policy = chunks.count("policy")
        expected = of_policy * a_chunk + a_call
        if reference == "ref_logprob":
            numbers.add(of_policy)
            assert launched == expected
        elif "reference" in chunks:
            assert launched == expected + chunks.count("reference") * of_reference + REFERENCE_CALL
        else:
            # Both go through one product, their rows put together and their log-probabilities parted again.
            assert launched <= expected + 7
    assert len(numbers) > 1


def test_all_chunks_but_the_last_fill_the_fused_products_blocks_of_rows(
    of_triton: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = ChunkedHead.forward

    def noted(head: ChunkedHead, chunk: Chunk, *arguments: Any, **options: Any) -> Any:
        sizes.append(chunk.stop - chunk.start)
        return forward(head, chunk, *arguments, **options)

    monkeypatch.setattr(ChunkedHead, "forward", noted)
    batch = device_batch(torch.bfloat16, "frozen")
    call = partial(linear_logprob, batch.hidden, batch.weight, batch.target, backend="triton", max_buffer_bytes=45_000)
    count(of_triton, lambda: call().sum(), "frozen")
    block = backends.tile_backend("triton").row_block(torch.bfloat16)
    assert block > 1
    assert len(sizes) > 1
    assert all(size % block == 0 for size in sizes[:-1])


@pytest.mark.parametrize("trained", TRAINED)
def test_what_adds_to_the_launches(trained: str, of_triton: list[str]) -> None:
    """Nothing is copied where all is on the device; the last block of a vocabulary that is no multiple of 16 is
    launched by itself."""

    def of(**batch_options: Any) -> int:
        batch = device_batch(torch.bfloat16, trained, **batch_options)
        arguments, known = batch.loss_arguments()[:-1], {"ref_logprob": batch.ref_logprob, "backend": "triton"}
        return count(of_triton, partial(linear_mopo_loss, *arguments, **known), trained)

    planned = of(keep=("cu_seqlens", "pairs"))
    assert planned == sum(CHUNK_AND_CALL[torch.bfloat16][trained])
    assert of() == planned - 2
    assert of(vocabulary=70) == planned - 1


@pytest.mark.parametrize(("trained", "expected"), [("none", 5), ("frozen", 14), ("trained", 17)])
def test_log_probabilities_launch_few_kernels(trained: str, expected: int, of_triton: list[str]) -> None:
    batch = device_batch(torch.bfloat16, trained)
    call = partial(linear_logprob, batch.hidden, batch.weight, batch.target, backend="triton")
    assert count(of_triton, lambda: call().sum(), trained) == expected + 1  # the sum


def test_what_launches_is_counted_and_what_does_not_is_not() -> None:
    x = torch.empty(4, 2, device="meta")
    with fake_cuda(), Launches() as launches:
        x.T.view(2, 4)
        torch.empty_like(x)
        x[:0].sum(dim=1)
        torch.ones(3) + 1
    assert launches.names == []
    with fake_cuda(), Launches() as launches:
        torch.zeros_like(x).add_(x)
        x[:, 0].contiguous()
        x.to(torch.float64)
        torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
    assert launches.names == ["zeros_like", "add_", "clone", "_to_copy", "_to_copy"]
