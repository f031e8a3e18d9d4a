"""The load-balancing loss of a mixture of experts, over every token of an optimiser step.

With f_e the number of choices of expert e a token and P_e the mean of its probability by the router, over all tokens
and layers, it is ``E sum_e f_e P_e`` (Switch Transformer, arXiv 2101.03961, eq. 4 to 6), as transformers' models add it
to their own loss, times ``router_aux_loss_coef``. It is no mean over micro-batches; but f has no gradient, so with f of
the whole step counted first, what each micro-batch adds to P gives the gradient of the whole exactly.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mopo_kernels.trainer.lm_head import causal_lm
from mopo_kernels.trainer.noise import configurations

logger = logging.getLogger(__name__)

_EXPERTS = re.compile(r"(^|_)(num|n)(_local|_routed)?_experts$")


class LoadBalancing(NamedTuple):
    """What the loss needs to know of a model.

    Args:
        experts: of a layer.
        chosen: experts a token.
        coefficient: of the loss.
    """

    experts: int
    chosen: int
    coefficient: float

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """A list that has the router's logits of every layer, (tokens, E) each, once the backbone has run."""
        found: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            found.extend(_logits(output))

        handle = causal_lm(model).base_model.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    def load(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None) -> Tensor:
        """How often each expert is chosen and, last, the number of tokens times layers: (E + 1,) fp64."""
        device = router_logits[0].device
        count = torch.zeros(self.experts + 1, dtype=_wide(device), device=device)
        for logits in router_logits:
            kept = _kept(logits, attention_mask).to(count.dtype)
            choice = torch.topk(torch.softmax(logits.detach().reshape(-1, self.experts), -1), self.chosen).indices
            count.index_add_(0, choice.flatten(), kept.repeat_interleave(self.chosen))
            count[-1] += kept.sum()
        return count

    def loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, load: Tensor) -> Tensor:
        """What these tokens add to the loss of the step whose ``load`` is given, without the coefficient: ()."""
        probability: Any = 0
        for logits in router_logits:
            kept = _kept(logits, attention_mask)
            share = torch.softmax(logits.reshape(-1, self.experts), -1)
            probability = probability + (share.to(kept.dtype) * kept[:, None]).sum(0)
        load = load.to(probability.device)
        chosen = (load[:-1] / load[-1] ** 2).to(probability.dtype)
        return self.experts * (chosen * probability).sum()


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _kept(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """1 for every row of ``logits`` that is a token, 0 for padding."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if attention_mask is None:
        return torch.ones(logits.numel() // logits.shape[-1], dtype=dtype, device=logits.device)
    return attention_mask.reshape(-1).to(logits.device, dtype)


def _logits(output: Any) -> tuple[Tensor, ...]:
    """Of every layer with experts in a backbone's output; empty where it has none."""
    found = getattr(output, "router_logits", None) or ()
    return tuple(logits for logits in found if logits is not None)


def _number_of_experts(config: Any) -> int:
    """The most in any of a model's configurations; 0 for a dense model."""
    return max(
        (
            value
            for part in configurations(config)
            for name, value in vars(part).items()
            if _EXPERTS.search(name) and isinstance(value, int)
        ),
        default=0,
    )


def load_balancing(model: nn.Module, announce: bool) -> LoadBalancing | None:
    """What the loss of ``model`` needs, which ``output_router_logits=True`` in its configuration asks for; else None.

    The model's own ``aux_loss`` on a few tokens is what it is compared with.

    Args:
        model: a causal language model or a PeftModel of one.
        announce: say where a mixture of experts is trained without.

    Raises:
        ValueError: it is asked for, and the model has no router's logits, or another such loss.
    """
    base = causal_lm(model)
    config = base.config.get_text_config()
    experts = _number_of_experts(base.config)
    name = type(base).__name__
    if not getattr(config, "output_router_logits", False):
        if experts > 1 and announce:
            logger.warning(
                "%s is a mixture of %d experts and is trained without a load-balancing loss (output_router_logits=true "
                "in its configuration adds one)",
                name,
                experts,
            )
        return None
    coefficient = getattr(base, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", None))
    chosen = getattr(base, "num_experts_per_tok", getattr(config, "num_experts_per_tok", None))
    if coefficient is None or chosen is None or experts < 2:
        raise ValueError(
            f"model: expected router_aux_loss_coef, num_experts_per_tok and experts with output_router_logits=True; "
            f"{name} has {coefficient}, {chosen} and {experts}"
        )
    found = LoadBalancing(getattr(base, "num_experts", experts), int(chosen), float(coefficient))
    modes = [(module, module.training) for module in model.modules()]
    device = base.get_input_embeddings().weight.device
    tokens = torch.arange(3, 15, device=device).reshape(2, 6)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    model.eval()
    try:
        with torch.no_grad(), found.recording(model) as logits:
            own = base(input_ids=tokens, attention_mask=mask, use_cache=False).aux_loss
    finally:
        for module, training in modes:
            module.training = training
    if not logits or not isinstance(own, Tensor):
        raise ValueError(
            f"model: expected the router's logits from {name} with output_router_logits=True; got none (without it the "
            "model is trained without a load-balancing loss)"
        )
    value = found.loss(logits, mask, found.load(logits, mask))
    if not torch.allclose(value.float(), own.float(), rtol=1e-3):
        raise ValueError(
            f"model: expected {name}'s own load-balancing loss, {float(own):.6g} on a few tokens; got "
            f"{float(value):.6g}, so it has another than this trainer knows (output_router_logits=False trains without)"
        )
    return found
