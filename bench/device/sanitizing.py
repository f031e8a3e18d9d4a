"""Section "sanitize": the kernels under compute-sanitizer on small ragged shapes, each tensor in memory of its own.

Runs as a child too: ``python -m bench.device.sanitizing BACKEND DEVICE`` does the tile work of a backend once and holds
it against plain PyTorch; ``control`` in the place of a backend writes outside its memory, which the tool must see.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bench.device import subprocesses
from bench.device.record import NotHere, Section
from mopo_kernels import backends
from mopo_kernels.arguments import LogitTransform, LossOptions, PairBatch
from mopo_kernels.backends import TileBackend

TOOL = "compute-sanitizer"
# What it exits with where it found an error.
FOUND = 86
TOOLS = {
    "memcheck": ("--tool", "memcheck", "--leak-check", "no"),
    "racecheck": ("--tool", "racecheck", "--racecheck-report", "all"),
}
# What is checked with which tool. Triton places its own barriers.
RUNS = (("control", "memcheck"), ("cuda", "memcheck"), ("cuda", "racecheck"), ("triton", "memcheck"))

# Rows and columns: a scalar, less than a vector, ragged beyond one block in each direction.
SHAPES = ((1, 1), (3, 7), (5, 4099), (2, 9001), (130, 263))
# With a bias, without one.
HEADS = ((LogitTransform(), False), (LogitTransform(5.0, 0.7, 1.3), True))


def _there(tensor: Tensor, device: str) -> Tensor:
    """On the device with the same strides, by one copy of the whole storage."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device, copy=True)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _close(what: str, got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    got, expected = got.cpu().double(), expected.double()
    if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
        raise AssertionError(f"{what}: off by {(got - expected).abs().max().item():.2g}")


def tiles(backend: TileBackend, device: str) -> None:
    """fold and gradient_ of tiles that lie in larger blocks."""
    plain = backends.tile_backend("torch")
    for (rows, columns), dtype, (transform, biased) in itertools.product(SHAPES, (torch.float32, torch.float64), HEADS):
        g = torch.Generator().manual_seed(rows + columns)
        tile = torch.randn(rows + 1, columns + 3, generator=g).to(dtype)[1:, 2 : columns + 2]
        bias = torch.randn(columns, generator=g).to(dtype) if biased else None
        target = torch.randint(-1, columns, (rows,), generator=g)
        grad_logprob = torch.randn(rows, generator=g).to(dtype)
        statistics = [torch.full((rows,), value, dtype=dtype) for value in (-torch.inf, 0.0, 0.0)]
        moved = [_there(t, device) for t in (tile, target, grad_logprob, *statistics)]
        moved_bias = None if bias is None else _there(bias, device)
        backend.lse_fwd(moved[0], moved_bias, moved[1], 0, transform, *moved[3:])
        plain.lse_fwd(tile, bias, target, 0, transform, *statistics)
        scored = target >= 0
        for name, got, expected in zip(("row_max", "sum_exp", "target_logit"), moved[3:], statistics, strict=True):
            _close(name, got.cpu()[scored], expected[scored])
        logsumexp = statistics[0].double() + statistics[1].double().log()
        backend.logits_bwd_(moved[0], moved_bias, moved[1], 0, transform, _there(logsumexp, device), moved[2])
        plain.logits_bwd_(tile, bias, target, 0, transform, logsumexp, grad_logprob)
        _close("logits_bwd_", moved[0], tile)


def fused(backend: TileBackend, device: str) -> None:
    """linear_lse_fwd, and what turns its exponentials into the gradient."""
    transform = LogitTransform()
    for (rows, columns, hidden), dtype in itertools.product(
        ((1, 1, 8), (130, 263, 40), (33, 520, 64)), (torch.bfloat16, torch.float16)
    ):
        g = torch.Generator().manual_seed(rows)
        h, w = (torch.randn(n, hidden, generator=g).mul_(hidden**-0.25).to(dtype) for n in (rows, columns))
        target = torch.randint(0, columns, (rows,), generator=g)
        target[1::7] = -1
        blocks = backend.offset_blocks(columns)
        statistics = [torch.full((rows,), -torch.inf), torch.zeros(rows), torch.zeros(rows)]
        row_max, sum_exp, target_logit = (_there(t, device) for t in statistics)
        exp_logits = torch.empty(rows, columns + 5, dtype=dtype, device=device)[:, :columns]
        factors = (_there(h, device), _there(w, device), None, _there(target, device), 0, transform)
        at = factors[3:]
        if backend.row_offsets(dtype):
            row_max, sum_exp, target_logit = backend.row_offset(*factors)
            backend.linear_lse_fwd(*factors, row_max, sum_exp, target_logit, exp_logits)
            logsumexp = row_max.double() + sum_exp.double().log()
            scale = torch.empty(rows, device=device)
            backend.mark_target_(exp_logits, *at, row_max, logsumexp, (target_logit - logsumexp).float(), scale)
            exp_logits = backend.scaled(exp_logits, scale[:, None], torch.float32)
        else:
            offsets = torch.empty(blocks, rows, device=device)
            backend.linear_lse_fwd(*factors, row_max, sum_exp, target_logit, exp_logits, offsets)
            logsumexp = row_max.double() + sum_exp.double().log()
            backend.exp_logits_bwd_(exp_logits, offsets, *at, logsumexp, (target_logit - logsumexp).float(), None)
        z = (h.float() @ w.float().T).log_softmax(dim=1)
        onehot = torch.zeros_like(z).scatter_(1, target.clamp(min=0)[:, None], 1.0)
        expected = (onehot - z.exp()).masked_fill((target < 0)[:, None], 0.0)
        _close("gradient", exp_logits, expected, 0.02)


def sequences(backend: TileBackend, device: str) -> None:
    """segment_sum, pair_loss_bwd and pair_loss_fwd."""
    g = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 0, 1, 1025, 3000])
    value = torch.randn(3000, generator=g)
    got = backend.segment_sum(_there(value, device), _there(cu_seqlens, device))
    _close("segment_sum", got, backends.tile_backend("torch").segment_sum(value, cu_seqlens), 1e-3)
    pairs = torch.combinations(torch.arange(20))
    preference = torch.rand(pairs.shape[0], 3, generator=g)
    preference[::5, 1] = torch.nan
    logprob, reference = torch.randn(20, generator=g), torch.randn(20, generator=g)

    def batch(device: str) -> PairBatch:
        return PairBatch(
            pairs=_there(pairs, device),
            preference=_there(preference, device),
            objective_weight=torch.ones(3).to(device),
            options=LossOptions(loss_type="sigmoid"),
        )

    there, plain = (_there(logprob, device), _there(reference, device), batch(device)), backends.tile_backend("torch")
    expected = plain.pair_loss_bwd(logprob, reference, batch("cpu"))
    _close("pair_loss_bwd", backend.pair_loss_bwd(*there), expected)
    tokens = (_there(torch.arange(21) * 7, device), 140)
    _close("token_grad_logprob", backend.token_grad_logprob(*there, *tokens), expected.repeat_interleave(7))
    losses = plain.pair_loss_fwd(logprob, reference, batch("cpu"))
    for name, value, exact in zip(losses._fields, backend.pair_loss_fwd(*there), losses, strict=True):
        _close(name, value, exact)


def write_outside(device: str) -> None:
    """A kernel that stores beyond its tensor."""
    from bench.device.oob_kernel import store

    x = torch.zeros(16, device=device)
    store[(1,)](x, 32)
    torch.cuda.synchronize()


def child(name: str, device: str) -> None:
    if name == "control":
        write_outside(device)
        return
    backend = backends.tile_backend(backends.resolve(name, torch.device(device)))
    tiles(backend, device)
    if backend.fuses(torch.bfloat16):
        fused(backend, device)
    sequences(backend, device)
    print("all is as plain PyTorch has it")


def run(section: Section) -> None:
    tool = shutil.which(TOOL)
    if tool is None:
        place = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", TOOL)
        if not os.path.exists(place):
            raise NotHere(f"{TOOL} is not installed")
        tool = place
    results: dict[str, Any] = {}

    def check(what: tuple[str, str]) -> None:
        name, kind = what
        command = [tool, *TOOLS[kind], "--error-exitcode", str(FOUND), sys.executable, "-m", "bench.device.sanitizing"]
        # Without the caching allocator every tensor has bounds that the tool knows.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocesses.run(
            [*command, name, section.device],
            section.left - 2,
            environment=environment,
            # What runs under the tool is slow, and reports nothing.
            silence=float("inf"),
        )
        results[f"{name} {kind}"] = {
            "code": done.code,
            "seconds": round(done.seconds, 1),
            "output": done.output[-1500:],
        }

    with ThreadPoolExecutor(len(RUNS)) as pool:
        list(pool.map(check, RUNS))
    section.data["runs"] = results
    control = results["control memcheck"]
    if control["code"] != FOUND:
        raise NotHere(f"{TOOL} does not see a planted error on this machine: {control['output'][-300:]}")
    for name, result in results.items():
        if name != "control memcheck" and result["code"] != 0:
            why = {None: "out of time", FOUND: "an error was found"}.get(result["code"], f"exit code {result['code']}")
            section.failures.append(f"{name}: {why}")


if __name__ == "__main__":
    child(*sys.argv[1:])
