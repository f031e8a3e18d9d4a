"""Batches by a budget of tokens, the same count on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from mopo_kernels.data.collator import ExampleSize

# Examples are sorted by length among those of so many batches a rank: similar ones meet, and batches still differ.
_WINDOW = 16


def batch_tokens(sizes: Sequence[ExampleSize], shared_prompts: bool) -> int:
    """Tokens of a batch of examples as it is laid out, padding included."""
    if shared_prompts:
        return sum(size.tokens for size in sizes)
    return sum(size.responses for size in sizes) * max(size.longest for size in sizes)


class TokenBudgetSampler(Sampler[list[int]]):
    """Indices of examples, batch after batch, each at most ``budget`` tokens as it is laid out.

    Every rank makes the same plan from the same seed and takes its own part: a round has one batch for each, of similar
    cost. Which examples share a batch is settled once, so that every epoch has the same number of steps; the order of
    the rounds is drawn anew each epoch. Every example is in one batch, except that where every batch is a single
    example some are repeated until each rank has as many.

    Args:
        sizes: of the examples, in their order.
        budget: tokens of a batch.
        shared_prompts: whether batches are laid out so (see ``PreferenceCollator``).
        shuffle: False keeps the examples and rounds in their order.
        seed: of the shuffles.
        ranks, rank: how many processes take part, and which this is.

    Raises:
        ValueError: no example, or one that the budget has no room for.
    """

    def __init__(
        self,
        sizes: Sequence[ExampleSize],
        budget: int,
        *,
        shared_prompts: bool,
        shuffle: bool = True,
        seed: int = 0,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        if not sizes:
            raise ValueError("train_dataset: expected at least one example; got none")
        self.sizes, self.shared_prompts = sizes, shared_prompts
        largest = max(range(len(sizes)), key=lambda index: self.cost([index]))
        if self.cost([largest]) > budget:
            raise ValueError(
                f"max_tokens_per_batch: expected at least {self.cost([largest])}, the tokens of example {largest} "
                f"(counted from 0) with its responses; got {budget}"
            )
        self.shuffle, self.seed, self.rank, self.epoch = shuffle, seed, rank, 0
        self.rounds = self._plan(budget, ranks)

    def cost(self, indices: Sequence[int]) -> int:
        """Tokens of a batch of these examples."""
        return batch_tokens([self.sizes[index] for index in indices], self.shared_prompts)

    def _plan(self, budget: int, ranks: int) -> list[list[list[int]]]:
        order = list(range(len(self.sizes)))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed)).tolist()
            mean = sum(self.cost([index]) for index in order) / len(order)
            window = max(1, int(_WINDOW * ranks * budget / mean))
            for start in range(0, len(order), window):
                part = order[start : start + window]
                order[start : start + window] = sorted(part, key=lambda index: -self.sizes[index].longest)
        batches: list[list[int]] = []
        together: ExampleSize | None = None
        for index in order:
            size = self.sizes[index]
            joined = size if together is None else together.joined(size)
            if together is not None and batch_tokens([joined], self.shared_prompts) <= budget:
                batches[-1].append(index)
                together = joined
            else:
                batches.append([index])
                together = size
        while len(batches) % ranks:
            place = max(range(len(batches)), key=lambda number: len(batches[number]))
            batch = batches[place]
            middle = len(batch) // 2
            # A batch of one cannot be cut: it is repeated.
            batches[place : place + 1] = [batch[:middle], batch[middle:]] if middle else [batch, batch]
        return [batches[start : start + ranks] for start in range(0, len(batches), ranks)]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.rounds)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.rounds), generator=generator).tolist()
        for number in order:
            yield self.rounds[number][self.rank]


class TokenBudgetLoader(DataLoader[Any]):
    """A loader over a ``TokenBudgetSampler`` that is told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """As of the sampler."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
