"""Certificates: that a policy keeps its thresholds on prompts to come, with a chosen probability.

A certificate is computed on prompts that neither training nor any choice has seen: pairs that the reference wrote and
somebody labelled, weighted by the policy's own log-ratios, or fresh answers that judges compare. Several candidates
share the prompts: one half chooses among them, the other half certifies, so that the best of many lucky ones gains
nothing by its luck. Section 14 of docs/method.md has the bound, why it is this one, and what is assumed.

transformers and peft are imported when a policy's log-probabilities are computed, not before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mopo_kernels import naive
from mopo_kernels.evaluation import (
    Judge,
    Policy,
    Prompt,
    judge_responses,
    progress_bar,
    sample_responses,
    win_rate_by_prompt,
)

if TYPE_CHECKING:
    from mopo_kernels.data import PreferenceCollator, PreferenceData, PreferenceExample

Array = npt.NDArray[np.float64]

# The sums of a candidate, by its number, on prompts, by theirs, for the choice (0) or for the certificate (1).
Measure = Callable[[int, Sequence[int], int], "PromptSums"]

# Below so many effective prompts a standard error is too uncertain itself.
EFFECTIVE_PROMPTS = 30.0
# Below this mean importance weight the policy writes what the pairs do not have.
COVERAGE = 0.7
ESTIMATORS = ("snis", "pair")
# A candidate is chosen for passing with bounds so many times as far away: else every other one would fail afterwards.
_CHOICE_WIDTH = 2.0


@dataclasses.dataclass(frozen=True)
class PromptSums:
    """What each prompt adds to the value of each objective, ``v_k = sum_x A_xk / sum_x B_xk``.

    Attributes:
        objectives: K names.
        value: (X, K) A, at most B.
        total: (X, K) B, 0 where a prompt has no label of the objective.
        importance: (X,) sum of the importance weights of a prompt's responses, or None where none are used.
        responses: (X,) how many responses there are.
    """

    objectives: tuple[str, ...]
    value: Array
    total: Array
    responses: Array
    importance: Array | None = None

    @property
    def coverage(self) -> float | None:
        """The mean importance weight, 1 while the policy's responses are among those that the reference wrote."""
        return None if self.importance is None else float(self.importance.sum() / self.responses.sum())

    def of(self, objective: str) -> tuple[Array, Array]:
        """(A, B) of the prompts that have labels of it, each (X',)."""
        column = self.objectives.index(objective)
        labelled = self.total[:, column] > 0
        return self.value[labelled, column], self.total[labelled, column]


@dataclasses.dataclass(frozen=True)
class Bound:
    """What an objective has, and at least has.

    Attributes:
        objective: its name.
        threshold: what it is held to.
        value: the estimate; NaN without labels.
        standard_error: by prompt.
        lower: the lower bound, which holds together with those of the other objectives.
        effective_prompts: the effective number of prompts behind the estimate.
    """

    objective: str
    threshold: float
    value: float
    standard_error: float
    lower: float
    effective_prompts: float

    @property
    def kept(self) -> bool:
        """Whether the bound is at or above the threshold."""
        return self.lower >= self.threshold


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Whether every threshold is kept.

    Attributes:
        confidence: probability, over the prompts that were drawn, that all bounds hold.
        prompts: how many were used.
        bounds: of the objectives with a threshold.
        coverage: the mean importance weight, or None where none are used.
        refused: why no certificate can be given, whatever the bounds; empty if it can.
    """

    confidence: float
    prompts: int
    bounds: tuple[Bound, ...]
    coverage: float | None
    refused: tuple[str, ...]

    @property
    def certified(self) -> bool:
        """Every bound is at or above its threshold, and nothing speaks against the bounds."""
        return not self.refused and all(bound.kept for bound in self.bounds)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, numbers that are not finite as None."""
        bounds = [
            {name: _plain(value) for name, value in dataclasses.asdict(bound).items()} | {"kept": bound.kept}
            for bound in self.bounds
        ]
        return {
            "certified": self.certified,
            "confidence": self.confidence,
            "prompts": self.prompts,
            "coverage": self.coverage,
            "refused": list(self.refused),
            "bounds": bounds,
        }


@dataclasses.dataclass(frozen=True)
class Decision:
    """What :func:`certify` came to.

    Attributes:
        chosen: which candidate.
        choice: with several candidates what each had on the prompts of the choice; else empty.
        certificate: of the chosen one, on the other prompts.
    """

    chosen: int
    choice: tuple[Certificate, ...]
    certificate: Certificate


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimate(value: Array, total: Array) -> tuple[float, float, float]:
    moments = naive.ratio_moments(torch.from_numpy(value)[:, None], torch.from_numpy(total)[:, None])
    return tuple(float(part) for part in naive.ratio_estimate(moments))  # type: ignore[return-value]


def lower_bound(value: Array, total: Array, level: float) -> float:
    """``v' - t s'``, a lower bound of ``sum A / sum B`` over all prompts there are, eq. (42) of docs/method.md.

    v' and s' are the estimate and its standard error by prompt with one more effective prompt, of weight
    ``sum B^2 / sum B``, on which everything is lost; t is Student's quantile for their effective number, less one.

    Args:
        value, total: (X,) A and B of each prompt, ``0 <= A <= B``, B > 0.
        level: probability that the bound holds, in (0.5, 1).

    Returns:
        The bound; minus infinity for fewer than two prompts.
    """
    from scipy.special import stdtrit

    if len(value) < 2:
        return -math.inf
    mean, error, effective = _estimate(np.append(value, 0.0), np.append(total, (total**2).sum() / total.sum()))
    return mean - float(stdtrit(max(effective - 1.0, 1.0), level)) * error


def certificate(
    sums: PromptSums,
    thresholds: Mapping[str, float],
    *,
    confidence: float = 0.95,
    effective_prompts: float = EFFECTIVE_PROMPTS,
    coverage: float = COVERAGE,
) -> Certificate:
    """Lower bounds of all objectives with a threshold, that hold together with probability ``confidence``.

    Each of the K holds with ``1 - (1 - confidence) / K`` (Bonferroni).

    Args:
        sums: of prompts that nothing was trained or chosen on.
        thresholds: objective -> lowest value allowed, on the scale of ``sums``.
        confidence: in (0.5, 1).
        effective_prompts: fewest effective prompts that a certificate may rest on.
        coverage: least mean importance weight that it may rest on.

    Raises:
        ValueError: no threshold, one of an objective that was not measured, or a confidence out of range.
    """
    if not thresholds:
        raise ValueError("thresholds: expected at least one objective; got none")
    if unknown := [name for name in thresholds if name not in sums.objectives]:
        raise ValueError(f"thresholds: expected objectives among {', '.join(sums.objectives)}; got {unknown[0]!r}")
    if not 0.5 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number in (0.5, 1); got {confidence}")
    level = 1.0 - (1.0 - confidence) / len(thresholds)
    bounds, refused = [], []
    for name, threshold in thresholds.items():
        value, total = sums.of(name)
        mean, error, effective = _estimate(value, total)
        bounds.append(Bound(name, threshold, mean, error, lower_bound(value, total, level), effective))
        if effective < effective_prompts:
            refused.append(
                f"{name} rests on an effective number of {effective:.1f} prompts, at least {effective_prompts:g} are "
                "needed"
            )
    found = sums.coverage
    if found is not None and found < coverage:
        refused.append(
            f"the mean importance weight is {found:.2f}, at least {coverage:g} is needed: the policy writes what the "
            "pairs do not have, and only judges can tell"
        )
    return Certificate(confidence, len(sums.value), tuple(bounds), found, tuple(refused))


def choose(candidates: Sequence[Certificate], primary: Sequence[float]) -> int:
    """Which of several candidates to certify on other prompts.

    The one with the most of the primary objective among those that keep every threshold with bounds twice as far away
    as they need to be; where none does, the one whose worst slack is the largest in standard errors.

    Args:
        candidates: what each has on the prompts of the choice.
        primary: its value of the primary objective there.
    """

    def worst(found: Certificate) -> float:
        if found.refused:
            return -math.inf
        return min((bound.value - bound.threshold) / max(bound.standard_error, 1e-12) for bound in found.bounds)

    def passes(found: Certificate) -> bool:
        return not found.refused and all(
            bound.value - _CHOICE_WIDTH * (bound.value - bound.lower) >= bound.threshold for bound in found.bounds
        )

    passing = [index for index, found in enumerate(candidates) if passes(found)]
    if passing:
        return max(passing, key=lambda index: primary[index])
    return max(range(len(candidates)), key=lambda index: worst(candidates[index]))


def halves(prompts: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """(for the choice, for the certificate): distinct prompts cut in two by ``seed``, whatever their order."""
    ordered = sorted(range(len(prompts)), key=prompts.__getitem__)
    drawn = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    cut = len(prompts) // 2
    return [ordered[place] for place in drawn[:cut]], [ordered[place] for place in drawn[cut:]]


def certify(
    measure: Measure,
    candidates: int,
    prompts: Sequence[str],
    thresholds: Mapping[str, float],
    primary: str,
    *,
    confidence: float = 0.95,
    effective_prompts: float = EFFECTIVE_PROMPTS,
    coverage: float = COVERAGE,
    seed: int = 0,
) -> Decision:
    """Choose among candidates on one half of the prompts and certify the chosen one on the other half.

    With one candidate there is nothing to choose, and all prompts certify.

    Args:
        measure: the sums of a candidate, by its number, on prompts, by theirs, for the choice (0) or for the
            certificate (1).
        candidates: how many there are.
        prompts: distinct, that no candidate was trained on.
        thresholds, confidence, effective_prompts, coverage: as for :func:`certificate`.
        primary: the objective that the choice maximises.
        seed: of the halves.
    """
    options: dict[str, Any] = {
        "confidence": confidence,
        "effective_prompts": effective_prompts,
        "coverage": coverage,
    }
    if candidates == 1:
        return Decision(0, (), certificate(measure(0, range(len(prompts)), 1), thresholds, **options))
    for_choice, for_certificate = halves(prompts, seed)
    measured = [measure(index, for_choice, 0) for index in range(candidates)]
    choice = tuple(certificate(sums, thresholds, **options) for sums in measured)
    chosen = choose(choice, [_estimate(*sums.of(primary))[0] for sums in measured])
    return Decision(chosen, choice, certificate(measure(chosen, for_certificate, 1), thresholds, **options))


def judged_sums(
    candidate_scores: Mapping[str, Sequence[Sequence[float]]], baseline_scores: Mapping[str, Sequence[Sequence[float]]]
) -> PromptSums:
    """Of fresh answers, judged: objective -> [prompt][sample] scores, as ``evaluation.judge_responses`` gives them.

    A prompt's value is the candidate's win rate over the baseline on it, and all prompts weigh the same.
    """
    value = np.stack(
        [win_rate_by_prompt(scores, baseline_scores[name])[0] for name, scores in candidate_scores.items()], axis=1
    )
    samples = [len(row) for row in next(iter(candidate_scores.values()))]
    return PromptSums(tuple(candidate_scores), value, np.ones_like(value), np.array(samples, dtype=np.float64))


def pair_sums(
    examples: Sequence[PreferenceExample],
    prompt: Sequence[int],
    log_ratio: Sequence[Sequence[float]],
    objectives: Sequence[str],
    estimator: str,
) -> PromptSums:
    """Of labelled pairs, by the policy's log-ratios, eq. (26) and (28) of docs/method.md; no weight is capped.

    Args:
        examples: whose responses the reference wrote.
        prompt: the number of each example's prompt, 0 to X - 1.
        log_ratio: by example, of each response to the reference, nats.
        objectives: names of the K objectives.
        estimator: ``snis``, win rates over what the reference writes, or ``pair``, on its own scale.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}; got {estimator!r}")
    pairs, labels, weights, owners = [], [], [], []
    places: list[int] = []
    for example, number, ratios in zip(examples, prompt, log_ratio, strict=True):
        offset = len(places)
        places += [number] * len(ratios)
        for pair in example.pairs:
            pairs.append([offset + pair.i, offset + pair.j])
            values = [pair.preference.get(name) for name in objectives]
            labels.append([math.nan if value is None else value for value in values])
            weights.append(example.weight)
            owners.append(number)
    ratio = torch.tensor([value for ratios in log_ratio for value in ratios], dtype=torch.float64)
    terms = naive.satisfaction_terms(
        ratio,
        torch.tensor(pairs),
        torch.tensor(labels, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
        estimator,
    )
    count = max(prompt) + 1
    value, total = (
        np.asarray(torch.zeros(count, len(objectives), dtype=torch.float64).index_add(0, torch.tensor(owners), part))
        for part in terms
    )
    responses = np.bincount(places, minlength=count).astype(np.float64)
    importance = None
    if estimator == "snis":
        weight = torch.exp(ratio.clamp(max=naive.MAX_LOG_IMPORTANCE)).numpy()
        importance = np.bincount(places, weight, minlength=count).astype(np.float64)
    return PromptSums(tuple(objectives), value, total, responses, importance)


def sequence_logprobs(
    policy: Policy,
    collator: PreferenceCollator,
    examples: Sequence[PreferenceExample],
    batch_size: int,
    progress: bool = True,
) -> list[list[float]]:
    """Log-probability of every response of every example under a policy, summed nats: [example][response].

    ``batch_size`` examples at once; ``progress`` shows a bar.
    """
    from mopo_kernels.functional import linear_sequence_logprob
    from mopo_kernels.trainer.batch_layout import take_layout
    from mopo_kernels.trainer.lm_head import find_transform, output_head

    found: list[list[float]] = []
    with policy.active() as model, torch.no_grad(), progress_bar(progress) as bar:
        options = find_transform(model).keywords()
        task = bar.add_task(f"scoring under {policy.name}", total=len(examples))
        for start in range(0, len(examples), batch_size):
            batch = collator(examples[start : start + batch_size])
            tokens = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
            scored = take_layout(tokens).scored(model)
            rows, weight, bias = output_head(model).operands(scored.hidden)
            logprob = linear_sequence_logprob(rows, weight, scored.target, scored.cu_seqlens, bias, **options)
            values = iter(logprob.tolist())
            scores = [[next(values) for _ in example.responses] for example in examples[start : start + batch_size]]
            found += scores
            bar.advance(task, len(scores))
    return found


def measure_pairs(
    candidates: Sequence[Policy],
    baseline: Policy,
    data: PreferenceData,
    estimator: str,
    *,
    max_response_length: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> tuple[list[str], Measure]:
    """The distinct prompts of held-out pairs, and what measures candidates on them by their log-ratios.

    Args:
        candidates, baseline: policies; the baseline wrote the responses, each by itself.
        data: labelled pairs.
        estimator: as for :func:`pair_sums`.
        max_response_length: tokens after which responses were cut, EOS included; None: they are whole.
        batch_size: examples scored at once.
        progress: show bars.
    """
    from mopo_kernels.data import PreferenceCollator
    from mopo_kernels.data.dataset import prompt_key

    examples = list(data)
    owned: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        owned.setdefault(prompt_key(example.prompt), []).append(index)
    prompts = list(owned)
    known: dict[int, list[float]] = {}  # of the baseline, by example

    def logprobs(policy: Policy, indices: Sequence[int]) -> list[list[float]]:
        collator = PreferenceCollator(
            policy.tokenizer,
            data.objectives,
            max_response_length=max_response_length,
            truncate=max_response_length is not None,
            chat=policy.renderer.chat,
            chat_template_kwargs=policy.renderer.chat_template_kwargs,
        )
        return sequence_logprobs(policy, collator, [examples[index] for index in indices], batch_size, progress)

    def measure(candidate: int, chosen: Sequence[int], part: int) -> PromptSums:
        indices = [index for number in chosen for index in owned[prompts[number]]]
        number = [place for place, chosen_one in enumerate(chosen) for _ in owned[prompts[chosen_one]]]
        if lacking := [index for index in indices if index not in known]:
            known.update(zip(lacking, logprobs(baseline, lacking), strict=True))
        own = logprobs(candidates[candidate], indices)
        ratio = [
            [value - base for value, base in zip(row, known[index], strict=True)]
            for row, index in zip(own, indices, strict=True)
        ]
        return pair_sums([examples[index] for index in indices], number, ratio, data.objectives, estimator)

    return prompts, measure


def measure_judged(
    candidates: Sequence[Policy],
    baseline: Policy,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Judge],
    *,
    seed: int = 0,
    progress: bool = True,
    **sampling: Any,
) -> tuple[list[str], Measure]:
    """The distinct prompts, and what measures candidates on them by fresh answers that judges compare.

    Args:
        candidates, baseline: policies.
        prompts: held out.
        judges: objective -> judge.
        seed: of the samples; those of candidates and baseline, of choice and certificate are independent.
        progress: show bars.
        sampling: further options of ``evaluation.sample_responses``.
    """
    from mopo_kernels.data.dataset import prompt_key

    distinct = {prompt_key(prompt): prompt for prompt in prompts}
    ordered = list(distinct.values())
    known: dict[int, dict[str, list[list[float]]]] = {}  # of the baseline, by part

    def scores(policy: Policy, asked: list[Prompt], part: int, side: int) -> dict[str, list[list[float]]]:
        state = int(np.random.SeedSequence([seed, part, side]).generate_state(1)[0])
        with policy.active() as model:
            answers = sample_responses(
                model,
                policy.tokenizer,
                asked,
                seed=state,
                renderer=policy.renderer,
                progress=progress,
                description=f"sampling {policy.name}",
                **sampling,
            )
        return judge_responses(judges, asked, answers, progress=progress)

    def measure(candidate: int, chosen: Sequence[int], part: int) -> PromptSums:
        asked = [ordered[number] for number in chosen]
        if part not in known:
            known[part] = scores(baseline, asked, part, 1)
        return judged_sums(scores(candidates[candidate], asked, part, 0), known[part])

    return list(distinct), measure
