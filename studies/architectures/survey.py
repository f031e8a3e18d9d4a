"""Every causal architecture of transformers, tiny and with random weights, in MOPOTrainer at learning rate 0.

python -m studies.architectures            # rewrites README.md beside this, in about 10 minutes on one core
python -m studies.architectures opt llama  # prints the rows of some
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mopo_kernels.data import PreferenceCollator
from mopo_kernels.data.synthetic import byte_tokenizer, random_preferences
from mopo_kernels.trainer import MOPOConfig, MOPOTrainer
from mopo_kernels.trainer.batch_layout import take_layout
from mopo_kernels.trainer.noise import configurations

PAGE = Path(__file__).with_name("README.md")
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
OBJECTIVES = ("first", "second")

# What a result can be.
EXACT, REFUSED, NOT_BUILT = "exact", "refused", "not built"
# Most that an architecture may be off by: rounding in fp32, of numbers whose size is a few nats a token.
LIMITS = {"logprob": 1e-4, "kl": 1e-6, "satisfaction": 1e-6, "tie_gradient": 1e-4}
_MOST_PARAMETERS = 20_000_000

_HIDDEN, _HEADS, _HEAD = 32, 4, 8
# Sizes that fit each other, by the names that configurations have for them. Those a configuration has not are left out.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "lru_width", "emb_dim"), _HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "n_inner", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "encoder_ffn_dim", "d_inner", "dim_ff", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_decoder_attention_heads",), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_channels"), _HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "dim_head", "d_kv"), _HEAD),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "index_n_heads"), _HEADS),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_d_conv"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_words"), 258),
    "hidden_size_per_layer_input": 8,
    "word_embed_proj_dim": _HIDDEN,
    "rotary_dim": 4,
    "attn_layer_indices": [1],
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "attention_hidden_size": _HIDDEN,
    "expand": 1,
    "mamba_d_ssm": 64,
    "num_kv_shared_layers": 0,
    # None of the tokens that rows here have: some models count positions by it.
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    "is_decoder": True,
}  # fmt: skip
# What a configuration may leave open.
_OPEN = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "attn_layer_indices")


@dataclass(frozen=True)
class Result:
    """What an architecture did.

    Attributes:
        name: its ``model_type``.
        model: the class of its causal language model.
        state: ``EXACT``, ``REFUSED`` by the trainer, or ``NOT_BUILT``.
        message: why, where it is not exact.
        shared: whether a prompt is computed once for its responses.
        errors: by name of ``LIMITS``: the largest difference of a response's log-probability from the model's own on
            the row alone (nats a token), the KL to the reference and the distance of satisfaction from 0.5 at learning
            rate 0, and the norm of the gradient on ties over that on labels.
    """

    name: str
    model: str
    state: str
    message: str
    shared: bool
    errors: Mapping[str, float]


def tiny_config(name: str) -> Any:
    """The configuration of an architecture with small sizes; its dropout and all else are its own."""
    config = AutoConfig.for_model(name)
    for part in configurations(config):
        own = {key for key in dir(part) if not key.startswith("_")}
        for key, value in _SIZES.items():
            if key.endswith("_token_id") or (key in own and (key in _OPEN or _value(part, key) is not None)):
                _try_set(part, key, [value] * 2 if isinstance(_value(part, key), list) and value == 48 else value)
        if "kv_lora_rank" in own:
            _try_set(part, "num_key_value_heads", _HEADS)
        kinds = list(getattr(part, "layer_types", None) or [])
        if kinds:
            # One layer of every kind.
            short = list(dict.fromkeys(kinds))
            short = short if len(short) > 1 else short * 2
            _try_set(part, "layer_types", short)
            _try_set(part, "num_hidden_layers", len(short))
    return config


def _value(config: Any, key: str) -> Any:
    """None where a configuration has it for each layer apart."""
    try:
        return getattr(config, key, None)
    except Exception:  # whatever a property raises
        return None


def _try_set(config: Any, key: str, value: Any) -> None:
    """Some names are properties of others."""
    try:
        setattr(config, key, value)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return


def tiny_model(name: str) -> Any:
    """An architecture with random weights large enough for every part of it to matter.

    Raises:
        ValueError: its configuration makes no causal language model of this size.
    """
    config = tiny_config(name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters by the sizes that its configuration is given here")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
        if isinstance(head := model.get_output_embeddings(), nn.Linear):
            head.weight.mul_(3)
    return model


def survey(name: str) -> Result:
    """Try one architecture."""
    try:
        model = tiny_model(name)
        # What it says of itself: some can be made and not be run.
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.arange(8)[None], use_cache=False).logits
        if not torch.isfinite(logits).all():
            raise ValueError("its logits are not finite")
    except Exception as error:  # whatever a model's own code says to sizes that it was not made for
        return _without(name, "", NOT_BUILT, error)
    kind = type(model).__name__
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = _trainer(model, folder)
        except ValueError as error:
            return _without(name, kind, REFUSED, error)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "kl" in line]
        satisfaction = [line[f"in_sample/satisfaction/{objective}"] for line in lines for objective in OBJECTIVES]
        errors = {
            "logprob": _logprob_error(trainer),
            "kl": max(line["kl"] for line in lines),
            "satisfaction": max(abs(value - 0.5) for value in satisfaction),
            "tie_gradient": _tie_gradient(trainer),
        }
    return Result(name, kind, EXACT, "", trainer.data_collator.shared_prompts, errors)


def _without(name: str, model: str, state: str, error: Exception) -> Result:
    message = " ".join(str(error).split()) or type(error).__name__
    return Result(name, model, state, message[:240], False, {})


def _trainer(model: Any, folder: str) -> MOPOTrainer:
    return MOPOTrainer(
        model,
        MOPOConfig(
            output_dir=folder,
            primary="first",
            tau=0.5,
            learning_rate=0.0,
            max_steps=1,
            per_device_train_batch_size=3,
            logging_steps=1,
            reference="precomputed",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=random_preferences(
            OBJECTIVES, examples=3, responses=3, prompt_length=6, response_length=6, seed=1
        ),
        processing_class=byte_tokenizer(),
    )


def _logprob_error(trainer: MOPOTrainer) -> float:
    """Against the model's own logits of each row alone, without padding: nats a token."""
    model, data, collator = trainer.model, trainer.train_dataset, trainer.data_collator
    model.eval()
    with torch.no_grad():
        found = model._mopo_policy.sequence_logprob(model, take_layout(dict(collator(list(data))))).tolist()
        expected, count = [], []
        for item in PreferenceCollator(collator.tokenizer, OBJECTIVES).tokenize(list(data)):
            for response in item.responses:
                row = torch.tensor([*item.prompt, *response])
                logits = model(input_ids=row[None], use_cache=False).logits[0]
                logprob = torch.log_softmax(logits.double(), -1)
                scored = logprob[:-1].gather(1, row[1:, None])[len(item.prompt) - 1 :]
                expected.append(float(scored.sum()))
                count.append(len(response))
    return max(abs(a - b) / tokens for a, b, tokens in zip(found, expected, count, strict=True))


def _tie_gradient(trainer: MOPOTrainer) -> float:
    model, batch = trainer.model, trainer.data_collator(list(trainer.train_dataset))
    model.train()
    norms = []
    for preference in (batch["preference"], torch.full_like(batch["preference"], 0.5)):
        model.zero_grad()
        inputs = trainer._prepare_inputs({**batch, "preference": preference})
        model(**inputs, objective_weight=trainer.objective_weight)["loss"].backward()
        gradients: list[Tensor] = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.stack(gradients).norm()))
    return norms[1] / norms[0]


def page(results: Iterable[Result], left_out: Iterable[str] = ()) -> str:
    """The document."""
    results = list(results)
    counts = Counter(result.state for result in results)
    worst = {key: max((r.errors[key] for r in results if r.errors), default=0.0) for key in LIMITS}
    lines = [
        "# Architectures",
        "",
        "Every causal language model that transformers "
        f"{transformers.__version__} lists, made tiny with random weights, its own dropout and attention, and given "
        f"to `MOPOTrainer` in full fine-tuning at learning rate 0: {counts[EXACT]} are exact, {counts[REFUSED]} are "
        f"refused with a reason, {counts[NOT_BUILT]} could not be made this way. `python -m studies.architectures` "
        "writes this page; `make test-slow` tries all of it again, and fails where one is neither exact nor refused.",
        "",
        "Exact: a response's log-probability is the model's own on its row alone (at most "
        f"{worst['logprob']:.1e} nats a token off), the KL to the reference is 0 (at most {worst['kl']:.1e}), every "
        f"satisfaction is 0.5 (at most {worst['satisfaction']:.1e} off), and ties have no gradient (at most "
        f"{worst['tie_gradient']:.1e} of that of labels). Prompts once: each computed once for all its responses.",
        "",
        "| architecture | model | prompts once | log-probability, nats a token | KL | ties' gradient |",
        "|---|---|---|---:|---:|---:|",
    ]
    for result in results:
        if result.state == EXACT:
            errors = result.errors
            cells = [f"{errors[key]:.1e}" if errors[key] else "0" for key in ("logprob", "kl", "tie_gradient")]
            lines.append(
                f"| {result.name} | {result.model} | {'yes' if result.shared else 'no'} | {' | '.join(cells)} |"
            )
    for state, title in ((REFUSED, "Refused"), (NOT_BUILT, "Not made")):
        lines += ["", f"## {title}", "", "| architecture | why |", "|---|---|"]
        for result in results:
            if result.state == state:
                why = result.message.removeprefix("model: ").replace("|", "\\|").replace("<", "&lt;")
                lines.append(f"| {result.name} | {why} |")
    if names := ", ".join(left_out):
        lines += ["", f"Left out here, for the time that they take on a CPU: {names}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures to try; default: all, for the page")
    parser.add_argument("--skip", nargs="*", default=[], help="architectures to leave out of the page")
    given = parser.parse_args()
    names, skip = given.names, given.skip
    transformers.logging.set_verbosity_error()
    show = partial(print, flush=True)
    results = []
    for name in names or [name for name in NAMES if name not in skip]:
        results.append(survey(name))
        show(name, results[-1].state, results[-1].message or dict(results[-1].errors))
    if not names:
        PAGE.write_text(page(results, skip), encoding="utf-8")
        show(f"wrote {PAGE}")
