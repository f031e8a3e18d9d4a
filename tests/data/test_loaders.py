"""Every loader, on rows in its data set's own schema; rows left out are counted and located."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from mopo_kernels.data import DataError, PreferenceData, PreferenceExample, load_preferences, merge_preferences


def write(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def canonical(prompt: Any = "p", responses: Sequence[Any] = ("a", "b"), **preference: float | None) -> dict[str, Any]:
    labels = preference or {"helpful": 1.0}
    return {"prompt": prompt, "responses": list(responses), "pairs": [{"i": 0, "j": 1, "preference": labels}]}


def safe_rlhf(**changes: Any) -> dict[str, Any]:
    """A row with all columns of PKU-Alignment/PKU-SafeRLHF."""
    harm = {"Animal Abuse": False, "Violence": False}
    row = {
        "prompt": "How do I get into a locked car?",
        "prompt_source": "Beavertails",
        "response_0_source": "Alpaca3-8B",
        "response_1_source": "Alpaca-7B",
        "response_0": "Smash a window.",
        "response_1": "Call a locksmith.",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "response_0_harm_category": harm | {"Violence": True},
        "response_1_harm_category": harm,
        "response_0_severity_level": 2,
        "response_1_severity_level": 0,
        "better_response_id": 0,
        "safer_response_id": 1,
        "response_0_sha256": "aa",
        "response_1_sha256": "bb",
    }
    return row | changes


def help_steer(prompt: str, response: str, *ratings: int | None, **changes: Any) -> dict[str, Any]:
    """A row of nvidia/HelpSteer or nvidia/HelpSteer2; ratings in the order of the columns."""
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response} | dict(zip(names, ratings, strict=True)) | changes


def ultra_feedback(*ratings: tuple[Any, Any, Any, Any], texts: Sequence[str] | None = None) -> dict[str, Any]:
    """A row of openbmb/UltraFeedback, one 4-tuple of ratings a completion."""
    completions = []
    for index, (following, honesty, truth, helpful) in enumerate(ratings):
        types = {"Type": ["1"], "Rationale": "x", "Rationale For Rating": "y"}
        completions.append(
            {
                "model": f"model-{index}",
                "principle": "helpfulness",
                "custom_system_prompt": "Be helpful.",
                "response": f"answer {index}" if texts is None else texts[index],
                "annotations": {
                    "instruction_following": {"Rating": following, "Rationale": "x"},
                    "honesty": {"Rating": honesty, "Rationale": "x"},
                    "truthfulness": types | {"Rating": truth},
                    "helpfulness": types | {"Rating": helpful},
                },
                "fine-grained_score": 3.5,
                "overall_score": 7.0,
                "critique": "fine",
            }
        )
    return {
        "source": "sharegpt",
        "instruction": "Plan a trip.",
        "models": [item["model"] for item in completions],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        "completions": completions,
    }


def summaries(choice: Any = 1, **info: str | None) -> dict[str, Any]:
    """A row of openai/summarize_from_feedback, ``comparisons``."""
    about = {"id": "t3_x", "post": "A long post.", "title": "Help", "subreddit": "dogs", "site": None, "article": None}
    return {
        "info": about | info,
        "summaries": [{"text": f" {text}.", "policy": "sup4", "note": None} for text in ("One", "Two")],
        "choice": choice,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    }


HH_START = "\n\nHuman: What is tea?\n\nAssistant: A drink.\n\nHuman: And coffee?\n\nAssistant:"


def hh(chosen: str = " Also a drink.", rejected: str = " A colour.", start: str = HH_START) -> dict[str, str]:
    """A row of Anthropic/hh-rlhf."""
    return {"chosen": start + chosen, "rejected": start + rejected}


def only(data: PreferenceData) -> PreferenceExample:
    assert len(data) == 1
    return data[0]


def labels(example: PreferenceExample) -> dict[tuple[int, int], dict[str, float | None]]:
    return {(pair.i, pair.j): pair.preference for pair in example.pairs}


class TestSafeRLHF:
    def test_better_is_helpful_and_safer_is_harmless(self) -> None:
        data = load_preferences([safe_rlhf()])
        example = only(data)
        assert data.objectives == ("helpful", "harmless")
        assert example.prompt == "How do I get into a locked car?"
        assert example.responses == ("Smash a window.", "Call a locksmith.")
        assert labels(example) == {(0, 1): {"helpful": 1.0, "harmless": 0.0}}

    def test_the_single_dimension_set_gives_helpful_only(self) -> None:
        row = {key: value for key, value in safe_rlhf().items() if key != "safer_response_id"}
        data = load_preferences([row])
        assert data.objectives == ("helpful",)
        assert labels(only(data)) == {(0, 1): {"helpful": 1.0}}

    @pytest.mark.parametrize("missing", [-1, None])
    def test_an_undecided_id_is_unlabelled(self, missing: int | None) -> None:
        data = load_preferences([safe_rlhf(safer_response_id=missing), safe_rlhf()])
        assert labels(data[0]) == {(0, 1): {"helpful": 1.0, "harmless": None}}

    def test_objectives_select_and_order(self) -> None:
        assert labels(only(load_preferences([safe_rlhf()], objectives=["harmless"]))) == {(0, 1): {"harmless": 0.0}}
        assert load_preferences([safe_rlhf()], objectives=["harmless", "helpful"]).objectives == ("harmless", "helpful")

    @pytest.mark.parametrize(
        ("changes", "field", "problem"),
        [
            ({"better_response_id": 2}, "better_response_id", "expected 0, 1"),
            ({"safer_response_id": True}, "safer_response_id", "got True"),
            ({"better_response_id": None, "safer_response_id": -1}, "better_response_id", "no objective"),
            ({"response_0": ""}, "response_0", "is empty"),
            ({"response_1": None}, "response_1", "expected a string"),
            ({"response_1": "Smash a window."}, "response_1", "same text as response_0"),
            ({"prompt": " "}, "prompt", "is empty"),
        ],
    )
    def test_bad_rows_name_the_rows_own_column(self, changes: dict[str, Any], field: str, problem: str) -> None:
        with pytest.raises(DataError, match=problem) as caught:
            load_preferences([safe_rlhf(), safe_rlhf(**changes)])
        assert (caught.value.field, caught.value.line) == (field, 2)

    def test_a_limit_names_the_rows_own_column(self) -> None:
        with pytest.raises(DataError, match="rows:1: response_1: has 17 characters"):
            load_preferences([safe_rlhf()], max_response_chars=16)


class TestHelpSteer:
    def test_every_pair_of_a_prompt_is_made_and_equal_ratings_tie(self) -> None:
        rows = [
            help_steer("p", "one", 4, 3, 4, 2, 1),
            help_steer("q", "other", 1, 1, 1, 1, 1),
            help_steer("p", "two", 2, 3, 4, 2, 3),
            help_steer("p", "three", 4, 4, 4, 1, 0),
            help_steer("q", "else", 2, 1, 1, 1, 1),
        ]
        data = load_preferences(rows)
        assert data.objectives == ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
        assert [example.prompt for example in data] == ["p", "q"]
        got = {pair: tuple(values.values()) for pair, values in labels(data[0]).items()}
        assert got == {
            (0, 1): (1.0, 0.5, 0.5, 0.5, 0.0),
            (0, 2): (0.5, 0.0, 0.5, 1.0, 1.0),
            (1, 2): (0.0, 0.0, 0.5, 1.0, 1.0),
        }

    def test_a_negative_sign_turns_the_attribute_round_and_leaves_ties(self) -> None:
        rows = [help_steer("p", "one", 4, 3, 4, 2, 1), help_steer("p", "two", 2, 3, 4, 2, 3)]
        data = load_preferences(rows, objectives=["helpfulness", "verbosity", "coherence"], signs={"verbosity": -1})
        assert labels(only(data)) == {(0, 1): {"helpfulness": 1.0, "verbosity": 1.0, "coherence": 0.5}}

    def test_equal_texts_tie_whatever_their_ratings(self) -> None:
        rows = [help_steer("p", "same", 4, 3, 4, 2, 1), help_steer("p", "same", 0, 0, 0, 0, 0)]
        assert set(only(load_preferences(rows)).pairs[0].preference.values()) == {0.5}

    def test_a_missing_rating_is_unlabelled(self) -> None:
        rows = [help_steer("p", "one", None, 3, 4, 2, 1), help_steer("p", "two", 4, 2, 4, 2, 1)]
        preference = only(load_preferences(rows, objectives=["helpfulness", "correctness"])).pairs[0].preference
        assert preference == {"helpfulness": None, "correctness": 1.0}

    def test_an_attribute_that_nobody_rated_is_no_objective(self) -> None:
        rows = [help_steer("p", "one", None, 3, 4, 2, 1), help_steer("p", "two", None, 2, 4, 2, 1)]
        assert load_preferences(rows).objectives == ("correctness", "coherence", "complexity", "verbosity")

    def test_dialogues_of_helpsteer2_become_messages(self) -> None:
        prompt = "Hi.\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nTell me\nmore."
        rows = [help_steer(prompt, "one", 4, 3, 4, 2, 1), help_steer(prompt, "two", 2, 3, 4, 2, 1)]
        assert only(load_preferences(rows)).prompt == [
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Tell me\nmore."},
        ]

    def test_a_bad_row_costs_only_itself_and_a_lone_response_is_listed(self) -> None:
        rows = [
            help_steer("p", "one", 4, 3, 4, 2, 1),
            help_steer("p", "", 4, 3, 4, 2, 1),
            help_steer("p", "two", 2, 3, 4, 2, 1),
            help_steer("p", "three", 5, 3, 4, 2, 1),
            help_steer("p", "much too long for this", 1, 1, 1, 1, 1),
            help_steer("alone", "one", 4, 3, 4, 2, 1),
        ]
        data = load_preferences(rows, on_error="skip", max_response_chars=10)
        assert only(data).responses == ("one", "two")
        assert [(error.line, error.field) for error in data.skipped] == [
            (2, "response"),
            (4, "helpfulness"),
            (5, "response"),
            (6, "response"),
        ]
        assert "no pair can be made" in data.skipped[-1].problem

    @pytest.mark.parametrize(
        ("options", "problem"),
        [({"signs": {"wit": -1}}, "signs: .*wit"), ({"signs": {"verbosity": 0}}, r"signs: expected \+1 or -1")],
    )
    def test_wrong_signs_raise(self, options: dict[str, Any], problem: str) -> None:
        rows = [help_steer("p", "one", 4, 3, 4, 2, 1), help_steer("p", "two", 2, 3, 4, 2, 3)]
        with pytest.raises(ValueError, match=problem):
            load_preferences(rows, on_error="skip", **options)


class TestUltraFeedback:
    def test_ratings_become_pairs_and_not_applicable_becomes_unlabelled(self) -> None:
        data = load_preferences([ultra_feedback(("2", "3", "3", "N/A"), ("4", "N/A", "3", "5"), ("4", "1", "1", "2"))])
        assert data.objectives == ("instruction_following", "honesty", "truthfulness", "helpfulness")
        example = only(data)
        assert example.prompt == "Plan a trip."
        assert example.responses == ("answer 0", "answer 1", "answer 2")
        assert {pair: tuple(values.values()) for pair, values in labels(example).items()} == {
            (0, 1): (0.0, None, 0.5, None),
            (0, 2): (0.0, 1.0, 1.0, None),
            (1, 2): (0.5, None, 1.0, 1.0),
        }

    def test_a_pair_without_any_label_is_not_made(self) -> None:
        row = ultra_feedback(("N/A",) * 4, ("4", "4", "4", "4"), ("1", "1", "1", "1"))
        assert list(labels(only(load_preferences([row])))) == [(1, 2)]

    def test_equal_texts_tie(self) -> None:
        row = ultra_feedback(("5",) * 4, ("1",) * 4, texts=["same", "same"])
        assert set(only(load_preferences([row])).pairs[0].preference.values()) == {0.5}

    def test_a_missing_aspect_is_unlabelled_and_numbers_are_read(self) -> None:
        row = ultra_feedback((5, "3", "3", "3"), (4.0, "3", "3", "3"))
        del row["completions"][1]["annotations"]["honesty"]
        preference = only(load_preferences([row], objectives=["honesty", "instruction_following"])).pairs[0].preference
        assert preference == {"honesty": None, "instruction_following": 1.0}

    @pytest.mark.parametrize(
        ("row", "field"),
        [
            (
                ultra_feedback(("7", "3", "3", "3"), ("1",) * 4),
                "completions[0].annotations.instruction_following.Rating",
            ),
            (ultra_feedback(("1",) * 4, ("1", "good", "1", "1")), "completions[1].annotations.honesty.Rating"),
            (ultra_feedback(("1",) * 4, ("1",) * 4, texts=["a", " "]), "completions[1].response"),
            (ultra_feedback(("1",) * 4), "completions"),
            (ultra_feedback(("N/A",) * 4, ("N/A",) * 4), "completions"),
            (ultra_feedback(("1",) * 4, ("1",) * 4) | {"instruction": ""}, "instruction"),
            (ultra_feedback(("1",) * 4, ("1",) * 4) | {"completions": None}, "completions"),
        ],
    )
    def test_bad_rows_name_the_path_inside_the_row(self, row: dict[str, Any], field: str) -> None:
        with pytest.raises(DataError) as caught:
            load_preferences([row])
        assert caught.value.field == field


class TestHHRLHF:
    def test_the_turns_become_messages_and_the_last_one_the_responses(self) -> None:
        data = load_preferences([hh()], objective="helpful")
        example = only(data)
        assert data.objectives == ("helpful",)
        assert example.prompt == [
            {"role": "user", "content": "What is tea?"},
            {"role": "assistant", "content": "A drink."},
            {"role": "user", "content": "And coffee?"},
        ]
        assert example.responses == ("Also a drink.", "A colour.")
        assert labels(example) == {(0, 1): {"helpful": 1.0}}

    def test_responses_that_begin_alike_keep_their_whole_text(self) -> None:
        example = only(load_preferences([hh(" It is hot.", " It is blue.")], objective="helpful"))
        assert example.responses == ("It is hot.", "It is blue.")

    def test_the_transcript_can_stay_a_string(self) -> None:
        example = only(load_preferences([hh()], objective="helpful", conversational=False))
        assert example.prompt == HH_START
        assert example.responses == (" Also a drink.", " A colour.")

    def test_two_turns_in_a_row_of_one_speaker_are_joined(self) -> None:
        start = "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant:"
        prompt = only(load_preferences([hh(start=start)], objective="helpful")).prompt
        assert prompt == [{"role": "user", "content": "One.\n\nTwo."}]

    @pytest.mark.parametrize("subset", ["helpful-base", "helpful-rejection-sampled", "harmless-base"])
    def test_the_subset_names_the_objective(self, tmp_path: Path, subset: str) -> None:
        folder = tmp_path / "hh-rlhf" / subset
        folder.mkdir(parents=True)
        with gzip.open(folder / "train.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps(hh()) + "\n")
        data = load_preferences(tmp_path / "hh-rlhf", data_dir=subset, split="train")
        assert data.objectives == (subset.split("-")[0],)
        assert load_preferences(folder).objectives == data.objectives

    def test_an_objective_that_nothing_names_is_asked_for(self) -> None:
        with pytest.raises(ValueError, match="objective: cannot tell helpful from harmless"):
            load_preferences([hh()], on_error="skip")

    @pytest.mark.parametrize(
        ("row", "field", "problem"),
        [
            (hh(" Same.", " Same."), "rejected", "same text as chosen"),
            (hh("", " Yes."), "chosen", "is empty"),
            (hh(" A.\n\nHuman: B?\n\nAssistant: C."), "chosen", "before their last assistant turn"),
            (
                {"chosen": "\n\nHuman: A\n\nAssistant: b", "rejected": "\n\nHuman: B\n\nAssistant: b"},
                "rejected",
                "prompt",
            ),
            (hh(start="Note.\n\nHuman: A\n\nAssistant:"), "chosen", "begins with"),
            (hh(start="\n\nHuman: \n\nAssistant:"), "chosen", "Human turn is empty"),
        ],
    )
    def test_bad_transcripts(self, row: dict[str, str], field: str, problem: str) -> None:
        with pytest.raises(DataError, match=problem) as caught:
            load_preferences([row], format="hh-rlhf", objective="helpful")
        assert caught.value.field == field


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


QUESTION = turn("user", "What colour is the sky?")


class TestSummarizeFromFeedback:
    @pytest.mark.parametrize(("choice", "label"), [(0, 1.0), (1, 0.0)])
    def test_the_chosen_summary_wins(self, choice: int, label: float) -> None:
        data = load_preferences([summaries(choice)])
        assert data.objectives == ("summary",)
        assert only(data).prompt == "A long post.\n\nTL;DR:"
        assert only(data).responses == (" One.", " Two.")
        assert labels(only(data)) == {(0, 1): {"summary": label}}

    def test_a_template_says_what_the_prompt_is(self) -> None:
        row, template = summaries(post="{curly} post"), "r/{subreddit}: {title}. {post} In short:"
        example = only(load_preferences([row], template=template, objective="short"))
        assert example.prompt == "r/dogs: Help. {curly} post In short:"
        assert labels(example) == {(0, 1): {"short": 0.0}}

    def test_an_article_takes_the_place_of_a_post(self) -> None:
        row = summaries(post=None, title=None, subreddit=None, article="News.")
        assert only(load_preferences([row], template="{title}{post} TL;DR:")).prompt == "News. TL;DR:"

    @pytest.mark.parametrize("template", ["TL;DR:", "{post} {author}", "{post} {0}", "{post} {", "{post} {title.x}"])
    def test_a_template_that_cannot_be_filled_in_is_refused(self, template: str) -> None:
        with pytest.raises(ValueError, match="template: expected"):
            load_preferences([summaries()], template=template)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (summaries(choice=2), "rows:1: choice: expected 0 or 1; got 2"),
            (summaries(choice=True), "rows:1: choice: expected 0 or 1; got True"),
            (summaries(post=None), "rows:1: info.article: expected a string; got None"),
            (summaries() | {"info": None}, "rows:1: info: expected an object"),
            (summaries() | {"summaries": [{"text": "One."}]}, "rows:1: summaries: expected 2 summaries; got 1"),
            (summaries() | {"summaries": ["a", "b"]}, r"rows:1: summaries\[0\]: expected an object with text"),
            (summaries() | {"summaries": [{"text": "a"}, {"text": ""}]}, r"rows:1: summaries\[1\].text: is empty"),
            (summaries() | {"summaries": [{"text": "a"}] * 2}, "is the same text as"),
        ],
    )
    def test_bad_rows_are_named(self, row: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_preferences([row])

    def test_it_is_read_from_a_folder_as_the_hub_has_it(self, tmp_path: Path) -> None:
        for split, choice in (("train", 0), ("validation", 1)):
            folder = tmp_path / "comparisons" / split
            folder.mkdir(parents=True)
            other = summaries(choice) | {"summaries": [{"text": " One."}, {"text": " Three."}]}
            datasets.Dataset.from_list([summaries(choice), other]).to_parquet(folder / "0000.parquet")
        data = load_preferences(tmp_path, data_dir="comparisons", split="train", group=True)
        assert only(data).responses == (" One.", " Two.", " Three.")
        assert labels(only(data)) == {(0, 1): {"summary": 1.0}, (0, 2): {"summary": 1.0}}
        assert labels(only(load_preferences(tmp_path, data_dir="comparisons", split="validation", max_rows=1))) == {
            (0, 1): {"summary": 0.0}
        }


BLUE, GREEN = turn("assistant", "Blue."), turn("assistant", "Green.")


class TestTRL:
    @pytest.mark.parametrize(
        ("row", "prompt", "responses"),
        [
            ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", (" blue.", " green.")),
            ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", (" blue.", " green.")),
            ({"chosen": "The sky is blue", "rejected": "The sky is black"}, "The sky is", (" blue", " black")),
            ({"chosen": "The sky is", "rejected": "The sky is blue"}, "The sky", (" is", " is blue")),
            ({"chosen": "Q: sky?\nBlue.", "rejected": "Q: sky?\nGreen."}, "Q: sky?\n", ("Blue.", "Green.")),
            ({"prompt": [QUESTION], "chosen": [BLUE], "rejected": [GREEN]}, [QUESTION], ("Blue.", "Green.")),
            ({"chosen": [QUESTION, BLUE], "rejected": [QUESTION, GREEN]}, [QUESTION], ("Blue.", "Green.")),
            (
                # HuggingFaceH4/ultrafeedback_binarized: the prompt once more inside the transcripts
                {
                    "prompt": QUESTION["content"],
                    "prompt_id": "x",
                    "chosen": [QUESTION, BLUE],
                    "rejected": [QUESTION, GREEN],
                    "score_chosen": 8.0,
                    "score_rejected": 2.0,
                },
                [QUESTION],
                ("Blue.", "Green."),
            ),
            (
                {
                    "prompt": [QUESTION],
                    "chosen": [BLUE, turn("user", "Sure?"), turn("assistant", "Yes.")],
                    "rejected": [BLUE, turn("user", "Sure?"), turn("assistant", "No.")],
                },
                [QUESTION, BLUE, turn("user", "Sure?")],
                ("Yes.", "No."),
            ),
        ],
        ids=[
            "explicit",
            "implicit",
            "implicit-inside-a-word",
            "one-begins-the-other",
            "implicit-newline",
            "conversational",
            "conversational-implicit",
            "binarized",
            "continued",
        ],
    )
    def test_prompt_and_responses(self, row: dict[str, Any], prompt: Any, responses: tuple[str, str]) -> None:
        data = load_preferences([row])
        example = only(data)
        assert example.prompt == prompt
        assert example.responses == responses
        assert data.objectives == ("preference",)
        assert labels(example) == {(0, 1): {"preference": 1.0}}

    def test_the_objective_can_be_named_either_way(self) -> None:
        row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
        assert load_preferences([row], objective="true").objectives == ("true",)
        assert load_preferences([row], objectives=["true"]).objectives == ("true",)

    @pytest.mark.parametrize(
        ("row", "field", "problem"),
        [
            ({"chosen": "blue", "rejected": "green"}, "rejected", "shares no beginning"),
            ({"chosen": [BLUE], "rejected": [GREEN]}, "rejected", "shares no message"),
            ({"prompt": "p", "chosen": "a", "rejected": "a"}, "rejected", "same text"),
            ({"prompt": [QUESTION], "chosen": [BLUE], "rejected": [BLUE]}, "rejected", "same text"),
            ({"prompt": "p", "chosen": "", "rejected": "a"}, "chosen", "is empty"),
            ({"prompt": "p", "chosen": "a", "rejected": None}, "rejected", "expected a string"),
            ({"prompt": [QUESTION], "chosen": [BLUE, QUESTION], "rejected": [GREEN]}, "chosen", "one assistant"),
        ],
    )
    def test_bad_rows(self, row: dict[str, Any], field: str, problem: str) -> None:
        with pytest.raises(DataError, match=problem) as caught:
            load_preferences([row])
        assert caught.value.field == field


class TestSources:
    def test_a_bad_line_is_named_by_file_line_and_field(self, tmp_path: Path) -> None:
        path = write(tmp_path / "data.jsonl", [canonical(), "", canonical(responses=["a", " "])])
        with pytest.raises(DataError) as caught:
            load_preferences(path)
        assert str(caught.value) == f"{path}:3: responses[1]: is empty"

    def test_skip_lists_every_bad_row_and_keeps_every_good_one(self, tmp_path: Path) -> None:
        bad = [
            canonical(responses=["a"]),
            "{broken",
            "[1]",
            canonical(helpful=2.0),
            canonical(responses=["a", "b" * 50]),
        ]
        path = write(tmp_path / "data.jsonl", ["{", *bad, canonical(prompt="q"), canonical(prompt="r")])
        data = load_preferences(path, on_error="skip", max_response_chars=49)
        assert [example.prompt for example in data] == ["q", "r"]
        assert [error.line for error in data.skipped] == [1, 2, 3, 4, 5, 6]
        assert [error.field for error in data.skipped] == [
            None,
            "responses",
            None,
            None,
            "pairs[0].preference.helpful",
            "responses[1]",
        ]
        assert {error.source for error in data.skipped} == {str(path)}

    def test_nothing_usable_raises_and_lists_what_was_skipped(self, tmp_path: Path) -> None:
        path = write(tmp_path / "data.jsonl", [canonical(responses=["a"]), canonical(responses=[])])
        with pytest.raises(DataError, match="no usable row; the first of 2 bad rows") as caught:
            load_preferences(path, on_error="skip")
        assert [error.line for error in caught.value.skipped] == [1, 2]

    def test_an_unknown_objective_is_a_bad_row(self) -> None:
        with pytest.raises(DataError, match=r"rows:1: pairs\[0\]\.preference\.helpful: unknown objective 'helpful'"):
            load_preferences([canonical()], objectives=["brief"])

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    @pytest.mark.parametrize("chat", [False, True], ids=["strings", "messages"])
    def test_save_and_load_give_the_same_examples(self, tmp_path: Path, suffix: str, chat: bool) -> None:
        prompt: Any = [turn("system", "Be kind."), turn("user", "p")] if chat else "p\u2028ü"
        rows = [
            canonical(prompt=prompt, a=1.0, b=None),
            canonical(prompt=prompt, a=0.25, b=0.5) | {"weight": 2.0, "id": "x"},
        ]
        data = load_preferences(rows)
        data.save(tmp_path / f"out{suffix}")
        again = load_preferences(tmp_path / f"out{suffix}")
        assert list(again) == list(data)
        assert again.objectives == data.objectives == ("a", "b")
        assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_margins_are_kept_and_a_pair_without_one_has_none(self, tmp_path: Path, suffix: str) -> None:
        row = canonical(k=1.0)
        row["pairs"][0]["margin"] = -0.75
        data = load_preferences([row, canonical(k=0.0) | {"prompt": "another"}])
        data.save(tmp_path / f"data.{suffix}")
        again = load_preferences(tmp_path / f"data.{suffix}")
        assert [pair.margin for example in again for pair in example.pairs] == [-0.75, None]
        assert list(again) == list(data)
        assert again.has_margins

    def test_a_save_that_fails_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "out.jsonl", ["old"])
        data = load_preferences([canonical()])
        monkeypatch.setattr(PreferenceExample, "to_dict", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            data.save(path)
        assert [item.name for item in tmp_path.iterdir()] == ["out.jsonl"]
        assert path.read_text(encoding="utf-8") == "old\n"

    def test_save_refuses_another_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"\.jsonl or \.parquet; got 'out.csv'"):
            load_preferences([canonical()]).save(tmp_path / "out.csv")

    def test_a_dataset_a_list_and_a_json_array_are_the_same_rows(self, tmp_path: Path) -> None:
        rows = [canonical(prompt="p"), canonical(prompt="q")]
        path = tmp_path / "data.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        table = datasets.Dataset.from_list(rows)
        table.save_to_disk(str(tmp_path / "disk"))
        expected = list(load_preferences(rows))
        for source in (table, path, tmp_path / "disk"):
            assert list(load_preferences(source)) == expected
        splits = datasets.DatasetDict({"train": table, "test": table.select([1])})
        assert list(load_preferences(splits, split="test")) == expected[1:]
        with pytest.raises(DataError, match="split: expected one of train, test; got None"):
            load_preferences(splits)

    def test_the_splits_of_a_folder_do_not_mix(self, tmp_path: Path) -> None:
        # the layout of PKU-SafeRLHF: several files a split
        write(tmp_path / "data" / "Alpaca-7B" / "train.jsonl", [canonical(prompt="a")])
        write(tmp_path / "data" / "Alpaca2-7B" / "train.jsonl", [canonical(prompt="b")])
        write(tmp_path / "data" / "Alpaca-7B" / "test.jsonl", [canonical(prompt="c")])
        assert {example.prompt for example in load_preferences(tmp_path, split="train")} == {"a", "b"}
        assert [example.prompt for example in load_preferences(tmp_path, split="test")] == ["c"]
        with pytest.raises(DataError, match=r"several splits \(test, train\)"):
            load_preferences(tmp_path)
        with pytest.raises(DataError, match="no split 'validation', there are: test, train"):
            load_preferences(tmp_path, split="validation")

    def test_a_parquet_folder_with_shards(self, tmp_path: Path) -> None:
        for shard, prompt in enumerate("ab"):
            load_preferences([canonical(prompt=prompt)]).save(tmp_path / f"train-0000{shard}-of-00002.parquet")
        assert [example.prompt for example in load_preferences(tmp_path)] == ["a", "b"]

    def test_a_configuration_is_that_of_the_data_set_card(self, tmp_path: Path) -> None:
        write(tmp_path / "one.jsonl", [canonical(prompt="1")])
        write(tmp_path / "two.jsonl", [canonical(prompt="2")])
        entries = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two")]
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n", encoding="utf-8")
        data = load_preferences(tmp_path, name="two")
        assert [example.prompt for example in data] == ["2"]
        with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}/one.jsonl:1: prompt: has 1 characters"):
            load_preferences(tmp_path, name="one", max_prompt_chars=0)
        with pytest.raises(DataError, match=r"has several configurations \(one, two\): pass name="):
            load_preferences(tmp_path)
        with pytest.raises(DataError, match="no configuration 'six', there are: one, two"):
            load_preferences(tmp_path, name="six")

    def test_a_hub_name_is_handed_to_datasets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: dict[str, Any] = {}

        def load_dataset(path: str, **options: Any) -> datasets.Dataset:
            asked.update(options, path=path)
            return datasets.Dataset.from_list([hh()])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        data = load_preferences("Anthropic/hh-rlhf", data_dir="harmless-base", split="train", revision="abc")
        assert data.objectives == ("harmless",)
        expected = {"path": "Anthropic/hh-rlhf", "split": "train", "data_dir": "harmless-base", "revision": "abc"}
        assert asked == expected

    @pytest.mark.parametrize("missing", ["nothing.jsonl", "data/nothing.jsonl", "./nothing", "/nothing/here/at/all"])
    def test_a_missing_file_is_not_taken_for_a_hub_name(self, missing: str) -> None:
        with pytest.raises(DataError, match="no such file or folder"):
            load_preferences(missing)

    def test_files_that_are_not_data(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hi", encoding="utf-8")
        with pytest.raises(DataError, match=r"notes\.txt: expected \.jsonl"):
            load_preferences(tmp_path / "notes.txt")
        with pytest.raises(DataError, match="no JSON Lines or parquet file"):
            load_preferences(tmp_path)
        (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(json.dumps(canonical()).encode())[:-9])
        with pytest.raises(DataError, match=r"torn\.jsonl\.gz:1: cannot be read"):
            load_preferences(tmp_path / "torn.jsonl.gz")
        (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing else")
        with pytest.raises(DataError, match=r"torn\.parquet: cannot be read"):
            load_preferences(tmp_path / "torn.parquet")

    def test_a_line_in_another_encoding_is_a_bad_row_of_its_own(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.jsonl"
        latin = json.dumps(canonical(prompt="\u00fc"), ensure_ascii=False).encode("latin-1")
        path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + json.dumps(canonical()).encode(), b"", latin]))
        data = load_preferences(path, on_error="skip")
        assert len(data) == 1
        assert [str(error) for error in data.skipped] == [
            f"{path}:3: not valid UTF-8: invalid start byte at byte 13",
        ]

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"format": "csv"}, "format: expected auto, canonical"),
            ({"on_error": "ignore"}, "on_error: expected 'raise' or 'skip'; got 'ignore'"),
            ({"signs": {}}, "signs: not an option of format 'canonical', which has no options"),
            ({"format": "hh-rlhf", "wit": 1}, "wit: not an option of format 'hh-rlhf', which has conversational"),
            (
                {"format": "helpsteer", "objectives": ["wit"]},
                "objectives: expected names among helpsteer's helpfulness",
            ),
        ],
    )
    def test_wrong_options_raise_even_when_rows_are_skipped(self, options: dict[str, Any], problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            load_preferences([canonical()], **({"on_error": "skip"} | options))

    def test_unknown_columns_ask_for_the_format(self) -> None:
        with pytest.raises(DataError, match="cannot tell the format from the columns text, label: pass format="):
            load_preferences([{"text": "a", "label": 1}])

    def test_a_source_that_is_no_source(self) -> None:
        with pytest.raises(TypeError, match="expected a path, a name, a Dataset or rows; got int"):
            load_preferences(7)

    def test_max_rows_and_progress_count_rows(self) -> None:
        seen: list[int] = []
        rows = [canonical(prompt=str(index)) for index in range(5)]
        assert len(load_preferences(rows, max_rows=3, progress=lambda: seen.append(1))) == 3
        assert len(seen) == 3

    def test_without_datasets_the_error_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"mopo-kernels\[train\]"):
            load_preferences([canonical()])


class TestPreferenceData:
    def test_strings_and_messages_mix(self) -> None:
        rows = [canonical(prompt="p"), canonical(prompt=[turn("user", "q")], responses=["a", [turn("assistant", "b")]])]
        data = load_preferences(rows)
        assert data[0].prompt == "p"  # not a turn yet: it may be text that no template is to be applied to
        assert data[1].responses == ([turn("assistant", "a")], [turn("assistant", "b")])

    def test_the_table_has_the_canonical_columns(self) -> None:
        data = load_preferences([canonical()])
        assert data.dataset.column_names == ["prompt", "responses", "pairs", "id", "weight"]
        assert load_preferences(data.dataset)[0] == data[0]

    @pytest.mark.parametrize("seed", range(5))
    def test_split_keeps_equal_prompts_together_and_loses_nothing(self, seed: int) -> None:
        rows = [canonical(prompt=str(index % 10), responses=[str(index), "x"]) for index in range(30)]
        data = load_preferences(rows)
        train, held = data.split(0.3, seed)
        first, second = ({example.prompt for example in part} for part in (train, held))
        assert not first & second
        assert len(second) == 3
        assert sorted(str(e.responses[0]) for part in (train, held) for e in part) == sorted(map(str, range(30)))
        assert list(data.split(0.3, seed)[1]) == list(held)

    def test_different_seeds_split_differently(self) -> None:
        data = load_preferences([canonical(prompt=str(index)) for index in range(20)])
        assert len({tuple(str(e.prompt) for e in data.split(0.3, seed)[1]) for seed in range(5)}) > 1

    def test_split_refuses_what_it_cannot_do(self) -> None:
        data = load_preferences([canonical(), canonical()])
        with pytest.raises(ValueError, match="at least 2 distinct prompts; got 1"):
            data.split(0.5)
        with pytest.raises(ValueError, match=r"fraction: .* got 1"):
            data.split(1)

    def test_reference_log_probabilities_are_attached_and_survive_the_disk(self, tmp_path: Path) -> None:
        data = load_preferences([canonical(prompt="p"), canonical(prompt="q")]).with_ref_logprob([[-1, -2], [-3, -4]])
        assert [example.ref_logprob for example in data] == [(-1.0, -2.0), (-3.0, -4.0)]
        for suffix in (".jsonl", ".parquet"):
            data.save(tmp_path / f"out{suffix}")
            assert list(load_preferences(tmp_path / f"out{suffix}")) == list(data)
        with pytest.raises(ValueError, match=r"one sequence per example \(2\); got 1"):
            data.with_ref_logprob([[-1, -2]])
        with pytest.raises(DataError, match="one number per response"):
            data.with_ref_logprob([[-1, -2], [-3]])

    def test_a_column_that_only_some_rows_fill(self) -> None:
        data = load_preferences([canonical(prompt="p") | {"ref_logprob": [-1.0, -2.0]}, canonical(prompt="q")])
        assert [example.ref_logprob for example in data] == [(-1.0, -2.0), None]


class TestMerge:
    def test_single_objective_sets_join_by_prompt_and_text(self) -> None:
        helpful = [hh(" Also a drink.", " A colour."), hh(" Yes.", " No.", start="\n\nHuman: Ok?\n\nAssistant:")]
        harmless = [hh(" A colour.", " Also a drink."), hh(" Dunno.", " Yes.", start="\n\nHuman: Ok?\n\nAssistant:")]
        data = load_preferences({"helpful": helpful, "harmless": harmless})
        assert data.objectives == ("helpful", "harmless")
        assert labels(data[0]) == {(0, 1): {"helpful": 1.0, "harmless": 0.0}}
        assert data[1].responses == ("Yes.", "No.", "Dunno.")
        assert labels(data[1]) == {
            (0, 1): {"helpful": 1.0, "harmless": None},
            (2, 0): {"helpful": None, "harmless": 1.0},
        }

    def test_other_prompts_stay_partial(self) -> None:
        data = load_preferences({"a": [{"prompt": "p", "chosen": "x", "rejected": "y"}], "b": [
            {"prompt": "q", "chosen": "x", "rejected": "y"}]})  # fmt: skip
        assert [labels(example)[0, 1] for example in data] == [{"a": 1.0, "b": None}, {"a": None, "b": 1.0}]

    def test_repeated_judgements_are_averaged_in_one_orientation(self) -> None:
        rows = [canonical(responses=["a", "b"], k=1.0), canonical(responses=["b", "a"], k=1.0), canonical(k=1.0)]
        assert labels(only(load_preferences(rows, group=True)))[0, 1] == {"k": pytest.approx(2 / 3)}

    def test_margins_are_joined_in_the_orientation_of_the_labels(self) -> None:
        first, second = canonical(responses=["a", "b"], k=1.0), canonical(responses=["b", "a"], k=0.0)
        first["pairs"][0]["margin"], second["pairs"][0]["margin"] = 1.0, -2.0
        (pair,) = only(load_preferences([first, second], group=True)).pairs
        assert (pair.i, pair.j, pair.margin) == (0, 1, 1.5)
        (pair,) = only(load_preferences([canonical(responses=["a", "b"], k=1.0), second], group=True)).pairs
        assert pair.margin == 2.0

    def test_copies_of_a_text_stay_apart_and_join_copy_by_copy(self) -> None:
        row = {"prompt": "p", "responses": ["a", "a", "b"], "pairs": [{"i": 1, "j": 2, "preference": {"k": 1.0}}]}
        example = only(load_preferences([row, row], group=True))
        assert example.responses == ("a", "a", "b")
        assert labels(example) == {(1, 2): {"k": 1.0}}

    def test_a_string_prompt_equals_one_user_turn(self) -> None:
        strings, messages = (
            load_preferences([canonical(prompt="p")]),
            load_preferences([canonical(prompt=[turn("user", "p")])]),
        )
        assert len(merge_preferences([strings, messages])) == 1

    def test_reference_log_probabilities_follow_their_responses(self) -> None:
        one = canonical(responses=["a", "b"]) | {"ref_logprob": [-1.0, -2.0]}
        two = canonical(responses=["c", "b"]) | {"ref_logprob": [-3.0, -2.0]}
        assert only(load_preferences([one, two], group=True)).ref_logprob == (-1.0, -2.0, -3.0)
        assert only(load_preferences([one, canonical(responses=["c", "b"])], group=True)).ref_logprob is None

    def test_skipped_rows_of_every_part_are_kept(self) -> None:
        part = [{"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": "", "rejected": "y"}]
        assert len(load_preferences({"a": part, "b": part}, on_error="skip").skipped) == 2

    def test_what_cannot_be_merged_raises(self) -> None:
        with pytest.raises(DataError, match=r"weight: rows with the prompt of 'p' have different weights \[1.0, 2.0\]"):
            load_preferences([canonical(), canonical() | {"weight": 2.0}], group=True)
        with pytest.raises(ValueError, match="at least one PreferenceData"):
            merge_preferences([])
        with pytest.raises(ValueError, match=r"objectives: expected the keys \['a'\]; got \['b'\]"):
            load_preferences({"a": [canonical()]}, objectives=["b"])
