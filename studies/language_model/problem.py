"""The problem: the demo's prompts, judges and preference data; which objective is maximised and which are held."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from mopo_kernels.data import PreferenceData

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
# The demo is a folder of scripts that import one another by name.
if str(DEMO) not in sys.path:
    sys.path.append(str(DEMO))

from judges import JUDGES  # noqa: E402
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
