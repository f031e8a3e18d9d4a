"""The collator against a word-level and a byte-level tokenizer made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from mopo_kernels.data import DataError, PreferenceCollator, PreferenceExample, PreferencePair, load_preferences

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = ["user assistant system say the word twice yes no maybe the river flows east and the sky is blue"]


def byte_level(template: str | None = TEMPLATE, **special: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, so that text tokenised jointly does merge across a boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **({"pad_token": "<|pad|>", "eos_token": "<|end|>"} | special)
    )
    fast.chat_template = template
    return fast


def word_level(closing: bool) -> PreTrainedTokenizerFast:
    """Word-level with a BOS that it adds itself, and with an EOS at the end of every text when ``closing``."""
    words = sorted(set(" ".join(CORPUS).split()))
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closing else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPACED = (" yes", " no the river flows")


def example(
    prompt: Any = "say the word",
    responses: Sequence[Any] = ("yes", "no the river flows"),
    pairs: Sequence[tuple[Any, ...]] = ((0, 1, {"a": 1.0, "b": 0.25}),),
    **more: Any,
) -> PreferenceExample:
    return PreferenceExample(prompt, tuple(responses), tuple(PreferencePair(*pair) for pair in pairs), **more)


BATCH = [
    example(),
    example(
        prompt=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "the sky"}],
        responses=["is blue", [{"role": "assistant", "content": "maybe"}], "maybe"],
        pairs=[(2, 0, {"b": 0.0}), (0, 1, {"a": None, "b": 0.5})],
        weight=2.0,
    ),
]


def scored(batch: dict[str, Tensor], row: int) -> list[int]:
    labels = batch["labels"][row]
    return labels[labels != -100].tolist()


def prompt_ids(batch: dict[str, Tensor], row: int) -> list[int]:
    ids = batch["input_ids"][row][(batch["labels"][row] == -100) & (batch["attention_mask"][row] == 1)]
    return ids.tolist()


def test_labels_score_exactly_the_response_and_its_eos() -> None:
    tokenizer = byte_level()
    batch = PreferenceCollator(tokenizer, ["a", "b"])(BATCH)
    assert [tokenizer.decode(scored(batch, row)) for row in range(5)] == [
        "yes<|end|>",
        "no the river flows<|end|>",
        "is blue<|end|>",
        "maybe<|end|>",
        "maybe<|end|>",
    ]


def test_prompts_go_through_the_chat_template_and_are_the_same_for_every_response() -> None:
    tokenizer = byte_level()
    batch = PreferenceCollator(tokenizer, ["a", "b"])(BATCH)
    first, second = (
        "<|start|>user\nsay the word<|end|>\n",
        "<|start|>system\nbe brief<|end|>\n<|start|>user\nthe sky<|end|>\n",
    )
    for row, text in enumerate([first, first, second, second, second]):
        assert tokenizer.decode(prompt_ids(batch, row)) == f"{text}<|start|>assistant\n"


def test_the_boundary_is_where_the_whole_text_has_it() -> None:
    tokenizer = byte_level(template=None)
    batch = PreferenceCollator(tokenizer, ["a"])([example("say the wo", ["rd", "no"])])
    for row, response in enumerate(("rd", "no")):
        joint = tokenizer(f"say the wo{response}", add_special_tokens=False)["input_ids"]
        assert prompt_ids(batch, row) + scored(batch, row) == [*joint, tokenizer.eos_token_id]
    # A token of the first spans the boundary, so the prompt ends before it for both.
    apart = tokenizer("say the wo", add_special_tokens=False)["input_ids"]
    assert prompt_ids(batch, 0) == prompt_ids(batch, 1) == apart[: len(prompt_ids(batch, 0))] != apart


def test_padding_is_on_the_right_masked_and_never_scored() -> None:
    collator = PreferenceCollator(byte_level(), ["a"], pad_to_multiple_of=16)
    batch = collator(BATCH)
    assert batch["input_ids"].shape[1] % 16 == 0
    lengths = batch["attention_mask"].sum(1)
    positions = torch.arange(batch["input_ids"].shape[1])
    padding = positions >= lengths[:, None]
    assert torch.equal(batch["attention_mask"], (~padding).long())
    assert padding.any(1).all()
    assert (batch["input_ids"][padding] == collator.tokenizer.pad_token_id).all()
    assert (batch["labels"][padding] == -100).all()


def test_without_multiple_the_longest_row_has_no_padding() -> None:
    batch = PreferenceCollator(byte_level(), ["a"])(BATCH)
    assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]


def test_pairs_index_rows_and_labels_follow_the_objectives_order() -> None:
    batch = PreferenceCollator(byte_level(), ["b", "a"])(BATCH)
    assert batch["pairs"].tolist() == [[0, 1], [4, 2], [2, 3]]
    expected = torch.tensor([[0.25, 1.0], [0.0, torch.nan], [0.5, torch.nan]])
    torch.testing.assert_close(batch["preference"], expected, equal_nan=True, rtol=0, atol=0)
    assert batch["pair_weight"].tolist() == [1.0, 2.0, 2.0]
    assert batch["prompt_index"].tolist() == [0, 0, 1, 1, 1]
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    floats = {"preference": torch.float32, "pair_weight": torch.float32}
    integers = dict.fromkeys(["input_ids", "attention_mask", "labels", "pairs", "prompt_index"], torch.int64)
    assert dtypes == floats | integers


def test_labels_of_other_objectives_are_left_out() -> None:
    assert PreferenceCollator(byte_level(), ["b"])(BATCH)["preference"].flatten().tolist() == [0.25, 0.0, 0.5]


def test_reference_log_probabilities_appear_when_every_example_has_them() -> None:
    collator = PreferenceCollator(byte_level(), ["a"])
    one, two = example(ref_logprob=(-1.0, -2.5)), example(responses=["yes", "no"], ref_logprob=(-3.0, -4.0))
    batch = collator([one, two])
    assert batch["ref_logprob"].tolist() == [-1.0, -2.5, -3.0, -4.0]
    assert batch["ref_logprob"].dtype == torch.float32
    assert "ref_logprob" not in collator([one, example()])


def test_margins_follow_the_pairs_and_are_0_where_there_is_none() -> None:
    collator = PreferenceCollator(byte_level(), ["a"])
    assert "margin" not in collator(BATCH)
    batch = collator([example(pairs=[(0, 1, {"a": 1.0}, 0.25), (1, 0, {"a": 1.0})]), *BATCH])
    assert batch["margin"].tolist() == [0.25, 0.0, 0.0, 0.0, 0.0]
    assert batch["margin"].dtype == torch.float32
    assert collator([example(pairs=[(0, 1, {"a": 1.0}, 0.0)])])["margin"].tolist() == [0.0]


def test_dicts_and_examples_give_the_same_batch() -> None:
    collator = PreferenceCollator(byte_level(), ["a", "b"])
    one, two = collator(BATCH), collator([item.to_dict() for item in BATCH])
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("closing", [False, True], ids=["bos", "bos-and-eos"])
def test_without_a_template_the_tokenizers_bos_opens_the_prompt_and_no_eos_closes_it(closing: bool) -> None:
    tokenizer = word_level(closing)
    batch = PreferenceCollator(tokenizer, ["a"])([example(responses=SPACED)])
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    assert [words[index] for index in prompt_ids(batch, 0)] == ["<s>", "say", "the", "word"]
    assert [[words[index] for index in scored(batch, row)] for row in (0, 1)] == [
        ["yes", "</s>"],
        ["no", "the", "river", "flows", "</s>"],
    ]


def test_a_tokenizer_without_pad_token_pads_with_eos_and_still_scores_only_the_response() -> None:
    tokenizer = word_level(closing=False)
    assert tokenizer.pad_token_id is None
    batch = PreferenceCollator(tokenizer, ["a"])([example(responses=SPACED)])
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id
    assert (batch["labels"][0] == tokenizer.eos_token_id).sum() == 1


@pytest.mark.parametrize(
    "limits",
    [{"max_response_length": 4}, {"max_length": 8}, {"max_length": 9, "max_response_length": 4}],
    ids=["response", "total", "both"],
)
def test_an_over_long_response_raises_naming_the_example_or_is_cut_without_eos_and_counted(
    limits: dict[str, int],
) -> None:
    tokenizer = word_level(closing=False)
    with pytest.raises(DataError, match=r"responses\[1\]: example river-1: 5 tokens, more than the 4"):
        PreferenceCollator(tokenizer, ["a"], **limits)([example(responses=SPACED, id="river-1")])
    collator = PreferenceCollator(tokenizer, ["a"], truncate=True, **limits)
    batch = collator([example(responses=SPACED), example(responses=SPACED)])
    assert tokenizer.eos_token_id in scored(batch, 0)
    assert tokenizer.convert_ids_to_tokens(scored(batch, 1)) == ["no", "the", "river", "flows"]
    assert collator.truncated == 2


def test_a_length_exactly_at_the_limit_passes() -> None:
    collator = PreferenceCollator(word_level(closing=False), ["a"], max_length=9, max_response_length=5)
    batch = collator([example(responses=SPACED)])
    assert int(batch["attention_mask"].sum(dim=1).max()) == 9
    assert collator.truncated == 0


def test_a_prompt_without_room_raises_even_when_truncating_and_names_the_start_of_the_prompt() -> None:
    collator = PreferenceCollator(word_level(closing=False), ["a"], max_length=4, truncate=True)
    with pytest.raises(DataError, match="prompt: example 'say the word': 4 tokens leave no room"):
        collator([example(responses=SPACED)])


def test_over_long_examples_can_be_dropped_beforehand_and_are_listed() -> None:
    rows = [example(responses=SPACED, id="long").to_dict(), example(id="short", responses=[" yes", " no"]).to_dict()]
    collator = PreferenceCollator(word_level(closing=False), ["a"], max_length=8)
    data = load_preferences(rows)
    kept = data.drop_overlong(collator)
    assert [item.id for item in kept] == ["short"]
    assert ["long" in str(error) for error in kept.skipped] == [True]
    with pytest.raises(DataError, match="every one of 1 examples is refused"):
        data.select([0]).drop_overlong(collator)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: PreferenceCollator(byte_level(), []), "objectives: expected distinct names"),
        (lambda: PreferenceCollator(byte_level(), ["a", "a"]), "objectives: expected distinct names"),
        (lambda: PreferenceCollator(byte_level(eos_token=None), ["a"]), "tokenizer: expected one with an EOS"),
        (lambda: PreferenceCollator(byte_level(), ["a"], max_length=0), "max_length: expected a positive"),
        (lambda: PreferenceCollator(byte_level(), ["a"])([]), "examples: expected at least one"),
        (lambda: PreferenceCollator(byte_level(template=None), ["a"])(BATCH), "tokenizer: expected a chat template"),
    ],
    ids=["no-objective", "twice", "no-eos", "length", "empty", "no-template"],
)
def test_wrong_use_raises(build: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build()


def test_a_data_loader_with_workers_takes_the_data_and_the_collator() -> None:
    data = load_preferences([example(prompt=f"say {index}").to_dict() for index in range(5)])
    collator = PreferenceCollator(byte_level(), data.objectives)
    batches = list(DataLoader(data, batch_size=2, collate_fn=collator, num_workers=1))
    assert [batch["prompt_index"].tolist() for batch in batches] == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0]]
