"""A prompt computed once for all its responses gives what a row per response gives, gradients included."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_samples import CONFIGS, lora, make_config, make_data, make_model, make_tokenizer, make_trainer
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen3Config,
)

from mopo_kernels.data import PreferenceCollator, PreferenceExample, PreferencePair
from mopo_kernels.data.collator import ExampleSize
from mopo_kernels.trainer import MOPOTrainer, sampler, shared_prompts
from mopo_kernels.trainer.batch_layout import take_layout
from mopo_kernels.trainer.sampler import TokenBudgetSampler
from mopo_kernels.trainer.shared_prompts import SEGMENTED, row_mask, share_prompts

_SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
MORE = {
    "phi": PhiConfig(**_SMALL, num_attention_heads=2, partial_rotary_factor=0.5),
    "qwen3": Qwen3Config(**_SMALL, **_HEADS, head_dim=8),
    "mistral": MistralConfig(**_SMALL, **_HEADS, sliding_window=12),
}
SHARING = ("llama", "llama-tied", "phi", "opt", "qwen3", "gpt2", "granite", "cohere", "mistral")


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Without dropout."""
    if name not in MORE:
        return make_model(name, dtype=dtype).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(MORE[name])).to(dtype).eval()


def batches(prompts: int = 3, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same examples, a row per response and one row."""
    examples = list(make_data(prompts, seed=3))
    names = ["helpful", "brief"]
    return tuple(  # type: ignore[return-value]
        PreferenceCollator(make_tokenizer(), names, shared_prompts=shared, **changes)(examples)
        for shared in (False, True)
    )


def scored(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return take_layout(dict(batch)).scored(model)


@pytest.mark.parametrize("implementation", [SEGMENTED, "sdpa"])
@pytest.mark.parametrize("name", SHARING)
def test_rows_and_gradients_are_those_of_separate_rows(name: str, implementation: str) -> None:
    model = model_of(name)
    separate, shared = batches()
    assert share_prompts(model, 12) is None
    assert model.config._attn_implementation == SEGMENTED
    expected = scored(model, separate)
    model.set_attn_implementation(implementation)
    found = scored(model, shared)
    assert torch.equal(found.target, expected.target)
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
    assert torch.equal(found.lengths, expected.lengths)
    # Norms and rotations are computed in fp32 whatever the model's dtype.
    assert float((found.hidden - expected.hidden).norm()) <= 1e-6 * float(expected.hidden.norm())
    up = torch.randn_like(found.hidden)
    wanted = [p for p in model.parameters() if p.requires_grad]
    for first, second, (parameter, _) in zip(
        torch.autograd.grad(expected.hidden, wanted, up, allow_unused=True),
        torch.autograd.grad(found.hidden, wanted, up, allow_unused=True),
        model.named_parameters(),
        strict=True,
    ):
        if first is None or second is None:
            assert first is second is None, parameter
            continue
        assert float((first - second).norm()) <= 1e-6 * max(1.0, float(first.norm())), parameter


def test_the_block_mask_is_the_mask() -> None:
    segments, counts = torch.tensor([3, 2, 0, 4, 1, 2]), torch.tensor([3, 1])
    cpu = torch.device("cpu")
    mask = shared_prompts.block_mask(segments, counts, cpu)
    tokens = int(segments.sum())
    q, k = torch.arange(tokens)[:, None].expand(tokens, tokens), torch.arange(tokens).expand(tokens, tokens)
    assert torch.equal(mask.mask_mod(None, None, q, k), row_mask(segments, counts, cpu)[0, 0])
    # By hand: the first response's second token sees the prompt and itself; the third's last one nothing of the first.
    seen = row_mask(segments, counts, cpu)[0, 0].int().tolist()
    assert seen[4] == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert seen[8] == [1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert seen[11] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", ["llama", "phi", "opt", "qwen3"])
def test_flex_attention_gives_the_rows_of_separate_rows(name: str) -> None:
    """Without gradients, which it does not have on a CPU."""
    model = model_of(name, torch.float32)
    separate, shared = batches()
    expected = scored(model, separate)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert share_prompts(model, None) is None
        assert model.config._attn_implementation == "flex_attention"
        found = scored(model, shared)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=0, atol=1e-5)


def test_one_token_responses_and_a_missing_prompt() -> None:
    class Split:
        """A tokenizer that knows numbers only, so that a text can be without a token."""

        eos_token, eos_token_id, pad_token_id = "<eos>", 1, 0
        bos_token = chat_template = None

        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[int(word) for word in text.split() if word.isdigit()] for text in texts]}

    pairs = (PreferencePair(0, 1, {"a": 1.0}),)
    examples = [PreferenceExample("-", (" 7", " 8 9 4"), pairs), PreferenceExample("5 6", (" -", " 9"), pairs)]
    model = model_of("llama")
    assert share_prompts(model, None) is None
    rows = [
        scored(model, PreferenceCollator(Split(), ["a"], shared_prompts=shared)(examples)) for shared in (False, True)
    ]
    assert rows[1].target.tolist() == rows[0].target.tolist() == [1, 9, 4, 1, 1, 9, 1]
    assert rows[1].cu_seqlens.tolist() == [0, 1, 4, 5, 7]
    torch.testing.assert_close(rows[1].hidden, rows[0].hidden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_training_is_that_of_separate_rows(checkpointing: bool, adapter: bool, tmp_path: Path) -> None:
    ends = {}
    for shared in ("never", "always"):
        model = make_model(dtype=torch.float64)
        model = lora(model).double() if adapter else model
        trainer = make_trainer(
            tmp_path / shared,
            model,
            shared_prompts=shared,
            gradient_checkpointing=checkpointing,
            optim="sgd",
            max_steps=3,
            estimator="snis",
            eval_dataset=make_data(5, seed=9),
        )
        trainer.train()
        metrics = trainer.evaluate()
        ends[shared] = ({n: p.detach() for n, p in trainer.model.named_parameters()}, metrics, trainer.dual.multiplier)
        assert (trainer.model.config._attn_implementation == SEGMENTED) == (shared == "always")
    for name, value in ends["never"][0].items():
        torch.testing.assert_close(ends["always"][0][name], value, rtol=1e-5, atol=1e-6, msg=name)
    for key in ("eval_loss", "eval_satisfaction/brief", "eval_kl", "eval_margin"):
        assert ends["always"][1][key] == pytest.approx(ends["never"][1][key], rel=1e-5), key
    assert ends["always"][2] == pytest.approx(ends["never"][2], rel=1e-5)


def test_what_cannot_share_says_why_and_takes_separate_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The default of some releases of transformers; others have sdpa, which leaves its cap out.
    model = make_model("gemma2")
    model.set_attn_implementation("eager")
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, model)
    assert not trainer.data_collator.shared_prompts
    (line,) = [record.getMessage() for record in caplog.records if "prompts are" in record.getMessage()]
    assert line == (
        "prompts are computed anew for each response, as Gemma2ForCausalLM cannot share them: attn_implementation is "
        "eager, not sdpa or flex_attention"
    )
    with pytest.raises(ValueError, match=r"shared_prompts: expected a model that can .* Gemma2ForCausalLM cannot"):
        make_trainer(tmp_path, model, shared_prompts="always")
    with pytest.raises(ValueError, match="shared_prompts: expected one of auto, always, never; got 'yes'"):
        make_trainer(tmp_path, shared_prompts="yes")


def test_a_window_must_cover_the_longest_row() -> None:
    model = model_of("mistral")
    assert share_prompts(model, 12) is None
    assert share_prompts(model, 13) == "its layers see 12 tokens, and max_length is 13"
    assert share_prompts(model, None) == "its layers see 12 tokens, and max_length is None"


def test_the_window_must_cover_the_rows_of_a_given_collator(tmp_path: Path) -> None:
    data = make_data(4)
    collator = PreferenceCollator(make_tokenizer(), data.objectives, shared_prompts=True)
    with pytest.raises(ValueError, match=r"data_collator: expected shared_prompts=False.*max_length is None"):
        MOPOTrainer(
            model_of("mistral"),
            make_config(tmp_path, max_length=8),
            data_collator=collator,
            train_dataset=data,
            processing_class=make_tokenizer(),
        )


def test_a_mask_that_a_layer_makes_itself_is_not_thrown_away() -> None:
    """Doge's layers add a trained term to the mask they are given, which is 0 in a fresh model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DogeConfig(**_SMALL, **_HEADS, keep_window_size=64)).double().eval()
    separate, shared = batches()
    expected = scored(model, separate).hidden
    assert share_prompts(model, None) == "its layers see 64 tokens, and max_length is None"
    whole, cut = (model.base_model(torch.tensor([[3, 4, 5, 6]])[:, :n]).last_hidden_state[:, :2] for n in (4, 2))
    if not torch.allclose(whole, cut):
        # In some releases of transformers a row without padding is given no mask, so that its tokens see later ones.
        assert "off by" in str(share_prompts(model, 64))
        return
    assert share_prompts(model, 64) is None
    assert model.config._attn_implementation == "sdpa"
    found = scored(model, shared).hidden
    trained = [p for name, p in model.named_parameters() if name.endswith(".A")]
    up = torch.randn_like(expected)
    for first, second in zip(
        torch.autograd.grad(expected, trained, up), torch.autograd.grad(found, trained, up), strict=True
    ):
        assert float(first.norm()) > 0
        assert float((first - second).norm()) <= 1e-5 * float(first.norm())


@pytest.mark.parametrize(("max_length", "warned"), [(None, True), (30, True), (29, False)])
def test_positions_that_move_with_the_longest_row_are_warned_of(
    max_length: int | None, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 30,
    }
    config = LlamaConfig(**_SMALL, **_HEADS, rope_parameters=rope, max_position_embeddings=40)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, AutoModelForCausalLM.from_config(config), max_length=max_length)
    assert any("longrope positions depend on the longest row" in line for line in caplog.messages) == warned


def test_a_recurrent_model_is_found_out() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
    )
    model.config._attn_implementation_internal = "sdpa"
    before = model.config._attn_implementation
    assert share_prompts(model, None) is not None
    assert model.config._attn_implementation == before


def test_a_leak_between_responses_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_before(segment_length: Tensor, response_count: Tensor, device: torch.device) -> Any:
        tokens = int(segment_length.sum())
        return shared_prompts.Segments([tokens], [0], [])

    monkeypatch.setattr(shared_prompts.Segments, "of", staticmethod(all_before))
    monkeypatch.setattr(
        shared_prompts, "row_mask", lambda a, b, device: torch.ones(1, 1, int(a.sum()), int(a.sum())).tril().bool()
    )
    reason = share_prompts(model_of("llama"), None)
    assert "off by" in str(reason)


def test_generation_after_training_is_that_of_sdpa(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    tokens = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.model(input_ids=tokens, attention_mask=mask).logits
        trainer.model.set_attn_implementation("sdpa")
        expected = trainer.model(input_ids=tokens, attention_mask=mask).logits
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0, 2:], expected[0, 2:])
    trainer.model.save_pretrained(tmp_path / "model")
    assert SEGMENTED not in (tmp_path / "model" / "config.json").read_text()


def test_the_architectures_of_the_samples_are_all_here() -> None:
    assert set(CONFIGS) - set(SHARING) == {"gemma2"}, "eager by default, as sdpa has no soft cap"


# ------------------------------------------------------------------------------------------------------------- sampler


def sizes(count: int = 37) -> list[ExampleSize]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        n, prompt, longest = (int(torch.randint(2, high, (), generator=generator)) for high in (5, 30, 60))
        made.append(ExampleSize(n, prompt + longest, prompt + n * longest - n))
    return made


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_example_is_in_one_batch_within_the_budget(ranks: int, shared: bool) -> None:
    made = sizes()
    parts = [
        TokenBudgetSampler(made, 700, shared_prompts=shared, seed=5, ranks=ranks, rank=rank) for rank in range(ranks)
    ]
    for epoch in (0, 1):
        for part in parts:
            part.set_epoch(epoch)
        batches = [list(part) for part in parts]
        assert {len(own) for own in batches} == {len(parts[0])}
        seen = [index for own in batches for batch in own for index in batch]
        assert sorted(seen) == list(range(len(made)))
        for own in batches:
            for batch in own:
                rows = sum(made[index].responses for index in batch)
                padded = rows * max(made[index].longest for index in batch)
                assert (sum(made[index].tokens for index in batch) if shared else padded) <= 700
    assert list(parts[0]) == list(parts[0])
    parts[0].set_epoch(0)
    assert list(parts[0]) != batches[0]


def test_grouping_by_length_wastes_less_than_chance() -> None:
    made = sizes(400)

    def padding(sampler: TokenBudgetSampler) -> float:
        used = sum(made[i].responses * made[i].longest for batch in sampler for i in batch)
        return 1 - used / sum(sampler.cost(batch) for batch in sampler)

    grouped = TokenBudgetSampler(made, 700, shared_prompts=False)
    chance = TokenBudgetSampler(made, 700, shared_prompts=False, shuffle=False)
    assert padding(grouped) < 0.25 * padding(chance)


def test_planning_looks_at_an_example_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    batch_tokens = sampler.batch_tokens

    def counted(sizes: list[ExampleSize], shared_prompts: bool) -> int:
        nonlocal looks
        looks += len(sizes)
        return batch_tokens(sizes, shared_prompts)

    monkeypatch.setattr(sampler, "batch_tokens", counted)
    made = [ExampleSize(2, 3, 4)] * 500
    assert len(TokenBudgetSampler(made, 10**6, shared_prompts=True)) == 1
    assert looks <= 4 * len(made)


def test_fewer_examples_than_ranks_and_one_too_long() -> None:
    parts = [TokenBudgetSampler(sizes(2), 700, shared_prompts=True, ranks=3, rank=rank) for rank in range(3)]
    assert {index for part in parts for batch in part for index in batch} == {0, 1}
    assert [len(part) for part in parts] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"max_tokens_per_batch: expected at least 201, the tokens of example 1 "):
        TokenBudgetSampler([ExampleSize(2, 50, 80), ExampleSize(4, 60, 201)], 200, shared_prompts=True)


def test_training_by_tokens_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_tokens_per_batch": 60,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
    }
    whole = make_trainer(tmp_path / "whole", data=make_data(30), **settings)
    assert len(whole.get_train_dataloader()) > 7
    whole.train()
    part = make_trainer(tmp_path / "part", data=make_data(30), **settings)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for (name, expected), found in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert [line["loss"] for line in part.state.log_history if "loss" in line] == [
        line["loss"] for line in whole.state.log_history if "loss" in line
    ]
    with pytest.raises(ValueError, match="train_sampling_strategy: expected random or sequential"):
        make_trainer(tmp_path, train_sampling_strategy="group_by_length")


def test_a_model_whose_rows_depend_on_their_padding_is_refused(tmp_path):
    model = make_model()
    make_trainer(tmp_path, model, shared_prompts="never")
    model.model.embed_tokens.register_forward_hook(lambda module, given, output: output + output.mean(1, keepdim=True))
    with pytest.raises(ValueError, match=r"model: expected LlamaForCausalLM to compute a row as it computes it alone"):
        make_trainer(tmp_path, model, shared_prompts="never")
