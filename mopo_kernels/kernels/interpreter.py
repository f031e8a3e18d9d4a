"""Repairs to Triton's interpreter, which gets bf16 wrong: it cuts off fp32 where a GPU rounds, and multiplies matrices
of bf16 as if their bits were integers (3.6 to 3.9)."""

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
    """Replace the two methods; harmless if done twice."""
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
