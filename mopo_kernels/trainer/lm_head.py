"""What the fused loss needs to know of a causal language model: its backbone, its output head, and the map to logits.

The fused loss takes the head's weight instead of calling the head, so everything that the head's own ``forward`` would
do has to be expressed by the operands here, or refused: a parameter that is used in generation but not here would
silently stay untrained. :func:`find_transform` compares the result with the model's own logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mopo_kernels import naive
from mopo_kernels.arguments import LogitTransform
from mopo_kernels.fused.vocab_parallel import full_tensor, is_dtensor

# Attributes of model configurations that scale or cap the logits. Some architectures multiply by a scale and others
# divide by it under the same name, so both are tried; the model's own logits decide.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "final_logits_soft_cap")


def product_step(weight: Tensor) -> float:
    """The step between numbers next to 1 in the format in which products of ``weight`` are made, which is coarser than
    its own where fp32 is multiplied in tf32 or bf16."""
    precision = torch.get_float32_matmul_precision()
    if weight.dtype == torch.float32 and (weight.is_cuda or precision != "highest"):
        # A GPU can be told so in more ways than one, so that of fp32 there tf32 is expected.
        return torch.finfo(torch.bfloat16).eps if precision == "medium" else 2.0**-10
    return torch.finfo(weight.dtype).eps


def is_peft(model: nn.Module) -> bool:
    """Whether ``model`` is a ``peft.PeftModel``."""
    try:
        from peft import PeftModel
    except ImportError:
        return False
    return isinstance(model, PeftModel)


def _has_adapter_layers(model: nn.Module) -> bool:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return False
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def causal_lm(model: nn.Module) -> Any:
    """The transformers model under a ``PeftModel``, or ``model`` itself."""
    return model.get_base_model() if is_peft(model) else model  # type: ignore[operator]


def check_model(model: nn.Module) -> None:
    """Refuse models whose forward pass is more than backbone and head.

    Raises:
        ValueError: naming what is not supported and what to do instead.
    """
    if not is_peft(model) and _has_adapter_layers(model):
        raise ValueError(
            "model: expected adapters added by peft.get_peft_model; got ones injected into the model's layers, as "
            "model.add_adapter does"
        )
    if is_peft(model):
        for name, config in model.peft_config.items():  # type: ignore[operator, union-attr]
            if config.is_prompt_learning or config.is_adaption_prompt:
                raise ValueError(
                    f"model: expected an adapter that changes layers, such as LoRA; got {config.peft_type} ({name!r}), "
                    "whose virtual tokens the loss cannot see"
                )
            if getattr(config, "bias", "none") != "none":
                raise ValueError(
                    f"model: expected an adapter with bias='none'; got bias={config.bias!r}, which switching the "
                    "adapter off does not undo, so there would be no reference"
                )
            start = getattr(config, "init_lora_weights", True)
            if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
                raise ValueError(
                    f"model: expected init_lora_weights True, False, 'gaussian', 'eva' or 'orthogonal'; got {start!r}, "
                    "which changes the base weights, so switching the adapter off does not give the reference"
                )
    base = causal_lm(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only causal language model; got {type(base).__name__}")
    if not hasattr(base, "base_model") or base.base_model is base:
        raise ValueError(f"model: expected a transformers causal language model; got {type(base).__name__}")
    output_head(model)


def last_hidden_state(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The rows that the head multiplies: input_ids, attention_mask (B, T) int64 -> (B, T, H)."""
    hidden: Tensor = (
        causal_lm(model)
        .base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        .last_hidden_state
    )
    return hidden


class LMHead(NamedTuple):
    """The output head: weight (V, H), bias (V,) or None, and for LoRA on it (A (r, H), B (V, r), scaling) each."""

    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[tuple[Tensor, Tensor, float], ...] = ()

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(hidden, weight, bias)`` whose product is the head's: hidden (N, H) -> (N, H'), (V, H'), (V,) or None.

        A LoRA adapter becomes ``[hidden, scaling * hidden @ A.T]`` and ``[weight, B]``, H' = H + r, which keeps the
        low-rank part at its own precision (adding ``B @ A`` to a bf16 weight would round small updates away).
        """
        if not self.low_rank:
            return hidden, self.weight, self.bias
        rows, columns = [hidden], [self.weight]
        for down, up, scaling in self.low_rank:
            rows.append(((hidden.to(down.dtype) @ down.T) * scaling).to(hidden.dtype))
            columns.append(up.to(self.weight.dtype))
        return torch.cat(rows, dim=1), torch.cat(columns, dim=1), self.bias


def output_head(model: nn.Module) -> LMHead:
    """The head as it is now: which adapter is active, or none, may change between calls.

    Raises:
        ValueError: a head that the fused loss cannot express, named by its type.
    """
    head = causal_lm(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"model: expected an output head; {type(causal_lm(model)).__name__} has none")
    if isinstance(head, FSDPModule):
        # FSDP gathers a module before its forward, and the head's is never run. Its backward ends as every other's.
        head.unshard()
    if is_peft(model):
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            active = head.active_adapters
            head = head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]
        if isinstance(head, LoraLayer):
            return _lora_head(head)
    return _linear_head(head)


def _linear_head(head: nn.Module) -> LMHead:
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or head.weight.dim() != 2:
        raise ValueError(
            "model: expected an output head that is nn.Linear in floating point, alone, under LoRA, or in "
            f"modules_to_save; got {type(head).__module__}.{type(head).__name__}"
        )
    if head.weight.is_meta:
        raise ValueError("model: expected the output head in memory; got a head offloaded elsewhere")
    return LMHead(head.weight, head.bias)


def _lora_head(layer: Any) -> LMHead:
    from peft.tuners.lora.layer import Linear as LoraLinear

    # Under FSDP its class is a subclass made on the spot; a layer that computes something else has its own forward.
    if not isinstance(layer, LoraLinear) or type(layer).forward is not LoraLinear.forward:
        raise ValueError(f"model: expected plain LoRA on the output head; got {type(layer).__name__}")
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        if layer.lora_variant.get(name) is not None:
            raise ValueError(
                f"model: expected plain LoRA on the output head; got {type(layer.lora_variant[name]).__name__} "
                f"(adapter {name!r}): leave the head out of its target_modules"
            )
        if getattr(layer.lora_dropout[name], "p", 0.0) > 0:
            raise ValueError(
                f"model: expected lora_dropout 0 on the output head; got {layer.lora_dropout[name].p} "
                f"(adapter {name!r}): leave the head out of target_modules or set lora_dropout=0"
            )
        if layer.lora_B[name].bias is not None:
            raise ValueError(f"model: expected lora_bias=False on the output head; got True (adapter {name!r})")
    base = _linear_head(layer.get_base_layer())
    if is_dtensor(base.weight):
        raise ValueError(
            "model: expected no adapter on an output head that is cut over ranks; got LoRA: leave the head out of its "
            "target_modules"
        )
    if layer.disable_adapters or layer.merged:
        return base
    return base._replace(
        low_rank=tuple((layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in active)  # type: ignore[misc]
    )


def _candidates(config: Any) -> list[LogitTransform]:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    caps: list[float | None] = [
        float(value) for name in _SOFTCAPS if (value := getattr(config, name, None)) not in (None, 0)
    ]
    scales = [1.0]
    for name in _SCALES:
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value not in (0, 1):
            scales[:0] = [float(value), 1.0 / float(value)]
    return [LogitTransform(cap, scale) for cap in [*caps, None] for scale in scales]


@torch.no_grad()
def find_transform(model: nn.Module) -> LogitTransform:
    """The map from products to logits under which backbone and head give the model's own log-probabilities.

    Runs the model once on eight tokens, in evaluation mode, and tries what its configuration names.

    Raises:
        ValueError: the model's logits are NaN, or none of them does; the message has the smallest difference found
            (nats).
    """
    base, head = causal_lm(model), output_head(model)
    tokens = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    mask = torch.ones_like(tokens)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        hidden, weight, bias = head.operands(last_hidden_state(model, tokens, mask)[0])
        weight, bias = full_tensor(weight), None if bias is None else full_tensor(bias)
        logits = base(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
    finally:
        for module, training in modes:
            module.training = training
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"model: expected an output head on the backbone's own hidden states; {type(base).__name__} has states of "
            f"{hidden.shape[-1]} numbers, a matrix of {weight.shape[-1]}, and a head that does more than it"
        )
    if bool(logits.isnan().any()):
        raise ValueError(
            f"model: expected numbers for logits of {type(base).__name__}; got NaN on a few tokens, as weights that "
            "are not finite give"
        )
    expected = torch.log_softmax(logits.to(torch.float64), dim=-1)
    # The model rounds its logits to its own dtype, which moves a log-probability by about eps * |logit|.
    tolerance = max(4 * product_step(head.weight), 1e-4) * max(1.0, float(logits.abs().max()))
    best = float("inf")
    for candidate in _candidates(base.config):
        found = naive.head_logits(hidden, weight, bias, **candidate.keywords())
        difference = float((torch.log_softmax(found.to(torch.float64), dim=-1) - expected).abs().max())
        if difference <= tolerance:
            return candidate
        best = min(best, difference)
    raise ValueError(
        f"model: the log-probabilities from backbone and head of {type(base).__name__} differ from the model's own by "
        f"{best:.3g} nats (at most {tolerance:.1g} is rounding), so its head does more than this trainer knows"
    )
