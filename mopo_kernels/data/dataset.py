"""PreferenceData: validated examples in an Arrow table, ready for ``transformers.Trainer``."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopo_kernels.data.schema import (
    TEMPLATE_COLUMNS,
    TEXT_ROLE,
    DataError,
    Message,
    PreferenceExample,
    PreferencePair,
    Text,
    as_messages,
    response_key,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from mopo_kernels.data.collator import PreferenceCollator


def import_datasets() -> Any:
    """The ``datasets`` library, or an ImportError that says how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "loading preference data needs the `datasets` library: pip install 'mopo-kernels[train]'"
        ) from error
    return datasets


def nothing_usable(skipped: Sequence[DataError], source: str | None = None) -> DataError:
    """The error for a source without a single good row; its ``skipped`` lists the bad ones."""
    detail = f"; the first of {len(skipped)} bad rows: {skipped[0]}" if skipped else ""
    error = DataError(f"no usable row{detail}", source)
    error.skipped = tuple(skipped)
    return error


def _stored_message(message: Message, keys: Sequence[str]) -> dict[str, str | None]:
    """A message as Arrow holds it: every key a string or null, calls of tools as JSON."""
    return {
        key: value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in ((key, message.get(key)) for key in keys)
    }


def _to_table(examples: Sequence[PreferenceExample], objectives: Sequence[str]) -> Dataset:
    """An Arrow table with one type per column, every pair carrying every objective (null = unlabelled)."""
    datasets = import_datasets()
    text = datasets.Value("string")

    def keys_of(texts: Iterable[Text]) -> list[str]:
        """Of all messages."""
        turns = [turn for each in texts if not isinstance(each, str) for turn in each]
        return list(dict.fromkeys(["role", "content", *(key for turn in turns for key in turn)]))

    prompt_keys = keys_of(example.prompt for example in examples)
    response_keys = keys_of(response for example in examples for response in example.responses)
    # Arrow wants one type per column. Where both forms occur the strings become messages: a prompt one that says so, as
    # it may be text that no chat template is to be applied to.
    chat_prompts = any(not isinstance(example.prompt, str) for example in examples)
    chat_responses = any(not isinstance(response, str) for example in examples for response in example.responses)
    pair_features = {
        "i": datasets.Value("int64"),
        "j": datasets.Value("int64"),
        "preference": {name: datasets.Value("float64") for name in objectives},
    }
    if any(pair.margin is not None for example in examples for pair in example.pairs):
        pair_features["margin"] = datasets.Value("float64")
    features: dict[str, Any] = {
        "prompt": [dict.fromkeys(prompt_keys, text)] if chat_prompts else text,
        "responses": [[dict.fromkeys(response_keys, text)] if chat_responses else text],
        "pairs": [pair_features],
        "id": text,
        "weight": datasets.Value("float64"),
    }
    if any(example.ref_logprob is not None for example in examples):
        features["ref_logprob"] = [datasets.Value("float64")]
    # As JSON, whose types may differ from row to row.
    context = [name for name in TEMPLATE_COLUMNS if any(getattr(example, name) is not None for example in examples)]
    features |= dict.fromkeys(context, text)
    rows = []
    for example in examples:
        row = example.to_dict()
        if chat_prompts:
            prompt = example.prompt
            stored = [{"role": TEXT_ROLE, "content": prompt}] if isinstance(prompt, str) else prompt
            row["prompt"] = [_stored_message(turn, prompt_keys) for turn in stored]
        if chat_responses:
            given = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in example.responses]
            row["responses"] = [[_stored_message(turn, response_keys) for turn in turns] for turns in given]
        for pair in row["pairs"]:
            pair["preference"] = {name: pair["preference"].get(name) for name in objectives}
            if "margin" in pair_features:
                pair.setdefault("margin", None)
        if "ref_logprob" in features:
            row.setdefault("ref_logprob", None)
        for name in context:
            row[name] = json.dumps(row[name], ensure_ascii=False) if name in row else None
        rows.append(row)
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@dataclass(frozen=True)
class PreferenceData:
    """A map-style data set of ``PreferenceExample``; what ``load_preferences`` returns.

    Give it to ``transformers.Trainer`` as ``train_dataset``, with a ``PreferenceCollator`` as ``data_collator``.

    Args:
        dataset: ``datasets.Dataset`` with the canonical columns prompt, responses, pairs, id, weight, and ref_logprob,
            tools and chat_template_kwargs when some example has them, the last two as JSON.
        objectives: names of the K objectives, in the order of the collator's preference columns.
        skipped: the rows left out, each a DataError with file, line and field; empty with ``on_error="raise"``.
    """

    dataset: Dataset
    objectives: tuple[str, ...]
    skipped: tuple[DataError, ...] = ()

    @classmethod
    def from_examples(
        cls,
        examples: Iterable[PreferenceExample],
        objectives: Sequence[str] | None = None,
        skipped: Iterable[DataError] = (),
    ) -> PreferenceData:
        """Build from examples; ``objectives`` defaults to the names found, in the order of their first appearance.

        Raises:
            DataError: no example, or no objective name.
        """
        examples = list(examples)
        skipped = tuple(skipped)
        if not examples:
            raise nothing_usable(skipped)
        if objectives is None:
            names = dict.fromkeys(name for example in examples for pair in example.pairs for name in pair.preference)
            objectives = tuple(names)
        if not objectives:
            raise DataError("no objective is named in any pair", field="pairs")
        return cls(_to_table(examples, objectives), tuple(objectives), skipped)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> PreferenceExample:
        return PreferenceExample.from_dict(self.dataset[int(index)])

    def __iter__(self) -> Iterator[PreferenceExample]:
        return (PreferenceExample.from_dict(row) for row in self.dataset)

    @property
    def has_margins(self) -> bool:
        """Whether any pair has a ``margin``."""
        pairs: Any = self.dataset.features.arrow_schema.field("pairs").type.value_type
        if pairs.get_field_index("margin") < 0:
            return False
        return any(
            pair["margin"] is not None for row in self.dataset.select_columns(["pairs"]) for pair in row["pairs"]
        )

    @property
    def template_columns(self) -> list[str]:
        """What the chat template is told beside the messages, by some examples."""
        return [name for name in TEMPLATE_COLUMNS if name in self.dataset.column_names]

    def select(self, indices: Iterable[int]) -> PreferenceData:
        """The examples at ``indices``, in that order."""
        return replace(self, dataset=self.dataset.select(list(indices)))

    def split(self, fraction: float, seed: int = 0) -> tuple[PreferenceData, PreferenceData]:
        """Hold out a share of the prompts: (the rest, the held-out part), each in the original order.

        Examples with the same prompt stay on the same side, so nothing of the held-out part is trained on.

        Args:
            fraction: share of the distinct prompts to hold out, strictly between 0 and 1; at least one prompt goes to
                each side.
            seed: of the shuffle; the same seed gives the same split.

        Raises:
            ValueError: ``fraction`` out of range, or fewer than two distinct prompts.
        """
        rest, held = self.split_indices(fraction, seed)
        return self.select(rest), self.select(held)

    def split_indices(self, fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
        """Which examples :meth:`split` keeps, and which it holds out."""
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: expected a number strictly between 0 and 1; got {fraction}")
        keys = [prompt_key(prompt) for prompt in self.dataset["prompt"]]
        distinct = list(dict.fromkeys(keys))
        if len(distinct) < 2:
            raise ValueError(f"split: expected at least 2 distinct prompts; got {len(distinct)}")
        count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
        held = set(random.Random(seed).sample(distinct, count))
        return (
            [index for index, key in enumerate(keys) if key not in held],
            [index for index, key in enumerate(keys) if key in held],
        )

    def group_by_prompt(self) -> PreferenceData:
        """Join the examples that share a prompt (see ``merge_preferences``)."""
        return merge_preferences([self])

    def with_ref_logprob(self, values: Sequence[Sequence[float]]) -> PreferenceData:
        """Attach precomputed reference log-probabilities.

        Args:
            values: per example, per response, summed nats.

        Raises:
            ValueError: not one sequence per example. DataError: not one finite number per response.
        """
        if len(values) != len(self):
            raise ValueError(f"values: expected one sequence per example ({len(self)}); got {len(values)}")
        examples = [
            replace(example, ref_logprob=tuple(float(item) for item in row))
            for example, row in zip(self, values, strict=True)
        ]
        return PreferenceData.from_examples(examples, self.objectives, self.skipped)

    def drop_overlong(self, collator: PreferenceCollator) -> PreferenceData:
        """Move the examples that ``collator`` would refuse, for their length or as the chat template does, into
        ``skipped``."""
        refused = collator.refused(self)
        if len(refused) == len(self):
            raise DataError(f"every one of {len(self)} examples is refused; the first: {refused[0]}")
        kept = self.select(index for index in range(len(self)) if index not in refused)
        return replace(kept, skipped=(*self.skipped, *refused.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON Lines (``.jsonl``) or parquet (``.parquet``); the file appears whole or not at all.

        Raises:
            ValueError: another suffix.
        """
        path = Path(path)
        if path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"path: expected a name ending in .jsonl or .parquet; got {path.name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            if path.suffix == ".parquet":
                self.dataset.to_parquet(str(partial))
            else:
                with partial.open("w", encoding="utf-8") as file:
                    for example in self:
                        file.write(json.dumps(example.to_dict(), ensure_ascii=False) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def prompt_key(prompt: Any) -> str:
    """Equal for prompts that mean the same: a string equals one user turn with that content."""
    turns = [_stored_message(message, sorted(message)) for message in as_messages(prompt)]
    return json.dumps(
        [[(key, value) for key, value in turn.items() if value is not None] for turn in turns], ensure_ascii=False
    )


def example_key(example: PreferenceExample) -> str:
    """Equal for examples whose responses answer the same: the prompt, the tools, and what the template is told."""
    context = [example.tools, example.chat_template_kwargs]
    key = prompt_key(example.prompt)
    return key if context == [None, None] else key + json.dumps(context, ensure_ascii=False, sort_keys=True)


def merge_preferences(parts: Sequence[PreferenceData]) -> PreferenceData:
    """Join several data sets, such as one per objective, by prompt.

    Examples with the same prompt (and tools, and variables of the template) become one; so do their responses with the
    same text (copies of a text within one example stay apart, and the n-th copy joins the n-th copy). A pair that
    several parts judge for different objectives carries all of those labels, whichever way round each part had it; a
    pair that only one part has stays unlabelled for the other objectives. Where the same pair is judged for the same
    objective more than once, the labels are averaged, and so are its margins, a reversed pair's with the other sign.
    ``ref_logprob`` survives when every joined example has it; the id is the first's.

    Raises:
        ValueError: no part.
        DataError: joined examples with different weights.
    """
    if not parts:
        raise ValueError("parts: expected at least one PreferenceData; got none")
    groups: dict[str, list[PreferenceExample]] = {}
    for part in parts:
        for example in part:
            groups.setdefault(example_key(example), []).append(example)
    objectives = tuple(dict.fromkeys(name for part in parts for name in part.objectives))
    skipped = tuple(error for part in parts for error in part.skipped)
    return PreferenceData.from_examples(map(_join, groups.values()), objectives, skipped)


def _join(examples: Sequence[PreferenceExample]) -> PreferenceExample:
    first = examples[0]
    if len(examples) == 1:
        return first
    weights = sorted({example.weight for example in examples})
    if len(weights) > 1:
        raise DataError(f"rows with the prompt of {first.name} have different weights {weights}", field="weight")
    # Equal texts of one example stay apart (they are separate samples of the model, and their number counts); across
    # examples the n-th copy of a text joins the n-th copy.
    responses: list[Any] = []
    place: dict[tuple[str, int], int] = {}
    reference: dict[int, float] = {}
    labels: dict[tuple[int, int], dict[str, list[float]]] = {}
    margins: dict[tuple[int, int], list[float]] = {}
    for example in examples:
        seen: dict[str, int] = {}
        position = []
        for index, response in enumerate(example.responses):
            text = response_key(response)
            key = (text, seen.get(text, 0))
            seen[text] = key[1] + 1
            if key not in place:
                place[key] = len(responses)
                responses.append(response)
            position.append(place[key])
            if example.ref_logprob is not None:
                reference.setdefault(place[key], example.ref_logprob[index])
        for pair in example.pairs:
            i, j = position[pair.i], position[pair.j]
            flip = (i, j) not in labels and (j, i) in labels
            slot = labels.setdefault((j, i) if flip else (i, j), {})
            for name, value in pair.preference.items():
                if value is not None:
                    slot.setdefault(name, []).append(1 - value if flip else value)
            if pair.margin is not None:
                margins.setdefault((j, i) if flip else (i, j), []).append(-pair.margin if flip else pair.margin)
    return PreferenceExample(
        prompt=first.prompt,
        responses=tuple(responses),
        pairs=tuple(
            PreferencePair(
                i,
                j,
                {name: sum(values) / len(values) for name, values in slot.items()},
                sum(margins[i, j]) / len(margins[i, j]) if (i, j) in margins else None,
            )
            for (i, j), slot in labels.items()
        ),
        id=first.id,
        weight=first.weight,
        ref_logprob=tuple(reference[index] for index in range(len(responses)))
        if len(reference) == len(responses)
        else None,
        tools=first.tools,
        chat_template_kwargs=first.chat_template_kwargs,
    )
