"""The canonical preference example, and every check that a row has to pass."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from mopo_kernels.checks import LARGEST, SMALLEST
from mopo_kernels.data.transcripts import is_transcript, template_header
from mopo_kernels.text import one_line

Message = dict[str, Any]
Text = str | list[Message]

# Columns beside the prompt that belong to it: system and history become messages of it, the others go to the template.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
CONTEXT_COLUMNS = ("system", "history", *TEMPLATE_COLUMNS)
# What no causal language model of text can read, itself or where it is.
MEDIA_COLUMNS = re.compile(
    r"((input|prompt|source|user)_)?(image|video|audio)s?(_?(bytes|data|base64|file|filename|path|uri|url)s?)?|pixel_values",
    re.IGNORECASE,
)
# What the collator decides itself.
_TEMPLATE_ARGUMENTS = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "messages"),
        *("padding", "return_dict", "return_tensors", "tokenize", "tools", "truncation"),
    )
)
_MESSAGE_TEXTS = ("name", "tool_call_id", "reasoning_content")
# By which messages are told from other objects.
_TURN_KEYS = frozenset(("role", "content", "from", "value"))
# Of an assistant's message beside its content, where it is a response.
RESPONSE_PARTS = ("reasoning_content", "tool_calls")
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
        return one_line(": ".join(part for part in (self.location, self.field, self.problem) if part))

    def of(self, example: str) -> DataError:
        """The same error of an example by its name, where file and line are not known any more."""
        return DataError(f"example {example}: {self.problem}", self.source, self.line, self.field)

    def at(self, source: str | None, line: int | None, fields: Mapping[str, str] | None = None) -> DataError:
        """The same error located in a file; ``fields`` renames canonical fields to the row's own."""
        return DataError(self.problem, source, line, None if self.field is None else renamed(self.field, fields or {}))


def renamed(field: str, fields: Mapping[str, str]) -> str:
    """The path ``field`` with its beginning in the row's own terms, as ``fields`` has it."""
    for name, own in fields.items():
        if field == name or field.startswith((f"{name}.", f"{name}[")):
            return own + field[len(name) :]
    return field


def shown(value: object) -> str:
    """What an error message says of a value, in 60 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def is_number(value: object) -> bool:
    """True for finite real numbers; ``True`` and ``False`` are answers, not numbers."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _check_size(value: Any, field: str, expected: str) -> None:
    """DataError unless ``value`` is a number that the losses compute with."""
    if not is_number(value):
        raise DataError(f"expected {expected}; got {shown(value)}", field=field)
    if abs(value) > LARGEST:
        raise DataError(f"expected {expected}, of a size up to {LARGEST:g}; got {shown(value)}", field=field)


def check_unicode(value: str, field: str) -> str:
    """``value`` when it can be written as UTF-8; otherwise DataError."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"has half of a surrogate pair at character {error.start}", field=field) from None
    return value


def check_text(value: object, field: str, max_chars: int | None = None) -> str:
    """``value`` when it is a non-blank string of at most ``max_chars`` characters; otherwise DataError."""
    if not isinstance(value, str):
        raise DataError(f"expected a string; got {shown(value)}", field=field)
    if not value.strip():
        raise DataError("is empty", field=field)
    _check_length(len(value), field, max_chars)
    return check_unicode(value, field)


def _check_words(value: object, field: str, max_chars: int | None) -> str:
    """As :func:`check_text`; and no text of a list of messages, as an export to a table may leave in their place."""
    text = check_text(value, field, max_chars)
    bare = text.strip()
    if bare.startswith("[{") and bare.endswith("}]"):
        found = None
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(bare)
        turns = isinstance(found, list) and all(isinstance(item, dict) and _TURN_KEYS & set(item) for item in found)
        if turns or bare.startswith(tuple(f"[{{'{key}'" for key in _TURN_KEYS)):
            raise DataError(
                "expected text or messages; got the text of a list of messages (json.loads reads one)", field=field
            )
    return text


def _check_length(length: int, field: str, max_chars: int | None) -> None:
    if max_chars is not None and length > max_chars:
        raise DataError(f"has {length} characters, more than the limit of {max_chars}", field=field)


def is_given(value: object) -> bool:
    """False for what a column holds where a row has nothing for it: null, and blank or empty values."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, (list, tuple, Mapping)) and not value)


def _check_json(value: object, field: str) -> Any:
    """A value of JSON, or the text of one, as plain lists and dicts."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        return json.loads(check_unicode(json.dumps(value, ensure_ascii=False, allow_nan=False), field))
    except DataError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"expected JSON; got {shown(value)}: {error}", field=field) from None


def _check_objects(value: object, field: str) -> list[dict[str, Any]]:
    """A list of JSON objects, or the text of one."""
    found = _check_json(value, field)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise DataError(f"expected a list of objects; got {shown(value)}", field=field)
    return found


def _content(value: object, field: str) -> object:
    """The content of a message; parts of a list are joined when all are text."""
    if not isinstance(value, (list, tuple)):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text":
            got = shown(part) if kind is None else f"a part of type {shown(kind)}"
            raise DataError(f"expected text, as nothing else is read; got {got}", field=f"{field}[{index}]")
        texts.append(check_text(part.get("text"), f"{field}[{index}].text"))
    return "".join(texts)


def _check_message(value: object, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"expected a message with role and content; got {shown(value)}", field=field)
    # Arrow fills the keys that only some messages have with null: those carry nothing.
    given = {key: item for key, item in value.items() if item is not None}
    known = ("role", "content", "tool_calls", *_MESSAGE_TEXTS)
    if extra := [key for key, item in given.items() if key not in known and is_given(item)]:
        raise DataError(
            f"expected role, content and what belongs to tools only; got also {', '.join(map(shown, extra))}",
            field=field,
        )
    role = check_text(given.get("role"), f"{field}.role")
    content = _content(given.get("content"), f"{field}.content")
    calls = _check_objects(given["tool_calls"], f"{field}.tool_calls") if is_given(given.get("tool_calls")) else []
    if calls and role != "assistant":
        raise DataError(
            f"expected tool calls of the assistant; got those of {shown(role)}", field=f"{field}.tool_calls"
        )
    is_empty = (content == "" and role in ("system", "tool", "assistant")) or (content is None and calls)
    message = {"role": role, "content": "" if is_empty else check_text(content, f"{field}.content")}
    for name in _MESSAGE_TEXTS:
        if is_given(given.get(name)):
            message[name] = check_text(given[name], f"{field}.{name}")
    return message | {"tool_calls": calls} if calls else message


def check_messages(value: Sequence[object], field: str, max_chars: int | None = None) -> list[Message]:
    """At least one message, each of ``role`` and ``content``, and perhaps of what belongs to calls of tools."""
    if not value:
        raise DataError("expected at least one message; got an empty list", field=field)
    messages = [_check_message(message, f"{field}[{index}]") for index, message in enumerate(value)]
    _check_length(sum(len(message["content"]) for message in messages), field, max_chars)
    return messages


def check_prompt(value: object, field: str = "prompt", max_chars: int | None = None) -> Text:
    """A prompt: a non-blank string, or messages that end with someone else's turn than the assistant's."""
    if isinstance(value, (list, tuple)):
        messages = check_messages(value, field, max_chars)
        if [message["role"] for message in messages] == [TEXT_ROLE]:
            if extra := sorted(set(messages[0]) - {"role", "content"}):
                raise DataError(f"expected text, as its role says; got {', '.join(extra)}", field=f"{field}[0]")
            text: str = messages[0]["content"]
            return text
        if messages[-1]["role"] == "assistant":
            raise DataError("ends with an assistant message: that one belongs to the responses", field=field)
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and not message["content"] and "tool_calls" not in message:
                raise DataError("is empty", field=f"{field}[{index}].content")
        return messages
    return _check_words(value, field, max_chars)


def check_response(value: object, field: str, max_chars: int | None = None) -> Text:
    """A response: a string, or a list that holds exactly one assistant message, perhaps with calls of tools.

    It may be empty, as a chat template writes the end of the turn, which is scored: where no turn ends, the renderer
    refuses it.
    """
    if isinstance(value, (list, tuple)):
        messages = check_messages(value, field, max_chars)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = [message["role"] for message in messages]
            raise DataError(
                "expected one assistant message (earlier turns belong to the prompt, and what tools return is not the "
                f"policy's); got roles {shown(roles)}",
                field=field,
            )
        if extra := sorted(set(messages[0]) - {"role", "content", *RESPONSE_PARTS}):
            raise DataError(
                f"expected content, {' and '.join(RESPONSE_PARTS)} only; got {', '.join(extra)}", field=field
            )
        return messages
    return "" if value == "" else _check_words(value, field, max_chars)


def response_text(response: Text) -> str:
    """The words of a response, whichever of its two forms it has."""
    return response if isinstance(response, str) else response[0]["content"]


def response_parts(response: Text) -> dict[str, Any]:
    """What a response has beside its words."""
    message = {} if isinstance(response, str) else response[0]
    return {name: message[name] for name in RESPONSE_PARTS if name in message}


def response_key(response: Text) -> str:
    """Equal for responses that mean the same: a string equals a message with that content."""
    parts = response_parts(response)
    return response_text(response) + (json.dumps(parts, sort_keys=True) if parts else "")


def judged_text(response: Text, field: str) -> str:
    """The words of a response, which are all that a judge is shown; DataError where it has more."""
    if parts := response_parts(response):
        raise DataError(f"expected text, as judges are shown nothing else; got {next(iter(parts))}", field=field)
    return response_text(response)


def as_messages(prompt: Text) -> list[Message]:
    """A prompt as messages: a string is one user turn, however a table holds it."""
    if not isinstance(prompt, str) and [message["role"] for message in prompt] != [TEXT_ROLE]:
        return prompt
    return [{"role": "user", "content": prompt if isinstance(prompt, str) else prompt[0]["content"]}]


def check_media(record: Mapping[str, Any]) -> None:
    """DataError for a row with images, sound or video."""
    for name, value in record.items():
        if not MEDIA_COLUMNS.fullmatch(str(name)):
            continue
        if is_given(value) and not (isinstance(value, (list, tuple)) and all(item is None for item in value)):
            raise DataError("expected none, as only text is read; got some", field=str(name))


def _check_history(value: object) -> list[Message]:
    """Earlier turns: messages, or pairs of what the user said and what the assistant answered."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"expected a list of turns; got {shown(value)}", field="history")
    messages: list[Message] = []
    for index, turn in enumerate(value):
        here = f"history[{index}]"
        if isinstance(turn, Mapping):
            messages.append(_check_message(turn, here))
        elif isinstance(turn, (list, tuple)) and len(turn) == 2:
            for place, role in enumerate(("user", "assistant")):
                messages.append({"role": role, "content": check_text(turn[place], f"{here}[{place}]")})
        else:
            raise DataError(f"expected a message, or a question and its answer; got {shown(turn)}", field=here)
    return messages


def join_context(prompt: Text, record: Mapping[str, Any], max_chars: int | None = None) -> Text:
    """``prompt`` with the row's columns ``system`` and ``history`` before it, as messages; unchanged without any.

    What the prompt has already is not put there twice.

    Raises:
        DataError: either is malformed, the system prompt is another than that of ``prompt``, or ``prompt`` is a text of
            several turns without them.
    """
    system, history = record.get("system"), record.get("history")
    if not is_given(system) and not is_given(history):
        return prompt
    if isinstance(prompt, str) and (template_header(prompt) or is_transcript(prompt)):
        earlier = _check_history(history) if is_given(history) else []
        texts = [("history", message["content"]) for message in earlier]
        texts += [("system", check_text(system, "system"))] if is_given(system) else []
        for name, text in texts:
            if text.strip() not in prompt:
                raise DataError(
                    "expected none beside a prompt whose turns are written out and do not hold it; got some "
                    f"(columns= (--columns) {name}= leaves it out)",
                    field=name,
                )
        return prompt
    turns = list(as_messages(prompt))
    opening = [turns.pop(0)] if turns[0]["role"] == "system" else []
    earlier = _check_history(history) if is_given(history) else []
    if earlier and earlier[0]["role"] == "system":
        opening.append(earlier.pop(0))
    if is_given(system):
        opening.append({"role": "system", "content": check_text(system, "system")})
    opening = [message for message in opening if message["content"]] or opening
    if any(message != opening[0] for message in opening):
        raise DataError("expected one system prompt; got two that differ", field="system")
    if turns[: len(earlier)] != earlier:
        turns = earlier + turns
    return check_messages(opening[:1] + turns, "prompt", max_chars)


def check_tools(value: object) -> list[dict[str, Any]] | None:
    """Tools as the chat template takes them: JSON schemas in a list, or the text of it; None for none."""
    return (_check_objects(value, "tools") or None) if is_given(value) else None


def check_template_kwargs(value: object) -> dict[str, Any] | None:
    """Variables for the chat template by name, or the JSON of them; None for none. A null is no value."""
    if not is_given(value):
        return None
    found = _check_json(value, "chat_template_kwargs")
    if not isinstance(found, dict):
        raise DataError(f"expected an object; got {shown(value)}", field="chat_template_kwargs")
    if own := sorted(_TEMPLATE_ARGUMENTS & set(found)):
        raise DataError(f"expected variables of the template; got {', '.join(own)}", field="chat_template_kwargs")
    return {name: item for name, item in found.items() if item is not None} or None


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
                raise DataError(f"expected an integer; got {shown(index)}", field=name)
        if self.i == self.j:
            raise DataError(f"expected two different responses; got i = j = {self.i}", field="j")
        if not isinstance(self.preference, Mapping):
            raise DataError(f"expected objective -> number or null; got {shown(self.preference)}", field="preference")
        for objective, value in self.preference.items():
            here = f"preference.{objective}"
            if not isinstance(objective, str) or not objective.strip():
                raise DataError(f"expected a non-empty objective name; got {shown(objective)}", field="preference")
            check_unicode(objective, "preference")
            if value is None:
                continue
            if not is_number(value):
                raise DataError(f"expected a number in [0, 1], or null when unlabelled; got {shown(value)}", field=here)
            if not 0 <= value <= 1:
                raise DataError(f"expected a number in [0, 1]; got {shown(value)}", field=here)
        if self.margin is not None:
            _check_size(self.margin, "margin", "a finite number of nats")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PreferencePair:
        """Build from the JSON form. Raises DataError with the field's path inside the pair."""
        if not isinstance(record, Mapping):
            raise DataError(f"expected an object with i, j and preference; got {shown(record)}")
        missing = [key for key in ("i", "j", "preference") if key not in record]
        if missing:
            raise DataError("is missing", field=missing[0])
        unknown = sorted(map(str, set(record) - {"i", "j", "preference", "margin"}))
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
        responses: two or more; each a string or a list with one assistant message, perhaps with calls of tools. Equal
            texts are allowed: samples of a language model do repeat.
        pairs: at least one judged pair of ``responses``.
        id: a name for error messages.
        weight: positive weight of each of the pairs in the loss, from 1e-10 to 1e10.
        ref_logprob: summed log-probability of each response under the reference (nats), when precomputed.
        tools: JSON schemas that the chat template writes into the prompt.
        chat_template_kwargs: further variables of the chat template, such as ``enable_thinking``.

    Raises:
        DataError: naming the field, for any of the above that does not hold.
    """

    prompt: Text
    responses: tuple[Text, ...]
    pairs: tuple[PreferencePair, ...]
    id: str | None = None
    weight: float = 1.0
    ref_logprob: tuple[float, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if len(self.responses) < 2:
            raise DataError(f"expected at least 2 responses; got {len(self.responses)}", field="responses")
        for index, response in enumerate(self.responses):
            check_response(response, f"responses[{index}]")
        if not self.pairs:
            raise DataError("expected at least one pair; got none", field="pairs")
        for index, pair in enumerate(self.pairs):
            for name in ("i", "j"):
                value = getattr(pair, name)
                if not 0 <= value < len(self.responses):
                    raise DataError(
                        f"expected an index of the {len(self.responses)} responses; got {value}",
                        field=f"pairs[{index}].{name}",
                    )
        if self.id is not None:
            if not isinstance(self.id, str):
                raise DataError(f"expected a string; got {shown(self.id)}", field="id")
            check_unicode(self.id, "id")
        _check_size(self.weight, "weight", "a positive number")
        if self.weight < SMALLEST:
            least = f", at least {SMALLEST:g}" if self.weight > 0 else ""
            raise DataError(f"expected a positive number{least}; got {shown(self.weight)}", field="weight")
        if self.ref_logprob is not None:
            if len(self.ref_logprob) != len(self.responses):
                raise DataError(
                    f"expected one number per response ({len(self.responses)}); got {len(self.ref_logprob)}",
                    field="ref_logprob",
                )
            for index, value in enumerate(self.ref_logprob):
                _check_size(value, f"ref_logprob[{index}]", "a finite number of nats")
        check_tools(self.tools)
        check_template_kwargs(self.chat_template_kwargs)

    @classmethod
    def from_dict(
        cls,
        record: Mapping[str, Any],
        *,
        objectives: Sequence[str] | None = None,
        max_prompt_chars: int | None = None,
        max_response_chars: int | None = None,
    ) -> PreferenceExample:
        """Build from the JSON form; columns other than these are left aside.

        Args:
            record: keys prompt, responses, pairs, and optionally id, weight, ref_logprob, tools, chat_template_kwargs,
                and system and history, which become messages of the prompt. Images, sound and video are refused.
            objectives: the names allowed in ``preference``; None allows any.
            max_prompt_chars: characters a prompt may have.
            max_response_chars: characters a response may have.

        Raises:
            DataError: naming the field.
        """
        if not isinstance(record, Mapping):
            raise DataError(f"expected an object; got {shown(record)}")
        check_media(record)
        prompt = join_context(check_prompt(record.get("prompt"), "prompt", max_prompt_chars), record, max_prompt_chars)
        lists: dict[str, Sequence[Any]] = {}
        for name in ("responses", "pairs"):
            value = record.get(name)
            if not isinstance(value, (list, tuple)):
                raise DataError("is missing" if value is None else f"expected a list; got {shown(value)}", field=name)
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
                            f"unknown objective {shown(objective)}, expected one of {', '.join(objectives)}",
                            field=f"{here}.preference.{objective}",
                        )
            pairs.append(pair)
        weight = record.get("weight")
        reference = record.get("ref_logprob")
        if reference is not None and not isinstance(reference, (list, tuple)):
            raise DataError(f"expected a list of numbers; got {shown(reference)}", field="ref_logprob")
        return cls(
            prompt=prompt,
            responses=responses,
            pairs=tuple(pairs),
            id=record.get("id"),
            weight=1.0 if weight is None else weight,
            ref_logprob=None if reference is None else tuple(reference),
            tools=check_tools(record.get("tools")),
            chat_template_kwargs=check_template_kwargs(record.get("chat_template_kwargs")),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, keys in the schema's order; those from ``ref_logprob`` on only when there is a value."""
        record: dict[str, Any] = {
            "prompt": self.prompt,
            "responses": list(self.responses),
            "pairs": [pair.to_dict() for pair in self.pairs],
            "id": self.id,
            "weight": float(self.weight),
        }
        if self.ref_logprob is not None:
            record["ref_logprob"] = list(self.ref_logprob)
        if self.tools is not None:
            record["tools"] = self.tools
        if self.chat_template_kwargs is not None:
            record["chat_template_kwargs"] = self.chat_template_kwargs
        return record

    @property
    def name(self) -> str:
        """What an error message calls this example: its id, or the start of its prompt."""
        if self.id is not None:
            return self.id
        return shown(as_messages(self.prompt)[-1]["content"])
