"""The head cut over a process group: every rank gets the numbers of the whole head, on 2 and 3 gloo processes."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from samples import CPU_BACKENDS, Batch, make_batch
from torch import Tensor

from mopo_kernels import linear_logprob, linear_mopo_loss

# Rows of the 37 on each rank: uneven, one rank with a single row.
CUTS = [(20, 17), (36, 1), (5, 1, 31)]
# Whole tiles in one chunk, in several chunks, and the vocabulary tiled as well.
BUFFERS = [1 << 20, 24_000, 5_000]


def own(batch: Batch, cut: tuple[int, ...], rank: int) -> Batch:
    rows = slice(sum(cut[:rank]), sum(cut[: rank + 1]))
    return dataclasses.replace(batch, weight=batch.weight[rows].clone(), bias=batch.bias[rows].clone())


def numbers(batch: Batch, trained: tuple[str, ...], mode: str, **options: Any) -> list[Tensor]:
    """What a call returns, and its gradients."""
    leaves = batch.leaves(*trained)
    if mode == "logprob":
        value = linear_logprob(batch.hidden, batch.weight, batch.target, batch.bias, softcap=4.0, **options)
        upstream = torch.linspace(-1, 2, value.shape[0], dtype=value.dtype)
        outputs, scalar = [value.detach()], (value * upstream).sum()
    else:
        given = batch.loss_options("cloning" if mode == "cloning" else "regression")
        if mode == "shared reference":
            given |= {"ref_logprob": None, "ref_hidden": batch.hidden.detach() + 0.1}
        if mode == "own reference":
            given |= {"ref_logprob": None, "ref_hidden": batch.hidden.detach() + 0.1, "ref_weight": batch.weight * 0.9}
        output = linear_mopo_loss(*batch.loss_arguments(), **given, **options)
        outputs, scalar = [output.loss.detach(), output.log_ratio, output.satisfaction], output.loss
    return [*outputs, *torch.autograd.grad(scalar, leaves)] if leaves else outputs


def join(rank: int, ranks: int, folder: str) -> dist.ProcessGroup:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    assert group is not None
    return group


def leave() -> None:
    """When all are done, and without the interpreter's teardown, in which gloo's threads now and then abort."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def compare(rank: int, cut: tuple[int, ...], folder: str) -> None:
    group = join(rank, len(cut), folder)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for mode in ("logprob", "regression", "cloning", "shared reference", "own reference"):
            for trained in ((), ("hidden",), ("hidden", "weight", "bias")):
                whole = make_batch(dtype=dtype)
                expected = numbers(whole, trained, mode, backend="torch")
                if len(trained) > 1:
                    rows = slice(sum(cut[:rank]), sum(cut[: rank + 1]))
                    expected[-2:] = [g[rows] for g in expected[-2:]]
                for limit in BUFFERS:
                    for backend in CPU_BACKENDS:
                        mine = own(make_batch(dtype=dtype), cut, rank)
                        got = numbers(mine, trained, mode, backend=backend, max_buffer_bytes=limit, process_group=group)
                        for a, b in zip(got, expected, strict=True):
                            assert a.dtype == b.dtype
                            torch.testing.assert_close(
                                a, b, rtol=tolerance, atol=tolerance * b.abs().max().item(), equal_nan=True
                            )
    leave()


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_rank_gets_the_numbers_of_the_whole_head(cut: tuple[int, ...], tmp_path: Path) -> None:
    mp.spawn(compare, args=(cut, str(tmp_path)), nprocs=len(cut))


def differ(rank: int, folder: str) -> None:
    group = join(rank, 2, folder)
    batch = own(make_batch(), (20, 17), rank)
    cases = {
        "number of tokens N": lambda b: (b.hidden[: 3 + rank], b.weight, b.target[: 3 + rank]),
        "hidden size H": lambda b: (b.hidden[:, : 8 + rank], b.weight[:, : 8 + rank], b.target),
        "targets": lambda b: (b.hidden, b.weight, b.target + rank * (b.target >= 0)),
        "require grad": lambda b: (b.hidden.clone().requires_grad_(rank == 0), b.weight, b.target),
    }
    for what, change in cases.items():
        with pytest.raises(
            ValueError, match=f"process_group: expected the same hidden and target on every rank.*{what}"
        ):
            linear_logprob(*change(batch), process_group=group)
    with pytest.raises(ValueError, match=r"target: expected a number in 0 \.\. V - 1 = 36"):
        linear_logprob(batch.hidden, batch.weight, batch.target.clamp(max=0) + 37, process_group=group)
    with pytest.raises(ValueError, match=r"ignore_index: expected a number outside 0 \.\. V - 1 = 36; got 30"):
        linear_logprob(batch.hidden, batch.weight, batch.target.clamp(min=0), ignore_index=30, process_group=group)
    with pytest.raises(ValueError, match="process_group: expected None with backend"):
        linear_logprob(batch.hidden, batch.weight, batch.target, backend="naive", process_group=group)
    leave()


def test_ranks_that_hold_different_batches_are_told_on_every_rank(tmp_path: Path) -> None:
    """The classic mistake is to cut the batch and the vocabulary over the same group. It must not hang either."""
    mp.spawn(differ, args=(str(tmp_path),), nprocs=2)


def one_rank(rank: int, folder: str) -> None:
    group = join(rank, 1, folder)
    batch = make_batch()
    expected = numbers(batch, ("hidden", "weight"), "regression")
    for a, b in zip(numbers(batch, ("hidden", "weight"), "regression", process_group=group), expected, strict=True):
        assert torch.equal(a, b)
    leave()


def test_a_group_of_one_rank_changes_nothing(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=1)
