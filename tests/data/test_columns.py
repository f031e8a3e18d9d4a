"""Whatever the columns of a row are called: its prompt and its context are used, refused, or named, never dropped."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch

from mopo_kernels.data import (
    DataError,
    PreferenceCollator,
    PreferenceData,
    PreferenceExample,
    load_preferences,
    merge_preferences,
)
from mopo_kernels.data.columns import parse_columns
from mopo_kernels.data.synthetic import byte_tokenizer
from mopo_kernels.data.tokenized import text_digest
from mopo_kernels.evaluation import load_prompts
from mopo_kernels.trainer.setup import as_preference_data


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def only(data: PreferenceData) -> PreferenceExample:
    assert len(data) == 1
    return data[0]


RIGHT, WRONG = "The right letter is (B), neon.", "The right letter is (A), iron."
BLUE, GREEN = turn("assistant", "Blue."), turn("assistant", "Green.")
SYSTEM, ASK, SURE = turn("system", "Be brief."), turn("user", "What colour is the sky?"), turn("user", "Sure?")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def answers(**columns: Any) -> dict[str, Any]:
    return {"chosen": RIGHT, "rejected": WRONG} | columns


def canonical(**columns: Any) -> dict[str, Any]:
    return {"prompt": "p", "responses": ["a", "b"], "pairs": [{"i": 0, "j": 1, "preference": {"k": 1.0}}]} | columns


class TestPrompt:
    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            (answers(question="Which gas?"), "Which gas?"),
            (answers(query="Which gas?"), "Which gas?"),
            (answers(input="Which gas?"), "Which gas?"),
            (answers(instruction="Which gas?", input=""), "Which gas?"),
            (
                answers(instruction="Choose the right letter.", input="Which gas? (A) (B)"),
                "Choose the right letter.\nWhich gas? (A) (B)",
            ),
            (answers(conversations=[{"from": "human", "value": "Which gas?"}]), [turn("user", "Which gas?")]),
            (answers(messages=[ASK]), [ASK]),
            # Intel/orca_dpo_pairs
            (answers(system="Be brief.", question="Which gas?"), [SYSTEM, turn("user", "Which gas?")]),
            (answers(system="", question="Which gas?"), "Which gas?"),
            # argilla/distilabel-intel-orca-dpo-pairs
            (
                answers(
                    system="Be brief.", input="Which gas?", status="tie", generations=["a", "b"], rating=[9.0, 1.0]
                ),
                [SYSTEM, turn("user", "Which gas?")],
            ),
            # LLaMA-Factory's ShareGPT
            (
                {
                    "conversations": [
                        {"from": who, "value": what}
                        for who, what in (("human", "Hi."), ("gpt", "Hello."), ("human", "Sky?"))
                    ],
                    "chosen": {"from": "gpt", "value": "Blue."},
                    "rejected": {"from": "gpt", "value": "Green."},
                },
                [turn("user", "Hi."), turn("assistant", "Hello."), turn("user", "Sky?")],
            ),
            # Axolotl's chatml.argilla
            ({"instruction": "Sky?", "chosen_response": "Blue.", "rejected_response": "Green."}, "Sky?"),
            # what the prompt holds is no other text
            (answers(prompt="Q: Which gas?\nA:", question="Which gas?"), "Q: Which gas?\nA:"),
        ],
    )
    def test_it_is_found_under_the_names_that_other_trainers_use(self, row: dict[str, Any], prompt: Any) -> None:
        assert only(load_preferences([row])).prompt == prompt

    def test_different_questions_are_different_prompts(self) -> None:
        rows = [answers(instruction="Choose the right letter.", input=f"Which gas {index}?") for index in range(4)]
        assert len({str(example.prompt) for example in load_preferences(rows)}) == 4

    def test_a_common_beginning_is_no_prompt_beside_other_text(self) -> None:
        row = answers(problem="Which gas?")
        with pytest.raises(DataError, match=r"may be text in problem: pass columns= \(--columns\) prompt=problem"):
            load_preferences([row])
        for other in ({"problem": ""}, {"problem": None}, {"question": " "}, {"notes": ["x"]}, {"system": "Be brief."}):
            with pytest.raises(DataError, match=f"there may be text in {next(iter(other))}"):
                load_preferences([answers(**other)])
        assert only(load_preferences([answers(source="web", votes=3)])).prompt == "The right letter is"
        assert only(load_preferences([row], columns={"prompt": "problem"})).prompt == "Which gas?"
        assert only(load_preferences([row], columns="prompt=")).prompt == "The right letter is"

    @pytest.mark.parametrize(
        "other",
        [
            {"source_text": "Which gas?"},
            {"model_input": "Which gas?"},
            {"turns": ["Which gas?"]},
            {"question_id": {"text": "Which gas?"}},
        ],
        ids=lambda other: str(*other),
    )
    def test_a_text_is_one_whatever_its_column_is_called(self, other: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=f"there may be text in {next(iter(other))}"):
            load_preferences([answers(**other)])

    def test_a_null_prompt_is_not_the_common_beginning(self) -> None:
        with pytest.raises(DataError, match="rows:2: prompt: is null, and the answers share no beginning"):
            load_preferences([answers(prompt="Which gas?"), answers(prompt=None)])

    @pytest.mark.parametrize(
        "marker",
        [
            "\n\nAssistant:",
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            " [/INST]",
            "<end_of_turn>\n<start_of_turn>model\n",
            "</s>\n<|assistant|>\n",
            "\n### Response:\n",
            " ASSISTANT:",
        ],
    )
    def test_a_turn_marker_ends_the_common_prompt(self, marker: str) -> None:
        start = f"Which gas?{marker}"
        row = {"chosen": f"{start}It is neon.", "rejected": f"{start}It is iron.", "topic": "Gases are fun."}
        example = only(load_preferences([row]))
        assert (example.prompt, example.responses) == (start, ("It is neon.", "It is iron."))

    def test_a_turn_marker_with_nothing_before_it_ends_no_prompt(self) -> None:
        row = {"chosen": "<|assistant|>\nIt is neon.", "rejected": "<|assistant|>\nIt is iron.", "topic": "Which gas?"}
        with pytest.raises(DataError, match="rejected: shares no beginning with chosen"):
            load_preferences([row])

    @pytest.mark.parametrize("marker", ["\nA:", "\nAnswer:", "\n\nTL;DR:"])
    def test_a_word_that_answers_have_too_ends_it_only_without_other_text(self, marker: str) -> None:
        start = f"Which gas?{marker}"
        row = {"chosen": f"{start} It is neon.", "rejected": f"{start} It is iron."}
        example = only(load_preferences([row]))
        assert (example.prompt, example.responses) == (start, (" It is neon.", " It is iron."))
        with pytest.raises(DataError, match="there may be text in topic"):
            load_preferences([row | {"topic": "Gases are fun."}])

    def test_transcripts_that_differ_before_their_last_turn_are_refused(self) -> None:
        start = "Hi.\nA: Hello.\nSky"
        row = {"chosen": f"{start}?\nA: Blue.", "rejected": f"{start}, please?\nA: Green."}
        with pytest.raises(DataError, match="chosen: the answers differ before their last assistant turn"):
            load_preferences([row])

    @pytest.mark.parametrize(
        ("row", "field", "problem"),
        [
            (
                answers(question="Which gas?", query="What?"),
                "question",
                "one column with the prompt; got question, query",
            ),
            (
                answers(prompt="Choose.", input="Which gas?"),
                "input",
                "prompt=prompt+input, or prompt=prompt to leave it",
            ),
            (answers(instruction="Choose.", input=["a"]), "input", "expected a string; got ['a']"),
            (
                answers(conversations=[{"from": "robot", "value": "x"}]),
                "conversations[0].from",
                "expected one of human",
            ),
            (answers(question=7), "question", "expected a string; got 7"),
            (answers(conversations=[{"from": "human", "value": ""}]), "conversations[0].content", "is empty"),
        ],
    )
    def test_what_could_be_several_things_is_refused(self, row: dict[str, Any], field: str, problem: str) -> None:
        with pytest.raises(DataError) as caught:
            load_preferences([row])
        assert caught.value.field == field
        assert problem in caught.value.problem
        data = load_preferences([row, answers(prompt="p")], on_error="skip")
        assert (len(data), len(data.skipped)) == (1, 1)

    @pytest.mark.parametrize(
        ("columns", "prompt"), [("prompt=prompt+input", "Choose.\nWhich gas?"), ("prompt=prompt", "Choose.")]
    )
    def test_a_second_text_is_joined_or_left_out_on_request(self, columns: str, prompt: str) -> None:
        assert only(load_preferences([answers(prompt="Choose.", input="Which gas?")], columns=columns)).prompt == prompt

    def test_a_question_in_a_canonical_row_is_its_prompt(self) -> None:
        row = canonical(question="Which gas?")
        del row["prompt"]
        assert only(load_preferences([row])).prompt == "Which gas?"


class TestTextOfMessages:
    """An export to a table may leave the text of a list in its place: no one asks or answers that."""

    @pytest.mark.parametrize(
        "text", [json.dumps([ASK]), str([ASK]), f" {json.dumps([{'from': 'human', 'value': 'x'}])}\n"]
    )
    def test_it_is_refused(self, text: str) -> None:
        for row in (answers(prompt=text), canonical(prompt=text), answers(question=text)):
            with pytest.raises(
                DataError, match=r"rows:1: (prompt|question): expected text or messages; got the text of"
            ):
                load_preferences([row])
        with pytest.raises(DataError, match="rows:1: rejected: expected text or messages; got the text of"):
            load_preferences([answers(prompt="p", rejected=text)])

    @pytest.mark.parametrize(
        "text", [f"What does {json.dumps([ASK])} mean?", '[{"name": "x"}]', "[{x}]", "[{'name': 1}]"]
    )
    def test_other_text_is_text(self, text: str) -> None:
        assert only(load_preferences([canonical(prompt=text)])).prompt == text


class TestMapping:
    @pytest.mark.parametrize(
        "columns", [{"prompt": "q", "chosen": "good"}, "prompt=q,chosen=good", '{"prompt": "q", "chosen": "good"}']
    )
    def test_any_column_can_be_mapped(self, columns: Any) -> None:
        rows = [{"q": "Sky?", "good": "Blue.", "rejected": "Green."}]
        assert only(load_preferences(rows, columns=columns)).responses == ("Blue.", "Green.")

    def test_errors_name_the_rows_own_column(self) -> None:
        rows = [{"q": "Sky?", "good": "", "rejected": "Green."}]
        with pytest.raises(DataError, match="rows:1: good: is empty"):
            load_preferences(rows, columns="prompt=q,chosen=good")
        with pytest.raises(DataError, match="rows:2: q: is null, and the answers share no beginning"):
            load_preferences([answers(q="p"), answers(q=None)], columns="prompt=q")

    def test_a_format_with_columns_of_its_own_is_mapped_too(self) -> None:
        row = {"q": "Sky?", "response_0": "Blue.", "response_1": "Green.", "better": 0}
        data = load_preferences([row], columns="prompt=q,better_response_id=better")
        assert only(data).pairs[0].preference == {"helpful": 1.0}

    def test_a_column_that_no_row_has_is_refused(self) -> None:
        with pytest.raises(ValueError, match="columns: expected names of columns; got persona, in no row"):
            load_preferences([answers(prompt="p")], columns={"system": "persona"})

    def test_a_name_that_nothing_would_read_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"columns: expected names out of chosen, prompt, .*; got sytem"):
            load_preferences([answers(prompt="p", persona="Be brief.")], columns={"sytem": "persona"})

    @pytest.mark.parametrize("value", ["prompt", {"prompt": 3}, ["prompt"], "prompt=a,prompt=b", "{broken"])
    def test_what_is_no_mapping_is_refused(self, value: Any) -> None:
        with pytest.raises(ValueError, match="columns: "):
            parse_columns(value)


class TestContext:
    @pytest.mark.parametrize(
        "row",
        [
            canonical(),
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0},
        ],
        ids=["canonical", "trl", "pku-saferlhf"],
    )
    def test_system_and_history_come_before_the_prompt(self, row: dict[str, Any]) -> None:
        expected = [SYSTEM, turn("user", "Hi."), turn("assistant", "Hello."), turn("user", "p")]
        for history in ([["Hi.", "Hello."]], [turn("user", "Hi."), turn("assistant", "Hello.")]):
            assert only(load_preferences([row | {"system": "Be brief.", "history": history}])).prompt == expected

    def test_they_are_not_put_there_twice(self) -> None:
        history = [turn("user", "Hi."), turn("assistant", "Hello.")]
        row = canonical(prompt=[SYSTEM, *history, ASK], system="Be brief.", history=history)
        assert only(load_preferences([row])).prompt == [SYSTEM, *history, ASK]

    def test_rated_responses_are_grouped_by_prompt_and_context(self) -> None:
        rows = [
            {"prompt": "p", "response": response, "helpfulness": rating, "system": system}
            for system in ("Be brief.", "Be long.")
            for response, rating in (("a", 1), ("b", 2))
        ]
        assert [example.prompt for example in load_preferences(rows)] == [
            [turn("system", system), turn("user", "p")] for system in ("Be brief.", "Be long.")
        ]

    @pytest.mark.parametrize("form", [[TOOL], json.dumps([TOOL])])
    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_tools_and_variables_are_kept_on_the_way_to_disk_and_back(
        self, tmp_path: Path, form: Any, suffix: str
    ) -> None:
        rows = [
            canonical(tools=form, chat_template_kwargs={"enable_thinking": False}),
            canonical(prompt="q", tools=None),
        ]
        load_preferences(rows).save(tmp_path / f"data{suffix}")
        first, second = load_preferences(tmp_path / f"data{suffix}")
        assert (first.tools, first.chat_template_kwargs) == ([TOOL], {"enable_thinking": False})
        assert (second.tools, second.chat_template_kwargs) == (None, None)

    def test_calls_of_tools_are_kept_on_the_way_to_disk_and_back(self, tmp_path: Path) -> None:
        call = {"type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = turn("tool", "blue") | {"name": "look", "tool_call_id": "1"}
        load_preferences([canonical(prompt=[ASK, calling, result]), canonical(prompt="q")]).save(tmp_path / "d.parquet")
        assert [example.prompt for example in load_preferences(tmp_path / "d.parquet")] == [
            [ASK, calling, result],
            "q",
        ]

    def test_calls_in_share_gpt_become_calls_of_tools(self) -> None:
        call = {"name": "look", "arguments": {"where": "up"}}
        talk = [("human", "Sky?"), ("function_call", json.dumps(call)), ("observation", "blue")]
        row = {"conversations": [{"from": who, "value": what} for who, what in talk], "tools": json.dumps([TOOL])}
        example = only(load_preferences([row | {"chosen": "Blue.", "rejected": "Green."}]))
        assert example.prompt == [
            turn("user", "Sky?"),
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            turn("tool", "blue"),
        ]
        assert example.tools == [TOOL]

    def test_prompts_that_differ_in_their_tools_are_not_joined(self) -> None:
        parts = [load_preferences([canonical()]), load_preferences([canonical(tools=[TOOL])])]
        assert len(merge_preferences(parts)) == 2
        assert len(merge_preferences([parts[1], parts[1]])) == 1
        assert text_digest(parts[0]) != text_digest(parts[1])

    @pytest.mark.parametrize(
        ("context", "field", "problem"),
        [
            ({"images": ["a.png"]}, "images", "only text is read"),
            ({"image": {"bytes": b"x"}}, "image", "only text is read"),
            ({"system": 3}, "system", "expected a string; got 3"),
            ({"history": "Hi."}, "history", "expected a list of turns; got 'Hi.'"),
            ({"history": [["Hi."]]}, "history[0]", "expected a message, or a question and its answer"),
            ({"history": [["Hi.", ""]]}, "history[0][1]", "is empty"),
            ({"tools": "{"}, "tools", "expected JSON"),
            ({"tools": ["look"]}, "tools", "expected a list of objects"),
            ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "expected an object"),
            ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "got tokenize"),
            ({"system": "Be brief.", "prompt": [turn("system", "Be long."), ASK]}, "system", "got two that differ"),
            ({"prompt": [turn("user", "a"), turn("assistant", ""), ASK]}, "prompt[1].content", "is empty"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("form", ["canonical", "trl"])
    def test_what_cannot_be_used_is_refused(self, form: str, context: dict[str, Any], field: str, problem: str) -> None:
        row = canonical() if form == "canonical" else {"prompt": "p", "chosen": "a", "rejected": "b"}
        with pytest.raises(DataError) as caught:
            load_preferences([row | context])
        assert caught.value.field == field
        assert problem in caught.value.problem

    @pytest.mark.parametrize("nothing", [None, "", [], {}])
    def test_columns_with_nothing_in_them_change_nothing(self, nothing: Any) -> None:
        context = dict.fromkeys(("system", "history", "tools", "images", "chat_template_kwargs"), nothing)
        assert only(load_preferences([canonical(**context)])) == only(load_preferences([canonical()]))

    def test_parts_of_text_are_joined(self) -> None:
        parts = [{"type": "text", "text": "What colour "}, {"type": "text", "text": "is the sky?"}]
        assert only(load_preferences([canonical(prompt=[{"role": "user", "content": parts}])])).prompt == [ASK]

    def test_prompts_for_sampling_have_their_context_too(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"prompt": "p", "system": "Be brief."}), encoding="utf-8")
        assert load_prompts(path) == [[SYSTEM, turn("user", "p")]]
        path.write_text(json.dumps({"prompt": "p", "tools": [TOOL]}), encoding="utf-8")
        with pytest.raises(ValueError, match="1: tools: expected none, as sampling does not use it"):
            load_prompts(path)


class TestContextOfTranscripts:
    """Text whose turns are written out has room for no message: the context is in it already, or refused."""

    @pytest.mark.parametrize(
        "prompt",
        [
            "Be brief.\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant:",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello."
            "<|im_end|>\n<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n",
        ],
        ids=["words", "template"],
    )
    def test_it_is_there_or_refused(self, prompt: str) -> None:
        context = {"system": "Be brief.", "history": [["Hi.", "Hello."]]}
        assert only(load_preferences([canonical(prompt=prompt, **context)])).prompt == prompt
        assert only(load_preferences([answers(prompt=prompt, system="Be brief.")], columns="system=")).prompt == prompt
        for name, other in (("system", "Be long."), ("history", [["Hi.", "Bye."]])):
            with pytest.raises(DataError, match=f"rows:1: {name}: expected none beside a prompt whose turns"):
                load_preferences([canonical(prompt=prompt, **{**context, name: other})])

    def test_so_with_transcripts_of_hh_rlhf(self) -> None:
        row = {name: f"\n\nHuman: Sky?\n\nAssistant: {name}" for name in ("chosen", "rejected")}
        row["system"] = "Be brief."
        assert only(load_preferences([row], objective="k")).prompt == [SYSTEM, turn("user", "Sky?")]
        with pytest.raises(DataError, match="rows:1: system: expected none beside a prompt whose turns"):
            load_preferences([row], objective="k", conversational=False)

    def test_a_prompt_that_a_transcript_does_not_hold_is_refused(self, caplog: pytest.LogCaptureFixture) -> None:
        row = {name: f"\n\nHuman: Sky?\n\nAssistant: {name}" for name in ("chosen", "rejected")}
        with pytest.raises(DataError, match="rows:1: prompt: expected what both transcripts hold"):
            load_preferences([row | {"prompt": "Be brief."}], objective="k")
        for prompt in ("Sky?", "\n\nHuman: Sky?\n\nAssistant:", ""):
            assert only(load_preferences([row | {"prompt": prompt}], objective="k")).prompt == [turn("user", "Sky?")]
        assert not caplog.records


class TestMedia:
    @pytest.mark.parametrize("name", ["images", "Image", "image_url", "image_path", "prompt_image", "audio_file"])
    def test_what_no_text_model_reads_is_refused(self, name: str) -> None:
        for row in (canonical(), answers(prompt="p")):
            with pytest.raises(DataError, match=f"rows:1: {name}: expected none, as only text is read"):
                load_preferences([row | {name: "sky.png"}])
            assert len(load_preferences([row | {name: None}])) == 1


class TestTemplate:
    TEMPLATE = (
        "{% if tools %}[{{ tools | length }} tools]{% endif %}{% if quick %}[quick]{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}!{{ m.tool_calls[0].function.name }}"
        "{% endif %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )

    def prompt(self, example: PreferenceExample, template: str | None) -> str:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        (item,) = PreferenceCollator(tokenizer, ["k"]).tokenize([example])
        return str(tokenizer.decode(item.prompt))

    def test_it_is_given_tools_and_variables_of_the_row(self) -> None:
        rows = [
            canonical(tools=[TOOL], chat_template_kwargs={"quick": True}, system="Be brief."),
            canonical(prompt="q"),
        ]
        texts = [self.prompt(example, self.TEMPLATE) for example in load_preferences(rows)]
        assert texts == ["[1 tools][quick]system:Be brief.;user:p;assistant:", "user:q;assistant:"]

    @pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }}{% endfor %}", None])
    @pytest.mark.parametrize(
        ("context", "field"),
        [({"tools": [TOOL]}, "tools"), ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x")],
    )
    def test_one_that_does_not_use_them_is_an_error(
        self, template: str | None, context: dict[str, Any], field: str
    ) -> None:
        with pytest.raises(DataError, match=r"example 'p': expected none, as (the|no) chat template") as caught:
            self.prompt(only(load_preferences([canonical(**context)])), template)
        assert caught.value.field == field


class TestExplicitPrompt:
    @pytest.mark.parametrize(
        ("prompt", "start", "expected"),
        [
            ([SYSTEM, ASK], [ASK], [SYSTEM, ASK]),
            ([ASK, BLUE, SURE], [SURE], [ASK, BLUE, SURE]),
            ([ASK, BLUE, SURE], [ASK, BLUE, SURE], [ASK, BLUE, SURE]),
            ([ASK], [SYSTEM, ASK], [SYSTEM, ASK]),
            ([SYSTEM], [ASK], [SYSTEM, ASK]),
            ([ASK, BLUE], [SURE], [ASK, BLUE, SURE]),
            ("Sure?", [ASK, BLUE, SURE], [ASK, BLUE, SURE]),
        ],
        ids=["system", "last-turn", "whole", "less-than-whole", "system-alone", "next-turn", "question"],
    )
    def test_answers_that_begin_with_a_user_turn_do_not_hide_it(self, prompt: Any, start: Any, expected: Any) -> None:
        row = {"prompt": prompt, "chosen": [*start, BLUE], "rejected": [*start, GREEN]}
        example = only(load_preferences([row]))
        assert (example.prompt, example.responses) == (expected, ("Blue.", "Green."))

    @pytest.mark.parametrize("prompt", [[ASK], "A long text. What colour is the sky? Sure?"])
    def test_a_prompt_that_the_answers_contradict_is_refused(self, prompt: Any) -> None:
        row = {"prompt": prompt, "chosen": [SURE, BLUE], "rejected": [SURE, GREEN]}
        with pytest.raises(DataError, match="prompt: is neither what the answers begin with nor"):
            load_preferences([row])
        assert only(load_preferences([row], columns="prompt=")).prompt == [SURE]


class TestUnused:
    def test_they_are_counted_and_named_once(self, caplog: pytest.LogCaptureFixture) -> None:
        rows = [answers(prompt="p", notes="x" if index else "", rationale="y", weight=2) for index in range(3)]
        load_preferences(rows)
        assert [record.getMessage() for record in caplog.records] == [
            "rows: columns that are not used (rows that have them): notes (2), rationale (3), weight (3)"
        ]
        assert caplog.records[0].levelno == logging.WARNING

    def test_scores_ids_models_and_copies_are_silent(self, caplog: pytest.LogCaptureFixture) -> None:
        talk = [ASK, BLUE]
        row = {"prompt": ASK["content"], "chosen": talk, "rejected": [ASK, GREEN], "messages": talk}
        silent = {
            **{"prompt_id": "x", "score_chosen": 8.0, "chosen-rating": 5, "chosen_model": "m", "source": "web"},
            **{"dataset": "d", "lang": "en", "rejected_avg_rating": 2.0, "timestamp": "now"},
        }
        load_preferences([row | silent])
        assert not caplog.records

    def test_a_text_is_no_score_or_source_whatever_its_column_is_called(self, caplog: pytest.LogCaptureFixture) -> None:
        load_preferences([answers(prompt="p", source="It was a dark night, and the gas lamps were out.")])
        assert "source (1)" in caplog.text

    def test_a_column_that_a_mapping_hides_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        assert only(load_preferences([answers(prompt="old", q="new")], columns="prompt=q")).prompt == "new"
        assert "prompt (1)" in caplog.text


ROWS: list[dict[str, Any]] = [
    {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]},
    {"prompt": [SURE], "chosen": [BLUE], "rejected": [GREEN]},
]


class TestForms:
    @pytest.mark.parametrize(
        "source",
        [
            ROWS,
            tuple(ROWS),
            datasets.Dataset.from_list(ROWS),
            datasets.Dataset.from_list(ROWS).with_format("numpy"),
            pandas.DataFrame(ROWS),
            list(load_preferences(ROWS)),
        ],
        ids=["list", "tuple", "dataset", "formatted", "pandas", "examples"],
    )
    def test_all_give_the_same_examples_to_the_loader_and_to_a_trainer(self, source: Any) -> None:
        expected = list(load_preferences(ROWS))
        assert list(load_preferences(source)) == expected
        assert list(as_preference_data(source, "train_dataset")) == expected

    def test_a_frame_from_a_file_and_one_with_missing_values(self, tmp_path: Path) -> None:
        rows = [canonical(system="Be brief."), canonical(prompt="q", system=None)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
        expected = list(load_preferences(rows))
        assert list(load_preferences(pandas.read_parquet(tmp_path / "d.parquet"))) == expected
        frame = pandas.DataFrame([answers(prompt="p", system=float("nan")), answers(prompt="q", system="Be brief.")])
        first, second = load_preferences(frame)
        assert (first.prompt, second.prompt) == ("p", [SYSTEM, turn("user", "q")])

    def test_a_dict_by_objective_is_merged_for_a_trainer(self) -> None:
        parts: Mapping[str, Any] = {"kind": ROWS, "brief": datasets.Dataset.from_list(ROWS)}
        assert as_preference_data(parts, "train_dataset").objectives == ("kind", "brief")

    @pytest.mark.parametrize("wrong", [7, "file.jsonl", torch.ones(2).sum])
    def test_a_trainer_names_what_it_takes(self, wrong: Any) -> None:
        with pytest.raises(
            ValueError, match=r"eval_dataset: expected PreferenceData, a datasets\.Dataset, a pandas frame"
        ):
            as_preference_data(wrong, "eval_dataset")


class TestStreams:
    @staticmethod
    def endless() -> Any:
        while True:
            yield canonical()

    @pytest.mark.parametrize("kind", ["generator", "stream"])
    def test_they_are_refused_or_bounded(self, kind: str) -> None:
        def source() -> Any:
            return self.endless() if kind == "generator" else datasets.IterableDataset.from_generator(self.endless)

        with pytest.raises(ValueError, match="max_rows: expected a number of rows to read"):
            load_preferences(source())
        with pytest.raises(ValueError, match="train_dataset: max_rows: expected a number of rows"):
            as_preference_data(source(), "train_dataset")
        assert len(load_preferences(source(), max_rows=5)) == 5

    def test_not_one_row_more_is_read(self) -> None:
        rows = iter([canonical(), {"bad": "row"}, canonical()])
        data = load_preferences(rows, max_rows=2, on_error="skip")
        assert (len(data), len(data.skipped), len(list(rows))) == (1, 1, 1)

    def test_a_bound_is_positive(self) -> None:
        with pytest.raises(ValueError, match="max_rows: expected a positive number of rows; got 0"):
            load_preferences([canonical()], max_rows=0)
