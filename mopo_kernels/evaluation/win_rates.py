"""Win rates from scores, and differences of them, with bootstrap intervals by prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Indices drawn at once by the bootstrap: 32 MiB of int64, whatever the number of prompts.
_BOOTSTRAP_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often the candidate beats the baseline on one objective.

    objective: its name. mean: win rate in [0, 1], 0.5 = parity. low, high: the bootstrap interval by prompt.
    prompts: number of prompts. samples: number of candidate responses scored. ties: share of pairs with equal scores.
    confidence: level of the interval, in (0, 1).
    """

    objective: str
    mean: float
    low: float
    high: float
    prompts: int
    samples: int
    ties: float = 0.0
    confidence: float = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much higher one policy's win rate over a baseline is than another's, on the same prompts.

    objective: its name. mean: in [-1, 1], 0 = alike. low, high: the bootstrap interval by prompt, paired. prompts:
    their number. confidence: level of the interval, in (0, 1).
    """

    objective: str
    mean: float
    low: float
    high: float
    prompts: int
    confidence: float = 0.95


def check_bootstrap(prompts: int, n_boot: int, confidence: float) -> None:
    """Raise ValueError for options that allow no interval."""
    if prompts < 2:
        raise ValueError(f"prompts: expected at least 2 for an interval by prompt; got {prompts}")
    if n_boot < 1:
        raise ValueError(f"n_boot: expected at least 1; got {n_boot}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number in (0, 1); got {confidence}")


def win_rate_by_prompt(
    candidate_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    baseline_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    name: str = "candidate_scores",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Win rate of the candidate over the baseline on each prompt, and the share of ties, both (X,).

    candidate_scores, baseline_scores: [prompt][sample], as for `win_rate`. name: of the candidate's scores, in
    messages. Raises ValueError as `win_rate` does.
    """
    if len(candidate_scores) != len(baseline_scores):
        raise ValueError(
            f"baseline_scores: expected as many prompts as {name}, {len(candidate_scores)}; got {len(baseline_scores)}"
        )
    by_prompt, tied = np.empty(len(candidate_scores)), np.empty(len(candidate_scores))
    for index in range(len(candidate_scores)):
        candidate = np.asarray(candidate_scores[index], dtype=np.float64)
        baseline = np.asarray(baseline_scores[index], dtype=np.float64)
        for argument, scores in ((name, candidate), ("baseline_scores", baseline)):
            if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
                raise ValueError(
                    f"{argument}[{index}]: expected a non-empty list of finite numbers; got {scores.tolist()}"
                )
        sign = np.sign(candidate[:, None] - baseline[None, :])
        by_prompt[index] = (1.0 + sign.mean()) / 2.0
        tied[index] = (sign == 0.0).mean()
    return by_prompt, tied


def win_rate(
    candidate_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    baseline_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    objective: str = "",
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate:
    """Win rate of the candidate over the baseline, with a percentile bootstrap interval by prompt.

    candidate_scores, baseline_scores: [prompt][sample], the judge's scores; prompts correspond, the numbers of samples
    may differ. Per prompt all pairs count 1, 1/2 or 0; the mean over prompts is unbiased for independent samples:
    eq. (29) of docs/method.md.
    n_boot: resamples of the prompts. The percentile interval is a little short for few prompts (below about 30), and
    has no width when every prompt has the same win rate.
    Raises ValueError for fewer than 2 prompts, which allow no interval, and for unequal numbers of prompts.
    """
    by_prompt, tied = win_rate_by_prompt(candidate_scores, baseline_scores)
    prompts = len(by_prompt)
    check_bootstrap(prompts, n_boot, confidence)
    low, high = _interval(by_prompt, n_boot, confidence, seed)
    return WinRate(
        objective=objective,
        mean=float(by_prompt.mean()),
        low=low,
        high=high,
        prompts=prompts,
        samples=sum(len(row) for row in candidate_scores),
        ties=float(tied.mean()),
        confidence=confidence,
    )


def win_rate_difference(
    candidate_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    rival_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    baseline_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    objective: str = "",
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The candidate's win rate over the baseline minus the rival's, paired by prompt.

    What a prompt adds to both cancels, so the interval is shorter than those of the two win rates suggest.

    candidate_scores, rival_scores, baseline_scores: [prompt][sample], as for `win_rate`, of the same prompts. n_boot:
    resamples of the prompts, on which both win rates are taken. Raises ValueError as `win_rate` does.
    """
    prompts = len(baseline_scores)
    rows = []
    for name, scores in (("candidate_scores", candidate_scores), ("rival_scores", rival_scores)):
        if len(scores) != prompts:
            raise ValueError(f"{name}: expected as many prompts as baseline_scores, {prompts}; got {len(scores)}")
        rows.append(win_rate_by_prompt(scores, baseline_scores, name=name)[0])
    check_bootstrap(prompts, n_boot, confidence)
    low, high = _interval(rows[0] - rows[1], n_boot, confidence, seed)
    return Difference(objective, float((rows[0] - rows[1]).mean()), low, high, prompts, confidence)


def _interval(by_prompt: NDArray[np.float64], n_boot: int, confidence: float, seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over prompts."""
    prompts = len(by_prompt)
    rng = np.random.default_rng(seed)
    block = max(1, _BOOTSTRAP_BLOCK // prompts)
    means = np.concatenate(
        [
            by_prompt[rng.integers(prompts, size=(min(block, n_boot - start), prompts))].mean(axis=1)
            for start in range(0, n_boot, block)
        ]
    )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)
