"""Builds ``mopo_kernels._C`` (C++) and ``mopo_kernels._cuda`` (CUDA); everything else stands in pyproject.toml.

MOPO_BUILD=auto (default)  build C++ if a compiler is found, and CUDA if torch was built for it and nvcc is found; what
                           cannot be built or fails is left out
MOPO_BUILD=cuda            build both, and fail if that is not possible
MOPO_BUILD=cpu             build C++ only, and fail if that is not possible
MOPO_BUILD=0               build neither

TORCH_CUDA_ARCH_LIST names the GPU architectures, as for any extension of torch; the default is 8.0;9.0+PTX.
``mopo_kernels/_build.json`` records the outcome for :mod:`mopo_kernels.backends.extension`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

MODES = ("auto", "cuda", "cpu", "0")
MODE = os.environ.get("MOPO_BUILD", "auto")
if MODE not in MODES:
    raise SystemExit(f"MOPO_BUILD: expected one of {', '.join(MODES)}; got {MODE!r}")


def reason_without_cpp() -> str | None:
    hint = "reinstall with MOPO_BUILD=cpu"
    if MODE == "0":
        return f"MOPO_BUILD=0 was set at install time; {hint}"
    compiler = get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"no C++ compiler was found at install time (looked for {compiler!r}); install one and {hint}"
    return None


def reason_without_cuda() -> str | None:
    hint = "reinstall with MOPO_BUILD=cuda"
    if MODE in ("cpu", "0"):
        return f"MOPO_BUILD={MODE} was set at install time; {hint}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch and {hint}"
    if CUDA_HOME is None or shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) is None:
        place = f"{CUDA_HOME}/bin" if CUDA_HOME else "CUDA_HOME and on PATH"
        toolkit = f"the CUDA {torch.version.cuda} toolkit"
        return f"no nvcc was found at install time (looked in {place}); install {toolkit} and {hint}"
    return None


class Part(NamedTuple):
    """An extension: its title in messages, its key in _build.json, the modes that insist on it, why it is left out."""

    extension: str
    title: str
    key: str
    modes: tuple[str, ...]
    reason: str | None


PARTS = (
    Part("mopo_kernels._C", "C++", "reason", ("cpu", "cuda"), reason_without_cpp()),
    Part("mopo_kernels._cuda", "CUDA", "cuda_reason", ("cuda",), reason_without_cuda()),
)


class BuildOrExplain(BuildExtension):
    """Builds each extension, or leaves a package without it and one line that says why."""

    def run(self) -> None:
        for part in PARTS:
            if part.reason is not None and MODE in part.modes:
                raise SystemExit(f"mopo_kernels: MOPO_BUILD={MODE}, but {part.reason}")
        extensions, compiler, inplace = self.extensions, self.compiler, self.inplace
        record = {"torch": torch.__version__}
        for part in PARTS:
            # One at a time, so that one that fails leaves the other; a run changes the compiler, a failed one inplace.
            self.extensions, self.compiler = [e for e in extensions if e.name == part.extension], compiler
            record[part.key] = reason = part.reason or self.failure(part)
            self.inplace = inplace
            path = Path(self.get_ext_fullpath(part.extension))
            if reason is not None:
                # One from an earlier install would contradict the record.
                path.unlink(missing_ok=True)
                print(f"mopo_kernels: installing without the {part.title} extension: {reason}", file=sys.stderr)
        self.extensions = extensions
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "_build.json").write_text(json.dumps(record) + "\n", encoding="utf-8")

    def failure(self, part: Part) -> str | None:
        """Builds self.extensions; what went wrong, if the install can do without."""
        try:
            super().run()
        except Exception as error:
            if MODE in part.modes:
                raise
            line = " ".join(str(error).split())[:200]
            return f"the build failed at install time ({line}); reinstall with MOPO_BUILD={part.modes[0]} to see why"
        return None


# All of them, so that a source distribution made where CUDA is not built has its sources too.
depends = [str(p) for p in sorted(Path("csrc").rglob("*.*"))]
sources = ["csrc/ops.cpp", *(str(p) for p in sorted(Path("csrc/cpu").glob("*.cpp")))]
flags = [] if os.name == "nt" else ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
openmp = ["-fopenmp"] if sys.platform == "linux" and torch.backends.openmp.is_available() else []
ext_modules = [
    CppExtension("mopo_kernels._C", sources, depends=depends, extra_compile_args=flags + openmp, extra_link_args=openmp)
]
if PARTS[1].reason is None:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources = ["csrc/cuda/binding.cpp", "csrc/cuda/tile.cu"]
    compile_args = {"cxx": flags, "nvcc": ["-O3"]}
    ext_modules.append(CUDAExtension("mopo_kernels._cuda", sources, depends=depends, extra_compile_args=compile_args))

setup(ext_modules=ext_modules, cmdclass={"build_ext": BuildOrExplain})
