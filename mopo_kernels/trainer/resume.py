"""What a run is resumed under: the same rows in the same order, the same adapter, and today's optimiser options."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mopo_kernels.data import PreferenceData
from mopo_kernels.data.tokenized import content_digest
from mopo_kernels.trainer.config import MOPOConfig
from mopo_kernels.trainer.lm_head import is_peft

# How the prompts of a step are laid out.
_LAYOUT = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
# What decides which rows a step has: under another value those to come are not those that are left.
_ROWS = (
    "train_data",
    "seed",
    "data_seed",
    "max_tokens_per_batch",
    "train_sampling_strategy",
    "dataloader_drop_last",
    *_LAYOUT,
)
# What takes effect on a run that goes on, whatever it was.
_FREE = (
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("bf16", "fp16", "disable_dropout", "gradient_filter", "threshold_confidence", "on_infeasible"),
    *("dual_steps", "dual_prompts", "dual_effective_prompts", "dual_coverage", "dual_samples", "dual_max_new_tokens"),
    *("dual_lr", "dual_noise", "dual_max", "dual_warmup_steps", "dual_smoothing", "dual_patience"),
)
# Of an optimiser's groups. Its state has others, which are results.
_OPTIONS = ("lr", "weight_decay", "betas", "eps", "momentum")
# Of an adapter's configuration: no part of what it computes.
_ABOUT = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


def rows_fingerprint(data: PreferenceData) -> str:
    """Tells training data apart, in words: prompts, responses, labels and weights, in order."""
    return f"{len(data)} prompts ({content_digest(data, 'id', 'ref_logprob')[:12]})"


def row_settings(args: MOPOConfig, processes: int, train_data: str) -> dict[str, Any]:
    """What decides which rows a step has; ``processes`` are those with rows of their own."""
    settings = {name: getattr(args, name) for name in _ROWS if hasattr(args, name)}
    settings["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    return settings | {"train_data": train_data, "processes": processes}


def free_settings(args: MOPOConfig) -> dict[str, Any]:
    """What may change on the way, and is then named."""
    settings = {name: getattr(args, name) for name in _FREE}
    return {name: getattr(value, "value", value) for name, value in settings.items()}


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The active adapter's configuration, by field: peft does not read it again when weights are loaded."""
    if not is_peft(model):
        return {}
    config = model.peft_config[model.active_adapters[0]].to_dict()  # type: ignore[index, union-attr]
    # Sets, whose order changes between processes, and enumerations.
    plain = json.loads(
        json.dumps(config, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
    return {f"adapter {name}": value for name, value in plain.items() if name not in _ABOUT}


def differences(current: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(value before, value now) of every setting that both know and that changed."""
    return {name: (before[name], value) for name, value in current.items() if name in before and before[name] != value}


def may_change(name: str, current: Mapping[str, Any], before: Mapping[str, Any], skips_rows: bool) -> bool:
    """Whether a run goes on under another value of a setting, which is then named.

    Args:
        name: of the setting.
        current, before: all settings.
        skips_rows: rows that were trained on are passed over, so that each has its turn.
    """
    if name not in _ROWS:
        return name in _FREE
    if not skips_rows:
        return True
    prompts = [math.prod(settings[part] for part in _LAYOUT) for settings in (current, before)]
    return name in _LAYOUT and current["max_tokens_per_batch"] is None and prompts[0] == prompts[1]


def row_hint(name: str) -> str:
    """What an error about a setting says of the way out."""
    rows = "with ignore_data_skip=true the rows may change and an epoch begins anew; " if name in _ROWS else ""
    return f"{rows}without resume_from_checkpoint a run starts afresh"


def optimizer_options(optimizer: Any) -> list[dict[str, Any]]:
    """Of every group, as they were set; ``lr`` is that before any schedule."""
    return [
        {
            name: _plain(group.get("initial_lr", group["lr"]) if name == "lr" else group[name])
            for name in _OPTIONS
            if name in group
        }
        for group in optimizer.param_groups
    ]


def set_optimizer_options(optimizer: Any, scheduler: Any, wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Give a loaded optimiser and its schedule the options of today; what changed, in words."""
    changed: dict[str, None] = {}
    for index, (group, options) in enumerate(zip(optimizer.param_groups, wanted, strict=True)):
        loaded = optimizer_options(optimizer)[index]
        for name, value in options.items():
            if loaded[name] == value:
                continue
            label = "learning_rate" if name == "lr" else name
            changed[f"{label} {value} (was {loaded[name]})"] = None
            if name != "lr":
                _assign(group, name, value)
                continue
            bases = getattr(scheduler, "base_lrs", None)
            if bases is not None:
                bases[index] = value
            if "initial_lr" in group:
                _assign(group, "initial_lr", value)
            # The schedule's factor of the moment, which a learning rate of 0 hides.
            factor = _plain(group["lr"]) / loaded["lr"] if loaded["lr"] else 1.0
            _assign(group, "lr", value * factor)
            last = getattr(scheduler, "_last_lr", None)
            if last is not None:
                last[index] = value * factor
    return list(changed)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _assign(group: dict[str, Any], name: str, value: Any) -> None:
    """An option that is a tensor stays the one that the optimiser knows."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
