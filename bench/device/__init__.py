"""What is to be known of a CUDA machine, in one JSON a run: ``make device``, or slice by slice on a borrowed one
(docs/gpu.md).

Needs what is on such a machine: torch, triton, nvcc, ninja and pytest. Nothing is downloaded, and nothing installed but
the peers that ``make wheels-for-device`` collected elsewhere, into a folder that does not outlive the run.
"""
