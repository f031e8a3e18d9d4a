"""Argument checks. Errors name the argument, what was expected and what came.

Shapes, dtypes and devices are always checked (:func:`expect`, :func:`shape`, :func:`dtype`, :func:`device`). Values are
checked on the host for CPU tensors and by asynchronous device asserts for CUDA tensors, never by a synchronisation
(:func:`value`); custom ops check values when they run, so compiled graphs check them too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mopo_kernels.reference import ESTIMATORS, LOSS_TYPES

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def expect(holds: bool, argument: str, expectation: str, got: object) -> None:
    """Raise ValueError unless ``holds``."""
    if not holds:
        raise ValueError(f"{argument} must {expectation}; got {got}")


def choice(argument: str, got: str, allowed: tuple[str, ...]) -> None:
    expect(got in allowed, argument, f"be one of {', '.join(allowed)}", repr(got))


def tensors(**arguments: object) -> None:
    for argument, got in arguments.items():
        if not isinstance(got, Tensor):
            raise ValueError(f"{argument} must be a tensor; got {type(got).__name__}")


def optional_tensors(**arguments: object) -> None:
    tensors(**{argument: got for argument, got in arguments.items() if got is not None})


def number(argument: str, got: object) -> None:
    # numpy's numbers pass by the second test, which torch.compile cannot make of one that changes from call to call.
    if not isinstance(got, (int, float)) and not hasattr(got, "__float__"):
        raise ValueError(f"{argument} must be a number; got {got!r}")


def integer(argument: str, got: object) -> None:
    if not isinstance(got, int) and not hasattr(got, "__index__"):
        raise ValueError(f"{argument} must be an integer; got {got!r}")


def positive(argument: str, got: float) -> None:
    number(argument, got)
    expect(got > 0 and got != float("inf"), argument, "be positive and finite", got)


def loss_options(tau: float, loss_type: str, max_ratio: float | None, estimator: str) -> None:
    """Options of :func:`mopo_kernels.mopo_loss`."""
    choice("loss_type", loss_type, LOSS_TYPES)
    choice("estimator", estimator, ESTIMATORS)
    positive("tau", tau)
    if max_ratio is not None:
        number("max_ratio", max_ratio)
        # Where labels favour no response the ratio is 1: a smaller cap would bind even there.
        expect(1 <= max_ratio < float("inf"), "max_ratio", "be finite and at least 1", max_ratio)


def head_options(
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    max_buffer_bytes: int | None,
    gradient_filter: float | None,
) -> None:
    """Options of :func:`mopo_kernels.linear_logprob`."""
    if softcap is not None:
        positive("softcap", softcap)
    number("logit_scale", logit_scale)
    expect(abs(logit_scale) < float("inf"), "logit_scale", "be finite", logit_scale)
    positive("temperature", temperature)
    if max_buffer_bytes is not None:
        integer("max_buffer_bytes", max_buffer_bytes)
        expect(max_buffer_bytes > 0, "max_buffer_bytes", "be positive", max_buffer_bytes)
    if gradient_filter is not None:
        number("gradient_filter", gradient_filter)
        expect(0 < gradient_filter < 1, "gradient_filter", "be None or between 0 and 1", gradient_filter)


def shape(argument: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """``letters`` names the dimensions in the message, e.g. "(P, K)"."""
    if tensor.dim() != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True)):
        raise ValueError(f"{argument} must have shape {letters} = {tuple(expected)}; got {tuple(tensor.shape)}")


def dimensions(argument: str, tensor: Tensor, letters: str) -> None:
    count = letters.count(",") + (0 if letters.endswith(",)") else 1)
    if tensor.dim() != count:
        raise ValueError(f"{argument} must have shape {letters}; got {tuple(tensor.shape)}")


def columns(argument: str, tensor: Tensor, size: int) -> None:
    if tensor.shape[1] != size:
        raise ValueError(f"{argument} must have H = {size} columns, as hidden has; got {tuple(tensor.shape)}")


def dtype(argument: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{argument} must have dtype {names}; got {str(tensor.dtype).removeprefix('torch.')}")


def device(argument: str, tensor: Tensor, expected: torch.device, host: bool = False) -> None:
    """``host``: the CPU will do as well."""
    if tensor.device != expected and not (host and tensor.device.type == "cpu"):
        raise ValueError(f"{argument} must be on {expected}, as hidden or logprob is; got {tensor.device}")


def plain(argument: str, tensor: Tensor) -> None:
    """A DTensor would mix with plain ones somewhere inside, or be taken for its local part."""
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{argument} must be a plain tensor: use its full_tensor(), or its to_local() with process_group; "
            "got a DTensor"
        )


def value(
    argument: str, tensor: Tensor, valid: Callable[[Tensor], Tensor], expectation: str, where: str = "index"
) -> None:
    """Every element must satisfy ``valid``; the message shows the first that does not."""
    if tensor.numel() == 0:
        return
    good = valid(tensor)
    if tensor.device.type != "cpu":
        torch._assert_async(good.all(), f"{argument} must {expectation}")
        return
    if not bool(good.all()):
        position = tuple((~good).nonzero()[0].tolist())
        label = position[0] if len(position) == 1 else position
        raise ValueError(f"{argument} must {expectation}; got {tensor[position].item()} at {where} {label}")


def ignore_index(got: int, vocabulary: int) -> None:
    integer("ignore_index", got)
    expect(not 0 <= got < vocabulary, "ignore_index", f"lie outside 0 .. V - 1 = {vocabulary - 1}", got)


def targets(target: Tensor, vocabulary: int, ignored: int) -> None:
    value(
        "target",
        target,
        lambda t: ((t >= 0) & (t < vocabulary)) | (t == ignored),
        f"lie in 0 .. V - 1 = {vocabulary - 1} or equal ignore_index = {ignored}",
    )


def _cu_seqlens_ends(offsets: Tensor, tokens: int) -> None:
    value("cu_seqlens[0]", offsets[:1], lambda t: t == 0, "be 0")
    value("cu_seqlens[-1]", offsets[-1:], lambda t: t == tokens, f"be N = {tokens}")


def per_sequence(offsets: Tensor, tokens: int, **arguments: Tensor | None) -> None:
    """The arguments have shape (S,), S + 1 being the length of cu_seqlens."""
    expected = (offsets.shape[0] - 1,)
    for argument, tensor in arguments.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            # Lengths given as offsets are one too few. Where values can be read, say that they are wrong instead.
            if type(offsets) is Tensor and offsets.device.type == "cpu" and not torch.compiler.is_compiling():
                _cu_seqlens_ends(offsets, tokens)
            shape(argument, tensor, expected, "(S,)")


def cu_seqlens(offsets: Tensor, tokens: int) -> None:
    _cu_seqlens_ends(offsets, tokens)
    value("cu_seqlens", offsets.diff(), lambda t: t >= 0, "not decrease", where="step")


def ref_logprob(tensor: Tensor) -> None:
    # On an accelerator a failed assert would end the process before it can save anything; there the loss is NaN.
    if tensor.device.type == "cpu":
        value("ref_logprob", tensor, torch.isfinite, "be finite")


def pair_values(
    pairs: Tensor,
    preference: Tensor,
    objective_weight: Tensor,
    sequences: int,
    pair_weight: Tensor | None,
    label_rate: Tensor | None,
    margin: Tensor | None,
    length: Tensor | None,
    prompt_index: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    value("pairs", pairs, lambda t: (t >= 0) & (t < sequences), f"lie in 0 .. S - 1 = {sequences - 1}")
    value("pairs", pairs, lambda t: (t[:, :1] != t[:, 1:]).expand_as(t), "name two different responses")
    if prompt_index is not None:
        prompt = prompt_index
        value(
            "pairs",
            pairs,
            lambda t: (prompt[t[:, :1]] == prompt[t[:, 1:]]).expand_as(t),
            "join responses to one prompt, as prompt_index has it",
        )
    value("preference", preference, lambda t: torch.isnan(t) | ((t >= 0) & (t <= 1)), "lie in [0, 1] or be NaN")
    value("objective_weight", objective_weight, lambda t: (t >= 0) & torch.isfinite(t), "be finite and not negative")
    if pair_weight is not None:
        value("pair_weight", pair_weight, lambda t: (t >= 0) & torch.isfinite(t), "be finite and not negative")
    if label_rate is not None:
        value("label_rate", label_rate, lambda t: (t > 0) & (t <= 1), "lie in (0, 1]")
    if margin is not None:
        value("margin", margin, torch.isfinite, "be finite")
    if length is not None:
        value("length", length, lambda t: (t > 0) & torch.isfinite(t), "be positive and finite")
    if normalizer is not None:
        value("normalizer", normalizer.reshape(1), lambda t: (t >= 0) & torch.isfinite(t), "be finite and not negative")
