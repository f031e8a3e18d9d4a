"""FSDP2 and DeepSpeed ZeRO-3 as ``MOPOTrainer`` runs them: what they leave to be done, and what cannot work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
)
from torch import nn

from mopo_kernels.trainer.lm_head import causal_lm

Initialize = TypeVar("Initialize", bound=Callable[..., None])


def resolve_fsdp(accelerator: Accelerator, options: dict[str, Any] | None) -> bool:
    """Whether ``accelerator`` shards parameters (FSDP2), after it was made to where a user asked for it.

    accelerate shards on accelerators only: on several CPU processes it takes the options and runs DDP. ``fully_shard``
    itself runs on gloo, so there the accelerator is told to.

    Args:
        accelerator: as ``transformers.Trainer`` made it.
        options: ``TrainingArguments.fsdp_plugin_args``; None without ``fsdp``. ``accelerate launch`` puts its own into
            the environment instead.

    Raises:
        ValueError: FSDP1, or FSDP with one process.
    """
    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None and (options is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        if state.distributed_type != DistributedType.MULTI_CPU:
            if options is not None:
                # accelerate has set it, and a trainer made later without FSDP would be refused, too.
                os.environ.pop("ACCELERATE_USE_FSDP", None)
            raise ValueError(f"fsdp: expected several processes with it; got {state.distributed_type.value}")
        plugin = FullyShardedDataParallelPlugin(**(options or {}))
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_config: expected version 2; got {plugin.fsdp_version}")
    return plugin is not None


def check_deepspeed(accelerator: Accelerator) -> None:
    """Refuse ranks that do not know of each other.

    Raises:
        ValueError: accelerate takes each rank for the only one, as it does on a machine without accelerators.
    """
    ranks = dist.get_world_size()
    if accelerator.num_processes != ranks:
        raise ValueError(
            f"deepspeed: expected accelerate to see all {ranks} ranks; got {accelerator.num_processes} (on CPUs, make "
            "accelerate.PartialState(backend='gloo') first, under ACCELERATE_USE_DEEPSPEED=true, and set "
            "accelerator_config={'use_configured_state': True})"
        )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every parameter of ``model`` is whole on every rank, where ZeRO-3 has taken them apart; all ranks must enter."""
    parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def with_whole_model(initialize: Initialize) -> Initialize:
    """An ``__init__(self, model, ...)`` that finds ``model`` whole: it may come from under ``deepspeed.zero.Init``."""

    @functools.wraps(initialize)
    def whole(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with gathered(model) if isinstance(model, nn.Module) else nullcontext():
            initialize(self, model, *args, **kwargs)

    return whole  # type: ignore[return-value]


def register_head(model: nn.Module) -> None:
    """Let ZeRO-3 gather the output head for ``model``'s own forward and backward, which hold the loss.

    It gathers a module's parameters when the module runs, and the head's forward is never run.
    """
    import deepspeed

    for parameter in causal_lm(model).get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)
