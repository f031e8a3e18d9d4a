"""Which tests a run takes: those for a GPU only where there is one, said in a line; the fast ones by file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_files_of_the_fast_tests_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (names,) = re.findall(r"^FAST := (.*)$", makefile, re.MULTILINE)
    assert len(names.split()) > 20
    for name in names.split():
        folder, _, test = name.rpartition("/")
        assert (ROOT / "tests" / folder / f"test_{test}.py").is_file(), name


def pytest_output(*arguments: str) -> str:
    """What pytest prints on a machine without a CUDA device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_without_a_gpu_its_tests_are_left_out_in_one_line() -> None:
    file = "tests/gpu/test_device_parity.py"
    lines = pytest_output("--collect-only", file).splitlines()
    tests = [line for line in lines if line.startswith(f"{file}::")]
    assert tests
    assert not any("[cuda-" in test for test in tests)
    (line,) = [line for line in lines if line.endswith(" tests left out: they need a CUDA device")]
    assert int(line.split()[0]) > 100
    assert not any(line.startswith("SKIPPED") for line in lines)


def test_workers_say_so_too() -> None:
    output = pytest_output("-n", "1", "tests/gpu/test_device_runtime.py", "-k", "negative_control_plain_pytorch")
    assert "1 passed" in output
    assert "3 tests left out: they need a CUDA device" in output
