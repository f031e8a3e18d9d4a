"""The demo's prompts: short requests whose answers can vary in detail and in warmth, written for this demo.

`data/prompts.jsonl` has one request and its topic a line. Every topic is split into training, validation and test
prompts in the same shares, by hashes of the requests: neither the order of the file nor another topic moves a prompt,
so the splits differ in nothing but the prompts themselves. Training prompts feed make_data.py, validation prompts are
for choosing settings, and test prompts for judging the policies then chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

INSTRUCTION = "Answer in one short sentence."
"""Added to every request; without it few of the model's answers end within 48 tokens."""

FILE = Path(__file__).parent / "data" / "prompts.jsonl"

VALIDATION_PERCENT = 15
TEST_PERCENT = 15
"""Share of each topic's requests, rounded down; the rest are for training."""


def requests() -> dict[str, list[str]]:
    """Topic -> its requests, without the instruction, in the order of the file."""
    topics: dict[str, list[str]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        topics.setdefault(row["topic"], []).append(row["request"])
    return topics


def train_prompts() -> list[str]:
    """The 700 prompts whose sampled responses make the preference data, instruction included."""
    return _split(VALIDATION_PERCENT + TEST_PERCENT, 100)


def validation_prompts() -> list[str]:
    """The 150 prompts on which settings are chosen, instruction included; no training step sees them."""
    return _split(TEST_PERCENT, VALIDATION_PERCENT + TEST_PERCENT)


def test_prompts() -> list[str]:
    """The 150 prompts kept for the final judging, instruction included; neither training nor a choice sees them."""
    return _split(0, TEST_PERCENT)


def split_digest(prompts: Sequence[str]) -> str:
    """SHA-256, in hex, of the prompts joined by newlines: what a protocol file records of a split."""
    return _sha256("\n".join(prompts))


def _split(start: int, stop: int) -> list[str]:
    """Prompts between two percentages of each topic, in order of hash; topics in alphabetical order."""
    return [
        f"{request} {INSTRUCTION}"
        for _, group in sorted(requests().items())
        for request in sorted(group, key=_sha256)[len(group) * start // 100 : len(group) * stop // 100]
    ]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
