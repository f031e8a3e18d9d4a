"""The demo's judges: deterministic scores of a response, and the pairwise labels made from them.

Each judge measures something anybody can see in the text, so the labels can be recomputed and argued with. They stand
in for annotators: MOPO itself sees the pairwise labels only, never a score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

LONG_WORD = 7
"""A word of at least this many letters counts as a long one."""

_WORD = re.compile(r"[A-Za-z]+(?:['\u2019][A-Za-z]+)*")


def words(text: str) -> list[str]:
    """The words of a text, lower case; digits and punctuation are none, "don't" is one."""
    return [word.lower() for word in _WORD.findall(text)]


def detail(prompt: str, response: str) -> float:
    """How much the response says: its number of distinct words of at least LONG_WORD letters."""
    return float(len({word for word in words(response) if len(word) >= LONG_WORD}))


def plain(prompt: str, response: str) -> float:
    """How easy its wording is: minus the mean length of its words in letters; a response without words scores 0."""
    lengths = [len(word) for word in words(response)]
    return -sum(lengths) / len(lengths) if lengths else 0.0


def brevity(prompt: str, response: str) -> float:
    """How short it is: minus its number of words."""
    return -float(len(words(response)))


def warmth(prompt: str, response: str) -> float:
    """How kind it sounds: VADER's compound sentiment, from -1 (hostile) through 0 (neutral) to 1 (warm)."""
    return float(_analyzer().polarity_scores(response)["compound"])


@lru_cache(maxsize=1)
def _analyzer() -> SentimentIntensityAnalyzer:
    """VADER's word list, read once."""
    return SentimentIntensityAnalyzer()


JUDGES: dict[str, Callable[[str, str], float]] = {
    "detail": detail,
    "plain": plain,
    "brevity": brevity,
    "warmth": warmth,
}
"""Objective name -> judge of (prompt, response); a higher score is better."""


def label_pair(score_i: float, score_j: float) -> float:
    """P(i beats j) from two scores of one judge: 1, 0, or 0.5 for a tie."""
    if score_i == score_j:
        return 0.5
    return 1.0 if score_i > score_j else 0.0


def judge_correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Rank correlations between objectives within prompts, from the labels of preferences.jsonl.

    A response's rank among its siblings is its mean label against them (ties share a rank), taken about its mean 1/2.
    Spearman's coefficient is the correlation of these ranks over all responses of all prompts; differences between
    prompts play no part in it.

    Args:
        rows: lines of preferences.jsonl, every pair labelled for every objective.

    Returns:
        objective -> objective -> coefficient in [-1, 1], rounded to 4 digits.
    """
    names = list(rows[0]["pairs"][0]["preference"])
    ranks = np.concatenate([_centred_ranks(row, names) for row in rows])
    matrix = np.corrcoef(ranks, rowvar=False)
    return {
        first: {second: round(float(matrix[k, m]), 4) for m, second in enumerate(names)}
        for k, first in enumerate(names)
    }


def _centred_ranks(row: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """(n responses, K objectives): mean label against the siblings, minus 1/2."""
    total = np.zeros((len(row["responses"]), len(names)))
    for pair in row["pairs"]:
        centred = np.array([pair["preference"][name] for name in names]) - 0.5
        total[pair["i"]] += centred
        total[pair["j"]] -= centred
    return total / (len(row["responses"]) - 1)
