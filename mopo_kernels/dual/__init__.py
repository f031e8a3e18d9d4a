"""The multipliers that hold secondary objectives above their thresholds.

:class:`DualAscent` moves them during training, one plain projected step of the dual per optimiser step;
:func:`solve_labels` finds their optimum on a data set's own labels, which is where training starts.
"""

from __future__ import annotations

from mopo_kernels.dual.ascent import DualAscent
from mopo_kernels.dual.label_solver import LabelSolution, solve_labels
from mopo_kernels.dual.thresholds import ThresholdError, UnmetThreshold

__all__ = ["DualAscent", "LabelSolution", "ThresholdError", "UnmetThreshold", "solve_labels"]
