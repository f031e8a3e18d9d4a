"""Whatever the rows are: each is used or counted with its place, texts of the prompt are kept, no other error comes."""

from __future__ import annotations

import copy
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mopo_kernels.data import DataError, PreferenceExample, PreferencePair, load_preferences
from mopo_kernels.data.converters import CONVERTERS
from mopo_kernels.text import one_line

# Half surrogates too, which JSON can write and UTF-8 cannot.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
TEXT = st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, 1e39, 1e-46, True, -1, 0, 1, 5, "N/A", "5", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


GOOD: dict[str, list[dict[str, Any]]] = {
    "canonical": [
        {
            "prompt": [turn("system", "s"), turn("user", "p")],
            "responses": ["a", [turn("assistant", "b")]],
            "pairs": [{"i": 0, "j": 1, "preference": {"k": 1.0}, "margin": 0.5}],
            "id": "x",
            "weight": 2.0,
            "ref_logprob": [-1.0, -2.0],
            "history": [["h", "g"]],
            "tools": [{"name": "look"}],
            "chat_template_kwargs": {"quick": True},
        }
    ],
    "pku-saferlhf": [
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": -1}
    ],
    "helpsteer": [{"prompt": "p", "response": text, "helpfulness": rating} for rating, text in enumerate("ab")],
    "ultrafeedback": [
        {
            "instruction": "p",
            "completions": [
                {"response": text, "annotations": {"honesty": {"Rating": "3"}, "helpfulness": {"Rating": "N/A"}}}
                for text in "abc"
            ],
        }
    ],
    "summarize-from-feedback": [
        {"info": {"post": "p", "title": "t"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
    ],
    "hh-rlhf": [{name: f"\n\nHuman: p\n\nAssistant: {name}" for name in ("chosen", "rejected")}],
    "trl": [
        {"prompt": "p", "system": "s", "chosen": "a", "rejected": "b"},
        {"instruction": "p", "input": "q", "chosen": "a", "rejected": "b"},
        {
            "chosen": [turn("user", "p"), turn("assistant", "a")],
            "rejected": [turn("user", "p"), turn("assistant", "b")],
        },
        {
            "conversations": [{"from": "human", "value": "p"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ],
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in items] + [place for _, item in items for place in places(item)]


def load(source: Any, **options: Any) -> tuple[int, tuple[DataError, ...]]:
    """(examples, bad rows); every other outcome is an error of the test."""
    good = 0
    refused: tuple[DataError, ...] = ()
    try:
        data = load_preferences(source, on_error="skip", **options)
        good, skipped = len(list(data)), data.skipped
    except DataError as error:
        refused, skipped = (error,), error.skipped
    assert good or refused
    assert all(one_line(str(error)) == str(error) for error in (*refused, *skipped))
    return good, skipped


def test_every_format_has_rows_here() -> None:
    assert list(GOOD) == list(CONVERTERS)


@pytest.mark.parametrize("format", GOOD)
@given(data=st.data())
def test_a_row_that_is_wrong_somewhere_is_used_or_counted(format: str, data: st.DataObject) -> None:
    rows = copy.deepcopy(GOOD[format])
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(places(rows)))
        if isinstance(container, dict) and data.draw(st.booleans()):
            del container[key]
            container[data.draw(ANY_TEXT | st.sampled_from(["images", "system", "history", "question"]))] = data.draw(
                VALUES
            )
        else:
            container[key] = data.draw(VALUES)
        assume(rows)
    # So that some pair has a label.
    rows += copy.deepcopy(GOOD[format])
    options = {"objective": "k"} if format == "hh-rlhf" else {}
    good, skipped = load(rows, format=format, **options)
    assert all(error.line is not None and 1 <= error.line <= len(rows) for error in skipped)
    assert good
    if format == "helpsteer":  # whose rows are responses
        assert len(skipped) < len(rows)
    elif format != "ultrafeedback":  # whose rows can lose a completion and stay
        assert good + len(skipped) == len(rows)


@given(
    st.lists(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "responses", "pairs"]), VALUES) | VALUES)
)
def test_rows_of_anything_are_used_or_counted(rows: list[Any]) -> None:
    good, skipped = load(rows)
    assert good + len(skipped) == len(rows)


@given(st.binary(max_size=200) | st.lists(VALUES).map(lambda rows: json.dumps(rows).encode()), st.booleans())
def test_files_of_anything_are_read_or_refused(content: bytes, compressed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("rows.json.gz" if compressed else "rows.json")
        path.write_bytes(gzip.compress(content) if compressed else content)
        _, skipped = load(path)
    assert all(error.source == str(path) for error in skipped)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz", "parquet"])
@given(data=st.data())
def test_a_file_with_a_flipped_bit_or_a_torn_end_is_read_or_refused(suffix: str, data: st.DataObject) -> None:
    rows = [GOOD["canonical"][0] | {"id": str(index), "responses": ["a", "b"]} for index in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{suffix}"
        text = json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        if suffix == "parquet":
            datasets.Dataset.from_list([{**row, "tools": json.dumps(row["tools"])} for row in rows]).to_parquet(path)
            content = bytearray(path.read_bytes())
        else:
            content = bytearray(gzip.compress(text.encode(), mtime=0) if suffix.endswith("gz") else text.encode())
        if data.draw(st.booleans()):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[data.draw(st.integers(1, len(content) - 1)) :]
        path.write_bytes(content)
        load(path)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A system prompt or none, then questions and answers in turn up to a question; every text is another."""
    texts = draw(st.lists(TEXT.map(str.strip), min_size=1, max_size=7, unique=True))
    turns = [turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    system = [turn("system", f"{draw(TEXT)} system")] * draw(st.booleans())
    return [*system, *(turns if len(turns) % 2 else turns[:-1])]


@given(conversations(), st.data())
def test_a_prompt_in_two_overlapping_parts_is_put_together(talk: list[dict[str, Any]], data: st.DataObject) -> None:
    end = data.draw(st.integers(1, len(talk)))
    start = data.draw(st.integers(0, end))
    answers = {name: [*talk[start:], turn("assistant", name)] for name in ("chosen", "rejected")}
    (example,) = load_preferences([{"prompt": talk[:end], **answers}])
    assert example.prompt == talk
    assert example.responses == ("chosen", "rejected")


@given(conversations(), st.sampled_from(["canonical", "trl", "pku-saferlhf"]), st.data())
def test_system_history_and_prompt_in_columns_are_the_conversation(
    talk: list[dict[str, Any]], format: str, data: st.DataObject
) -> None:
    rows: dict[str, dict[str, Any]] = {
        "canonical": {"responses": ["a", "b"], "pairs": [{"i": 0, "j": 1, "preference": {"k": 1.0}}]},
        "trl": {"chosen": "a", "rejected": "b"},
        "pku-saferlhf": {"response_0": "a", "response_1": "b", "better_response_id": 0},
    }
    row, rest = rows[format], list(talk)
    if rest[0]["role"] == "system":
        row["system"] = rest.pop(0)["content"]
    texts = [message["content"] for message in rest[:-1]]
    pairs = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    row["history"] = data.draw(st.sampled_from([pairs, rest[:-1]]))
    question = rest[-1]["content"]
    row["prompt"] = data.draw(st.sampled_from([question, rest[-1:], talk]))
    (example,) = load_preferences([row])
    assert example.prompt in (talk, question if len(talk) == 1 else talk)


JSON = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=5,
)


@st.composite
def examples(draw: st.DrawFn) -> PreferenceExample:
    count = draw(st.integers(2, 4))
    responses = draw(st.lists(TEXT, min_size=count, max_size=count))
    pairs = [
        PreferencePair(i, j, {"k": draw(st.none() | st.floats(0, 1)), "l": draw(st.floats(0, 1))})
        for i in range(count)
        for j in range(i)
    ]
    return PreferenceExample(
        prompt=draw(conversations()),
        responses=tuple([turn("assistant", text)] for text in responses),
        pairs=tuple(pairs),
        id=draw(st.none() | TEXT),
        weight=draw(st.floats(2.0**-33, 2.0**33)),
        tools=draw(st.none() | st.lists(st.dictionaries(TEXT, JSON, max_size=3), min_size=1, max_size=2)),
        chat_template_kwargs=draw(st.none() | st.dictionaries(TEXT.map(lambda text: f"x{text}"), JSON, min_size=1)),
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@given(st.lists(examples(), min_size=1, max_size=4))
def test_good_examples_come_back_from_disk_as_they_were(suffix: str, items: list[PreferenceExample]) -> None:
    data = load_preferences(items)
    assert list(data) == items
    with tempfile.TemporaryDirectory() as folder:
        data.save(Path(folder) / f"rows.{suffix}")
        assert list(load_preferences(Path(folder) / f"rows.{suffix}")) == items
