"""Repairs to Triton's interpreter.

It gets bf16 wrong: it cuts off fp32 where a GPU rounds, and multiplies matrices of bf16 as if their bits were integers
(3.6 to 3.9). And its scalars are arrays of one element, which numpy 2.4 no longer takes for integers: no ``range`` over
a number that a kernel is given, or loads, works in 3.6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _to_bf16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """fp32 to the bits of bf16, to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.uint16).numpy()


def _from_bf16(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def repair() -> None:
    """Replace what is wrong; harmless if done twice."""
    _repair_bf16()
    _repair_index()


def _repair_index() -> None:
    patch: Any = interpreter._patch_lang_tensor
    if getattr(patch, "repaired", False):
        return

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_lang_tensor.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_bf16() -> None:
    builder: Any = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot
    if getattr(cast, "repaired", False):
        return

    def cast_impl(self: Any, source: Any, destination: Any) -> Any:
        kinds = source.dtype.scalar, destination.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bf16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_from_bf16(source.data), tl.float32)
        return cast(self, source, destination)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a = interpreter.TensorHandle(_from_bf16(a.data), tl.float32)
            b = interpreter.TensorHandle(_from_bf16(b.data), tl.float32)
        return dot(self, a, b, accumulator, *options)

    cast_impl.repaired = True  # type: ignore[attr-defined]
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
