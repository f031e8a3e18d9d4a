"""The reference policies: the first, which training starts from, and the lagged one, which follows the policy.

Neither is a second module. A reference differs from the policy in its trained parameters only, so it is kept as
those tensors and put in their place for the time of a forward pass without gradient; the optimizer, DDP and saving
never see it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mopo_kernels.fused.vocab_parallel import full_tensor
from mopo_kernels.trainer.adapters import adapter_settings, adapters_add_nothing, check_adapters_act
from mopo_kernels.trainer.lm_head import is_peft

# Numbers that are hashed, or copied to the host for it, at a time.
_HASHED_AT_ONCE = 1 << 22


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copy_parameters(model: nn.Module, dtype: torch.dtype | None = None, offload: bool = False) -> dict[str, Tensor]:
    """A copy of the trained parameters, by name.

    Args:
        model: whose.
        dtype: of the copies of what products are taken with; None is that of each parameter. Vectors (norms, biases)
            and embeddings keep theirs.
        offload: keep the copies in the CPU's memory, pinned where the model is on a GPU.
    """
    looked_up = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    copies = {}
    for name, parameter in trained_parameters(model).items():
        rounded = dtype is not None and parameter.dim() > 1 and id(parameter) not in looked_up
        copies[name] = torch.empty_like(
            parameter,
            dtype=dtype if rounded else parameter.dtype,
            device="cpu" if offload else parameter.device,
            pin_memory=offload and parameter.is_cuda,
            requires_grad=False,
        ).copy_(parameter.detach())
    return copies


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
    """The parameters named in ``values`` hold those values, and theirs again afterwards.

    Values in another dtype or on another device are copied to the parameter's. Those of a decoder block only while it
    runs, so that the device holds one block twice, and what is outside the blocks (embedding, head), not the model.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in values}
    live = {name: parameter.data for name, parameter in parameters.items()}

    def exchange(names: list[str]) -> None:
        for name in names:
            parameters[name].data = values[name].to(live[name].device, live[name].dtype, non_blocking=True)

    def restore(names: list[str]) -> None:
        for name in names:
            parameters[name].data = live[name]

    copied = {
        name for name, value in live.items() if (values[name].device, values[name].dtype) != (value.device, value.dtype)
    }
    handles = []
    # Autocast keeps its casts by the parameter, not by what it holds, and would give them to the policy as well.
    autocast_cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        waiting: set[str] = set()
        for block, names in _blocks(model, parameters):
            if own := [name for name in names if name in copied]:
                handles.append(block.register_forward_pre_hook(lambda *_, names=own: exchange(names)))
                handles.append(block.register_forward_hook(lambda *_, names=own: restore(names)))
                waiting.update(own)
        exchange([name for name in parameters if name not in waiting])
        yield
    finally:
        torch.set_autocast_cache_enabled(autocast_cache)
        for handle in handles:
            handle.remove()
        restore(list(parameters))


def _blocks(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[tuple[nn.Module, list[str]]]:
    """The decoder blocks, each with the names of those ``parameters`` that no other part of the model has."""
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            blocks.append(module)
            inside.update(module.modules())
    users = Counter(id(parameter) for block in blocks for parameter in block.parameters())
    users.update(id(p) for module in model.modules() if module not in inside for p in module.parameters(recurse=False))
    names = {id(parameter): name for name, parameter in parameters.items() if users[id(parameter)] == 1}
    return [(block, [names[id(p)] for p in block.parameters() if id(p) in names]) for block in blocks]


def check_adapters_cover_training(model: nn.Module) -> None:
    """A PeftModel whose trained parameters all belong to adapters that act, so that saving these saves the policy.

    Raises:
        ValueError: naming a trained parameter that does not, or a layer whose adapters do not act.
    """
    check_adapters_act(model)
    with adapters_off(model):
        for name in trained_parameters(model):
            raise ValueError(
                f"model: expected every trained parameter of a PeftModel to belong to an adapter (modules_to_save "
                f"included); got {name!r}, which would not be saved with it"
            )


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters under the adapters by the names they have without them: all, for full fine-tuning."""
    adapted = is_peft(model)
    for name, parameter in model.named_parameters():
        if adapted and parameter.requires_grad:
            continue
        name = name.removeprefix("base_model.model.") if adapted else name
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Tells policies apart by their weights. Those under adapters that add nothing are what the model is without them.

    Hashes every number, a few GB a second.
    """
    digest = hashlib.sha256()
    parameters = base_parameters(model)
    if is_peft(model) and not adapters_add_nothing(model):
        digest.update(adapter_settings(model).encode())
        parameters = model.named_parameters()
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        # Weights in 4 bits are codes, of blocks whose scales are kept beside them.
        quantised = getattr(parameter, "quant_state", None)
        scales = [] if quantised is None else list(quantised.as_dict(packed=True).values())
        for tensor in (full_tensor(parameter.detach()), *scales):
            for piece in tensor.reshape(-1).split(_HASHED_AT_ONCE):
                digest.update(piece.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class ReferenceModel:
    """Runs the model as one of its references.

    With ``dtype`` bfloat16 the copies take half the memory of fp32 ones. Under bf16 autocast that costs nothing:
    products round the weights to bf16 anyway, and what is not multiplied (norms, biases, embeddings) is kept as it is.
    In fp32 the reference then is the model with rounded weights: on SmolLM2-135M a response's log-probability moves by
    0.012 nats times the root of its tokens (root mean square), a quarter of what bf16 autocast moves it by.

    Args:
        dtype: of the copies, where they are multiplied; None is that of the parameters.
        offload: keep the copies in the CPU's memory, and bring them to the device for the forward pass, block by block.
        without_adapters: the first reference is the PeftModel with its adapters switched off, as they added nothing
            when training started.
        initial: the trained parameters at the start: of adapters that added something, and of full fine-tuning with
            ``reference="model"``.
        snapshot: the trained parameters of the lagged reference; None until its first update.
        untrained: nothing has been trained yet, so the model itself is the first reference.
    """

    dtype: torch.dtype | None = None
    offload: bool = False
    without_adapters: bool = False
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
            ValueError: there is no copy of the starting weights.
        """
        if self.without_adapters:
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
                "ref_logprob: expected with every example, as no copy of the starting weights is kept; got none "
                "(without sharding reference='model' keeps one, and can evaluate data that the trainer was not given "
                "at its start)"
            )

    @contextmanager
    def lagged(self, model: nn.Module) -> Iterator[None]:
        """``model`` as it was at the last update."""
        assert self.snapshot is not None
        with evaluation_mode(model), parameters_as(model, self.snapshot):
            yield

    def keep_first(self, model: nn.Module) -> None:
        """The first reference is the policy as it is."""
        self.initial = copy_parameters(model, self.dtype, self.offload)

    def update(self, model: nn.Module) -> None:
        """The current reference becomes the policy as it is."""
        self.load(model, trained_parameters(model))

    def load(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """The current reference becomes ``model`` with ``values`` for its trained parameters."""
        if self.snapshot is None:
            self.snapshot = copy_parameters(model, self.dtype, self.offload)
        for name, copy in self.snapshot.items():
            copy.copy_(values[name].detach())
