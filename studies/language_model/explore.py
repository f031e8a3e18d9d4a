"""Runs that tell apart why a policy falls short of its labels, and show whether control lasts; validation prompts only.

The list is in order of importance, as a deadline may cut it; the longest run comes first, since nothing else would end
after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.language_model.jobs import Scale, base_job, judge_job, labels_job, parity, train_job
from studies.language_model.problem import HELD, OBJECTIVES, PRIMARY, RESPONSES, labelled_pairs, some_prompts
from studies.language_model.runs import Run
from studies.language_model.scheduler import Job
from studies.language_model.statistics import estimate, keeps, rates

# The centre that factors are varied about, one at a time.
CENTRE: dict[str, Any] = {"tau": 0.15, "learning_rate": 1e-4, "lora_rank": 16}
# One answer to each of so many prompts in a dual step, 128 at once.
JUDGED: dict[str, Any] = {"dual_samples": 128, "per_device_eval_batch_size": 32}
# Validation prompts whose pairs tell twice an epoch what of the labels the policy has learned, and what by heart.
HELD_OUT = 100
# What is held at 0.5 is asked for at 0.5 here: how well control aims is one of the questions.
THRESHOLDS = parity()
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
SEEDS = (0, 1, 2)


def explore_jobs(multipliers: Mapping[str, float], scale: Scale) -> list[Job]:
    """All jobs of the exploration.

    Args:
        multipliers: the labels' solution at ``THRESHOLDS`` and the centre's tau, for the runs with fixed ones.
        scale: see ``Scale``.
    """
    runs: list[tuple[Run, Sequence[float]]] = []

    def add(name: str, epochs: float, at: Sequence[float] = (), batch: Scale = scale, **fields: Any) -> Run:
        """A run, judged at its end and after the epochs ``at``."""
        looks = {"held_out": min(HELD_OUT, scale.prompts or HELD_OUT), "held_out_steps": max(1, batch.epoch // 2)}
        run = batch.run(name, epochs, checkpoints=at, **{**CENTRE, **looks, **fields})
        runs.append((run, [*at, epochs]))
        return run

    held: dict[str, Any] = {"thresholds": THRESHOLDS}
    fixed: dict[str, Any] = {"multipliers": dict(multipliers), "method": "fixed"}
    free: dict[str, Any] = {"method": "unconstrained"}
    judged: dict[str, Any] = {"judged": True, "settings": JUDGED, **held}
    scaled: list[Job] = []

    def turned_down(run: Run) -> None:
        scaled.extend(
            judge_job(f"{run.name}.x{factor:g}", {run.name: factor}, "validation", scale) for factor in SCALES
        )

    # How long control lasts, by fresh answers and by the dual data's labels.
    add("constrained-10-s0", 10, (1, 3, 6), **held)
    for seed in SEEDS:
        add(f"constrained-3-s{seed}", 3, (1, 2), seed=seed, **held)
        add(f"judged-3-s{seed}", 3, (1, 2), seed=seed, **judged)
    for seed in SEEDS:
        add(f"constrained-1-s{seed}", 1, seed=seed, **held)
        add(f"judged-1-s{seed}", 1, seed=seed, **judged)
    turned_down(add("unconstrained-1-s0", 1, **free))
    add("fixed-1-s0", 1, **fixed)
    # Why a policy falls short of its labels: one factor at a time about constrained-1-s0.
    for rate in (2e-4, 5e-4):
        add(f"rate-{rate:g}", 1, learning_rate=rate, **held)
    add("batch-4", 1, batch=scale.with_batch(4), **held)
    for tau in (0.08, 0.3):
        add(f"tau-{tau:g}", 1, tau=tau, **held)
    add("rank-64", 1, lora_rank=64, **held)
    # As many epochs over fewer prompts are fewer steps: as many steps, so that nothing else differs.
    add("prompts-350", 1, prompts=350, **held)
    add("responses-12", 1, responses=12, **held)
    add("loss-sigmoid", 1, loss_type="sigmoid", **held)
    add("estimator-pair", 1, estimator="pair", **held)
    # The rivals, and the factors that more training may need, for as long.
    turned_down(add("unconstrained-3-s0", 3, (1, 2), **free))
    add("fixed-3-s0", 3, (1, 2), **fixed)
    add("rate-0.0002-3", 3, learning_rate=2e-4, **held)
    add("tau-0.08-3", 3, tau=0.08, **held)
    add("responses-12-3", 3, responses=12, **held)
    add("unconstrained-10-s0", 10, (1, 3, 6), **free)
    add("judged-10-s0", 10, (1, 3, 6), **judged)

    jobs = [base_job("validation", scale)]
    jobs += [labels_job(f"tau-{tau:g}", THRESHOLDS, tau, scale.training_prompts) for tau in (0.08, 0.15, 0.3)]
    for run, judged_at in runs:
        jobs.append(train_job(run))
        for epochs in judged_at:
            name = run.name if epochs == judged_at[-1] else f"{run.name}.epoch-{epochs:g}"
            jobs.append(judge_job(name, {scale.checkpoint(run, epochs): 1.0}, "validation", scale))
        jobs += [job for job in scaled if run.name in job.spec["weights"]]
    return jobs


def explained(result: Mapping[str, Any]) -> float | None:
    """The last ``eval_r_squared`` of a run: which share of what the loss asks for it explains on held-out pairs."""
    values = [line["eval_r_squared"] for line in result["history"] if "eval_r_squared" in line]
    return values[-1] if values else None


def explore_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Win rates over the base of every judged policy, and what the labels hold, as text."""
    base = found["base.validation"]["result"]["scores"]
    lines = [f"{'policy':32s} " + " ".join(f"{name:^22s}" for name in OBJECTIVES) + f"  {HELD} >= 0.5?"]
    for name, record in found.items():
        result = record.get("result")
        if record["kind"] == "labels" and result:
            for kind in ("constrained", "turned_down", "unconstrained"):
                value = result[kind]["satisfaction"]
                cells = " ".join(f"{value[objective]:^22.3f}" for objective in OBJECTIVES)
                lines.append(f"{name + ' ' + kind:32s} {cells}  KL {result[kind]['kl']:.2f}")
        elif record["kind"] == "evaluate" and result and name != "base.validation":
            by_prompt = rates(result["scores"], base)
            cells = " ".join(f"{estimate(by_prompt[objective])!s:^22s}" for objective in OBJECTIVES)
            lines.append(f"{name.removesuffix('.validation'):32s} {cells}  {keeps(by_prompt, THRESHOLDS)}")
    for name, record in found.items():
        if record["kind"] == "train" and (result := record.get("result")):
            multipliers = ", ".join(f"{key} {value:.2f}" for key, value in result["multiplier"].items())
            share = explained(result)
            lines.append(
                f"{name:32s} {result['steps']} steps in {result['seconds']:.0f} s; {multipliers or 'no multipliers'}"
                + ("" if share is None else f"; R^2 of held-out pairs {share:.3f}")
            )
        if "error" in record:
            lines.append(f"{name:32s} FAILED: {record['error'].strip().splitlines()[-1]}")
    return "\n".join(lines)


def best_constrained(found: Mapping[str, Mapping[str, Any]], margin: float = 0.0) -> str | None:
    """The judged policy with the highest primary among those that keep ``THRESHOLDS`` on validation."""
    base = found["base.validation"]["result"]["scores"]
    best: tuple[float, str] | None = None
    for name, record in found.items():
        if record["kind"] != "evaluate" or not record.get("result") or name == "base.validation":
            continue
        by_prompt = rates(record["result"]["scores"], base)
        if keeps(by_prompt, THRESHOLDS, margin):
            best = max(best or (-np.inf, ""), (float(by_prompt[PRIMARY].mean()), name))
    return None if best is None else best[1]


def explore_multipliers(answers: Mapping[str, Sequence[str]], scale: Scale) -> dict[str, float]:
    """The labels' solution at the centre, for the runs with fixed multipliers."""
    from studies.language_model.labels import label_solutions

    part = some_prompts(labelled_pairs(answers, RESPONSES), scale.training_prompts)
    found = label_solutions(part, PRIMARY, THRESHOLDS, CENTRE["tau"], OBJECTIVES)
    return {name: round(value, 4) for name, value in found["multiplier"].items()}
