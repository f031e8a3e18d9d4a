"""The problem: the demo's prompts, judges and preference data; which objective is maximised and which are held."""

from __future__ import annotations

import random
import sys
from itertools import combinations
from pathlib import Path

from mopo_kernels.data import PreferenceData, PreferenceExample, PreferencePair

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
# The demo is a folder of scripts that import one another by name.
if str(DEMO) not in sys.path:
    sys.path.append(str(DEMO))

from judges import JUDGES, label_pair  # noqa: E402
from make_base import read as read_base  # noqa: E402
from prompts import split_digest, test_prompts, validation_prompts  # noqa: E402
from run import has_fast_bfloat16  # noqa: E402

__all__ = [
    "DATA",
    "HELD",
    "JUDGES",
    "MAX_NEW_TOKENS",
    "OBJECTIVES",
    "PRIMARY",
    "SPLITS",
    "has_fast_bfloat16",
    "held_out_pairs",
    "some_prompts",
    "split_digest",
]

DATA = DEMO / "data" / "preferences.jsonl"
PRIMARY = "warmth"
HELD = ("brevity", "plain")
OBJECTIVES = (PRIMARY, *HELD)
MAX_NEW_TOKENS = 48
"""As the training responses were sampled."""

SPLITS = {"validation": validation_prompts, "test": test_prompts}
"""Choices are made on the first; the second is sampled once all are made."""


def some_prompts(data: PreferenceData, count: int) -> PreferenceData:
    """``count`` examples of ``data``, the same at every call, nested for growing counts; all of them for 0."""
    if not count or count >= len(data):
        return data
    order = list(range(len(data)))
    random.Random(0).shuffle(order)
    return data.select(sorted(order[:count]))


def held_out_pairs(count: int) -> PreferenceData:
    """The base model's first 8 different answers to the first ``count`` validation prompts, pairs labelled by the
    judges."""
    base = read_base()["validation"]
    examples = []
    for prompt in validation_prompts()[:count]:
        answers = list(dict.fromkeys(answer for answer in base[prompt] if answer.strip()))[:8]
        scores = {name: [JUDGES[name](prompt, answer) for answer in answers] for name in OBJECTIVES}
        pairs = tuple(
            PreferencePair(i, j, {name: label_pair(score[i], score[j]) for name, score in scores.items()})
            for i, j in combinations(range(len(answers)), 2)
        )
        examples.append(PreferenceExample(prompt, tuple(answers), pairs))
    return PreferenceData.from_examples(examples, OBJECTIVES)
