"""Section "probe": a minute of figures that decide the design of the GPU path.

What the device reaches (ceilings), what each product of a chunk costs at the rows that buffers of 256, 512 and 1024 MiB
give, whole calls at these buffers beside the bare products, the kernels of a chunk, and the last scale of dweight. Each
piece gives one figure, a dictionary with a ``piece``; times are medians of rounds in which all calls of a piece take
turns (:func:`bench.device.timing.take_turns`).

Runs as a child too: ``python -m bench.device.probing PLAN``.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import implementations as registry
from bench.device import subprocesses
from bench.device.record import Section
from bench.device.subprocesses import report
from bench.device.timing import CACHE_BYTES, Shape, make_inputs, on_host, packed_beforehand, synchronize, take_turns
from bench.implementations import BARE, IMPLEMENTATIONS, fused
from mopo_kernels import backends, linear_mopo_loss
from mopo_kernels.arguments import LogitTransform
from mopo_kernels.fused.buffer_plan import layout_of
from mopo_kernels.fused.chunked_head import torch_product_

HEAD = LogitTransform()
BUFFERS_MIB = (256, 512, 1024)
# Sums of exponentials that were rounded to bf16 differ from those in fp32 by less.
LSE_ERROR = 1e-2


class Sizes(NamedTuple):
    """Of the probe on a kind of device: hidden size, vocabularies, elements copied, side of the square product, whole
    calls, rows and vocabularies of the folds, rounds."""

    hidden: int
    vocabularies: tuple[int, ...]
    copied: int
    square: int
    shapes: tuple[Shape, ...]
    folds: tuple[tuple[int, int], ...]
    rounds: int


SIZES = {
    "cuda": Sizes(
        hidden=2048,
        vocabularies=(51200, 128256),
        copied=1 << 31,
        square=8192,
        shapes=(
            *(Shape(v, 8192, trained) for trained in (True, False) for v in (51200, 128256)),
            *(Shape(v, n, True) for v, n in ((51200, 4096), (51200, 32768), (128256, 32768))),
        ),
        folds=((4096, 51200), (4096, 128256)),
        rounds=8,
    ),
    "cpu": Sizes(
        hidden=64,
        vocabularies=(512,),
        copied=1 << 16,
        square=64,
        shapes=(Shape(301, 64, True, hidden=32, response=16, dtype="float32"),),
        folds=((64, 192),),
        rounds=2,
    ),
}


def chunk_rows(vocabulary: int, hidden: int, mib: int) -> int:
    """Rows of a trained head's chunk that a buffer has room for, in whole blocks of 128."""
    weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device="meta")
    limit = mib << 20
    rows = layout_of(weight, backends.tile_backend("triton"), limit).full_vocab_rows(limit)
    return max(128, rows // 128 * 128)


class Probe:
    """The pieces, by name in the order they are taken, on a device."""

    def __init__(self, device: str) -> None:
        self.device, self.sizes = device, SIZES[device]
        self.pieces: dict[str, Callable[[], dict[str, Any]]] = {"ceilings": self.ceilings}
        # What decides most comes first.
        for shape in self.sizes.shapes[:4]:
            self._add_calls(shape)
        # They need Triton, on the CPU its interpreter.
        for rows, vocabulary in self.sizes.folds if backends.availability().get("triton", "") is None else ():
            self.pieces[f"kernels R {rows} V {vocabulary}"] = functools.partial(self.kernels, rows, vocabulary)
        for vocabulary in self.sizes.vocabularies:
            self.pieces[f"last scale V {vocabulary}"] = functools.partial(self.last_scale, vocabulary)
        for shape in self.sizes.shapes[4:]:
            self._add_calls(shape)
        chunks = sorted(
            {(chunk_rows(v, self.sizes.hidden, mib), v) for v in self.sizes.vocabularies for mib in BUFFERS_MIB}
        )
        for rows, vocabulary in chunks if device == "cuda" else [(96, 512)]:
            self.pieces[f"stages R {rows} V {vocabulary}"] = functools.partial(self.stages, rows, vocabulary)

    def _add_calls(self, shape: Shape) -> None:
        for mib in BUFFERS_MIB:
            self.pieces[f"call {shape.name}, {mib} MiB"] = functools.partial(self.call, shape, mib)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).mul_(self.sizes.hidden**-0.25).bfloat16()

    def medians(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Milliseconds of each call, which was made once before."""
        for call in calls.values():
            call()
        synchronize(self.device)
        size = CACHE_BYTES if self.device == "cuda" else 1
        cache = torch.empty(size, dtype=torch.int8, device=self.device)
        rounds = [take_turns(dict(calls), self.device, cache, i) for i in range(self.sizes.rounds)]
        return {name: statistics.median(taken[name][0] for taken in rounds) for name in calls}

    def ceilings(self) -> dict[str, Any]:
        """Copy (bytes read and written), a large product, and the launches of a kernel that does nothing to speak
        of."""
        n, m = self.sizes.copied, self.sizes.square
        x, y = (torch.empty(n, dtype=torch.int8, device=self.device) for _ in range(2))
        a, b = self.normal(m, m), self.normal(m, m)
        small = torch.zeros(64, device=self.device)

        def launches() -> None:
            for _ in range(100):
                small.add_(1.0)

        ms = self.medians({"copy": lambda: y.copy_(x), "product": lambda: a @ b, "launches": launches})
        return {
            "copy_TB_s": 2 * n / ms["copy"] / 1e9,
            f"product_{m}_TFLOPs": 2 * m**3 / ms["product"] / 1e9,
            "launch_us": 10 * ms["launches"],
        }

    def call(self, shape: Shape, mib: int) -> dict[str, Any]:
        """The fused loss with a buffer, beside the bare products."""
        x = on_host(make_inputs(shape.workload(), 1, self.device))
        bounded = functools.partial(linear_mopo_loss, max_buffer_bytes=mib << 20)
        own = fused("triton" if self.device == "cuda" else "torch")
        with packed_beforehand(), mock.patch.object(registry, "linear_mopo_loss", bounded):
            ms = self.medians({BARE: lambda: IMPLEMENTATIONS[BARE].run(x), "fused": lambda: own(x)})
        return {
            "ms": ms["fused"],
            "bare_ms": ms[BARE],
            "ratio": ms["fused"] / ms[BARE],
            "bare_TFLOPs": shape.workload().units * shape.unit / ms[BARE] / 1e9,
        }

    def stages(self, rows: int, vocabulary: int) -> dict[str, Any]:
        """TFLOP/s of each product of a chunk; ``+=`` adds to what is there, in fp32."""
        hidden, weight = self.normal(rows, self.sizes.hidden), self.normal(vocabulary, self.sizes.hidden)
        tile = torch.rand(rows, vocabulary, device=self.device).bfloat16()
        dhidden, dweight = (torch.zeros(*t.shape, device=self.device) for t in (hidden, weight))
        half = torch.empty_like(weight)
        # Operands, and where the product goes; then whether it is added there.
        products = {
            "forward bf16": (tile.clone(), hidden, weight.T, False),
            "dhidden fp32": (dhidden, tile, weight, False),
            "dhidden fp32 +=": (dhidden, tile, weight, True),
            "dweight fp32": (dweight, tile.T, hidden, False),
            "dweight fp32 +=": (dweight, tile.T, hidden, True),
            "dweight bf16": (half, tile.T, hidden, False),
        }
        calls = {name: functools.partial(torch_product_, *given, 1.0) for name, given in products.items()}
        flop = 2 * rows * vocabulary * self.sizes.hidden
        return {"TFLOPs": {name: flop / ms / 1e9 for name, ms in self.medians(calls).items()}}

    def kernels(self, rows: int, vocabulary: int) -> dict[str, Any]:
        """What a chunk runs besides its two products, one after the other."""
        backend = backends.tile_backend("triton")
        hidden, weight = self.normal(rows, self.sizes.hidden), self.normal(vocabulary, self.sizes.hidden)
        target = torch.randint(0, vocabulary, (rows,), device=self.device)
        tile, scale = hidden.new_empty(rows, vocabulary), torch.empty(rows, device=self.device)
        row = torch.zeros(rows, device=self.device)
        at = (hidden, weight, None, target, 0, HEAD)
        offset = backend.row_offset(*at).row_max
        marked = (tile, target, 0, HEAD, offset, offset.double(), -row, scale)
        calls: dict[str, Callable[[], Any]] = {
            "product": lambda: torch.mm(hidden, weight.T, out=tile),
            "row_offset": lambda: backend.row_offset(*at),
            "linear_fold, stored": lambda: backend.linear_lse_fwd(*at, offset, row.zero_(), row, tile),
            "linear_fold": lambda: backend.linear_lse_fwd(*at, offset, row.zero_(), row),
            "mark_target": lambda: backend.mark_target_(*marked),
            "scale hidden": lambda: backend.scaled(hidden, scale[:, None], hidden.dtype),
        }
        ms = self.medians(calls)
        return {"ms": ms, "over the product": {name: value / ms["product"] for name, value in ms.items()}}

    def last_scale(self, vocabulary: int) -> dict[str, Any]:
        """The scale and cast that end dweight, in two passes and in one, by torch and by the backend."""
        gradient = torch.rand(vocabulary, self.sizes.hidden, device=self.device)
        factor = torch.ones((), device=self.device)
        half = torch.empty(*gradient.shape, dtype=torch.bfloat16, device=self.device)
        own = backends.tile_backend("triton" if self.device == "cuda" else "torch")
        calls = {
            "two": lambda: gradient.mul_(factor).to(torch.bfloat16),
            "one": lambda: torch.mul(gradient, factor, out=half),
            "own": lambda: own.scaled(gradient, factor, torch.bfloat16),
        }
        return {"ms": self.medians(calls)}


def line(figure: dict[str, Any]) -> str:
    """A figure as text."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {text(one)}" for name, one in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    values = {name: value for name, value in figure.items() if name != "piece"}
    return f"  {figure['piece']}: {'; '.join(f'{name} {text(value)}' for name, value in values.items())}"


def child(plan: dict[str, Any]) -> None:
    """Takes the plan's pieces, each from an empty cache of memory."""
    probe = Probe(plan["device"])

    def take(name: str) -> None:
        try:
            report(figure={"piece": name, **probe.pieces[name]()})
        finally:
            if plan["device"] == "cuda":
                torch.cuda.empty_cache()

    subprocesses.take_pieces(plan, take)


def run(section: Section) -> None:
    section.data["figures"] = figures = []
    names = list(Probe(section.device).pieces)

    def each(fields: dict[str, Any]) -> None:
        figures.append(fields["figure"])
        section.save()
        print(line(fields["figure"]), flush=True)

    plan = {"device": section.device}
    section.data["failed"] = subprocesses.run_pieces("bench.device.probing", plan, names, lambda: section.left, each)
    found = {figure["piece"] for figure in figures}
    section.data["not_reached"] = [name for name in names if name not in found | section.data["failed"].keys()]
    for name, why in section.data["failed"].items():
        section.failures.append(f"{name}: {why}")
    if not figures:
        section.failures.append("no figure was found")


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
