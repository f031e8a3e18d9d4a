"""The loss inside the model's own forward pass.

DDP and FSDP gather parameters and reduce gradients in hooks around the wrapped module's ``forward``. A loss that calls
the unwrapped model from outside never triggers them. So :func:`attach` lets the model's ``forward`` take a preference
batch: one run of the backbone, the scored rows only, and the fused loss, with the head's weight instead of logits.
"""

from __future__ import annotations

import functools
import types
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopo_kernels import naive
from mopo_kernels.arguments import HeadOptions, LossOptions
from mopo_kernels.functional import MOPOLossOutput, linear_mopo_loss, linear_sequence_logprob
from mopo_kernels.naive import MAX_LOG_IMPORTANCE
from mopo_kernels.trainer.batch_layout import Layout, OnHost, PaddedRows, Scored, take_layout
from mopo_kernels.trainer.experts import LoadBalancing
from mopo_kernels.trainer.lm_head import output_head
from mopo_kernels.trainer.metrics import (
    Statistics,
    double,
    importance_sums,
    preferred_sums,
    satisfaction_moments,
)
from mopo_kernels.trainer.reference_model import ReferenceModel
from mopo_kernels.transfer import to_device


@dataclass
class PolicyForward:
    """What the attached forward does with a preference batch.

    Args:
        reference: where reference log-probabilities come from when the batch has none.
        statistics: layout of the sums that are returned beside the loss.
        loss: options of ``mopo_kernels.mopo_loss``.
        head: options of ``mopo_kernels.linear_mopo_loss``.
        label_rate: one share per objective, or None.
        length_normalize: divide log-probabilities by the number of scored tokens.
        primary: place of the primary objective, whose preferred responses TRL's figures are of.
        balance: the load-balancing loss of a mixture of experts that is added in training, or None.
    """

    reference: ReferenceModel
    statistics: Statistics
    loss: LossOptions
    head: HeadOptions
    label_rate: list[float] | None
    length_normalize: bool
    primary: int = 0
    balance: LoadBalancing | None = None

    def sequence_logprob(self, model: nn.Module, layout: Layout) -> Tensor:
        """Log-probability of every response under the model as it is: (S,) nats."""
        return self._scored_logprob(model, layout)[0]

    def _scored_logprob(self, model: nn.Module, layout: Layout) -> tuple[Tensor, Tensor]:
        """The same, and how many tokens of each response are scored: (S,), on the CPU."""
        scored = layout.scored(model)
        rows, weight, bias = output_head(model).operands(scored.hidden)
        logprob = linear_sequence_logprob(rows, weight, scored.target, scored.cu_seqlens, bias, **self.head.keywords())
        return logprob, scored.lengths

    def expert_load(self, model: nn.Module, layout: Layout) -> Tensor:
        """How often the batch chooses each expert, see ``LoadBalancing.load``."""
        assert self.balance is not None
        with torch.no_grad(), self.balance.recording(model) as logits:
            layout.scored(model)
            return self.balance.load(logits, _attention_mask(layout, logits[0].device))

    def first_log_ratio(self, model: nn.Module, layout: Layout, given: Tensor | None) -> Tensor:
        """Log-ratio of the model as it is to the first reference, (S,) nats (a token with ``length_normalize``)."""
        with torch.no_grad():
            if given is None:
                with self.reference.first(model):
                    given = self.sequence_logprob(model, layout)
            logprob, count = self._scored_logprob(model, layout)
            ratio = logprob - given
            return ratio / to_device(count.clamp(min=1), ratio.device) if self.length_normalize else ratio

    def reference_logprob(self, model: nn.Module, layout: Layout, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(first, current)`` log-probabilities (S,) under the first and the current reference, without gradient.

        Raises:
            ValueError: the batch has none and nothing is kept to compute them from.
        """
        first = given
        with torch.no_grad():
            if first is None:
                with self.reference.first(model):
                    first = self.sequence_logprob(model, layout)
            if not self.reference.is_lagged:
                return first, first
            with self.reference.lagged(model):
                return first, self.sequence_logprob(model, layout)

    def __call__(
        self,
        model: nn.Module,
        *,
        pairs: Tensor,
        preference: Tensor,
        pair_weight: Tensor,
        prompt_index: Tensor,
        margin: Tensor | None = None,
        objective_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        ref_logprob: Tensor | None = None,
        reference_only: bool = False,
        host: OnHost | None = None,
        log_ratio_only: bool = False,
        expert_load_only: bool = False,
        balanced: bool = False,
        expert_load: Tensor | None = None,
        **tokens: Tensor,
    ) -> dict[str, Tensor]:
        """The loss of a preference batch and its statistics; the tensors are those of ``PreferenceCollator``.

        Args:
            model: the module whose forward this is.
            objective_weight: (K,) multipliers, 1 for the primary.
            normalizer: what the loss is divided by; None is the batch's own weight.
            ref_logprob: (S,) log-probabilities under the first reference, when precomputed.
            reference_only: return only the log-probabilities under the first reference.
            host: what of the batch is on the CPU, see ``layout.forward_arguments``. Without it, that is read from the
                device before the backbone runs.
            log_ratio_only: return only the policy's log-ratios to the first reference, without gradient.
            expert_load_only: return only how often the batch chooses each expert.
            balanced: add the load-balancing loss, if there is one.
            expert_load: (E + 1,) that of the whole optimiser step; None is the batch's own.
            tokens: the tensors of one of the collator's layouts.

        Returns:
            ``loss`` () and ``statistics``, the vector of ``Statistics``; or ``ref_logprob`` (S,), or ``log_ratio``
            (S,), or ``expert_load`` (E + 1,).
        """
        layout = take_layout(tokens, host)
        if tokens:
            raise ValueError(f"batch: expected the tensors of PreferenceCollator; got also {', '.join(tokens)}")
        if reference_only:
            return {"ref_logprob": self.reference_logprob(model, layout, None)[0]}
        if log_ratio_only:
            return {"log_ratio": self.first_log_ratio(model, layout, ref_logprob)}
        if expert_load_only:
            return {"expert_load": self.expert_load(model, layout)}
        device = pairs.device
        # From the CPU it lets the chunks be planned so that pairs close in them.
        host_pairs = pairs.cpu() if host is None else host.tensors["pairs"]
        first, current = self.reference_logprob(model, layout, ref_logprob)
        balance = self.balance if balanced else None
        recording: AbstractContextManager[list[Tensor]]
        recording = nullcontext([]) if balance is None else balance.recording(model)
        with recording as router_logits:
            scored = layout.scored(model)
        rows, weight, bias = output_head(model).operands(scored.hidden)
        count = to_device(scored.lengths, device)
        length = count.clamp(min=1) if self.length_normalize else None
        label_rate = None if self.label_rate is None else to_device(torch.tensor(self.label_rate), device)
        assert objective_weight is not None
        output = linear_mopo_loss(
            rows,
            weight,
            scored.target,
            scored.cu_seqlens,
            host_pairs,
            preference,
            objective_weight,
            bias,
            ref_logprob=current,
            pair_weight=pair_weight,
            label_rate=label_rate,
            margin=margin,
            length=length,
            prompt_index=prompt_index,
            normalizer=normalizer,
            **self.loss.keywords(),
            **self.head.keywords(),
        )
        loss, auxiliary = output.loss, torch.zeros((), device=device)
        if balance is not None:
            mask = _attention_mask(layout, device)
            load = balance.load(router_logits, mask) if expert_load is None else expert_load
            auxiliary = balance.loss(router_logits, mask, load)
            loss = loss + balance.coefficient * auxiliary.to(loss.dtype)
        with torch.no_grad():
            first_ratio = output.log_ratio
            if self.reference.is_lagged:
                shift = (current - first).to(first_ratio.dtype)
                first_ratio = first_ratio + (shift if length is None else shift / length)
            statistics = self._statistics(
                output,
                first_ratio,
                count,
                _present(scored, device),
                pairs,
                preference,
                pair_weight,
                prompt_index,
                objective_weight,
                label_rate,
                margin,
                normalizer,
            )
            statistics["tokens"] = to_device(layout.tokens(), device)
            statistics["aux_loss"] = auxiliary
            logprob = output.log_ratio * (1 if length is None else length) + current
            statistics |= preferred_sums(
                output.log_ratio, logprob, pairs, preference[:, self.primary], pair_weight, self.loss.tau
            )
            packed = self.statistics.pack(statistics.pop("moments"), statistics)
        return {"loss": loss, "statistics": packed}

    def _statistics(
        self,
        output: MOPOLossOutput,
        first_ratio: Tensor,
        count: Tensor,
        present: Tensor | slice,
        pairs: Tensor,
        preference: Tensor,
        pair_weight: Tensor,
        prompt_index: Tensor,
        objective_weight: Tensor,
        label_rate: Tensor | None,
        margin: Tensor | None,
        normalizer: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """The sums of one batch by name, with satisfaction's ``moments`` (6, K). Nothing here is differentiated.

        Satisfaction says what the policy is worth on the data, which the first reference (or the behaviour policy near
        it) wrote; so with a lagged reference it is measured by the ratio to the first, not to the one in the loss.
        """
        preference, objective_weight = preference.to(first_ratio.dtype), objective_weight.to(first_ratio.dtype)
        pair_weight = pair_weight.to(first_ratio.dtype)
        rho = None
        loss = self.loss
        if loss.loss_type == "cloning" or loss.estimator == "closed_form":
            rho = naive.policy_ratio(preference, pairs, objective_weight, loss.tau, prompt_index, loss.max_ratio)
        responses = (count > 0).sum()
        target = naive.pair_target(preference, objective_weight, loss.tau, label_rate)
        ratio = torch.exp(double(first_ratio[present]).clamp(max=MAX_LOG_IMPORTANCE)) if rho is None else rho[present]
        reference_loss = torch.zeros_like(output.loss)
        if loss.loss_type != "cloning":
            none = torch.zeros_like(output.margin)
            per_pair = naive.pair_loss(none, preference, objective_weight, loss.tau, loss.loss_type, label_rate, margin)
            total = torch.as_tensor(pair_weight.sum() if normalizer is None else normalizer)
            # As the loss: a batch whose pairs all weigh nothing has 0.
            reference_loss = (pair_weight * per_pair).sum() / torch.where(total == 0, 1.0, total)
        return {
            "moments": satisfaction_moments(
                first_ratio, pairs, preference, pair_weight, prompt_index, loss.estimator, rho
            ),
            "loss": output.loss,
            "reference_loss": reference_loss,
            "items": responses if loss.loss_type == "cloning" else pair_weight.sum(),
            "margin": (pair_weight * torch.sign(target) * output.margin).sum(),
            "margin_weight": (pair_weight * (target != 0)).sum(),
            "responses": responses,
            **importance_sums(first_ratio[present], output.log_ratio[present]),
            "ratio": ratio.sum(),
            "ratio_square": double(ratio).square().sum(),
            "scored_tokens": count.sum(),
        }


def _attention_mask(layout: Layout, device: torch.device) -> Tensor | None:
    """Of a batch in padded rows; a shared row has no padding."""
    return to_device(layout.attention_mask, device) if isinstance(layout, PaddedRows) else None


def _present(scored: Scored, device: torch.device) -> Tensor | slice:
    """Where the responses are that have a scored token: a mask would make the host wait for their number."""
    some = scored.lengths > 0
    return slice(None) if bool(some.all()) else to_device(some.nonzero()[:, 0], device)


def attach(model: nn.Module, policy: PolicyForward) -> None:
    """Let ``model.forward`` take preference batches; every other call goes where it went before.

    The new forward is a bound method that finds the policy on the module, so that a deep copy of the model gets a
    forward of its own, and ``generate`` sees the signature it expects.
    """
    attached = hasattr(model, "_mopo_policy")
    model._mopo_policy = policy  # type: ignore[assignment]
    if attached:
        return
    original = model.forward
    # A method is unbound first, so that it follows the module it is called on; anything else stands for itself.
    unbound = getattr(original, "__func__", None)

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "pairs" in kwargs:
            return self._mopo_policy(self, **kwargs)  # type: ignore[operator]
        return original(*args, **kwargs) if unbound is None else unbound(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)
