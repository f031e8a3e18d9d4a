"""What the custom ops share: tensors kept for backward, and gradients that forward has computed already.

Each op runs below autograd and autocast; under ``torch.compile`` it is one opaque node whose output shapes the fake
kernel tells. Its arguments come one by one and are put back into the bundle they were taken from at once
(:class:`mopo_kernels.arguments.OpArguments`). Gradients computed during forward are handed over once and scaled in
place, so that they are never there twice; a second backward through the same graph (``retain_graph=True``) computes
them again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mopo_kernels import checks
from mopo_kernels.arguments import CallValues, HeadInputs, HeadOptions, PairBatch
from mopo_kernels.backends import tile_backend
from mopo_kernels.fused.buffer_plan import accumulation_dtype
from mopo_kernels.fused.vocab_parallel import VocabShard

# Inputs that gradients flow through; all others are constants.
_DIFFERENTIABLE = ("hidden", "weight", "bias")


def shard_of(inputs: HeadInputs, options: HeadOptions) -> VocabShard | None:
    """This rank's part of the vocabulary; None without a process group."""
    return None if options.process_group is None else VocabShard.from_group(options.process_group, inputs)


def check_values(
    inputs: HeadInputs,
    options: HeadOptions,
    shard: VocabShard | None,
    cu_seqlens: Tensor | None = None,
    batch: PairBatch | None = None,
) -> None:
    """The values of the targets, of ``ignore_index`` among them, and of the sequences and pairs."""
    vocabulary = inputs.weight.shape[0] if shard is None else shard.vocabulary
    checks.ignore_index(options.ignore_index, vocabulary)
    tokens, sequences = inputs.target.shape[0], 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    values = CallValues(inputs.target, vocabulary, options.ignore_index, cu_seqlens, tokens, batch, sequences)
    tile_backend(options.backend).check_values(values)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Ops run below autocast. Where it is off, entering ``torch.autocast`` would only take time."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def fake_gradients(inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias as forward or backward return them: of size 0 where not needed."""
    hidden, weight = inputs.hidden, inputs.weight
    dtype = accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape if inputs.need_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if inputs.need_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[:1] if inputs.need_bias else (0,), dtype=dtype),
    )


def save_arguments(ctx: Any, names: Sequence[str], flat: Sequence[Any], *outputs: Tensor) -> None:
    """Keep an op's arguments, and some of its outputs, for backward."""
    tensors = ((name, x) for name, x in zip(names, flat, strict=True) if isinstance(x, Tensor))
    ctx.save_for_backward(*(x if name in _DIFFERENTIABLE else constant(x) for name, x in tensors), *outputs)
    ctx.arguments = tuple(None if isinstance(x, Tensor) else (x,) for x in flat)


def saved_arguments(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The arguments and the outputs that :func:`save_arguments` kept."""
    tensors = iter(ctx.saved_tensors)
    flat = [next(tensors) if x is None else x[0] for x in ctx.arguments]
    return flat, list(tensors)


def constant(tensor: Tensor) -> Tensor:
    """A constant as autograd can save it: one made under ``torch.inference_mode()`` (reference log-probabilities often
    are) as a copy. Inputs that gradients flow through get no such help, here as elsewhere in PyTorch."""
    return tensor.clone() if tensor.is_inference() else tensor


def _wrapped(tensor: Tensor) -> bool:
    """Under torch.compile tensors are wrappers, and memory is the compiler's business; upstream factors are by
    is_grads_batched or torch.vmap, and nothing can be scaled by several in place."""
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) is not Tensor or batched


def take_gradients(ctx: Any) -> list[Tensor] | None:
    """The gradients that forward left in ``ctx.gradients``, once; None after that."""
    gradients: list[Tensor] | None = ctx.gradients
    if gradients is not None and _wrapped(gradients[0]):
        return list(gradients)
    ctx.gradients = None
    return gradients


def scale_last(gradients: list[Tensor], factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """The last of the gradients times ``factor``, in ``dtype``; in place unless somebody else sees it."""
    gradient = gradients.pop()
    if _wrapped(gradient) or _wrapped(factor):
        return (gradient * factor).to(dtype)
    # Two references: the name above and the call's own argument.
    alone = sys.getrefcount(gradient) == 2
    return tile_backend(backend).scaled(gradient, factor, dtype, overwrite=alone)
