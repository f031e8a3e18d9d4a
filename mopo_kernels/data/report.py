"""What the labels of a data set say: coverage, agreement between objectives, cycles, and win rates per response."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopo_kernels.data.dataset import PreferenceData, example_key
from mopo_kernels.data.schema import PreferenceExample, response_key

# Two objectives "agree" when hardly a pair sets them against each other and their labels move together: then raising
# one raises the other, and a threshold on it costs nothing. Both conditions, as an objective that mostly ties is never
# in conflict and yet need not rise.
AGREEMENT_CORRELATION = 0.9
AGREEMENT_CONFLICT = 0.02


@dataclass(frozen=True)
class ObjectiveReport:
    """The labels of one objective.

    Args:
        objective: its name.
        labelled: pairs with a label.
        coverage: share of all pairs that have one.
        ties: share of the labelled pairs at exactly 0.5.
        soft: share of the labelled pairs that are neither 0, 0.5 nor 1.
        triples: sets of three responses to a prompt whose three pairs all have a strict winner.
        cycles: how many of the triples go round (a beats b beats c beats a), which no reward model can express.
    """

    objective: str
    labelled: int
    coverage: float
    ties: float
    soft: float
    triples: int
    cycles: int


@dataclass(frozen=True)
class AgreementReport:
    """How two objectives relate on the pairs labelled for both, that is within prompts.

    Args:
        first: name of one objective.
        second: name of the other.
        pairs: pairs labelled for both.
        correlation: sum d_k d_l / sqrt(sum d_k^2 sum d_l^2) with d = z - 1/2, in [-1, 1]; the Pearson correlation once
            every pair is counted in both orientations. None when there is no such pair or one of them always ties.
        conflict: share of the pairs on which they prefer different responses; None when there is no such pair.
    """

    first: str
    second: str
    pairs: int
    correlation: float | None
    conflict: float | None

    @property
    def agree(self) -> bool:
        """Whether a threshold on one costs nothing of the other: what raises one raises both."""
        return (
            self.correlation is not None
            and self.conflict is not None
            and self.correlation >= AGREEMENT_CORRELATION
            and self.conflict <= AGREEMENT_CONFLICT
        )


@dataclass(frozen=True)
class PreferenceReport:
    """Counts and label statistics of a data set; ``messages`` says in words what a user should know.

    Args:
        examples: rows.
        prompts: distinct prompts.
        responses: in all rows.
        pairs: in all rows.
        equal_text_pairs: pairs between two equal texts, on which every policy is indifferent.
        empty_responses: responses without a word, which end a turn of chat at once.
        skipped: rows left out at loading.
        objectives: one report per objective.
        agreement: one report per two objectives.
    """

    examples: int
    prompts: int
    responses: int
    pairs: int
    equal_text_pairs: int
    empty_responses: int
    skipped: int
    objectives: tuple[ObjectiveReport, ...]
    agreement: tuple[AgreementReport, ...]

    @property
    def messages(self) -> tuple[str, ...]:
        """Findings that bear on training."""
        found = []
        if self.skipped:
            found.append(f"{self.skipped} bad rows were left out")
        found += [f"objective {item.objective} has no label at all" for item in self.objectives if not item.labelled]
        if len(self.objectives) == 1:
            found.append("one objective only: there is nothing to constrain, MOPO is IPO here")
        elif all(item.agree for item in self.agreement):
            found.append("objectives agree within prompts: no threshold will cost anything of the primary objective")
        else:
            found += [
                f"{item.first} and {item.second} agree within prompts: a threshold on one will cost nothing of the "
                "other"
                for item in self.agreement
                if item.agree
            ]
        found += [
            f"no pair is labelled for both {item.first} and {item.second}: their agreement cannot be measured, and "
            "regression needs label_rate"
            for item in self.agreement
            if not item.pairs
        ]
        if self.equal_text_pairs:
            found.append(f"{self.equal_text_pairs} pairs are between equal texts: no policy can tell them apart")
        if self.empty_responses:
            found.append(
                f"{self.empty_responses} responses are empty: they are scored where a chat template ends the turn, and "
                "refused where they continue a text"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"messages": list(self.messages)}


class WinRates(NamedTuple):
    """Average win rates of the responses, as ``tabular.TabularProblem`` takes them; X examples, Y responses at most.

    Attributes:
        win_rate: (K, X, Y) float64 in [0, 1], 0 at padding.
        reference: (X, Y) float64, 1/n on each of the n responses of an example, 0 at padding.
        prompt_weight: (X,) float64, the examples' weights, summing to 1.
    """

    win_rate: NDArray[np.float64]
    reference: NDArray[np.float64]
    prompt_weight: NDArray[np.float64]


def _label_matrix(example: PreferenceExample, objective: str) -> NDArray[np.float64]:
    """(n, n) z[i, j] = P(i beats j), averaged over repeated labels, NaN where unlabelled and on the diagonal."""
    count = len(example.responses)
    total, number = np.zeros((count, count)), np.zeros((count, count))
    for pair in example.pairs:
        value = pair.preference.get(objective)
        if value is not None:
            total[pair.i, pair.j] += value
            total[pair.j, pair.i] += 1 - value
            number[pair.i, pair.j] += 1
            number[pair.j, pair.i] += 1
    return np.divide(total, number, out=np.full((count, count), np.nan), where=number > 0)


def win_rates(data: PreferenceData, objectives: Sequence[str] | None = None) -> WinRates:
    """s_k(x, y): how often a response beats one drawn from the data's own, itself included (where it ties).

    With n responses and every pair labelled, ``s_k(x, y) = 1/2 + (1/n) sum_{j != y} (z_yj - 1/2)``. Where labels are
    missing the sum is estimated from the ones there are: ``s_k(x, y) = 1/2 + (n-1)/n mean_{j labelled} (z_yj - 1/2)``,
    which is the same number when none is missing, and 1/2 when y has no label. Repeated labels of a pair are averaged
    first. X counts examples: join those that share a prompt with ``data.group_by_prompt()`` where that matters.

    Args:
        data: the labelled examples.
        objectives: names and order of the K objectives; default ``data.objectives``.

    Returns:
        ``WinRates``, float64.
    """
    names = data.objectives if objectives is None else tuple(objectives)
    examples = list(data)
    width = max(len(example.responses) for example in examples)
    rates = np.zeros((len(names), len(examples), width))
    reference = np.zeros((len(examples), width))
    for x, example in enumerate(examples):
        count = len(example.responses)
        reference[x, :count] = 1 / count
        for k, name in enumerate(names):
            advantage = _label_matrix(example, name) - 0.5
            labelled = np.isfinite(advantage)
            mean = np.where(labelled, advantage, 0).sum(1) / np.maximum(labelled.sum(1), 1)
            rates[k, x, :count] = 0.5 + (count - 1) / count * mean
    weight = np.array([example.weight for example in examples])
    return WinRates(rates, reference, weight / weight.sum())


def _cycles(examples: Iterable[PreferenceExample], objective: str) -> tuple[int, int]:
    """(triples with three strict winners, how many of them are cyclic)."""
    triples = cycles = 0
    for example in examples:
        if len(example.responses) < 3:
            continue
        labels = _label_matrix(example, objective)
        wins = (labels > 0.5).astype(np.int64)
        strict = wins + wins.T
        # The trace of the cube counts closed walks of length 3: each directed triangle thrice, each undirected six
        # times.
        triples += int(np.trace(strict @ strict @ strict)) // 6
        cycles += int(np.trace(wins @ wins @ wins)) // 3
    return triples, cycles


def _agreement(first: str, second: str, advantage: NDArray[np.float64]) -> AgreementReport:
    """From (pairs, 2) advantages z - 1/2, NaN where unlabelled."""
    both = advantage[np.isfinite(advantage).all(1)]
    if not len(both):
        return AgreementReport(first, second, 0, None, None)
    products = both[:, 0] * both[:, 1]
    scale = float(np.sqrt((both[:, 0] ** 2).sum() * (both[:, 1] ** 2).sum()))
    correlation = float(products.sum() / scale) if scale > 0 else None
    return AgreementReport(first, second, len(both), correlation, float((products < 0).mean()))


def summarize(data: PreferenceData, progress: Callable[[], object] | None = None) -> PreferenceReport:
    """Label coverage, ties, cycles, and how strongly the objectives agree within prompts.

    Args:
        data: the labelled examples.
        progress: called once per example read.
    """
    examples = []
    for example in data:
        examples.append(example)
        if progress is not None:
            progress()
    pairs = [(example, pair) for example in examples for pair in example.pairs]
    values = np.array(
        [[pair.preference.get(name) for name in data.objectives] for _, pair in pairs], dtype=np.float64
    ).reshape(len(pairs), len(data.objectives))
    objectives = []
    for k, name in enumerate(data.objectives):
        labels = values[np.isfinite(values[:, k]), k]
        number = max(len(labels), 1)
        ties = int((labels == 0.5).sum())
        hard = int(np.isin(labels, (0.0, 1.0)).sum())
        triples, cycles = _cycles(examples, name)
        objectives.append(
            ObjectiveReport(
                objective=name,
                labelled=len(labels),
                coverage=len(labels) / len(pairs),
                ties=ties / number,
                soft=(len(labels) - ties - hard) / number,
                triples=triples,
                cycles=cycles,
            )
        )
    return PreferenceReport(
        examples=len(examples),
        prompts=len({example_key(example) for example in examples}),
        responses=sum(len(example.responses) for example in examples),
        pairs=len(pairs),
        equal_text_pairs=sum(
            response_key(example.responses[pair.i]) == response_key(example.responses[pair.j])
            for example, pair in pairs
        ),
        empty_responses=sum(not response_key(response) for example in examples for response in example.responses),
        skipped=len(data.skipped),
        objectives=tuple(objectives),
        agreement=tuple(
            _agreement(data.objectives[k], data.objectives[other], values[:, [k, other]] - 0.5)
            for k, other in itertools.combinations(range(len(data.objectives)), 2)
        ),
    )
