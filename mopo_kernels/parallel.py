"""A head cut over a process group: every rank holds some rows of the weight, and all hold the same hidden states.

Rank after rank the rows follow one another, as many on each as its weight has. The log-sum-exp and the target's logit
are merged over the ranks a chunk at a time, dhidden is summed over them once; dweight and dbias stay with their rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's part: rows ``start .. start + W`` of ``vocabulary``; ``largest`` is the largest W of all ranks, for
    which every rank plans its chunks, so that all of them have the same number."""

    group: dist.ProcessGroup
    start: int
    vocabulary: int
    largest: int

    def merge_(self, maximum: Tensor, total: Tensor, picked: Tensor) -> None:
        """Merge the running statistics (R,) of :meth:`mopo_kernels.backends.TileBackend.fold` over the ranks:
        eq. (37) of docs/method.md."""
        top = maximum.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        shift = top.where(top > -torch.inf, 0)
        sums = torch.stack([total * torch.exp(maximum - shift), picked])
        dist.all_reduce(sums, group=self.group)
        maximum.copy_(top)
        total.copy_(sums[0])
        picked.copy_(sums[1])

    def sum_(self, tensor: Tensor) -> None:
        """Sum over the ranks in place."""
        dist.all_reduce(tensor, group=self.group)


def open_shard(name: str, hidden: Tensor, weight: Tensor, target: Tensor, needs: tuple[bool, ...]) -> Shard:
    """Exchange sizes over the group: the one point at which a call waits for the device and for the other ranks.

    Raises:
        ValueError: the ranks do not hold the same tokens, or not the same kind of head; on every rank, so none hangs.
    """
    group = dist.distributed_c10d._resolve_process_group(dist.GroupName(name))
    sizes = [weight.shape[0], *hidden.shape, sum(1 << bit for bit, need in enumerate(needs) if need)]
    mine = torch.cat([torch.tensor(sizes, device=target.device), target.sum()[None]])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    ranks = torch.stack(gathered).tolist()
    names = ("number of tokens N", "hidden size H", "set of tensors that require grad", "targets (their sum)")
    for position, what in enumerate(names, start=1):
        values = [rank[position] for rank in ranks]
        if len(set(values)) > 1:
            raise ValueError(
                f"process_group: every rank must hold the same hidden and target and its own rows of weight; "
                f"the {what} must be equal on all ranks; got {values}"
            )
    rows = [rank[0] for rank in ranks]
    return Shard(group, sum(rows[: dist.get_rank(group)]), sum(rows), max(rows))
