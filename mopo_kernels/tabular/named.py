"""A finite problem whose objectives have names, and the labels that it may come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mopo_kernels.functional import mopo_loss
from mopo_kernels.tabular.problem import Array, IntArray, TabularProblem


@dataclasses.dataclass(frozen=True)
class PairLabels:
    """The labelled pairs that a problem was made from.

    pairs: (P, 2) responses, counted over the available ones of all prompts. preference: (P, K), NaN for no label.
    weight: (P,).
    """

    pairs: IntArray
    preference: Array
    weight: Array


@dataclasses.dataclass(frozen=True)
class NamedProblem:
    """A problem without thresholds, the names of its K objectives, and the thresholds chosen for some of them.

    labels: where the win rates were measured on pairs.
    """

    problem: TabularProblem
    objectives: tuple[str, ...]
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    labels: PairLabels | None = None

    @property
    def primary(self) -> str:
        """The name of the maximised objective."""
        return self.objectives[self.problem.primary]

    @property
    def others(self) -> list[int]:
        """The objectives that can have a threshold."""
        return [k for k in range(len(self.objectives)) if k != self.problem.primary]

    @property
    def bounds(self) -> dict[int, float]:
        """The chosen thresholds by objective index."""
        return {self.objectives.index(name): bound for name, bound in self.thresholds.items()}

    def with_bounds(self, bounds: Mapping[int, float]) -> TabularProblem:
        """The problem under thresholds by objective index."""
        return self.problem.with_thresholds(bounds)

    def with_thresholds(self, thresholds: Mapping[str, float], argument: str = "thresholds") -> NamedProblem:
        """The same with other thresholds, in the order of the objectives. ``argument``: their name in messages.

        Raises:
            ValueError: a threshold is for the primary or no objective, or is outside [0, 1].
        """
        for name, bound in thresholds.items():
            objective_index(argument, name, self.objectives)
            if name == self.primary:
                raise ValueError(
                    f"{argument}: expected none for the primary objective {name!r}, which is maximised; got {bound}"
                )
            if not 0 <= bound <= 1:
                raise ValueError(f"{argument}: expected win rates in [0, 1]; got {bound} for {name!r}")
        ordered = {name: thresholds[name] for name in self.objectives if name in thresholds}
        return dataclasses.replace(self, thresholds=ordered)

    def pair_satisfaction(self, policy: Array) -> Array:
        """(K,) what the estimator "pair", the trainer's default, measures of a policy (X, Y) on the labels."""
        assert self.labels is not None
        support = self.problem.support
        ratio = np.log(np.maximum(policy[support], 1e-300)) - np.log(self.problem.reference[support])
        log_ratio = torch.from_numpy(ratio)
        output = mopo_loss(
            log_ratio,
            torch.zeros_like(log_ratio),
            torch.from_numpy(self.labels.pairs),
            torch.from_numpy(self.labels.preference),
            torch.ones(len(self.objectives), dtype=torch.float64),
            tau=self.problem.tau,
            pair_weight=torch.from_numpy(self.labels.weight),
            estimator="pair",
        )
        return np.asarray(output.satisfaction, dtype=np.float64)


def objective_index(argument: str, name: object, objectives: Sequence[str]) -> int:
    """The place of an objective. ``argument``: where the name was given, for the message.

    Raises:
        ValueError: there is no such objective.
    """
    if name not in objectives:
        raise ValueError(f"{argument}: expected an objective of {', '.join(objectives)}; got {name!r}")
    return list(objectives).index(str(name))
