"""What moves the multipliers: measurements on prompts that the loss never fits, and the step that their noise allows.

A policy fits its training pairs. After an epoch its importance weights on them rest on a few responses, and a
multiplier that follows them is lost. So every so many optimiser steps the policy is measured on the *dual data*,
prompts held out of the loss, or by judging fresh answers to those prompts; each value comes with its standard error by
prompt and the effective number of prompts behind it. Section 14 of docs/method.md has the noise and bias of the
estimators, and why the step is what it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from mopo_kernels import naive
from mopo_kernels.data import DataError, PreferenceData, PreferenceExample
from mopo_kernels.data.dataset import prompt_key
from mopo_kernels.data.schema import judged_text
from mopo_kernels.dual import DualAscent
from mopo_kernels.evaluation import Judge, Prompt, judge_responses
from mopo_kernels.trainer.config import AUTO, MOPOConfig
from mopo_kernels.trainer.metrics import satisfaction_moments

# The most of a Newton step that is taken in any of so many parts of a run, however little noise there is: the policy
# answers with a delay, and first of all is on its way from the reference.
_LARGEST_GAIN, _PARTS_OF_A_RUN = 0.5, 8
# A slope below this share of the largest that there can be is taken for it: nearly all labels of the objective tie.
_SMALLEST_SLOPE = 0.01


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one look at the dual data found.

    Attributes:
        step: optimiser steps made.
        prompts: how many were looked at.
        satisfaction: by objective that has labels, or a judge.
        standard_error: by prompt, by objective measured on at least two prompts.
        effective_prompts: the effective number of prompts behind each value, by objective.
        coverage: with importance weights, their mean, which is 1 as long as the reference wrote the responses and the
            policy's own are among them; what is short of 1 is where the policy writes what the data do not have.
        r_squared: by the labels' pairs, how much of what the loss asks for the policy explains on them; None where it
            asks for nothing, or the log-ratios are not the policy's to the loss's own reference.
    """

    step: int
    prompts: int
    satisfaction: dict[str, float]
    standard_error: dict[str, float]
    effective_prompts: dict[str, float]
    coverage: float | None = None
    r_squared: float | None = None


def hold_out(args: MOPOConfig, data: PreferenceData | None) -> tuple[list[int], list[int], str | None]:
    """Which examples of ``data`` the loss fits, which it never sees, and why there are none of these, if there should
    be.

    By prompt, with the seed of the order in which the data are trained on.
    """
    if data is None:
        return [], [], None
    everything = list(range(len(data)))
    if not args.thresholds or not args.dual_data:
        return everything, [], None
    prompts = len({prompt_key(prompt) for prompt in data.dataset["prompt"]})
    count = round(args.dual_data * prompts)
    if count < args.dual_effective_prompts:
        reason = (
            f"the multipliers stand where they start: {args.dual_data:.0%} of {prompts} prompts is {count}, and a dual "
            f"step rests on at least {args.dual_effective_prompts:g} (more prompts, a larger dual_data, a dual_dataset "
            "or a lower dual_effective_prompts would let them move)"
        )
        return everything, [], reason
    rest, held = data.split_indices(args.dual_data, args.seed if args.data_seed is None else args.data_seed)
    return rest, held, None


def gain(standard_error: float, noise: float, part: float) -> float:
    """Which part of a Newton step may be taken on a value with this error.

    Steps ``x <- x - gain (x + e)`` with independent errors e of standard deviation s leave x with a standard deviation
    of ``s sqrt(gain / (2 - gain))``, eq. (40) of docs/method.md: the gain that makes this ``noise``, and at most half a
    step in an eighth of a run.

    Args:
        standard_error: s, in units of satisfaction.
        noise: what s may add to the value.
        part: of the run from one dual step to the next, in (0, 1].
    """
    if not math.isfinite(standard_error):
        return 0.0
    largest = _LARGEST_GAIN * min(1.0, _PARTS_OF_A_RUN * part)
    if standard_error <= noise:
        return largest
    share = (noise / standard_error) ** 2
    return min(largest, 2 * share / (1 + share))


def _judged_texts(example: PreferenceExample) -> list[str]:
    try:
        return [judged_text(response, f"responses[{index}]") for index, response in enumerate(example.responses)]
    except DataError as error:
        raise error.of(example.name) from None


class Controller:
    """Chooses what to measure, measures it, and moves the multipliers by it.

    Args:
        args: the configuration.
        objectives: names of the K objectives.
        data: the dual data.
        slope: by constrained objective, how fast its satisfaction grows with its multiplier (``LabelSolution.slope``).
        judges: by objective, for fresh answers in place of the labels of ``data``.

    Attributes:
        last: the newest measurement, or None.

    Raises:
        DataError: a response of ``data`` that judges would not be shown whole.
    """

    def __init__(
        self,
        args: MOPOConfig,
        objectives: Sequence[str],
        data: PreferenceData,
        slope: Mapping[str, float],
        judges: Mapping[str, Judge] | None = None,
    ) -> None:
        self.args = args
        self.objectives = tuple(objectives)
        self.judges = judges
        self._examples = list(data)
        numbers: dict[str, int] = {}
        self._prompt = [numbers.setdefault(prompt_key(example.prompt), len(numbers)) for example in self._examples]
        self.prompts = len(numbers)
        seed = args.seed if args.data_seed is None else args.data_seed
        self._order = torch.randperm(len(self._examples), generator=torch.Generator().manual_seed(seed)).tolist()
        floor = _SMALLEST_SLOPE / (4 * args.tau)
        self._slope = {name: max(value, floor) for name, value in slope.items()}
        self._stored = [] if judges is None else [_judged_texts(example) for example in self._examples]
        self._stored_scores: dict[int, dict[str, list[float]]] = {}
        self.reset()

    def reset(self) -> None:
        """Before the first measurement."""
        self.rounds = 0
        self.last: Measurement | None = None

    def next_part(self) -> list[int]:
        """The examples whose turn it is."""
        size = min(self.args.dual_prompts if self.judges is None else self.args.dual_samples, len(self._order))
        start = self.rounds * size
        self.rounds += 1
        return [self._order[(start + offset) % len(self._order)] for offset in range(size)]

    # ----------------------------------------------------------------------------------------------- measurements

    def from_log_ratios(
        self,
        step: int,
        log_ratio: Mapping[int, Sequence[float]],
        objective_weight: Tensor,
        label_rate: Sequence[float] | None = None,
    ) -> Measurement:
        """By the labels of the examples, with the configured estimator; the weights of ``snis`` are capped.

        Args:
            step: optimiser steps made.
            log_ratio: by example, of each response to the first reference, nats; ignored by ``closed_form``.
            objective_weight: (K,) multipliers, 1 for the primary.
            label_rate: (K,) as the loss has it.
        """
        ratio: list[float] = []
        pairs, labels, weights, margins, places, prompts = [], [], [], [], [], []
        for place, index in enumerate(sorted(log_ratio)):
            example = self._examples[index]
            for pair in example.pairs:
                pairs.append([len(ratio) + pair.i, len(ratio) + pair.j])
                values = [pair.preference.get(name) for name in self.objectives]
                labels.append([math.nan if value is None else value for value in values])
                weights.append(example.weight)
                margins.append(pair.margin or 0.0)
            ratio += log_ratio[index]
            places += [place] * len(example.responses)
            prompts += [self._prompt[index]] * len(example.responses)
        r, preference = torch.tensor(ratio, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
        where, weight = torch.tensor(pairs), torch.tensor(weights, dtype=torch.float64)
        estimator, group = self.args.estimator, torch.tensor(prompts)
        rho = None
        if estimator == "closed_form":
            rho = naive.policy_ratio(
                preference, where, objective_weight.double(), self.args.tau, torch.tensor(places), self.args.max_ratio
            )

        def estimate(log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return naive.ratio_estimate(
                satisfaction_moments(log_weight, where, preference, weight, group, estimator, rho)
            )

        value, error, effective = estimate(naive.capped_log_ratio(r) if estimator == "snis" else r)
        if estimator == "snis":
            # Of the weights as they are: a cap hides how few prompts carry the value, and not its bias.
            effective = estimate(r)[2]
        found = self._measurement(step, len(set(prompts)), value, error, effective)
        if estimator != "closed_form" and self.args.loss_type != "cloning" and self.args.reference_update_steps is None:
            rate = None if label_rate is None else torch.tensor(label_rate, dtype=torch.float64)
            offset = torch.tensor(margins, dtype=torch.float64)
            h = r[where[:, 0]] - r[where[:, 1]]
            of_policy, of_reference = (
                weight
                @ naive.pair_loss(
                    margin, preference, objective_weight.double(), self.args.tau, self.args.loss_type, rate, offset
                )
                for margin in (h, torch.zeros_like(h))
            )
            # A regression on ties alone asks for nothing.
            if of_reference > 0:
                found = dataclasses.replace(found, r_squared=float(1 - of_policy / of_reference))
        if estimator != "snis":
            return found
        return dataclasses.replace(found, coverage=float(r.clamp(max=naive.MAX_LOG_IMPORTANCE).exp().mean()))

    def win_rates(self, index: int, answer: str) -> dict[str, float]:
        """Of an answer to the prompt of an example over its responses, by the judges; a tie is half a win."""
        assert self.judges is not None
        prompt: list[Prompt] = [self._examples[index].prompt]
        if index not in self._stored_scores:
            scores = judge_responses(self.judges, prompt, [self._stored[index]], progress=False)
            self._stored_scores[index] = {name: rows[0] for name, rows in scores.items()}
        own = judge_responses(self.judges, prompt, [[answer]], progress=False)
        return {
            name: sum(((rows[0][0] > other) + (rows[0][0] >= other)) / 2 for other in others) / len(others)
            for name, rows in own.items()
            for others in [self._stored_scores[index][name]]
        }

    def from_win_rates(self, step: int, rates: Mapping[int, Mapping[str, float]]) -> Measurement:
        """By fresh answers: ``rates`` of :meth:`win_rates`, by example."""
        order = sorted(rates)
        weight = torch.tensor([self._examples[index].weight for index in order], dtype=torch.float64)[:, None]
        value = torch.tensor(
            [[rates[index].get(name, math.nan) for name in self.objectives] for index in order], dtype=torch.float64
        )
        total = weight * ~value.isnan()
        group = naive.prompt_number(torch.tensor([self._prompt[index] for index in order]))
        moments = naive.ratio_moments(
            *(
                torch.zeros_like(part).index_add(0, group, part)
                for part in (torch.nan_to_num(value, nan=0.0) * total, total)
            )
        )
        return self._measurement(step, len(set(group.tolist())), *naive.ratio_estimate(moments))

    def _measurement(self, step: int, prompts: int, value: Tensor, error: Tensor, effective: Tensor) -> Measurement:
        found = [
            {name: number for name, number in zip(self.objectives, part.tolist(), strict=True) if math.isfinite(number)}
            for part in (value, error, effective)
        ]
        measured = {name: found[2][name] for name in found[0]}
        return Measurement(step, prompts, found[0], found[1], measured)

    # ------------------------------------------------------------------------------------------------------ steps

    def step_size(self, measurement: Measurement, share: float, part: float) -> dict[str, float]:
        """By constrained objective; ``share`` is that of the learning rate in its peak, ``part`` as in :func:`gain`."""
        if self.args.dual_lr != AUTO:
            return dict.fromkeys(self._slope, float(self.args.dual_lr))  # type: ignore[arg-type]
        error = measurement.standard_error
        return {
            name: share * gain(error.get(name, math.nan), self.args.dual_noise, part) / slope
            for name, slope in self._slope.items()
        }

    def margin(self, measurement: Measurement) -> dict[str, float]:
        """What is aimed at above each threshold: eq. (41) of docs/method.md.

        The errors of the parts of the data average out while multipliers follow them, so s is that of all of it.
        """
        if self.args.threshold_confidence is None:
            return {}
        z = NormalDist().inv_cdf(self.args.threshold_confidence)
        rest = math.sqrt(measurement.prompts / self.prompts)
        return {name: z * error * rest for name, error in measurement.standard_error.items() if name in self._slope}

    def move(
        self, dual: DualAscent, measurement: Measurement, share: float, part: float, waiting: bool
    ) -> tuple[dict[str, float], list[str]]:
        """One dual step; what to log of it, and the objectives whose value rests on too little to have made one.

        Args:
            share, part: see :meth:`step_size`.
            waiting: the multipliers do not move yet.
        """
        self.last = measurement
        value, size = measurement.satisfaction, measurement.effective_prompts
        covered = measurement.coverage is None or measurement.coverage >= self.args.dual_coverage
        refused = [name for name in value if not covered or size[name] < self.args.dual_effective_prompts]
        margin = self.margin(measurement)
        step = dict.fromkeys(self._slope, 0.0) if waiting else self.step_size(measurement, share, part)
        labelled = [float(name in value and name not in refused) for name in self.objectives]
        dual.update([value.get(name, math.nan) for name in self.objectives], labelled, lr=step, margin=margin)
        whole = {"coverage": measurement.coverage, "r_squared": measurement.r_squared}
        logs = {f"dual/{name}": number for name, number in whole.items() if number is not None}
        for kind, numbers in (
            ("satisfaction", value),
            ("standard_error", measurement.standard_error),
            ("effective_prompts", size),
            ("slack", {name: value[name] - bound for name, bound in dual.threshold.items() if name in value}),
            ("aim", {name: dual.threshold[name] + extra for name, extra in margin.items()}),
            ("lr", {name: 0.0 if name in refused else number for name, number in step.items()}),
        ):
            logs |= {f"dual/{kind}/{name}": number for name, number in numbers.items()}
        return logs, [name for name in refused if name in dual.threshold]

    def state_dict(self) -> dict[str, Any]:
        """What measurements to come depend on, and the last one."""
        return {"rounds": self.rounds, "last": None if self.last is None else dataclasses.asdict(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state made by :meth:`state_dict`."""
        self.rounds = int(state["rounds"])
        self.last = None if state["last"] is None else Measurement(**state["last"])

    def fingerprint(self) -> str:
        """Tells dual data apart, in words."""
        text = "\n".join(sorted(prompt_key(example.prompt) for example in self._examples))
        return f"{self.prompts} prompts ({hashlib.sha256(text.encode()).hexdigest()[:12]})"
