"""Counts of work, which tests compare where a clock would depend on what else the machine does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch


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
