"""Policies made of one model and trained adapters: sums of their updates in its weights, and mixtures of their logits.

Adapters are merged while a policy is sampled: the sum of any number of updates costs what the base model costs, and an
adapter that is switched on beside the weights twice that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor, LogitsProcessorList

from mopo_kernels import linear_sequence_logprob, pack_responses

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
        raise ValueError(f"adapter: expected plain LoRA; got {folder}")
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = settings["lora_alpha"] / settings["r"]
    found = {}
    for name, down in tensors.items():
        if name.endswith(".lora_B.weight"):
            continue
        if not name.endswith(".lora_A.weight"):
            raise ValueError(f"adapter: expected plain LoRA; got {name} in {folder}")
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


class _Mixed(LogitsProcessor):
    """Turns the scores of the model that is generating into the weighted sum of all models' log-probabilities."""

    def __init__(self, own: float, others: Sequence[tuple[Any, float]], attention_mask: Tensor) -> None:
        self.own, self.mask = own, attention_mask
        self.others = [(model, weight, DynamicCache(config=model.config)) for model, weight in others]
        self.seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The first call has the whole prompts, every other one more token.
        grown = self.mask.new_ones(len(input_ids), input_ids.shape[1] - self.mask.shape[1])
        mask = torch.cat([self.mask, grown], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, self.seen :]
        mixed = self.own * scores.float().log_softmax(-1)
        for model, weight, cache in self.others:
            output = model(
                input_ids=input_ids[:, self.seen :],
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            mixed = mixed + weight * output.logits[:, -1].float().log_softmax(-1)
        self.seen = input_ids.shape[1]
        return mixed


class Mixture:
    """The policy with probabilities proportional to ``prod_m pi_m(token)^weight_m``, as ``sample_responses`` takes it.

    Every token costs a step of every model.

    Args:
        models: causal language models of one tokenizer.
        weights: of each; they sum to 1 for a log-linear mixture.
    """

    def __init__(self, models: Sequence[Any], weights: Sequence[float]) -> None:
        if len(models) != len(weights) or not models:
            raise ValueError(f"weights: expected one a model, at least one; got {len(weights)} for {len(models)}")
        self.models, self.weights = list(models), list(weights)
        self.config, self.device = models[0].config, models[0].device
        self.generation_config = models[0].generation_config

    training = False

    def get_input_embeddings(self) -> Any:
        """The first model's."""
        return self.models[0].get_input_embeddings()

    def eval(self) -> Mixture:
        return self

    def train(self, mode: bool = True) -> Mixture:
        if mode:
            raise ValueError("mode: expected False, as a mixture is not trained; got True")
        return self

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: None = None,
        return_dict_in_generate: bool = False,
        logits_processor: Sequence[LogitsProcessor] = (),
        **options: Any,
    ) -> Any:
        """As ``transformers`` does it for one model; of several there is no one cache that could be asked for and
        continued. Processors that are given see the mixed log-probabilities."""
        if return_dict_in_generate:
            return SimpleNamespace(past_key_values=None)
        others = list(zip(self.models[1:], self.weights[1:], strict=True))
        mixed = _Mixed(self.weights[0], others, attention_mask)
        first = self.models[0]
        before, first.generation_config = first.generation_config, self.generation_config
        try:
            return first.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList([mixed, *logits_processor]),
                **options,
            )
        finally:
            first.generation_config = before


@torch.no_grad()
def response_logprobs(
    model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int, backend: str = "auto"
) -> list[float]:
    """Log-probability of each response after its prompt, nats.

    Args:
        model: without adapters beside its weights.
        sequences: (prompt, response) token ids, the response's end included where it is to be scored.
        rows: sequences a forward pass.
        backend: see ``linear_sequence_logprob``.
    """
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])))
    found = [0.0] * len(sequences)
    head = model.get_output_embeddings().weight
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        width = max(sum(map(len, sequences[index])) for index in batch)
        ids, mask, labels = torch.zeros(3, len(batch), width, dtype=torch.int64).unbind(0)
        labels.fill_(-100)
        for row, index in enumerate(batch):
            prompt, response = sequences[index]
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor([*prompt, *response])
            mask[row, :end] = 1
            labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
        hidden = model.base_model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
        packed, target, cu_seqlens = pack_responses(hidden.last_hidden_state, labels.to(model.device))
        values = linear_sequence_logprob(packed, head, target, cu_seqlens, backend=backend).tolist()
        for index, value in zip(batch, values, strict=True):
            found[index] = value
    return found
