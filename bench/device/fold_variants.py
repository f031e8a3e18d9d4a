"""Ways to write linear_fold's product with its epilogue, which :mod:`bench.device.probing` times beside each other.

Each gives, for hidden (R, H) and weight (V, H), exponentials (R, V) or none, and for every block of the vocabulary the
rows' offsets and sums (blocks, R), from which the log-sum-exp follows. They differ in how operands are read (``reads``)
and in the offset that is subtracted from a row's logits before they are exponentiated (``offset``). Sizes are multiples
of the blocks: a variant that wins is still to be given edges, a bias and a softcap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mopo_kernels.kernels.common import interpreted

LOG2_E = tl.constexpr(1.4426950408889634)
GROUP_R = 16
# How operands are read: by pointers, by the tensor memory accelerator, by it in warps of their own.
READS = ("pointers", "descriptors", "specialized")
# What is subtracted: a block's maximum, exponentials as linear_fold takes them; the same by one fma and one ex2 that
# flushes; a number of the row that is known beforehand.
OFFSETS = ("as now", "fma", "known")


class Variant(NamedTuple):
    reads: str
    offset: str
    block_r: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        blocks = f"{self.block_r}x{self.block_v}x{self.block_h}"
        return f"{self.reads}, {self.offset}, {blocks}, {self.num_warps} warps, {self.num_stages} stages"


# 128 x 128 is bound by L2, by our reckoning; Triton specializes warps on Hopper with four alone.
VARIANTS = (
    Variant("pointers", "as now", 128, 256, 64, 8, 3),
    Variant("pointers", "as now", 128, 256, 64, 8, 4),
    Variant("pointers", "fma", 128, 256, 64, 8, 4),
    Variant("descriptors", "fma", 128, 256, 64, 8, 4),
    Variant("specialized", "fma", 128, 256, 64, 4, 3),
    Variant("descriptors", "fma", 128, 256, 64, 8, 3),
    Variant("pointers", "known", 128, 256, 64, 8, 4),
    Variant("descriptors", "known", 128, 256, 64, 8, 4),
    Variant("specialized", "known", 128, 256, 64, 4, 3),
    Variant("specialized", "fma", 256, 128, 64, 4, 3),
    Variant("specialized", "fma", 128, 128, 64, 4, 4),
    Variant("descriptors", "fma", 128, 128, 64, 4, 3),
)
# For the interpreter.
SMALL_VARIANTS = tuple(
    Variant(reads, offset, 32, 64, 32, 4, 1)
    for reads, offset in (("pointers", "as now"), ("descriptors", "fma"), ("specialized", "known"))
)


@triton.jit
def _exp2(x: tl.tensor, FLUSHES: tl.constexpr) -> tl.tensor:
    # Without the two products by which exp2 keeps numbers below 2^-126. The interpreter has no assembler.
    if FLUSHES:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def _blocks(
    tile: tl.int32, rows: tl.int32, blocks: tl.int32, BLOCK_R: tl.constexpr, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A tile's block of rows and of the vocabulary: within a group of rows, blocks of rows come first."""
    group_size = GROUP * blocks
    first = tile // group_size * GROUP
    height = tl.minimum(tl.cdiv(rows, BLOCK_R) - first, GROUP)
    return first + tile % group_size % height, tile % group_size // height


@triton.jit
def _epilogue(
    z: tl.tensor,
    r_block: tl.tensor,
    v_block: tl.tensor,
    target: tl.tensor,
    exponentials: tl.tensor,
    offsets: tl.tensor,
    sums: tl.tensor,
    picked: tl.tensor,
    known: tl.tensor,
    rows: tl.int32,
    stride: tl.int64,
    STORE: tl.constexpr,
    OFFSET: tl.constexpr,
    FLUSHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """Products (BLOCK_R, BLOCK_V) to statistics and, if asked to, exponentials."""
    r = r_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.load(target + r, mask=r < rows, other=-1) - v_block * BLOCK_V
    column = tl.where((column >= 0) & (column < BLOCK_V), column, -1).to(tl.int32)
    if tl.max(column, axis=0) >= 0:
        hit = column[:, None] == tl.arange(0, BLOCK_V)[None, :]
        tl.store(picked + r, tl.sum(tl.where(hit, z, 0.0), axis=1), mask=column >= 0)
    statistic = v_block.to(tl.int64) * rows + r
    if OFFSET == "known":
        offset = tl.load(known + r, mask=r < rows, other=0.0)
    else:
        offset = tl.max(z, axis=1)
        tl.store(offsets + statistic, offset, mask=r < rows)
        offset = tl.where(offset == -float("inf"), 0.0, offset)
    if OFFSET == "as now":  # noqa: SIM108 - only one of them is compiled
        e = tl.exp(z - offset[:, None])
    else:
        e = _exp2(z * LOG2_E - (offset * LOG2_E)[:, None], FLUSHES)
    tl.store(sums + statistic, tl.sum(e, axis=1), mask=r < rows)
    if STORE:
        corner = exponentials + r_block.to(tl.int64) * BLOCK_R * stride + v_block * BLOCK_V
        at = tl.arange(0, BLOCK_R)[:, None] * stride.to(tl.int32) + tl.arange(0, BLOCK_V)[None, :]
        tl.store(corner + at, e.to(exponentials.dtype.element_ty), mask=r[:, None] < rows)


@triton.jit(do_not_specialize=["rows", "blocks"])
def pointers_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    target: tl.tensor,
    exponentials: tl.tensor,
    offsets: tl.tensor,
    sums: tl.tensor,
    picked: tl.tensor,
    known: tl.tensor,
    rows: tl.int32,
    hidden_size: tl.int32,
    blocks: tl.int32,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    stride: tl.int64,
    STORE: tl.constexpr,
    OFFSET: tl.constexpr,
    FLUSHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    r_block, v_block = _blocks(tl.program_id(0), rows, blocks, BLOCK_R, GROUP)
    h = tl.arange(0, BLOCK_H)
    r_in = tl.minimum(tl.arange(0, BLOCK_R), rows - r_block * BLOCK_R - 1)
    a = hidden + r_block.to(tl.int64) * BLOCK_R * hidden_stride
    b = weight + v_block.to(tl.int64) * BLOCK_V * weight_stride
    a_offset = r_in[:, None] * hidden_stride.to(tl.int32) + h[None, :]
    b_offset = tl.arange(0, BLOCK_V)[None, :] * weight_stride.to(tl.int32) + h[:, None]
    z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for _ in range(0, hidden_size, BLOCK_H):
        z = tl.dot(tl.load(a + a_offset), tl.load(b + b_offset), z)
        a += BLOCK_H
        b += BLOCK_H
    _epilogue(
        z, r_block, v_block, target, exponentials, offsets, sums, picked, known, rows, stride,
        STORE, OFFSET, FLUSHES, BLOCK_R, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "blocks"])
def descriptors_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    target: tl.tensor,
    exponentials: tl.tensor,
    offsets: tl.tensor,
    sums: tl.tensor,
    picked: tl.tensor,
    known: tl.tensor,
    rows: tl.int32,
    hidden_size: tl.int32,
    blocks: tl.int32,
    stride: tl.int64,
    STORE: tl.constexpr,
    OFFSET: tl.constexpr,
    FLUSHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    r_block, v_block = _blocks(tl.program_id(0), rows, blocks, BLOCK_R, GROUP)
    z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for first in range(0, hidden_size, BLOCK_H):
        z = tl.dot(hidden.load([r_block * BLOCK_R, first]), weight.load([v_block * BLOCK_V, first]).T, z)
    _epilogue(
        z, r_block, v_block, target, exponentials, offsets, sums, picked, known, rows, stride,
        STORE, OFFSET, FLUSHES, BLOCK_R, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "blocks"])
def specialized_kernel(
    hidden: tl.tensor,
    weight: tl.tensor,
    target: tl.tensor,
    exponentials: tl.tensor,
    offsets: tl.tensor,
    sums: tl.tensor,
    picked: tl.tensor,
    known: tl.tensor,
    rows: tl.int32,
    hidden_size: tl.int32,
    blocks: tl.int32,
    stride: tl.int64,
    STORE: tl.constexpr,
    OFFSET: tl.constexpr,
    FLUSHES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """A program takes one tile after another, so that some warps read the next while others finish this one. With
    ``flatten=True`` ptxas would serialize the products."""
    tiles = tl.cdiv(rows, BLOCK_R) * blocks
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=False, warp_specialize=True):
        r_block, v_block = _blocks(tile, rows, blocks, BLOCK_R, GROUP)
        z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
        for first in range(0, hidden_size, BLOCK_H):
            z = tl.dot(hidden.load([r_block * BLOCK_R, first]), weight.load([v_block * BLOCK_V, first]).T, z)
        _epilogue(
            z, r_block, v_block, target, exponentials, offsets, sums, picked, known, rows, stride,
            STORE, OFFSET, FLUSHES, BLOCK_R, BLOCK_V,
        )  # fmt: skip


class Fold:
    """A variant's buffers for rows (R, H) over a weight (V, H), and its launch.

    Args:
        known: (R,), within some tens of nats of each row's log-sum-exp, for variants that want one.
        exponentials: (R, V) in hidden's dtype, overwritten; None stores none.

    Raises:
        ValueError: the blocks do not divide the sizes.
    """

    def __init__(
        self,
        variant: Variant,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        known: Tensor,
        exponentials: Tensor | None,
    ) -> None:
        (self.rows, self.hidden_size), columns = hidden.shape, weight.shape[0]
        if self.rows % variant.block_r or columns % variant.block_v or self.hidden_size % variant.block_h:
            raise ValueError(f"{variant.name} does not divide R {self.rows}, V {columns}, H {self.hidden_size}")
        self.variant, self.hidden, self.weight = variant, hidden, weight
        self.blocks = columns // variant.block_v
        self.known, self.exponentials = known, exponentials
        self.offsets, self.sums = (hidden.new_zeros(self.blocks, self.rows, dtype=torch.float32) for _ in range(2))
        self.picked = hidden.new_zeros(self.rows, dtype=torch.float32)
        self.target = target

    def _arguments(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        v = self.variant
        kernel = {"pointers": pointers_kernel, "descriptors": descriptors_kernel, "specialized": specialized_kernel}
        operands: tuple[Any, ...] = (self.hidden, self.weight)
        strides: tuple[int, ...] = (self.hidden.stride(0), self.weight.stride(0))
        if v.reads != "pointers":
            blocks = ([v.block_r, v.block_h], [v.block_v, v.block_h])
            operands = tuple(TensorDescriptor.from_tensor(t, b) for t, b in zip(operands, blocks, strict=True))
            strides = ()
        # Without exponentials nothing is stored there; any of its dtype will do.
        stored = self.hidden if self.exponentials is None else self.exponentials
        arguments = (*operands, self.target, stored, self.offsets, self.sums, self.picked, self.known)
        sizes = (self.rows, self.hidden_size, self.blocks, *strides, stored.stride(0))
        options = {
            "STORE": self.exponentials is not None,
            "OFFSET": v.offset,
            "FLUSHES": not interpreted(),
            "BLOCK_R": v.block_r,
            "BLOCK_V": v.block_v,
            "BLOCK_H": v.block_h,
            "GROUP": GROUP_R,
            "num_warps": v.num_warps,
            "num_stages": v.num_stages,
        }
        return kernel[v.reads], (*arguments, *sizes), options

    def compile(self) -> Any:
        """The kernel for the current device, put into Triton's cache; nothing runs."""
        kernel, arguments, options = self._arguments()
        return kernel.run(*arguments, grid=(1,), warmup=True, **options)

    def __call__(self) -> None:
        kernel, arguments, options = self._arguments()
        tiles = self.rows // self.variant.block_r * self.blocks
        if self.variant.reads == "specialized" and self.hidden.is_cuda:
            tiles = min(tiles, torch.cuda.get_device_properties(self.hidden.device).multi_processor_count)
        kernel[(tiles,)](*arguments, **options)

    def logsumexp(self) -> Tensor:
        """(R,) fp64, after a call."""
        offset = self.known[None] if self.variant.offset == "known" else self.offsets
        return (offset.double() + self.sums.double().log()).logsumexp(dim=0)
