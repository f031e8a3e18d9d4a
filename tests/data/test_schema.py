"""Every rule of the canonical schema is enforced, and names the field that breaks it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from mopo_kernels.data import DataError, PreferenceExample, PreferencePair


def record(**changes: Any) -> dict[str, Any]:
    base = {
        "prompt": "Name a river.",
        "responses": ["The Nile.", "The Danube flows east."],
        "pairs": [{"i": 0, "j": 1, "preference": {"helpful": 1.0, "harmless": None}}],
    }
    return base | changes


def pair(**changes: Any) -> dict[str, Any]:
    return {"i": 0, "j": 1, "preference": {"helpful": 1.0}} | changes


CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "Name a river."}]


@pytest.mark.parametrize(
    "row",
    [
        record(),
        record(id="a", weight=2.5),
        record(prompt=CHAT),
        record(responses=[[{"role": "assistant", "content": "The Nile."}], [{"role": "assistant", "content": "Po."}]]),
        record(responses=["The Nile.", "The Nile."]),
        record(pairs=[pair(preference={"helpful": 0.5, "brief": 0.25})]),
        record(ref_logprob=[-3.0, -5.5]),
        record(pairs=[pair(margin=-1.5), pair(i=1, j=0)]),
    ],
    ids=["plain", "id-weight", "messages", "response-messages", "equal-texts", "soft", "ref_logprob", "margin"],
)
def test_valid_rows_survive_the_round_trip(row: dict[str, Any]) -> None:
    example = PreferenceExample.from_dict(row)
    again = PreferenceExample.from_dict(example.to_dict())
    assert again == example
    assert {key: example.to_dict()[key] for key in row} == row


def test_other_columns_are_left_aside() -> None:
    assert PreferenceExample.from_dict(record(source="web")) == PreferenceExample.from_dict(record())


def test_an_integer_label_becomes_a_float_and_absence_stays_absence() -> None:
    example = PreferenceExample.from_dict(record(pairs=[pair(preference={"helpful": 1})]))
    assert example.pairs[0].preference == {"helpful": 1.0}
    assert isinstance(example.pairs[0].preference["helpful"], float)


BAD = {
    "no-prompt": (record(prompt=None), "prompt", "expected a string"),
    "blank-prompt": (record(prompt="  "), "prompt", "is empty"),
    "no-messages": (record(prompt=[]), "prompt", "at least one message"),
    "message-not-object": (record(prompt=["hi"]), "prompt[0]", "role and content"),
    "message-no-role": (record(prompt=[{"content": "hi"}]), "prompt[0].role", "expected a string"),
    "message-blank": (record(prompt=[{"role": "user", "content": " "}]), "prompt[0].content", "is empty"),
    "message-extra": (
        record(prompt=[{"role": "user", "content": "hi", "weight": 1}]),
        "prompt[0]",
        "'weight'",
    ),
    "text-with-more": (record(prompt=[{"role": "text", "content": "hi", "name": "x"}]), "prompt[0]", "got name"),
    "message-calls-of-the-user": (
        record(prompt=[{"role": "user", "content": "hi", "tool_calls": [{"type": "function"}]}]),
        "prompt[0].tool_calls",
        "tool calls of the assistant; got those of 'user'",
    ),
    "message-calls-not-objects": (
        record(prompt=[{"role": "assistant", "content": "hi", "tool_calls": [1]}, {"role": "user", "content": "hi"}]),
        "prompt[0].tool_calls",
        "list of objects",
    ),
    "message-image": (
        record(prompt=[{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}]),
        "prompt[0].content[1]",
        "expected text, as nothing else is read; got a part of type 'image'",
    ),
    "prompt-ends-assistant": (record(prompt=[{"role": "assistant", "content": "hi"}]), "prompt", "assistant message"),
    "no-responses": (record(responses=None), "responses", "is missing"),
    "responses-not-list": (record(responses="abc"), "responses", "expected a list"),
    "one-response": (record(responses=["a"]), "responses", "at least 2 responses; got 1"),
    "zero-responses": (record(responses=[]), "responses", "at least 2 responses; got 0"),
    "blank-response": (record(responses=["a", " "]), "responses[1]", "is empty"),
    "response-type": (record(responses=["a", 3]), "responses[1]", "expected a string; got 3"),
    "response-roles": (record(responses=["a", [{"role": "user", "content": "b"}]]), "responses[1]", "one assistant"),
    "response-two-messages": (
        record(responses=["a", [{"role": "assistant", "content": "b"}] * 2]),
        "responses[1]",
        "one assistant",
    ),
    "no-pairs": (record(pairs=None), "pairs", "is missing"),
    "zero-pairs": (record(pairs=[]), "pairs", "at least one pair"),
    "pair-not-object": (record(pairs=[[0, 1]]), "pairs[0]", "i, j and preference"),
    "pair-no-preference": (record(pairs=[{"i": 0, "j": 1}]), "pairs[0].preference", "is missing"),
    "pair-extra": (record(pairs=[pair(weight=2)]), "pairs[0].weight", "unknown key"),
    "index-high": (record(pairs=[pair(), pair(j=2)]), "pairs[1].j", "index of the 2 responses; got 2"),
    "index-negative": (record(pairs=[pair(i=-1)]), "pairs[0].i", "got -1"),
    "index-float": (record(pairs=[pair(i=0.0)]), "pairs[0].i", "expected an integer"),
    "index-bool": (record(pairs=[pair(j=True)]), "pairs[0].j", "expected an integer"),
    "self-pair": (record(pairs=[pair(j=0)]), "pairs[0].j", "i = j = 0"),
    "preference-list": (record(pairs=[pair(preference=[1.0])]), "pairs[0].preference", "objective -> number"),
    "preference-high": (record(pairs=[pair(preference={"helpful": 1.01})]), "pairs[0].preference.helpful", "[0, 1]"),
    "preference-low": (record(pairs=[pair(preference={"helpful": -0.5})]), "pairs[0].preference.helpful", "-0.5"),
    "preference-nan": (
        record(pairs=[pair(preference={"helpful": float("nan")})]),
        "pairs[0].preference.helpful",
        "null",
    ),
    "preference-text": (record(pairs=[pair(preference={"helpful": "yes"})]), "pairs[0].preference.helpful", "'yes'"),
    "preference-bool": (record(pairs=[pair(preference={"helpful": True})]), "pairs[0].preference.helpful", "number"),
    "unknown-objective": (record(pairs=[pair(preference={"witty": 1.0})]), "pairs[0].preference.witty", "helpful"),
    "blank-objective": (record(pairs=[pair(preference={"": 1.0})]), "pairs[0].preference", "objective name"),
    "preference-huge": (record(pairs=[pair(preference={"helpful": 10**400})]), "pairs[0].preference.helpful", "number"),
    "half-surrogate": (record(responses=["a", "b\ud83d"]), "responses[1]", "surrogate pair at character 1"),
    "margin-text": (record(pairs=[pair(margin="1")]), "pairs[0].margin", "finite number of nats; got '1'"),
    "margin-nan": (record(pairs=[pair(margin=float("nan"))]), "pairs[0].margin", "finite number of nats"),
    "weight-zero": (record(weight=0), "weight", "positive number"),
    "weight-text": (record(weight="2"), "weight", "positive number"),
    "weight-infinite": (record(weight=float("inf")), "weight", "positive number"),
    "id-number": (record(id=7), "id", "expected a string"),
    "reference-length": (record(ref_logprob=[-1.0]), "ref_logprob", "one number per response (2); got 1"),
    "reference-nan": (record(ref_logprob=[-1.0, float("nan")]), "ref_logprob[1]", "finite"),
    "reference-scalar": (record(ref_logprob=-1.0), "ref_logprob", "list of numbers"),
}


@pytest.mark.parametrize(("row", "field", "problem"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_raises_with_its_field(row: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        PreferenceExample.from_dict(row, objectives=["helpful", "harmless"])
    assert caught.value.field == field
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("limits", "field"),
    [({"max_prompt_chars": 12}, "prompt"), ({"max_response_chars": 10}, "responses[1]")],
    ids=["prompt", "response"],
)
def test_over_long_text_raises(limits: dict[str, int], field: str) -> None:
    with pytest.raises(DataError, match="more than the limit") as caught:
        PreferenceExample.from_dict(record(), **limits)
    assert caught.value.field == field
    PreferenceExample.from_dict(record(), max_prompt_chars=13, max_response_chars=22)


def test_the_length_limit_of_messages_counts_all_of_them() -> None:
    with pytest.raises(DataError, match="13 characters, more than the limit of 12"):
        PreferenceExample.from_dict(record(prompt=CHAT), max_prompt_chars=12)


def test_examples_built_in_code_are_checked_too() -> None:
    with pytest.raises(DataError, match=r"pairs\[0\]\.j: expected an index of the 2 responses; got 5"):
        PreferenceExample("p", ("a", "b"), (PreferencePair(0, 5, {"helpful": 1.0}),))


def test_a_data_error_reads_file_line_field_problem_and_can_be_pickled() -> None:
    error = DataError("is empty", field="responses[1]").at("data.jsonl", 12, {"responses[1]": "rejected"})
    assert str(error) == "data.jsonl:12: rejected: is empty"
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
