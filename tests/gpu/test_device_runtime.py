"""What a device adds to the numbers: the same bits, memory, no waiting, graphs, compilation, large offsets, ranks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import bad_values
import pytest
import torch
import torch.distributed as dist
from counting import peak_bytes
from places import cases, everywhere, on, unavailable
from samples import Batch, make_batch
from torch import Tensor

from mopo_kernels import linear_logprob, linear_mopo_loss, linear_sequence_logprob

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ALL = ("hidden", "weight", "bias")
# What a call may be: with gradients for everything, for hidden alone, or none.
MODES: dict[str, tuple[str, tuple[str, ...]]] = {
    "logprob trained": ("logprob", ALL),
    "sequences trained": ("sequences", ALL),
    "sequences frozen": ("sequences", ("hidden",)),
    "sequences none": ("sequences", ()),
    "loss trained": ("regression", ALL),
    "loss frozen": ("regression", ("hidden",)),
    "loss none": ("regression", ()),
    "sigmoid trained": ("sigmoid", ALL),
    "cloning trained": ("cloning", ALL),
}


def run(mode: str, batch: Batch, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    """What the call returns, and its gradients. Nothing is made a leaf here, so that a graph can hold the call."""
    kind, _ = MODES[mode]
    head = (batch.hidden, batch.weight, batch.target)
    if kind == "logprob":
        output: tuple[Tensor, ...] = (linear_logprob(*head, batch.bias, **options),)
    elif kind == "sequences":
        output = (linear_sequence_logprob(*head, batch.cu_seqlens, batch.bias, **options),)
    else:
        output = linear_mopo_loss(*batch.loss_arguments(), **batch.loss_options(kind), **options)
    gradients = torch.autograd.grad(output[0].sum(), leaves) if leaves else ()
    return [*(t.detach() for t in output), *gradients]


@functools.lru_cache(maxsize=4)
def large_batch(dtype: torch.dtype, **sizes: int) -> Batch:
    """Made once: millions of random numbers take the CPU a second."""
    return make_batch(dtype=dtype, scale=0.2, **sizes)


def bits(tensor: Tensor) -> Tensor:
    """NaN, which a satisfaction without labels is, equals itself."""
    return torch.nan_to_num(tensor, nan=12345.0)


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(bits(a), bits(b))


# ------------------------------------------------------------------------------------------------------ repeatability


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "mode", "size"),
    cases(
        itertools.product((FP32, BF16), ("logprob trained", "loss trained"), ("small",)),
        [
            *itertools.product((FP64, FP32, BF16, FP16), MODES, ("small",)),
            *itertools.product((FP32, BF16), ("logprob trained", "loss trained"), ("large",)),
        ],
    ),
)
def test_two_runs_are_bitwise_equal(device: str, backend: str, dtype: torch.dtype, mode: str, size: str) -> None:
    """In other places of memory, with other garbage in it."""
    sizes = {"hidden": 33, "vocabulary": 201}
    if size == "large":
        sizes = {"hidden": 1024, "vocabulary": 32003, "longest": 64}
    batch = on(large_batch(dtype, prompts=8, **sizes), device)
    leaves = batch.leaves(*MODES[mode][1])
    limits = (24_000, 1 << 20) if size == "small" else (64 << 20,)
    for limit in limits:
        first = run(mode, batch, leaves, backend=backend, max_buffer_bytes=limit)
        garbage = [torch.full((n,), torch.nan, device=device) for n in (1000, 100_000, 1_000_000)]
        del garbage[1]
        assert_same_bits(run(mode, batch, leaves, backend=backend, max_buffer_bytes=limit), first)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_a_stream_of_its_own_gives_the_same_bits(backend: str) -> None:
    if (reason := unavailable(backend, "cuda")) is not None:
        pytest.skip(reason)
    batch = on(make_batch(dtype=BF16, prompts=8, hidden=256, vocabulary=5003, scale=0.3), "cuda")
    leaves = batch.leaves(*ALL)
    expected = run("loss trained", batch, leaves, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run("loss trained", batch, leaves, backend=backend)
    stream.synchronize()
    assert_same_bits(got, expected)


# ------------------------------------------------------------------------------------------------------------- memory


def peak_of(device: str, call: Callable[[], list[Tensor]]) -> int:
    """Peak of what is allocated during the call, in bytes, its results included."""
    if device == "cpu":
        return int(peak_bytes(call)[0])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "mode", "limit", "host"),
    cases(
        [(FP32, "loss trained", 1 << 20, True), (FP32, "logprob trained", 1 << 20, False)],
        [
            *itertools.product((FP32, BF16, FP16), MODES, (256 << 20,), (True,)),
            *itertools.product((BF16,), ("logprob trained", "loss trained"), (64 << 20,), (True, False)),
        ],
    ),
)
def test_memory_beyond_inputs_outputs_and_gradients_stays_within_the_buffer(
    device: str, backend: str, dtype: torch.dtype, mode: str, limit: int, host: bool
) -> None:
    """All logits would take 1.6 GiB in fp32 on a GPU; 64 MiB above the buffer are for the workspace of the products."""
    sizes = {"prompts": 16, "responses": 2, "longest": 512, "hidden": 1024, "vocabulary": 50304}
    if device == "cpu":
        sizes = {"prompts": 12, "responses": 4, "longest": 9, "hidden": 64, "vocabulary": 2003}
    batch = on(large_batch(dtype, **sizes), device, host)
    leaves = batch.leaves(*MODES[mode][1])

    def call() -> list[Tensor]:
        return run(mode, batch, leaves, backend=backend, max_buffer_bytes=limit)

    call()
    # Gradients accumulate in fp32 and are cast once, so that half precision holds both for a moment.
    gradients = sum(t.numel() * (4 + (t.element_size() if t.element_size() != 4 else 0)) for t in leaves)
    small = 96 * batch.hidden.shape[0] + 512 * batch.pairs.shape[0] + 8 * batch.bias.numel() + 4096
    allowed = limit + gradients + small + ((64 << 20) if device == "cuda" else 0)
    peak = peak_of(device, call)
    assert peak <= allowed, f"{(peak - gradients - small) / 2**20:.1f} MiB used, {limit / 2**20:.1f} MiB allowed"


@pytest.mark.parametrize(("device", "backend"), everywhere())
def test_negative_control_plain_pytorch_is_over_the_bound(device: str, backend: str) -> None:
    vocabulary = 50304 if device == "cuda" else 2003
    batch = on(make_batch(prompts=12, responses=4, hidden=64, vocabulary=vocabulary, dtype=FP32), device)
    leaves = batch.leaves("hidden")
    peak = peak_of(device, lambda: run("sequences frozen", batch, leaves, backend="naive"))
    assert peak > 3 * batch.hidden.shape[0] * vocabulary * 4


# ------------------------------------------------------------------------------------------------ waiting, and graphs


@contextmanager
def waiting_forbidden(device: str) -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "mode", "limit", "host"),
    cases(
        [(FP32, mode, 24_000, True) for mode in MODES],
        itertools.product((FP32, BF16, FP16), MODES, (24_000, 64 << 20), (True, False)),
    ),
)
def test_the_host_never_waits(device: str, backend: str, dtype: torch.dtype, mode: str, limit: int, host: bool) -> None:
    batch = on(make_batch(dtype=dtype, vocabulary=301, hidden=48, scale=0.3), device, host)
    leaves = batch.leaves(*MODES[mode][1])
    expected = run(mode, batch, leaves, backend=backend, max_buffer_bytes=limit)
    with waiting_forbidden(device):
        got = run(mode, batch, leaves, backend=backend, max_buffer_bytes=limit)
    assert_same_bits(got, expected)


@pytest.mark.gpu
def test_negative_control_waiting_is_seen() -> None:
    value = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_forbidden("cuda"):
        value.sum().item()


def captured(device: str, call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The call recorded once, to be replayed on what its tensors hold then. The CPU, which records nothing, calls
    again."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


def other_values(batch: Batch, seed: int) -> Batch:
    """A batch of the same sizes: other hidden states, targets, sequences, pairs and labels."""
    g = torch.Generator().manual_seed(seed)
    tokens, sequences = batch.hidden.shape[0], batch.cu_seqlens.shape[0] - 1
    inner = torch.randint(0, tokens + 1, (sequences - 1,), generator=g).sort().values
    order = torch.randperm(sequences, generator=g)
    return dataclasses.replace(
        batch,
        hidden=batch.hidden[torch.randperm(tokens, generator=g)],
        target=batch.target[torch.randperm(tokens, generator=g)],
        cu_seqlens=torch.cat([torch.tensor([0]), inner, torch.tensor([tokens])]),
        ref_logprob=batch.ref_logprob[order],
        pairs=order[batch.pairs],
        preference=batch.preference[torch.randperm(batch.pairs.shape[0], generator=g)],
        pair_weight=batch.pair_weight.flip(0),
        prompt_index=batch.prompt_index[order.argsort()],
    )


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "mode", "limit"),
    cases(
        [(FP32, mode, 24_000) for mode in MODES],
        itertools.product((FP32, BF16, FP16), MODES, (24_000, 64 << 20)),
    ),
)
def test_a_captured_call_replays_with_changed_values(
    device: str, backend: str, dtype: torch.dtype, mode: str, limit: int
) -> None:
    first = make_batch(dtype=dtype, vocabulary=301, hidden=48, scale=0.3)
    static = on(first, device)
    leaves = static.leaves(*MODES[mode][1])
    replay = captured(device, lambda: run(mode, static, leaves, backend=backend, max_buffer_bytes=limit))
    for seed in range(3):
        changed = on(other_values(first, seed), device)
        with torch.no_grad():
            for field in dataclasses.fields(Batch):
                getattr(static, field.name).copy_(getattr(changed, field.name))
        got = [t.clone() for t in replay()]
        fresh = changed.leaves(*MODES[mode][1])
        assert_same_bits(got, run(mode, changed, fresh, backend=backend, max_buffer_bytes=limit))


# -------------------------------------------------------------------------------------------------------- compilation


def compiled_variants() -> dict[str, int]:
    """How many variants each Triton kernel of this library was compiled to in this process."""
    package = import_module("mopo_kernels.backends.triton")
    counts = {}
    for module in pkgutil.iter_modules(package.__path__):
        for name, value in vars(import_module(f"{package.__name__}.{module.name}")).items():
            caches = getattr(value, "device_caches", None)
            if caches is not None:
                # By device: (compiled kernels by key, ...).
                counts[name] = sum(len(entry[0]) for entry in caches.values())
    return counts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("mode", [mode for mode in MODES if "none" not in mode])
def test_a_new_number_of_tokens_compiles_nothing(mode: str, dtype: torch.dtype) -> None:
    """Tokens, sequences and pairs of any number, divisible by 16 or not, and one."""
    if (reason := unavailable("triton", "cuda")) is not None:
        pytest.skip(reason)

    def once(prompts: int, responses: int, longest: int, hidden: int = 64) -> None:
        batch = make_batch(
            prompts=prompts, responses=responses, longest=longest, hidden=hidden, vocabulary=1031, dtype=dtype
        )
        for host in (True, False):
            there = on(batch, "cuda", host)
            run(mode, there, there.leaves(*MODES[mode][1]), backend="triton")

    once(4, 3, 9)
    before = compiled_variants()
    assert sum(before.values()) > 0
    for prompts, responses, longest in ((1, 2, 1), (1, 2, 16), (2, 2, 8), (5, 2, 33), (16, 4, 16), (7, 3, 200)):
        once(prompts, responses, longest)
    assert compiled_variants() == before
    # Negative control: a hidden size that no block divides is another variant where products are fused.
    once(4, 3, 9, hidden=50)
    assert dtype == FP32 or compiled_variants() != before


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "mode"),
    cases([(FP32, "loss trained")], itertools.product((BF16,), ("loss trained", "sequences frozen"))),
)
def test_compile_takes_the_full_graph(device: str, backend: str, dtype: torch.dtype, mode: str) -> None:
    """Built by inductor for one backend on a GPU; for the others, whose graph is the same, traced only."""
    compiler = "inductor" if (device, backend) == ("cuda", "triton") else "aot_eager"
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(compiler)(module, inputs)

    names = [field.name for field in dataclasses.fields(Batch)]

    def loss(*tensors: Tensor) -> Tensor:
        batch = Batch(**dict(zip(names, tensors, strict=True)))
        if "sequences" in mode:
            head = (batch.hidden, batch.weight, batch.target)
            return linear_sequence_logprob(*head, batch.cu_seqlens, batch.bias, backend=backend).sum()
        return linear_mopo_loss(*batch.loss_arguments(), ref_logprob=batch.ref_logprob, backend=backend).loss * 2.0

    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for seed in range(4):
        batch = on(make_batch(prompts=3 + seed, seed=seed, dtype=dtype), device)
        leaves = batch.leaves(*MODES[mode][1])
        tensors = [getattr(batch, name) for name in names]
        expected, got = loss(*tensors), compiled(*tensors)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b)
    # One for the first sizes, one for sizes that vary.
    assert graphs <= 2


# ------------------------------------------------------------------------------------------------------ large offsets


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "mode", "rows", "vocabulary"),
    cases(
        [(FP32, "loss trained", 40, 701), (BF16, "logprob trained", 40, 701)],
        itertools.product((FP32, BF16), ("loss trained", "logprob trained"), (8448,), (262_144,)),
    ),
)
def test_a_tile_of_more_than_two_to_the_31_elements(
    device: str, backend: str, dtype: torch.dtype, mode: str, rows: int, vocabulary: int
) -> None:
    """One chunk holds every row. Rows are held against plain PyTorch a few at a time, at both ends and in between."""
    hidden, per_sequence = 64, rows // 4
    g = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g, device=device) * hidden**-0.25).to(dtype)

    h, w = normal(rows, hidden).requires_grad_(), normal(vocabulary, hidden).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,), generator=g, device=device)
    if mode == "loss trained":
        cu_seqlens = torch.arange(0, rows + 1, per_sequence)
        pairs = torch.tensor([[0, 1], [2, 3]])
        labels, one = torch.ones(2, 1, device=device), torch.ones(1, device=device)
        reference = torch.zeros(4, device=device)
        arguments = (h, w, target, cu_seqlens, pairs, labels, one)
        output = linear_mopo_loss(*arguments, ref_logprob=reference, backend=backend, max_buffer_bytes=24 << 30)
        # g = d loss / d logprob of the regression with one label: 2 (h - 1 / (2 tau)) / P, on either side of a pair.
        slope = output.margin - 5.0
        coefficient = torch.stack([slope, -slope], dim=1).flatten().repeat_interleave(per_sequence)
        value, scalar = output.log_ratio, output.loss
    else:
        coefficient = torch.linspace(-1, 2, rows, device=device)
        value = linear_logprob(h, w, target, backend=backend, max_buffer_bytes=24 << 30)
        scalar = (value * coefficient).sum()
    dhidden, dweight = torch.autograd.grad(scalar, [h, w])

    logprob, dh, dw = [], [], torch.zeros(vocabulary, hidden, device=device)
    for start in range(0, rows, 1024):
        part = slice(start, start + 1024)
        x = h.detach()[part].float()
        z = (x @ w.detach().float().T).log_softmax(dim=-1)
        at = target[part, None]
        logprob.append(z.gather(1, at)[:, 0])
        z = z.exp_().neg_().scatter_add_(1, at, torch.ones_like(at, dtype=z.dtype)).mul_(coefficient[part, None])
        dh.append(z @ w.detach().float())
        dw += z.T @ x
    expected = torch.cat(logprob)
    expected = expected.view(4, -1).sum(dim=1) if mode == "loss trained" else expected
    tolerance = 1e-4 if dtype == FP32 else 2e-2
    pairs_of = ((value, expected), (dhidden, torch.cat(dh)), (dweight, dw))
    for got, want in pairs_of:
        for a, b in zip(got.float().chunk(16), want.chunk(16), strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


# ------------------------------------------------------------------------------------------- asserts, ranks, devices


@pytest.mark.parametrize("name", bad_values.BAD)
def test_a_bad_value_is_refused_on_the_cpu(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(bad_values.BAD[name][1])):
        bad_values.call(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", bad_values.BAD)
def test_a_bad_value_is_asserted_on_the_device(name: str) -> None:
    """In a process of its own, which the assert ends."""
    script = str(Path(bad_values.__file__))
    root = str(Path(script).parents[2])
    child = subprocess.run(
        [sys.executable, script, name, "cuda"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert child.returncode != 0
    assert "device-side assert" in child.stdout
    assert bad_values.BAD[name][1] in child.stdout


@pytest.fixture
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    device = request.node.callspec.params["device"]
    name = "nccl" if device == "cuda" else "gloo"
    if not (dist.is_nccl_available() if name == "nccl" else dist.is_gloo_available()):
        pytest.skip(f"torch was built without {name}")
    dist.init_process_group(name, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(("device", "backend", "dtype"), cases([(FP32,)], [(FP32,), (BF16,)]))
def test_a_group_of_one_rank_changes_nothing(device: str, backend: str, dtype: torch.dtype, group: Any) -> None:
    """The head cut over one NCCL rank."""
    for mode, limit in itertools.product(MODES, (24_000, 1 << 20)):
        batch = on(make_batch(dtype=dtype, vocabulary=301, hidden=48, scale=0.3), device)
        leaves = batch.leaves(*MODES[mode][1])
        alone = run(mode, batch, leaves, backend=backend, max_buffer_bytes=limit)
        grouped = run(mode, batch, leaves, backend=backend, max_buffer_bytes=limit, process_group=group)
        tolerance = 1e-5 if dtype == FP32 else 2e-2
        for a, b in zip(grouped, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * bits(b).abs().max(), equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_a_device_that_is_not_the_current_one_gives_the_same_bits(backend: str) -> None:
    if (reason := unavailable(backend, "cuda")) is not None:
        pytest.skip(reason)
    batch = make_batch(dtype=BF16, vocabulary=301, hidden=48, scale=0.3)
    results = []
    for device in ("cuda:0", "cuda:1"):
        there = on(batch, device)
        results.append([t.cpu() for t in run("loss trained", there, there.leaves(*ALL), backend=backend)])
    assert_same_bits(*results)
