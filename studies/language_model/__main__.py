"""``python -m studies.language_model {explore,study,report}``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from studies.language_model.explore import best_constrained, explore_jobs, explore_table, label_multipliers
from studies.language_model.jobs import Scale
from studies.language_model.problem import DATA, ROOT
from studies.language_model.runs import Device
from studies.language_model.scheduler import Job, bundle, is_done, records, run_jobs
from studies.language_model.work import Settings, set_up, versions


def commit() -> str | None:
    """The checkout's commit, with "+" if it has changes; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.language_model", description=__doc__)
    parser.add_argument("command", choices=("explore",))
    parser.add_argument("--model", type=Path, default=ROOT / "runs/demo/model", help="folder of the model")
    parser.add_argument("--data", type=Path, default=DATA, help="preference file of the training prompts")
    parser.add_argument("--output", type=Path, help="folder of the results; default runs/study/COMMAND")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("tf32", "bf16", "fp32"), help="of a GPU's products; default tf32")
    parser.add_argument("--workers", type=int, help="processes; default 2 on a CPU, 8 on a GPU")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin no job after so many seconds")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only jobs whose name begins so, and what they need")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="RUN", help="runs whose adapters to bundle")
    parser.add_argument("--commit", default=None, help="where git is missing: what to note as the commit")
    parser.add_argument("--list", action="store_true", help="show the jobs, do none")
    return parser.parse_args(argv)


def selected(jobs: list[Job], beginnings: list[str] | None) -> list[Job]:
    """The jobs whose names begin with one of these, with all that they need, in their order."""
    if beginnings is None:
        return jobs
    by_name = {job.name: job for job in jobs}
    wanted: set[str] = set()

    def take(name: str) -> None:
        if name not in wanted:
            wanted.add(name)
            for other in by_name[name].needs:
                take(other)

    for job in jobs:
        if job.name.startswith(tuple(beginnings)) or job.name.startswith("base."):
            take(job.name)
    return [job for job in jobs if job.name in wanted]


def main(argv: list[str] | None = None) -> int:
    begun = time.monotonic()
    options = arguments(argv)
    out: Path = options.output or ROOT / "runs/study" / options.command
    workers = options.workers or (8 if options.device == "cuda" else 2)
    threads = max(1, (os.cpu_count() or 1) // workers)
    settings = Settings(options.model, options.data, out, Device.of(options.device, options.precision, threads))
    scale = Scale()
    jobs = selected(explore_jobs(label_multipliers(options.data, scale), scale), options.only)
    if options.list:
        for job in jobs:
            steps = f"  {job.spec['run']['steps']} steps" if job.kind == "train" else ""
            print(f"{'done ' if is_done(out, job) else '     '}{job.kind:9s} {job.name}{steps}")
        return 0
    about: dict[str, Any] = {
        "command": ["python", "-m", "studies.language_model", *(sys.argv[1:] if argv is None else argv)],
        "commit": options.commit or commit(),
        "device": options.device,
        "precision": settings.device.precision,
        "workers": workers,
        "versions": versions(),
    }
    try:
        run_jobs(jobs, out, set_up, settings, workers=workers, deadline=options.deadline, since=begun)
    finally:
        about["seconds"] = round(time.monotonic() - begun, 1)
        for path in bundle(out, about, options.adapters):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB", flush=True)
    found = records(out, [job.name for job in jobs])
    if "result" in found.get("base.validation", {}):
        print(explore_table(found))
        print(f"best at kept thresholds: {best_constrained(found)}")
    return 1 if any("error" in record for record in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
