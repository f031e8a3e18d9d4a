"""Jobs for the tests of the study's scheduler, in a module that a new process imports in no time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies.language_model.scheduler import Job, Perform


def set_up(folder: Path) -> Perform:
    """Jobs that write down that they ran."""

    def perform(job: Job) -> Mapping[str, Any]:
        with (folder / "order").open("a") as stream:
            stream.write(job.name + "\n")
        if job.kind == "raise":
            raise ValueError("no such luck")
        if job.kind == "die" and not (folder / f"{job.name} died").exists():
            (folder / f"{job.name} died").touch()
            os._exit(3)
        time.sleep(job.spec.get("seconds", 0))
        return {"name": job.name}

    return perform
