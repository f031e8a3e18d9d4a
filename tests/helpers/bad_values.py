"""Calls with one value that is wrong, by name. Run as a script it makes the call on a device and waits: there a failed
assert ends the context, and with it the process.

    python bad_values.py NAME DEVICE
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from samples import Batch, make_batch
from torch import Tensor

from mopo_kernels import linear_mopo_loss


def _put(name: str, position: tuple[int, ...], value: float) -> Callable[[Batch], dict[str, Tensor]]:
    def change(batch: Batch) -> dict[str, Tensor]:
        tensor = getattr(batch, name).clone()
        tensor[position] = value
        return {name: tensor}

    return change


# What to change, and how the message begins.
BAD: dict[str, tuple[Callable[[Batch], dict[str, Tensor]], str]] = {
    "target": (_put("target", (0,), 37), "target: expected a number in 0 .. V - 1"),
    "negative target": (_put("target", (0,), -7), "target: expected a number in 0 .. V - 1"),
    "last offset": (lambda b: {"cu_seqlens": b.cu_seqlens - (b.cu_seqlens == b.cu_seqlens[-1]).long()}, "cu_seqlens"),
    "decreasing offsets": (_put("cu_seqlens", (3,), 0), "cu_seqlens: expected offsets that do not decrease"),
    "pair": (_put("pairs", (0, 1), 12), "pairs: expected a number in 0 .. S - 1"),
    "pair of one": (_put("pairs", (0, 1), 0), "pairs: expected two different responses"),
    "preference": (_put("preference", (0, 0), 1.5), "preference: expected a number in"),
    "multiplier": (_put("objective_weight", (1,), -1.0), "objective_weight: expected a number in 0 .. "),
}


def call(name: str, device: str) -> None:
    """The call on the device."""
    batch = make_batch(dtype=torch.float32)
    batch = dataclasses.replace(batch, **BAD[name][0](batch))
    arguments = [tensor.to(device) for tensor in batch.loss_arguments()]
    options: dict[str, Any] = {"ref_logprob": batch.ref_logprob.to(device)}
    linear_mopo_loss(*arguments, **options)
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    call(*sys.argv[1:])
