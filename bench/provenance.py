"""Where a figure comes from: what every record says of its machine, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "triton", "transformers")


def origin() -> dict[str, str]:
    """The commit, with a + if the working tree differs from it, and the time."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    return {
        "commit": subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def peer_versions() -> dict[str, str]:
    """Versions of the peers and of what they build on, of those installed."""
    versions = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def provenance(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, commit, date, and the command: ``python -m module`` with its arguments."""
    return {
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "peers": peer_versions(),
        **origin(),
        "command": shlex.join(["python", "-m", module, *arguments]),
    }
