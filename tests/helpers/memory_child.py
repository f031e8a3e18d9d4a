"""`mopo train` runs in a process of their own: what the plan says a run takes, and what it took, in bytes.

python memory_child.py '[[argument, ...], ...]'   # Linux: reads and resets VmHWM
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from mopo_kernels.cli.train import train

WARM_UP = """--random_weights true --architecture llama --use_cpu true --report_to none --save_strategy no --max_steps 1
    --disable_tqdm true --random_data examples=2,responses=2,prompt_length=4,response_length=4 --thresholds second=0.1
    --per_device_train_batch_size 2 --output_dir"""
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}


def memory(name: str) -> int:
    """A line of /proc/self/status, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def plan(arguments: list[str]) -> int:
    """The total of the plan's memory."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        train([*arguments, "--dry_run", "true"])
    total = re.search(r"^  total +([\d,]+)$", output.getvalue(), re.MULTILINE)
    assert total is not None, output.getvalue()
    return int(total[1].replace(",", "")) * 2**20


def run(arguments: list[str]) -> dict[str, int]:
    estimated = plan(arguments)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with contextlib.redirect_stdout(io.StringIO()):
        train(arguments)
    return {"estimated": estimated, "before": before, "peak": memory("VmHWM")}


def measured(cases: list[list[str]]) -> list[dict[str, int]]:
    """What the plans of `mopo train` say and what the runs take, all in one process."""
    result = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)],
        # What is freed goes back to the system at once: the estimate is of tensors, not of a heap with holes.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: list[dict[str, int]] = json.loads(result.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = json.loads(sys.argv[1])
    folder = cases[0][cases[0].index("--output_dir") + 1]
    # What libraries allocate and load when they are first used is not the run's.
    for lora in ([], ["--lora_r", "2"]):
        run([*WARM_UP.split(), f"{folder}/warm-up", "--architecture_options", json.dumps(TINY), *lora])
    print(json.dumps([run(case) for case in cases]))
