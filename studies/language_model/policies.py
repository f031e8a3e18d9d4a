"""Policies made of one model and trained adapters: sums of their updates in its weights, and mixtures of their logits.

Adapters are merged while a policy is sampled: the sum of any number of updates costs what the base model costs, and an
adapter that is switched on beside the weights twice that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Weights = Mapping[str, float]
"""Adapter folder -> factor on its update."""

_PREFIX = "base_model.model."


def read_update(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """The update ``(alpha / r) B A`` of every weight that a LoRA adapter changes: parameter name -> fp32, its shape.

    Raises:
        ValueError: the adapter has parts other than plain LoRA matrices.
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("use_rslora") or settings.get("use_dora") or settings.get("rank_pattern"):
        raise ValueError(f"adapter must be plain LoRA, got {folder}")
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = settings["lora_alpha"] / settings["r"]
    found = {}
    for name, down in tensors.items():
        if name.endswith(".lora_B.weight"):
            continue
        if not name.endswith(".lora_A.weight"):
            raise ValueError(f"adapter must be plain LoRA, got {name} in {folder}")
        up = tensors[name.replace(".lora_A.", ".lora_B.")].to(device, torch.float32)
        target = name.removeprefix(_PREFIX).replace(".lora_A.weight", ".weight")
        found[target] = scaling * (up @ down.to(device, torch.float32))
    return found


class Policies:
    """One base model in memory, and the policies that adapters make of it.

    Args:
        folder: of the model and its tokenizer.
        device: where it is kept, in fp32.

    Attributes:
        model: with the base weights, except within :meth:`merged`.
        tokenizer: of the folder.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = loaded.to(device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model.requires_grad_(False)

    @contextmanager
    def merged(self, weights: Weights) -> Iterator[Any]:
        """The model with ``sum_a weights[a] * update_a`` added to its weights, which are as they were afterwards."""
        first: dict[str, Tensor] = {}
        parameters = dict(self.model.named_parameters())
        try:
            with torch.no_grad():
                for folder, factor in weights.items():
                    for name, update in read_update(Path(folder), self.device).items():
                        first.setdefault(name, parameters[name].detach().clone())
                        parameters[name].add_(update, alpha=factor)
            yield self.model
        finally:
            # Copies, since taking an update off again would leave rounding errors behind.
            with torch.no_grad():
                for name, value in first.items():
                    parameters[name].copy_(value)

    def copied(self, weights: Weights) -> Any:
        """A copy of the model with these updates merged, to be trained further."""
        with self.merged(weights) as model:
            return copy.deepcopy(model)
