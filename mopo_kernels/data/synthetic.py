"""Preference data and a tokenizer that need no file and no network: what a trainer can be measured with."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from mopo_kernels.data.dataset import PreferenceData
from mopo_kernels.data.schema import PreferenceExample, PreferencePair


def byte_tokenizer() -> Any:
    """A ``transformers`` tokenizer with a token for each of the 256 bytes, ``<eos>`` and ``<pad>``; learns nothing."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<eos>", "<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def random_preferences(
    objectives: Sequence[str],
    *,
    examples: int = 64,
    responses: int = 4,
    prompt_length: int = 64,
    response_length: int = 64,
    seed: int = 0,
) -> PreferenceData:
    """Random letters with random labels: every response has an independent score for each objective, every pair of a
    prompt's responses is labelled by them.

    Args:
        objectives: names.
        examples: prompts.
        responses: per prompt, two or more.
        prompt_length, response_length: most characters, which are as many tokens to ``byte_tokenizer``; lengths are
            drawn evenly from a half of it up.
        seed: of everything.

    Raises:
        ValueError: a size that is too small.
    """
    for name, value, least in (
        ("examples", examples, 1),
        ("responses", responses, 2),
        ("prompt_length", prompt_length, 1),
        ("response_length", response_length, 1),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}; got {value}")
    rng = random.Random(seed)

    def text(most: int) -> str:
        return "".join(rng.choices(string.ascii_letters, k=rng.randint(-(-most // 2), most)))

    rows = []
    for index in range(examples):
        prompt = text(prompt_length)
        texts = tuple(text(response_length) for _ in range(responses))
        scores = {name: [rng.random() for _ in texts] for name in objectives}
        pairs = tuple(
            PreferencePair(i, j, {name: float(score[i] > score[j]) for name, score in scores.items()})
            for i, j in combinations(range(responses), 2)
        )
        rows.append(PreferenceExample(prompt, texts, pairs, id=str(index)))
    return PreferenceData.from_examples(rows, objectives)
