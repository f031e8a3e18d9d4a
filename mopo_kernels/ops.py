"""The custom ops, one after the other: forward, fake kernel, what is kept for backward, backward.

Each op runs the driver below autograd and autocast; under ``torch.compile`` it is one opaque node whose output shapes
the fake kernel tells. Gradients computed during forward are handed over once and scaled in place, so that they are
never held twice; a second backward through the same graph (``retain_graph=True``) computes them again.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mopo_kernels import checks, driver
from mopo_kernels.backends import Head, tile_backend
from mopo_kernels.coefficients import PairData
from mopo_kernels.driver import Call
from mopo_kernels.head import Folded, Tile, accumulation_dtype
from mopo_kernels.parallel import Shard


def _wrapped(tensor: Tensor) -> bool:
    """Under torch.compile tensors are wrappers, and memory is the compiler's business; upstream factors are by
    is_grads_batched or torch.vmap, and nothing can be scaled by several in place."""
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) is not Tensor or batched


def _take(ctx: Any) -> list[Tensor] | None:
    """The gradients that forward left, once; None after that."""
    held: list[Tensor] | None = ctx.held
    if held is not None and _wrapped(held[0]):
        return list(held)
    ctx.held = None
    return held


def _scale(held: list[Tensor], factor: Tensor, like: Tensor, backend: str) -> Tensor:
    """The last of the held gradients times ``factor``, in the input's dtype; in place unless somebody else sees it."""
    gradient = held.pop()
    if _wrapped(gradient) or _wrapped(factor):
        return (gradient * factor).to(like.dtype)
    # Two references: the name above and the call's own argument.
    alone = sys.getrefcount(gradient) == 2
    return tile_backend(backend).scaled(gradient, factor, like.dtype, overwrite=alone)


def _saved(tensor: Tensor) -> Tensor:
    """A constant as autograd can save it: one made under ``torch.inference_mode()`` (reference log-probabilities often
    are) as a copy. Inputs that gradients flow through get no such help, here as elsewhere in PyTorch."""
    return tensor.clone() if tensor.is_inference() else tensor


# ------------------------------------------------------------------------------------------- log-probability per token

_CALL = (
    "int ignore_index, float? softcap, float logit_scale, float temperature, str backend, int max_buffer_bytes, "
    "str? process_group, float? gradient_filter, bool need_hidden, bool need_weight, bool need_bias"
)


def _call(
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    backend: str,
    max_buffer_bytes: int,
    process_group: str | None,
    gradient_filter: float | None,
    *needs: bool,
) -> Call:
    """The arguments that ``_CALL`` names."""
    need_hidden, need_weight, need_bias = needs
    return Call(
        ignore_index,
        Head(softcap, logit_scale, temperature),
        backend,
        max_buffer_bytes,
        process_group,
        gradient_filter,
        (need_hidden, need_weight, need_bias),
    )


def _check_targets(target: Tensor, weight: Tensor, shard: Shard | None, call: Call) -> None:
    vocabulary = weight.shape[0] if shard is None else shard.vocabulary
    checks.ignore_index(call.ignore_index, vocabulary)
    checks.targets(target, vocabulary, call.ignore_index)


@torch.library.custom_op(
    "mopo::linear_logprob",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    call = _call(*options)
    shard = call.shard(hidden, weight, target)
    _check_targets(target, weight, shard, call)
    with torch.autocast(hidden.device.type, enabled=False):
        return driver.linear_logprob(hidden, weight, target, bias, call, shard)


@linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    call = _call(*options)
    dtype, tokens, vocabulary = accumulation_dtype(hidden.dtype), hidden.shape[0], weight.shape[0]
    logprob, empty = hidden.new_empty(tokens, dtype=dtype), hidden.new_empty(0, dtype=dtype)
    logsumexp = hidden.new_empty(tokens, dtype=torch.float64)
    if call.frozen:
        return logprob, logsumexp, hidden.new_empty(hidden.shape, dtype=dtype), empty, torch.empty_like(empty)
    if not call.keeps_products(tokens, weight):
        return logprob, logsumexp, *(torch.empty_like(empty) for _ in range(3))
    backend = tile_backend(call.backend)
    if not backend.fuses(weight.dtype):
        values, offsets = weight.new_empty((tokens, vocabulary), dtype=dtype), empty
    else:
        values = weight.new_empty((tokens, vocabulary))
        blocks = () if backend.row_offsets(weight.dtype) else (backend.offset_blocks(vocabulary),)
        offsets = weight.new_empty((*blocks, tokens), dtype=torch.float32)
    return logprob, logsumexp, torch.empty_like(empty), values, offsets


@torch.library.custom_op(
    "mopo::linear_logprob_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor logprob, Tensor logsumexp, "
    f"Tensor products, Tensor offsets, {_CALL}) -> (Tensor, Tensor, Tensor)",
)
def linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logprob: Tensor,
    logsumexp: Tensor,
    products: Tensor,
    offsets: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(*options)
    kept = None
    if products.dim() == 2:
        by_row = tile_backend(call.backend).row_offsets(products.dtype)
        kept = Tile(products, scale=offsets) if by_row else Tile(products, offsets if offsets.dim() == 2 else None)
    shard = call.shard(hidden, weight, target)
    with torch.autocast(hidden.device.type, enabled=False):
        return driver.linear_logprob_backward(
            grad, hidden, weight, target, bias, Folded(logprob, logsumexp), kept, call, shard
        )


def _fake_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[:1] if need_bias else (0,), dtype=dtype),
    )


@linear_logprob_backward.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, *rest[-3:])


def _linear_logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, *options = inputs
    logprob, logsumexp, unit, products, offsets = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logsumexp, unit, products, offsets)
    ctx.save_for_backward(hidden, weight, _saved(target), bias, logprob, logsumexp, products, offsets)
    ctx.options = options
    ctx.held = [unit] if unit.dim() == 2 else None


@once_differentiable
def _linear_logprob_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (4 + len(ctx.options))
    hidden, weight, target, bias, *kept = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.options[-3:]
    held = _take(ctx)
    # Where nothing is scored the derivative is 0 whatever comes from upstream, NaN included.
    grad = grad.where(target != ctx.options[0], 0)
    if held is not None:
        return _scale(held, grad[:, None], hidden, ctx.options[4]), *(None,) * (3 + len(ctx.options))
    dhidden, dweight, dbias = linear_logprob_backward(grad, hidden, weight, target, bias, *kept, *ctx.options)
    return (
        dhidden.to(hidden.dtype) if need_hidden else None,
        dweight.to(weight.dtype) if need_weight else None,
        None,
        dbias.to(bias.dtype) if need_bias else None,
        *(None,) * len(ctx.options),
    )


linear_logprob.register_autograd(_linear_logprob_backward, setup_context=_linear_logprob_setup)


# ----------------------------------------------------------------------------------------- sums over packed sequences


@torch.library.custom_op(
    "mopo::segment_sum", mutates_args=(), schema="(Tensor value, Tensor cu_seqlens, str backend) -> Tensor"
)
def segment_sum(value: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    checks.cu_seqlens(cu_seqlens, value.shape[0])
    return tile_backend(backend).segment_sum(value, cu_seqlens)


@segment_sum.register_fake
def _(value: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    return value.new_empty(cu_seqlens.shape[0] - 1)


def _segment_sum_setup(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(_saved(inputs[1]))
    ctx.tokens = inputs[0].shape[0]


def _segment_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (cu_seqlens,) = ctx.saved_tensors
    token = torch.arange(ctx.tokens, device=grad.device, dtype=cu_seqlens.dtype)
    return grad[torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)], None, None


segment_sum.register_autograd(_segment_sum_backward, setup_context=_segment_sum_setup)


# ------------------------------------------------------------------------------------- loss from log-probabilities

_PAIRS = "Tensor pairs, Tensor preference, Tensor objective_weight"
_LOSS = (
    "Tensor? pair_weight, Tensor? label_rate, Tensor? margin, Tensor? length, Tensor? prompt_index, "
    "Tensor? normalizer, float tau, str loss_type, float? max_ratio, str estimator"
)


def _pair_data(
    sequences: int,
    dtype: torch.dtype,
    pairs: Tensor,
    preference: Tensor,
    objective_weight: Tensor,
    pair_weight: Tensor | None,
    label_rate: Tensor | None,
    margin: Tensor | None,
    length: Tensor | None,
    prompt_index: Tensor | None,
    normalizer: Tensor | None,
    tau: float,
    loss_type: str,
    max_ratio: float | None,
    estimator: str,
) -> PairData:
    """Checked values, in ``dtype``."""
    checks.pair_values(
        pairs,
        preference,
        objective_weight,
        sequences,
        pair_weight,
        label_rate,
        margin,
        length,
        prompt_index,
        normalizer,
    )

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return PairData(
        pairs=pairs,
        preference=preference.to(dtype),
        objective_weight=objective_weight.to(dtype),
        tau=tau,
        loss_type=loss_type,
        pair_weight=cast(pair_weight),
        label_rate=cast(label_rate),
        margin=cast(margin),
        length=cast(length),
        prompt_index=prompt_index,
        max_ratio=max_ratio,
        estimator=estimator,
        normalizer=cast(normalizer),
    )


@torch.library.custom_op(
    "mopo::mopo_loss",
    mutates_args=(),
    schema=f"(Tensor logprob, Tensor ref_logprob, {_PAIRS}, {_LOSS}, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def mopo_loss(
    logprob: Tensor, ref_logprob: Tensor, pairs: Tensor, preference: Tensor, objective_weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    checks.ref_logprob(ref_logprob)
    *arguments, backend = rest
    data = _pair_data(ref_logprob.shape[0], ref_logprob.dtype, pairs, preference, objective_weight, *arguments)
    output = driver.evaluate_loss(logprob, ref_logprob, data)
    return (*(t.clone() for t in output), tile_backend(backend).pair_coefficient(logprob, ref_logprob, data))


@mopo_loss.register_fake
def _(logprob: Tensor, ref_logprob: Tensor, pairs: Tensor, preference: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (*_fake_outputs(logprob, logprob.shape[0], pairs, preference), torch.empty_like(logprob))


def _fake_outputs(like: Tensor, sequences: int, pairs: Tensor, preference: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(like.dtype)
    sizes: tuple[tuple[int, ...], ...] = (
        (),
        (sequences,),
        (pairs.shape[0],),
        (preference.shape[1],),
        (preference.shape[1],),
        (),
    )
    return tuple(like.new_empty(size, dtype=dtype) for size in sizes)


def _mopo_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1])
    ctx.inputs = len(inputs)


@once_differentiable
def _mopo_loss_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * ctx.inputs
    (coefficient,) = ctx.saved_tensors
    return grad * coefficient, *(None,) * (ctx.inputs - 1)


mopo_loss.register_autograd(_mopo_loss_backward, setup_context=_mopo_loss_setup)


# ----------------------------------------------------------------------------------- loss from hidden states, one pass


@torch.library.custom_op(
    "mopo::linear_mopo_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor target, Tensor cu_seqlens, Tensor? bias, Tensor? ref_logprob, "
    f"Tensor? ref_hidden, {_PAIRS}, {_LOSS}, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_mopo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    ref_logprob: Tensor | None,
    ref_hidden: Tensor | None,
    pairs: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    pair_arguments, call = rest[:-11], _call(*rest[-11:])
    shard = call.shard(hidden, weight, target)
    _check_targets(target, weight, shard, call)
    checks.cu_seqlens(cu_seqlens, hidden.shape[0])
    if ref_logprob is not None:
        checks.ref_logprob(ref_logprob)
    device_pairs = driver.to_device(pairs, hidden.device)
    data = _pair_data(cu_seqlens.shape[0] - 1, accumulation_dtype(hidden.dtype), device_pairs, *pair_arguments)
    with torch.autocast(hidden.device.type, enabled=False):
        output, *gradients = driver.linear_mopo_loss(
            hidden, weight, target, cu_seqlens, bias, ref_logprob, ref_hidden, data, pairs, call, shard
        )
    return (*(t.clone() for t in output), *gradients)


@linear_mopo_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    ref_logprob: Tensor | None,
    ref_hidden: Tensor | None,
    pairs: Tensor,
    preference: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return (
        *_fake_outputs(hidden, cu_seqlens.shape[0] - 1, pairs, preference),
        *_fake_gradients(hidden, weight, *rest[-3:]),
    )


def _linear_mopo_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    # All but hidden, weight and bias are constants.
    tensors = ((i, x) for i, x in enumerate(inputs) if isinstance(x, Tensor))
    ctx.save_for_backward(*(x if i in (0, 1, 4) else _saved(x) for i, x in tensors))
    ctx.arguments = tuple(None if isinstance(x, Tensor) else (x,) for x in inputs)
    ctx.held = list(output[-3:])


@once_differentiable
def _linear_mopo_loss_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.arguments)
    tensors = iter(ctx.saved_tensors)
    inputs = [next(tensors) if x is None else x[0] for x in ctx.arguments]
    held = _take(ctx)
    if held is None:
        held = list(linear_mopo_loss(*inputs)[-3:])
    gradients: list[Tensor | None] = [None] * len(inputs)
    for position, needed in zip((4, 1, 0), reversed(inputs[-3:]), strict=True):
        scaled = _scale(held, grad, inputs[0], inputs[-7])
        gradients[position] = scaled if needed else None
    return tuple(gradients)


linear_mopo_loss.register_autograd(_linear_mopo_loss_backward, setup_context=_linear_mopo_loss_setup)
