"""How a batch's tokens lie, and the rows of hidden states that its scored tokens are predicted from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mopo_kernels.functional import pack_responses
from mopo_kernels.trainer.attention import attention_arguments
from mopo_kernels.trainer.head import causal_lm, last_hidden_state


class Scored(NamedTuple):
    """Packed scored rows: hidden (N, H), target (N,), cu_seqlens (S + 1,)."""

    hidden: Tensor
    target: Tensor
    cu_seqlens: Tensor

    def lengths(self) -> Tensor:
        """(S,) scored tokens of each response."""
        return scored_lengths(self.target, self.cu_seqlens)


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
        return Scored(*pack_responses(last_hidden_state(model, self.input_ids, self.attention_mask), self.labels))

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

    def scored(self, model: nn.Module) -> Scored:
        """One run of the backbone, and the rows that count."""
        hidden: Tensor = (
            causal_lm(model)
            .base_model(
                input_ids=self.input_ids,
                position_ids=self.position_ids,
                use_cache=False,
                **attention_arguments(model, self.segment_length, self.response_count),
            )
            .last_hidden_state
        )
        return Scored(hidden[0][self.scored_rows], self.target, self.cu_seqlens)

    def tokens(self) -> Tensor:
        """() tokens that the backbone computes."""
        return self.segment_length.sum()


Layout = PaddedRows | SharedPrompts


def take_layout(tensors: dict[str, Any]) -> Layout:
    """Take what says how the tokens lie out of a batch."""
    kind: type[Layout] = SharedPrompts if "segment_length" in tensors else PaddedRows
    return kind(**{name: tensors.pop(name) for name in kind._fields})
