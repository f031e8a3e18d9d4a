"""The canonical preference example, and every check that a row has to pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

Message = dict[str, str]
Text = str | list[Message]

# Of the one message that a table whose other prompts are lists of messages holds in place of a string.
TEXT_ROLE = "text"


class DataError(ValueError):
    """A row that cannot be used: which file, which line, which field, and what is wrong with it.

    Args:
        problem: what was expected and what came.
        source: file, hub name or other origin of the row, when known.
        line: 1-based line of a text file, or 1-based row of anything else.
        field: path of the offending value, such as ``pairs[0].preference.helpful``.

    ``skipped`` is empty but on the error that says that no row was usable, where it lists them.
    """

    def __init__(self, problem: str, source: str | None = None, line: int | None = None, field: str | None = None):
        super().__init__(problem)
        self.problem, self.source, self.line, self.field = problem, source, line, field
        self.skipped: tuple[DataError, ...] = ()

    @property
    def location(self) -> str:
        """``file:line``, or as much of it as is known."""
        return ":".join(str(part) for part in (self.source, self.line) if part is not None)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.location, self.field, self.problem) if part)

    def of(self, example: str) -> DataError:
        """The same error of an example by its name, where file and line are not known any more."""
        return DataError(f"example {example}: {self.problem}", self.source, self.line, self.field)

    def at(self, source: str | None, line: int | None, fields: Mapping[str, str] | None = None) -> DataError:
        """The same error located in a file; ``fields`` renames canonical fields to the row's own."""
        field = (fields or {}).get(self.field or "", self.field)
        return DataError(self.problem, source, line, field)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_number(value: object) -> bool:
    """True for finite real numbers; ``True`` and ``False`` are answers, not numbers."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def check_text(value: object, field: str, max_chars: int | None = None) -> str:
    """``value`` when it is a non-blank string of at most ``max_chars`` characters; otherwise DataError."""
    if not isinstance(value, str):
        raise DataError(f"expected a string, got {_shown(value)}", field=field)
    if not value.strip():
        raise DataError("is empty", field=field)
    if max_chars is not None and len(value) > max_chars:
        raise DataError(f"has {len(value)} characters, more than the limit of {max_chars}", field=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"has half of a surrogate pair at character {error.start}", field=field) from None
    return value


def _check_messages(value: Sequence[object], field: str, max_chars: int | None) -> list[Message]:
    if not value:
        raise DataError("expected at least one message, got an empty list", field=field)
    messages: list[Message] = []
    for index, message in enumerate(value):
        here = f"{field}[{index}]"
        if not isinstance(message, Mapping):
            raise DataError(f"expected a message with role and content, got {_shown(message)}", field=here)
        # Arrow fills the keys that only some messages have with null: those carry nothing.
        extra = [key for key, item in message.items() if key not in ("role", "content") and item is not None]
        if extra:
            raise DataError(f"expected role and content only, got also {', '.join(map(repr, extra))}", field=here)
        role = check_text(message.get("role"), f"{here}.role")
        content = message.get("content")
        if role == "system" and content == "":
            messages.append({"role": role, "content": ""})
            continue
        messages.append({"role": role, "content": check_text(content, f"{here}.content")})
    total = sum(len(message["content"]) for message in messages)
    if max_chars is not None and total > max_chars:
        raise DataError(f"has {total} characters, more than the limit of {max_chars}", field=field)
    return messages


def check_prompt(value: object, field: str = "prompt", max_chars: int | None = None) -> Text:
    """A prompt: a non-blank string, or messages that end with someone else's turn than the assistant's."""
    if isinstance(value, (list, tuple)):
        messages = _check_messages(value, field, max_chars)
        if [message["role"] for message in messages] == [TEXT_ROLE]:
            return messages[0]["content"]
        if messages[-1]["role"] == "assistant":
            raise DataError("ends with an assistant message: that one belongs to the responses", field=field)
        return messages
    return check_text(value, field, max_chars)


def check_response(value: object, field: str, max_chars: int | None = None) -> Text:
    """A response: a non-blank string, or a list that holds exactly one assistant message."""
    if isinstance(value, (list, tuple)):
        messages = _check_messages(value, field, max_chars)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = [message["role"] for message in messages]
            raise DataError(
                f"expected one assistant message (earlier turns belong to the prompt), got roles {roles}", field=field
            )
        return messages
    return check_text(value, field, max_chars)


def response_text(response: Text) -> str:
    """The words of a response, whichever of its two forms it has."""
    return response if isinstance(response, str) else response[0]["content"]


def as_messages(prompt: Text) -> list[Message]:
    """A prompt as messages: a string is one user turn, however a table holds it."""
    if not isinstance(prompt, str) and [message["role"] for message in prompt] != [TEXT_ROLE]:
        return prompt
    return [{"role": "user", "content": prompt if isinstance(prompt, str) else prompt[0]["content"]}]


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt and who wins, per objective.

    Args:
        i: index of the first response.
        j: index of the second response, not equal to ``i``.
        preference: objective name to P(responses[i] beats responses[j]) in [0, 1]; 0.5 is a tie, which is information,
            ``None`` (or absence) is an objective nobody judged.
        margin: what is taken off the pair's log-odds in the sigmoid loss, ``u = tau h - margin`` in eq. (25) of
            docs/method.md, nats: as MODPO takes the other objectives' rewards, those of ``responses[i]`` minus those of
            ``responses[j]``. The pair the other way round has its negative. ``None`` is 0.
    """

    i: int
    j: int
    preference: dict[str, float | None]
    margin: float | None = None

    def __post_init__(self) -> None:
        for name in ("i", "j"):
            index = getattr(self, name)
            if not isinstance(index, int) or isinstance(index, bool):
                raise DataError(f"expected an integer, got {_shown(index)}", field=name)
        if self.i == self.j:
            raise DataError(f"a response cannot be paired with itself, got i = j = {self.i}", field="j")
        if not isinstance(self.preference, Mapping):
            raise DataError(f"expected objective -> number or null, got {_shown(self.preference)}", field="preference")
        for objective, value in self.preference.items():
            here = f"preference.{objective}"
            if not isinstance(objective, str) or not objective.strip():
                raise DataError(f"expected a non-empty objective name, got {_shown(objective)}", field="preference")
            if value is None:
                continue
            if not is_number(value):
                raise DataError(
                    f"expected a number in [0, 1], or null when unlabelled, got {_shown(value)}", field=here
                )
            if not 0 <= value <= 1:
                raise DataError(f"expected a number in [0, 1], got {_shown(value)}", field=here)
        if self.margin is not None and not is_number(self.margin):
            raise DataError(f"expected a finite number of nats, got {_shown(self.margin)}", field="margin")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PreferencePair:
        """Build from the JSON form. Raises DataError with the field's path inside the pair."""
        if not isinstance(record, Mapping):
            raise DataError(f"expected an object with i, j and preference, got {_shown(record)}")
        missing = [key for key in ("i", "j", "preference") if key not in record]
        if missing:
            raise DataError("is missing", field=missing[0])
        unknown = sorted(set(record) - {"i", "j", "preference", "margin"})
        if unknown:
            raise DataError(
                "unknown key: a pair has i, j, preference and perhaps margin (weights belong to the row)",
                field=unknown[0],
            )
        preference = record["preference"]
        if isinstance(preference, Mapping):
            preference = {
                name: float(value) if value is not None and is_number(value) else value
                for name, value in preference.items()
            }
        margin: Any = record.get("margin")
        return cls(record["i"], record["j"], preference, float(margin) if is_number(margin) else margin)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``margin`` only when there is one."""
        record = {"i": self.i, "j": self.j, "preference": dict(self.preference)}
        return record if self.margin is None else record | {"margin": self.margin}


@dataclass(frozen=True)
class PreferenceExample:
    """One prompt, its responses, and the judged pairs among them.

    Args:
        prompt: a string, or messages ``{"role", "content"}`` that end before the assistant's turn.
        responses: two or more; each a string or a list with one assistant message. Equal texts are allowed: samples of
            a language model do repeat.
        pairs: at least one judged pair of ``responses``.
        id: a name for error messages.
        weight: positive weight of each of the pairs in the loss.
        ref_logprob: summed log-probability of each response under the reference (nats), when precomputed.

    Raises:
        DataError: naming the field, for any of the above that does not hold.
    """

    prompt: Text
    responses: tuple[Text, ...]
    pairs: tuple[PreferencePair, ...]
    id: str | None = None
    weight: float = 1.0
    ref_logprob: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if len(self.responses) < 2:
            raise DataError(f"expected at least 2 responses, got {len(self.responses)}", field="responses")
        for index, response in enumerate(self.responses):
            check_response(response, f"responses[{index}]")
        if not self.pairs:
            raise DataError("expected at least one pair, got none", field="pairs")
        for index, pair in enumerate(self.pairs):
            for name in ("i", "j"):
                value = getattr(pair, name)
                if not 0 <= value < len(self.responses):
                    raise DataError(
                        f"expected an index of the {len(self.responses)} responses, got {value}",
                        field=f"pairs[{index}].{name}",
                    )
        if self.id is not None and not isinstance(self.id, str):
            raise DataError(f"expected a string, got {_shown(self.id)}", field="id")
        if not is_number(self.weight) or self.weight <= 0:
            raise DataError(f"expected a positive number, got {_shown(self.weight)}", field="weight")
        if self.ref_logprob is not None:
            if len(self.ref_logprob) != len(self.responses):
                raise DataError(
                    f"expected one number per response ({len(self.responses)}), got {len(self.ref_logprob)}",
                    field="ref_logprob",
                )
            for index, value in enumerate(self.ref_logprob):
                if not is_number(value):
                    raise DataError(f"expected a finite number, got {_shown(value)}", field=f"ref_logprob[{index}]")

    @classmethod
    def from_dict(
        cls,
        record: Mapping[str, Any],
        *,
        objectives: Sequence[str] | None = None,
        max_prompt_chars: int | None = None,
        max_response_chars: int | None = None,
    ) -> PreferenceExample:
        """Build from the JSON form; columns other than the schema's are left aside.

        Args:
            record: keys prompt, responses, pairs, and optionally id, weight, ref_logprob.
            objectives: the names allowed in ``preference``; None allows any.
            max_prompt_chars: characters a prompt may have.
            max_response_chars: characters a response may have.

        Raises:
            DataError: naming the field.
        """
        if not isinstance(record, Mapping):
            raise DataError(f"expected an object, got {_shown(record)}")
        prompt = check_prompt(record.get("prompt"), "prompt", max_prompt_chars)
        lists: dict[str, Sequence[Any]] = {}
        for name in ("responses", "pairs"):
            value = record.get(name)
            if not isinstance(value, (list, tuple)):
                raise DataError("is missing" if value is None else f"expected a list, got {_shown(value)}", field=name)
            lists[name] = value
        responses = tuple(
            check_response(response, f"responses[{index}]", max_response_chars)
            for index, response in enumerate(lists["responses"])
        )
        pairs = []
        for index, value in enumerate(lists["pairs"]):
            here = f"pairs[{index}]"
            try:
                pair = PreferencePair.from_dict(value)
            except DataError as error:
                raise DataError(error.problem, field=f"{here}.{error.field}" if error.field else here) from None
            if objectives is not None:
                for objective in pair.preference:
                    if objective not in objectives:
                        raise DataError(
                            f"unknown objective {objective!r}, expected one of {', '.join(objectives)}",
                            field=f"{here}.preference.{objective}",
                        )
            pairs.append(pair)
        weight = record.get("weight")
        reference = record.get("ref_logprob")
        if reference is not None and not isinstance(reference, (list, tuple)):
            raise DataError(f"expected a list of numbers, got {_shown(reference)}", field="ref_logprob")
        return cls(
            prompt=prompt,
            responses=responses,
            pairs=tuple(pairs),
            id=record.get("id"),
            weight=1.0 if weight is None else weight,
            ref_logprob=None if reference is None else tuple(reference),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, keys in the schema's order; ``ref_logprob`` only when there is one."""
        record: dict[str, Any] = {
            "prompt": self.prompt,
            "responses": list(self.responses),
            "pairs": [pair.to_dict() for pair in self.pairs],
            "id": self.id,
            "weight": float(self.weight),
        }
        if self.ref_logprob is not None:
            record["ref_logprob"] = list(self.ref_logprob)
        return record

    @property
    def name(self) -> str:
        """What an error message calls this example: its id, or the start of its prompt."""
        if self.id is not None:
            return self.id
        return _shown(as_messages(self.prompt)[-1]["content"])
