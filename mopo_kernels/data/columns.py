"""Which columns of a row hold what: names that published sets and other trainers use, and the ones a user maps."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mopo_kernels.data.schema import CONTEXT_COLUMNS, MEDIA_COLUMNS, DataError, is_given, shown
from mopo_kernels.text import one_line

logger = logging.getLogger(__name__)

# Instead of ``prompt``, in LLaMA-Factory, Axolotl and the sets they name; of these a row may have one.
_PROMPTS = ("question", "instruction", "query", "input", "conversations", "messages")
_ALIASES = {
    "chosen": ("chosen_response", "response_chosen"),
    "rejected": ("rejected_response", "response_rejected"),
    "system": ("system_prompt", "system_message"),
}
# Scores, ids, models and where a row comes from: nothing that a policy could be trained on.
_SILENT = re.compile(
    r"(^|[_\W])(id|ids|idx|index|uid|uuid|guid|hash|sha\d*|score|scores|rating|ratings|reward|rewards|rank|ranking|prob"
    r"|model|models|source|sources|dataset|datasets|origin|url|license|lang|language|category|date|time|timestamp|split"
    r"|num|n|count|len|length|tokens|turns|annotator|worker)([_\W]|$)"
)
# The longest name of a model, a source or a category.
_LABEL_WORDS = 6
_JOIN = "+"


def parse_columns(value: Mapping[str, str] | str | None) -> dict[str, str]:
    """``{"prompt": "question"}``, ``"prompt=question,system=system"`` or a JSON object, as a dict.

    Raises:
        ValueError: another form, or a name given twice.
    """
    expected = "columns: expected a mapping such as prompt=question,system=instructions"
    items: list[tuple[Any, Any]]
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                items = json.loads(value, object_pairs_hook=list)
            except ValueError as error:
                raise ValueError(f"{expected}; got {value!r}") from error
        else:
            parts = [part.partition("=") for part in value.split(",") if part.strip()]
            if not all(sign for _, sign, _ in parts):
                raise ValueError(f"{expected}; got {value!r}")
            items = [(name.strip(), column.strip()) for name, _, column in parts]
    elif isinstance(value, (Mapping, type(None))):
        items = list((value or {}).items())
    else:
        raise ValueError(f"{expected}; got {shown(value)}")
    columns: dict[str, str] = {}
    for name, column in items:
        if not (isinstance(name, str) and name and isinstance(column, str)):
            raise ValueError(f"{expected}; got {shown(column)} for {shown(name)}")
        if name in columns:
            raise ValueError(f"columns: expected every name once; got {name!r} twice")
        columns[name] = column
    return columns


def _texts(value: object) -> Iterator[str]:
    """The strings of a prompt, whichever form it has."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            texts = item if isinstance(item, Mapping) else {}
            yield from (text for text in (texts.get("content"), texts.get("value")) if isinstance(text, str))


def _hint(name: str = "prompt", column: str = "question") -> str:
    return f"pass columns= (--columns) {name}={column}"


def _equal(first: object, second: object) -> bool:
    try:
        return type(first) is type(second) and bool(first == second)
    except (RecursionError, ValueError):  # nested too deeply, or an array
        return False


class Columns:
    """Gives columns the names of the schema, and counts those that nothing reads.

    Args:
        mapping: the schema's name to the row's; two columns with "+" between are joined by a new line, and an empty
            name says that there is none.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        self.mapping = mapping
        self._found: set[str] = set()
        self._unused: Counter[str] = Counter()

    @staticmethod
    def _parts(columns: str, names: Collection[str]) -> list[str]:
        if not columns:
            return []
        return [columns] if columns in names else [part.strip() for part in columns.split(_JOIN)]

    def standard(self, record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The row under the schema's names for all but the prompt, and those names that are not its own."""
        taken: dict[str, Any] = {}
        fields: dict[str, str] = {}
        moved: set[str] = set()
        for name, columns in self.mapping.items():
            parts = self._parts(columns, record)
            moved.update([name, *parts] if name not in record else parts)
            self._found.update(part for part in parts if part in record)
            if parts:
                taken[name] = record.get(parts[0]) if len(parts) == 1 else _joined(record, parts)
                fields[name] = parts[0]
        # What a mapped name stood for before.
        hidden = [name for name in self.mapping if is_given(record.get(name)) and name not in moved]
        self._unused.update(hidden)
        result = {name: value for name, value in record.items() if name not in moved and name not in hidden} | taken
        for name, others in _ALIASES.items():
            found = [other for other in others if other in result]
            if name not in result and name not in self.mapping and found:
                result[name] = result.pop(found[0])
                fields[name] = found[0]
        return result, fields

    def find_prompt(self, record: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
        """The row with its prompt under that name, and where it was found.

        Raises:
            DataError: several columns could be the prompt.
        """
        if "prompt" in self.mapping:
            return record, {}
        answers = [record[name] for name in ("chosen", "rejected") if name in record]
        found = [
            name
            for name in _PROMPTS
            if is_given(record.get(name)) and not any(_equal(record[name], answer) for answer in answers)
        ]
        prompt = record.get("prompt")
        if prompt is not None:
            transcripts = [prompt, *(answer for answer in answers if not isinstance(answer, str))]
            words = [text for transcript in transcripts for text in _texts(transcript)]
            for name in found:
                text = record[name]
                if isinstance(text, str) and not any(text.strip() in other for other in words):
                    raise DataError(
                        f"expected one column with the prompt; got text beside it that it does not hold: "
                        f"{_hint('prompt', f'prompt{_JOIN}{name}')}, or prompt=prompt to leave it out",
                        field=name,
                    )
            return record, {}
        if not found:
            return record, {}
        if len(found) > 1 and found != ["instruction", "input"]:
            raise DataError(
                f"expected one column with the prompt; got {', '.join(found)}: {_hint('prompt', found[0])}",
                field=found[0],
            )
        rest = {name: value for name, value in record.items() if name not in found}
        joined = record[found[0]] if len(found) == 1 else _joined(record, found)
        return rest | {"prompt": joined}, {"prompt": found[0]}

    def count_unused(self, record: Mapping[str, Any], known: Collection[str]) -> None:
        """Count the columns of the row with something in them that nothing reads."""
        self._unused.update(str(name) for name in _unread(record, known, _LABEL_WORDS) if is_given(record[name]))

    def check_no_other_text(self, record: Mapping[str, Any], known: Collection[str]) -> None:
        """DataError where a row of two plain answers has other text, which may be what its prompt is."""
        if self.mapping.get("prompt") == "":
            return
        if "prompt" in record:
            raise DataError("is null, and the answers share no beginning up to a turn marker", field="prompt")
        # A blank or null is of a column that has text in other rows.
        texts = [name for name in _unread(record, known, 1) if not isinstance(record[name], (bool, int, float))]
        texts += [name for name in ("system", "history") if is_given(record.get(name))]
        if texts:
            raise DataError(
                "expected a prompt, or answers that share one up to a turn marker; there may be text in "
                f"{', '.join(map(str, texts))}: {_hint('prompt', str(texts[0]))}, or prompt= for what answers share",
                field="prompt",
            )

    def check_names(self, known: Collection[str]) -> None:
        """ValueError for a mapped name that nothing would read."""
        if unknown := [name for name in self.mapping if name not in known and name not in CONTEXT_COLUMNS]:
            raise ValueError(
                f"columns: expected names out of {', '.join(sorted(known))}, {', '.join(CONTEXT_COLUMNS)}; "
                f"got {', '.join(unknown)}"
            )

    def check(self) -> None:
        """ValueError for a mapped column that no row had."""
        wanted = [part for columns in self.mapping.values() for part in self._parts(columns, self._found)]
        if absent := [part for part in wanted if part not in self._found]:
            raise ValueError(f"columns: expected names of columns; got {', '.join(absent)}, in no row")

    def report(self, origin: str) -> None:
        """Name the columns that nothing read, in one line of the log."""
        if self._unused:
            names = ", ".join(f"{name} ({count})" for name, count in sorted(self._unused.items()))
            logger.warning(one_line(f"{origin}: columns that are not used (rows that have them): {names}"))


def _joined(record: Mapping[str, Any], parts: list[str]) -> str:
    """The texts of several columns, a line each."""
    values = [record.get(part) for part in parts]
    for part, value in zip(parts, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise DataError(f"expected a string; got {shown(value)}", field=part)
    return "\n".join(str(value) for value in values if is_given(value))


def _most_words(value: object) -> int:
    """Of any text inside a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return max(map(_most_words, value), default=0)
    return sum(any(map(str.isalpha, word)) for word in value.split()) if isinstance(value, str) else 0


def _unread(record: Mapping[str, Any], known: Collection[str], words: int) -> list[str]:
    """Columns that neither ``known`` names nor a name explains, and that are no copy of what is read. No name explains
    a text of more than ``words`` words."""
    read = [value for name, value in record.items() if name in known]
    return [
        name
        for name, value in record.items()
        if not (
            name in known
            or name in CONTEXT_COLUMNS
            or MEDIA_COLUMNS.fullmatch(str(name))
            or (_SILENT.search(str(name).lower()) and _most_words(record[name]) <= words)
            or any(_equal(value, other) for other in read)
        )
    ]
