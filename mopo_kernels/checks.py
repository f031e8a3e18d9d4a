"""Argument checks. Errors name the argument, what was expected and what came.

Shapes, dtypes and devices are always checked (:func:`expect`, :func:`shape`, :func:`dtype`, :func:`device`). Values are
checked on the host for CPU tensors and by asynchronous device asserts for CUDA tensors, never by a synchronisation
(:func:`value`); custom ops check values when they run, so compiled graphs check them too.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of positive numbers that are divided by, and of all that are multiplied with: beyond, squares, quotients and sums of a
# few of them leave the range of fp32, and the result would be NaN, or that of another number.
SMALLEST, LARGEST = 1e-10, 1e10
# The Triton kernel that fuses loses 2^-23 of the softcap from every logit, which is as much as bf16 does at 1e5.
LARGEST_SOFTCAP = 1e5


def expect(holds: bool, argument: str, expectation: str, got: object) -> None:
    """Raise ValueError unless ``holds``."""
    if not holds:
        raise ValueError(f"{argument}: expected {expectation}; got {got}")


def choice(argument: str, got: object, allowed: tuple[str, ...]) -> None:
    expect(isinstance(got, str) and got in allowed, argument, f"one of {', '.join(allowed)}", repr(got))


def tensors(**arguments: object) -> None:
    for argument, got in arguments.items():
        if not isinstance(got, Tensor):
            raise ValueError(f"{argument}: expected a tensor; got {type(got).__name__}")
        expect(got.layout == torch.strided, argument, "a dense tensor", f"one of layout {got.layout}")


def optional_tensors(**arguments: object) -> None:
    tensors(**{argument: got for argument, got in arguments.items() if got is not None})


def number(argument: str, got: object) -> None:
    # numpy's numbers pass by the second test, which torch.compile cannot make of one that changes from call to call.
    if isinstance(got, bool) or not (isinstance(got, (int, float)) or _of_numpy(got, numbers.Real)):
        raise ValueError(f"{argument}: expected a number; got {got!r}")


def integer(argument: str, got: object) -> None:
    if isinstance(got, bool) or not (isinstance(got, int) or _of_numpy(got, numbers.Integral)):
        raise ValueError(f"{argument}: expected an integer; got {got!r}")


def _of_numpy(got: object, kind: type) -> bool:
    """A fraction is a real number too, but none that an op takes."""
    return isinstance(got, kind) and hasattr(got, "dtype")


def within(argument: str, got: float, smallest: float, largest: float) -> None:
    number(argument, got)
    expect(smallest <= got <= largest, argument, f"a number in {smallest:g} .. {largest:g}", got)


def reverse_mode(**arguments: Tensor | None) -> None:
    """Of all ways to differentiate the ops know torch.autograd's reverse mode; forward mode would find 0."""
    if torch.compiler.is_compiling():
        return
    for argument, tensor in arguments.items():
        layer = tensor
        while layer is not None:
            tangent = forward_ad.unpack_dual(layer).tangent is not None
            if tangent or (torch._C._functorch.is_gradtrackingtensor(layer) and layer.requires_grad):
                got = "a tangent of forward mode" if tangent else "a tensor that torch.func differentiates by"
                raise NotImplementedError(
                    f"{argument}: expected reverse mode of torch.autograd; got {got}; the functions of "
                    "mopo_kernels.naive take any"
                )
            layer = _inside(layer)


def _inside(tensor: Tensor) -> Tensor | None:
    """What a wrapper of torch.func holds; None for other tensors."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return torch._C._functorch.get_unwrapped(tensor) if wrapped else None


def requires_grad(tensor: Tensor | None) -> bool:
    """Whether a gradient for the tensor is wanted, be it by somebody outside torch.vmap, whose wrapper says no."""
    if tensor is None or not torch.is_grad_enabled():
        return False
    inside = None if torch.compiler.is_compiling() else _inside(tensor)
    return tensor.requires_grad or requires_grad(inside)


def constant(argument: str, tensor: Tensor) -> None:
    expect(not requires_grad(tensor), argument, "a constant, as no gradient reaches it", "one that requires grad")


def shape(argument: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """``letters`` names the dimensions in the message, e.g. "(P, K)"."""
    if tensor.dim() != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True)):
        raise ValueError(f"{argument}: expected shape {letters} = {tuple(expected)}; got {tuple(tensor.shape)}")


def dimensions(argument: str, tensor: Tensor, letters: str) -> None:
    count = letters.count(",") + (0 if letters.endswith(",)") else 1)
    if tensor.dim() != count:
        raise ValueError(f"{argument}: expected shape {letters}; got {tuple(tensor.shape)}")


def columns(argument: str, tensor: Tensor, size: int) -> None:
    if tensor.shape[1] != size:
        raise ValueError(f"{argument}: expected H = {size} columns, as hidden has; got {tuple(tensor.shape)}")


def dtype(argument: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{argument}: expected dtype {names}; got {str(tensor.dtype).removeprefix('torch.')}")


def real(argument: str, tensor: Tensor) -> None:
    expect(not tensor.is_complex(), argument, "a real dtype", str(tensor.dtype).removeprefix("torch."))


def device(argument: str, tensor: Tensor, expected: torch.device, host: bool = False) -> None:
    """``host``: the CPU will do as well."""
    if tensor.device != expected and not (host and tensor.device.type == "cpu"):
        raise ValueError(f"{argument}: expected a tensor on {expected}, as hidden or logprob is; got {tensor.device}")


def plain(argument: str, tensor: Tensor) -> None:
    """A DTensor would mix with plain ones somewhere inside, or be taken for its local part."""
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{argument}: expected a plain tensor, as full_tensor() gives, or to_local() for process_group; got a "
            "DTensor"
        )


def value(
    argument: str, tensor: Tensor, valid: Callable[[Tensor], Tensor], expectation: str, where: str = "index"
) -> None:
    """Every element must satisfy ``valid``; the message shows the first that does not."""
    if tensor.numel() == 0:
        return
    good = valid(tensor)
    if tensor.device.type != "cpu":
        torch._assert_async(good.all(), f"{argument}: expected {expectation}")
        return
    if not bool(good.all()):
        position = tuple((~good).nonzero()[0].tolist())
        label = position[0] if len(position) == 1 else position
        raise ValueError(f"{argument}: expected {expectation}; got {tensor[position].item()} at {where} {label}")


def ignore_index(got: int, vocabulary: int = 0) -> None:
    """``vocabulary``: how many ids it must not be one of."""
    integer("ignore_index", got)
    expect(not 0 <= got < vocabulary, "ignore_index", f"a number outside 0 .. V - 1 = {vocabulary - 1}", got)
    expect(-(2**63) <= got < 2**63, "ignore_index", "a number of 64 bits, as target has", got)


def targets(target: Tensor, vocabulary: int, ignored: int) -> None:
    value(
        "target",
        target,
        lambda t: ((t >= 0) & (t < vocabulary)) | (t == ignored),
        f"a number in 0 .. V - 1 = {vocabulary - 1} or ignore_index = {ignored}",
    )


def _cu_seqlens_ends(offsets: Tensor, tokens: int) -> None:
    value("cu_seqlens[0]", offsets[:1], lambda t: t == 0, "0")
    value("cu_seqlens[-1]", offsets[-1:], lambda t: t == tokens, f"N = {tokens}")


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
    value("cu_seqlens", offsets.diff(), lambda t: t >= 0, "offsets that do not decrease", where="step")


def ref_logprob(tensor: Tensor) -> None:
    # On an accelerator a failed assert would end the process before it can save anything; there the loss is NaN.
    if tensor.device.type == "cpu":
        value("ref_logprob", tensor, torch.isfinite, "a finite number")


def normalizer(got: float) -> None:
    number("normalizer", got)
    expect(got == 0 or SMALLEST <= got <= LARGEST, "normalizer", f"0 or a number in {SMALLEST:g} .. {LARGEST:g}", got)
