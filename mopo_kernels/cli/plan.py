"""What ``mopo train --dry_run true`` prints: the plan of a run, from its data and the model's configuration alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mopo_kernels.data import PreferenceCollator, PreferenceData
from mopo_kernels.data.collator import TokenizedExample
from mopo_kernels.dual import ThresholdError
from mopo_kernels.text import one_line
from mopo_kernels.trainer.config import MOPOConfig
from mopo_kernels.trainer.control import hold_out
from mopo_kernels.trainer.lm_head import causal_lm, is_peft
from mopo_kernels.trainer.memory_estimate import estimate_memory
from mopo_kernels.trainer.rows import make_collator, prepare_rows
from mopo_kernels.trainer.sampler import TokenBudgetSampler, batch_tokens
from mopo_kernels.trainer.setup import init_multipliers, precomputes, resolve_objectives
from mopo_kernels.trainer.shared_prompts import share_prompts


def plan(
    model: Any, config: MOPOConfig, tokenizer: Any, train: PreferenceData, evaluation: PreferenceData | None
) -> str:
    """The plan, a line a fact.

    Args:
        model: on the meta device, under its adapters; it is used up.
        config, tokenizer, train, evaluation: as for ``MOPOTrainer``.

    Raises:
        ValueError: what would be refused at the start of training as well.
    """
    objectives, primary = resolve_objectives(config, train, evaluation)
    shared, why_not = _shares(model, config)
    collator = make_collator(config, tokenizer, objectives, shared_prompts=shared)
    parts = {"train_dataset": train} | ({} if evaluation is None else {"eval_dataset": evaluation})
    prepare_rows(model, collator, parts, config, quiet=config.process_index != 0)
    rest, held, reason = hold_out(config, train)
    fitted = train.select(rest) if held else train
    tokens = _Tokens(collator, fitted)
    batches, largest = _batches(config, tokens)
    steps_an_epoch = max(1, math.ceil(len(batches) / config.gradient_accumulation_steps / config.world_size))
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_an_epoch)
    computed = sum(map(tokens.cost, batches))
    ranks = f" on {config.world_size} processes" if config.world_size > 1 else ""
    layout = "each prompt once for its responses" if shared else "a row a response"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    lines = {
        "data": _counted(fitted)
        + (f"; {_counted(train.select(held))} steer the multipliers" if held else "")
        + ("" if evaluation is None else f"; held out {_counted(evaluation)}"),
        "layout": layout + (f" ({why_not})" if why_not else ""),
        "tokens an epoch": f"{computed:,} to compute: {tokens.prompt(shared):,} of prompts, {tokens.response:,} of "
        f"responses and their ends, all of these scored, less {tokens.last(shared):,} that nothing follows; padding "
        f"{computed - tokens.real(shared):,} ({1 - tokens.real(shared) / computed:.1%})",
        "steps": f"{steps:,} in all, {steps_an_epoch:,} an epoch, of {len(fitted) / steps_an_epoch:,.1f} prompts and "
        f"{computed / steps_an_epoch:,.0f} tokens{ranks}",
        "thresholds": _thresholds(config, objectives, primary, train) + ("; they stand there" if reason else ""),
        "reference": _reference(
            config, is_peft(model), train, len(fitted), evaluation, collator, computed / steps_an_epoch * steps
        ),
        "trained": f"{trained:,} of {every:,} parameters ({trained / every:.1%}), optimizer "
        f"{getattr(config.optim, 'value', config.optim)}",
    }
    text = [f"{name:<16} {one_line(value)}" for name, value in lines.items()]
    passes = [train] * _is_precomputed(config, is_peft(model), train, len(fitted)) + [evaluation] * (
        evaluation is not None
    )
    return "\n".join([*text, *_memory(model, config, collator, fitted, largest, [part for part in passes if part])])


class _Tokens:
    """The lengths of a data set as its collator lays it out."""

    def __init__(self, collator: PreferenceCollator, data: PreferenceData) -> None:
        self.items: list[TokenizedExample] = collator.tokenize(list(data))
        self.sizes = [item.size for item in self.items]
        self.shared = collator.shared_prompts
        self.response = sum(len(response) for item in self.items for response in item.responses)

    def prompt(self, shared: bool) -> int:
        return sum(len(item.prompt) * (1 if shared else len(item.responses)) for item in self.items)

    def last(self, shared: bool) -> int:
        """Tokens that are scored and not computed."""
        return sum(len(item.responses) for item in self.items) if shared else 0

    def real(self, shared: bool) -> int:
        return self.prompt(shared) + self.response - self.last(shared)

    def cost(self, indices: Sequence[int]) -> int:
        """Tokens of a batch of these examples."""
        return batch_tokens([self.sizes[index] for index in indices], self.shared)

    def largest(self, count: int) -> list[int]:
        """The examples of the largest batch that so many can make."""
        return sorted(range(len(self.sizes)), key=lambda index: -self.cost([index]))[:count]


def _batches(config: MOPOConfig, tokens: _Tokens) -> tuple[list[list[int]], list[int]]:
    """An epoch's batches of all processes, and the largest that can come up. By prompts they are drawn as any other
    run's would be, not as this one's."""
    if config.max_tokens_per_batch is not None:
        sampler = TokenBudgetSampler(
            tokens.sizes,
            config.max_tokens_per_batch,
            shared_prompts=tokens.shared,
            shuffle=config.train_sampling_strategy != "sequential",
            seed=config.seed if config.data_seed is None else config.data_seed,
            ranks=config.world_size,
        )
        batches = [batch for each in sampler.rounds for batch in each]
        return batches, max(batches, key=tokens.cost)
    size = config.per_device_train_batch_size
    order = torch.randperm(len(tokens.sizes), generator=torch.Generator().manual_seed(config.seed)).tolist()
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return batches, tokens.largest(size)


def _counted(data: PreferenceData) -> str:
    responses = sum(len(row["responses"]) for row in data.dataset.select_columns(["responses"]))
    pairs = sum(len(row["pairs"]) for row in data.dataset.select_columns(["pairs"]))
    return f"{len(data):,} prompts, {responses:,} responses, {pairs:,} pairs"


def _shares(model: Any, config: MOPOConfig) -> tuple[bool, str | None]:
    """Whether prompts are shared, tried on the model cut to a few layers and words; and if not, why not."""
    if config.shared_prompts == "never":
        return False, None
    base = causal_lm(model)
    small = copy.deepcopy(base.config)
    kinds = list(getattr(small, "layer_types", None) or [])
    small.num_hidden_layers = max((kinds.index(kind) + 1 for kind in set(kinds)), default=1)
    if kinds:
        small.layer_types = kinds[: small.num_hidden_layers]
    small.vocab_size, small.pad_token_id = 64, None
    with torch.random.fork_rng(devices=[]):
        trial = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, attn_implementation=base.config._attn_implementation
        )
    reason = share_prompts(trial, config.max_length)
    if reason is None:
        base.set_attn_implementation(trial.config._attn_implementation)
    elif config.shared_prompts == "always":
        raise ValueError(f"shared_prompts: expected a model that can compute a prompt once; it cannot: {reason}")
    return reason is None, reason


def _thresholds(config: MOPOConfig, objectives: Sequence[str], primary: str, data: PreferenceData) -> str:
    assert isinstance(config.thresholds, dict)
    assert isinstance(config.fixed_multipliers, dict)
    if config.fixed_multipliers:
        fixed = ", ".join(f"{name} {value:g}" for name, value in config.fixed_multipliers.items())
        return f"none; {primary} is maximised, with fixed multipliers {fixed}"
    if not config.thresholds:
        return f"none; {primary} is maximised, the others are watched"
    wanted = f"{primary} maximised, " + ", ".join(f"{name} >= {bound:g}" for name, bound in config.thresholds.items())
    try:
        multipliers, solution = init_multipliers(config, objectives, primary, data)
    except ThresholdError as error:
        return f"{wanted}: {error}"
    start = ", ".join(f"{name} {value:.3g}" for name, value in multipliers.items()) or "0"
    if solution is None:
        return f"{wanted}; multipliers start at {start}, not tried on the labels"
    state = "can be met on the labels" if solution.feasible else solution.message
    return f"{wanted}: {state}; multipliers start at {start}"


def _is_precomputed(config: MOPOConfig, is_adapter: bool, train: PreferenceData, fitted: int) -> bool:
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return "ref_logprob" not in train.dataset.column_names and precomputes(config, is_adapter, fitted, step)


def _reference(
    config: MOPOConfig,
    is_adapter: bool,
    train: PreferenceData,
    fitted: int,
    evaluation: PreferenceData | None,
    collator: PreferenceCollator,
    trained_on: float,
) -> str:
    lagged = ""
    if config.reference_update_steps is not None:
        lagged = f"; lagged after step {config.reference_update_steps}, then one more forward pass a step"
    if _is_precomputed(config, is_adapter, train, fitted):
        parts = [train] if evaluation is None else [train, evaluation]
        tokens = sum(_Tokens(collator, part).real(collator.shared_prompts) for part in parts)
        return (
            f"computed before training, unless a file of an earlier run has it: {tokens:,} tokens forward, beside "
            f"{trained_on:,.0f} forward and backward in training{lagged}"
        )
    if "ref_logprob" in train.dataset.column_names:
        return f"its log-probabilities are in the data{lagged}"
    how = "the model as training starts" if is_adapter else "a copy of the starting weights"
    return f"{how}, each step: {trained_on:,.0f} tokens forward in all{lagged}"


def _memory(
    model: Any,
    config: MOPOConfig,
    collator: PreferenceCollator,
    train: PreferenceData,
    largest: Sequence[int],
    passes: Sequence[PreferenceData],
) -> list[str]:
    heading = f"memory of {config.device.type} for one process without sharding, beyond interpreter and libraries, MiB"

    def collated(data: PreferenceData, indices: Sequence[int]) -> Mapping[str, Tensor]:
        return collator([data[index] for index in indices])

    evaluated = [collated(part, _Tokens(collator, part).largest(config.per_device_eval_batch_size)) for part in passes]
    try:
        estimate = estimate_memory(
            model,
            config,
            collated(train, largest),
            max(evaluated, key=lambda batch: batch["input_ids"].numel(), default=None),
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return [f"{heading}: not estimated: {' '.join(str(error).split())[:200]}"]
    rows = {**estimate.parts(), "total": estimate.total}
    return [
        heading,
        *(f"  {name:<14} {value / 2**20:>10,.0f}" for name, value in rows.items()),
        f"  the total is the most at one time, during {estimate.moment}",
    ]
