"""Counts of work, which tests compare where a clock would depend on what else the machine does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from samples import Batch
from torch import Tensor

from mopo_kernels.fused.chunked_head import ChunkedHead


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: type, *names: str) -> list[str]:
    """A list to which every call of one of the owner's methods appends its name."""
    calls: list[str] = []

    def counted(name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for name in names:
        counted(name)
    return calls


def operations(call: Callable[[], Any]) -> list[tuple[str, int]]:
    """Every operation of torch in a call, those inside custom ones too, with the elements that it was given."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    found = [event for event in profile.events() if "::" in event.name]
    return [(event.name, sum(math.prod(shape) for shape in event.input_shapes if shape)) for event in found]


def units(function: Callable[[], Tensor], batch: Batch, monkeypatch: pytest.MonkeyPatch) -> float:
    """Products done, in units of (scored rows) x V x H."""
    multiplications = 0

    def counting(self: ChunkedHead, out: Tensor, a: Tensor, b: Tensor, **options: Any) -> None:
        nonlocal multiplications
        multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        product_(self, out, a, b, **options)

    product_ = ChunkedHead._product_
    monkeypatch.setattr(ChunkedHead, "_product_", counting)
    value = function()
    if value.requires_grad:
        value.backward()
    return multiplications / (int((batch.target != -100).sum()) * batch.weight.numel())


def peak_bytes(function: Callable[[], Any]) -> tuple[int, Any]:
    """Peak of what is allocated while ``function`` runs, and its result, still alive at the end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, result
