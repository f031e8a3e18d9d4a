"""Section "build": the C++ and CUDA extensions, in place, for the architecture of the device alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from bench.device import subprocesses
from bench.device.record import Section

# What the package says of its backends, in a process that loads the new extensions.
ASK = """
import json, sys, torch
from mopo_kernels import backends
answer = {}
for name in backends.availability():
    try:
        backends.resolve(name, torch.device(sys.argv[1]))
        answer[name] = None
    except RuntimeError as error:
        answer[name] = str(error)
print("served", json.dumps(answer))
"""


def toolkit() -> str | None:
    """The folder of the CUDA toolkit. Torch takes the one above nvcc, which on some machines is a script that calls the
    compiler somewhere else."""
    nvcc = shutil.which("nvcc")
    above = [] if nvcc is None else [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]]
    given = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in (*given, *above, Path("/usr/local/cuda")):
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            return str(folder)
    return None


def served(device: str) -> dict[str, str | None]:
    """Every backend: None where it serves the device, else why not.

    Raises:
        RuntimeError: the package does not import.
    """
    asked = subprocesses.run([sys.executable, "-c", ASK, device], 120)
    for line in reversed(asked.output.splitlines()):
        if line.startswith("served "):
            answer: dict[str, str | None] = json.loads(line.removeprefix("served "))
            return answer
    raise RuntimeError(f"mopo_kernels does not import: {asked.output[-500:]}")


def run(section: Section) -> None:
    """``jobs``: compilers at a time, all processors without it. A dry run builds nothing: what is there may be in
    use."""
    environment = {"MOPO_BUILD": "auto"}
    capability = section.record.data["device"].get("capability")
    if capability is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = capability
    if "MAX_JOBS" not in os.environ:
        environment["MAX_JOBS"] = str(section.options.get("jobs", os.cpu_count() or 1))
    section.data |= {"environment": dict(environment), "ninja": shutil.which("ninja") is not None}
    home = toolkit()
    if home is not None:
        environment["CUDA_HOME"] = home
    command = [sys.executable, "setup.py", *(["--version"] if section.dry else ["build_ext", "--inplace"])]
    # A compiler reports nothing.
    done = subprocesses.run(command, section.left, environment=environment, silence=float("inf"))
    if done.failure is not None:
        section.failures.append(f"setup.py build_ext: {done.failure}")
    section.data["backends"] = answer = served(section.device)
    for name in ("triton", "cuda") if section.device == "cuda" else ("cpp",):
        reason = answer.get(name, "it is not registered")
        if reason is not None:
            section.failures.append(f"backend {name!r} is not available after the build: {reason}")
    if section.failures:
        section.data["output"] = done.output
