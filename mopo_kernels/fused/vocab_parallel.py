"""A head cut over a process group: every rank holds some rows of the weight, and all hold the same hidden states.

Rank after rank the rows follow one another, as many on each as its weight has. The log-sum-exp and the target's logit
are merged over the ranks a chunk at a time, dhidden is summed over them once; dweight and dbias stay with their rows.
A ``DTensor`` says by itself how it is cut: :func:`sharded_head` finds the group and this rank's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mopo_kernels import checks
from mopo_kernels.arguments import HeadInputs


class ShardedHead(NamedTuple):
    """This rank's rows of a head, weight (W, H) and bias (W,) or None, and the group that holds the others."""

    weight: Tensor
    bias: Tensor | None
    process_group: dist.ProcessGroup | None


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is a ``DTensor``, without importing what defines it."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a ``DTensor``, on every rank, all of which must call; another tensor is handed on."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def sharded_head(
    weight: Tensor, bias: Tensor | None, process_group: dist.ProcessGroup | None, prefix: str
) -> ShardedHead:
    """A head's local rows and their group; what is no ``DTensor`` is handed on. ``prefix`` begins the arguments' names.

    Differentiable: the gradients of the local rows reach the ``DTensor`` as one of the same placement.

    Raises:
        ValueError: a placement other than ``Shard(0)`` over a mesh of one dimension, or another group than the mesh's;
        on every rank alike, before any of them waits for another.
    """
    if not is_dtensor(weight) and not is_dtensor(bias):
        return ShardedHead(weight, bias, process_group)
    from torch.distributed.tensor import DTensor, Shard

    mesh = None
    for name, tensor in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if tensor is None:
            continue
        expected = "a DTensor like the other part of the head, placed (Shard(0),) over one mesh of one dimension"
        checks.expect(isinstance(tensor, DTensor), name, expected, type(tensor).__name__)
        assert isinstance(tensor, DTensor)
        mesh = tensor.device_mesh if mesh is None else mesh
        got = f"{tuple(tensor.placements)} over {tensor.device_mesh}"
        checks.expect(tensor.placements == (Shard(0),) and tensor.device_mesh == mesh, name, expected, got)
    assert isinstance(weight, DTensor)
    assert mesh is not None
    ranks, rows = mesh.mesh.tolist(), weight.shape[0]
    checks.expect(ranks == sorted(ranks), f"{prefix}weight", "a tensor cut over a mesh whose ranks ascend", ranks)
    # Shard(0) gives ceil(V / ranks) rows to each rank until there are none left.
    share = -(-rows // len(ranks))
    expected = f"rows for each of {len(ranks)} ranks, {share} to all but the last"
    checks.expect(share * (len(ranks) - 1) < rows, f"{prefix}weight", expected, f"{rows} rows")
    group = mesh.get_group()
    checks.expect(process_group in (None, group), "process_group", "None or that of weight's mesh", "another")
    return ShardedHead(weight.to_local(), None if bias is None else bias.to_local(), group)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class VocabShard:
    """This rank's part: rows ``start .. start + W`` of ``vocabulary``; ``largest`` is the largest W of all ranks, for
    which every rank plans its chunks, so that all of them have the same number."""

    group: dist.ProcessGroup
    start: int
    vocabulary: int
    largest: int

    @classmethod
    def from_group(cls, name: str, inputs: HeadInputs) -> VocabShard:
        """Exchange sizes over the group: the one point at which a call waits for the device and for the other ranks.

        Raises:
            ValueError: the ranks do not hold the same tokens, or not the same kind of head; on every rank, so none
            hangs.
        """
        group = dist.distributed_c10d._resolve_process_group(dist.GroupName(name))
        target, needs = inputs.target, sum(1 << bit for bit, need in enumerate(inputs.needs) if need)
        sizes = [inputs.weight.shape[0], *inputs.hidden.shape, needs]
        mine = torch.cat([torch.tensor(sizes, device=target.device), target.sum()[None]])
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, mine, group=group)
        ranks = torch.stack(gathered).tolist()
        names = ("number of tokens N", "hidden size H", "set of tensors that require grad", "targets (their sum)")
        for position, what in enumerate(names, start=1):
            values = [rank[position] for rank in ranks]
            if len(set(values)) > 1:
                raise ValueError(
                    f"process_group: expected the same hidden and target on every rank, and its own rows of weight; "
                    f"got {values} for the {what}"
                )
        rows = [rank[0] for rank in ranks]
        return cls(group, sum(rows[: dist.get_rank(group)]), sum(rows), max(rows))

    def all_reduce_lse_(self, row_max: Tensor, sum_exp: Tensor, target_logit: Tensor) -> None:
        """Merge the running statistics (R,) of :meth:`mopo_kernels.backends.base.TileBackend.lse_fwd` over the ranks:
        eq. (37) of docs/method.md."""
        top = row_max.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        shift = top.where(top > -torch.inf, 0)
        sums = torch.stack([sum_exp * torch.exp(row_max - shift), target_logit])
        dist.all_reduce(sums, group=self.group)
        row_max.copy_(top)
        sum_exp.copy_(sums[0])
        target_logit.copy_(sums[1])

    def all_reduce_(self, tensor: Tensor) -> None:
        """Sum over the ranks in place."""
        dist.all_reduce(tensor, group=self.group)
