"""From the host to a device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU or the device on the device, without waiting for it: to a GPU from pinned memory, as a copy
    from any other waits for all that was launched before it."""
    if values.device.type != "cpu" or device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
