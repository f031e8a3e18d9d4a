"""The problem: the demo's prompts and judges, pairs of the base model's own answers; which objective is maximised and
which are held.

An answer is what the model says in ``MAX_NEW_TOKENS`` tokens, finished or not: in training, in what the multipliers
follow and where a policy is judged. (Pairs of finished answers alone, as the demo has them, say nothing of a policy
that no longer ends in time, and the judges do.)
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
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
from prompts import split_digest, test_prompts, train_prompts, validation_prompts  # noqa: E402
from run import has_fast_bfloat16  # noqa: E402

__all__ = [
    "ANSWERS",
    "HELD",
    "JUDGES",
    "MAX_NEW_TOKENS",
    "OBJECTIVES",
    "PRIMARY",
    "SPLITS",
    "has_fast_bfloat16",
    "held_out_pairs",
    "labelled_pairs",
    "read_answers",
    "some_prompts",
    "split_digest",
    "train_prompts",
    "write_answers",
]

ANSWERS = Path(__file__).parent / "answers.jsonl"
"""The base model's answers to the training prompts."""
PRIMARY = "warmth"
HELD = ("brevity", "plain")
OBJECTIVES = (PRIMARY, *HELD)
MAX_NEW_TOKENS = 48
"""Of an answer: what comes after them is not looked at."""

RESPONSES = 4
"""Answers to a prompt that the loss fits."""

DUAL_SHARE = 0.2
"""Of the training prompts, that the loss never fits where multipliers follow them."""

SPLITS = {"validation": validation_prompts, "test": test_prompts}
"""Choices are made on the first; the second is sampled once all are made."""


def some_prompts(data: PreferenceData, count: int) -> PreferenceData:
    """``count`` examples of ``data``, the same at every call, nested for growing counts; all of them for 0."""
    if not count or count >= len(data):
        return data
    order = list(range(len(data)))
    random.Random(0).shuffle(order)
    return data.select(sorted(order[:count]))


def read_answers(path: Path) -> dict[str, list[str]]:
    """Prompt -> answers, from a file of :func:`write_answers`."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["prompt"]: row["responses"] for row in rows}


def write_answers(path: Path, answers: Mapping[str, Sequence[str]]) -> None:
    """A line a prompt."""
    rows = ({"prompt": prompt, "responses": list(drawn)} for prompt, drawn in answers.items())
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _labelled(prompt: str, answers: Sequence[str]) -> PreferenceExample:
    """Every pair of these answers, labelled by the judges."""
    scores = {name: [JUDGES[name](prompt, answer) for answer in answers] for name in OBJECTIVES}
    pairs = tuple(
        PreferencePair(i, j, {name: label_pair(score[i], score[j]) for name, score in scores.items()})
        for i, j in combinations(range(len(answers)), 2)
    )
    return PreferenceExample(prompt, tuple(answers), pairs)


def labelled_pairs(answers: Mapping[str, Sequence[str]], responses: int | None = None) -> PreferenceData:
    """An example a prompt, of its first so many answers that are not blank, or of all of them."""
    examples = [
        _labelled(prompt, [answer for answer in drawn if answer.strip()][:responses])
        for prompt, drawn in answers.items()
    ]
    return PreferenceData.from_examples(examples, OBJECTIVES)


def held_out_pairs(count: int) -> PreferenceData:
    """The base model's first 8 answers to the first ``count`` validation prompts."""
    base = read_base()["validation"]
    return labelled_pairs({prompt: base[prompt] for prompt in validation_prompts()[:count]}, 8)
