"""Builds the C++ extension ``mopo_kernels._C`` where that is possible; everything else stands in pyproject.toml.

MOPO_BUILD=auto (default)  build if a C++ compiler is found; without one, or if the build fails, install without it
MOPO_BUILD=cpu             build, and fail if that is not possible
MOPO_BUILD=0               do not build

``mopo_kernels/_build.json`` records the outcome, for :func:`mopo_kernels.backends.cpp.unavailable_reason`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

MODES = ("auto", "cpu", "0")
REINSTALL = "reinstall with MOPO_BUILD=cpu"


def build_mode() -> str:
    mode = os.environ.get("MOPO_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"MOPO_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


def reason_not_to_build(mode: str) -> str | None:
    if mode == "0":
        return f"MOPO_BUILD=0 was set at install time; {REINSTALL}"
    compiler = get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"no C++ compiler was found at install time (looked for {compiler!r}); install one and {REINSTALL}"
    return None


class BuildOrExplain(BuildExtension):
    """Builds the extension, or leaves a package without it and one line that says why."""

    def run(self) -> None:
        mode = build_mode()
        reason = reason_not_to_build(mode)
        if reason is None:
            try:
                super().run()
            except Exception as error:
                if mode == "cpu":
                    raise
                line = " ".join(str(error).split())
                reason = f"the build failed at install time ({line[:200]}); {REINSTALL} to see why"
        elif mode == "cpu":
            raise SystemExit(f"mopo_kernels: MOPO_BUILD=cpu, but {reason}")
        extension = Path(self.get_ext_fullpath(self.extensions[0].name))
        if reason is not None:
            # One from an earlier install would contradict the record.
            extension.unlink(missing_ok=True)
            print(f"mopo_kernels: installing without the C++ extension: {reason}", file=sys.stderr)
        extension.parent.mkdir(parents=True, exist_ok=True)
        record = {"reason": reason, "torch": torch.__version__}
        (extension.parent / "_build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


sources = ["csrc/ops.cpp", *(str(p) for p in sorted(Path("csrc/cpu").glob("*.cpp")))]
headers = [str(p) for p in sorted(Path("csrc").rglob("*.h"))]
flags = [] if os.name == "nt" else ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
openmp = ["-fopenmp"] if sys.platform == "linux" and torch.backends.openmp.is_available() else []

setup(
    ext_modules=[
        CppExtension(
            "mopo_kernels._C",
            sources,
            depends=headers,
            extra_compile_args=flags + openmp,
            extra_link_args=openmp,
            optional=build_mode() != "cpu",
        )
    ],
    cmdclass={"build_ext": BuildOrExplain},
)
