"""A tiny tokenizer, tiny models and tiny data for the trainer's tests: seconds on one core."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from mopo_kernels.data import PreferenceData, PreferenceExample, PreferencePair
from mopo_kernels.trainer import MOPOConfig, MOPOTrainer

WORDS = [f"w{i}" for i in range(60)]
VOCABULARY = 64
DOUBLE = torch.float64

_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}

CONFIGS = {
    "llama": LlamaConfig(**_SMALL, **_HEADS, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SMALL, **_HEADS, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=12,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.0,
    ),
    # Caps and scales far from 1, so that leaving one out shows.
    "gemma2": Gemma2Config(**_SMALL, **_HEADS, head_dim=8, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**_SMALL, **_HEADS, logit_scale=0.25, bos_token_id=1, eos_token_id=1),
    "granite": GraniteConfig(**_SMALL, **_HEADS, logits_scaling=4.0),
}


# A mixture of experts that asks for its load-balancing loss, with a coefficient that shows.
EXPERTS = MixtralConfig(
    **_SMALL,
    **_HEADS,
    num_local_experts=4,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.3,
    output_router_logits=True,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model(name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose logits spread over a few nats."""
    torch.manual_seed(seed)
    # A copy: the Trainer writes the tokenizer's padding token into a model's configuration.
    if name == "experts":
        # torch's grouped products have no fp64.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(EXPERTS), experts_implementation="eager").to(dtype)
    else:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def make_data(prompts: int = 8, seed: int = 0) -> PreferenceData:
    """Prompts with 2 to 4 responses of unequal length, every pair; ``helpful`` and ``brief`` partly conflict.

    ``helpful`` prefers the longer response, ``brief`` the shorter on three pairs of four; one label of each in ten is
    missing. Weights differ between prompts.
    """
    rng = random.Random(seed)
    examples = []
    for _ in range(prompts):
        lengths = [rng.randint(1, 8) for _ in range(rng.randint(2, 4))]
        # They go on with the prompt: a word of its own begins with a space.
        responses = tuple("".join(f" {rng.choice(WORDS)}" for _ in range(length)) for length in lengths)
        pairs = []
        for i in range(len(lengths)):
            for j in range(i):
                longer = 0.5 + 0.5 * ((lengths[i] > lengths[j]) - (lengths[i] < lengths[j]))
                brief = 1 - longer if rng.random() < 0.75 else longer
                pairs.append(
                    PreferencePair(
                        i,
                        j,
                        {
                            "helpful": None if rng.random() < 0.1 else longer,
                            "brief": None if rng.random() < 0.1 else brief,
                        },
                    )
                )
        prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))
        examples.append(PreferenceExample(prompt, responses, tuple(pairs), weight=rng.choice([0.7, 1.0, 1.3])))
    return PreferenceData.from_examples(examples, ["helpful", "brief"])


# Multipliers that follow a few held-out prompts at every step, which no one should want outside a test.
STEERED: dict[str, Any] = {"dual_steps": 1, "dual_effective_prompts": 1, "dual_warmup_steps": 0, "dual_lr": 0.1}


def make_dual_data(prompts: int = 8, seed: int = 100) -> PreferenceData:
    """As ``make_data``, with prompts that it never has."""
    examples = [replace(example, prompt=f"held out {example.prompt}") for example in make_data(prompts, seed)]
    return PreferenceData.from_examples(examples, ["helpful", "brief"])


def brevity(prompt: str, response: str) -> float:
    """A judge: the shorter the better."""
    return -len(response.split())


def make_config(folder: Path, **changes: Any) -> MOPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "tau": 0.5,
        "primary": "helpful",
        "thresholds": {"brief": 0.4},
        "save_strategy": "no",
    }
    return MOPOConfig(**{**settings, **changes})


def make_trainer(folder: Path, model: Any = None, data: PreferenceData | None = None, **changes: Any) -> MOPOTrainer:
    given = {
        name: changes.pop(name)
        for name in ("eval_dataset", "dual_dataset", "judges", "data_collator")
        if name in changes
    }
    return MOPOTrainer(
        make_model() if model is None else model,
        make_config(folder, **changes),
        train_dataset=make_data() if data is None else data,
        processing_class=make_tokenizer(),
        **given,
    )


def fresh(model: Any) -> Any:
    """``model``, of :func:`lora`, with the B of a new adapter, which is 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return model


def lora(model: Any, **changes: Any) -> Any:
    """``model`` under LoRA whose B is not 0, so that every adapter weight has a gradient."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return wrapped


class Recorder(TrainerCallback):
    """The gradients just before each optimiser step, and the multipliers after it."""

    def __init__(self, trainer: MOPOTrainer) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.multipliers: list[dict[str, float]] = []
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.multipliers.append(self.trainer.dual.multiplier)


def record(trainer: MOPOTrainer) -> Recorder:
    """What the trainer did while it trained."""
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


def batch_of(trainer: MOPOTrainer, count: int = 3) -> dict[str, Any]:
    """A batch with reference log-probabilities made up in fp64."""
    data = make_data(count, seed=5)
    # A row per response, as the oracle has it; tests/trainer/test_layout.py compares the other layout with this one.
    batch = replace(trainer.data_collator, shared_prompts=False)([data[i] for i in range(count)])
    generator = torch.Generator().manual_seed(3)
    batch["ref_logprob"] = torch.randn(batch["input_ids"].shape[0], generator=generator, dtype=DOUBLE) * 3 - 20
    return batch


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Any]:
    """The loss's gradient with respect to each trained parameter; None where it does not depend on it."""
    model.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first: Any, second: Any, path: str = "") -> None:
    """Asserts bitwise equality of nested containers of tensors and numbers."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, path
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            same(a, b, f"{path}/{index}")
    else:
        assert first == second, path
