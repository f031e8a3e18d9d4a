"""What several kernels share: device functions, the transform's arguments, and what kernels are launched on.

The maths of csrc/mopo_math.h, for blocks of fp32 or fp64 numbers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends.triton import interpreter

# Triton 3.9 warns where this is left to its default, and 3.10 changes the default.
OPTIONS = {"enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether kernels run in the interpreter, on the CPU."""
    return isinstance(tl.sum, InterpretedFunction)


if interpreted():
    interpreter.repair()


def architecture() -> int:
    """Compute capability of the current device, 90 standing for 9.0; 0 in the interpreter."""
    return 0 if interpreted() else int(triton.runtime.driver.active.get_current_target().arch)


def transform_arguments(transform: LogitTransform) -> dict[str, Any]:
    """A kernel's arguments for ``z = outer * tanh(inner * x)`` with a softcap, or ``z = slope * x`` without one."""
    slope = transform.logit_scale / transform.temperature
    if transform.softcap is None:
        return {"inner": 0.0, "outer": 0.0, "slope": slope, "CAPPED": False, "SCALED": slope != 1.0}
    inner, outer = transform.logit_scale / transform.softcap, transform.softcap / transform.temperature
    return {"inner": inner, "outer": outer, "slope": slope, "CAPPED": True, "SCALED": True}


@triton.jit
def split(value: tl.float64, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """An fp64 number as the sum of two of ``dtype``."""
    exact = tl.full((), value, tl.float64)
    high = exact.to(dtype)
    return high, (exact - high.to(tl.float64)).to(dtype)


@triton.jit
def times(x: tl.tensor, constant: tl.float64) -> tl.tensor:
    """x times an fp64 constant, which is not rounded to the dtype of x."""
    high, low = split(constant, x.dtype)
    rounded = x * high
    product = rounded + x * low
    # An infinite x gives infinity, where the two terms are infinities of opposite sign or infinity times 0.
    return tl.where(product == product, product, rounded)


@triton.jit
def expm1(x: tl.tensor) -> tl.tensor:
    """exp(x) - 1, accurate near 0 as well."""
    # Terms of x (1 + x/2 (1 + x/3 (...))) that |x| < 1/2 needs.
    TERMS: tl.constexpr = 9 if x.dtype == tl.float32 else 16
    series = 1.0 + x * (1.0 / TERMS)
    for k in tl.static_range(TERMS - 1, 1, -1):
        series = 1.0 + x * (1.0 / k) * series
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def tanh_sech2(x: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """tanh(x) as the sum of two numbers, and 1 - tanh(x)^2. A logit is as large as the softcap allows, and its error is
    the relative error of its probability: so what each step rounds away is kept and put back at the end."""
    x2 = -2.0 * tl.abs(x)
    e = tl.exp(x2)
    # tanh |x| = (1 - e) / (1 + e)
    top = -expm1(x2)
    top_low = tl.where(x2 > -0.5, 0.0, (1.0 - top) - e)
    bottom = 1.0 + e
    bottom_low = e - (bottom - 1.0)
    inverse = 1.0 / bottom
    quotient = top * inverse
    correction = (tl.fma(-quotient, bottom, top) + (top_low - quotient * bottom_low)) * inverse
    tanh = quotient + correction
    low = correction - (tanh - quotient)
    # Each form where it does not cancel.
    sech2 = tl.where(tanh < 0.75, (1.0 - tanh * tanh) - 2.0 * tanh * low, 4.0 * e * (inverse * inverse))
    return tl.where(x < 0, -tanh, tanh), tl.where(x < 0, -low, low), sech2


@triton.jit
def logit(
    x: tl.tensor, inner: tl.float64, outer: tl.float64, slope: tl.float64, CAPPED: tl.constexpr, SCALED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The logit of a product plus bias, and ``bend``, where dz/dx = slope * bend."""
    if CAPPED:
        tanh, low, bend = tanh_sech2(times(x, inner))
        z = times(tanh, outer) + low * split(outer, x.dtype)[0]
    else:
        bend = tl.full(x.shape, 1.0, x.dtype)
        z = x
        if SCALED:
            z = times(x, slope)
    return z, bend


@triton.jit
def lowest(shape: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """What a running maximum starts from: finite, so that no difference of it and a logit of -inf is NaN."""
    VALUE: tl.constexpr = -3.4028234663852886e38 if dtype == tl.float32 else -1.7976931348623157e308
    return tl.full(shape, VALUE, dtype)


@triton.jit
def accumulate(
    row_max: tl.tensor, sum_exp: tl.tensor, value: tl.tensor, weight: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Element by element, the running maximum and ``sum_exp = sum weight * exp(value - row_max)``, ``value`` included.
    A NaN is kept in the sum."""
    difference = value - row_max
    # One of the two factors, exp(row_max - new) and exp(value - new), is always 1.
    smaller = tl.exp(-tl.abs(difference))
    sum_exp = tl.where(difference > 0, sum_exp * smaller + weight, sum_exp + smaller * weight)
    return tl.maximum(row_max, value), sum_exp


@triton.jit
def reduce(row_max: tl.tensor, sum_exp: tl.tensor, axis: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of running maxima and totals along an axis, those of all."""
    top = tl.max(row_max, axis=axis)
    return top, tl.sum(sum_exp * tl.exp(row_max - tl.expand_dims(top, axis)), axis=axis)
