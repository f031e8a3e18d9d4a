"""What a bare installation can do: torch alone, no transformers, no triton, no compiler, no GPU."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "triton", "peft", "accelerate", "datasets", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import mopo_kernels
from mopo_kernels import DualAscent, LinearMOPOLoss, linear_logprob, tabular

h, w = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8)
linear_logprob(h, w, torch.arange(4)).sum().backward()
assert h.grad is not None
for name in ("MOPOTrainer", "load_preferences"):
    try:
        getattr(mopo_kernels, name)(["x"])
    except ImportError as error:
        print(name, error)
try:
    mopo_kernels.nothing
except AttributeError as error:
    print(error)
"""


def test_the_losses_work_without_the_extras_and_the_rest_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    trainer, loader, attribute = done.stdout.splitlines()
    for line in (trainer, loader):
        assert "mopo-kernels[train]" in line
    assert attribute == "module 'mopo_kernels' has no attribute 'nothing'"


def test_importing_the_package_leaves_heavy_packages_alone() -> None:
    heavy = ("transformers", "datasets", "scipy", "rich")
    program = f"import mopo_kernels, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
