"""Benchmarks: the same work, done by this library, by plain PyTorch and by peers, beside the bare matrix products."""

import os

# The profiler, with which the peak of memory is taken, prints a line for each start and stop unless told not to before
# torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
