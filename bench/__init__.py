"""Benchmarks: the same work, done by this library and by plain PyTorch, beside the bare matrix products."""
