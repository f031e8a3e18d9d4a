"""Settings that must be made before anything else is imported."""

from __future__ import annotations

import os

# One of several processes that share the tests and the cores; its own children too. Torch reads this as it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import HealthCheck, settings

# `make test` draws the same examples in every run; `make fuzz` draws new ones.
settings.register_profile(
    "test", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", deadline=None, max_examples=5000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))

# Triton reads this when it is imported, and torch may import it in any test. Without a GPU its kernels can only run in
# its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
