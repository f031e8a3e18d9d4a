"""PreferenceCollator: preference examples to tensors, a padded row per response or every prompt once in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopo_kernels.data.schema import DataError, PreferenceExample, as_messages, response_text


class TokenizedExample(NamedTuple):
    """Token ids of one example: the prompt's, which all responses share, and each response's with its EOS."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def size(self) -> ExampleSize:
        """What it takes up."""
        lengths = [len(response) for response in self.responses]
        before = len(self.prompt)
        return ExampleSize(len(lengths), before + max(lengths), before + sum(lengths) - len(lengths))


class ExampleSize(NamedTuple):
    """Responses of an example, tokens of its longest row, and its tokens with the prompt shared."""

    responses: int
    longest: int
    tokens: int

    def joined(self, other: ExampleSize) -> ExampleSize:
        """Of both in one batch."""
        return ExampleSize(
            self.responses + other.responses, max(self.longest, other.longest), self.tokens + other.tokens
        )


@dataclass
class PreferenceCollator:
    """Tokenises examples and lays them out, by default as a padded row per response, B rows in all.

    A row is ``prompt ids + response ids + EOS``. Prompt and response are tokenised apart, so no token can span the
    boundary and every response of a prompt follows identical prompt ids. With a chat template a string prompt is one
    user turn and the template adds the assistant's header; without one the prompt is tokenised as it stands (with the
    tokenizer's own beginning-of-sequence token), and prompts made of messages are refused. An example's ``tools`` and
    ``chat_template_kwargs`` are handed to the template; one that does not use them is an error.

    Args:
        tokenizer: a ``transformers`` tokenizer with an EOS token.
        objectives: names of the K objectives in the order of the ``preference`` columns; labels of others are left out.
        max_length: tokens that prompt and response together may have.
        max_response_length: tokens that a response may have, EOS included.
        ignore_index: label of the tokens that are not scored.
        pad_to_multiple_of: round T up to a multiple of this.
        truncate: False: an over-long response raises. True: it is cut, loses its EOS, and is counted in ``truncated``
            (which counts in the process where the collator runs). A prompt that leaves no room raises in both cases:
            see ``PreferenceData.drop_overlong``.
        shared_prompts: lay out everything in one row of L tokens instead, without padding: each prompt once, its
            responses behind it. Needs a model whose attention can be told so, see ``MOPOConfig.shared_prompts``.

    Calling it on a list of ``PreferenceExample`` (or their dicts) returns

    ==================  ==========  ========  ==================================================================
    input_ids           (B, T)      int64     padded on the right
    attention_mask      (B, T)      int64     1 on tokens, 0 on padding
    labels              (B, T)      int64     the response's tokens and EOS; ``ignore_index`` elsewhere, not shifted
    pairs               (P, 2)      int64     row indices
    preference          (P, K)      float32   P(first beats second), NaN where unlabelled
    pair_weight         (P,)        float32   the example's weight
    margin              (P,)        float32   nats, 0 where a pair has none; only when some pair has one
    prompt_index        (B,)        int64     which example of the batch the row belongs to
    ref_logprob         (B,)        float32   nats; only when every example has it
    ==================  ==========  ========  ==================================================================

    With ``shared_prompts`` the first three are replaced by the following, and B counts responses. The last token of a
    response is scored, but has no place in the row: nothing follows it.

    ==================  ==========  ========  ==================================================================
    input_ids           (1, L)      int64     prompt | response 1 | ... | response n, prompt after prompt
    position_ids        (1, L)      int64     of the row ``prompt + response`` that the token would stand in
    segment_length      (X + B,)    int64     tokens of each prompt and of each of its responses, in the row's order
    response_count      (X,)        int64     responses of each prompt
    scored_rows         (N,)        int64     place in the row of the token before each scored one
    target              (N,)        int64     the scored tokens, response after response
    cu_seqlens          (B + 1,)    int64     where each response's scored tokens begin and end
    ==================  ==========  ========  ==================================================================

    Raises:
        ValueError: no objective, a tokenizer without EOS token, no example, or messages without a chat template.
        DataError: an over-long example, or one with tools or variables that the template does not use, named by its id
            or the start of its prompt.
    """

    tokenizer: Any
    objectives: Sequence[str]
    max_length: int | None = None
    max_response_length: int | None = None
    ignore_index: int = -100
    pad_to_multiple_of: int | None = None
    truncate: bool = False
    shared_prompts: bool = False
    truncated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.objectives = tuple(self.objectives)
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives: expected distinct names, at least one, got {self.objectives}")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an EOS token, which ends every response; got none")
        for name in ("max_length", "max_response_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number of tokens, got {value}")

    def tokenize(self, examples: Sequence[PreferenceExample]) -> list[TokenizedExample]:
        """Token ids of each example, cut or refused by the length limits; each text is tokenised once."""
        prompts = self._prompt_ids(examples)
        texts = [response_text(response) for example in examples for response in example.responses]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        return [
            self._limited(example, prompt, [[*next(ids), self.tokenizer.eos_token_id] for _ in example.responses])
            for example, prompt in zip(examples, prompts, strict=True)
        ]

    def _template_options(self, example: PreferenceExample) -> dict[str, Any]:
        """What the template is told beside the messages. Raises DataError for what it would not write."""
        given = example.chat_template_kwargs or {}
        options = given if example.tools is None else {**given, "tools": example.tools}
        if options:
            template = self.tokenizer.get_chat_template(tools=example.tools) if self.tokenizer.chat_template else ""
            if unused := [name for name in options if name not in template]:
                raise DataError(
                    f"example {example.name}: expected none, as the chat template does not use it; got some",
                    field="tools" if "tools" in unused else f"chat_template_kwargs.{unused[0]}",
                )
        return options

    def _prompt_ids(self, examples: Sequence[PreferenceExample]) -> list[list[int]]:
        options = [self._template_options(example) for example in examples]
        if self.tokenizer.chat_template:
            # The template writes the special tokens itself.
            texts = [
                self.tokenizer.apply_chat_template(
                    as_messages(example.prompt), tokenize=False, add_generation_prompt=True, **given
                )
                for example, given in zip(examples, options, strict=True)
            ]
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompts = [example.prompt for example in examples]
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                "tokenizer: expected a chat template, as the prompts are lists of messages (hh-rlhf can be loaded with "
                "conversational=False)"
            )
        eos = self.tokenizer.eos_token_id
        plain = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        special = self.tokenizer(list(prompts), add_special_tokens=True)["input_ids"]
        # Some tokenizers close every text with EOS; the response has yet to come.
        return [
            whole[:-1] if whole[-1:] == [eos] and bare[-1:] != [eos] else whole
            for whole, bare in zip(special, plain, strict=True)
        ]

    def _limited(self, example: PreferenceExample, prompt: list[int], responses: list[list[int]]) -> TokenizedExample:
        room = self.max_response_length
        if self.max_length is not None:
            left = self.max_length - len(prompt)
            if left < 1:
                raise DataError(
                    f"example {example.name}: {len(prompt)} tokens leave no room for a response within "
                    f"max_length={self.max_length}",
                    field="prompt",
                )
            room = left if room is None else min(room, left)
        for index, ids in enumerate(responses):
            if room is None or len(ids) <= room:
                continue
            if not self.truncate:
                raise DataError(
                    f"example {example.name}: {len(ids)} tokens, more than the {room} that max_length="
                    f"{self.max_length} and max_response_length={self.max_response_length} allow",
                    field=f"responses[{index}]",
                )
            self.truncated += 1
            responses[index] = ids[:room]
        return TokenizedExample(prompt, responses)

    def __call__(self, examples: Sequence[PreferenceExample | Mapping[str, Any]]) -> dict[str, Tensor]:
        if not examples:
            raise ValueError("examples: expected at least one, got an empty batch")
        batch = [
            example if isinstance(example, PreferenceExample) else PreferenceExample.from_dict(example)
            for example in examples
        ]
        tokenized = self.tokenize(batch)
        tensors = self._shared(tokenized) if self.shared_prompts else self._padded(tokenized)
        pairs, preference, weight, margin = [], [], [], []
        prompt_index: list[int] = []
        for position, example in enumerate(batch):
            offset = len(prompt_index)
            prompt_index.extend([position] * len(example.responses))
            for pair in example.pairs:
                pairs.append([offset + pair.i, offset + pair.j])
                values = [pair.preference.get(name) for name in self.objectives]
                preference.append([float("nan") if value is None else value for value in values])
                weight.append(example.weight)
                margin.append(pair.margin)
        tensors |= {
            "pairs": torch.tensor(pairs),
            "preference": torch.tensor(preference, dtype=torch.float32),
            "pair_weight": torch.tensor(weight, dtype=torch.float32),
            "prompt_index": torch.tensor(prompt_index),
        }
        if any(value is not None for value in margin):
            tensors["margin"] = torch.tensor([value or 0.0 for value in margin], dtype=torch.float32)
        if all(example.ref_logprob is not None for example in batch):
            reference = [value for example in batch for value in example.ref_logprob or ()]
            tensors["ref_logprob"] = torch.tensor(reference, dtype=torch.float32)
        return tensors

    def _padded(self, tokenized: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        rows = [(item.prompt, response) for item in tokenized for response in item.responses]
        length = max(len(prompt) + len(response) for prompt, response in rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        pad = self.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), length), self.tokenizer.eos_token_id if pad is None else pad)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, self.ignore_index)
        for row, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            input_ids[row, :end] = torch.tensor(prompt + response)
            attention_mask[row, :end] = 1
            labels[row, len(prompt) : end] = input_ids[row, len(prompt) : end]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _shared(self, tokenized: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        rows: list[int] = []
        target: list[int] = []
        ends = [0]
        for prompt, responses in tokenized:
            before = len(prompt)
            ids += prompt
            positions += range(before)
            segments.append(before)
            last = len(ids) - 1
            for response in responses:
                first = len(ids)
                kept = response[:-1]
                ids += kept
                positions += range(before, before + len(kept))
                segments.append(len(kept))
                # Without a prompt there is nothing to score the first token from.
                rows += [last] * bool(prompt) + list(range(first, len(ids)))
                target += response if prompt else response[1:]
                ends.append(len(target))
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "segment_length": torch.tensor(segments),
            "response_count": torch.tensor([len(item.responses) for item in tokenized]),
            "scored_rows": torch.tensor(rows),
            "target": torch.tensor(target),
            "cu_seqlens": torch.tensor(ends),
        }
