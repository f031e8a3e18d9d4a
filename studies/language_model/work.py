"""What a process of the study does with a job."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopo_kernels.data import PreferenceData
from studies.language_model.runs import Device, Run, checked_backend, draw, evaluate, log_ratios, rounded, train
from studies.language_model.scheduler import Job, Perform, read_result


@dataclass(frozen=True)
class Settings:
    """Where everything is: model folder, file of the base model's answers, output folder, and how to compute."""

    model: Path
    answers: Path
    out: Path
    device: Device


def run_of(spec: Mapping[str, Any]) -> Run:
    """The run that a train job's spec describes."""
    return Run(**spec["run"])


def set_up(settings: Settings) -> Perform:
    """Load model and data, once in a process."""
    import gc

    import torch
    import transformers

    from studies.language_model.labels import label_solutions
    from studies.language_model.policies import Policies
    from studies.language_model.problem import (
        OBJECTIVES,
        RESPONSES,
        SPLITS,
        labelled_pairs,
        read_answers,
        some_prompts,
        train_prompts,
    )

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # What a run has to say stands in its log history: hundreds of runs would say it again.
    logging.getLogger("mopo_kernels").setLevel(logging.ERROR)
    settings.device.prepare()
    policies = Policies(settings.model, settings.device.torch)
    device = checked_backend(policies.model, settings.device)
    # Not there yet where they are to be drawn.
    answers = read_answers(settings.answers) if settings.answers.is_file() else {}

    def pairs() -> PreferenceData:
        return labelled_pairs(answers, RESPONSES)

    def perform(job: Job) -> Mapping[str, Any]:
        spec = job.spec
        try:
            if job.kind == "train":
                if settings.device.kind == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                run = run_of(spec)
                ratios = {name: _ratios(settings.out, name) for name in run.margins}
                return train(run, policies, answers, settings.out, device, ratios)
            if job.kind == "answers":
                prompts = train_prompts()[spec["first"] : spec["first"] + spec["prompts"]]
                drawn = draw(
                    policies.model,
                    policies.tokenizer,
                    prompts,
                    spec["samples"],
                    spec["seed"],
                    2 * device.rows,
                    spec["tokens"],
                )
                return {"answers": dict(zip(prompts, drawn, strict=True))}
            if job.kind == "ratios":
                folder = str(settings.out / "adapters" / spec["run"])
                return {"ratios": rounded(log_ratios(policies, {folder: 1.0}, pairs(), device), 6)}
            if job.kind == "evaluate":
                weights = {str(settings.out / "adapters" / name): factor for name, factor in spec["weights"].items()}
                prompts = SPLITS[spec["split"]]()
                prompts = prompts[: spec["prompts"] or len(prompts)]
                return evaluate(
                    policies,
                    weights,
                    prompts,
                    spec["samples"],
                    device,
                    spec["seed"],
                    mixture=spec.get("mixture", False),
                    kl_samples=spec.get("kl_samples", 0),
                    tokens=spec["tokens"],
                )
            if job.kind == "labels":
                part = some_prompts(pairs(), spec["prompts"])
                found = label_solutions(part, spec["primary"], spec["thresholds"], spec["tau"], OBJECTIVES)
                return dict(rounded(found))
            raise ValueError(f"job {job.name}: expected a known kind; got {job.kind!r}")
        finally:
            gc.collect()
            if settings.device.kind == "cuda":
                torch.cuda.empty_cache()

    return perform


def _ratios(out: Path, run: str) -> list[list[float]]:
    """Of every response of the data under ``run``, from the result of its job."""
    record = read_result(out, f"ratios.{run}")
    if record is None or "result" not in record:
        raise ValueError(f"margins: expected runs whose ratios are there; got {run}")
    found: list[list[float]] = record["result"]["ratios"]
    return found


def versions() -> dict[str, Any]:
    """Of what computes, for the results."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return found


def spec_of(run: Run) -> dict[str, Any]:
    """A run as the spec of its job, as JSON gives it back."""
    import dataclasses

    return {"run": json.loads(json.dumps(dataclasses.asdict(run)))}
