"""Section "time": every backend and every peer that can run, beside the bare products, in turns.

Rows are packed before the clock starts: the backward pass of the compaction is a sort that would be charged to all. A
round takes every entry once, beginning with another each time, without waiting between them, so that the host is ahead
of the device as it is in training; the first entry runs twice and is timed the second time. Times are of device events.
An entry that disagrees with plain PyTorch is not timed.

Runs as a child too: ``python -m bench.device.timing PLAN`` takes the shapes of a plan one after the other and reports
each. A child that dies is followed by another without the entry that was running.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import implementations as registry
from bench.device import subprocesses
from bench.device.peers import GPU_PEERS
from bench.device.record import Section, first_line
from bench.device.subprocesses import report
from bench.implementations import BARE, IMPLEMENTATIONS, Implementation, Inputs, Workload, fused
from mopo_kernels import backends

# Relative, of the loss and of each gradient; see bench.head.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANY = 8
OWN = "mopo_kernels "
# Rounds of a shape: what percentiles need, and where more say nothing new.
FEWEST, MOST = 5, 30
# What takes so many times as long as the bare products is taken once, and leaves the rounds to the others. On the CPU
# that is Triton's interpreter.
SLOW = {"cuda": 10.0, "cpu": 1000.0}
# Seconds without a word that torch.compile may take.
COMPILING = 90.0
# What is overwritten between two entries, so that neither finds the other's data in the cache.
CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """``tokens`` scored, ``response`` of them in each response, two responses a pair."""

    vocabulary: int
    tokens: int
    trained: bool
    hidden: int = 2048
    response: int = 256
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"V {self.vocabulary} N {self.tokens} H {self.hidden} {'trained' if self.trained else 'frozen'}"

    def workload(self, objectives: int = 1, tokens: int | None = None) -> Workload:
        prompts = max(1, (self.tokens if tokens is None else tokens) // (2 * self.response))
        return Workload(
            hidden=self.hidden,
            vocabulary=self.vocabulary,
            prompts=prompts,
            length=self.response,
            prompt_share=0.0,
            objectives=objectives,
            trained=self.trained,
            dtype=DTYPES[self.dtype],
        )

    @property
    def unit(self) -> float:
        """Operations of one product."""
        return 2.0 * self.tokens * self.vocabulary * self.hidden


# The shapes of a 1.3B model, what matters most first.
SHAPES = tuple(
    Shape(vocabulary, tokens, trained)
    for tokens in (8192, 32768, 4096)
    for trained in (True, False)
    for vocabulary in (51200, 128256)
)
# For a dry run on the CPU.
SMALL_SHAPES = tuple(Shape(301, 64, trained, hidden=32, response=16, dtype="float32") for trained in (True, False))


class Packing(NamedTuple):
    """In the place of labels, for rows that are packed already."""

    target: Tensor
    cu_seqlens: Tensor


@contextmanager
def packed_beforehand() -> Iterator[None]:
    """Implementations pack responses themselves; here they are given them packed."""

    def as_they_are(hidden: Tensor, labels: Packing) -> tuple[Tensor, Tensor, Tensor]:
        return hidden, labels.target, labels.cu_seqlens

    with mock.patch.object(registry, "pack_responses", as_they_are):
        yield


def make_inputs(work: Workload, seed: int, device: str) -> Inputs:
    """A batch of packed rows, all its tensors on the device: hidden (N, H), ``labels`` a :class:`Packing`."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).mul_(work.hidden**-0.25).to(work.dtype)

    rows = 2 * work.prompts
    tokens = work.scored
    packing = Packing(
        torch.randint(0, work.vocabulary, (tokens,), generator=g, device=device),
        torch.arange(0, tokens + 1, tokens // rows, device=device),
    )
    labels = torch.randint(0, 2, (work.prompts, work.objectives), generator=g, device=device)
    return Inputs(
        hidden=normal(tokens, work.hidden).requires_grad_(),
        ref_hidden=normal(tokens, work.hidden),
        weight=normal(work.vocabulary, work.hidden).requires_grad_(work.trained),
        labels=packing,  # type: ignore[arg-type]
        pairs=torch.arange(rows, device=device).view(-1, 2),
        preference=labels.float(),
        objective_weight=torch.ones(work.objectives, device=device),
    )


def on_host(x: Inputs) -> Inputs:
    """With cu_seqlens and pairs on the CPU, so that chunks can be planned: three products."""
    packing = Packing(x.labels.target, x.labels.cu_seqlens.cpu())  # type: ignore[attr-defined]
    return replace(x, labels=packing, pairs=x.pairs.cpu())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Entry:
    """An implementation under some condition. ``host``: offsets and pairs on the CPU; ``unfused``: the Triton backend
    with the products of the BLAS library and a kernel over them."""

    implementation: Implementation
    objectives: int = 1
    host: bool = False
    unfused: bool = False

    def prepare(self, inputs: dict[int, Inputs]) -> Callable[[], registry.Result]:
        x = inputs[self.objectives]
        x = on_host(x) if self.host else x
        if not self.unfused:
            return lambda: self.implementation.run(x)

        def run() -> registry.Result:
            with mock.patch.object(backends.tile_backend("triton"), "fuses", return_value=False):
                return self.implementation.run(x)

        return run


def entries(shape: Shape, device: str, dropped: Collection[str] = ()) -> tuple[dict[str, Entry], dict[str, str]]:
    """Every entry of a shape that can run on the device but those ``dropped``, the bare products first; and the others'
    reasons. A peer is imported here, which is reported before: its import may be what ends the process."""
    found, reasons = {BARE: Entry(IMPLEMENTATIONS[BARE])}, {}
    for backend in backends.availability():
        name = OWN + backend
        if backend == "naive":
            continue
        try:
            backends.resolve(backend, torch.device(device))
        except RuntimeError as error:
            reasons[name] = str(error)
            continue
        implementation = Implementation(fused(backend), registry.plain_compacted)
        found[name] = Entry(implementation, host=True)
        # Torch's many small kernels would take the time of the others.
        if backend == "torch" and device == "cuda":
            continue
        found[f"{name}, K {MANY}"] = Entry(implementation, objectives=MANY, host=True)
        if shape.trained:
            found[f"{name}, offsets on the device"] = Entry(implementation)
        if backend == "triton" and shape.dtype != "float32":
            found[f"{name}, not fused"] = Entry(implementation, host=True, unfused=True)
    for name, implementation in {**IMPLEMENTATIONS, **(GPU_PEERS if device == "cuda" else {})}.items():
        # All rows are scored here.
        if name == BARE or name.startswith(OWN) or "all rows" in name or name in dropped:
            continue
        report(begun=name, shape=shape.name)
        reason = implementation.unavailable()
        # Each new shape costs compilations of many seconds.
        if reason is None and "compiled" in name and shape != SHAPES[0]:
            reason = f"compiled for {SHAPES[0].name} only"
        if reason is None:
            found[name] = Entry(implementation)
        else:
            reasons[name] = reason
    return {name: entry for name, entry in found.items() if name not in dropped}, reasons


# --------------------------------------------------------------------------------------------------------------- clocks


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class EntryFailed(Exception):
    """Its message is the name of the entry that failed in a round, which is then of no use."""


def take_turns(calls: dict[str, Callable[[], Any]], device: str, cache: Tensor, first: int) -> dict[str, list[float]]:
    """One round, beginning with call ``first``: for each, milliseconds on the device and of the host.

    Raises:
        EntryFailed: a call did, which succeeded alone.
    """
    names = list(calls)
    names = names[first % len(names) :] + names[: first % len(names)]
    taken: dict[str, list[float]] = {}
    marks = {}
    for name in (names[0], *names):
        cache.zero_()
        if device == "cuda":
            marks[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            marks[name][0].record()
        begun = time.perf_counter()
        try:
            calls[name]()
        except RuntimeError as error:
            raise EntryFailed(name) from error
        taken[name] = [0.0, 1e3 * (time.perf_counter() - begun)]
        if device == "cuda":
            marks[name][1].record()
    synchronize(device)
    for name, times in taken.items():
        times[0] = marks[name][0].elapsed_time(marks[name][1]) if device == "cuda" else times[1]
    return taken


def peak_mib(call: Callable[[], Any], device: str) -> float | None:
    """The allocator's peak during a call, its results included, MiB; not known on the CPU."""
    if device != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def difference(entry: Entry, inputs: dict[int, Inputs], expected: dict[tuple[str, int], registry.Result]) -> float:
    """Largest relative difference of the loss and the gradients from plain PyTorch's in fp32 with the same loss."""
    implementation = entry.implementation
    if implementation.expected is None:
        return 0.0
    key = implementation.loss, entry.objectives
    if key not in expected:
        expected[key] = implementation.expected(inputs[entry.objectives].in_fp32())
    got = entry.prepare(inputs)()
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, expected[key], strict=True))


class DeviceLost(Exception):
    """The context is gone; nothing more can run in this process."""


def measure(shape: Shape, device: str, seconds: float, dropped: set[str]) -> dict[str, Any]:
    """Times of every entry of a shape but those ``dropped``, in about so many seconds.

    Raises:
        DeviceLost: an entry took the device with it; its message names the entry.
    """
    begun = time.monotonic()
    found, reasons = entries(shape, device, dropped)
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    peaks: dict[str, float | None] = {}
    once: dict[str, float] = {}
    calls: dict[str, Callable[[], Any]] = {}
    with packed_beforehand(), ExitStack() as stack:
        few = {k: make_inputs(shape.workload(k, tokens=2 * shape.response), 0, device) for k in (1, MANY)}
        whole = {1: make_inputs(shape.workload(), 1, device)}
        # The same rows under more objectives.
        many = make_inputs(shape.workload(MANY, tokens=1), 1, device)
        prompts = shape.workload().prompts
        whole[MANY] = replace(
            whole[1],
            preference=many.preference.repeat(prompts, 1)[:prompts],
            objective_weight=many.objective_weight,
        )
        expected: dict[tuple[str, int], registry.Result] = {}
        tolerance = TOLERANCE[DTYPES[shape.dtype]]
        for name, entry in found.items():
            # The first call of what is compiled takes as long as its compiler.
            report(begun=name, shape=shape.name, **({"patience": COMPILING} if "compiled" in name else {}))
            try:
                errors[name] = difference(entry, few, expected)
                if not errors[name] < tolerance:
                    failed[name] = f"disagrees with plain PyTorch by {errors[name]:.1e}: not timed"
                    continue
                call = entry.prepare(whole)
                call()
                synchronize(device)
                started = time.perf_counter()
                call()
                synchronize(device)
                once[name] = 1e3 * (time.perf_counter() - started)
                peaks[name] = peak_mib(call, device)
                report(once=once[name], peak_mib=peaks[name], entry=name, shape=shape.name)
                if once[name] < SLOW[device] * once[BARE]:
                    calls[name] = call
            except Exception as error:
                failed[name] = first_line(error)
                try:
                    synchronize(device)
                except RuntimeError as lost:
                    raise DeviceLost(f"{name}: {failed[name]}") from lost
                if device == "cuda":
                    torch.cuda.empty_cache()
        report(begun=None, shape=shape.name)
        few.clear()
        expected.clear()
        if BARE not in calls:
            raise RuntimeError(f"the bare products failed: {failed[BARE]}")
        size = CACHE_BYTES if device == "cuda" else 1
        cache = torch.empty(size, dtype=torch.int8, device=device)
        stack.callback(cache.resize_, 0)
        rounds: list[dict[str, list[float]]] = []
        while len(rounds) < FEWEST or (len(rounds) < MOST and time.monotonic() - begun < seconds):
            try:
                rounds.append(take_turns(calls, device, cache, len(rounds)))
                report(begun=None, shape=shape.name)
            except EntryFailed as entry:
                # Memory that is enough for one alone may not be beside what the others leave behind.
                name = str(entry)
                failed[name] = first_line(entry.__cause__ or entry)
                del calls[name]
                if name == BARE:
                    raise
                if device == "cuda":
                    torch.cuda.empty_cache()
    results = {name: summary(name, found[name], shape, rounds, errors[name], peaks[name]) for name in calls}
    many_over_one = {
        name.removeprefix(OWN): statistics.median(r[f"{name}, K {MANY}"][0] / r[name][0] for r in rounds)
        for name in calls
        if f"{name}, K {MANY}" in calls
    }
    return {
        "shape": asdict(shape),
        "units": shape.workload().units,
        "rounds": len(rounds),
        "results": results,
        f"k_{MANY}_over_k_1": many_over_one,
        "slow": {name: ms for name, ms in once.items() if name not in calls and name not in failed},
        "failed": failed,
        "unavailable": reasons,
        "seconds": round(time.monotonic() - begun, 1),
    }


def summary(
    name: str, entry: Entry, shape: Shape, rounds: list[dict[str, list[float]]], error: float, peak: float | None
) -> dict[str, Any]:
    taken = [r[name][0] for r in rounds]
    cuts = statistics.quantiles(taken, n=10)
    median = statistics.median(taken)
    return {
        "loss": entry.implementation.loss,
        "offsets": "host" if entry.host else "device",
        "objectives": entry.objectives,
        "ms": median,
        "p20": cuts[1],
        "p80": cuts[7],
        "ratio": statistics.median(r[name][0] / r[BARE][0] for r in rounds),
        "host_ms": statistics.median(r[name][1] for r in rounds),
        "peak_mib": peak,
        "tokens_per_second": shape.tokens / median * 1e3,
        # Of the least work there is, whatever the entry does: for the bare products what they reach.
        "tflops": shape.workload().units * shape.unit / median / 1e9,
        "difference_from_plain": error,
    }


def table(found: dict[str, Any]) -> str:
    """A shape's results as text."""
    shape = Shape(**found["shape"])
    results = found["results"]
    width = max(map(len, [*results, *found["slow"], *found["failed"]]))
    lines = [
        f"{shape.name}, {found['units']} units, {found['rounds']} rounds",
        f"{'':{width}}  / bare        ms         p20 to p80  host ms       MiB     tok/s  TFLOP/s",
    ]
    for name, row in results.items():
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(
            f"{name:{width}}  {row['ratio']:6.3f}  {row['ms']:8.2f}  {row['p20']:8.2f}-{row['p80']:8.2f}  "
            f"{row['host_ms']:7.2f}  {peak:>8}  {row['tokens_per_second']:8.3g}  {row['tflops']:7.4g}"
        )
    lines += [f"{name:{width}}  {ms / results[BARE]['ms']:6.1f}  {ms:8.1f}  once" for name, ms in found["slow"].items()]
    lines += [f"{name:{width}}  {why}" for name, why in found["failed"].items()]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- parent and child


def child(plan: dict[str, Any]) -> None:
    """Take the plan's shapes one after the other, each with its share of the time that is left."""
    shapes = [Shape(**fields) for fields in plan["shapes"]]
    deadline = time.monotonic() + plan["seconds"]
    # Besides its products, every shape costs compilation and the making of its inputs.
    weight = [shape.unit + 3e11 for shape in shapes]
    for i, shape in enumerate(shapes):
        left = deadline - time.monotonic()
        if left < 0:
            return
        try:
            found = measure(shape, plan["device"], left * weight[i] / sum(weight[i:]), set(plan["dropped"]))
        except DeviceLost as lost:
            report(lost=str(lost), shape=shape.name)
            sys.exit(3)
        except Exception as error:
            found = {"shape": asdict(shape), "error": first_line(error)}
        report(found=found, shape=shape.name)


def run(section: Section) -> None:
    """``shapes``: those to time, of them the first ``most``; all without. Of a shape that does not end in time, what
    was called once is kept."""
    shapes = section.options.get("shapes") or (SHAPES if section.device == "cuda" else SMALL_SHAPES)
    shapes = shapes[: 1 if section.dry else section.options.get("most")]
    section.data["shapes"] = results = {}
    section.data["lost"] = lost = {}
    once: dict[str, dict[str, Any]] = {}
    section.data["once"] = once
    running: dict[str, str | None] = {"name": None}

    def each(fields: dict[str, Any]) -> None:
        if "begun" in fields:
            running["name"] = fields["begun"]
        elif "once" in fields:
            once.setdefault(fields["shape"], {})[fields["entry"]] = {
                "ms": fields["once"],
                "peak_mib": fields["peak_mib"],
            }
            section.save()
        elif "lost" in fields:
            lost[running["name"]] = fields["lost"]
        else:
            results[fields["shape"]] = found = fields["found"]
            once.pop(fields["shape"], None)
            section.save()
            print(table(found) if "results" in found else f"{fields['shape']}: {found['error']}", flush=True)

    while section.left > 5:
        waiting = [shape for shape in shapes if shape.name not in results]
        if not waiting:
            break
        before = len(results), len(lost)
        plan = {
            "device": section.device,
            "shapes": [asdict(shape) for shape in waiting],
            "dropped": list(lost),
            "seconds": section.left - 3,
        }
        running["name"] = None
        ended = subprocesses.run([sys.executable, "-m", "bench.device.timing", json.dumps(plan)], section.left, each)
        if ended.failure is not None and running["name"] is not None and section.left > 0:
            lost.setdefault(running["name"], f"{ended.failure}: {ended.output[-300:]}")
        if (len(results), len(lost)) == before:
            section.data["output"] = ended.output
            break
    for shape in shapes:
        found = results.get(shape.name, {"error": "not reached"})
        if "error" in found:
            section.failures.append(f"{shape.name}: {found['error']}")
        for name, why in found.get("failed", {}).items():
            # An implementation that needs more memory than there is has not failed us.
            if name.startswith(OWN) or name == BARE or "disagrees" in why:
                section.failures.append(f"{shape.name}: {name}: {why}")
    section.failures += [f"{name}: took the process with it: {why}" for name, why in lost.items()]


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
