"""Jobs in the study's own terms: a run, a policy judged on a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from studies.language_model.problem import HELD, MAX_NEW_TOKENS, PRIMARY
from studies.language_model.runs import Run
from studies.language_model.scheduler import Job
from studies.language_model.work import spec_of

# Samples of the base model a prompt: they are in every comparison, so their noise should be small.
BASE_SAMPLES = 16
# Of the base model's answers; those of the policies are drawn with the seed of the judging, 0, 1, ...
_BASE_SEED = 1_000_003
# Of its answers to training prompts, which are drawn in blocks of so many prompts.
_ANSWER_SEED = 20261128
_BLOCK = 100
# What a run takes beside its steps, in steps.
_SETUP_STEPS = 20


@dataclass(frozen=True)
class Scale:
    """How large the study is: smaller for tests and slow machines.

    Attributes:
        training_prompts: most of the data's prompts that runs are given; 0 for all.
        epoch: optimiser steps that a run with dual data makes in an epoch of 700 prompts, a fifth held out, at
            ``prompts_per_step``.
        prompts_per_step: of every run.
        prompts: of a split that are answered; 0 for all.
        training_samples, validation_samples, test_samples, base_samples: answers a prompt.
        kl_samples: of the test answers a prompt, scored for the divergence from the base.
        tokens: most of an answer.
        changes: of every run.
    """

    training_prompts: int = 0
    epoch: int = 70
    prompts_per_step: int = 8
    prompts: int = 0
    training_samples: int = 12
    validation_samples: int = 8
    test_samples: int = 8
    base_samples: int = BASE_SAMPLES
    kl_samples: int = 2
    tokens: int = MAX_NEW_TOKENS
    changes: Mapping[str, Any] | None = None

    def with_batch(self, prompts: int) -> Scale:
        """The same with so many prompts a step, and so many fewer steps an epoch."""
        epoch = max(1, round(self.epoch * self.prompts_per_step / prompts))
        return replace(self, epoch=epoch, prompts_per_step=prompts)

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * self.epoch))

    def run(self, name: str, epochs: float, **fields: Any) -> Run:
        """A run of so many epochs; ``checkpoints`` are given in epochs, too."""
        steps = self.steps(epochs)
        kept = sorted({self.steps(epoch) for epoch in fields.pop("checkpoints", ())} - {steps})
        settings = {**fields.pop("settings", {}), **((self.changes or {}).get("settings", {}))}
        rest = {key: value for key, value in (self.changes or {}).items() if key != "settings"}
        fields = {"prompts": self.training_prompts, "prompts_per_step": self.prompts_per_step, **fields}
        run = Run(name, steps=steps, checkpoints=[step for step in kept if step < steps], settings=settings, **fields)
        return replace(run, **rest)

    def checkpoint(self, run: Run, epochs: float) -> str:
        """The name of a run's adapter after so many epochs."""
        steps = self.steps(epochs)
        return run.name if steps == run.steps else f"{run.name}/step-{steps}"


def train_job(run: Run) -> Job:
    # A judged run samples in its dual steps, which takes about as long again.
    cost = (1.0 + run.judged) * (run.steps + _SETUP_STEPS)
    needs = [*(name.split("/")[0] for name in run.start), *(f"ratios.{name}" for name in run.margins)]
    return Job(run.name, "train", spec_of(run), tuple(needs), cost)


def ratios_job(run: str) -> Job:
    """Log-ratios of all training responses under a run: the rewards that MODPO's margins are made of."""
    return Job(f"ratios.{run}", "ratios", {"run": run}, (run,))


def answer_jobs(prompts: int, scale: Scale) -> list[Job]:
    """The base model's answers to the first ``prompts`` training prompts, in blocks."""
    return [
        Job(
            f"answers.{first // _BLOCK}",
            "answers",
            {
                "first": first,
                "prompts": min(_BLOCK, prompts - first),
                "samples": scale.training_samples,
                "seed": _ANSWER_SEED + first,
                "tokens": scale.tokens,
            },
        )
        for first in range(0, prompts, _BLOCK)
    ]


def base_job(split: str, scale: Scale) -> Job:
    """The base model's answers, which all policies are compared with."""
    spec: dict[str, Any] = {"weights": {}, "split": split, "samples": scale.base_samples, "seed": _BASE_SEED}
    spec |= {"prompts": scale.prompts, "tokens": scale.tokens}
    return Job(f"base.{split}", "evaluate", spec)


def judge_job(
    name: str, weights: Mapping[str, float], split: str, scale: Scale, seed: int = 0, mixture: bool = False
) -> Job:
    """Answers of the policy ``base + sum weights[run] * update``, judged; ``run/step-N`` is a checkpoint's. A mixture
    is of the logits."""
    samples = scale.validation_samples if split == "validation" else scale.test_samples
    spec: dict[str, Any] = {"weights": dict(weights), "split": split, "samples": samples, "seed": seed}
    spec |= {"prompts": scale.prompts, "tokens": scale.tokens, "mixture": mixture}
    spec |= {"kl_samples": scale.kl_samples if split == "test" else 0}
    return Job(f"{name}.{split}", "evaluate", spec, tuple(dict.fromkeys(part.split("/")[0] for part in weights)))


def labels_job(name: str, thresholds: Mapping[str, float], tau: float, prompts: int = 0) -> Job:
    spec = {"primary": PRIMARY, "thresholds": dict(thresholds), "tau": tau, "prompts": prompts}
    return Job(f"labels.{name}", "labels", spec)


def parity(bound: float = 0.5) -> dict[str, float]:
    return dict.fromkeys(HELD, bound)
