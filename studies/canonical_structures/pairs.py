"""Labelled pairs: finite data drawn from a structure, in the form that :func:`mopo_kernels.mopo_loss` takes.

The table of a finite problem has X * Y responses, and mopo_loss sees each as one sequence, number ``prompt * Y +
response``. Both responses of a pair are independent draws from the behaviour policy, so now and then they are the same
response. Such a pair teaches the policy nothing, but importance-weighted averages need it: without it ``snis`` measures

    (P_k - c / 2) / (1 - c),    c = E_x sum_y behaviour(y | x) policy(y | x),

not ``P_k``. As mopo_loss wants two different sequences in a pair, :class:`PairTensors` gives the second draw of such a
response a sequence of its own.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from studies.canonical_structures.structures import Structure

__all__ = ["MergedPairs", "PairTensors", "Pairs", "population_pairs", "sample_pairs"]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class PairTensors:
    """Arguments for mopo_loss: S sequences, P pairs, K objectives.

    Attributes:
        response: (S,) the flattened response ``prompt * Y + response`` of each sequence. The first X * Y are 0, 1, 2,
            ...; behind them come second copies of responses that are paired with themselves. Log-probabilities of a
            table are ``table.log_softmax(1).flatten()[response]``.
        prompt_index: (S,) the prompt of each sequence.
        pairs: (P, 2) sequences.
        preference: (P, K), NaN where there is no label.
        pair_weight: (P,) how many pairs each row stands for.
        label_rate: (K,) the share of pairs, by weight, that carry a label of each objective.
    """

    response: Tensor
    prompt_index: Tensor
    pairs: Tensor
    preference: Tensor
    pair_weight: Tensor
    label_rate: Tensor


def _tensors(
    prompt: IntArray, first: IntArray, second: IntArray, label: Array, count: Array, shape: tuple[int, int]
) -> PairTensors:
    prompts, responses = shape
    one, two = prompt * responses + first, prompt * responses + second
    twin = np.unique(one[one == two])
    place = np.where(one == two, prompts * responses + np.searchsorted(twin, two), two)
    response = np.concatenate([np.arange(prompts * responses), twin])
    return PairTensors(
        response=torch.from_numpy(response),
        prompt_index=torch.from_numpy(response // responses),
        pairs=torch.from_numpy(np.stack([one, place], 1)),
        preference=torch.from_numpy(label),
        pair_weight=torch.from_numpy(count),
        label_rate=torch.from_numpy(count @ ~np.isnan(label) / count.sum()),
    )


@dataclasses.dataclass(frozen=True)
class MergedPairs:
    """Distinct labelled pairs (prompt, first <= second, labels) with a count each; fields as in :class:`Pairs`."""

    prompt: IntArray
    first: IntArray
    second: IntArray
    label: Array
    count: Array
    shape: tuple[int, int]

    def tensors(self) -> PairTensors:
        """Tensors for mopo_loss: "regression" and "sigmoid" losses, "pair" and "snis" estimators.

        Not for "cloning" and the "closed_form" estimator: there a response's labels are averaged over rows, whatever
        the pair weights, and a second copy would be a candidate of its own. Take :meth:`Pairs.tensors` of ``distinct``
        pairs.
        """
        return _tensors(self.prompt, self.first, self.second, self.label, self.count, self.shape)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """P labelled pairs.

    Attributes:
        prompt, first, second: (P,) prompts and the responses compared.
        label: (P, K) 1 where ``first`` won, 0 where ``second`` did, 0.5 for a tie, NaN for no label.
        shape: (X, Y).
    """

    prompt: IntArray
    first: IntArray
    second: IntArray
    label: Array
    shape: tuple[int, int]

    def tensors(self) -> PairTensors:
        """Tensors for mopo_loss, one row a pair."""
        return _tensors(self.prompt, self.first, self.second, self.label, np.ones(len(self.prompt)), self.shape)

    def merged(self) -> MergedPairs:
        """The same data in far fewer rows: equal pairs, in either order, become one row with a count.

        A pair says the same when its responses change places and every label z becomes 1 - z, so the weighted loss,
        its gradient and the measured win rates are those of all pairs (see :meth:`MergedPairs.tensors` for where).
        """
        swap = self.first > self.second
        first, second = np.minimum(self.first, self.second), np.maximum(self.first, self.second)
        # Labels 0, 0.5, 1 and none are the digits 0, 1, 2, 3, so that 1 - z is 2 - digit.
        digit = np.nan_to_num(2 * self.label, nan=3).astype(np.int64)
        if not np.array_equal(np.where(digit == 3, np.nan, digit / 2), self.label, equal_nan=True):
            raise ValueError("label must be 0, 0.5, 1 or NaN to be merged")
        digit = np.where(swap[:, None] & (digit < 3), 2 - digit, digit)
        size = (self.shape[0], self.shape[1], self.shape[1], *[4] * self.label.shape[1])
        key, count = np.unique(np.ravel_multi_index((self.prompt, first, second, *digit.T), size), return_counts=True)
        prompt, first, second, *columns = np.unravel_index(key, size)
        digit = np.stack(columns, 1)
        return MergedPairs(
            prompt, first, second, np.where(digit == 3, np.nan, digit / 2), count.astype(np.float64), self.shape
        )


def population_pairs(structure: Structure) -> MergedPairs:
    """All pairs with the probability of each as its count and the preferences themselves as labels.

    The limit of infinitely many pairs for whatever is linear in the labels: gradients of the regression and sigmoid
    losses, measured win rates.
    """
    prompts, responses = structure.behaviour.shape
    prompt, first, second = (index.ravel() for index in np.indices((prompts, responses, responses)))
    behaviour = structure.behaviour
    count = structure.prompt_weight[prompt] * behaviour[prompt, first] * behaviour[prompt, second]
    label = structure.preference[:, prompt, first, second].T.copy()
    seen = (first <= second) & (count > 0)
    count[first < second] *= 2
    return MergedPairs(prompt[seen], first[seen], second[seen], label[seen], count[seen], (prompts, responses))


def sample_pairs(
    structure: Structure,
    count: int,
    seed: int,
    *,
    missing: float = 0.0,
    one_objective: bool = False,
    label_noise: float = 0.0,
    distinct: bool = False,
) -> Pairs:
    """Draw labelled pairs: a prompt, two responses from the behaviour policy, one label an objective.

    Prompts, responses, labels, noise and gaps have a stream of random numbers each: with the same seed the options
    change nothing but what they are about.

    Args:
        structure: what to draw from. Labels are Bernoulli draws with the preference's probability, except that where it
            is exactly 1/2 and the structure has ``observed_ties`` they are 0.5.
        count: number of pairs P.
        seed: any integer >= 0.
        missing: probability that a label is absent (NaN), each on its own.
        one_objective: each pair keeps the label of one objective only, any with the same probability.
        label_noise: probability that a label is flipped, each on its own.
        distinct: draw both responses again while they are equal, since data sets rarely compare a response with itself;
            importance-weighted win rates are then biased (see above), the population minimisers of the losses are not.

    Raises:
        ValueError: a probability is outside [0, 1], ``count`` is negative, or ``distinct`` is asked of a prompt with
            one response only.
    """
    for name, value in (("missing", missing), ("label_noise", label_noise)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be a probability in [0, 1], got {value}")
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(6)]
    for_prompt, for_response, for_label, for_noise, for_missing, for_objective = streams
    objectives, prompts, responses, _ = structure.preference.shape

    prompt = for_prompt.choice(prompts, count, p=structure.prompt_weight)
    cumulative = structure.behaviour.cumsum(1)
    cumulative /= cumulative[:, -1:]

    def draw(of: IntArray) -> IntArray:
        return (for_response.random(len(of))[:, None] >= cumulative[of, :-1]).sum(1)

    first, second = draw(prompt), draw(prompt)
    if distinct:
        if (structure.behaviour == 1).any():
            raise ValueError("distinct must be False where the behaviour has one response only")
        while len(again := np.flatnonzero(first == second)):
            first[again], second[again] = draw(prompt[again]), draw(prompt[again])

    probability = structure.preference[:, prompt, first, second].T
    label = (for_label.random((count, objectives)) < probability).astype(np.float64)
    if structure.observed_ties:
        label[probability == 0.5] = 0.5
    if label_noise > 0:
        label = np.where(for_noise.random((count, objectives)) < label_noise, 1 - label, label)
    if one_objective:
        label[for_objective.integers(objectives, size=(count, 1)) != np.arange(objectives)] = np.nan
    if missing > 0:
        label[for_missing.random((count, objectives)) < missing] = np.nan
    return Pairs(prompt, first, second, label, (prompts, responses))
