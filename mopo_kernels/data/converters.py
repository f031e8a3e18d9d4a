"""From the schemas of published preference data sets to the canonical one; a class a schema.

Each converter reads rows in the columns that the data set really has and yields canonical records. What a row cannot
give is reported with the row's own line and field name.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from mopo_kernels.data.columns import Columns
from mopo_kernels.data.schema import (
    CONTEXT_COLUMNS,
    DataError,
    Message,
    as_messages,
    check_media,
    check_messages,
    check_prompt,
    check_response,
    check_text,
    is_given,
    is_number,
    renamed,
    response_key,
    response_parts,
    response_text,
    shown,
)
from mopo_kernels.data.transcripts import ASSISTANT


class Row(NamedTuple):
    """A record and where it came from; ``line`` is 1-based.

    ``fields`` maps the schema's names to the row's own. ``others`` are further rows of the source that it is made of.
    """

    source: str
    line: int
    record: Any
    fields: Mapping[str, str] = {}
    others: tuple[Row, ...] = ()


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
        max_response_chars: limit checked where a response is dropped by itself.
        names: finds the prompt in rows that call it otherwise, and counts the columns that nothing reads.
    """

    name: ClassVar[str]
    available: ClassVar[tuple[str, ...]] = ()
    #: The columns of the schema, read or not; all but the context that every schema can have.
    known: ClassVar[frozenset[str]]
    #: Whether the prompt may have another name than the schema's.
    finds_prompt: ClassVar[bool] = False
    objectives: Sequence[str] | None = None
    origin: str = ""
    max_response_chars: int | None = None
    names: Columns = field(default_factory=lambda: Columns({}))

    def __post_init__(self) -> None:
        if self.available and self.objectives is not None:
            for objective in self.objectives:
                if objective not in self.available:
                    raise ValueError(
                        f"objectives: expected names among {self.name}'s {', '.join(self.available)}; got "
                        f"{shown(objective)}"
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

    def prepare(self, rows: Iterable[Row], reject: Reject) -> Iterator[Row]:
        """The rows with their prompt under the schema's name; counts the columns that nothing reads."""
        for row in rows:
            record, fields = row.record, row.fields
            try:
                check_media(record)
                if self.finds_prompt:
                    record, found = self.names.find_prompt(record)
                    fields = {**fields, **found}
            except DataError as error:
                reject(error.at(row.source, row.line, fields))
                continue
            self.names.count_unused(record, self.known)
            yield row._replace(record=record, fields=fields)

    def convert(self, rows: Iterable[Row], reject: Reject) -> Iterator[Row]:
        """Canonical rows; what cannot be converted goes to ``reject`` and is left out."""
        for row in self.prepare(rows, reject):
            try:
                record, fields = self._convert_one(row, reject)
            except DataError as error:
                reject(error.at(row.source, row.line, row.fields))
                continue
            own = {name: renamed(column, row.fields) for name, column in fields.items()}
            yield row._replace(record={**record, **_context(row.record)}, fields={**row.fields, **own})

    def _convert_one(self, row: Row, reject: Reject) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        """As :meth:`convert_row`; a schema whose rows can lose a part rejects it by itself."""
        return self.convert_row(row.record)


def _context(record: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to the prompt beside it."""
    return {name: record[name] for name in CONTEXT_COLUMNS if is_given(record.get(name))}


def _context_key(record: Mapping[str, Any]) -> str:
    """Equal for rows with equal context. Raises DataError for what no schema takes."""
    try:
        return json.dumps(_context(record), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"expected JSON: {error}", field=next(iter(_context(record)))) from None


@dataclass
class Canonical(Converter):
    """Rows already in the canonical schema: prompt, responses, pairs."""

    name: ClassVar[str] = "canonical"
    known: ClassVar[frozenset[str]] = frozenset(("prompt", "responses", "pairs", "id", "weight", "ref_logprob"))
    finds_prompt: ClassVar[bool] = True

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
    known: ClassVar[frozenset[str]] = frozenset(
        (
            *("prompt", "prompt_source", *columns.values(), "response_0", "response_1"),
            *("is_response_0_safe", "is_response_1_safe", "response_0_harm_category", "response_1_harm_category"),
            *("response_0_severity_level", "response_1_severity_level"),
        )
    )

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
                raise DataError(f"expected 0, 1, or -1 or null when unlabelled; got {shown(winner)}", field=column)
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
    known: ClassVar[frozenset[str]] = frozenset(("prompt", "response", *available))
    signs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, sign in self.signs.items():
            if name not in self.available:
                raise ValueError(f"signs: expected attributes out of {', '.join(self.available)}; got {name!r}")
            if sign not in (1, -1):
                raise ValueError(f"signs: expected +1 or -1 for {name}; got {sign!r}")

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"prompt", "response"} <= set(record) and bool(set(cls.available) & set(record))

    def _rating(self, record: Mapping[str, Any], attribute: str) -> float | None:
        value = record.get(attribute)
        if value is None:
            return None
        if not is_number(value) or not 0 <= value <= 4:
            raise DataError(f"expected a rating from 0 to 4, or null; got {shown(value)}", field=attribute)
        return float(value * self.signs.get(attribute, 1))

    def convert(self, rows: Iterable[Row], reject: Reject) -> Iterator[Row]:
        groups: dict[tuple[str, str], list[tuple[Row, str, dict[str, float | None]]]] = {}
        for row in self.prepare(rows, reject):
            try:
                prompt = check_text(row.record.get("prompt"), "prompt")
                response = check_text(row.record.get("response"), "response", self.max_response_chars)
                ratings = {name: self._rating(row.record, name) for name in self.selected}
                groups.setdefault((prompt, _context_key(row.record)), []).append((row, response, ratings))
            except DataError as error:
                reject(error.at(row.source, row.line, row.fields))
        for (prompt, _), group in groups.items():
            first = group[0][0]
            texts = [response for _, response, _ in group]
            pairs = _rated_pairs(texts, [ratings for _, _, ratings in group])
            if not pairs:
                problem = "no other rated response to this prompt, so no pair can be made"
                for row, _, _ in group:
                    reject(DataError(problem, field="response").at(row.source, row.line, row.fields))
                continue
            record = {"prompt": _helpsteer_prompt(prompt), "responses": texts, "pairs": pairs, **_context(first.record)}
            own = dict.fromkeys((f"responses[{i}]" for i in range(len(texts))), renamed("response", first.fields))
            others = tuple(row for row, _, _ in group[1:])
            yield first._replace(record=record, fields={**first.fields, **own}, others=others)


@dataclass
class UltraFeedback(Converter):
    """UltraFeedback: ``instruction`` and rated ``completions``; an aspect an objective.

    ``completions[].annotations.<aspect>.Rating`` is a string "1" to "5" or "N/A"; N/A, null and a missing aspect are
    unlabelled. Every pair of completions is made; equal ratings and equal texts tie. A bad completion is left out by
    itself. The system prompts of completions differ within a row, and are no part of the prompt.
    """

    name: ClassVar[str] = "ultrafeedback"
    available: ClassVar[tuple[str, ...]] = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    known: ClassVar[frozenset[str]] = frozenset(("instruction", "completions", "correct_answers", "incorrect_answers"))

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"instruction", "completions"} <= set(record)

    @staticmethod
    def _rating(completion: Mapping[str, Any], aspect: str, here: str) -> float | None:
        annotations = completion.get("annotations")
        if annotations is None:
            return None
        if not isinstance(annotations, Mapping):
            raise DataError(
                f"expected an object of aspect -> rating; got {shown(annotations)}", field=f"{here}.annotations"
            )
        annotation = annotations.get(aspect)
        if annotation is None:
            return None
        where = f"{here}.annotations.{aspect}.Rating"
        if not isinstance(annotation, Mapping):
            raise DataError(
                f"expected an object with Rating; got {shown(annotation)}", field=where.removesuffix(".Rating")
            )
        value = annotation.get("Rating")
        if value is None or (isinstance(value, str) and value.strip().upper() in ("N/A", "")):
            return None
        rating = float("nan")
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                rating = float(value)
        elif is_number(value):
            rating = float(value)
        if not 1 <= rating <= 5:
            raise DataError(f'expected a rating from 1 to 5 or "N/A"; got {shown(value)}', field=where)
        return rating

    def _completion(self, completion: object, here: str) -> tuple[str, dict[str, float | None]]:
        """The text and the ratings of a completion."""
        if not isinstance(completion, Mapping):
            raise DataError(f"expected an object with response and annotations; got {shown(completion)}", field=here)
        text = check_text(completion.get("response"), f"{here}.response", self.max_response_chars)
        return text, {name: self._rating(completion, name, here) for name in self.selected}

    def _convert_one(self, row: Row, reject: Reject) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        record = row.record
        completions = record.get("completions")
        if not isinstance(completions, (list, tuple)) or len(completions) < 2:
            count = len(completions) if isinstance(completions, (list, tuple)) else completions
            raise DataError(f"expected at least 2 completions; got {shown(count)}", field="completions")
        places, texts, ratings = [], [], []
        for index, completion in enumerate(completions):
            try:
                text, rating = self._completion(completion, f"completions[{index}]")
            except DataError as error:
                reject(error.at(row.source, row.line, row.fields))
                continue
            places.append(index)
            texts.append(text)
            ratings.append(rating)
        pairs = _rated_pairs(texts, ratings)
        if not pairs:
            raise DataError("no two completions are rated for the same aspect", field="completions")
        fields = {"prompt": "instruction"} | {
            f"responses[{i}]": f"completions[{place}].response" for i, place in enumerate(places)
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
    known: ClassVar[frozenset[str]] = frozenset(("chosen", "rejected"))
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
    known: ClassVar[frozenset[str]] = frozenset(("prompt", "chosen", "rejected"))
    conversational: bool = True

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        texts = (record.get("chosen"), record.get("rejected"))
        return all(isinstance(text, str) and "\n\nHuman:" in text and "\n\nAssistant:" in text for text in texts)

    def _default_objective(self) -> str:
        found = [name for name in ("helpful", "harmless") if name in self.origin.lower()]
        if len(found) != 1:
            raise ValueError(
                f"objective: cannot tell helpful from harmless by the name {shown(self.origin)}: pass objective=, or "
                "load the subsets apart as {'helpful': ..., 'harmless': ...}"
            )
        return found[0]

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        chosen, rejected = (check_text(record.get(name), name) for name in ("chosen", "rejected"))
        _check_different(rejected, chosen, "rejected", "chosen")
        shared = chosen[: _common_prefix(chosen, rejected)]
        prompt = record.get("prompt")
        if is_given(prompt) and not (isinstance(prompt, str) and prompt.strip() in shared):
            raise DataError(
                "expected what both transcripts hold: pass columns= (--columns) prompt= to leave it out", field="prompt"
            )
        marker = "\n\nAssistant:"
        cut = shared.rfind(marker)
        if cut < 0:
            raise DataError("shares no assistant turn with chosen, so there is no prompt", field="rejected")
        cut += len(marker)
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if _TURN.search(text, cut):
                raise DataError("the transcripts differ before their last assistant turn", field=name)
            # A chat template ends the turn that is rejected for saying nothing.
            if not text[cut:].strip() and (name == "chosen" or not self.conversational):
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


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def _function_calls(text: object, here: str) -> list[dict[str, Any]]:
    """Calls of functions as messages have them, from the JSON of one call or of a list."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"expected the JSON of a call with name and arguments; got {shown(text)}", field=here)
    return [{"type": "function", "function": dict(call)} for call in calls]


def _turn(value: object, here: str) -> object:
    """A message of ``from`` and ``value``, as ShareGPT writes it, in the terms of role and content."""
    if not isinstance(value, Mapping) or "role" in value or not {"from", "value"} <= set(value):
        return value
    speaker, text = value["from"], value["value"]
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise DataError(f"expected one of {', '.join(_ROLES)}; got {shown(speaker)}", field=f"{here}.from")
    message = {key: item for key, item in value.items() if key not in ("from", "value")}
    if speaker == "function_call":
        return message | {"role": "assistant", "content": "", "tool_calls": _function_calls(text, f"{here}.value")}
    return message | {"role": _ROLES[speaker], "content": text}


def _turns(value: object, here: str) -> object:
    """One message or several as a list in the terms of role and content; anything else as it is."""
    if isinstance(value, Mapping):
        return [_turn(value, here)]
    if isinstance(value, (list, tuple)):
        return [_turn(item, f"{here}[{index}]") for index, item in enumerate(value)]
    return value


def _check_answer(value: object, name: str) -> str:
    """A text that may be empty: whether a turn of chat ends there the renderer sees."""
    return "" if value == "" else check_text(value, name)


def _answer(value: object, name: str) -> list[Any]:
    """An answer as messages."""
    return value if isinstance(value, list) else [{"role": "assistant", "content": _check_answer(value, name)}]


def _continued(prompt: list[Message], shared: list[Message]) -> list[Message]:
    """The conversation of a prompt and of what both transcripts begin with, which repeats it in part, or goes on."""
    if any(shared[start : start + len(prompt)] == prompt for start in range(len(shared) - len(prompt) + 1)):
        return shared
    longest = min(len(prompt), len(shared))
    overlap = next(n for n in range(longest, -1, -1) if prompt[len(prompt) - n :] == shared[:n])
    if not overlap and shared[0]["role"] == prompt[-1]["role"]:
        raise DataError(
            "is neither what the answers begin with nor what they go on from: pass columns= (--columns) prompt= to "
            "take what they begin with",
            field="prompt",
        )
    return prompt + shared[overlap:]


@dataclass
class TRL(ChosenRejected):
    """TRL preference rows: prompt, chosen, rejected; or chosen and rejected with the prompt as their common beginning.

    Strings or messages, also those of ShareGPT (``from``, ``value``). The prompt may be called question, instruction
    (with input), query, input, conversations or messages. Beside messages an explicit prompt is what they repeat or go
    on from. A common beginning of two strings ends at the assistant's turn; without such a marker it is a prompt only
    where the rows hold no other text, and is cut back to the last white space, so that no word is torn; the space goes
    to the responses, as tokenizers expect.

    Args:
        objective: default "preference".
    """

    name: ClassVar[str] = "trl"
    known: ClassVar[frozenset[str]] = frozenset(("prompt", "chosen", "rejected"))
    finds_prompt: ClassVar[bool] = True

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"chosen", "rejected"} <= set(record)

    def _default_objective(self) -> str:
        return "preference"

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        chosen, rejected, prompt = (_turns(record.get(name), name) for name in ("chosen", "rejected", "prompt"))
        _check_different(rejected, chosen, "rejected", "chosen")
        if any(isinstance(part, list) for part in (prompt, chosen, rejected)) or (
            prompt is not None and _context(record)
        ):
            return self._from_messages(prompt, _answer(chosen, "chosen"), _answer(rejected, "rejected")), self.fields
        chosen, rejected = check_text(chosen, "chosen"), _check_answer(rejected, "rejected")
        if prompt is None:
            prompt, chosen, rejected = self._split(record, chosen, rejected)
        return self._example(prompt, chosen, rejected), self.fields

    def _from_messages(self, prompt: object, chosen: list[Any], rejected: list[Any]) -> dict[str, Any]:
        split = _common_prefix(chosen, rejected)
        shared = check_messages(chosen[:split], "chosen") if split else []
        if prompt is None:
            if not shared:
                raise DataError("shares no message with chosen, so there is no prompt", field="rejected")
            prompt = shared
        elif shared:
            given = check_messages(prompt, "prompt") if isinstance(prompt, list) else check_prompt(prompt)
            # A string beside transcripts is one of the questions that they hold.
            questions = [message["content"].strip() for message in shared if message["role"] == "user"]
            repeated = isinstance(given, str) and given.strip() in questions
            prompt = shared if repeated else _continued(as_messages(given), shared)
        answers = [check_response(value[split:], name) for name, value in (("chosen", chosen), ("rejected", rejected))]
        if not response_key(answers[0]):
            raise DataError("is empty", field="chosen")
        # A message of nothing but text is that text.
        return self._example(
            prompt, *(answer if response_parts(answer) else response_text(answer) for answer in answers)
        )

    def _split(self, record: Mapping[str, Any], chosen: str, rejected: str) -> tuple[str, str, str]:
        """(prompt, chosen, rejected) of two texts that begin alike."""
        beginning = chosen[: _common_prefix(chosen, rejected)]
        last = next(reversed(list(ASSISTANT.finditer(beginning))), None)
        if last is None or last["word"]:
            self.names.check_no_other_text(record, self.known)
        if last is not None:
            before, cut = last.start(), last.end()
            for name, text in (("chosen", chosen), ("rejected", rejected)):
                if last.group().strip() in text[cut:]:
                    raise DataError("the answers differ before their last assistant turn", field=name)
        else:
            space = max(beginning.rfind(" "), beginning.rfind("\n"))
            before = cut = space + 1 if space >= 0 and beginning[space] == "\n" else max(space, 0)
        if not beginning[:before].strip():
            raise DataError("shares no beginning with chosen, so there is no prompt", field="rejected")
        return beginning[:cut], check_text(chosen[cut:], "chosen"), _check_answer(rejected[cut:], "rejected")


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
    known: ClassVar[frozenset[str]] = frozenset(("info", "summaries", "choice", "batch", "split", "extra"))
    template: str = "{post}\n\nTL;DR:"

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{post}" not in self.template:
            raise ValueError(f"template: expected a text with {{post}} in it; got {self.template!r}")
        try:
            self.template.format(post="", title="", subreddit="")
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise ValueError(
                f"template: expected no braces but {{post}}, {{title}} and {{subreddit}}; got {self.template!r}"
            ) from error

    def _default_objective(self) -> str:
        return "summary"

    @classmethod
    def matches(cls, record: Mapping[str, Any]) -> bool:
        return {"info", "summaries", "choice"} <= set(record)

    def convert_row(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        info, summaries, choice = record.get("info"), record.get("summaries"), record.get("choice")
        if not isinstance(info, Mapping):
            raise DataError(f"expected an object with post or article; got {shown(info)}", field="info")
        source = "post" if info.get("post") is not None else "article"
        parts = {name: info.get(name) or "" for name in ("title", "subreddit")}
        for name, text in parts.items():
            if not isinstance(text, str):
                raise DataError(f"expected a string or null; got {shown(text)}", field=f"info.{name}")
        prompt = self.template.format(post=check_text(info.get(source), f"info.{source}"), **parts)
        if not isinstance(summaries, (list, tuple)) or len(summaries) != 2:
            count = len(summaries) if isinstance(summaries, (list, tuple)) else summaries
            raise DataError(f"expected 2 summaries; got {shown(count)}", field="summaries")
        texts = []
        for index, summary in enumerate(summaries):
            if not isinstance(summary, Mapping):
                raise DataError(f"expected an object with text; got {shown(summary)}", field=f"summaries[{index}]")
            texts.append(check_text(summary.get("text"), f"summaries[{index}].text"))
        if isinstance(choice, bool) or choice not in (0, 1):
            raise DataError(f"expected 0 or 1; got {shown(choice)}", field="choice")
        _check_different(texts[1], texts[0], "summaries[1].text", "summaries[0].text")
        pair = {"i": 0, "j": 1, "preference": {self.objective: 1.0 - choice}}
        fields = {"prompt": f"info.{source}"} | {f"responses[{i}]": f"summaries[{i}].text" for i in range(2)}
        return {"prompt": prompt, "responses": texts, "pairs": [pair]}, fields


# In the order in which "auto" tries them: hh-rlhf is a special case of chosen and rejected.
CONVERTERS: dict[str, type[Converter]] = {
    converter.name: converter
    for converter in (Canonical, SafeRLHF, HelpSteer, UltraFeedback, SummarizeFromFeedback, HHRLHF, TRL)
}
