"""The loss in a training loop of your own: a tiny random Llama, two objectives that conflict, a threshold on one.

python examples/01_loss.py        # seconds on one core
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mopo_kernels import DualAscent, linear_mopo_loss, linear_sequence_logprob, pack_responses

torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(config)

# 16 prompts of 6 tokens with two responses of 10 each; rows 2p and 2p + 1 are the responses to prompt p.
prompt = torch.randint(256, (16, 6)).repeat_interleave(2, dim=0)
tokens = torch.cat([prompt, torch.randint(256, (32, 10))], dim=1)
labels = tokens.clone()
labels[:, :6] = -100  # prompts are not scored
pairs = torch.arange(32).view(16, 2)
# P(first beats second): "helpful" always prefers the first response, "harmless" the second three times of four.
preference = torch.stack([torch.ones(16), (torch.arange(16) % 4 == 0).float()], dim=1)


def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scored rows (N, H), their targets (N,) and where each response's rows begin (33,)."""
    return pack_responses(model.model(tokens).last_hidden_state, labels)


with torch.no_grad():  # the reference is the policy as training starts
    rows, target, cu_seqlens = forward()
    ref_logprob = linear_sequence_logprob(rows, model.lm_head.weight, target, cu_seqlens)

multipliers = DualAscent(["helpful", "harmless"], "helpful", {"harmless": 0.6}, lr=0.5, maximum=20.0, smoothing=0.5)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(60):
    rows, target, cu_seqlens = forward()
    weight = model.lm_head.weight
    output = linear_mopo_loss(
        rows, weight, target, cu_seqlens, pairs, preference, multipliers.weight, ref_logprob=ref_logprob, tau=0.5
    )
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    multipliers.update(output.satisfaction, output.labelled)
    if step % 15 == 14:
        (helpful, harmless), multiplier = output.satisfaction.tolist(), multipliers.multiplier["harmless"]
        print(f"step {step + 1}: helpful {helpful:.3f}, harmless {harmless:.3f}, multiplier {multiplier:.2f}")
