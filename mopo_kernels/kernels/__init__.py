"""Triton kernels, one file each: the kernel, its launch configuration and the function that launches it.

Every kernel runs on NVIDIA GPUs from compute capability 8.0 on and in Triton's interpreter (``TRITON_INTERPRET=1``, set
before Triton is imported), is deterministic (no atomics, fixed order), never waits for the device, and computes row
offsets in 64 bits. Sizes that change from batch to batch are neither constants of the compiled code nor specialised on,
so that a new number of tokens compiles nothing.
"""
