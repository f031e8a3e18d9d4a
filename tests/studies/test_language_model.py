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

from mopo_kernels.evaluation import load_policy, win_rate
from studies.language_model import __main__ as command
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
    tokens=6,
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
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To the first of the training prompts, six each."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    every = problem.read_answers(problem.ANSWERS)
    problem.write_answers(path, {prompt: every[prompt][:6] for prompt in list(every)[:16]})
    return path


@pytest.fixture(scope="module")
def settings(model: Path, answers: Path, tmp_path_factory: pytest.TempPathFactory) -> work.Settings:
    return work.Settings(model, answers, tmp_path_factory.mktemp("out"), runs.Device.of("cpu"))


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
    looks = {line["step"]: line["eval_r_squared"] for line in trained["history"] if "eval_r_squared" in line}
    assert list(looks) == [0, 1, 2, 3, 4, 5, 6]
    assert looks[0] == pytest.approx(0, abs=1e-6)
    assert looks[6] == explore.explained(trained) != 0
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

    origin = {"command": ["explore"], "commit": "none", "versions": {"gpu": None}}
    written = scheduler.bundle(settings.out, origin, ["constrained-1-s0"])
    assert [path.name for path in written] == ["results.json.gz", "adapter_constrained-1-s0.tar"]
    assert scheduler.read_bundle(written[0])["jobs"] == found
    text = "\n".join(report.explored_lines({"jobs": found, **origin}, settings.out))
    assert "| constrained | 1 | 1 |" in text
    assert "at commit none on a CPU" in text
    assert "| loss-sigmoid |" in text
    # A run whose answers nobody has judged is there with what the pairs of other prompts say.
    unanswered = {name: record for name, record in found.items() if name != "constrained-3-s0.validation"}
    (row,) = (line for line in report.control_table(unanswered) if line.startswith("| constrained | 3 |"))
    rates = [trained["history"][-2][f"eval_satisfaction/{name}"] for name in problem.OBJECTIVES]
    assert row.startswith("| constrained | 3 | 0 answered, 1 trained | - |")
    assert row.endswith(f"| {', '.join(f'{rate:.3f}' for rate in rates)} |")
    assert (settings.out / "control.png").is_file()
    alone = settings.out / "report"
    report.write_report(settings.out / "none.json.gz", alone, explored=written[0])
    assert "| constrained | 1 | 1 |" in (alone / report.README).read_text()


TINY = study.Settings(
    epochs=1,
    aims=((0.5, 0.5),),
    weights=((0.3, 0.2),),
    betas=(1.0,),
    factors=(0.5,),
    stops=(0.5,),
    seeds=(0, 1),
)


def test_the_study_tunes_and_tests_every_method_and_writes_its_report(settings: work.Settings, tmp_path: Path) -> None:
    some = problem.some_prompts(problem.labelled_pairs(problem.read_answers(settings.answers), 4), 12)
    tiny = study.Study(TINY, SCALE, study.label_multipliers(some, TINY))
    assert {candidate.method for candidate in tiny.candidates} == set(study.METHODS)
    placed = dataclasses.replace(settings, out=tmp_path)

    def testing(results: Mapping[str, Any]) -> list[scheduler.Job]:
        """A second seed for MOPO alone, to save time."""
        return [job for job in tiny.testing(results) if ".s1" not in job.name or job.name.startswith("mopo")]

    found = scheduler.run_jobs(tiny.tuning(), tmp_path, work.set_up, placed, workers=2, follow_up=testing)
    assert {name: record.get("error") for name, record in found.items()} == dict.fromkeys(found)
    chosen = tiny.choices(found)
    assert len(chosen) == len(study.METHODS) * len(study.THRESHOLDS)
    assert all(f"{choice.candidate}.s0.test" in found for choice in chosen)
    assert "mopo-0.5-0.5.s1.test" in found
    # One policy of the reward margins, scored under both; answers of the tested ones under policy and base.
    assert len(found["ratios.dpo-brevity-b1.s0"]["result"]["ratios"]) == 16
    assert len(found["mopo-0.5-0.5.s0.test"]["result"]["kl"]) == SCALE.prompts
    assert found["mixture-0.3-0.2.s0.test"]["result"]["kl"] is None

    about = {"command": ["test"], "commit": "none", "seconds": 1.0, "workers": 2, "precision": "fp32"}
    scheduler.bundle(tmp_path, {**about, **tiny.about(), "versions": work.versions()})
    report.write_report(tmp_path / "results.json.gz", tmp_path / "report")
    policies_on_test = report.tested(scheduler.read_bundle(tmp_path / "results.json.gz"))
    assert {policy.choice.method: policy.seeds for policy in policies_on_test} == {
        method: 2 if method == "mopo" else 1 for method in study.METHODS
    }
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


def test_after_the_deadline_nothing_begins_and_what_would_outlast_it_does_not(tmp_path: Path) -> None:
    Job = scheduler.Job
    jobs = [Job("a", "do", {"seconds": 1.0}, cost=1.0), Job("long", "do", cost=1000.0), Job("b", "do", cost=1.0)]
    found, order = errands(tmp_path, jobs, deadline=60.0)
    assert order == ["a", "b"]
    assert set(found) == {"a", "b"}
    kept: list[list[str]] = []
    out = tmp_path / "none" / "out"
    _, order = errands(
        tmp_path / "none",
        [Job("slow", "do", {"seconds": 1.0}), Job("c", "do")],
        deadline=0.5,
        grace=30.0,
        keep=lambda: kept.append(sorted(path.name for path in out.glob("jobs/*.json"))),
    )
    assert order == ["slow"]
    # At once, as nobody knows how long there is, and again when what was under way has ended.
    assert kept == [[], ["slow.json"]]


def test_jobs_that_follow_from_results_are_done_too(tmp_path: Path) -> None:
    def follow_up(found: Mapping[str, Any]) -> list[scheduler.Job]:
        return [scheduler.Job(f"after {found['one']['result']['name']}", "do")]

    found, _ = errands(tmp_path, [scheduler.Job("one", "do")], follow_up=follow_up)
    assert set(found) == {"one", "after one"}


def test_jobs_left_at_the_time_of_the_follow_up_are_given_up_for_it(tmp_path: Path) -> None:
    Job = scheduler.Job
    tuning = [Job("quick", "do"), Job("slow", "do", {"seconds": 3.0}), Job("needed", "do"), Job("lost", "do")]
    # What was given up may be needed after all.
    tested = [Job("needed", "do"), Job("tested", "do", needs=("needed",))]
    _, order = errands(
        tmp_path, tuning, follow_up=lambda found: tested if "slow" in found else [], follow_up_by=2.5, deadline=60.0
    )
    assert order == ["quick", "slow", "needed", "tested"]


# -------------------------------------------------------------------------------------------------------- the policies


def test_answers_to_the_training_prompts_are_drawn_in_blocks_and_the_same_again(
    settings: work.Settings, tmp_path: Path
) -> None:
    placed = dataclasses.replace(settings, answers=tmp_path / "none yet", out=tmp_path)
    _, second = jobs.answer_jobs(103, SCALE)
    assert [second.spec[name] for name in ("first", "prompts")] == [100, 3]
    found = scheduler.run_jobs([second], tmp_path, work.set_up, placed, workers=1)
    drawn = found[second.name]["result"]["answers"]
    prompts = problem.train_prompts()[100:103]
    base = policies.Policies(settings.model, torch.device("cpu"))
    rows = SCALE.training_samples
    again = runs.draw(base.model, base.tokenizer, prompts, rows, second.spec["seed"], 3 * rows, SCALE.tokens)
    assert drawn == dict(zip(prompts, again, strict=True))
    assert [len(row) for row in again] == [rows] * 3
    problem.write_answers(placed.answers, drawn)
    assert problem.read_answers(placed.answers) == drawn
    blank = {"a prompt": [" ", "one", "two words"], "another": ["x", "", "y", "z"]}
    assert [example.responses for example in problem.labelled_pairs(blank, 2)] == [("one", "two words"), ("x", "y")]


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
        runs.train(run, shared, problem.read_answers(settings.answers), tmp_path, settings.device)
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
    shared, data = policies.Policies(settings.model, torch.device("cpu")), problem.read_answers(settings.answers)
    common: dict[str, Any] = {"prompts": 4, "prompts_per_step": 2, "lora_rank": 2, "learning_rate": 0.05, "steps": 2}
    runs.train(runs.Run("first", **common), shared, data, tmp_path, settings.device)
    # Laid out and computed as on a GPU, but for the device.
    device = runs.Device("cpu", "bf16", shared_prompts="never", forward=3)
    second = runs.train(runs.Run("second", start={"first": 1.0}, **common), shared, data, tmp_path, device)
    assert second["steps"] == 2
    # A reference of its own: the log-probabilities of the policy that it started from.
    assert len(list((tmp_path / "reference").glob("*.logprob"))) == 2


def make_pair(settings: work.Settings) -> list[Any]:
    """Two models of the same tokenizer that differ, and do not only say the last word again."""
    torch.manual_seed(0)
    pair = [policies.Policies(settings.model, torch.device("cpu")).model for _ in range(2)]
    for model in pair:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
            model.get_output_embeddings().weight.mul_(0.1)
    return pair


def test_a_mixture_of_logits_samples_from_the_weighted_sum_of_log_probabilities(settings: work.Settings) -> None:
    models, weights = make_pair(settings), [0.3, 0.7]
    mixture = policies.Mixture(models, weights)
    prompts = [[5, 9, 20, 33], [7, 8]]
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": [1]}
    seen: list[torch.Tensor] = []

    def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """What draws the token may be a processor, which must come after the mixture."""
        seen.append(scores)
        return scores

    options["logits_processor"] = [processor]
    found = mixture.generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
    assert seen[0].argmax(-1).tolist() == found[:, 0].tolist()
    alone = models[0].generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
    assert not torch.equal(found, alone)
    for prompt, tokens in zip(prompts, found.tolist(), strict=True):
        so_far = list(prompt)
        for token in tokens:
            with torch.no_grad():
                logprob = [model(input_ids=torch.tensor([so_far])).logits[0, -1].log_softmax(-1) for model in models]
            assert token == int(sum(w * value for w, value in zip(weights, logprob, strict=True)).argmax())
            so_far.append(token)
            if token == 1:
                break


def test_log_probabilities_of_responses_are_those_of_plain_logits(settings: work.Settings) -> None:
    model = make_pair(settings)[1]
    sequences = [([5, 9, 20], [33, 4, 1]), ([7], [8, 1]), ([3, 4, 5, 6], [10, 11, 12, 13, 14])]
    found = policies.response_logprobs(model, sequences, rows=2)
    for (prompt, response), value in zip(sequences, found, strict=True):
        with torch.no_grad():
            logprob = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        expected = sum(float(logprob[place, token]) for place, token in zip(places, response, strict=True))
        assert value == pytest.approx(expected, rel=1e-4)


def test_a_wrong_backend_is_seen(settings: work.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    head = policies.Policies(settings.model, torch.device("cpu")).model.get_output_embeddings().weight
    device = runs.Device("cpu", backend="torch")
    assert runs.backend_error(head, device) < 1e-4
    assert runs.backend_error(head, dataclasses.replace(device, precision="bf16")) < runs._BACKEND_ERROR
    right = runs.linear_mopo_loss

    def wrong(hidden: torch.Tensor, *rest: Any, backend: str, **options: Any) -> Any:
        return right(hidden * (1.1 if backend == "torch" else 1.0), *rest, backend=backend, **options)

    monkeypatch.setattr(runs, "linear_mopo_loss", wrong)
    assert runs.backend_error(head, device) > runs._BACKEND_ERROR


def test_margins_are_differences_of_rewards_first_response_minus_second(settings: work.Settings) -> None:
    data = problem.some_prompts(problem.labelled_pairs(problem.read_answers(settings.answers), 4), 3)
    ratios = [[float(10 * x + y) ** 0.5 for y in range(4)] for x in range(3)]
    found = runs.with_margins(data, [(ratios, 0.2), (ratios, 0.1)])
    for x, example in enumerate(found):
        for pair in example.pairs:
            assert pair.margin == pytest.approx(0.3 * (ratios[x][pair.i] - ratios[x][pair.j]))


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
    data = problem.labelled_pairs(problem.read_answers(problem.ANSWERS), 4)
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


def test_the_choice_is_the_best_primary_that_keeps_the_thresholds_or_the_nearest_to_them() -> None:
    rng = np.random.default_rng(2)

    def policy(warmth: float, brevity: float, plain: float) -> dict[str, Any]:
        noise = rng.standard_normal(400) * 0.1
        return {
            name: value + noise - noise.mean()
            for name, value in (("warmth", warmth), ("brevity", brevity), ("plain", plain))
        }

    offered = {
        "warm": policy(0.65, 0.44, 0.50),
        "good": policy(0.60, 0.52, 0.51),
        "timid": policy(0.55, 0.55, 0.55),
        "brink": policy(0.62, 0.501, 0.51),
    }
    thresholds = {"brevity": 0.5, "plain": 0.5}
    assert study.choose(offered, thresholds, margin=0.5) == ("good", True)  # the brink is within half an error of it
    assert study.choose(offered, thresholds, margin=0.0) == ("brink", True)
    assert study.choose(offered, {"brevity": 0.6, "plain": 0.5}) == ("timid", False)


def test_rivals_have_as_many_candidates_and_modpo_its_papers_loss() -> None:
    settings = study.Settings()
    made = study.Study(settings, jobs.Scale(), dict.fromkeys(settings.aims, (0.3, 0.1)))
    counts = {method: sum(c.method == method for c in made.candidates) for method in study.METHODS}
    assert {counts[method] for method in study.METHODS if not method.startswith("single")} == {8}
    (candidate,) = [c for c in made.candidates if c.name == "modpo-0.3-0.1-b3"]
    run = made.runs(candidate, 2)[-1]
    # beta / w_1, and w_k / w_1 of the rewards beta r_k: arXiv 2310.03708.
    total = 1 + 0.3 + 0.1
    assert run.tau == pytest.approx(3 * settings.tau / (1 / total))
    assert run.margins == pytest.approx(
        {"dpo-brevity-b3.s2": 3 * settings.tau * 0.3, "dpo-plain-b3.s2": 3 * settings.tau * 0.1}
    )
    assert not run.multipliers
    (stepwise,) = [c for c in made.candidates if c.name == "sacpo-0.4-0.1-b1"]
    assert [list(run.start) for run in made.runs(stepwise, 0)] == [
        [],
        ["dpo-warmth-b1.s0"],
        ["dpo-warmth-b1.s0", "sacpo-0.4-b1.s0"],
    ]
    assert sum(job.kind == "train" for job in made.tuning()) < 80


@pytest.mark.parametrize("words", [["explore"], ["study", "--small", "--prompts_per_step", "16", "--tau", "0.3"]])
def test_the_command_lists_its_jobs(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--list", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["evaluate", "base.validation"] for line in lines)
    trained = [int(line.split()[-2]) for line in lines if line.split()[0] == "train"]
    assert f"{sum(trained)} optimiser steps" in lines[-1]
    assert (set(trained) == {35}) == (words[0] == "study")


def test_the_command_is_noted_without_folders() -> None:
    words = [
        "study",
        "--model",
        "/somewhere",
        "--tau",
        "0.1",
        "--answers=/else/where.jsonl",
        "--small",
        "--output",
        "x",
    ]
    assert command.shown(words)[3:] == ["study", "--tau", "0.1", "--small"]


def policy_on_test(method: str, bound: float, warmth: np.ndarray, brevity: float) -> report.Tested:
    choice = study.Choice(method, {"brevity": bound, "plain": bound}, f"{method}-{bound}", True, 3)
    value = {"warmth": warmth, "brevity": np.full(len(warmth), brevity), "plain": np.full(len(warmth), 0.6)}
    return report.Tested(choice, value, {name: [float(part.mean())] for name, part in value.items()}, 1.0)


def test_a_rival_is_compared_pair_by_pair_and_its_misses_are_counted() -> None:
    rng = np.random.default_rng(3)
    easy = rng.random(100) * 0.5  # how kind a prompt lets an answer be, for both
    found = []
    for bound in (0.45, 0.5):
        found.append(policy_on_test("mopo", bound, 0.3 + easy, 0.52))
        found.append(policy_on_test("scaled", bound, 0.25 + easy + rng.normal(0, 0.02, 100), 0.48))
    own, rival = report.rows(found)
    assert own.method == "mopo"
    assert own.missed == 0
    assert rival.behind is not None
    assert rival.behind.mean == pytest.approx(0.05, abs=0.01)
    assert rival.behind.low > 0.04
    assert own.primary.high - own.primary.low > 0.04, "unpaired, the prompts' spread would hide the difference"
    assert (rival.missed, rival.vectors) == (1, 2)
    assert rival.worst == pytest.approx(0.02)
    assert rival.volume_behind is not None
    assert rival.volume_behind.low > 0
    # The box from 0.4 to the two (here equal) points.
    assert own.volume is not None
    assert own.volume.mean == pytest.approx((float((0.3 + easy).mean()) - 0.4) * 0.12 * 0.2)
    words = " ".join(report.sentences([own, rival]))
    assert "scaled down, is behind MOPO" in words
