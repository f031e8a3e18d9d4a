"""Thresholds: what they may be, and what is said of those that cannot be met."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class UnmetThreshold:
    """A threshold that is not met. In training its multiplier is at its maximum, and ``best_seen`` is the largest value
    since it was last met, if it ever was, so it lies below the threshold. On labels ``best_seen`` is the value at the
    multipliers that were found."""

    objective: str
    threshold: float
    best_seen: float
    multiplier: float

    def __str__(self) -> str:
        return (
            f"threshold {wanted(self.objective, self.threshold)} cannot be met: best seen {self.best_seen:.3f} "
            f"(multiplier at its maximum {self.multiplier:g})"
        )


class ThresholdError(RuntimeError):
    """Thresholds cannot be met; ``unmet`` says which. ``message``: in words, where they are not those of ``unmet``."""

    def __init__(self, unmet: Sequence[UnmetThreshold], message: str | None = None) -> None:
        self.unmet = tuple(unmet)
        super().__init__("; ".join(map(str, self.unmet)) if message is None else message)

    def __reduce__(self) -> tuple[type[ThresholdError], tuple[tuple[UnmetThreshold, ...], str]]:
        return type(self), (self.unmet, str(self))


def wanted(objective: str, threshold: float) -> str:
    digits = 2 if round(threshold, 2) == threshold else 4
    return f"{objective} >= {threshold:.{digits}f}"


def check_objectives(objectives: Sequence[str], primary: str) -> tuple[str, ...]:
    names = tuple(objectives)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"objectives: expected one or more distinct names; got {list(names)}")
    if primary not in names:
        raise ValueError(f"primary: expected one of the objectives {list(names)}; got {primary!r}")
    return names


def check_thresholds(names: Sequence[str], primary: str, thresholds: Mapping[str, float]) -> dict[str, float]:
    for name, bound in thresholds.items():
        if name not in names:
            raise ValueError(f"thresholds: expected objectives among {list(names)}; got one for {name!r}")
        if name == primary:
            raise ValueError(
                f"thresholds: expected none for the primary objective {name!r}, which is maximised; got {bound}"
            )
        if not 0 <= bound <= 1:
            raise ValueError(f"thresholds: expected a number in [0, 1]; got {bound} for {name!r}")
    return {name: float(thresholds[name]) for name in names if name in thresholds}


def check_maximum(maximum: float) -> float:
    if not (math.isfinite(maximum) and maximum > 0):
        raise ValueError(f"maximum: expected a finite multiplier > 0; got {maximum}")
    return float(maximum)
