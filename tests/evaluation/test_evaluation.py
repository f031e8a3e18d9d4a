"""Sampling, judging and win rates: on a random two-layer Llama and on synthetic scores whose win rate is known."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mopo_kernels import evaluation

WORDS = [f"w{index}" for index in range(58)]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(folder: Path, *, template: bool = False):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model(folder: Path, *, seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    build_model(place)
    build_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA adapters on the model of `folder`, far enough from zero to change what is sampled."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    places = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder)
        tuned = get_peft_model(
            base, LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
        )
        places.append(tmp_path_factory.mktemp(f"adapter{seed}"))
        tuned.save_pretrained(places[-1])
    return places


@pytest.fixture
def policy(folder: Path) -> evaluation.Policy:
    return evaluation.load_policy(folder, device="cpu")


def draw(policy: evaluation.Policy, prompts: list[Any], **options):
    defaults = {"samples_per_prompt": 2, "max_new_tokens": 6, "batch_size": 4, "seed": 3, "progress": False}
    with policy.active() as model:
        return evaluation.sample_responses(model, policy.tokenizer, prompts, **(defaults | options))


PROMPTS: list[evaluation.Prompt] = ["w1 w2 w3 w4 w5", "w9", "w7 w8 w9", "w1 w2 w3 w4 w5 w6 w7", "w30 w31"]


# Sampling


def test_sampling_is_repeatable_and_leaves_the_global_random_state_alone(policy):
    torch.manual_seed(11)
    first = draw(policy, PROMPTS)
    untouched = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(untouched, torch.rand(3))
    torch.manual_seed(99)
    assert draw(policy, PROMPTS) == first
    assert draw(policy, PROMPTS, seed=4) != first


def test_samples_of_one_prompt_differ(policy):
    drawn = draw(policy, ["w1 w2"], samples_per_prompt=8)[0]
    assert len(drawn) == 8
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_responses_match_a_plain_loop_in_input_order_whatever_the_batch(policy, batch_size):
    """Left padding, bucketing by length and reordering must not change what an unpadded prompt would give."""
    with policy.active() as model:
        expected = []
        for prompt in PROMPTS:
            ids = policy.tokenizer(prompt)["input_ids"]
            start = len(ids)
            while len(ids) < start + 6:
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == policy.tokenizer.eos_token_id:
                    break
                ids.append(token)
            expected.append([policy.tokenizer.decode(ids[start:], skip_special_tokens=True)])
    drawn = draw(policy, PROMPTS, samples_per_prompt=1, temperature=0.0, batch_size=batch_size)
    assert drawn == expected
    assert len({tuple(row) for row in drawn}) > 1


def without_a_cache(monkeypatch):
    """Batches are decoded whole, as for models whose cache cannot be continued."""
    monkeypatch.setattr(evaluation.sampling, "_prompt_cache", lambda *arguments: None)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.7}], ids=str)
def test_sharing_prompts_and_leaving_when_ended_does_not_change_the_distribution(policy, monkeypatch, options):
    """Of whole responses, of which most end before the last token and each length is drawn often."""
    with policy.active() as model:
        model.generation_config.eos_token_id = [1, *range(6, 20)]
        options = {"samples_per_prompt": 1500, "max_new_tokens": 7, "batch_size": 500} | options
        ours = draw(policy, PROMPTS[:3], **options)
        without_a_cache(monkeypatch)
        theirs = draw(policy, PROMPTS[:3], **(options | {"seed": 4}))
    assert ours != theirs
    for one, other in zip(ours, theirs, strict=True):
        lengths = [np.bincount([len(text.split()) for text in texts], minlength=8) / 1500 for texts in (one, other)]
        assert np.abs(lengths[0] - lengths[1]).max() < 5 * math.sqrt(2 * 0.25 / 1500)
        assert (lengths[0] > 0.005).sum() >= 4
        for place in range(7):
            words = [[text.split()[place] for text in texts if len(text.split()) > place] for texts in (one, other)]
            if min(map(len, words)) < 200:
                continue
            shares = [np.array([drawn.count(word) / len(drawn) for word in WORDS]) for drawn in words]
            assert np.abs(shares[0] - shares[1]).max() < 5 * math.sqrt(2 * 0.25 / min(map(len, words)))


def test_sequences_that_have_ended_leave_the_batch_and_prompts_are_computed_once(policy, monkeypatch):
    rows = []
    with policy.active() as model:
        model.generation_config.eos_token_id = [1, *range(6, 20)]
        generate = model.generate
        monkeypatch.setattr(
            model, "generate", lambda **options: rows.append(options["input_ids"].shape) or generate(**options)
        )
        draw(policy, ["w1 w2 w3", "w4 w5"], samples_per_prompt=30, max_new_tokens=12, batch_size=60)
    assert rows[0] == (2, 2)
    assert [width for _, width in rows[1:]] == [3 + 4 * index for index in range(len(rows) - 1)]
    assert rows[1][0] == 60
    assert rows[2][0] < 60


def test_a_model_of_short_windows_is_sampled_without_continuing_its_cache(tmp_path, monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    policy = evaluation.Policy.from_model(MistralForCausalLM(config).eval(), build_tokenizer(tmp_path))
    greedy = {"samples_per_prompt": 1, "temperature": 0.0, "batch_size": 5, "max_new_tokens": 9}
    ours = draw(policy, PROMPTS, **greedy)
    without_a_cache(monkeypatch)
    assert draw(policy, PROMPTS, **greedy) == ours


def test_samples_follow_the_policy_and_not_the_generation_config(policy):
    """First words of 4000 draws against softmax(logits), with a config that would forbid the likeliest word."""
    with policy.active() as model:
        probability = model(torch.tensor([policy.tokenizer("w1 w2")["input_ids"]])).logits[0, -1].softmax(-1)
        likeliest = [6 + int(probability[6:].argmax())]
        model.generation_config.suppress_tokens = likeliest
        drawn = draw(policy, ["w1 w2"], samples_per_prompt=4000, max_new_tokens=1, batch_size=500)[0]
        assert model.generation_config.suppress_tokens == likeliest
    frequency = np.array([drawn.count(word) for word in WORDS]) / len(drawn)
    expected = probability[6:].detach().numpy()
    assert expected.max() > 0.1
    assert np.abs(frequency - expected).max() < 5 * math.sqrt(0.25 / len(drawn))


def test_no_word_is_cut_off_however_unlikely(policy):
    """Nearly uniform at temperature 100: a top-k of 50, the default of transformers, would leave 50 of the 58 words."""
    options = {"samples_per_prompt": 2000, "max_new_tokens": 1, "batch_size": 500, "temperature": 100.0}
    assert set(WORDS) <= set(draw(policy, ["w1 w2"], **options)[0])


def test_a_response_ends_before_any_stop_token_of_the_generation_config(policy):
    drawn = draw(policy, PROMPTS, samples_per_prompt=20, max_new_tokens=10, temperature=5.0)
    words = [word for row in drawn for text in row for word in text.split()]
    stop = max(set(words), key=words.count)
    with policy.active() as model:
        model.generation_config.eos_token_id = [1, policy.tokenizer.convert_tokens_to_ids(stop)]
        stopped = draw(policy, PROMPTS, samples_per_prompt=20, max_new_tokens=10, temperature=5.0)
    assert not any(stop in text.split() for row in stopped for text in row)
    assert sum(len(text.split()) for row in stopped for text in row) < len(words)


def test_the_progress_bar_shows_a_description_as_it_is(policy, capsys):
    draw(policy, ["w1"], progress=True, description="sampling [bold]a[/]")
    assert "sampling [bold]a[/]" in capsys.readouterr().err


def test_sampling_puts_a_training_model_back_in_training_mode(policy):
    with policy.active() as model:
        model.train()
        draw(policy, ["w1"])
        assert model.training


def test_a_string_prompt_is_one_user_turn_under_a_chat_template(tmp_path):
    tokenizer = build_tokenizer(tmp_path, template=True)
    turn = [{"role": "user", "content": "w1 w2"}]
    ids = evaluation.encode_prompt(tokenizer, "w1 w2")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "w1", "w2", "<assistant>"]
    assert evaluation.encode_prompt(tokenizer, turn) == ids


def test_a_string_prompt_is_raw_without_a_chat_template_and_messages_are_refused(policy):
    assert policy.tokenizer.convert_ids_to_tokens(evaluation.encode_prompt(policy.tokenizer, "w1 w2")) == ["w1", "w2"]
    with pytest.raises(ValueError, match="without a chat template"):
        evaluation.encode_prompt(policy.tokenizer, [{"role": "user", "content": "w1"}])


@pytest.mark.parametrize("kind", ["template", "plain", "opened with BOS", "closed with EOS"])
def test_prompts_are_encoded_as_the_collator_encodes_them_for_training(tmp_path, kind):
    from tokenizers.processors import TemplateProcessing

    from mopo_kernels.data import PreferenceCollator, PreferenceExample, PreferencePair

    tokenizer = build_tokenizer(tmp_path, template=kind == "template")
    if kind == "opened with BOS":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<unk> $A", special_tokens=[("<unk>", 2)])
    if kind == "closed with EOS":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    # Text goes on where the prompt ends: a word of its own begins with a space.
    answers = ("w5", "w6 w7") if kind == "template" else (" w5", " w6 w7")
    example = PreferenceExample("w1 w2", answers, (PreferencePair(0, 1, {"a": 1.0}),), None)
    batch = PreferenceCollator(tokenizer, ["a"], max_length=32, max_response_length=16)([example])
    trained_on = batch["input_ids"][0][(batch["labels"][0] == -100) & (batch["attention_mask"][0] == 1)].tolist()
    assert evaluation.encode_prompt(tokenizer, "w1 w2") == trained_on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt: expected at least 1; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1; got 0"),
        ({"batch_size": -1}, "batch_size: expected at least 1; got -1"),
        ({"temperature": -1.0}, r"temperature: expected a finite number >= 0; got -1\.0"),
        ({"temperature": math.nan}, "temperature: expected a finite number >= 0; got nan"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\]; got 0\.0"),
        ({"max_new_tokens": 60}, r"prompts\[0\]: expected room .*context of 64; got a prompt of 5"),
    ],
)
def test_bad_sampling_options_are_named(policy, options, message):
    with pytest.raises(ValueError, match=message):
        draw(policy, PROMPTS, **options)


def test_an_empty_prompt_is_refused_by_index(policy):
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at least one token"):
        draw(policy, ["w1", ""])


def test_a_token_beyond_the_embedding_is_refused_by_index(policy):
    with pytest.raises(
        ValueError, match=r"prompts\[1\]: expected tokens among the \d+ rows of the model's embedding; got 10000"
    ):
        draw(policy, ["w1", [5, 10_000]])


# Policies


def test_policies_on_one_base_share_its_weights_and_sample_as_if_loaded_alone(folder, adapters):
    alone = [evaluation.load_policy(folder, adapter, device="cpu") for adapter in (None, *adapters)]
    expected = [draw(policy, PROMPTS) for policy in alone]
    assert expected[0] != expected[1] != expected[2]

    first = evaluation.load_policy(folder, adapters[0], device="cpu")
    second = evaluation.load_policy(folder, adapters[1], share=first)
    third = evaluation.load_policy(folder, share=first)
    assert second._weights is first._weights is third._weights
    for _ in range(2):  # twice: each must leave the others as they were
        assert draw(third, PROMPTS) == expected[0]
        assert draw(second, PROMPTS) == expected[2]
        assert draw(first, PROMPTS) == expected[1]
        assert draw(first.base(), PROMPTS) == expected[0]


def test_an_adapter_loaded_later_does_not_leak_into_the_base_policy(folder, adapters):
    base = evaluation.load_policy(folder, device="cpu")
    before = draw(base, PROMPTS)
    tuned = evaluation.load_policy(folder, adapters[0], share=base)
    assert draw(tuned, PROMPTS) != before
    assert draw(base, PROMPTS) == before


def test_an_adapter_folder_alone_finds_its_base_model(folder, adapters):
    direct = evaluation.load_policy(adapters[0], device="cpu")
    assert direct.name == adapters[0].name
    assert draw(direct, PROMPTS) == draw(evaluation.load_policy(folder, adapters[0], device="cpu"), PROMPTS)


def test_a_model_in_memory_is_a_policy_and_its_adapter_can_be_switched_off(folder, adapters):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = evaluation.load_policy(folder, device="cpu")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapters[0]).eval()
    tuned = evaluation.Policy.from_model(model, loaded.tokenizer, adapter="default")
    assert draw(tuned.base(), PROMPTS) == draw(loaded, PROMPTS)
    assert draw(tuned, PROMPTS) != draw(loaded, PROMPTS)
    model.load_adapter(str(adapters[1]), adapter_name="second")
    second = evaluation.Policy.from_model(model, loaded.tokenizer, adapter="second")
    assert draw(tuned, PROMPTS) != draw(second, PROMPTS)
    assert model.active_adapter == "default"  # a trainer's own adapter stays switched on
    with pytest.raises(ValueError, match=r"adapters \['default', 'second'\]; got 'other'"):
        evaluation.Policy.from_model(model, loaded.tokenizer, adapter="other")


@pytest.fixture(scope="module")
def unlike(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of another rank, scaling and choice of layers than those of `adapters`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    lora = LoraConfig(
        r=3, lora_alpha=12, use_rslora=True, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False
    )
    place = tmp_path_factory.mktemp("unlike")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(place)
    return place


def logits(policy: evaluation.Policy) -> torch.Tensor:
    with policy.active() as model, torch.no_grad():
        return model(input_ids=torch.tensor([[6, 7, 8, 9, 20]])).logits.double()


def merged_logits(folder: Path, weights: dict[Path, float]) -> torch.Tensor:
    """Of a plain model whose weights are the base's plus the weighted sum of what each adapter, merged, changes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    total, base = load(), dict(load().named_parameters())
    for adapter, weight in weights.items():
        merged = dict(PeftModel.from_pretrained(load(), adapter).merge_and_unload().named_parameters())
        with torch.no_grad():
            for name, parameter in total.named_parameters():
                parameter += weight * (merged[name] - base[name])
    with torch.no_grad():
        return total(input_ids=torch.tensor([[6, 7, 8, 9, 20]])).logits


@pytest.mark.parametrize(
    "weights", [(0.5, 0.5), (0.3, 0.7), (1.0, 1.0), (1.5, -0.5), (0.25, 0.0)], ids=lambda pair: f"{pair[0]}_{pair[1]}"
)
def test_a_weighted_sum_of_adapters_is_that_of_their_merged_updates(folder, adapters, unlike, weights):
    mixture = dict(zip((adapters[0], unlike), weights, strict=True))
    mixed = evaluation.load_policy(folder, mixture, device="cpu", dtype=torch.float64)
    torch.testing.assert_close(logits(mixed), merged_logits(folder, mixture), rtol=1e-10, atol=1e-10)
    doubled = evaluation.load_policy(folder, mixture, share=mixed, scale=2.0)
    expected = merged_logits(folder, {place: 2 * weight for place, weight in mixture.items()})
    torch.testing.assert_close(logits(doubled), expected, rtol=1e-10, atol=1e-10)


def test_scales_of_one_adapter_stand_side_by_side_on_one_model(folder, adapters):
    """Each is exact whatever is active around it, nothing is loaded twice, and 1 and 0 are the plain policies."""
    whole = evaluation.load_policy(folder, adapters[0], device="cpu", dtype=torch.float64)
    scaled = {
        scale: evaluation.load_policy(folder, adapters[0], share=whole, scale=scale) for scale in (0, 0.3, 0.5, 1, -1)
    }
    sizes = sum(parameter.numel() for parameter in whole._weights.model.parameters())
    alone = evaluation.load_policy(folder, adapters[0], device="cpu", scale=0.3)
    assert sizes == sum(parameter.numel() for parameter in alone._weights.model.parameters())
    assert all(policy._weights is whole._weights for policy in scaled.values())
    expected = {scale: merged_logits(folder, {adapters[0]: scale}) for scale in scaled}
    assert (expected[0.3] - expected[0.5]).abs().max() > 1e-3
    for scale, policy in [*scaled.items(), *reversed(scaled.items())]:
        torch.testing.assert_close(logits(policy), expected[scale], rtol=1e-10, atol=1e-10)
        assert torch.equal(logits(whole), logits(scaled[1]))
        assert torch.equal(logits(whole.base()), logits(scaled[0]))
    with scaled[0.3].active():
        torch.testing.assert_close(logits(scaled[-1]), expected[-1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(logits(whole), expected[1], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(logits(scaled[0.3]), expected[0.3], rtol=1e-10, atol=1e-10)
    assert evaluation.load_policy(adapters[0], device="cpu", scale=0.5).name == f"0.5 {adapters[0].name}"


def test_several_policies_on_one_model_leave_each_other_alone(folder, adapters, unlike):
    first = evaluation.load_policy(folder, adapters[0], device="cpu", dtype=torch.float64)
    mixture = {adapters[0]: 0.5, unlike: 2.0}
    mixed = evaluation.load_policy(folder, mixture, share=first)
    before = logits(first)
    with mixed.active():
        assert torch.equal(logits(first), before)
        torch.testing.assert_close(logits(mixed), merged_logits(folder, mixture), rtol=1e-10, atol=1e-10)
    assert torch.equal(logits(first), before)
    assert first._weights.model.active_adapters == ["policy_0"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"bias": "lora_only"}, "has trained biases"),
        ({"modules_to_save": ["lm_head"]}, "has modules saved whole"),
    ],
    ids=["dora", "bias", "saved_whole"],
)
def test_an_adapter_that_cannot_be_scaled_is_refused_unless_taken_as_it_is(tmp_path, folder, options, reason):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=2, target_modules=["q_proj"], **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(tmp_path)
    evaluation.load_policy(folder, tmp_path, device="cpu")
    with pytest.raises(ValueError, match=f"scale: expected 1, and no other adapter, with one that {reason}"):
        evaluation.load_policy(folder, tmp_path, device="cpu", scale=0.5)


def test_scales_and_weights_that_make_no_sense_are_named(folder, adapters):
    with pytest.raises(ValueError, match=r"scale: expected 1 without an adapter; got 0\.5"):
        evaluation.load_policy(folder, scale=0.5)
    with pytest.raises(ValueError, match="scale: expected a finite number; got nan"):
        evaluation.load_policy(folder, adapters[0], scale=math.nan)
    with pytest.raises(ValueError, match="adapter: expected finite weights; got inf"):
        evaluation.load_policy(folder, {adapters[0]: math.inf})
    with pytest.raises(ValueError, match="adapter: expected at least one folder"):
        evaluation.load_policy(folder, {})


def test_folders_that_hold_no_policy_are_named(tmp_path, folder, adapters):
    with pytest.raises(ValueError, match="model: expected a model folder"):
        evaluation.load_policy(tmp_path)
    with pytest.raises(ValueError, match=r"adapter: expected a folder with an adapter_config\.json"):
        evaluation.load_policy(folder, tmp_path)
    with pytest.raises(ValueError, match="model: expected a folder or a hub name; got runs/no/where"):
        evaluation.load_policy("runs/no/where")
    with pytest.raises(ValueError, match=r"adapter: expected a folder or a hub name; got \./nowhere"):
        evaluation.load_policy(folder, "./nowhere")
    with pytest.raises(ValueError, match="is itself an adapter"):
        evaluation.load_policy(adapters[0], adapters[1])


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(OSError, match=f"model {tmp_path} could not be loaded"):
        evaluation.load_policy(tmp_path)


# Prompts and judges


def test_prompts_load_from_text_and_json_lines(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("first\n\n  second \n", encoding="utf-8")
    assert evaluation.load_prompts(text) == ["first", "second"]
    turns = [{"role": "user", "content": "hello"}]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": "a", "id": 1}) + "\n\n" + json.dumps({"prompt": turns}), encoding="utf-8")
    assert evaluation.load_prompts(lines) == ["a", turns]
    text.write_bytes("\ufefffirst\u2028line\r\nsecond\n".encode())
    assert evaluation.load_prompts(text) == ["first\u2028line", "second"]
    rows = [{"prompt": "a\u2028b"}, {"instruction": "Choose.", "input": "Which gas?"}, {"question": "Which gas?"}]
    lines.write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert evaluation.load_prompts(lines) == ["a\u2028b", "Choose.\nWhich gas?", "Which gas?"]


def test_columns_of_prompts_that_nothing_reads_are_named(tmp_path, caplog):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", "notes": "x", "id": 1}) + "\n", encoding="utf-8")
    assert evaluation.load_prompts(path) == ["a"]
    assert caplog.messages == [f"{path}: columns that are not used (rows that have them): notes (1)"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r"p\.jsonl:2: prompt: expected a string; got 3"),
        ("p.jsonl", '{"text": "a"}\n', r"p\.jsonl:1: prompt: expected a string; got None"),
        ("p.jsonl", '{"prompt": " "}\n', r"p\.jsonl:1: prompt: is empty"),
        ("p.jsonl", '{"prompt": [{"content": "a"}]}\n', r"p\.jsonl:1: prompt\[0\]\.role: expected a string"),
        (
            "p.jsonl",
            '{"prompt": [{"role": "assistant", "content": "a"}]}\n',
            r"p\.jsonl:1: prompt: ends with an assistant",
        ),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', r"p\.jsonl:1: prompt: is given twice"),
        ("p.jsonl", '{"prompt": "a", "input": "b"}\n', r"p\.jsonl:1: input: expected one column with .*does not hold$"),
        ("p.jsonl", "[1]\n", r"p\.jsonl:1: expected an object; got int"),
        ("p.jsonl", "[" * 100_000, r"p\.jsonl:1: not usable: JSON that is nested too deeply"),
        ("p.jsonl", '{"prompt": "a"\n', r"p\.jsonl:1: not valid JSON"),
        ("p.txt", "\n\n", "expected at least one prompt; got none"),
        ("p.csv", "a\n", r"prompts: expected a \.jsonl or \.txt file"),
    ],
)
def test_bad_prompt_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        evaluation.load_prompts(tmp_path / name)


def test_a_judge_sees_the_last_user_message():
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]
    assert evaluation.prompt_text(turns) == "two"
    assert evaluation.prompt_text("as it is") == "as it is"
    with pytest.raises(ValueError, match="role 'user'"):
        evaluation.prompt_text(turns[:1])


JUDGES = """
from __future__ import annotations
import dataclasses
import helper_of_judges

@dataclasses.dataclass
class Counter:
    word: str
    def __call__(self, prompt: str, response: str) -> float:
        return response.split().count(self.word)

GOOD = {"length": helper_of_judges.length, "w3": Counter("w3")}
EMPTY = {}
NOT_CALLABLE = {"length": 3}
"""


@pytest.fixture
def judge_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in ("helper_of_judges", "my_judges"):  # another test's copy, from another folder
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "helper_of_judges.py").write_text("def length(prompt, response):\n    return len(response.split())\n")
    file = tmp_path / "my_judges.py"
    file.write_text(JUDGES, encoding="utf-8")
    return file


def test_judges_load_from_a_file_with_its_neighbours_and_from_a_module_of_the_current_folder(judge_file, monkeypatch):
    monkeypatch.chdir(judge_file.parent)
    for spec in (f"{judge_file}:GOOD", "my_judges.py:GOOD", "my_judges:GOOD"):
        judges = evaluation.load_judges(spec)
        assert list(judges) == ["length", "w3"]
        assert judges["length"]("p", "w3 w4 w3") == 3
        assert judges["w3"]("p", "w3 w4 w3") == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_judges.py", 'judges: expected "package.module:ATTR"'),
        (":GOOD", 'judges: expected "package.module:ATTR"'),
        ("absent.py:GOOD", r"no file absent\.py"),
        ("no_such_module_here:GOOD", "module 'no_such_module_here' failed to import: ModuleNotFoundError"),
        ("my_judges.py:OTHER", "has no attribute 'OTHER'"),
        ("my_judges.py:EMPTY", "to be a non-empty dict"),
        ("my_judges.py:Counter", "to be a non-empty dict"),
        ("my_judges.py:NOT_CALLABLE", "expected str -> callable; got 'length': 3"),
        ("broken.py:GOOD", r"broken\.py failed to import: ZeroDivisionError"),
    ],
)
def test_bad_judge_specs_are_named(judge_file, monkeypatch, spec, message):
    monkeypatch.chdir(judge_file.parent)
    Path("broken.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=message):
        evaluation.load_judges(spec)


def test_scores_come_by_objective_prompt_and_sample_and_must_be_finite():
    judges = {"length": lambda prompt, response: len(response), "prompt": lambda prompt, response: len(prompt)}
    scores = evaluation.judge_responses(judges, ["ab", "c"], [["x", "yyy"], ["", "zz"]], progress=False)
    assert scores == {"length": [[1.0, 3.0], [0.0, 2.0]], "prompt": [[2.0, 2.0], [1.0, 1.0]]}
    with pytest.raises(ValueError, match=r"judge 'bad': expected finite scores; got \[nan\] for prompts\[0\]"):
        evaluation.judge_responses({"bad": lambda p, r: math.nan}, ["a"], [["b"]], progress=False)
    with pytest.raises(ValueError, match="expected a list for each of 2 prompts; got 1"):
        evaluation.judge_responses(judges, ["a", "b"], [["x"]], progress=False)


# Win rates


def test_win_rate_counts_every_pair_with_ties_one_half():
    rate = evaluation.win_rate([[1.0, 2.0], [5.0]], [[1.0, 0.0, 2.0], [6.0, 5.0]], objective="length")
    # prompt 0: 1 against (1, 0, 2) gives 1/2 + 1 + 0, 2 gives 1 + 1 + 1/2: 4 of 6. prompt 1: 0 + 1/2 of 2.
    assert rate.mean == pytest.approx((4 / 6 + 1 / 4) / 2)
    assert rate.ties == pytest.approx((2 / 6 + 1 / 2) / 2)
    assert (rate.objective, rate.prompts, rate.samples) == ("length", 2, 3)
    assert rate.low <= rate.mean <= rate.high


def test_win_rate_of_a_policy_over_itself_is_one_half():
    scores = np.random.default_rng(0).normal(size=(20, 5))
    assert evaluation.win_rate(scores, scores).mean == pytest.approx(0.5, abs=1e-15)


def test_win_rates_of_the_two_orders_sum_to_one():
    rng = np.random.default_rng(1)
    first, second = rng.integers(3, size=(2, 15, 4)).astype(float)
    forward, backward = evaluation.win_rate(first, second), evaluation.win_rate(second, first)
    assert forward.mean + backward.mean == pytest.approx(1.0)
    assert forward.low + backward.high == pytest.approx(1.0)


def test_the_interval_covers_the_true_win_rate_as_often_as_it_says():
    """300 synthetic experiments of 60 prompts: a per-prompt shift N(0.3, 1), noise N(0, 1) on every sample. True win
    rate P(shift + noise difference > 0) = Phi(0.3 / sqrt(3)). 95 % nominal; outside 0.91 to 0.99 has odds < 1e-3."""
    rng = np.random.default_rng(2)
    truth = 0.5 * (1.0 + math.erf(0.3 / math.sqrt(3.0) / math.sqrt(2.0)))
    covered = 0
    for trial in range(300):
        shift = rng.normal(0.3, 1.0, size=(60, 1))
        rate = evaluation.win_rate(shift + rng.normal(size=(60, 3)), rng.normal(size=(60, 3)), n_boot=400, seed=trial)
        covered += rate.low <= truth <= rate.high
    assert 0.91 <= covered / 300 <= 0.99


def test_the_interval_resamples_prompts_and_not_samples():
    """Every sample of a prompt wins or loses together, so more samples must not narrow the interval."""
    outcome = np.array([1.0, -1.0] * 10)[:, None]
    few = evaluation.win_rate(np.repeat(outcome, 2, axis=1), np.zeros((20, 2)))
    many = evaluation.win_rate(np.repeat(outcome, 50, axis=1), np.zeros((20, 50)))
    assert (few.low, few.high) == (many.low, many.high)
    # A normal interval for 20 coin flips is 0.5 +- 1.96 sqrt(0.25 / 20) = 0.5 +- 0.22.
    assert few.high - few.low == pytest.approx(0.44, abs=0.08)


def test_the_interval_depends_on_the_seed_and_widens_with_the_confidence(monkeypatch):
    rng = np.random.default_rng(3)
    candidate, baseline = rng.normal(size=(2, 40, 3))
    narrow = evaluation.win_rate(candidate, baseline, confidence=0.5)
    wide = evaluation.win_rate(candidate, baseline, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert evaluation.win_rate(candidate, baseline) == evaluation.win_rate(candidate, baseline)
    assert evaluation.win_rate(candidate, baseline, seed=1) != evaluation.win_rate(candidate, baseline, seed=2)


def test_the_bootstrap_gives_the_same_interval_when_it_works_in_blocks(monkeypatch):
    rng = np.random.default_rng(4)
    candidate, baseline = rng.normal(size=(2, 40, 3))
    whole = evaluation.win_rate(candidate, baseline)
    monkeypatch.setattr(evaluation.win_rates, "_BOOTSTRAP_BLOCK", 40 * 7)
    assert evaluation.win_rate(candidate, baseline) == whole


@pytest.mark.parametrize(
    ("candidate", "baseline", "options", "message"),
    [
        ([[1.0]], [[1.0]], {}, "prompts: expected at least 2 for an interval by prompt; got 1"),
        ([[1.0], [2.0]], [[1.0]], {}, "as many prompts as candidate_scores, 2; got 1"),
        ([[1.0], []], [[1.0], [1.0]], {}, r"candidate_scores\[1\]: expected a non-empty list of finite numbers"),
        ([[1.0], [1.0]], [[1.0], [math.inf]], {}, r"baseline_scores\[1\]: expected a non-empty list of finite numbers"),
        ([[1.0], [1.0]], [[1.0], [1.0]], {"confidence": 1.0}, r"confidence: expected a number in \(0, 1\); got 1\.0"),
        ([[1.0], [1.0]], [[1.0], [1.0]], {"n_boot": 0}, "n_boot: expected at least 1; got 0"),
    ],
)
def test_bad_scores_are_named(candidate, baseline, options, message):
    with pytest.raises(ValueError, match=message):
        evaluation.win_rate(candidate, baseline, **options)


def test_a_difference_is_that_of_the_win_rates_and_pairs_prompts():
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=(60, 1)) * 3.0  # what a prompt does to every policy's scores
    baseline = rng.normal(size=(60, 6))
    rival, candidate = (prompt + shift + rng.normal(size=(60, 6)) for shift in (0.0, 0.4))
    rates = [evaluation.win_rate(scores, baseline) for scores in (candidate, rival)]
    found = evaluation.win_rate_difference(candidate, rival, baseline, objective="kind")
    assert found.objective == "kind"
    assert found.prompts == 60
    assert found.mean == pytest.approx(rates[0].mean - rates[1].mean)
    assert found.low < found.mean < found.high
    assert found.high - found.low < 0.5 * (rates[0].high - rates[0].low)
    back = evaluation.win_rate_difference(rival, candidate, baseline)
    assert back.mean == pytest.approx(-found.mean)
    assert evaluation.win_rate_difference(rival, rival, baseline).high == 0.0


def test_a_difference_needs_the_same_prompts():
    with pytest.raises(ValueError, match="rival_scores: expected as many prompts as baseline_scores, 2; got 1"):
        evaluation.win_rate_difference([[1.0], [2.0]], [[1.0]], [[1.0], [2.0]])
    with pytest.raises(ValueError, match=r"rival_scores\[1\]: expected a non-empty list of finite numbers; got \[\]"):
        evaluation.win_rate_difference([[1.0], [2.0]], [[1.0], []], [[1.0], [2.0]])


def test_length_statistics_count_words_or_tokens(policy):
    responses = [["w1 w2 w3", ""], ["w1", "w1 w2 w3 w4"]]
    words = evaluation.length_statistics(responses)
    assert (words.unit, words.count, words.mean, words.median, words.longest, words.empty) == (
        "words",
        4,
        2.0,
        2.0,
        4,
        0.25,
    )
    tokens = evaluation.length_statistics([["w1 w2"], ["w1w2 w3"]], policy.tokenizer)
    assert (tokens.unit, tokens.mean, tokens.longest) == ("tokens", 2.0, 2)
    with pytest.raises(ValueError, match="at least one response"):
        evaluation.length_statistics([[]])


# Whole comparisons


def test_comparing_policies_reports_rates_lengths_and_samples_and_repeats_exactly(folder, adapters):
    tuned = evaluation.load_policy(folder, adapters[0], device="cpu")
    judges = {
        "length": lambda p, r: len(r.split()),
        "early words": lambda p, r: -max([int(w[1:]) for w in r.split()] + [0]),
    }
    options = {"samples_per_prompt": 3, "max_new_tokens": 5, "batch_size": 8, "progress": False, "n_boot": 200}
    first = evaluation.compare_policies(tuned, tuned.base(), PROMPTS, judges, seed=5, **options)
    assert first == evaluation.compare_policies(tuned, tuned.base(), PROMPTS, judges, seed=5, **options)
    assert first != evaluation.compare_policies(tuned, tuned.base(), PROMPTS, judges, seed=6, **options)
    report = json.loads(json.dumps(first.as_dict()))
    assert set(report["win_rates"]) == set(judges)
    assert report["length"]["candidate"]["unit"] == "tokens"
    assert [sample["prompt"] for sample in report["samples"]] == PROMPTS
    recounted = evaluation.win_rate(
        [sample["candidate_scores"]["length"] for sample in report["samples"]],
        [sample["baseline_scores"]["length"] for sample in report["samples"]],
    )
    assert report["win_rates"]["length"]["mean"] == recounted.mean
    assert "samples" not in first.as_dict(responses=False)


def test_bad_bootstrap_options_are_refused_before_anything_is_sampled(policy, monkeypatch):
    def never(*args, **options):
        raise AssertionError("sampled")

    monkeypatch.setattr(evaluation.compare, "sample_responses", never)
    for prompts, options in ((["w1"], {}), (PROMPTS, {"confidence": 1.0}), (PROMPTS, {"n_boot": 0})):
        with pytest.raises(ValueError, match="expected"):
            evaluation.compare_policies(policy, policy, prompts, {"length": lambda p, r: len(r)}, **options)


def test_a_policy_compared_with_itself_is_sampled_independently_and_sits_at_parity(policy):
    """The two sides draw different samples, so the win rate is near 0.5 without being 0.5 by construction."""
    judges = {"first word": lambda prompt, response: int((response.split() or ["w0"])[0][1:])}
    comparison = evaluation.compare_policies(
        policy, policy, PROMPTS, judges, samples_per_prompt=64, max_new_tokens=1, batch_size=64, progress=False
    )
    assert comparison.candidate != comparison.baseline
    # Var of a two-sample win rate is about (1/n + 1/m) / 12 a prompt: 5 standard errors over 5 prompts.
    assert comparison.win_rates["first word"].mean == pytest.approx(0.5, abs=5 * math.sqrt((2 / 64) / 12 / 5))
