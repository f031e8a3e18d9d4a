"""Batches for the tests: ragged on purpose, with ignored tokens, empty sequences, ties and missing labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopo_kernels import backends

# The fast ones for the CPU. Triton's interpreter takes CPU tensors too, but minutes where these take a second: its
# kernels have their own tests, and tests/gpu runs the public functions on it at small sizes.
CPU_BACKENDS = [name for name in ("torch", "cpp") if backends.availability()[name] is None]

# 1 MiB holds every row at once; 24 KB a few prompts a chunk; 6 KB no prompt, and tiles narrower than the vocabulary;
# 2 KB a row or two.
BUFFERS = {"whole": 1 << 20, "chunks": 24_000, "narrow": 6_000, "tiny": 2_000}

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "softcap": {"softcap": 4.0, "logit_scale": 1.2, "temperature": 0.8},
}

# Of the loss; ... stands for the batch's own value.
OPTIONS: dict[str, dict[str, Any]] = {
    "length": {"loss_type": "regression", "length": ...},
    "label rate": {"loss_type": "regression", "label_rate": torch.tensor([0.5, 0.75, 1.0])},
    "label rate of sigmoid": {"loss_type": "sigmoid", "label_rate": torch.tensor([0.5, 0.75, 1.0])},
    "margin": {"loss_type": "sigmoid", "margin": ...},
    "cap": {"loss_type": "cloning", "max_ratio": 1.2, "prompt_index": ..., "tau": 0.4},
    "normalizer": {"loss_type": "regression", "normalizer": 17.0},
    "normalizer of cloning": {"loss_type": "cloning", "normalizer": torch.tensor(5.0), "prompt_index": ...},
    "snis of length": {"loss_type": "sigmoid", "estimator": "snis", "length": ...},
}


@dataclass
class Batch:
    hidden: Tensor
    weight: Tensor
    target: Tensor
    cu_seqlens: Tensor
    bias: Tensor
    ref_logprob: Tensor
    pairs: Tensor
    preference: Tensor
    objective_weight: Tensor
    pair_weight: Tensor
    prompt_index: Tensor
    length: Tensor

    def leaves(self, *names: str) -> list[Tensor]:
        """The named tensors, each made a fresh leaf that requires grad."""
        for name in names:
            setattr(self, name, getattr(self, name).detach().clone().requires_grad_())
        return [getattr(self, name) for name in names]

    def loss_arguments(self) -> tuple[Tensor, ...]:
        return (
            self.hidden,
            self.weight,
            self.target,
            self.cu_seqlens,
            self.pairs,
            self.preference,
            self.objective_weight,
            self.bias,
        )

    def loss_options(self, loss_type: str) -> dict[str, Any]:
        return {
            "ref_logprob": self.ref_logprob,
            "loss_type": loss_type,
            "pair_weight": self.pair_weight,
            "prompt_index": self.prompt_index,
        }


def make_batch(
    prompts: int = 4,
    responses: int = 3,
    longest: int = 9,
    hidden: int = 16,
    vocabulary: int = 37,
    objectives: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    scale: float = 1.0,
) -> Batch:
    """Every prompt's responses are compared all with all; one response is empty, one wholly ignored, a fifth of the
    tokens are ignored and a quarter of the labels missing."""
    g = torch.Generator().manual_seed(seed)
    sequences = prompts * responses
    length = torch.randint(1, longest + 1, (sequences,), generator=g)
    if sequences > 2:
        length[1] = 0
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])
    tokens = int(cu_seqlens[-1])
    target = torch.randint(0, vocabulary, (tokens,), generator=g)
    target[torch.rand(tokens, generator=g) < 0.2] = -100
    if sequences > 2:
        target[int(cu_seqlens[2]) : int(cu_seqlens[3])] = -100
    inside = torch.combinations(torch.arange(responses), 2) if responses > 1 else torch.zeros(0, 2, dtype=torch.int64)
    pairs = torch.cat([inside + p * responses for p in range(prompts)]) if prompts else inside[:0]
    preference = torch.randint(0, 5, (pairs.shape[0], objectives), generator=g).double() / 4
    preference[torch.rand(preference.shape, generator=g) < 0.25] = torch.nan

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    real = torch.float64 if dtype == torch.float64 else torch.float32
    return Batch(
        hidden=normal(tokens, hidden),
        weight=normal(vocabulary, hidden),
        target=target,
        cu_seqlens=cu_seqlens,
        bias=normal(vocabulary),
        ref_logprob=-length.to(real) * 3.0 + normal(sequences).to(real),
        pairs=pairs,
        preference=preference.to(real),
        objective_weight=torch.linspace(1.0, 0.3, objectives).to(real),
        pair_weight=torch.rand(pairs.shape[0], generator=g).to(real) + 0.5,
        prompt_index=torch.arange(sequences) // responses,
        length=length.clamp(min=1).to(real),
    )
