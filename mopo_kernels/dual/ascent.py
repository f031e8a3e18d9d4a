"""Multipliers that move during training: one plain projected step of the dual per optimiser step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mopo_kernels.dual.thresholds import UnmetThreshold, check_maximum, check_objectives, check_thresholds


def _floats(name: str, value: torch.Tensor | Sequence[float], size: int) -> list[float]:
    tensor = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
    if tuple(tensor.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},), one entry an objective; got {tuple(tensor.shape)}")
    return [float(entry) for entry in tensor.to("cpu", torch.float64).tolist()]


class DualAscent:
    """Multipliers under ``lambda_k <- clip(lambda_k + lr * (b_k - satisfaction_k), 0, maximum)``.

    The gradient of the dual with respect to ``lambda_k`` is ``satisfaction_k - b_k``, so this is projected gradient
    descent on it: a multiplier grows while its objective is below its threshold and shrinks otherwise: eq. (9) of
    docs/method.md. All state is held as double-precision Python numbers, so it survives a checkpoint exactly.

    Args:
        objectives: names of the K objectives, in the order of the labels' columns.
        primary: the objective to maximise; its weight is 1.
        thresholds: lowest allowed satisfaction in [0, 1], by objective, on the scale of the estimator in use.
            Objectives that are neither primary nor constrained are merely monitored: their weight is 0.
        lr: step size, multiplier units per unit of satisfaction, > 0.
        maximum: cap on every multiplier, > 0.
        warmup_steps: number of first updates that feed the smoothing but move no multiplier.
        smoothing: decay in [0, 1) of the exponential moving average of the satisfaction, bias-corrected, so that the
            first value counts fully; 0 uses each measurement as it is.
        initial: multipliers to start from, by constrained objective; 0 where not given.
        patience: updates in a row that a multiplier must spend at ``maximum`` with its threshold unmet before
            :meth:`unmet` reports it.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        primary: str,
        thresholds: Mapping[str, float],
        lr: float,
        maximum: float,
        warmup_steps: int = 0,
        smoothing: float = 0.0,
        initial: Mapping[str, float] | None = None,
        *,
        patience: int = 50,
    ) -> None:
        self.objectives = check_objectives(objectives, primary)
        self.primary = primary
        self._threshold = check_thresholds(self.objectives, primary, thresholds)
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr: expected a finite step size > 0; got {lr}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected a number >= 0; got {warmup_steps}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: expected a number in [0, 1); got {smoothing}")
        if patience < 1:
            raise ValueError(f"patience: expected a number >= 1; got {patience}")
        self.lr = float(lr)
        self.maximum = check_maximum(maximum)
        self.warmup_steps = int(warmup_steps)
        self.smoothing = float(smoothing)
        self.patience = int(patience)
        self._multiplier = dict.fromkeys(self._threshold, 0.0)
        self._set_multipliers("initial", initial or {})
        self._average = dict.fromkeys(self.objectives, 0.0)
        self._average_weight = dict.fromkeys(self.objectives, 0.0)
        self._best_seen: dict[str, float | None] = dict.fromkeys(self._threshold)
        self._at_maximum = dict.fromkeys(self._threshold, 0)
        self._steps = 0

    def _set_multipliers(self, argument: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self._threshold:
                raise ValueError(
                    f"{argument}: expected objectives with a threshold, {list(self._threshold)}; got one for {name!r}"
                )
            if not 0 <= value <= self.maximum:
                raise ValueError(f"{argument}: expected a number in [0, {self.maximum:g}]; got {value} for {name!r}")
            self._multiplier[name] = float(value)

    @property
    def weight(self) -> torch.Tensor:
        """(K,) fp32: 1 for the primary, the multiplier of each constrained objective, 0 for the others."""
        entries = [1.0 if name == self.primary else self._multiplier.get(name, 0.0) for name in self.objectives]
        return torch.tensor(entries, dtype=torch.float32)

    @property
    def steps(self) -> int:
        """Updates made so far, warm-up included."""
        return self._steps

    @property
    def multiplier(self) -> dict[str, float]:
        """Multiplier of each objective that has a threshold."""
        return dict(self._multiplier)

    @property
    def threshold(self) -> dict[str, float]:
        """Threshold of each objective that has one."""
        return dict(self._threshold)

    @property
    def smoothed(self) -> dict[str, float]:
        """Smoothed satisfaction of every objective measured so far."""
        return {name: self._average[name] / weight for name, weight in self._average_weight.items() if weight > 0}

    @property
    def slack(self) -> dict[str, float]:
        """Smoothed satisfaction minus threshold, of constrained objectives measured so far; negative is unmet."""
        return {name: value - self._threshold[name] for name, value in self.smoothed.items() if name in self._threshold}

    def update(
        self,
        satisfaction: torch.Tensor | Sequence[float],
        labelled: torch.Tensor | Sequence[float],
        *,
        lr: Mapping[str, float] | None = None,
        margin: Mapping[str, float] | None = None,
    ) -> None:
        """One dual step, eq. (9) of docs/method.md.

        Args:
            satisfaction: (K,) measured satisfaction, averaged over everything that belongs to the optimiser step; NaN
                is expected where ``labelled`` is 0.
            labelled: (K,) how many labels (or how much label weight) each value stands on; objectives with none keep
                their multiplier and their smoothed value.
            lr: step sizes >= 0 of this update, by objective, in place of ``lr``; 0 leaves a multiplier where it is.
            margin: what is aimed at above the threshold in this update, by objective; 0 where not given.

        Raises:
            ValueError: wrong shape, negative ``labelled``, or a satisfaction that is not finite though it has labels.
        """
        values = _floats("satisfaction", satisfaction, len(self.objectives))
        counts = _floats("labelled", labelled, len(self.objectives))
        measured = {}
        for name, value, count in zip(self.objectives, values, counts, strict=True):
            if not count >= 0:
                raise ValueError(f"labelled: expected a number >= 0; got {count} for {name!r}")
            if count > 0 and not math.isfinite(value):
                raise ValueError(f"satisfaction: expected a finite number where labelled > 0; got {value} for {name!r}")
            if count > 0:
                measured[name] = value
        self._steps += 1
        for name, value in measured.items():
            self._average[name] = self.smoothing * self._average[name] + (1 - self.smoothing) * value
            self._average_weight[name] = self.smoothing * self._average_weight[name] + (1 - self.smoothing)
            if name not in self._threshold:
                continue
            smoothed = self._average[name] / self._average_weight[name]
            best = self._best_seen[name]
            if smoothed >= self._threshold[name]:
                self._best_seen[name] = None
            else:
                self._best_seen[name] = smoothed if best is None else max(best, smoothed)
            step = self.lr if lr is None else lr.get(name, self.lr)
            if self._steps <= self.warmup_steps or step == 0:
                continue
            aim = self._threshold[name] if margin is None else self._threshold[name] + margin.get(name, 0.0)
            moved = self._multiplier[name] + step * (aim - smoothed)
            self._multiplier[name] = min(max(moved, 0.0), self.maximum)
            stuck = self._multiplier[name] == self.maximum and smoothed < self._threshold[name]
            self._at_maximum[name] = self._at_maximum[name] + 1 if stuck else 0

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Replace thresholds of objectives that have one, as when the reference moves and thresholds are relaxed.

        What :meth:`unmet` knows about a replaced threshold starts afresh. The relaxation is in eq. (15) of
        docs/method.md.

        Raises:
            ValueError: an objective has no threshold to replace, or a value is outside [0, 1].
        """
        for name in thresholds:
            if name not in self._threshold:
                raise ValueError(
                    f"thresholds: expected objectives that have one, {list(self._threshold)}; got {name!r}"
                )
        for name, bound in check_thresholds(self.objectives, self.primary, thresholds).items():
            self._threshold[name] = bound
            self._best_seen[name] = None
            self._at_maximum[name] = 0

    def unmet(self) -> list[UnmetThreshold]:
        """Thresholds whose multiplier has been at its maximum, unmet, for the last ``patience`` updates.

        Raise :class:`ThresholdError` with them to stop a run.
        """
        found = []
        for name, count in self._at_maximum.items():
            best = self._best_seen[name]
            if count >= self.patience and best is not None:
                found.append(UnmetThreshold(name, self._threshold[name], best, self._multiplier[name]))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`update` has changed, as plain numbers that survive JSON bit for bit."""
        return {
            "objectives": list(self.objectives),
            "primary": self.primary,
            "steps": self._steps,
            "multiplier": dict(self._multiplier),
            "threshold": dict(self._threshold),
            "average": dict(self._average),
            "average_weight": dict(self._average_weight),
            "best_seen": dict(self._best_seen),
            "at_maximum": dict(self._at_maximum),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state made by :meth:`state_dict` of a DualAscent with the same objectives.

        Raises:
            ValueError: the state is of other objectives, another primary or other constrained objectives, lacks a
                field, or has a number that is not finite.
        """
        expected = self.state_dict()
        if missing := sorted(set(expected) - set(state)):
            raise ValueError(f"state: expected the fields {sorted(expected)}; got one without {missing}")
        for field in ("objectives", "primary"):
            if state[field] != expected[field]:
                raise ValueError(f"state: expected {field} {expected[field]!r}; got {state[field]!r}")
        for field in ("multiplier", "threshold", "average", "average_weight", "best_seen", "at_maximum"):
            if set(state[field]) != set(expected[field]):
                raise ValueError(
                    f"state's {field}: expected entries for {sorted(expected[field])}; got {sorted(state[field])}"
                )
            if bad := sorted(
                name for name, value in state[field].items() if value is not None and not math.isfinite(value)
            ):
                raise ValueError(
                    f"state's {field}: expected a finite number; got {state[field][bad[0]]} for {bad[0]!r}"
                )
        self._set_multipliers("state's multiplier", state["multiplier"])
        self._threshold.update(check_thresholds(self.objectives, self.primary, state["threshold"]))
        self._average.update(state["average"])
        self._average_weight.update(state["average_weight"])
        self._best_seen.update(state["best_seen"])
        self._at_maximum.update(state["at_maximum"])
        self._steps = int(state["steps"])
