"""Registers, spills and shared memory of every variant of every Triton kernel, compiled on a machine without a GPU.

    python -m bench.compile_report                       # all of them, some minutes; --help for less

Kernels are compiled through the functions that launch them: Triton is given a driver that names an architecture and
has no device, and a launch stops once its kernel is compiled. So what is compiled is what would run, with the same
constants and the same assumptions on its arguments. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.provenance import ROOT, origin
from mopo_kernels.arguments import CallValues, LogitTransform, LossOptions, PairBatch
from mopo_kernels.backends.triton.check_values import check_values
from mopo_kernels.backends.triton.exp_logits_bwd import exp_logits_bwd_
from mopo_kernels.backends.triton.linear_lse_fwd import linear_lse_fwd, offset_blocks, row_offsets
from mopo_kernels.backends.triton.logits_bwd import logits_bwd_
from mopo_kernels.backends.triton.lse_fwd import lse_fwd
from mopo_kernels.backends.triton.mark_target import mark_target_
from mopo_kernels.backends.triton.math import interpreted
from mopo_kernels.backends.triton.pair_loss_bwd import pair_loss_bwd
from mopo_kernels.backends.triton.pair_loss_fwd import pair_loss_fwd
from mopo_kernels.backends.triton.row_offset import row_offset
from mopo_kernels.backends.triton.row_statistics import row_statistics
from mopo_kernels.backends.triton.scale_rows import scale_rows
from mopo_kernels.backends.triton.segment_sum import segment_sum
from mopo_kernels.files import prepare_file

OUTPUT = ROOT / "bench" / "results" / "compile_report.json"
# 8.6 stands for the architectures that have no configuration of their own.
ARCHITECTURES = (80, 86, 90, 100)
# Shared memory a block can have, KiB: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}

HEADS = {
    "plain": LogitTransform(),
    "scaled": LogitTransform(None, 0.5, 1.5),
    "capped": LogitTransform(30.0),
}
SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "int32",
    torch.int64: "int64",
}
BOTH = (False, True)


class Driver:
    """A Triton driver for an architecture, without a device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


class Kernel(NamedTuple):
    """A compiled kernel: ``key`` identifies its code, ``resources`` is what :func:`_resources` says."""

    key: str
    name: str
    resources: dict[str, Any]


@contextlib.contextmanager
def compiling(architecture: int) -> Iterator[list[Kernel]]:
    """Within it launches only compile. Yields what was launched, in order; a process can do this once an architecture,
    since ptxas tells what it used only when it runs."""
    launched: list[Kernel] = []
    compiled: dict[str, Kernel] = {}
    launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            binary = launch(kernel, *args, grid=grid, warmup=True, **options)
        if binary.hash not in compiled:
            name = kernel.__name__.removesuffix("_kernel")
            compiled[binary.hash] = Kernel(binary.hash, name, _resources(binary, log.getvalue()))
        launched.append(compiled[binary.hash])
        return binary

    triton.runtime.driver.set_active(Driver(architecture))
    JITFunction.run = run
    try:
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
            triton.knobs.nvidia.dump_ptxas_log = True
            triton.knobs.compilation.always_compile = True
            yield launched
    finally:
        JITFunction.run = launch


def _resources(binary: Any, log: str) -> dict[str, Any]:
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise SystemExit(f"ptxas did not say what it used: {log!r}")
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(spills[1]),
        "spill_store_bytes": int(spills[2]),
        "spill_load_bytes": int(spills[3]),
        "shared_bytes": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "stages": binary.metadata.num_stages,
        "advice": re.findall(r"Potential Performance Loss: (.*)", log),
    }


def _tile_variants() -> Iterator[tuple[str, Callable[[], object]]]:
    target = torch.zeros(1, dtype=torch.int64)
    for dtype, bias, (name, transform), columns in itertools.product(
        (torch.float32, torch.float64), BOTH, HEADS.items(), (4096, 4099)
    ):
        tile, row = torch.zeros(1, columns, dtype=dtype), torch.zeros(1, dtype=dtype)
        at = (tile, tile[0] if bias else None, target, 0, transform)
        label = f"{SHORT[dtype]} {name}{' bias' if bias else ''} W={columns}"
        yield f"lse_fwd {label}", partial(lse_fwd, *at, row, row, row)
        for grad_logprob in (None, row):
            suffix = "" if grad_logprob is None else " grad_logprob"
            yield f"logits_bwd {label}{suffix}", partial(logits_bwd_, *at, target.double(), grad_logprob)


# (H, W, row stride of the exponentials): whole blocks; none whole; a vocabulary of an odd size, in rows that start at
# multiples of 16 bytes; rows that do not.
SHAPES = ((1024, 4096, 4096), (1040, 4112, 4112), (1024, 4099, 4112), (1027, 4099, 4099))


def _fused_variants() -> Iterator[tuple[str, Callable[[], object]]]:
    target, row = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    for dtype, (hidden_size, columns, stride) in itertools.product((torch.bfloat16, torch.float16), SHAPES):
        hidden, weight = torch.zeros(1, hidden_size, dtype=dtype), torch.zeros(columns, hidden_size, dtype=dtype)
        tile = torch.zeros(2, stride, dtype=dtype)[:1, :columns]
        size = f"H={hidden_size} W={columns} stride={stride}"
        for (name, transform), bias, store in itertools.product(HEADS.items(), BOTH, BOTH):
            label = f"{SHORT[dtype]} {name}{' bias' if bias else ''}{' store' if store else ''} {size}"
            at = (hidden, weight, torch.zeros(columns) if bias else None, target, 0, transform, row, row, row)
            stored = tile if store else None
            yield f"linear_lse_fwd {label}", partial(_linear_lse_fwd, at, stored)
        if row_offsets(dtype):
            yield from _by_row(f"{SHORT[dtype]} {{}} {size}", hidden, weight, tile, target, row)
            continue
        for (name, transform), grad_logprob in itertools.product(HEADS.items(), (None, row)):
            suffix = "" if grad_logprob is None else " grad_logprob"
            yield (
                f"exp_logits_bwd {SHORT[dtype]} {name}{suffix} {size}",
                partial(_exp_logits_bwd, tile, (target, 0, transform, row.double(), row, grad_logprob)),
            )


def _by_row(
    label: str, hidden: Tensor, weight: Tensor, tile: Tensor, target: Tensor, row: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What stands around linear_lse_fwd where exponentials have one offset a row."""
    for (name, transform), bias in itertools.product(HEADS.items(), BOTH):
        at = (hidden, weight, torch.zeros(weight.shape[0]) if bias else None, target, 0, transform)
        yield f"row_offset {label.format(name + ' bias' * bias)}", partial(row_offset, *at)
    for name, transform in HEADS.items():
        marked = (tile, target, 0, transform, row, row.double(), row, row)
        yield f"mark_target {label.format(name)}", partial(mark_target_, *marked)
    yield f"row_statistics {label.format('any')}", partial(row_statistics, row, row, row, target, row, row.double())
    for name, x, factor in (("rows", hidden, row), ("gradient", weight.float(), torch.ones(()))):
        yield f"scale_rows {label.format(name)}", partial(scale_rows, x, factor, torch.bfloat16)


def _offsets(tile: Tensor) -> Tensor:
    return torch.zeros(offset_blocks(tile.shape[1]), 1)


def _linear_lse_fwd(at: tuple[Any, ...], tile: Tensor | None) -> None:
    offsets = None if tile is None or row_offsets(tile.dtype) else _offsets(tile)
    linear_lse_fwd(*(*at, tile, offsets))


def _exp_logits_bwd(tile: Tensor, rest: tuple[Any, ...]) -> None:
    exp_logits_bwd_(tile, _offsets(tile), *rest)


def _sequence_variants() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype, index in itertools.product((torch.float32, torch.float64), (torch.int32, torch.int64)):
        value, cu_seqlens = torch.zeros(4, dtype=dtype), torch.zeros(3, dtype=index)
        label = f"segment_sum {SHORT[dtype]} {SHORT[index]}"
        yield label, partial(segment_sum, value, cu_seqlens)
    names = ("pair_weight", "label_rate", "margin", "length", "normalizer")
    # None of the optional inputs, each alone, and all.
    chosen = [[False] * 5, *([i == j for i in range(5)] for j in range(5)), [True] * 5]
    for dtype, loss_type, given in itertools.product((torch.float32, torch.float64), ("regression", "sigmoid"), chosen):
        one = torch.ones(4, dtype=dtype)
        optional = {name: one if wanted else None for name, wanted in zip(names, given, strict=True)}
        batch = PairBatch(
            pairs=torch.zeros(4, 2, dtype=torch.int64),
            preference=torch.zeros(4, 2, dtype=dtype),
            objective_weight=one,
            **optional,
            options=LossOptions(loss_type=loss_type),
        )
        label = " ".join([SHORT[dtype], loss_type, *(name for name in names if optional[name] is not None)])
        yield f"pair_loss_bwd {label}", partial(pair_loss_bwd, one, one, batch)
        for index in (torch.int32, torch.int64):
            tokens = (torch.zeros(5, dtype=index), 4)
            yield f"pair_loss_bwd {label} tokens {SHORT[index]}", partial(pair_loss_bwd, one, one, batch, *tokens)
        for estimator in ("pair", "snis"):
            measured = replace(batch, options=replace(batch.options, estimator=estimator))
            yield f"pair_loss_fwd {label} {estimator}", partial(pair_loss_fwd, one, one, measured)
        target = torch.zeros(4, dtype=torch.int64)
        pairs_only = CallValues(batch=batch, sequences=4)
        yield f"check_values {label}", partial(check_values, pairs_only)
        prompts = replace(pairs_only, batch=replace(batch, prompt_index=target))
        for index in (torch.int32, torch.int64):
            every = replace(prompts, target=target, cu_seqlens=torch.zeros(5, dtype=index))
            yield f"check_values {label} prompt_index target {SHORT[index]}", partial(check_values, every)
    yield "check_values target", partial(check_values, CallValues(target=torch.zeros(4, dtype=torch.int64)))
    yield "check_values int64", partial(check_values, CallValues(cu_seqlens=torch.zeros(5, dtype=torch.int64)))


def variants(match: str = "") -> dict[str, Callable[[], object]]:
    """What there is to compile: calls, by a label that the regular expression ``match`` is found in."""
    every = itertools.chain(_tile_variants(), _fused_variants(), _sequence_variants())
    return {label: call for label, call in every if re.search(match, label)}


def compile_all(architecture: int, match: str = "") -> list[dict[str, Any]]:
    """One row a kernel and what it takes: how many differently compiled, and the variants that launch them. A variant
    may launch several kernels, and several may launch the same."""
    codes: dict[str, set[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    calls = variants(match)
    with compiling(architecture) as launched:
        for label, call in track(calls.items(), description=f"sm_{architecture}", transient=True):
            launched.clear()
            call()
            for kernel in launched:
                row = {"architecture": architecture, "kernel": kernel.name, **kernel.resources}
                name = json.dumps(row)
                codes.setdefault(name, set()).add(kernel.key)
                names = rows.setdefault(name, {**row, "variants": []})["variants"]
                if label not in names:
                    names.append(label)
    return [{**row, "compiled": len(codes[name])} for name, row in rows.items()]


def source_hash() -> str:
    """Of the kernels' code, comments and docstrings left out: whether a report is of today's kernels. What puts
    them together, and the repairs to Triton's interpreter, are no part of what is compiled."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "mopo_kernels" / "backends" / "triton").glob("*.py")):
        if path.stem in ("__init__", "backend", "interpreter"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def show(rows: list[dict[str, Any]]) -> None:
    """The largest numbers of each kernel on each architecture, then every one that spills or draws advice."""
    table = Table(title=f"triton {triton.__version__}: the most that any variant takes, without a GPU")
    for heading in ("kernel", "sm", "compiled", "registers", "spilled bytes", "shared KiB", "warps", "stages"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["architecture"]), []).append(row)
    for (kernel, architecture), group in sorted(groups.items()):
        most = {key: max(row[key] for row in group) for key in group[0] if isinstance(group[0][key], int)}
        table.add_row(
            kernel,
            str(architecture),
            str(sum(row["compiled"] for row in group)),
            str(most["registers"]),
            str(most["spill_store_bytes"] + most["spill_load_bytes"]),
            f"{most['shared_bytes'] / 1024:.1f} of {SHARED_KIB[architecture]}",
            str(most["warps"]),
            str(most["stages"]),
        )
    console = Console(width=max(100, Console().width))
    console.print(table)
    for row in rows:
        if row["spill_store_bytes"] + row["spill_load_bytes"] + row["stack_bytes"] > 0 or row["advice"]:
            console.print(row, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, help=f"90 is 9.0; default: {ARCHITECTURES}")
    parser.add_argument("--match", default="", metavar="REGEX", help="only the variants whose name it is found in")
    parser.add_argument("--list", action="store_true", help="print the variants' names and compile nothing")
    parser.add_argument(
        "--output", type=Path, help=f"JSON file to write; default: {OUTPUT}, but with --arch or --match none"
    )
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET must not be set: interpreted kernels cannot be compiled")
    if options.list:
        print("\n".join(variants(options.match)))
        return
    # A part of the report must not take the place of the whole.
    partial = options.arch is not None or options.match
    output = options.output or (None if partial else OUTPUT)
    if output is not None:
        try:
            prepare_file("--output", output)
        except ValueError as error:
            parser.error(str(error))
    sources = source_hash()
    rows = [row for architecture in options.arch or ARCHITECTURES for row in compile_all(architecture, options.match)]
    show(rows)
    compiled = f"{sum(row['compiled'] for row in rows)} kernels compiled"
    if output is None:
        print(f"{compiled}; a part of the report, written only with --output")
        return
    record = {
        "triton": triton.__version__,
        "sources": sources,
        **origin(),
        "match": options.match,
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    output.write_text(f'{json.dumps(record)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{compiled}: {output}")


if __name__ == "__main__":
    main()
