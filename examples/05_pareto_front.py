"""The exact front of a finite problem: what a threshold on one objective costs the other.

python examples/05_pareto_front.py
"""

from __future__ import annotations

import numpy as np

from mopo_kernels import tabular

# Two prompts with five candidate responses each, which the reference gives alike; P(first beats second) by a score of
# each response on each objective. What is good on the one is bad on the other.
rng = np.random.default_rng(0)
helpful = rng.normal(size=(2, 5))
score = np.stack([helpful, rng.normal(size=(2, 5)) - helpful])
preference = 1 / (1 + np.exp(score[..., None, :] - score[..., :, None]))  # (K, X, Y, Y)
uniform = np.full((2, 5), 0.2)
problem = tabular.TabularProblem(preference, uniform, uniform, tau=0.05)

front = tabular.pareto_front(problem, {1: np.linspace(0.40, 0.80, 9).tolist()})
print("harmless >=   helpful  harmless  multiplier  KL, nats")
for threshold, value, multiplier, kl, feasible in zip(
    front.threshold[:, 1], front.value, front.multiplier[:, 1], front.kl, front.feasible, strict=True
):
    row = f"{value[0]:.3f}     {value[1]:.3f}      {multiplier:6.3f}     {kl:.3f}" if feasible else "cannot be met"
    print(f"       {threshold:.2f}     {row}")
print(f"{front.nondominated.sum()} points that no other dominates; hypervolume {front.hypervolume:.4f}")
