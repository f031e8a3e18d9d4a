"""What is compared: one preference batch, and each way of getting its loss and gradients.

Every contender does the same work: policy forward and backward, reference log-probabilities from reference hidden
states, the regression loss with K objectives. ``bare`` is the floor: the matrix products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mopo_kernels import backends, linear_mopo_loss, pack_responses, reference


@dataclass(frozen=True)
class Workload:
    """4 pairs x 2 responses x ``length`` tokens by default, ``prompt_share`` of them prompt."""

    hidden: int = 1024
    vocabulary: int = 50304
    prompts: int = 4
    length: int = 256
    prompt_share: float = 0.5
    objectives: int = 2
    trained: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def scored(self) -> int:
        """Scored tokens N."""
        return 2 * self.prompts * (self.length - int(self.length * self.prompt_share))

    @property
    def units(self) -> int:
        """Products of N x V x H that the work takes at least: policy 3 (head trained) or 2, reference 1."""
        return 4 if self.trained else 3


@dataclass
class Inputs:
    """A batch of a workload, fresh for a seed. ``hidden`` (B, T, H) requires grad, ``weight`` (V, H) if trained."""

    hidden: Tensor
    ref_hidden: Tensor
    weight: Tensor
    labels: Tensor
    pairs: Tensor
    preference: Tensor
    objective_weight: Tensor

    @classmethod
    def make(cls, work: Workload, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        rows = 2 * work.prompts
        prompt = int(work.length * work.prompt_share)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).mul_(work.hidden**-0.25).to(work.dtype)

        labels = torch.randint(0, work.vocabulary, (rows, work.length + 1), generator=g)
        labels[:, : prompt + 1] = -100
        return cls(
            hidden=normal(rows, work.length + 1, work.hidden).requires_grad_(),
            ref_hidden=normal(rows, work.length + 1, work.hidden),
            weight=normal(work.vocabulary, work.hidden).requires_grad_(work.trained),
            labels=labels,
            pairs=torch.arange(rows).view(-1, 2),
            preference=torch.randint(0, 2, (work.prompts, work.objectives), generator=g).float(),
            objective_weight=torch.ones(work.objectives),
        )

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight) if t.requires_grad]


Result = tuple[Tensor, ...]


def fused(backend: str) -> Callable[[Inputs], Result]:
    """This library's one-pass loss."""

    def run(x: Inputs) -> Result:
        rows, target, cu_seqlens = pack_responses(x.hidden, x.labels)
        ref_rows = pack_responses(x.ref_hidden, x.labels)[0]
        loss = linear_mopo_loss(
            rows,
            x.weight,
            target,
            cu_seqlens,
            x.pairs,
            x.preference,
            x.objective_weight,
            ref_hidden=ref_rows,
            backend=backend,
        ).loss
        return loss, *torch.autograd.grad(loss, x.leaves())

    return run


def _loss(x: Inputs, logprob: Tensor, ref_logprob: Tensor) -> Result:
    loss = reference.mopo_loss(logprob, ref_logprob, x.pairs, x.preference, x.objective_weight).loss
    return loss, *torch.autograd.grad(loss, x.leaves())


def plain(x: Inputs) -> Result:
    """Logits of every row, prompts and padding included."""
    target = x.labels[:, 1:]
    scored = target != -100

    def logprob(hidden: Tensor) -> Tensor:
        logits = (hidden[:, :-1] @ x.weight.T).float()
        picked = logits.log_softmax(-1).gather(-1, target.where(scored, 0)[..., None])[..., 0]
        return (picked * scored).sum(dim=1)

    with torch.no_grad():
        ref_logprob = logprob(x.ref_hidden)
    return _loss(x, logprob(x.hidden), ref_logprob)


def plain_compacted(x: Inputs) -> Result:
    """Logits of the scored rows only."""

    def logprob(hidden: Tensor) -> Tensor:
        rows, target, cu_seqlens = pack_responses(hidden, x.labels)
        return reference.segment_sum(reference.linear_logprob(rows, x.weight, target), cu_seqlens)

    with torch.no_grad():
        ref_logprob = logprob(x.ref_hidden)
    return _loss(x, logprob(x.hidden), ref_logprob)


def bare(x: Inputs) -> Result:
    """The products alone, over the scored rows: reference, policy, dhidden and, if the head is trained, dweight."""
    with torch.no_grad():
        rows, ref_rows = (pack_responses(h, x.labels)[0] for h in (x.hidden, x.ref_hidden))
        logits = ref_rows @ x.weight.T
        torch.mm(rows, x.weight.T, out=logits)
        dhidden = logits @ x.weight
        return (dhidden, logits.T @ rows) if x.weight.requires_grad else (dhidden,)


CONTENDERS: dict[str, Callable[[Inputs], Result]] = {
    "bare products": bare,
    **{f"mopo_kernels {b}": fused(b) for b, why in backends.availability().items() if not why and b != "reference"},
    "plain PyTorch, scored rows": plain_compacted,
    "plain PyTorch, all rows": plain,
}
