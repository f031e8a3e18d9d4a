"""Finite constrained problems: what the exact solvers take, validated."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


def _array(name: str, value: npt.ArrayLike, shape: tuple[int | None, ...]) -> Array:
    """``value`` as a fp64 array whose shape matches ``shape`` (None: any size)."""
    array = np.array(value, dtype=np.float64)
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        expected = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{name}: expected shape {expected}; got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one entry; got shape {array.shape}")
    return array


def _distribution(name: str, value: npt.ArrayLike, shape: tuple[int | None, ...]) -> Array:
    """``value`` as an array of probabilities whose last axis sums to one exactly as far as rounding allows."""
    array = _array(name, value, shape)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"{name}: expected finite probabilities >= 0; got {array[~(array >= 0)][:1]}")
    total = array.sum(-1, keepdims=True)
    if (np.abs(total - 1) > 1e-5).any():
        worst = float(total.flat[np.argmax(np.abs(total - 1))])
        raise ValueError(f"{name}: expected probabilities that sum to 1 over the last axis; got a sum of {worst}")
    return array / total


class TabularProblem:
    """A finite constrained problem, validated. Its win rates are eq. (1) of docs/method.md.

    Give either ``preference`` and ``behaviour``, or ``win_rate``. Prompts with fewer than Y candidates are padded: a
    response whose reference probability is zero can never be chosen, and its entries of ``win_rate`` (or of
    ``preference``, where its behaviour probability is zero too) are ignored and may be NaN.

    Args:
        preference: (K, X, Y, Y), ``preference[k, x, y, z] = P(y beats z)`` in [0, 1]; opposite entries sum to 1.
        behaviour: (X, Y) probabilities of the policy that wrote the responses.
        reference: (X, Y) probabilities of the reference policy; zero marks a response that is not available.
        tau: strength of the KL term, in win-rate units per nat, > 0.
        thresholds: ``{objective index: lowest allowed win rate in [0, 1]}``; the primary cannot have one.
        primary: index of the objective to maximise.
        prompt_weight: (X,) prompt probabilities up to scale; uniform by default.
        robustness: radius in nats of the KL ball of the robust constraint (see :func:`robust_value`); 0 turns it off.
            Its price grows quickly: 0.15, which the method's paper quotes, makes thresholds near parity infeasible on
            pools as small as 8 candidates, because already the reference policy itself is worth far less than its
            average there.
        win_rate: (K, X, Y), the ``s_k(x, y)`` themselves, in [0, 1].

    Raises:
        ValueError: an argument is missing, has the wrong shape, or is out of range.
    """

    def __init__(
        self,
        preference: npt.ArrayLike | None = None,
        behaviour: npt.ArrayLike | None = None,
        reference: npt.ArrayLike | None = None,
        tau: float | None = None,
        thresholds: Mapping[int, float] | None = None,
        primary: int = 0,
        prompt_weight: npt.ArrayLike | None = None,
        robustness: float = 0.0,
        *,
        win_rate: npt.ArrayLike | None = None,
    ) -> None:
        if reference is None:
            raise ValueError("reference: expected an (X, Y) array of probabilities; got None")
        self.reference: Array = _distribution("reference", reference, (None, None))
        prompts, responses = self.reference.shape
        self.support: BoolArray = self.reference > 0
        if win_rate is not None and preference is None and behaviour is None:
            rate = _array("win_rate", win_rate, (None, prompts, responses))
        elif win_rate is None and preference is not None and behaviour is not None:
            rate = _win_rate(
                _array("preference", preference, (None, prompts, responses, responses)),
                _distribution("behaviour", behaviour, (prompts, responses)),
                self.support,
            )
        else:
            given = [
                name
                for name, value in (("preference", preference), ("behaviour", behaviour), ("win_rate", win_rate))
                if value is not None
            ]
            raise ValueError(f"preference, behaviour, win_rate: expected the first two, or win_rate alone; got {given}")
        rate[:, ~self.support] = 0.0
        within = (rate >= 0) & (rate <= 1)
        if not within.all():
            raise ValueError(f"win_rate: expected a number in [0, 1] where reference > 0; got {rate[~within][0]}")
        self.win_rate: Array = rate
        if tau is None or not (np.isfinite(tau) and tau > 0):
            raise ValueError(f"tau: expected a finite number > 0; got {tau}")
        self.tau = float(tau)
        objectives = rate.shape[0]
        if not 0 <= primary < objectives:
            raise ValueError(f"primary: expected an objective index in 0..{objectives - 1}; got {primary}")
        self.primary = int(primary)
        self.thresholds = _thresholds(thresholds or {}, objectives, self.primary)
        if prompt_weight is None:
            prompt_weight = np.ones(prompts)
        weight = _array("prompt_weight", prompt_weight, (prompts,))
        if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.sum() > 0):
            wrong = weight[~(np.isfinite(weight) & (weight >= 0))]
            raise ValueError(
                f"prompt_weight: expected finite weights >= 0, not all zero; got {wrong[0] if wrong.size else 'zeros'}"
            )
        self.prompt_weight: Array = weight / weight.sum()
        if not (np.isfinite(robustness) and robustness >= 0):
            raise ValueError(f"robustness: expected a finite radius >= 0 in nats; got {robustness}")
        self.robustness = float(robustness)

    def with_thresholds(self, thresholds: Mapping[int, float]) -> TabularProblem:
        """The same problem with other ``thresholds``, sharing this one's arrays.

        Raises:
            ValueError: a threshold is for the primary or no objective, or is outside [0, 1].
        """
        changed = copy.copy(self)
        changed.thresholds = _thresholds(thresholds, len(self.win_rate), self.primary)
        return changed

    def value(self, policy: Array) -> Array:
        """(K,) win rates of a policy (X, Y)."""
        return np.asarray(np.einsum("kxy,xy->kx", self.win_rate, policy) @ self.prompt_weight, dtype=np.float64)


def _thresholds(thresholds: Mapping[int, float], objectives: int, primary: int) -> dict[int, float]:
    """``thresholds`` checked and in the order of the objectives."""
    checked = {}
    for index, bound in sorted(thresholds.items()):
        if not 0 <= index < objectives:
            raise ValueError(f"thresholds: expected objectives 0..{objectives - 1}; got one for {index}")
        if index == primary:
            raise ValueError(f"thresholds: expected none for the primary objective {primary}; got {bound} for it")
        if not 0 <= bound <= 1:
            raise ValueError(f"thresholds: expected a number in [0, 1]; got {bound} for objective {index}")
        checked[int(index)] = float(bound)
    return checked


def _win_rate(preference: Array, behaviour: Array, support: BoolArray) -> Array:
    """``s_k(x, y)`` (K, X, Y) from preferences (K, X, Y, Y); entries of unavailable responses are not looked at."""
    seen = behaviour > 0
    needed = support[:, :, None] & seen[:, None, :]
    paired = needed & needed.transpose(0, 2, 1)
    preference[:, ~needed] = 0.0
    if not ((preference >= 0) & (preference <= 1)).all():
        bad = preference[~((preference >= 0) & (preference <= 1))][0]
        raise ValueError(f"preference: expected a number in [0, 1]; got {bad}")
    defect = np.where(paired, np.abs(preference + preference.swapaxes(2, 3) - 1), 0.0)
    if (defect > 1e-5).any():
        k, x, y, z = (int(i) for i in np.unravel_index(np.argmax(defect), defect.shape))
        raise ValueError(
            "preference: expected [k, x, y, z] and [k, x, z, y] to sum to 1; "
            f"got {preference[k, x, y, z] + preference[k, x, z, y]} at [{k}, {x}, {y}, {z}]"
        )
    return np.clip(np.einsum("kxyz,xz->kxy", preference, behaviour), 0.0, 1.0)
