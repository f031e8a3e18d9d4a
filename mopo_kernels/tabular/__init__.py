"""Finite MOPO problems, solved exactly: one problem, its Pareto front, and what any policy could attain.

``solve`` minimises the dual of one problem to machine precision; ``pareto_front`` does so over a grid of thresholds;
``linear_front`` is the front without the KL term, by linear programming.
"""

from __future__ import annotations

from mopo_kernels.tabular.front import (
    LinearFront,
    ParetoFront,
    hypervolume,
    linear_front,
    nondominated,
    pareto_front,
)
from mopo_kernels.tabular.named import NamedProblem, PairLabels
from mopo_kernels.tabular.problem import TabularProblem
from mopo_kernels.tabular.robust import robust_value
from mopo_kernels.tabular.solver import TabularSolution, capped_multipliers, solve

__all__ = [
    "LinearFront",
    "NamedProblem",
    "PairLabels",
    "ParetoFront",
    "TabularProblem",
    "TabularSolution",
    "capped_multipliers",
    "hypervolume",
    "linear_front",
    "nondominated",
    "pareto_front",
    "robust_value",
    "solve",
]
