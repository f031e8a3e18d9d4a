"""Peers for a machine without a package index: what ``make wheels-for-device`` collected, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.device.subprocesses import ROOT

FOLDER = ROOT / ".wheels"


def install(target: Path, folder: Path = FOLDER) -> dict[str, Any]:
    """Install the wheels of ``folder`` into ``target``, for this process, ahead of what the machine has, and for its
    children. What they need beyond themselves, the machine has or they do not import.

    Returns:
        ``installed``: the wheels' names; or ``reason``, why there are none: then peers are those of the machine.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        return {"reason": f"there is no wheel in {folder.name}: make wheels-for-device collects them"}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--target", str(target), *map(str, wheels)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return {"reason": "pip did not install the wheels within 60 s"}
    if done.returncode != 0:
        return {"reason": f"pip did not install the wheels: {' '.join(done.stderr.split())[-300:]}"}
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"installed": [wheel.name for wheel in wheels]}
