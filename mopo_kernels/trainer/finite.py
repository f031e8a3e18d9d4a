"""A step whose loss, gradient or weights are not finite: noticed before anything of it is saved, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopo_kernels.text import some
from mopo_kernels.trainer.reference_model import trained_parameters


class NamedBatch(dict[str, Any]):
    """A collator's batch; ``names`` is what its examples are called."""

    names: list[str]


class NamingCollator:
    """A collator that gives named batches."""

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> NamedBatch:
        batch = NamedBatch(self.collator(examples))
        batch.names = [example.name for example in examples]
        return batch


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or a gradient."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


@torch.no_grad()
def any_not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """() 1.0 where any number of this rank's parts is NaN or infinite, else 0.0; the host does not wait for it."""
    parts = [part for part in map(_local, tensors) if part.is_floating_point() and part.numel()]
    if not parts:
        return torch.zeros(())
    # Of the greatest magnitudes, which cannot overflow as a sum of squares can.
    return (~torch.nn.utils.get_total_norm(parts, norm_type=float("inf")).isfinite()).float()


def gradients(model: nn.Module) -> list[Tensor]:
    """Those that the next optimiser step uses."""
    return [p.grad for p in trained_parameters(model).values() if p.grad is not None]


def weights(model: nn.Module) -> list[Tensor]:
    """The trained parameters."""
    return list(trained_parameters(model).values())


def first_not_finite(model: nn.Module) -> str:
    """The name of the first trained parameter of this rank that is not finite, in brackets; empty where all are."""
    for name, parameter in trained_parameters(model).items():
        if bool(any_not_finite([parameter])):
            return f" ({name})"
    return ""


def not_finite(what: str, names: Sequence[str], checkpoint: str | None) -> str:
    """The message of a run that ends here.

    Args:
        what: is not finite, and of which step.
        names: the examples of the step.
        checkpoint: the last complete one.
    """
    rows = f"; its examples: {some(list(names))}" if names else ""
    return (
        f"{what} not finite: the policy has diverged (a lower learning_rate, or a larger tau, keeps it nearer the "
        f"reference){rows}; nothing of it was saved, the last good checkpoint is {checkpoint or 'none'}"
    )
