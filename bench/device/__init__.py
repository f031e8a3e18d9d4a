"""One run that builds, tests, times and checks everything on a CUDA machine and writes one JSON: ``make device``.

Needs what is on such a machine: torch, triton, nvcc, ninja and pytest. Nothing is downloaded and nothing installed.
"""
