"""`mopo doctor`: what is available on this machine, and why the rest is not."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
from importlib import metadata
from typing import Annotated, Any

import torch
import typer
from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

import mopo_kernels
from mopo_kernels.cli.output import show

# Optional packages and the extra that brings each.
OPTIONAL_PACKAGES = {
    "transformers": "train",
    "peft": "train",
    "accelerate": "train",
    "datasets": "train",
    "safetensors": "train",
    "matplotlib": "plot",
    "moocore": "pareto",
    "torchao": "lean",
    "bitsandbytes": "qlora",
}

# Releases that are in our ranges but not fit for each other, and what fails.
INCOMPATIBLE = (
    ("transformers>=5.24", "peft<0.22", "this transformers loads and adds adapters with peft 0.22 or newer only"),
)


def incompatible() -> list[str]:
    """One line for each pair of installed packages that is known not to work together."""
    lines = []
    for first, second, what in INCOMPATIBLE:
        found = []
        for requirement in map(Requirement, (first, second)):
            version = installed_version(requirement.name)
            if version is not None and requirement.specifier.contains(version, prereleases=True):
                found.append(f"{requirement.name} {version}")
        if len(found) == 2:
            lines.append(f"{' with '.join(found)}: {what}")
    return lines


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def install_hint(package: str) -> str:
    """What to tell a user who lacks one of OPTIONAL_PACKAGES."""
    return f"not installed: pip install 'mopo-kernels[{OPTIONAL_PACKAGES[package]}]'"


def _tool(names: list[str], purpose: str) -> dict[str, str | None]:
    """The first of `names` on the PATH with the last version-like line it prints, or why there is none."""
    for name in names:
        place = shutil.which(name)
        if place is None:
            continue
        try:
            output = subprocess.run([place, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            return {"path": place, "version": None, "reason": f"{place} does not run: {error}"}
        lines = [line.strip() for line in output.splitlines() if any(char.isdigit() for char in line)]
        release = next((line for line in lines if "release" in line), lines[0] if lines else "unknown version")
        return {"path": place, "version": release, "reason": None}
    return {"path": None, "version": None, "reason": f"{' or '.join(names)} not found on PATH: {purpose}"}


def _compilers() -> list[str]:
    chosen = os.environ.get("CXX")
    return shlex.split(chosen)[:1] if chosen else ["c++", "g++", "clang++"]


def _cuda() -> dict[str, Any]:
    if torch.cuda.is_available():
        devices = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                }
            )
        return {"devices": devices, "reason": None}
    if torch.version.cuda is None:
        return {"devices": [], "reason": "this torch was built without CUDA"}
    return {"devices": [], "reason": f"torch was built for CUDA {torch.version.cuda} but finds no usable device"}


def _bf16_products(cpp_reason: str | None) -> dict[str, str | None]:
    """Whether backend "cpp" multiplies bf16 in bf16, which is several times faster than in fp32."""
    if cpp_reason is not None:
        return {"reason": "only backend cpp has them, and it is not available"}
    from mopo_kernels.backends.cpp import has_native_products

    if not has_native_products(torch.bfloat16):
        return {"reason": "no avx512_bf16 here, or torch was told not to use AVX512: bf16 is multiplied in fp32"}
    return {"reason": None}


def collect() -> dict[str, Any]:
    """Everything `mopo doctor` reports, as plain values for JSON; a null reason means available."""
    from mopo_kernels.backends import availability

    backends = availability()
    return {
        "mopo_kernels": mopo_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "bf16_products": _bf16_products(backends["cpp"]),
        },
        "torch": torch.__version__,
        "cuda": _cuda(),
        "backends": backends,
        "packages": {
            name: {
                "version": installed_version(name),
                "reason": None if installed_version(name) else install_hint(name),
            }
            for name in OPTIONAL_PACKAGES
        }
        | {
            "triton": {
                "version": installed_version("triton"),
                "reason": None if installed_version("triton") else "not installed: comes with the CUDA builds of torch",
            }
        },
        "incompatible": incompatible(),
        "tools": {
            "compiler": _tool(_compilers(), "the C++ backend can't be built"),
            "ninja": _tool(["ninja"], "extensions build without it, more slowly"),
            "nvcc": _tool(["nvcc"], "the CUDA backend can't be built"),
        },
    }


def _state(reason: str | None, found: str = "available") -> str:
    # Escaped: rich would take the [train] of a pip command for markup.
    return f"[green]{escape(found)}[/]" if reason is None else f"[yellow]no[/]: {escape(reason)}"


def _print(report: dict[str, Any]) -> None:
    cpu = report["cpu"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("mopo-kernels", report["mopo_kernels"])
    table.add_row("python", report["python"])
    table.add_row("platform", report["platform"])
    table.add_row("cpu", f"{cpu['capability']}, {cpu['cores']} cores, torch uses {cpu['torch_threads']} threads")
    table.add_row("torch", report["torch"])
    devices = [f"{d['name']} (sm {d['capability']}, {d['memory_gib']} GiB)" for d in report["cuda"]["devices"]]
    table.add_row("cuda", _state(report["cuda"]["reason"], "; ".join(devices)))
    table.add_section()
    for name, reason in report["backends"].items():
        table.add_row(f"backend {name}", _state(reason))
    table.add_row("bf16 products", _state(cpu["bf16_products"]["reason"], "in use by backend cpp (avx512_bf16)"))
    for name, entry in report["packages"].items():
        table.add_row(name, _state(entry["reason"], str(entry["version"])))
    for line in report["incompatible"]:
        table.add_row("incompatible", f"[red]{escape(line)}[/]")
    for name, entry in report["tools"].items():
        table.add_row(name, _state(entry["reason"], f"{entry['version']} ({entry['path']})"))
    show(table)


def diagnose(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Show what is available on this machine, and why the rest is not."""
    report = collect()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
