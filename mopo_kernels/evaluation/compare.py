"""One policy, or the responses of one, against a baseline on every objective."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mopo_kernels.evaluation.judges import Judge, judge_responses
from mopo_kernels.evaluation.policies import Policy
from mopo_kernels.evaluation.prompts import Prompt
from mopo_kernels.evaluation.sampling import sample_responses
from mopo_kernels.evaluation.win_rates import WinRate, check_bootstrap, win_rate


@dataclasses.dataclass(frozen=True)
class LengthStatistics:
    """Lengths of a set of responses, in `unit` ("words" or "tokens"); `empty` is the share of zero-length responses."""

    unit: str
    count: int
    mean: float
    median: float
    p90: float
    longest: int
    empty: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_responses` and `compare_policies` measured.

    win_rates: objective -> WinRate of the candidate over the baseline. prompts (X). candidate, baseline: responses,
    [prompt][sample]. candidate_scores, baseline_scores: objective -> per prompt the score of each sample.
    """

    win_rates: dict[str, WinRate]
    prompts: list[Prompt]
    candidate: list[list[str]]
    baseline: list[list[str]]
    candidate_scores: dict[str, list[list[float]]]
    baseline_scores: dict[str, list[list[float]]]
    candidate_length: LengthStatistics
    baseline_length: LengthStatistics

    def mean_score(self, objective: str) -> tuple[float, float]:
        """Mean judge score of the candidate's and of the baseline's responses, in the judge's own unit."""
        means = (
            float(np.mean([np.mean(row) for row in scores[objective]]))
            for scores in (self.candidate_scores, self.baseline_scores)
        )
        candidate, baseline = means
        return candidate, baseline

    def as_dict(self, *, responses: bool = True) -> dict[str, Any]:
        """Plain lists and dicts for JSON; `responses=False` leaves out the texts and the single scores."""
        report: dict[str, Any] = {
            "win_rates": {
                name: dataclasses.asdict(rate)
                | dict(zip(("candidate_mean_score", "baseline_mean_score"), self.mean_score(name), strict=True))
                for name, rate in self.win_rates.items()
            },
            "length": {
                "candidate": dataclasses.asdict(self.candidate_length),
                "baseline": dataclasses.asdict(self.baseline_length),
            },
        }
        if responses:
            report["samples"] = [
                {
                    "prompt": prompt,
                    "candidate": self.candidate[index],
                    "baseline": self.baseline[index],
                    "candidate_scores": {name: rows[index] for name, rows in self.candidate_scores.items()},
                    "baseline_scores": {name: rows[index] for name, rows in self.baseline_scores.items()},
                }
                for index, prompt in enumerate(self.prompts)
            ]
        return report


def length_statistics(responses: Sequence[Sequence[str]], tokenizer: Any = None) -> LengthStatistics:
    """Lengths of [prompt][sample] responses: in tokens with a tokenizer (no special tokens), else in words."""
    texts = [text for drawn in responses for text in drawn]
    if not texts:
        raise ValueError("responses: expected at least one response; got none")
    if tokenizer is None:
        lengths = np.array([len(text.split()) for text in texts])
    else:
        lengths = np.array([len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts])
    return LengthStatistics(
        unit="words" if tokenizer is None else "tokens",
        count=len(texts),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        p90=float(np.quantile(lengths, 0.9)),
        longest=int(lengths.max()),
        empty=float((lengths == 0).mean()),
    )


def compare_responses(
    prompts: Sequence[Prompt],
    candidate: Sequence[Sequence[str]],
    baseline: Sequence[Sequence[str]],
    judges: Mapping[str, Judge],
    *,
    baseline_scores: dict[str, list[list[float]]] | None = None,
    tokenizer: Any = None,
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Judge responses already drawn, [prompt][sample], and compare them on every objective.

    baseline_scores: of the judges, where they are known: one set of baseline responses may serve several comparisons.
    tokenizer: for lengths in tokens, else they are in words. seed: of the bootstrap, the same resamples of prompts for
    every objective.
    """
    judge = functools.partial(judge_responses, judges, prompts, progress=progress)
    candidate_scores = judge(candidate, description="judging the candidate")
    if baseline_scores is None:
        baseline_scores = judge(baseline, description="judging the baseline")
    return Comparison(
        win_rates={
            name: win_rate(
                candidate_scores[name],
                baseline_scores[name],
                objective=name,
                n_boot=n_boot,
                confidence=confidence,
                seed=seed,
            )
            for name in judges
        },
        prompts=list(prompts),
        candidate=[list(drawn) for drawn in candidate],
        baseline=[list(drawn) for drawn in baseline],
        candidate_scores=candidate_scores,
        baseline_scores=baseline_scores,
        candidate_length=length_statistics(candidate, tokenizer),
        baseline_length=length_statistics(baseline, tokenizer),
    )


def compare_policies(
    candidate: Policy,
    baseline: Policy,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Judge],
    *,
    samples_per_prompt: int = 4,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    n_boot: int = 2000,
    confidence: float = 0.95,
    progress: bool = True,
) -> Comparison:
    """Sample from both policies, judge the samples, report the candidate's win rate over the baseline by objective.

    The options are those of `sample_responses` and `win_rate`. The two policies are sampled with different seeds, both
    derived from `seed`, so that their samples are independent. Lengths are in the candidate's tokens.
    """
    return compare_with_baseline(
        [candidate],
        baseline,
        prompts,
        judges,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        n_boot=n_boot,
        confidence=confidence,
        progress=progress,
    )[0]


def compare_with_baseline(
    candidates: Sequence[Policy],
    baseline: Policy,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Judge],
    *,
    samples_per_prompt: int = 4,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    n_boot: int = 2000,
    confidence: float = 0.95,
    progress: bool = True,
) -> list[Comparison]:
    """`compare_policies` of each candidate with one baseline, which is sampled and judged once.

    The candidates are sampled with the same seed: each is compared with the baseline alone, and common random numbers
    take noise out of the differences between them.
    """
    check_bootstrap(len(prompts), n_boot, confidence)  # here too, before the samples are paid for
    ours, theirs = (int(state) for state in np.random.SeedSequence(seed).generate_state(2))

    def draw(role: str, policy: Policy, state: int) -> list[list[str]]:
        with policy.active() as model:
            return sample_responses(
                model,
                policy.tokenizer,
                prompts,
                samples_per_prompt=samples_per_prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                batch_size=batch_size,
                seed=state,
                renderer=policy.renderer,
                progress=progress,
                description=f"sampling the {role} ({policy.name})",
            )

    drawn = [draw("candidate", candidate, ours) for candidate in candidates]
    against = draw("baseline", baseline, theirs)
    comparisons: list[Comparison] = []
    for candidate, responses in zip(candidates, drawn, strict=True):
        comparisons.append(
            compare_responses(
                prompts,
                responses,
                against,
                judges,
                baseline_scores=comparisons[0].baseline_scores if comparisons else None,
                tokenizer=candidate.tokenizer,
                n_boot=n_boot,
                confidence=confidence,
                seed=seed,
                progress=progress,
            )
        )
    return comparisons
