"""Prompts drawn where every value is known: what certificates are tried on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from mopo_kernels.certify import PromptSums

NAMES = ("first", "second")


def judged(rng: np.random.Generator, prompts: int, rate: float, size: float) -> tuple[PromptSums, list[float]]:
    """Two objectives with a win rate of ``rate`` each that disagree within prompts; four answers a prompt."""
    latent = rng.multivariate_normal([0.0, 0.0], [[1.0, -0.5], [-0.5, 1.0]], prompts)
    chance = stats.beta.ppf(stats.norm.cdf(latent), rate * size, (1 - rate) * size)
    value = rng.binomial(4, chance) / 4
    return PromptSums(NAMES, value, np.ones_like(value), np.full(prompts, 4.0)), [rate, rate]


def weighted(rng: np.random.Generator, prompts: int, divergence: float) -> tuple[PromptSums, list[float]]:
    """Four responses a prompt by the reference; half of the policy's log-ratio, normal, is the first score.

    The second score has a correlation of -0.5 with the first, so its win rate falls below 1/2.
    """
    spread = math.sqrt(2 * divergence)
    score, noise = rng.standard_normal((2, prompts, 4)), rng.standard_normal((prompts, 4))
    weight = np.exp(spread * math.sqrt(0.5) * (score[0] + noise) - spread**2 / 2)
    other = -0.5 * score[0] + math.sqrt(0.75) * score[1]
    i, j = np.triu_indices(4, 1)
    value = np.stack(
        [(np.where(s[:, i] > s[:, j], weight[:, i], weight[:, j])).sum(1) for s in (score[0], other)],
        axis=1,
    )
    total = np.repeat((weight[:, i] + weight[:, j]).sum(1)[:, None], 2, axis=1)
    shift = spread * math.sqrt(0.5) / math.sqrt(2)
    return PromptSums(NAMES, value, total, np.full(prompts, 4.0), weight.sum(1)), [
        float(stats.norm.cdf(shift)),
        float(stats.norm.cdf(-0.5 * shift)),
    ]


CASES: dict[str, Callable[[np.random.Generator], tuple[PromptSums, list[float]]]] = {
    # Few prompts, and win rates near 1, where nearly no prompt shows what can go wrong.
    "judged, 30 prompts, 0.5": lambda rng: judged(rng, 30, 0.5, 2.0),
    "judged, 30 prompts, 0.95": lambda rng: judged(rng, 30, 0.95, 1.0),
    "judged, 120 prompts, 0.8": lambda rng: judged(rng, 120, 0.8, 1.0),
    # Weights that are nearly even, and weights near what the least effective number of prompts lets through.
    "weighted, 100 prompts, 0.3 nats": lambda rng: weighted(rng, 100, 0.3),
    "weighted, 100 prompts, 1 nat": lambda rng: weighted(rng, 100, 1.0),
    "weighted, 200 prompts, 2 nats": lambda rng: weighted(rng, 200, 2.0),
}
