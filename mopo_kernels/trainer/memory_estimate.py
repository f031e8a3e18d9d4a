"""How much of a device's memory training will take, found without making a model: seconds, whatever its size.

One process, without sharding; beyond what the interpreter and its libraries hold. With p the number of parameters, t of
trained ones, itemsizes in bytes:

    weights      sum of numel * itemsize over parameters and buffers
    reference    trained values kept beside the policy's: one copy each for full fine-tuning with reference="model" and
                 for a lagged reference, in reference_dtype; none with reference_offload on an accelerator
    optimizer    by ``optimizer_bytes``: 2 t itemsize for Adam in torch, 2 t (1 + 4 / block) for 8 bits, ...
    gradients    t * itemsize
    activations  what the backbone's forward leaves for backward on the largest batch
    loss         buffer of the fused loss (at most max_buffer_bytes), the gradient of its N rows, N * H in fp32 and in
                 the rows' dtype, and with a trained head that of its weight, V * H in both
    total        weights + reference + optimizer + the most of these that are there at one time:
                     a whole step (forward, loss, backward), gradients of earlier micro-batches included;
                     the optimizer's step: gradients and what it computes with;
                     evaluation: a forward without gradients on the largest batch, and the loss's buffer

The total is below the sum of its parts: activations go while gradients come. Activations and the step are counted by
running the backbone, forward and backward, on tensors that have sizes but no storage (``FakeTensorMode``).

It is of the tensors. On a CPU under Linux, glibc keeps what is freed in a heap, which can be several times as large for
small models; in the environment ``MALLOC_MMAP_THRESHOLD_=1048576`` has it given back, and a step with gradient
checkpointing then takes up to 1.4 times as long (135M parameters, 2 cores).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mopo_kernels import backends
from mopo_kernels.fused.buffer_plan import accumulation_dtype, default_buffer_bytes, layout_of
from mopo_kernels.trainer.batch_layout import PaddedRows, take_layout
from mopo_kernels.trainer.config import MOPOConfig
from mopo_kernels.trainer.lm_head import is_peft, last_hidden_state, output_head

# Parameters with fewer numbers keep their optimizer's states in full precision.
_QUANTIZED_FROM = 4096
# Temporaries of an optimizer's step as measured on a CPU, in fp32 copies of the largest trained parameter.
_STEP_COPIES = {"adamw_torch": 2, "adamw_torch_8bit": 2, "adamw_torch_4bit": 2, "adamw_8bit": 6, "adamw_bnb_8bit": 6}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, see the module; ``total`` is their most at one time, which is ``moment``."""

    weights: int
    reference: int
    optimizer: int
    gradients: int
    activations: int
    loss: int
    total: int
    moment: str

    def parts(self) -> dict[str, int]:
        """Name -> bytes, the total left out."""
        names = ("weights", "reference", "optimizer", "gradients", "activations", "loss")
        return {name: getattr(self, name) for name in names}


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum of numel * itemsize."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def optimizer_bytes(optim: str, parameters: Iterable[Tensor], options: Mapping[str, str] | None = None) -> int:
    """States that an optimizer of ``TrainingArguments.optim`` keeps for ``parameters``.

    Args:
        optim: Adam and AdamW of torch, torchao (8 and 4 bits) and bitsandbytes, adafactor, sgd, adagrad, rmsprop.
        options: ``optim_args``, by name.

    Raises:
        ValueError: another optimizer, of which nothing is known here.
    """
    block = int((options or {}).get("block_size", 256))
    bits = {"adamw_torch_8bit": 8, "adamw_torch_4bit": 4}.get(optim)
    total = 0
    for parameter in parameters:
        count, plain = parameter.numel(), parameter.numel() * parameter.itemsize
        if optim in ("adamw_torch", "adamw_torch_fused"):
            total += 2 * plain
        elif bits is not None:
            quantized = count >= _QUANTIZED_FROM and count % block == 0
            total += 2 * (count * bits // 8 + 4 * count // block) if quantized else 2 * plain
        elif optim in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"):
            total += 2 * (count + 4 * -(-count // 256)) if count >= _QUANTIZED_FROM else 2 * 4 * count
        elif optim == "adafactor":
            rows = parameter.shape[-1] if parameter.dim() > 1 else 1
            total += 4 * (count if parameter.dim() < 2 else count // rows + count // parameter.shape[-2])
        elif optim in ("adagrad", "rmsprop"):
            total += plain
        elif optim != "sgd":
            raise ValueError(f"optim: expected one whose states are known here; got {optim!r}")
    return total


def optimizer_step_bytes(optim: str, parameters: Iterable[Tensor]) -> int:
    """What a step computes with, beyond parameters, gradients and states."""
    return 4 * _STEP_COPIES.get(optim, 0) * max((parameter.numel() for parameter in parameters), default=0)


def loss_buffer_bytes(rows: int, weight: Tensor, args: MOPOConfig, frozen: bool) -> int:
    """Working memory of the fused loss: what its plan needs for so many rows, at most ``max_buffer_bytes``."""
    name = backends.resolve(args.backend, weight.device)
    limit = args.max_buffer_bytes or default_buffer_bytes(weight)
    if name == "naive":
        return rows * weight.shape[0] * 4
    filtered = args.gradient_filter is not None
    layout = layout_of(weight, backends.tile_backend(name), limit, grad_hidden_only=frozen, filtered=filtered)
    plan = layout.plan(rows, limit)
    columns = (
        plan.columns * layout.column_bytes() + layout.filter_bytes(limit) + plan.weight_columns * layout.hidden_size * 4
    )
    return min(limit, int(plan.rows * (plan.columns * layout.tile_bytes() + layout.row_bytes())) + columns)


class _Storages(TorchDispatchMode):
    """Counts the bytes of every storage that operations make on a device, for as long as it lives.

    Args:
        device: whose storages count.
        known: tensors that do not.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._bytes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.rand.default and not args[0]:
            # By it a model decides whether to leave a layer out, in some releases at a rate of 0 as well. None is left
            # out, which takes the most.
            return torch.tensor(1.0)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        self.live += self._bytes[key]
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        self.live -= self._bytes.pop(key)


class _Loss(torch.autograd.Function):
    """Takes the memory of ``linear_mopo_loss`` and none of its time: a buffer during forward, and gradients that wait
    in the accumulation dtype until backward casts them, one after the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, buffer: int) -> Tensor:
        inputs = (rows, weight, bias)
        ctx.held = [
            (x.new_empty(x.shape, dtype=accumulation_dtype(x.dtype)), x.dtype) if x is not None and needed else None
            for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        work = rows.new_empty(buffer, dtype=torch.uint8)
        del work
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        gradients: list[Tensor | None] = []
        while ctx.held:
            held = ctx.held.pop()
            gradients.append(None if held is None else held[0].to(held[1]))
            del held
        return (*reversed(gradients), None)


def _give_sizes(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Every parameter and buffer of a meta model becomes one without storage on ``device``; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    kept = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                if id(value) not in made:
                    with mode:
                        empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
                    is_parameter = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
                    kept.append(value)
                tensors[name] = made[id(value)]  # type: ignore[assignment]


class _Batch:
    """A collator's batch, of which the model sees the sizes only, on ``device``."""

    def __init__(self, batch: Mapping[str, Tensor], mode: FakeTensorMode, device: torch.device) -> None:
        seen = ("input_ids", "position_ids", "attention_mask", "scored_rows")
        with mode:
            tokens = {
                name: torch.empty_like(value, device=device) if name in seen else value for name, value in batch.items()
            }
        self.layout = take_layout(tokens)
        self.scored = int((batch["labels"][:, 1:] != -100).sum()) if "labels" in batch else batch["target"].numel()

    def rows(self, model: nn.Module) -> Tensor:
        """The scored rows: (N, H)."""
        if not isinstance(self.layout, PaddedRows):
            return self.layout.rows(model)
        hidden = last_hidden_state(model, self.layout.input_ids, self.layout.attention_mask)
        return hidden.flatten(0, 1)[: self.scored].clone()


def estimate_memory(
    model: nn.Module,
    args: MOPOConfig,
    batch: Mapping[str, Tensor],
    evaluation_batch: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> MemoryEstimate:
    """The estimate for training ``model`` on batches no larger than ``batch``.

    Args:
        model: on the meta device, under its adapters; it is used up.
        args: the configuration of the run.
        batch: what the collator makes of the largest batch.
        evaluation_batch: the same of the largest that is only evaluated, by the reference or on held-out data.
        device: default that of ``args``.

    Raises:
        ValueError: an optimizer of which nothing is known.
    """
    device = args.device if device is None else device
    if args.gradient_checkpointing:
        given: Any = args.gradient_checkpointing_kwargs
        options = dict(given or {})
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        # As the Trainer does; the name before transformers 5.23 is the second.
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable(options or None, **own)
    model.train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _give_sizes(model, mode, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    known = [*model.parameters(), *model.buffers()]
    optim = getattr(args.optim, "value", args.optim)
    weights, gradients = tensor_bytes(known), tensor_bytes(trained)
    optimizer = optimizer_bytes(optim, trained, _options(args.optim_args))
    reference = _reference_bytes(model, args, trained, device)

    training = _Batch(batch, mode, device)
    evaluated = None if evaluation_batch is None else _Batch(evaluation_batch, mode, device)
    with mode, _autocast(args, device):
        if args.gradient_accumulation_steps > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        storages = _Storages(device, known)
        storages.live = storages.peak = gradients if args.gradient_accumulation_steps > 1 else 0
        with storages:
            before = storages.live
            rows, weight, bias = output_head(model).operands(training.rows(model))
            activations = storages.live - before
            frozen = not weight.requires_grad
            buffer = loss_buffer_bytes(rows.shape[0], weight, args, frozen)
            loss = _Loss.apply(rows, weight, bias, buffer)
            after = storages.live
            del rows, weight, bias
            loss.backward()
        step = storages.peak
        held = after - before - activations + buffer
        evaluation = _Storages(device, known)
        if evaluated is not None:
            with evaluation, torch.no_grad():
                rows, weight, _ = output_head(model).operands(evaluated.rows(model))
                loss_buffer = loss_buffer_bytes(rows.shape[0], weight, args, frozen=True)
                work = rows.new_empty(loss_buffer, dtype=torch.uint8)
                del rows, weight, work
    moments = {
        "forward, loss and backward": step,
        "the optimizer's step": gradients + optimizer_step_bytes(optim, trained),
        "evaluation, or the reference's pass": evaluation.peak,
    }
    moment = max(moments, key=lambda name: moments[name])
    return MemoryEstimate(
        weights=weights,
        reference=reference,
        optimizer=optimizer,
        gradients=gradients,
        activations=activations,
        loss=held,
        total=weights + reference + optimizer + moments[moment],
        moment=moment,
    )


def _options(text: str | None) -> dict[str, str]:
    """``optim_args``: name=value,..."""
    return dict(item.replace(" ", "").split("=", 1) for item in (text or "").split(",") if "=" in item)


def _reference_bytes(model: nn.Module, args: MOPOConfig, trained: list[nn.Parameter], device: torch.device) -> int:
    copies = (not is_peft(model) and args.reference == "model") + (args.reference_update_steps is not None)
    if args.reference_offload and device.type != "cpu":
        return 0
    one = sum(
        parameter.numel() * (2 if args.reference_dtype == "bfloat16" and parameter.dim() > 1 else parameter.itemsize)
        for parameter in trained
    )
    return copies * one


def _autocast(args: MOPOConfig, device: torch.device) -> AbstractContextManager[Any]:
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
