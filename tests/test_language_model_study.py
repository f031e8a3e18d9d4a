"""The study of studies/language_model: every path on a tiny model, and its statistics."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_errands
import torch
from trainer_samples import make_model, make_tokenizer

from mopo_kernels import load_preferences
from mopo_kernels.evaluation import load_policy, win_rate
from studies.language_model import (
    explore,
    jobs,
    labels,
    policies,
    problem,
    report,
    runs,
    scheduler,
    statistics,
    study,
    work,
)

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
    # Of an adapter turned down, one factor is like another.
    judged = {name for run in chosen for name in (f"{run}.validation", f"{run}.epoch-1.validation")}
    judged.add("unconstrained-1-s0.x0.3.validation")
    some = [job for job in everything if job.name in {*chosen, *judged}]
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


TINY = study.Settings(
    epochs=1,
    aims=((0.5, 0.5),),
    weights=((0.3, 0.2),),
    factors=(0.5,),
    stops=(0.5,),
    seeds=(0, 1),
)


def test_the_study_tunes_and_tests_every_method_and_writes_its_report(settings: work.Settings, tmp_path: Path) -> None:
    some = problem.some_prompts(load_preferences(settings.data), 12)
    tiny = study.Study(TINY, SCALE, study.label_multipliers(some, TINY))
    assert {candidate.method for candidate in tiny.candidates} == set(study.METHODS)
    placed = dataclasses.replace(settings, out=tmp_path)
    found = scheduler.run_jobs(tiny.tuning(), tmp_path, work.set_up, placed, workers=2, follow_up=tiny.testing)
    assert {name: record.get("error") for name, record in found.items()} == dict.fromkeys(found)
    chosen = tiny.choices(found)
    assert len(chosen) == len(study.METHODS) * len(study.THRESHOLDS)
    for seed in (0, 1):
        assert all(f"{choice.candidate}.s{seed}.test" in found for choice in chosen)
    # One policy of the reward margins, scored under both; answers of the tested ones under policy and base.
    assert len(found["ratios.dpo-brevity.s0"]["result"]["ratios"]) == 16
    assert len(found["mopo-0.5-0.5.s0.test"]["result"]["kl"]) == SCALE.prompts
    assert found["mixture-0.3-0.2.s0.test"]["result"]["kl"] is None

    about = {"command": ["test"], "commit": "none", "seconds": 1.0, "workers": 2, "precision": "fp32"}
    scheduler.bundle(tmp_path, {**about, **tiny.about(), "versions": work.versions()})
    report.write_report(tmp_path / "results.json.gz", tmp_path / "report")
    text = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    assert all(name in text for name in study.METHODS.values())
    assert "Where MOPO does not win" in text
    for picture in ("differences.png", "policies.png", "vectors.png"):
        assert picture in text
        assert (tmp_path / "report" / picture).stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------- the scheduler


def errands(folder: Path, jobs: list[scheduler.Job], **options: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    folder.mkdir(exist_ok=True)
    found = scheduler.run_jobs(jobs, folder / "out", study_errands.set_up, folder, workers=1, **options)
    return found, (folder / "order").read_text().split()


def test_a_job_waits_for_what_it_needs_and_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    Job = scheduler.Job
    wanted = [Job("late", "do", needs=("early",)), Job("lost", "do", needs=("bad",)), Job("bad", "raise")]
    found, order = errands(tmp_path, [*wanted, Job("early", "do")])
    assert order == ["bad", "early", "late"]
    assert "no such luck" in found["bad"]["error"]
    assert "lost" not in found
    # The failure is tried again, what is done is not; another spec is another job.
    found, order = errands(
        tmp_path, [Job("early", "do", {"changed": 1}), Job("late", "do", needs=("early",)), wanted[2]]
    )
    assert order[3:] == ["early", "bad"]
    assert found["early"]["spec"] == {"changed": 1}


def test_a_job_whose_process_dies_is_done_by_another(tmp_path: Path) -> None:
    found, order = errands(tmp_path, [scheduler.Job("first", "die"), scheduler.Job("second", "do")])
    assert order == ["first", "second", "first"]
    assert found["first"]["result"] == {"name": "first"}


def test_after_the_deadline_nothing_begins_and_what_would_outlast_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_GRACE", 30.0)
    Job = scheduler.Job
    jobs = [Job("a", "do", {"seconds": 1.0}, cost=1.0), Job("long", "do", cost=1000.0), Job("b", "do", cost=1.0)]
    found, order = errands(tmp_path, jobs, deadline=60.0)
    assert order == ["a", "b"]
    assert set(found) == {"a", "b"}
    _, order = errands(tmp_path / "none", [Job("slow", "do", {"seconds": 1.0}), Job("c", "do")], deadline=0.5)
    assert order == ["slow"]


def test_jobs_that_follow_from_results_are_done_too(tmp_path: Path) -> None:
    def follow_up(found: Mapping[str, Any]) -> list[scheduler.Job]:
        return [scheduler.Job(f"after {found['one']['result']['name']}", "do")]

    found, _ = errands(tmp_path, [scheduler.Job("one", "do")], follow_up=follow_up)
    assert set(found) == {"one", "after one"}


# -------------------------------------------------------------------------------------------------------- the policies


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


def test_merged_updates_are_the_scaled_and_summed_adapters_and_leave_no_trace(
    settings: work.Settings, tmp_path: Path
) -> None:
    shared = policies.Policies(settings.model, torch.device("cpu"))
    before = {name: value.clone() for name, value in shared.model.state_dict().items()}
    folders = []
    for seed in (0, 1):
        run = runs.Run(f"r{seed}", steps=2, seed=seed, prompts=4, prompts_per_step=2, lora_rank=2, learning_rate=0.05)
        runs.train(run, shared, load_preferences(settings.data), tmp_path, settings.device)
        folders.append(str(tmp_path / "adapters" / run.name))
    weights = {folders[0]: 0.7, folders[1]: -0.4}
    expected = load_policy(settings.model, weights)
    with expected.active() as active, shared.merged(weights) as merged:
        assert (
            float((logits(merged) - logits(policies.Policies(settings.model, torch.device("cpu")).model)).norm()) > 0.01
        )
        torch.testing.assert_close(logits(merged), logits(active), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in shared.model.state_dict().items())


def test_a_run_goes_on_from_another_and_refers_to_it(settings: work.Settings, tmp_path: Path) -> None:
    shared, data = policies.Policies(settings.model, torch.device("cpu")), load_preferences(settings.data)
    common: dict[str, Any] = {"prompts": 4, "prompts_per_step": 2, "lora_rank": 2, "learning_rate": 0.05, "steps": 2}
    runs.train(runs.Run("first", **common), shared, data, tmp_path, settings.device)
    # Laid out and computed as on a GPU, but for the device.
    device = runs.Device("cpu", "bf16", shared_prompts="never", forward=3)
    second = runs.train(runs.Run("second", start={"first": 1.0}, **common), shared, data, tmp_path, device)
    assert second["steps"] == 2
    # A reference of its own: the log-probabilities of the policy that it started from.
    assert len(list((tmp_path / "reference").glob("*.logprob"))) == 2


# ------------------------------------------------------------------------------------------------------ the statistics


def test_win_rates_by_prompt_are_the_librarys() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 4, (20, 3)).tolist(), rng.integers(0, 4, (20, 5)).tolist()
    by_prompt = statistics.win_rate_by_prompt(ours, theirs)
    assert by_prompt.mean() == pytest.approx(win_rate(ours, theirs).mean)
    assert statistics.win_rate_by_prompt([[1.0, 2.0]], [[1.0]]).tolist() == [0.75]


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        found = statistics.estimate(rng.random(60), seed=seed)
        covered += found.low <= 0.5 <= found.high
        assert found.error == pytest.approx(0.289 / np.sqrt(60), rel=0.3)
    assert 0.90 < covered / 300 < 0.985


def test_a_threshold_is_kept_with_its_margin_or_not() -> None:
    value = {"plain": np.array([0.4, 0.6, 0.5, 0.7])}  # mean 0.55, standard error 0.0645
    assert statistics.keeps(value, {"plain": 0.55})
    assert statistics.keeps(value, {"plain": 0.45}, margin=1.5)
    assert not statistics.keeps(value, {"plain": 0.46}, margin=1.5)


def test_the_labels_optimum_keeps_thresholds_and_beats_the_unconstrained_one_turned_down() -> None:
    data = load_preferences(problem.DATA)
    thresholds = jobs.parity(0.47)
    found = labels.label_solutions(data, problem.PRIMARY, thresholds, 0.15, data.objectives)
    value, rival = found["constrained"]["satisfaction"], found["turned_down"]["satisfaction"]
    for name, bound in thresholds.items():
        assert value[name] >= bound - 1e-6
        assert rival[name] >= bound
    assert value["warmth"] > rival["warmth"] + 0.02
    assert found["unconstrained"]["satisfaction"]["brevity"] < 0.47
    assert min(value[name] - bound for name, bound in thresholds.items()) == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < found["turned_down"]["factor"] < 1.0
