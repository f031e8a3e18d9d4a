"""Section "tune": launch configurations of linear_lse_fwd, in turns, beside the BLAS library's product of the same
size.

Runs as a child too: ``python -m bench.device.tuning PLAN``. First several children compile a part of the candidates
each, into Triton's cache on disk; then one times them all.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.device import subprocesses
from bench.device.record import Section, first_line
from bench.device.subprocesses import report
from mopo_kernels.arguments import LogitTransform

HEAD = LogitTransform()
# Rows, vocabulary, hidden size, with exponentials stored: what the default buffer holds of a policy's rows, and a
# reference's rows, of which nothing is kept.
SIZES = ((4096, 51200, 2048, True), (4096, 128256, 2048, True), (8192, 51200, 2048, False))
SMALL_SIZES = ((64, 192, 64, True),)
# block_r, block_v, block_h, num_warps, num_stages
BLOCKS = (
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 256, 32, 8, 4),
    (128, 256, 128, 8, 2),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3),
    (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (64, 256, 64, 4, 3),
    (64, 256, 64, 4, 4),
    (64, 256, 64, 8, 4),
)
GROUPS = (4, 8, 32, 64)
FIELDS = ("block_r", "block_v", "block_h", "num_warps", "num_stages")


@contextmanager
def configured(candidate: dict[str, int]) -> Iterator[None]:
    """linear_lse_fwd as launched with the candidate's fields."""
    from mopo_kernels.backends.triton import linear_lse_fwd as module
    from mopo_kernels.backends.triton.math import architecture

    at, before = architecture(), module.configuration()
    known = at in module.CONFIGURATIONS
    module.CONFIGURATIONS[at] = before._replace(**candidate)
    try:
        yield
    finally:
        if known:
            module.CONFIGURATIONS[at] = before
        else:
            del module.CONFIGURATIONS[at]


def current() -> dict[str, int]:
    """The configuration in use."""
    from mopo_kernels.backends.triton.linear_lse_fwd import configuration

    return dict(configuration()._asdict())


def candidates(most: int | None) -> list[dict[str, int]]:
    """What is in use first, then other blocks, then other groups of what is in use."""
    known = current()
    blocks = [{**known, **dict(zip(FIELDS, values, strict=True))} for values in BLOCKS]
    found = [known]
    for candidate in (*blocks, *({**known, "group_r": group} for group in GROUPS)):
        if candidate not in found:
            found.append(candidate)
    return found[:most]


class Case:
    """Inputs of one size, and the calls on them."""

    def __init__(self, size: tuple[int, int, int, bool], device: str) -> None:
        rows, self.columns, hidden, self.store = size
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).mul_(hidden**-0.25).bfloat16()

        self.hidden, self.weight = normal(rows, hidden), normal(self.columns, hidden)
        self.target = torch.randint(0, self.columns, (rows,), generator=g, device=device)
        self.tile = torch.empty(rows, self.columns, dtype=torch.bfloat16, device=device)
        from mopo_kernels.backends.triton.row_offset import row_offset

        self.offset = row_offset(self.hidden, self.weight, None, self.target, 0, HEAD).row_max

    def product(self) -> Tensor:
        return torch.mm(self.hidden, self.weight.T, out=self.tile)

    def lse_fwd(self) -> tuple[Tensor, Tensor, Tensor]:
        """linear_lse_fwd under the configuration of the moment."""
        from mopo_kernels.backends.triton.linear_lse_fwd import linear_lse_fwd

        sum_exp, target_logit = torch.zeros_like(self.offset), torch.zeros_like(self.offset)
        at = (self.hidden, self.weight, None, self.target, 0, HEAD, self.offset, sum_exp, target_logit)
        linear_lse_fwd(*at, self.tile if self.store else None)
        return self.offset, sum_exp, target_logit


def milliseconds(call: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Of one call, among several in a row."""
    if device == "cpu":
        begun = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begun)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def compile_share(plan: dict[str, Any]) -> None:
    """Compile a share of the candidates, stored and not, by a launch on a few rows."""
    first, workers = plan["share"]
    sizes = {store: (columns, hidden) for _, columns, hidden, store in plan["sizes"]}
    cases = [Case((16, *size, store), plan["device"]) for store, size in sizes.items()]
    for candidate in candidates(plan["most"])[first::workers]:
        report(compiles=candidate)
        try:
            with configured(candidate):
                for case in cases:
                    case.lse_fwd()
        except Exception as error:
            report(candidate=candidate, failed=first_line(error))
    if plan["device"] == "cuda":
        torch.cuda.synchronize()


def compete(plan: dict[str, Any]) -> None:
    """Time every candidate that compiles and gives the numbers of the first, until the time is up."""
    device, deadline = plan["device"], time.monotonic() + plan["seconds"]
    cases = [Case(tuple(size), device) for size in plan["sizes"]]
    with configured(current()):
        expected = [case.lse_fwd() for case in cases]
    runs: list[dict[str, int]] = []
    failed = [json.loads(text) for text in plan["failed"]]
    for candidate in candidates(plan["most"]):
        if candidate in failed or time.monotonic() > deadline:
            continue
        report(begun=candidate)
        try:
            with configured(candidate):
                for case, wanted in zip(cases, expected, strict=True):
                    for got, value in zip(case.lse_fwd(), wanted, strict=True):
                        torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-3)
            runs.append(candidate)
        except Exception as error:
            report(candidate=candidate, failed=first_line(error))
    products: list[list[float]] = [[] for _ in cases]
    times: list[list[list[float]]] = [[[] for _ in cases] for _ in runs]
    rounds = 0
    while rounds < 3 or (rounds < 20 and time.monotonic() < deadline):
        for i, case in enumerate(cases):
            products[i].append(milliseconds(case.product, device))
            for candidate, taken in zip(runs, times, strict=True):
                with configured(candidate):
                    taken[i].append(milliseconds(case.lse_fwd, device))
        rounds += 1
        report(round=rounds)
    rows: list[dict[str, Any]] = []
    for candidate, taken in zip(runs, times, strict=True):
        ratios = [
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in zip(taken, products, strict=True)
        ]
        ms = [statistics.median(mine) for mine in taken]
        rows.append({"candidate": candidate, "ms": ms, "over_product": ratios, "mean": statistics.mean(ratios)})
    rows.sort(key=lambda row: row["mean"])
    report(rows=rows, product_ms=[statistics.median(taken) for taken in products], rounds=rounds, in_use=current())


def table(data: dict[str, Any]) -> str:
    sizes = "".join(f"  R {r} V {v}{' stored' if store else ''}".rjust(24) for r, v, _, store in data["sizes"])
    lines = [f"linear_lse_fwd over the product alone, {data['rounds']} rounds", f"{'':44}{sizes}    mean"]
    for row in data["rows"]:
        values = row["candidate"]
        text = "x".join(str(values[k]) for k in FIELDS[:3])
        text += f" group {values['group_r']} warps {values['num_warps']} stages {values['num_stages']}"
        text += " (in use)" if values == data["in_use"] else ""
        cells = "".join(f"{ratio:24.3f}" for ratio in row["over_product"])
        lines.append(f"{text:44}{cells}  {row['mean']:6.3f}")
    return "\n".join(lines)


def run(section: Section) -> None:
    # The interpreter, on the CPU, takes a few.
    sizes, most = (SIZES, None) if section.device == "cuda" else (SMALL_SIZES, 3)
    plan: dict[str, Any] = {"device": section.device, "sizes": sizes, "most": most, "failed": []}
    section.data |= {"sizes": sizes, "failed": {}}
    found: dict[str, Any] = {}

    def each(fields: dict[str, Any]) -> None:
        if "failed" in fields:
            section.data["failed"][json.dumps(fields["candidate"])] = fields["failed"]
        elif "rows" in fields:
            found.update(fields)

    def start(more: dict[str, Any], seconds: float) -> subprocesses.Finished:
        command = [sys.executable, "-m", "bench.device.tuning", json.dumps({**plan, **more, "seconds": seconds})]
        return subprocesses.run(command, seconds + 20, each)

    workers = min(8, max(1, (os.cpu_count() or 1) // 2)) if section.device == "cuda" else 1
    with ThreadPoolExecutor(workers) as pool:
        shares = [pool.submit(start, {"share": (i, workers)}, section.left * 0.5) for i in range(workers)]
        ended = [share.result() for share in shares]
    section.save()
    plan["failed"] = list(section.data["failed"])
    ended.append(start({}, section.left - 20))
    if "rows" not in found or not found["rows"]:
        section.data["output"] = ended[-1].output
        section.failures.append(f"nothing was timed: {ended[-1].failure or 'no candidate runs'}")
        return
    section.data |= {**found, "won": found["rows"][0]["candidate"]}
    print(table(section.data), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    (compile_share if "share" in given else compete)(given)
