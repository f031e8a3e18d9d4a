"""How a batch's tokens lie, and the rows of hidden states that its scored tokens are predicted from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mopo_kernels.functional import pack_responses
from mopo_kernels.trainer.lm_head import causal_lm, last_hidden_state
from mopo_kernels.trainer.shared_prompts import attention_arguments
from mopo_kernels.transfer import to_device


class Scored(NamedTuple):
    """Packed scored rows: hidden (N, H) and target (N,) on the model's device; on the CPU cu_seqlens (S + 1,) and
    lengths (S,), the scored tokens of each response."""

    hidden: Tensor
    target: Tensor
    cu_seqlens: Tensor
    lengths: Tensor


def scored_lengths(target: Tensor, cu_seqlens: Tensor) -> Tensor:
    """How many of each response's tokens have a label other than -100: (N,), (S + 1,) -> (S,)."""
    before = torch.zeros(target.numel() + 1, dtype=torch.int64, device=target.device)
    before[1:] = (target != -100).cumsum(0)
    return before[cu_seqlens[1:]] - before[cu_seqlens[:-1]]


class PaddedRows(NamedTuple):
    """A padded row per response, as ``PreferenceCollator`` makes them."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def scored(self, model: nn.Module) -> Scored:
        """One run of the backbone, and the rows that count."""
        hidden = last_hidden_state(model, self.input_ids, self.attention_mask)
        rows, target, cu_seqlens = pack_responses(hidden, self.labels)
        return Scored(rows, target, cu_seqlens, cu_seqlens.diff())

    def tokens(self) -> Tensor:
        """() tokens that the backbone computes, without padding."""
        return self.attention_mask.sum()


class SharedPrompts(NamedTuple):
    """One row with every prompt once, as ``PreferenceCollator(shared_prompts=True)`` makes it."""

    input_ids: Tensor
    position_ids: Tensor
    segment_length: Tensor
    response_count: Tensor
    scored_rows: Tensor
    target: Tensor
    cu_seqlens: Tensor

    def rows(self, model: nn.Module) -> Tensor:
        """One run of the backbone, and the rows that count: (N, H)."""
        hidden: Tensor = (
            causal_lm(model)
            .base_model(
                input_ids=self.input_ids,
                position_ids=self.position_ids,
                use_cache=False,
                **attention_arguments(model, self.segment_length, self.response_count, self.input_ids.device),
            )
            .last_hidden_state
        )
        return hidden[0][self.scored_rows]

    def scored(self, model: nn.Module) -> Scored:
        """:meth:`rows`, and what belongs to them."""
        rows, lengths = self.rows(model), scored_lengths(self.target, self.cu_seqlens)
        return Scored(rows, to_device(self.target, rows.device), self.cu_seqlens, lengths)

    def tokens(self) -> Tensor:
        """() tokens that the backbone computes."""
        return self.segment_length.sum()


Layout = PaddedRows | SharedPrompts

# What says how a batch's tokens lie. Sizes follow from these, so they are read on the CPU.
_READ = ("labels", "segment_length", "response_count", "target", "cu_seqlens")


class OnHost:
    """Tensors of a batch that stay on the CPU. What wraps a model moves the tensors it finds among its arguments to its
    device; inside an object of no kind that it knows it finds none."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)


def forward_arguments(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A collator's batch as the attached forward takes it: on ``device`` all but what is read on the CPU, which is
    ``host``. Pairs are in both places. Nothing waits for the device where the batch is on the CPU."""
    host = OnHost({name: batch[name].cpu() for name in (*_READ, "pairs") if name in batch})
    moved = {
        name: to_device(value, device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in _READ
    }
    return {**moved, "host": host}


def take_layout(tensors: dict[str, Any], host: OnHost | None = None) -> Layout:
    """Take what says how the tokens lie out of a batch. What is read on the CPU comes from ``host``, or, if it has to,
    from the device, for which this waits: so before anything is launched that takes long."""
    kept = {} if host is None else host.tensors
    kind: type[Layout] = SharedPrompts if "segment_length" in {**tensors, **kept} else PaddedRows
    read = {name: (kept[name] if name in kept else tensors.pop(name)).cpu() for name in kind._fields if name in _READ}
    return kind(**{name: read[name] if name in read else tensors.pop(name) for name in kind._fields})
