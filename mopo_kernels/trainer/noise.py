"""What a model draws at random while it is trained: turned off, and checked to be off.

A policy with dropout differs from its reference by noise, at the first step by nothing else. Models have it as modules,
as numbers that their layers hand to a function, and as entries of the configuration that they read as they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from mopo_kernels.trainer.lm_head import causal_lm, product_step

# Dropout of units, layers, paths and attention, and the noise of a router: attention_dropout, resid_pdrop, layerdrop,
# router_jitter_noise, ...
NOISE = re.compile(r"drop|jitter|(^|_)noise(_|$)")


class NoiseOff:
    """Every dropout and jitter of a model outside its adapters, set to 0.

    Args:
        model: a causal language model or a PeftModel of one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._changed: list[tuple[Any, str, float]] = []
        for name, module in model.named_modules():
            if "lora_dropout" in name:
                continue
            if isinstance(module, _DropoutNd):
                self._set(module, "p")
            else:
                self._set_all(module)
        for config in configurations(causal_lm(model).config):
            self._set_all(config)

    def _set_all(self, owner: Any) -> None:
        for name, value in list(vars(owner).items()):
            if NOISE.search(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._set(owner, name)

    def _set(self, owner: Any, name: str) -> None:
        value = getattr(owner, name)
        if value != 0:
            setattr(owner, name, type(value)(0))
            self._changed.append((owner, name, value))

    @contextmanager
    def as_configured(self) -> Iterator[None]:
        """Everything as it was, to save the model's own configuration."""
        for owner, name, value in self._changed:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for owner, name, value in self._changed:
                setattr(owner, name, type(value)(0))


def use_training_kernels(model: nn.Module) -> None:
    """Let weights in 4 bits be multiplied in evaluation mode as they are in training.

    On CPUs with avx512_bf16 bitsandbytes repacks them in evaluation mode alone, for products in bf16: the reference
    would be computed with other products than the policy.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def configurations(config: Any) -> Iterator[Any]:
    """A model's configuration and those inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_diff_dict") and value is not config:
            yield from configurations(value)


@torch.no_grad()
def check_noise_off(model: nn.Module) -> None:
    """Try ``model`` in training mode on a few tokens: it must compute there what it computes in evaluation mode.

    The modes and the random states are left as they were. Dropout inside adapters is not looked at.

    Raises:
        ValueError: it does not, as it draws noise, or does something else when it is trained.
    """
    base = causal_lm(model)
    embedding = base.get_input_embeddings().weight
    ids = (torch.arange(24, device=embedding.device) * 7 + 3).reshape(2, 12) % embedding.shape[0]
    modes = [(module, module.training) for module in model.modules()]

    def states(seed: int) -> Tensor:
        torch.manual_seed(seed)
        hidden: Tensor = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.double() if hidden.device.type != "mps" else hidden.float()

    with torch.random.fork_rng([embedding.device] if embedding.is_cuda else []):
        try:
            model.eval()
            expected, again = states(0), states(1)
            model.train()
            for name, module in model.named_modules():
                if "lora_dropout" in name:
                    module.eval()
            trained = [states(seed) for seed in range(4)]
        finally:
            for module, training in modes:
                module.training = training
    scale = expected.norm()
    if not scale.isfinite():
        # Nothing to compare with: log-probabilities that are not finite are an error of their own.
        return
    # Kernels whose sums have no order differ from call to call in either mode.
    rounding = float((again - expected).norm() / scale)
    noise = max(float((other - trained[0]).norm() / scale) for other in trained[1:])
    off = float((trained[0] - expected).norm() / scale)
    if noise <= 4 * rounding and off <= max(1e-4, 8 * product_step(embedding)):
        return
    what = (
        f"it draws noise, {noise:.2g} of its hidden states' norm, which disable_dropout does not find"
        if noise > 4 * rounding
        else f"its hidden states differ by {off:.2g} of their norm"
    )
    raise ValueError(
        f"model: expected {type(base).__name__} to compute in training mode what it computes in evaluation mode, as "
        f"the policy is compared with its reference; {what} (set the option that causes it to 0 in the model's "
        "configuration, or disable_dropout=false to train so)"
    )
