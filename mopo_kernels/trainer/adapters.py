"""Adapters that training starts from: what they add, and how several that act together are saved and resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopo_kernels.fused.vocab_parallel import full_tensor
from mopo_kernels.trainer.lm_head import is_peft

# What a LoRA adapter can be more than its two factors.
_MORE = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
# The weights of the trained adapters as they are, beside the sum of all: to resume from.
TRAINED_FILE = "trained_adapters.safetensors"
_WEIGHTS_FILE = "adapter_model.safetensors"


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _wrappers(model: nn.Module) -> Iterator[Any]:
    """Of modules that a PeftModel trains beside its tuner layers."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))


def _is_zero(tensor: Tensor) -> bool:
    return not bool(full_tensor(tensor.detach()).any())


def _adds_nothing(layer: Any) -> bool:
    """Whether a tuner layer gives what its base layer gives, with the adapters that are active."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        return False
    for name in layer.active_adapters:
        if name in layer.lora_variant or layer.lora_bias.get(name):
            return False
        if name in layer.lora_A:
            factors: list[Any] = [getattr(half[name], "weight", half[name]) for half in (layer.lora_A, layer.lora_B)]
        elif name in layer.lora_embedding_A:
            factors = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
        else:
            continue
        if not any(_is_zero(factor) for factor in factors):
            return False
    return True


def adapters_add_nothing(model: nn.Module) -> bool:
    """Whether a PeftModel is, bit for bit, the model under its adapters, as with fresh LoRA, of which a factor is 0.

    Where that takes more than a look (DoRA, adapters other than LoRA), the answer is no.
    """
    for wrapper in _wrappers(model):
        for name in wrapper.active_adapters:
            saved = getattr(wrapper, "modules_to_save", {})
            if name not in saved:
                return False
            original = wrapper.original_module.state_dict()
            own = saved[name].state_dict()
            if not all(torch.equal(full_tensor(value), full_tensor(original[key])) for key, value in own.items()):
                return False
    return all(_adds_nothing(layer) for _, layer in _tuner_layers(model))


def check_adapters_act(model: nn.Module) -> None:
    """A PeftModel's adapters must be there beside its weights, and on.

    Raises:
        ValueError: they are merged into the weights, or switched off.
    """
    for name, layer in _tuner_layers(model):
        if layer.merged:
            raise ValueError(
                f"model: expected adapters beside the weights; got {', '.join(layer.merged_adapters)} merged into "
                f"{name} (model.unmerge_adapter() takes them out)"
            )
        if layer.disable_adapters:
            raise ValueError(
                f"model: expected adapters that are switched on; got them off in {name} "
                "(model.base_model.enable_adapter_layers() switches them on)"
            )


def adapter_settings(model: nn.Module) -> str:
    """What of a PeftModel's adapters acts beside their weights: JSON."""
    return json.dumps(
        [(name, layer.active_adapters, getattr(layer, "scaling", None)) for name, layer in _tuner_layers(model)],
        sort_keys=True,
        default=str,
    )


def turn_off_adapter_dropout(model: nn.Module) -> bool:
    """Set the dropout inside a PeftModel's adapters to 0; whether there was any."""
    found = False
    for _, layer in _tuner_layers(model):
        for dropout in getattr(layer, "lora_dropout", {}).values():
            if getattr(dropout, "p", 0.0) > 0:
                dropout.p, found = 0.0, True
    return found


class StackedAdapters:
    """Several LoRA adapters that are active at once, such as one that is trained over a frozen one.

    A saved policy is one adapter on the base model, their exact sum: the factors side by side, of a rank that is the
    sum of theirs. A file beside it has the trained ones as they are, from which a checkpoint is resumed.

    Args:
        model: the PeftModel.

    Attributes:
        active: names of all.
        trained: names of those that are trained.

    Raises:
        ValueError: an adapter that is more than LoRA's two factors.
    """

    def __init__(self, model: Any) -> None:
        self.active = _active_adapters(model)
        self.trained = [name for name in self.active if _is_trained(model, name)]
        for name in self.active:
            config = model.peft_config[name]
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            more = [option for option in _MORE if getattr(config, option, None)]
            if kind != "LORA" or more:
                raise ValueError(
                    "model: expected plain LoRA adapters where several are active, as they are saved as one; got "
                    f"{', '.join([kind, *more])} (adapter {name!r})"
                )

    @staticmethod
    def of(model: nn.Module) -> StackedAdapters | None:
        """Those of ``model``; None where at most one adapter is active.

        Raises:
            ValueError: adapters that cannot be saved as one.
        """
        return StackedAdapters(model) if is_peft(model) and len(_active_adapters(model)) > 1 else None

    def save(self, model: Any, folder: Path) -> None:
        """The sum as an adapter in ``folder``, and the trained ones as they are."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        scaling = {
            name.removeprefix("base_model.model."): layer.scaling
            for name, layer in _tuner_layers(model)
            if set(layer.scaling) & set(self.active)
        }
        alone: dict[str, dict[str, Tensor]] = {
            name: get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            for name in self.active
        }
        rank = sum(max(value.shape[0] for key, value in state.items() if _is_first(key)) for state in alone.values())
        parts: dict[str, list[Tensor]] = {}
        for name, state in alone.items():
            for key, value in state.items():
                layer = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
                part = value.detach() * scaling[layer][name] if _is_first(key) else value.detach()
                parts.setdefault(key, []).append(part)
        state = {}
        for key, values in parts.items():
            dim = 0 if _is_first(key) else 1
            joined = torch.cat(values, dim)
            # Where not every adapter acts the rest of the rank is 0.
            missing = list(joined.shape)
            missing[dim] = rank - joined.shape[dim]
            state[key] = torch.cat([joined, joined.new_zeros(missing)], dim).contiguous().cpu()
        config = copy.deepcopy(model.peft_config[self.active[0]])
        config.r = config.lora_alpha = rank
        config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
        config.target_modules, config.exclude_modules = set(scaling), None
        config.layers_to_transform = config.layers_pattern = None
        config.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        own = {f"{name}:{key}": value.contiguous().cpu() for name in self.trained for key, value in alone[name].items()}
        save_file(own, folder / TRAINED_FILE, metadata={"format": "pt"})

    def load(self, model: Any, folder: Path) -> None:
        """The trained adapters as :meth:`save` has written them; the others are what training started from."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        states: dict[str, dict[str, Tensor]] = {name: {} for name in self.trained}
        for full, value in load_file(folder / TRAINED_FILE).items():
            name, key = full.split(":", 1)
            states[name][key] = value
        for name, state in states.items():
            set_peft_model_state_dict(model, state, adapter_name=name)


def _active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that act somewhere in a PeftModel, in order."""
    names = [name for _, layer in _tuner_layers(model) for name in layer.active_adapters]
    return list(dict.fromkeys([*names, *(name for wrapper in _wrappers(model) for name in wrapper.active_adapters)]))


def _is_trained(model: nn.Module, adapter: str) -> bool:
    return any(parameter.requires_grad and adapter in name.split(".") for name, parameter in model.named_parameters())


def _is_first(key: str) -> bool:
    """Whether a name is that of the factor whose rows are the rank: A (r, H)."""
    return ".lora_A" in key or ".lora_embedding_A" in key
