"""From the schemas of published preference data sets to the canonical one; a class a schema.

Each converter reads rows in the columns that the data set really has and yields canonical records. What a row cannot
give is reported with the row's own line and field name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from mopo_kernels.data.schema import (
    DataError,
    Message,
    as_messages,
    check_prompt,
    check_response,
    check_text,
    is_number,
    response_text,
)


class Row(NamedTuple):
    """A record and where it came from; ``line`` is 1-based. ``fields`` maps canonical field names to the row's own."""

    source: str
    line: int
    record: Any
    fields: Mapping[str, str] = {}


Reject = Callable[[DataError], None]


def _rated_pairs(texts: Sequence[str], ratings: Sequence[Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """Every pair of rated responses: the higher rating wins, equal ratings and equal texts tie, no rating no label."""
    pairs = []
    for i in range(len(texts)):
        for j in range(i + 1, len(texts)):
            preference: dict[str, float | None] = {}
            for name, first in ratings[i].items():
                second = ratings[j][name]
                if first is None or second is None:
                    preference[name] = None
                elif texts[i] == texts[j] or first == second:
                    preference[name] = 0.5
                else:
                    preference[name] = float(first > second)
            if any(value is not None for value in preference.values()):
                pairs.append({"i": i, "j": j, "preference": preference})
    return pairs


def _check_different(chosen: object, rejected: object, name: str, other: str) -> None:
    """A row that names a winner between two equal texts says nothing: it is a bad row."""
    if chosen == rejected:
        raise DataError(f"is the same text as {other}, so the row prefers nothing", field=name)


@dataclass
class Converter:
    """Base: one canonical record a row.

    Args:
        objectives: the objectives asked for, out of ``available``; None takes all that the schema has.
        origin: path or name of the data set, for schemas whose objective is in the name.
        max_response_chars: limit checked where a row is one response, so that only this row is dropped.
    """

    name: ClassVar[str]
    available: ClassVar[tuple[str, ...]] = ()
    objectives: Sequence[str] | None = None
    origin: str = ""
    max_response_chars: int | None = None

    def __post_init__(self) -> None:
        if self.available and self.objectives is not None:
            for objective in self.objectives:
                if objective not in self.available:
                    raise ValueError(
                        f"objectives: {self.name} has {', '.join(self.available)}, got unknown {objective!r}"
                    )

    @property
    def selected(self) -> tuple[str, ...]:
        """The schema's objectives that were asked for, in that order."""
        return self.available if self.objectives is None else tuple(self.objectives)

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        """Whether the columns of ``record`` are those of this schema."""
        raise NotImplementedError

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        """One row's canonical record, and its field names in the row's terms. Raises DataError."""
        raise NotImplementedError

    def convert(self, rows: Iterable[Row], reject: Reject) -> Iterator[Row]:
        """Canonical rows; what cannot be converted goes to ``reject`` and is left out."""
        for row in rows:
            try:
                record, fields = self.convert_row(row.record)
            except DataError as error:
                reject(error.at(row.source, row.line))
                continue
            yield Row(row.source, row.line, record, fields)


@dataclass
class Canonical(Converter):
    """Rows already in the canonical schema: prompt, responses, pairs."""

    name: ClassVar[str] = "canonical"

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return "responses" in record and "pairs" in record

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        return record, {}


@dataclass
class SafeRLHF(Converter):
    """PKU-SafeRLHF: two responses; ``better_response_id`` -> helpful, ``safer_response_id`` -> harmless.

    A set with only ``better_response_id`` (the single-dimension one) gives ``helpful`` only. An id of -1 or null is
    unlabelled.
    """

    name: ClassVar[str] = "pku-saferlhf"
    available: ClassVar[tuple[str, ...]] = ("helpful", "harmless")
    columns: ClassVar[dict[str, str]] = {"helpful": "better_response_id", "harmless": "safer_response_id"}

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"prompt", "response_0", "response_1"} <= set(record) and bool(set(cls.columns.values()) & set(record))

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        preference: dict[str, float] = {}
        for objective in self.selected:
            column = self.columns[objective]
            winner = record.get(column)
            if winner is None or winner == -1:
                continue
            if isinstance(winner, bool) or winner not in (0, 1):
                raise DataError(f"expected 0, 1, or -1 or null when unlabelled, got {winner!r}", field=column)
            preference[objective] = 1.0 - winner
        if not preference:
            raise DataError("no objective is labelled", field="better_response_id")
        responses = [check_text(record.get(name), name) for name in ("response_0", "response_1")]
        _check_different(responses[1], responses[0], "response_1", "response_0")
        return (
            {
                "prompt": record.get("prompt"),
                "responses": responses,
                "pairs": [{"i": 0, "j": 1, "preference": preference}],
            },
            {"responses[0]": "response_0", "responses[1]": "response_1"},
        )


_EXTRA_ID = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


def _helpsteer_prompt(prompt: str) -> str | list[Message]:
    """HelpSteer2 writes the turns of a dialogue into one string, with ``<extra_id_1>Assistant`` between them."""
    parts = _EXTRA_ID.split(prompt)
    if len(parts) == 1:
        return prompt
    roles = ["user", *(name.lower() for name in parts[1::2])]
    return [{"role": role, "content": content.strip()} for role, content in zip(roles, parts[::2], strict=True)]


@dataclass
class HelpSteer(Converter):
    """HelpSteer and HelpSteer2: one row a response, five attributes rated 0 to 4.

    Every pair of responses to a prompt is made; for each attribute the higher rating wins, equal ratings tie at 0.5,
    and so do equal texts. Dialogues become messages.

    Args:
        signs: attribute -> +1 (more is better, the default) or -1 (less is better), as verbosity may be unwanted.
    """

    name: ClassVar[str] = "helpsteer"
    available: ClassVar[tuple[str, ...]] = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    signs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, sign in self.signs.items():
            if name not in self.available:
                raise ValueError(f"signs: expected attributes out of {', '.join(self.available)}, got {name!r}")
            if sign not in (1, -1):
                raise ValueError(f"signs: expected +1 or -1 for {name}, got {sign!r}")

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"prompt", "response"} <= set(record) and bool(set(cls.available) & set(record))

    def _rating(self, record: Mapping[str, Any], attribute: str) -> float | None:
        value = record.get(attribute)
        if value is None:
            return None
        if not is_number(value) or not 0 <= value <= 4:
            raise DataError(f"expected a rating from 0 to 4, or null, got {value!r}", field=attribute)
        return float(value * self.signs.get(attribute, 1))

    def convert(self, rows: Iterable[Row], reject: Reject) -> Iterator[Row]:
        groups: dict[str, list[tuple[Row, str, dict[str, float | None]]]] = {}
        for row in rows:
            try:
                prompt = check_text(row.record.get("prompt"), "prompt")
                response = check_text(row.record.get("response"), "response", self.max_response_chars)
                ratings = {name: self._rating(row.record, name) for name in self.selected}
                groups.setdefault(prompt, []).append((row, response, ratings))
            except DataError as error:
                reject(error.at(row.source, row.line))
        for prompt, group in groups.items():
            first = group[0][0]
            texts = [response for _, response, _ in group]
            pairs = _rated_pairs(texts, [ratings for _, _, ratings in group])
            if not pairs:
                problem = "no other rated response to this prompt, so no pair can be made"
                for row, _, _ in group:
                    reject(DataError(problem, row.source, row.line, "response"))
                continue
            record = {"prompt": _helpsteer_prompt(prompt), "responses": texts, "pairs": pairs}
            yield Row(first.source, first.line, record, {f"responses[{i}]": "response" for i in range(len(texts))})


@dataclass
class UltraFeedback(Converter):
    """UltraFeedback: ``instruction`` and rated ``completions``; an aspect an objective.

    ``completions[].annotations.<aspect>.Rating`` is a string "1" to "5" or "N/A"; N/A, null and a missing aspect are
    unlabelled. Every pair of completions is made; equal ratings and equal texts tie.
    """

    name: ClassVar[str] = "ultrafeedback"
    available: ClassVar[tuple[str, ...]] = ("instruction_following", "honesty", "truthfulness", "helpfulness")

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"instruction", "completions"} <= set(record)

    @staticmethod
    def _rating(completion: Mapping[str, Any], aspect: str, here: str) -> float | None:
        annotation = (completion.get("annotations") or {}).get(aspect)
        if annotation is None:
            return None
        where = f"{here}.annotations.{aspect}.Rating"
        if not isinstance(annotation, Mapping):
            raise DataError(f"expected an object with Rating, got {annotation!r}", field=where.removesuffix(".Rating"))
        value = annotation.get("Rating")
        if value is None or (isinstance(value, str) and value.strip().upper() in ("N/A", "")):
            return None
        try:
            rating = float(value)
        except (TypeError, ValueError):
            rating = float("nan")
        if not 1 <= rating <= 5:
            raise DataError(f'expected a rating from 1 to 5 or "N/A", got {value!r}', field=where)
        return rating

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        completions = record.get("completions")
        if not isinstance(completions, (list, tuple)) or len(completions) < 2:
            count = len(completions) if isinstance(completions, (list, tuple)) else completions
            raise DataError(f"expected at least 2 completions, got {count!r}", field="completions")
        texts, ratings = [], []
        for index, completion in enumerate(completions):
            here = f"completions[{index}]"
            if not isinstance(completion, Mapping):
                raise DataError(f"expected an object with response and annotations, got {completion!r}", field=here)
            texts.append(check_text(completion.get("response"), f"{here}.response"))
            ratings.append({name: self._rating(completion, name, here) for name in self.selected})
        pairs = _rated_pairs(texts, ratings)
        if not pairs:
            raise DataError("no two completions are rated for the same aspect", field="completions")
        fields = {"prompt": "instruction"} | {
            f"responses[{i}]": f"completions[{i}].response" for i in range(len(texts))
        }
        return {"prompt": record.get("instruction"), "responses": texts, "pairs": pairs}, fields


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)


@dataclass
class ChosenRejected(Converter):
    """Base of the schemas with a chosen and a rejected text, which are about a single objective.

    Args:
        objective: its name.
    """

    fields: ClassVar[dict[str, str]] = {"responses[0]": "chosen", "responses[1]": "rejected"}
    objective: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective is None:
            alone = self.objectives is not None and len(self.objectives) == 1
            self.objective = self.objectives[0] if alone and self.objectives else self._default_objective()

    def _default_objective(self) -> str:
        raise NotImplementedError

    def _example(self, prompt: object, chosen: object, rejected: object) -> dict[str, Any]:
        _check_different(rejected, chosen, "rejected", "chosen")
        return {
            "prompt": prompt,
            "responses": [chosen, rejected],
            "pairs": [{"i": 0, "j": 1, "preference": {self.objective: 1.0}}],
        }


@dataclass
class HHRLHF(ChosenRejected):
    """hh-rlhf: two whole transcripts that differ in their last assistant turn; the subset names the objective.

    Args:
        objective: default: "helpful" or "harmless", whichever the origin (``helpful-base``, ``harmless-base``, ...)
            contains.
        conversational: True: the turns as messages, for models with a chat template. False: the transcript up to the
            last ``Assistant:`` as it stands, for models without one.
    """

    name: ClassVar[str] = "hh-rlhf"
    conversational: bool = True

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        texts = (record.get("chosen"), record.get("rejected"))
        return all(isinstance(text, str) and "\n\nHuman:" in text and "\n\nAssistant:" in text for text in texts)

    def _default_objective(self) -> str:
        found = [name for name in ("helpful", "harmless") if name in self.origin.lower()]
        if len(found) != 1:
            raise ValueError(
                f"objective: cannot tell helpful from harmless by the name {self.origin!r}: pass objective=, or load "
                "the subsets apart as {'helpful': ..., 'harmless': ...}"
            )
        return found[0]

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        chosen, rejected = (check_text(record.get(name), name) for name in ("chosen", "rejected"))
        _check_different(rejected, chosen, "rejected", "chosen")
        shared = chosen[: _common_prefix(chosen, rejected)]
        marker = "\n\nAssistant:"
        cut = shared.rfind(marker)
        if cut < 0:
            raise DataError("shares no assistant turn with chosen, so there is no prompt", field="rejected")
        cut += len(marker)
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if _TURN.search(text, cut):
                raise DataError("the transcripts differ before their last assistant turn", field=name)
            if not text[cut:].strip():
                raise DataError("the last assistant turn is empty", field=name)
        if not self.conversational:
            return self._example(chosen[:cut], chosen[cut:], rejected[cut:]), self.fields
        messages = self._messages(chosen[: cut - len(marker)])
        return self._example(messages, chosen[cut:].strip(), rejected[cut:].strip()), self.fields

    @staticmethod
    def _messages(transcript: str) -> list[Message]:
        """Turns as messages; two turns in a row of one speaker are joined, since chat templates want alternation."""
        parts = _TURN.split(transcript)
        if parts[0].strip():
            raise DataError("expected a transcript that begins with '\\n\\nHuman:'", field="chosen")
        messages: list[Message] = []
        for speaker, text in zip(parts[1::2], parts[2::2], strict=True):
            role, content = ("user" if speaker == "Human" else "assistant"), text.strip()
            if not content:
                raise DataError(f"an earlier {speaker} turn is empty", field="chosen")
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += f"\n\n{content}"
            else:
                messages.append({"role": role, "content": content})
        return messages


@dataclass
class TRL(ChosenRejected):
    """TRL preference rows: prompt, chosen, rejected; or chosen and rejected with the prompt as their common beginning.

    Strings or messages. A common beginning of two strings is cut back to the last white space, so that no word is torn;
    the space goes to the responses, as tokenizers expect. Columns such as ``score_chosen`` are left aside.

    Args:
        objective: default "preference".
    """

    name: ClassVar[str] = "trl"

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"chosen", "rejected"} <= set(record)

    def _default_objective(self) -> str:
        return "preference"

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        chosen, rejected, prompt = record.get("chosen"), record.get("rejected"), record.get("prompt")
        if isinstance(chosen, (list, tuple)) and isinstance(rejected, (list, tuple)):
            _check_different(rejected, chosen, "rejected", "chosen")
            split = _common_prefix(chosen, rejected)
            shared, chosen, rejected = list(chosen[:split]), chosen[split:], rejected[split:]
            if prompt is None and not shared:
                raise DataError("shares no message with chosen, so there is no prompt", field="rejected")
            if shared:
                # Beside an explicit prompt the transcripts either repeat it or continue it.
                repeated = prompt is None or shared[0]["role"] != "assistant"
                prompt = shared if repeated else [*as_messages(check_prompt(prompt)), *shared]
            checked = [
                response_text(check_response(value, name))
                for name, value in (("chosen", chosen), ("rejected", rejected))
            ]
            return self._example(prompt, *checked), self.fields
        chosen, rejected = check_text(chosen, "chosen"), check_text(rejected, "rejected")
        _check_different(rejected, chosen, "rejected", "chosen")
        if prompt is None:
            beginning = chosen[: _common_prefix(chosen, rejected)]
            space = max(beginning.rfind(" "), beginning.rfind("\n"))
            cut = space + 1 if space >= 0 and beginning[space] == "\n" else max(space, 0)
            prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
            if not prompt.strip():
                raise DataError("shares no beginning with chosen, so there is no prompt", field="rejected")
        return self._example(prompt, chosen, rejected), self.fields


@dataclass
class SummarizeFromFeedback(ChosenRejected):
    """openai/summarize_from_feedback, ``comparisons``: two summaries of a post, and which of them was chosen.

    A post is one of Reddit (``info.post``) or a news article (``info.article``). Posts that were compared several times
    are several rows: ``group`` joins them.

    Args:
        objective: default "summary".
        template: the prompt; ``{post}``, ``{title}`` and ``{subreddit}`` are filled in, those of an article that are
            null with nothing. Summaries are left as they stand, which is with a space before the first word.
    """

    name: ClassVar[str] = "summarize-from-feedback"
    template: str = "{post}\n\nTL;DR:"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{post}" not in self.template:
            raise ValueError(f"template: expected a text with {{post}} in it, got {self.template!r}")
        try:
            self.template.format(post="", title="", subreddit="")
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise ValueError(
                f"template: expected no braces but {{post}}, {{title}} and {{subreddit}}, got {self.template!r}"
            ) from error

    def _default_objective(self) -> str:
        return "summary"

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"info", "summaries", "choice"} <= set(record)

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        info, summaries, choice = record.get("info"), record.get("summaries"), record.get("choice")
        if not isinstance(info, Mapping):
            raise DataError(f"expected an object with post or article, got {info!r}", field="info")
        source = "post" if info.get("post") is not None else "article"
        parts = {name: info.get(name) or "" for name in ("title", "subreddit")}
        prompt = self.template.format(post=check_text(info.get(source), f"info.{source}"), **parts)
        if not isinstance(summaries, (list, tuple)) or len(summaries) != 2:
            count = len(summaries) if isinstance(summaries, (list, tuple)) else summaries
            raise DataError(f"expected 2 summaries, got {count!r}", field="summaries")
        texts = []
        for index, summary in enumerate(summaries):
            if not isinstance(summary, Mapping):
                raise DataError(f"expected an object with text, got {summary!r}", field=f"summaries[{index}]")
            texts.append(check_text(summary.get("text"), f"summaries[{index}].text"))
        if isinstance(choice, bool) or choice not in (0, 1):
            raise DataError(f"expected 0 or 1, got {choice!r}", field="choice")
        _check_different(texts[1], texts[0], "summaries[1].text", "summaries[0].text")
        pair = {"i": 0, "j": 1, "preference": {self.objective: 1.0 - choice}}
        fields = {"prompt": f"info.{source}"} | {f"responses[{i}]": f"summaries[{i}].text" for i in range(2)}
        return {"prompt": prompt, "responses": texts, "pairs": [pair]}, fields


# In the order in which "auto" tries them: hh-rlhf is a special case of chosen and rejected.
CONVERTERS: dict[str, type[Converter]] = {
    converter.name: converter
    for converter in (Canonical, SafeRLHF, HelpSteer, UltraFeedback, SummarizeFromFeedback, HHRLHF, TRL)
}
