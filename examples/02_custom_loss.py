"""A loss of your own on fused log-probabilities: SimPO (arXiv 2405.14734), which needs no reference.

python examples/02_custom_loss.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mopo_kernels import linear_logprob, pack_responses


def simpo(logprob: Tensor, cu_seqlens: Tensor, beta: float = 2.0, margin: float = 1.0) -> Tensor:
    """The loss from log-probabilities (N,) of packed responses (chosen, rejected, chosen, ...), in nats a token."""
    length = cu_seqlens.diff()
    owner = torch.repeat_interleave(torch.arange(len(length)), length)
    mean = torch.zeros(len(length)).index_add(0, owner, logprob) / length
    chosen, rejected = mean.view(-1, 2).unbind(1)
    return -F.logsigmoid(beta * (chosen - rejected) - margin).mean()


torch.manual_seed(0)
batch, time, size, vocabulary = 8, 64, 128, 4000
hidden = torch.randn(batch, time, size, requires_grad=True)  # last hidden states
weight = (torch.randn(vocabulary, size) / size**0.5).requires_grad_()  # lm_head.weight
labels = torch.randint(vocabulary, (batch, time)).index_fill_(1, torch.arange(40), -100)  # prompts are not scored

rows, target, cu_seqlens = pack_responses(hidden, labels)
loss = simpo(linear_logprob(rows, weight, target), cu_seqlens)
gradients = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)  # the packing is used again below

logits = rows @ weight.T  # what linear_logprob never holds
plain = simpo(logits.log_softmax(-1).gather(-1, target[:, None])[:, 0], cu_seqlens)
torch.testing.assert_close(loss, plain)
for fused, expected in zip(gradients, torch.autograd.grad(plain, (hidden, weight)), strict=True):
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-7)
print(f"SimPO {loss.item():.6f}, as from logits: {plain.item():.6f}; gradients agree")
