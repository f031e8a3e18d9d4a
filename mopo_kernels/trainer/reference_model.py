"""The reference policies: the first, which training starts from, and the lagged one, which follows the policy.

Neither is a second module. A reference differs from the policy in its trained parameters only, so it is kept as
those tensors and put in their place for the time of a forward pass without gradient; the optimizer, DDP and saving
never see it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mopo_kernels.trainer.head import is_peft

# Numbers of each parameter that go into a fingerprint: enough to tell models apart, cheap on a large one.
_FINGERPRINT_NUMBERS = 256


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trained parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode (dropout off), and back to what each was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A PeftModel without its adapters, and its ``requires_grad`` flags, which peft resets, as they were."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():  # type: ignore[operator]
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def parameters_as(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """The parameters named in ``values`` hold those values, and theirs again afterwards."""
    parameters = {name: p for name, p in model.named_parameters() if name in values}
    live = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = live[name]


def check_adapters_cover_training(model: nn.Module) -> None:
    """A PeftModel whose trained parameters all belong to adapters, so that switching them off gives the reference.

    Raises:
        ValueError: naming a trained parameter that does not.
    """
    with adapters_off(model):
        for name in trained_parameters(model):
            raise ValueError(
                f"model: expected every trained parameter of a PeftModel to belong to an adapter (modules_to_save "
                f"included); got {name!r}, which would change the reference too"
            )


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Tells models apart by their weights: those under the adapters for a PeftModel, all of them otherwise.

    Hashes names, shapes and evenly spaced numbers of every parameter, not all of them.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if is_peft(model) and parameter.requires_grad:
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _FINGERPRINT_NUMBERS)].cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class ReferenceModel:
    """Runs the model as one of its references.

    Args:
        initial: the trained parameters at the start, kept for full fine-tuning with ``reference="model"``.
        snapshot: the trained parameters of the lagged reference; None until its first update.
        untrained: nothing has been trained yet, so the model itself is the first reference.
    """

    initial: dict[str, Tensor] | None = None
    snapshot: dict[str, Tensor] | None = None
    untrained: bool = False

    @property
    def is_lagged(self) -> bool:
        """Whether the current reference is another than the first."""
        return self.snapshot is not None

    @contextmanager
    def first(self, model: nn.Module) -> Iterator[None]:
        """``model`` as the first reference.

        Raises:
            ValueError: full fine-tuning without a copy of the starting weights.
        """
        if is_peft(model):
            with evaluation_mode(model), adapters_off(model):
                yield
        elif self.initial is not None:
            with evaluation_mode(model), parameters_as(model, self.initial):
                yield
        elif self.untrained:
            with evaluation_mode(model):
                yield
        else:
            raise ValueError(
                "ref_logprob: expected with every example, as full fine-tuning keeps no reference model; got none "
                "(reference='model' keeps one, and can evaluate data that the trainer was not given at its start)"
            )

    @contextmanager
    def lagged(self, model: nn.Module) -> Iterator[None]:
        """``model`` as it was at the last update."""
        assert self.snapshot is not None
        with evaluation_mode(model), parameters_as(model, self.snapshot):
            yield

    def update(self, model: nn.Module) -> None:
        """The current reference becomes the policy as it is."""
        if self.snapshot is None:
            self.snapshot = copy_parameters(model)
            return
        for name, parameter in trained_parameters(model).items():
            self.snapshot[name].copy_(parameter.detach())
