"""Policies small enough to be written out: a table, a log-linear class, and a transformer that spells its responses.

All three have the same few methods, so that :mod:`studies.canonical_structures.learning` trains them alike:
log-probabilities of every response (X, Y), and the library's loss on a batch of pairs. The first two go through
``mopo_loss``, the transformer through ``linear_mopo_loss``, from hidden states and a head, as a language model does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mopo_kernels import MOPOLossOutput, linear_mopo_loss, linear_sequence_logprob, mopo_loss

__all__ = ["LogLinear", "Policy", "Rows", "Transformer", "log_linear", "repeats", "spell", "table"]

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch as the loss takes it. Sequences are draws: the same response may be several of them.

    Attributes:
        cell: (S,) int64, ``x * Y + y`` of each sequence.
        pairs: (P, 2) int64, the sequences of each pair.
        preference: (P, K) fp64, NaN where there is no label.
        weight: (P,) fp64, how many pairs of the data a row stands for.
        group: (S,) int64, sequences that were drawn together for one prompt.
    """

    cell: Tensor
    pairs: Tensor
    preference: Tensor
    weight: Tensor
    group: Tensor


def repeats(rows: Rows) -> Tensor:
    """(S,) how many sequences of the data each one stands for: the weight of the pairs of its pool."""
    result = torch.zeros(rows.cell.shape[0], dtype=torch.float64)
    result[rows.pairs[:, 0]] = rows.weight
    result[rows.pairs[:, 1]] = rows.weight
    return result


class Policy(Protocol):
    """What training needs of a policy."""

    def parameters(self) -> Any: ...

    def table(self) -> Tensor:
        """(X, Y) log-probabilities in nats, differentiable."""
        ...

    def loss(self, rows: Rows, reference: Tensor, objective_weight: Tensor, **options: Any) -> MOPOLossOutput:
        """The library's loss of a batch; reference (X * Y,) log-probabilities, options those of ``mopo_loss``."""
        ...


class LogLinear(nn.Module):
    """``softmax(base + design @ theta)``, or ``softmax(base + theta)`` with one parameter a cell.

    Args:
        base: (X, Y) logits at ``theta = 0``; minus infinity where the policy may never go.
        design: (X, Y, F), or None for a table.
    """

    def __init__(self, base: Tensor, design: Tensor | None = None) -> None:
        super().__init__()
        self.base = base
        self.design = design
        size = base.numel() if design is None else design.shape[2]
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def table(self) -> Tensor:
        tilt = self.theta.view(self.base.shape) if self.design is None else self.design @ self.theta
        return torch.log_softmax(self.base + tilt, dim=1)

    def loss(self, rows: Rows, reference: Tensor, objective_weight: Tensor, **options: Any) -> MOPOLossOutput:
        logprob = self.table().reshape(-1)[rows.cell]
        if options["loss_type"] == "cloning":
            # Cloning takes no pair weights, and is linear in the log-probabilities: a sequence that stands for c equal
            # ones has c times their gradient. Its own value stays, as the measured satisfaction depends on it.
            repeat = repeats(rows)
            fixed = logprob.detach()
            logprob = fixed + repeat * (logprob - fixed)
            options["normalizer"] = repeat.sum()
        return mopo_loss(
            logprob,
            reference[rows.cell],
            rows.pairs,
            rows.preference,
            objective_weight,
            pair_weight=rows.weight,
            prompt_index=rows.group,
            **options,
        )

    def curvature(self, cell_curvature: Tensor) -> Tensor:
        """The second derivative with respect to theta, (F, F), given the one with respect to the cells' logits."""
        if self.design is None:
            return cell_curvature
        design = self.design.reshape(-1, self.design.shape[2])
        return design.T @ cell_curvature @ design


def table(reference: Array) -> LogLinear:
    """Any policy (X, Y) on the reference's support, starting at the reference."""
    return LogLinear(torch.log(torch.as_tensor(reference, dtype=torch.float64)))


def log_linear(features: Array, reference: Array) -> LogLinear:
    """``softmax(features @ theta)``, features (X, Y, F), starting as near to the reference (X, Y) as least squares in
    the logits takes it. The class need not contain the reference."""
    centred = features - features.mean(1, keepdims=True)
    logit = np.log(reference)
    logit = logit - logit.mean(1, keepdims=True)
    theta = np.linalg.lstsq(centred.reshape(-1, features.shape[2]), logit.reshape(-1), rcond=None)[0]
    design = torch.as_tensor(features, dtype=torch.float64)
    policy = LogLinear(torch.zeros(features.shape[:2], dtype=torch.float64), design)
    with torch.no_grad():
        policy.theta.copy_(torch.as_tensor(theta))
    return policy


def spell(responses: int, largest_alphabet: int = 4) -> Tensor:
    """The strings (Y, L) of one length, two tokens or more, over the largest alphabet of at most ``largest_alphabet``
    tokens that has exactly ``responses`` of them.

    Raises:
        ValueError: no alphabet has.
    """
    for alphabet in range(largest_alphabet, 1, -1):
        length = round(float(np.log(responses) / np.log(alphabet)))
        if length >= 2 and alphabet**length == responses:
            power = alphabet ** torch.arange(length - 1, -1, -1)
            return torch.arange(responses)[:, None] // power % alphabet
    raise ValueError(f"responses must be a power, A^L with 2 <= A <= {largest_alphabet} and L >= 2, got {responses}")


class Transformer(nn.Module):
    """A causal transformer in double precision: one token says which prompt, the response is a string of L tokens.

    Args:
        prompts: X.
        strings: (Y, L) int64, all strings over the alphabet (see :func:`spell`).
        width: H, the size of the hidden states.
        layers: number of blocks.
        seed: of the initial parameters.
    """

    def __init__(self, prompts: int, strings: Tensor, *, width: int = 32, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.prompts, self.strings = prompts, strings
        responses, length = strings.shape
        alphabet = int(strings.max()) + 1
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            # The prompts' tokens come after the alphabet's.
            self.embedding = nn.Embedding(alphabet + prompts, width)
            self.position = nn.Parameter(0.02 * torch.randn(length, width))
            block = nn.TransformerEncoderLayer(
                width, 2, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
            self.head = nn.Linear(width, alphabet, bias=False)
        self.double()
        prompt = torch.arange(alphabet, alphabet + prompts).repeat_interleave(responses)
        self.tokens = torch.cat([prompt[:, None], strings[:, :-1].repeat(prompts, 1)], dim=1)
        self.target = strings.repeat(prompts, 1)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)

    def hidden(self) -> Tensor:
        """(X * Y, L, H): the hidden state that predicts each token of every response."""
        states: Tensor = self.blocks(self.embedding(self.tokens) + self.position, mask=self.mask, is_causal=True)
        return states

    def _packed(self, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = hidden.shape[1]
        return (
            hidden[cell].reshape(-1, hidden.shape[2]),
            self.target[cell].reshape(-1),
            torch.arange(0, length * cell.shape[0] + 1, length),
        )

    def table(self) -> Tensor:
        every = torch.arange(self.tokens.shape[0])
        hidden, target, cu_seqlens = self._packed(self.hidden(), every)
        return linear_sequence_logprob(hidden, self.head.weight, target, cu_seqlens).view(self.prompts, -1)

    def loss(self, rows: Rows, reference: Tensor, objective_weight: Tensor, **options: Any) -> MOPOLossOutput:
        hidden, target, cu_seqlens = self._packed(self.hidden(), rows.cell)
        return linear_mopo_loss(
            hidden,
            self.head.weight,
            target,
            cu_seqlens,
            rows.pairs,
            rows.preference,
            objective_weight,
            ref_logprob=reference[rows.cell],
            pair_weight=rows.weight,
            prompt_index=rows.group,
            **options,
        )

    def pretrain(self, policy: Array, *, steps: int = 400, learning_rate: float = 1e-2) -> float:
        """Make this policy the given one (X, Y) by cross-entropy on every response; returns the KL that is left, nats
        summed over prompts."""
        target = torch.as_tensor(policy, dtype=torch.float64)
        entropy = -torch.special.xlogy(target, target).sum()
        optimizer = torch.optim.Adam(self.parameters(), learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -(target * self.table()).sum() - entropy
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            return float(-(target * self.table()).sum() - entropy)
