"""Settings that must be made before anything else is imported."""

from __future__ import annotations

import os

# One of several processes that share the tests and the cores; its own children too. Torch reads this as it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Triton reads this when it is imported, and torch may import it in any test. Without a GPU its kernels can only run in
# its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
