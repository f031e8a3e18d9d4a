"""Reward models as judges: scores do not depend on the batch, and are those of the network on what it should read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from reward_stand_ins import WORDS, build

from mopo_kernels.evaluation import BatchJudge, judge_responses, load_judges
from mopo_kernels.rewards import RewardModel

# By architecture how many outputs the stand-in has; BART's configuration keeps silent, and its default is another.
OUTPUTS = {"gpt2": 1, "bart": 2, "distilbert": 2}
KINDS = tuple(OUTPUTS)
PROMPTS = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9"]
RESPONSES = ["w9 w8 w7", "w6 w5 w4 w3 w2 w1 w0", "w2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: build(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_batch_scores_as_each_response_alone(folders: dict[str, Path], kind: str, batch_size: int) -> None:
    judge = RewardModel(folders[kind], outputs=OUTPUTS[kind], batch_size=batch_size, device="cpu")
    scores = judge.score_batch(PROMPTS, RESPONSES)
    assert scores == pytest.approx([judge(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)], rel=1e-5)
    assert len({round(score, 6) for score in scores}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_the_networks_output_on_the_joined_texts(folders: dict[str, Path], kind: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(folders[kind], num_labels=OUTPUTS[kind]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    with torch.no_grad():
        logits = network(**tokenizer(PROMPTS[2], RESPONSES[0], return_tensors="pt")).logits[0]
    assert len(logits) == OUTPUTS[kind]
    for output in range(len(logits)):
        judge = RewardModel(folders[kind], output=output, outputs=OUTPUTS[kind], device="cpu")
        assert judge(PROMPTS[2], RESPONSES[0]) == pytest.approx(float(logits[output]), rel=1e-5)


def test_a_token_in_the_middle_that_serves_for_padding_does_not_end_a_text(folders: dict[str, Path]) -> None:
    """RiC's summary model reads ``summary <|endoftext|> post``, and GPT-2 has no other token to pad with."""
    judge = RewardModel(folders["gpt2"], texts=lambda p, r: (f"{r} <eos> {p}", None), device="cpu")
    alone = [judge(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert judge.score_batch(PROMPTS, RESPONSES) == pytest.approx(alone, rel=1e-5)
    assert judge("w1 w2", "w3") != pytest.approx(judge("w4 w2", "w3"), rel=1e-3), "the post is read"


def test_what_it_reads_is_what_texts_gives(folders: dict[str, Path]) -> None:
    judge = RewardModel(folders["distilbert"], texts=lambda p, r: (r, None), device="cpu")
    assert judge("w1", "w2") == judge("w5 w6", "w2") != judge("w1", "w3")


def test_long_texts_are_cut(folders: dict[str, Path]) -> None:
    judge = RewardModel(folders["gpt2"], texts=lambda p, r: (r, None), max_length=5, device="cpu")
    long = " ".join(WORDS[index % 10] for index in range(200))
    assert judge("", long) == judge("", long[: len("w0 w1 w2 w3 w4")])
    # Beyond the network's own positions, which its tokenizer says.
    assert math.isfinite(RewardModel(folders["gpt2"], texts=lambda p, r: (r, None), device="cpu")("", long))


def test_judges_are_given_everything_at_once_where_they_can_take_it(folders: dict[str, Path]) -> None:
    calls = []

    class Counting(RewardModel):
        def score_batch(self, prompts, responses):
            calls.append((list(prompts), list(responses)))
            return super().score_batch(prompts, responses)

    batch = Counting(folders["gpt2"], device="cpu")
    assert isinstance(batch, BatchJudge)
    one = lambda prompt, response: float(len(response))  # noqa: E731
    assert not isinstance(one, BatchJudge)
    drawn = [["w1 w2", "w3"], [], ["w4"]]
    scores = judge_responses({"reward": batch, "length": one}, PROMPTS, drawn, progress=False)
    assert calls == [([PROMPTS[0], PROMPTS[0], PROMPTS[2]], ["w1 w2", "w3", "w4"])]
    assert scores["length"] == [[5.0, 2.0], [], [2.0]]
    assert scores["reward"][2] == [pytest.approx(batch(PROMPTS[2], "w4"), rel=1e-5)]


def test_a_batch_judge_that_loses_a_response_is_named() -> None:
    class Short:
        def __call__(self, prompt: str, response: str) -> float:
            return 0.0

        def score_batch(self, prompts: list[str], responses: list[str]) -> list[float]:
            return [0.0]

    with pytest.raises(ValueError, match="judge 'short': expected 2 scores; got 1"):
        judge_responses({"short": Short()}, ["p"], [["a", "b"]], progress=False)


def test_what_cannot_work_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output: expected at least 0; got -1"):
        RewardModel(folders["gpt2"], output=-1)
    with pytest.raises(ValueError, match=r"output: expected a number below the 1 outputs of .*; got 1"):
        RewardModel(folders["gpt2"], output=1, device="cpu")("p", "r")
    with pytest.raises(OSError, match="nothing"):
        RewardModel(tmp_path / "nothing", device="cpu")("p", "r")


def test_a_file_of_reward_models_is_read_without_loading_one(tmp_path: Path) -> None:
    (tmp_path / "judges.py").write_text(
        "from mopo_kernels.rewards import RewardModel\nJUDGES = {'helpful': RewardModel('no/such-model')}\n"
    )
    assert list(load_judges(f"{tmp_path / 'judges.py'}:JUDGES")) == ["helpful"]
