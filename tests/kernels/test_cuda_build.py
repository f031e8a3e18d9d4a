"""The CUDA extension, without a GPU: its kernels and binding compile, and setup.py builds it or says why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from mopo_kernels.backends import cpp, cuda, extension

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda"
# lse_fwd and logits_bwd_, fp32 and fp64, with and without bias, with and without softcap.
KERNELS = 16


@pytest.fixture(scope="module")
def nvcc() -> str:
    place = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if place is None:
        pytest.skip("nvcc was not found on PATH or in CUDA_HOME")
    return place


def compile_kernels(nvcc: str, *flags: str, source: Path = SOURCE / "tile.cu") -> str:
    """What nvcc says; the result is written to the last flag's path."""
    command = [nvcc, "-std=c++17", "-O3", f"-I{SOURCE}", str(source), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def registers_and_spills(said: str) -> dict[str, tuple[int, int]]:
    """For each kernel, as ptxas -v reports it: registers of a thread, bytes it spills."""
    # Its name twice, then both numbers of bytes spilled, then registers.
    name = r"entry function '\S*?(lse_fwd|logits_bwd)_kernelI(\w)Lb(\d)ELb(\d)E"
    report = rf"{name}.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    found = re.findall(report, said, flags=re.DOTALL)
    return {"_".join(name): (int(registers), int(stores) + int(loads)) for *name, stores, loads, registers in found}


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_kernels_compile_and_keep_everything_in_registers(
    nvcc: str, architecture: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    said = compile_kernels(nvcc, code, "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "tile.cubin"))
    assert "warning" not in said
    kernels = registers_and_spills(said)
    record_property("registers", {name: registers for name, (registers, _) in kernels.items()})
    assert len(kernels) == KERNELS
    assert {name: spills for name, (_, spills) in kernels.items() if spills} == {}
    # Registers of a multiprocessor for at least 3 blocks of 256 threads; fp32, which is what matters, for 5.
    assert max(registers for registers, _ in kernels.values()) <= 80
    assert max(registers for name, (registers, _) in kernels.items() if "_f_" in name) <= 48


def test_negative_control_spills_are_seen(nvcc: str, tmp_path: Path) -> None:
    source = tmp_path / "tile.cu"
    # All of a multiprocessor's threads at once leave each 32 registers.
    source.write_text(
        (SOURCE / "tile.cu").read_text().replace("__launch_bounds__(threads)", "__launch_bounds__(threads, 8)")
    )
    flags = ["-arch=sm_80", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "tile.cubin")]
    kernels = registers_and_spills(compile_kernels(nvcc, *flags, source=source))
    assert any(spills for _, spills in kernels.values())


def test_rows_are_read_and_written_16_bytes_at_a_time_and_without_atomics(nvcc: str, tmp_path: Path) -> None:
    compile_kernels(nvcc, "-arch=sm_90", "-ptx", "-o", str(tmp_path / "tile.ptx"))
    entries = (tmp_path / "tile.ptx").read_text().split(".entry ")[1:]
    assert len(entries) == KERNELS
    for entry in entries:
        name = entry.splitlines()[0]
        vector = r"v4\.f32" if "kernelIf" in name else r"v2\.f64"
        # Four at a time, before the first is used.
        assert len(re.findall(rf"ld\.global\.{vector}", entry)) >= 4
        assert (len(re.findall(rf"st\.global\.{vector}", entry)) >= 4) == ("logits_bwd" in name)
        assert re.search(r"\b(atom|red)\.", entry) is None


def test_the_binding_compiles_against_torch(nvcc: str, tmp_path: Path) -> None:
    macros = Path(include_paths()[0]) / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    # A torch without CUDA comes without that header, which would say that c10_cuda is a shared library.
    absent = [] if macros.exists() else ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    includes = [f"-isystem={folder}" for folder in [*include_paths(), sysconfig.get_path("include")]]
    # nvcc hands a .cpp to the C++ compiler, with CUDA's own headers.
    command = [nvcc, "-std=c++20", "-Xcompiler=-fsyntax-only,-Wall,-Werror", *absent, *includes, "-c"]
    command += [str(SOURCE / "binding.cpp"), "-o", str(tmp_path / "binding.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# setup.py, with a compiler and an nvcc that only note what they are asked for.

COMPILER = """#!/bin/sh
case "$*" in *\\ -o\\ *) ;; *) exec c++ "$@";; esac
while [ "$1" != -o ]; do shift; done
: > "$2"
"""
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release {version}, V{version}.0" && exit
echo "$@" >> "{log}"
{fail}
while [ "$1" != -o ]; do shift; done
: > "$2"
"""
# As if this torch had been built for CUDA.
SETUP = """
import runpy, sys, torch
torch.version.cuda, torch.cuda._is_compiled, torch.cuda.is_available = {cuda!r}, lambda: True, lambda: False
runpy.run_path("setup.py", run_name="__main__")
"""


class Install:
    """A run of setup.py as an install would, with the package going to a folder of its own, or, editable, as a copy."""

    def __init__(
        self,
        folder: Path,
        mode: str,
        cuda: str | None = "13.0",
        nvcc: str = "works",
        editable: bool = False,
        **env: str,
    ) -> None:
        self.package, self.log = folder / "mopo_kernels", folder / "nvcc.log"
        self.package.mkdir()
        where = ["--build-lib", str(folder), "--build-temp", str(folder / "t")]
        if editable:
            where = ["--inplace"]
            shutil.copytree(ROOT / "csrc", folder / "csrc")
            for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / name, folder)
            (self.package / "__init__.py").touch()
        # From an earlier install.
        (self.package / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
        (folder / "cuda" / "bin").mkdir(parents=True)
        self.script(folder / "c++", COMPILER)
        if nvcc != "missing":
            fail = 'echo "no such architecture" >&2; exit 1' if nvcc == "fails" else ""
            self.script(folder / "cuda" / "bin" / "nvcc", NVCC.format(log=self.log, version="13.0", fail=fail))
        clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "MOPO_BUILD", "TORCH_CUDA_ARCH_LIST")}
        env = {"CXX": str(folder / "c++"), "CUDA_HOME": str(folder / "cuda"), "MOPO_BUILD": mode, **env}
        command = [sys.executable, "-c", SETUP.format(cuda=cuda), "build_ext", *where]
        place = folder if editable else ROOT
        self.done = subprocess.run(command, env={**clean, **env}, cwd=place, capture_output=True, text=True)

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def extensions(self) -> list[str]:
        return sorted(path.name.split(".")[0] for path in self.package.glob("_*.so"))

    def record(self) -> dict[str, str | None]:
        assert self.done.returncode == 0, self.done.stderr
        record: dict[str, str | None] = json.loads((self.package / "_build.json").read_text())
        return record


def test_both_extensions_are_built_where_torch_and_nvcc_allow_it(tmp_path: Path) -> None:
    install = Install(tmp_path, "auto")
    assert install.record() == {"torch": torch.__version__, "reason": None, "cuda_reason": None}
    assert install.extensions() == ["_C", "_cuda"]
    (asked,) = install.log.read_text().splitlines()
    assert sorted(re.findall(r",code=(\w+)", asked)) == ["compute_90", "sm_80", "sm_90"]
    assert "without" not in install.done.stderr


def test_the_architectures_may_be_chosen(tmp_path: Path) -> None:
    install = Install(tmp_path, "cuda", TORCH_CUDA_ARCH_LIST="8.6")
    assert install.record()["cuda_reason"] is None
    assert re.findall(r",code=(\w+)", install.log.read_text()) == ["sm_86"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"mode": "cpu"}, "MOPO_BUILD=cpu was set at install time; reinstall with MOPO_BUILD=cuda"),
        ({"mode": "auto", "cuda": None}, f"torch {torch.__version__} was built without CUDA; install a CUDA build"),
        ({"mode": "auto", "nvcc": "missing"}, "no nvcc was found at install time (looked in "),
        ({"mode": "auto", "nvcc": "fails"}, "the build failed at install time (Error compiling objects for extension)"),
        (
            {"mode": "auto", "nvcc": "fails", "editable": True},
            "the build failed at install time (Error compiling objects for extension)",
        ),
        (
            {"mode": "auto", "cuda": "12.8"},
            "the build failed at install time (('The detected CUDA version (%s) mismatches",
        ),
    ],
    ids=["cpu_only", "torch_without_cuda", "no_nvcc", "nvcc_fails", "editable", "other_cuda"],
)
def test_without_the_cuda_extension_the_other_is_built_and_the_reason_is_kept(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    install = Install(tmp_path, **arguments)
    record = install.record()
    assert record["reason"] is None
    assert str(record["cuda_reason"]).startswith(reason)
    assert "MOPO_BUILD=cuda" in str(record["cuda_reason"])
    assert f"mopo_kernels: installing without the CUDA extension: {reason}" in install.done.stderr
    assert install.extensions() == ["_C"], "one from an earlier install is still there"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cuda": None}, f"mopo_kernels: MOPO_BUILD=cuda, but torch {torch.__version__} was built without CUDA"),
        ({"nvcc": "missing"}, "mopo_kernels: MOPO_BUILD=cuda, but no nvcc was found at install time (looked in "),
        ({"CXX": "no-such-c++"}, "mopo_kernels: MOPO_BUILD=cuda, but no C++ compiler was found"),
        ({"nvcc": "fails"}, "Error compiling objects for extension"),
    ],
    ids=["torch_without_cuda", "no_nvcc", "no_compiler", "nvcc_fails"],
)
def test_a_cuda_build_that_was_asked_for_and_fails_stops_the_install(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    done = Install(tmp_path, "cuda", **arguments).done
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].removeprefix("RuntimeError: ").startswith(message)


# The backend: usable, or one line that says why not.


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of an install with both extensions, which load, on a machine with one device."""
    record = tmp_path / "_build.json"
    record.write_text(json.dumps({"torch": "1.0", "reason": None, "cuda_reason": None}))
    monkeypatch.setattr(extension, "_RECORD", record)
    monkeypatch.setitem(sys.modules, "mopo_kernels._cuda", ModuleType("_cuda"))
    monkeypatch.setattr(cpp, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return record


def test_the_backend_is_available_where_its_extension_loads_and_a_device_is_found(recorded: Path) -> None:
    assert cuda.unavailable_reason.__wrapped__() is None


def test_an_unavailable_backend_says_why(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert re.fullmatch("torch was built for CUDA .* but finds no usable device", cuda.unavailable_reason.__wrapped__())
    monkeypatch.setattr(cpp, "unavailable_reason", lambda: "the C++ extension was not built: no compiler")
    reason = "its operators are defined in the C++ extension; the C++ extension was not built: no compiler"
    assert cuda.unavailable_reason.__wrapped__() == reason
    monkeypatch.setitem(sys.modules, "mopo_kernels._cuda", None)
    reason = "the CUDA extension was built with torch 1.0 and does not load with torch"
    assert cuda.unavailable_reason.__wrapped__().startswith(reason)
    recorded.write_text(json.dumps({"torch": "1.0", "reason": None, "cuda_reason": "no nvcc"}))
    assert cuda.unavailable_reason.__wrapped__() == "the CUDA extension was not built: no nvcc"
    recorded.write_text(json.dumps({"torch": "1.0", "reason": None}))
    assert "setup.py has not run here" in str(cuda.unavailable_reason.__wrapped__())
