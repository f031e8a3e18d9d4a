"""The study of studies/language_model: every path on a tiny model, and its statistics."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_samples import CONFIGS, make_model, make_tokenizer

from studies.language_model import explore, jobs, labels, policies, problem, runs, scheduler, statistics, work

# Few prompts and steps, and multipliers that follow a handful of prompts, which no one should want outside a test.
SCALE = jobs.Scale(
    training_prompts=12,
    epoch=2,
    prompts=3,
    validation_samples=2,
    test_samples=2,
    base_samples=3,
    changes={
        "prompts": 12,
        "prompts_per_step": 2,
        "lora_rank": 2,
        "settings": {"dual_effective_prompts": 1, "dual_steps": 1, "dual_warmup_steps": 0, "dual_samples": 2},
    },
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, which says words of letters now and then."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tiny = make_model("llama-tied")
    tiny.config.max_position_embeddings = 512
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first lines of the demo's preference data."""
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    lines = problem.DATA.read_text(encoding="utf-8").splitlines()[:16]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def settings(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> work.Settings:
    return work.Settings(model, data, tmp_path_factory.mktemp("out"), runs.Device.of("cpu"))


def test_the_exploration_runs_on_two_processes_and_is_not_run_again(
    settings: work.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = explore.explore_jobs({"brevity": 0.3, "plain": 0.1}, SCALE)
    chosen = [
        "base.validation",
        "labels.tau-0.15",
        "constrained-1-s0",
        "constrained-3-s0",
        "unconstrained-1-s0",
        "fixed-1-s0",
        "judged-1-s0",
        "loss-sigmoid",
        "estimator-pair",
    ]
    some = [job for job in everything if job.name in chosen or any(name in chosen for name in job.needs)]
    found = scheduler.run_jobs(some, settings.out, work.set_up, settings, workers=2)
    assert {name: record.get("error") for name, record in found.items()} == dict.fromkeys(found)
    assert set(found) == {job.name for job in some}

    scores = found["constrained-3-s0.epoch-1.validation"]["result"]["scores"]
    assert set(scores) == set(problem.JUDGES)
    assert [len(row) for row in scores["warmth"]] == [2, 2, 2]
    trained = found["constrained-3-s0"]["result"]
    assert trained["steps"] == 6
    assert trained["fitted_prompts"] == 10  # a fifth of 12 is held out
    assert any("dual/satisfaction/brevity" in line for line in trained["history"])
    fixed = found["fixed-1-s0"]["result"]
    assert fixed["fitted_prompts"] == 12
    assert fixed["multiplier"] == {"brevity": 0.3, "plain": 0.1}
    table = explore.explore_table(found)
    assert "unconstrained-1-s0.x0.3" in table
    assert "FAILED" not in table

    before = time.monotonic()
    again = scheduler.run_jobs(some, settings.out, work.set_up, settings, workers=2)
    assert time.monotonic() - before < 5, "done jobs were done again"
    assert again == found
    capsys.readouterr()

    written = scheduler.bundle(settings.out, {"commit": "none"}, ["constrained-1-s0"])
    assert [path.name for path in written] == ["results.json.gz", "adapter_constrained-1-s0.tar"]
    assert scheduler.read_bundle(written[0])["jobs"] == found
