"""The nn.Module front of :func:`mopo_kernels.linear_mopo_loss`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mopo_kernels import backends, checks
from mopo_kernels.arguments import HeadOptions, LogitTransform, LossOptions
from mopo_kernels.functional import MOPOLossOutput, linear_mopo_loss


class LinearMOPOLoss(nn.Module):
    """:func:`mopo_kernels.linear_mopo_loss` with its options fixed once; ``forward`` takes the tensors of a batch.

    Args:
        tau, loss_type, max_ratio, estimator: options of :func:`mopo_kernels.mopo_loss`.
        ignore_index, softcap, logit_scale, temperature, backend, max_buffer_bytes, gradient_filter: options
            of :func:`mopo_kernels.linear_logprob`.

    Raises:
        ValueError: an option is wrong (here), or a tensor is (in forward).
    """

    def __init__(
        self,
        *,
        tau: float = 0.1,
        loss_type: str = "regression",
        max_ratio: float | None = None,
        estimator: str = "pair",
        ignore_index: int = -100,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        backend: str = "auto",
        max_buffer_bytes: int | None = None,
        gradient_filter: float | None = None,
    ) -> None:
        super().__init__()
        loss = LossOptions(tau, loss_type, max_ratio, estimator)
        transform = LogitTransform(softcap, logit_scale, temperature)
        head = HeadOptions(ignore_index, transform, backend, max_buffer_bytes, gradient_filter)
        loss.check()
        head.check()
        checks.choice("backend", backend, backends.NAMES)
        keywords = {**loss.keywords(), **head.keywords()}
        self.options = {name: value for name, value in keywords.items() if value is not None}

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        cu_seqlens: Tensor,
        pairs: Tensor,
        preference: Tensor,
        objective_weight: Tensor,
        bias: Tensor | None = None,
        **tensors: Any,
    ) -> MOPOLossOutput:
        """Arguments as in :func:`mopo_kernels.linear_mopo_loss`; ``tensors``: its other per-batch arguments
        (ref_logprob, ref_hidden, ref_weight, ref_bias, pair_weight, label_rate, margin, length, prompt_index,
        normalizer)."""
        return linear_mopo_loss(
            hidden, weight, target, cu_seqlens, pairs, preference, objective_weight, bias, **tensors, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
