"""Win rates by prompt, and what resampling prompts says of them: prompts are the independent units, samples are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Scores = Mapping[str, Sequence[Sequence[float]]]

RESAMPLES = 4000


def win_rate_by_prompt(candidate: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> Array:
    """(X,) ``P(candidate > baseline) + P(tie) / 2`` over all pairs of samples of the same prompt: eq. (29) of
    docs/method.md.

    Args:
        candidate, baseline: [prompt][sample] scores of one judge; the numbers of samples may differ.

    Raises:
        ValueError: unequal numbers of prompts, or none.
    """
    if len(candidate) != len(baseline) or not len(candidate):
        raise ValueError(f"scores: expected the same prompts; got {len(candidate)} and {len(baseline)}")
    return np.array(
        [
            (1.0 + np.sign(np.asarray(ours)[:, None] - np.asarray(theirs)[None, :]).mean()) / 2.0
            for ours, theirs in zip(candidate, baseline, strict=True)
        ]
    )


def rates(candidate: Scores, baseline: Scores) -> dict[str, Array]:
    """objective -> (X,) win rate by prompt."""
    return {name: win_rate_by_prompt(candidate[name], baseline[name]) for name in candidate}


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts: with its standard error, and the percentile interval of ``level``."""

    mean: float
    error: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resamples(prompts: int, count: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """(count, prompts) indices drawn with replacement: the same for everything that is compared."""
    return np.random.default_rng(seed).integers(prompts, size=(count, prompts))


def estimate(by_prompt: Array, level: float = 0.95, seed: int = 0) -> Estimate:
    """Of the mean of (X,) values, by resampling prompts.

    A difference of two policies on the same prompts is a value by prompt as well: so a paired interval is this one of
    ``first - second``.

    Raises:
        ValueError: fewer than 2 prompts.
    """
    if by_prompt.ndim != 1 or len(by_prompt) < 2:
        raise ValueError(f"by_prompt: expected shape (X,), X at least 2; got {by_prompt.shape}")
    means = by_prompt[resamples(len(by_prompt), seed=seed)].mean(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    error = float(by_prompt.std(ddof=1) / np.sqrt(len(by_prompt)))
    return Estimate(float(by_prompt.mean()), error, float(low), float(high), level)


def keeps(by_prompt: Mapping[str, Array], thresholds: Mapping[str, float], margin: float = 0.0) -> bool:
    """Whether the mean of every held objective is at least its threshold, plus ``margin`` standard errors by prompt."""
    return all(
        float(value.mean()) >= bound + margin * float(value.std(ddof=1) / np.sqrt(len(value)))
        for name, bound in thresholds.items()
        for value in [by_prompt[name]]
    )
