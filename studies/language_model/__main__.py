"""The study's command.

    python -m studies.language_model explore            # what limits a policy; validation prompts only
    python -m studies.language_model study              # MOPO and its rivals: tuned on validation, judged on test
    python -m studies.language_model study --small      # about three hours on 2 CPU cores
    python -m studies.language_model sample             # the base model's answers to the training prompts, anew
    python -m studies.language_model report             # README, tables and pictures, from the bundle of results

Everything goes on where it was stopped: a result that is there is not made again. `--device cuda` puts several
processes on one GPU, which take turns on it, so that few of them are as quick as many. On a machine that is lent for
minutes give `--deadline SECONDS` and `--bundle FOLDER`: all results are written there in one file while they come.
Nothing is downloaded; beside the package's requirements for training, the judges need vaderSentiment and the report
matplotlib and moocore.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.provenance import origin
from studies.language_model.explore import best_constrained, explore_jobs, explore_multipliers, explore_table
from studies.language_model.jobs import Scale, answer_jobs
from studies.language_model.problem import (
    ANSWERS,
    RESPONSES,
    ROOT,
    SPLITS,
    labelled_pairs,
    read_answers,
    split_digest,
    train_prompts,
    write_answers,
)
from studies.language_model.report import summary, write_report
from studies.language_model.runs import Device
from studies.language_model.scheduler import BUNDLE, Job, bundle, is_done, read_bundle, run_jobs
from studies.language_model.study import SMALL, Study, label_multipliers
from studies.language_model.study import Settings as StudySettings
from studies.language_model.work import Settings, set_up, versions

# Of the time until the deadline, in which candidates are trained and judged on validation; the rest is for test.
_TUNING_SHARE = 0.6
# Seconds of a GPU that a step takes: processes take turns on it, and made 12 steps a second in all on an H100.
_STEP_ON_A_GPU = 0.08
# Options that say where things are.
_PLACES = ("--model", "--answers", "--output", "--commit", "--results", "--explored", "--bundle")
SMALL_SCALE = Scale(validation_samples=2, test_samples=4, base_samples=8, kl_samples=1)


def shown(words: list[str]) -> list[str]:
    """The command as the results name it: without folders, which are this machine's."""
    kept: list[str] = []
    skip = False
    for word in words:
        option, joined, _ = word.partition("=")
        if not skip and option not in _PLACES:
            kept.append(word)
        skip = option in _PLACES and not joined
    return ["python", "-m", "studies.language_model", *kept]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.language_model", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("command", choices=("explore", "study", "sample", "report"))
    parser.add_argument("--model", type=Path, default=ROOT / "runs/demo/model", help="folder of the model")
    parser.add_argument("--answers", type=Path, default=ANSWERS, help="file of the base model's answers")
    parser.add_argument("--output", type=Path, help="folder of the results; default runs/study/COMMAND")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision",
        choices=("tf32", "bf16", "fp32"),
        help="of products; default tf32 on a GPU, bf16 on a CPU that has it",
    )
    parser.add_argument("--workers", type=int, help="processes; default 2 on a CPU, 6 on a GPU")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin no job after so many seconds")
    parser.add_argument(
        "--pace",
        type=float,
        metavar="SECONDS",
        help="that a process takes for a step, until some were timed; default on a GPU 0.08 for each process",
    )
    parser.add_argument(
        "--choose_by", type=float, metavar="SECONDS", help="study: go on to test then; default 0.6 of it"
    )
    parser.add_argument("--small", action="store_true", help="study: fewer candidates and samples, one seed")
    parser.add_argument("--epochs", type=float, help="study: of every run")
    parser.add_argument("--tau", type=float, help="study: KL weight")
    parser.add_argument("--learning_rate", type=float, help="study: peak")
    parser.add_argument("--prompts_per_step", type=int, metavar="N", help="of every run; default 8")
    parser.add_argument("--lora_rank", type=int, help="study: rank of the adapters")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="study: of the final table; choices are made with the first"
    )
    parser.add_argument("--results", type=Path, help="report: bundle of the study; default --output's")
    parser.add_argument("--explored", type=Path, help="report: bundle of the exploration, for its table")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only jobs whose name begins so, and what they need")
    parser.add_argument("--adapters", nargs="+", default=[], metavar="RUN", help="runs whose adapters to bundle")
    parser.add_argument("--commit", default=None, help="where git is missing: what to note as the commit")
    parser.add_argument(
        "--grace", type=float, default=20.0, metavar="SECONDS", help="for jobs under way at the deadline"
    )
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="where results.json.gz goes; default --output")
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


def study_of(options: argparse.Namespace, scale: Scale) -> Study:
    """The study with the options' settings."""
    settings = SMALL if options.small else StudySettings()
    changes = {"epochs": options.epochs, "tau": options.tau, "learning_rate": options.learning_rate}
    changes |= {"lora_rank": options.lora_rank, "seeds": options.seeds}
    settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
    return Study(settings, scale, label_multipliers(labelled_pairs(read_answers(options.answers), RESPONSES), settings))


def main(argv: list[str] | None = None) -> int:
    begun = time.monotonic()
    options = arguments(argv)
    if options.command == "report":
        out = options.output or ROOT / "studies/language_model"
        results = options.results or ROOT / "runs/study/study" / BUNDLE
        write_report(results, out, explored=options.explored)
        return 0
    out = options.output or ROOT / "runs/study" / options.command
    workers = options.workers or (6 if options.device == "cuda" else 2)
    threads = max(1, (os.cpu_count() or 1) // workers)
    settings = Settings(options.model, options.answers, out, Device.of(options.device, options.precision, threads))
    scale = SMALL_SCALE if options.small else Scale()
    if options.prompts_per_step:
        scale = scale.with_batch(options.prompts_per_step)
    about: dict[str, Any] = {
        "command": shown(sys.argv[1:] if argv is None else argv),
        "commit": options.commit or origin()["commit"],
        "device": options.device,
        "precision": settings.device.precision,
        "workers": workers,
        "versions": versions(),
        "splits": {name: split_digest(prompts()) for name, prompts in SPLITS.items()},
    }
    follow_up = None
    if options.command == "explore":
        jobs = explore_jobs(explore_multipliers(read_answers(options.answers), scale), scale)
    elif options.command == "sample":
        jobs = answer_jobs(len(train_prompts()), scale)
    else:
        study = study_of(options, scale)
        jobs, follow_up = study.tuning(), study.testing
        about |= study.about()
    jobs = selected(jobs, options.only)
    if options.list:
        for job in jobs:
            steps = f"  {job.spec['run']['steps']} steps" if job.kind == "train" else ""
            print(f"{'done ' if is_done(out, job) else '     '}{job.kind:9s} {job.name}{steps}")
        left = [job for job in jobs if not is_done(out, job)]
        steps_left = sum(job.spec["run"]["steps"] for job in left if job.kind == "train")
        answers = sum(job.spec["samples"] for job in left if job.kind == "evaluate")
        print(f"{len(left)} jobs left: {steps_left} optimiser steps, {answers} answers to each prompt of a split")
        return 0
    choose_by = options.choose_by
    if follow_up is not None and choose_by is None and options.deadline is not None:
        choose_by = _TUNING_SHARE * options.deadline

    def keep() -> list[Path]:
        about["seconds"] = round(time.monotonic() - begun, 1)
        return bundle(out, about, place=options.bundle)

    # What ends a process is an exception here, so that results are kept and other processes ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    found = run_jobs(
        jobs,
        out,
        set_up,
        settings,
        workers=workers,
        deadline=options.deadline,
        since=begun,
        follow_up=follow_up,
        follow_up_by=choose_by,
        keep=keep,
        grace=options.grace,
        first_pace=options.pace or (workers * _STEP_ON_A_GPU if options.device == "cuda" else None),
    )
    if options.command == "sample":
        if any("result" not in found.get(job.name, {}) for job in jobs):
            return 1
        drawn = {prompt: row for job in jobs for prompt, row in found[job.name]["result"]["answers"].items()}
        write_answers(options.answers, drawn)
        return 0
    about["seconds"] = round(time.monotonic() - begun, 1)
    written = bundle(out, about, options.adapters, options.bundle)
    for path in written:
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB", flush=True)
    if "result" in found.get("base.validation", {}):
        if options.command == "explore":
            print(explore_table(found))
            print(f"best at kept thresholds: {best_constrained(found)}")
        else:
            print(summary(read_bundle(written[0])))
    return 1 if any("error" in record for record in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
