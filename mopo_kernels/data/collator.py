"""PreferenceCollator: preference examples to tensors, a padded row per response or every prompt once in one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mopo_kernels.data.rendering import Renderer
from mopo_kernels.data.schema import DataError, PreferenceExample
from mopo_kernels.data.tokenized import text_digest, text_key, tokenize_data

if TYPE_CHECKING:
    from datasets import Dataset

    from mopo_kernels.data.dataset import PreferenceData


class TokenizedExample(NamedTuple):
    """Token ids of one example: the prompt's, which all responses share, and each response's with its end token."""

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


class _Prepared(NamedTuple):
    """Where the token ids of an example are, and how many the prompt and each response have."""

    table: Dataset
    row: int
    lengths: list[int]


@dataclass
class PreferenceCollator:
    """Tokenises examples and lays them out, by default as a padded row per response, B rows in all.

    A row is ``prompt ids + response ids``, as the model's own chat template writes them or, where a template was
    applied before and for plain text, as they stand; it ends with the template's end token or EOS: see
    ``rendering.Renderer``. Every response of a prompt follows identical prompt ids. Without a chat template, prompts
    made of messages are refused. An example's ``tools`` and ``chat_template_kwargs`` are handed to the template; one
    that does not use them is an error.

    Args:
        tokenizer: a ``transformers`` tokenizer with an EOS token.
        objectives: names of the K objectives in the order of the ``preference`` columns; labels of others are left out.
        max_length: tokens that prompt and response together may have.
        max_response_length: tokens that a response may have, its end token included.
        ignore_index: label of the tokens that are not scored.
        pad_to_multiple_of: round T up to a multiple of this.
        truncate: False: an over-long response raises. True: it is cut, loses its end token, and is counted in
            ``truncated`` (which counts in the process where the collator runs). A prompt that leaves no room raises in
            both cases: see ``PreferenceData.drop_overlong``.
        shared_prompts: lay out everything in one row of L tokens instead, without padding: each prompt once, its
            responses behind it. Needs a model whose attention can be told so, see ``MOPOConfig.shared_prompts``.
        chat, control_tokens, chat_template_kwargs: as of ``rendering.Renderer``.

    Calling it on a list of ``PreferenceExample`` (or their dicts) returns

    ==================  ==========  ========  ==================================================================
    input_ids           (B, T)      int64     padded on the right
    attention_mask      (B, T)      int64     1 on tokens, 0 on padding
    labels              (B, T)      int64     the response's tokens; ``ignore_index`` elsewhere, not shifted
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
        ValueError: no objective, a tokenizer without EOS token, no example, messages without a chat template, or an
            unknown option.
        DataError: an over-long example, one that the template refuses, or one with tools or variables that the template
            does not use, named by its id or the start of its prompt.
    """

    tokenizer: Any
    objectives: Sequence[str]
    max_length: int | None = None
    max_response_length: int | None = None
    ignore_index: int = -100
    pad_to_multiple_of: int | None = None
    truncate: bool = False
    shared_prompts: bool = False
    chat: str = "auto"
    control_tokens: str = "neutralize"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    truncated: int = field(default=0, init=False)
    _tables: dict[str, Dataset] = field(default_factory=dict, init=False, repr=False)
    _prepared: dict[str, _Prepared] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.objectives = tuple(self.objectives)
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(f"objectives: expected distinct names, at least one; got {self.objectives}")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an EOS token, which ends every response; got none")
        for name in ("max_length", "max_response_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number of tokens; got {value}")
        self.renderer = Renderer(self.tokenizer, self.chat, self.control_tokens, self.chat_template_kwargs)

    def tokenize(self, examples: Sequence[PreferenceExample]) -> list[TokenizedExample]:
        """Token ids of each example, cut or refused by the length limits; those of prepared examples are known."""
        found = [self._look_up(example) for example in examples]
        new = [example for example, known in zip(examples, found, strict=True) if known is None]
        fresh = iter(self.renderer.tokenize(new) if new else ())
        result = []
        for example, known in zip(examples, found, strict=True):
            if known is None:
                prompt, responses = next(fresh)[:2]
            else:
                row = known.table[known.row]
                prompt, responses = row["prompt"], row["responses"]
            room = self._room_of(example, len(prompt), list(map(len, responses)))
            self.truncated += sum(room is not None and len(ids) > room for ids in responses)
            result.append(TokenizedExample(prompt, [ids[:room] for ids in responses]))
        return result

    def sizes(self, examples: Sequence[PreferenceExample]) -> list[ExampleSize]:
        """What each example takes up."""
        result = []
        for example in examples:
            if (known := self._look_up(example)) is None:
                result.append(self.tokenize([example])[0].size)
                continue
            prompt, *responses = known.lengths
            room = self._room_of(example, prompt, responses)
            lengths = responses if room is None else [min(length, room) for length in responses]
            result.append(ExampleSize(len(lengths), prompt + max(lengths), prompt + sum(lengths) - len(lengths)))
        return result

    def _look_up(self, example: PreferenceExample) -> _Prepared | None:
        return self._prepared.get(text_key(example)) if self._prepared else None

    def prepare(self, data: PreferenceData, num_proc: int | None = None) -> Dataset:
        """Tokenise ``data`` once, for every batch to come, and look at all of it before any training.

        Args:
            data: the examples.
            num_proc: as of ``tokenized.tokenize_data``, whose table is returned.

        Raises:
            DataError: the first example that the template or the limits refuse, and how many there are.
        """
        digest = text_digest(data)
        table = self._tables.get(digest)
        if table is None:
            table = tokenize_data(self.renderer, data, num_proc)
        if errors := self._refused(data, table):
            first = next(iter(errors.values()))
            more = f" ({len(errors)} of {len(data)} examples are refused)" if len(errors) > 1 else ""
            raise DataError(first.problem + more, None, first.line, first.field)
        if digest not in self._tables:
            self._tables[digest] = table
            places = enumerate(zip(table["key"], table["lengths"], strict=True))
            self._prepared.update((key, _Prepared(table, index, lengths)) for index, (key, lengths) in places)
        return table

    def refused(self, data: PreferenceData) -> dict[int, DataError]:
        """The examples, by their index, that the template or the limits refuse."""
        return self._refused(data, tokenize_data(self.renderer, data))

    def _refused(self, data: PreferenceData, table: Dataset) -> dict[int, DataError]:
        errors = {}
        for index, row in enumerate(table.select_columns(["problem", "field", "lengths"])):
            if row["problem"] is not None:
                errors[index] = DataError(row["problem"], None, index + 1, row["field"])
                continue
            prompt, *responses = row["lengths"]
            try:
                self._room(prompt, responses)
            except DataError as error:
                errors[index] = error.of(data[index].name).at(None, index + 1)
        return errors

    def _room_of(self, example: PreferenceExample, prompt: int, responses: Sequence[int]) -> int | None:
        """As ``_room``, with an error that names the example."""
        try:
            return self._room(prompt, responses)
        except DataError as error:
            raise error.of(example.name) from None

    def _room(self, prompt: int, responses: Sequence[int]) -> int | None:
        """Tokens that the limits leave to a response, by the lengths of the prompt and the responses."""
        room = self.max_response_length
        if self.max_length is not None:
            left = self.max_length - prompt
            if left < 1:
                raise DataError(
                    f"{prompt} tokens leave no room for a response within max_length={self.max_length}", field="prompt"
                )
            room = left if room is None else min(room, left)
        for index, length in enumerate(responses):
            if room is not None and length > room and not self.truncate:
                raise DataError(
                    f"{length} tokens, more than the {room} that max_length={self.max_length} and "
                    f"max_response_length={self.max_response_length} allow",
                    field=f"responses[{index}]",
                )
        return room

    def __call__(self, examples: Sequence[PreferenceExample | Mapping[str, Any]]) -> dict[str, Tensor]:
        if not examples:
            raise ValueError("examples: expected at least one; got an empty batch")
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
