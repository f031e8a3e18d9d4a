"""Canonical preference structures: small, seeded problems whose exact solution is known.

Each structure is a finite problem (X prompts, Y responses, K objectives) with the preferences that pairs are drawn
from, and a default setting. Its thresholds follow from multipliers that are chosen: ``b_k`` is the win rate ``P_k`` of
the closed-form policy for these multipliers, or somewhat less where the multiplier is 0. So the optimum is known
without solving anything, and a threshold binds exactly where its multiplier is positive.

    structure = make("condorcet_within", seed=0)
    solution = tabular.solve(structure.problem())       # solution.multiplier equals structure.multiplier
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_kernels.tabular import TabularProblem

__all__ = ["STRUCTURES", "Structure", "closed_form_policy", "make"]

Array = npt.NDArray[np.float64]

# Prompts and responses of every structure. 8 = 2 ** 3: a language model can spell the responses in three binary tokens.
X, Y = 6, 8


def closed_form_policy(reference: Array, win_rate: Array, weight: npt.ArrayLike, tau: float) -> Array:
    """``reference * exp(sum_k weight_k s_k / tau)``, normalised: (X, Y), (K, X, Y), (K,) -> (X, Y)."""
    with np.errstate(divide="ignore"):
        logit = np.tensordot(np.asarray(weight, dtype=np.float64), win_rate, 1) / tau + np.log(reference)
    policy = np.exp(logit - logit.max(1, keepdims=True))
    return policy / policy.sum(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A finite problem, the preferences behind it, and a default setting.

    Attributes:
        name: identifier, the key in :data:`STRUCTURES`.
        title: name for tables and pictures.
        description: what it is and what it shows.
        objectives: K names.
        primary: index of the objective that is maximised.
        preference: (K, X, Y, Y) ``P(y beats z)``; opposite entries sum to 1, the diagonal is 1/2.
        behaviour: (X, Y) the policy that wrote the responses of the pairs.
        reference: (X, Y) the policy that the KL term holds to.
        prompt_weight: (X,) prompt probabilities.
        tau: strength of the KL term, win-rate units per nat.
        thresholds: ``{objective: lowest allowed win rate}``.
        multiplier: (K,) the multipliers at the optimum for ``tau`` and ``thresholds``: 1 for the primary, 0 where a
            threshold does not bind or is not given.
        features: (X, Y, F) of a restricted policy class ``softmax(features @ theta)``; None: any table.
        observed_ties: a preference of exactly 1/2 is a tie that labellers report as 0.5, not a coin that they toss.
        marked: (X, Y) the responses that the description singles out (the catastrophic ones), or None.
    """

    name: str
    title: str
    description: str
    objectives: tuple[str, ...]
    primary: int
    preference: Array
    behaviour: Array
    reference: Array
    prompt_weight: Array
    tau: float
    thresholds: dict[int, float]
    multiplier: Array
    features: Array | None = None
    observed_ties: bool = False
    marked: npt.NDArray[np.bool_] | None = None

    @property
    def win_rate(self) -> Array:
        """``s_k(x, y)``, the win rate of each response against the behaviour policy, (K, X, Y)."""
        return np.asarray(np.einsum("kxyz,xz->kxy", self.preference, self.behaviour), dtype=np.float64)

    def value(self, policy: Array) -> Array:
        """Win rates ``P_k`` of policies (..., X, Y) against the behaviour policy, (..., K)."""
        return np.asarray(
            np.einsum("kxy,...xy,x->...k", self.win_rate, policy, self.prompt_weight, optimize=True), dtype=np.float64
        )

    def kl(self, policy: Array) -> Array:
        """``E_x KL(policy || reference)`` of policies (..., X, Y), nats, (...)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            term = np.where(policy > 0, policy * np.log(policy / self.reference), 0.0)
        return np.asarray(term.sum(-1) @ self.prompt_weight, dtype=np.float64)

    def class_policy(self, theta: npt.ArrayLike) -> Array:
        """``softmax(features @ theta)``, the policies of the restricted class: theta (..., F) -> (..., X, Y)."""
        if self.features is None:
            raise ValueError(f"{self.name} has no restricted policy class: its features are None")
        logit = np.einsum("xyf,...f->...xy", self.features, np.asarray(theta, dtype=np.float64))
        policy = np.exp(logit - logit.max(-1, keepdims=True))
        return np.asarray(policy / policy.sum(-1, keepdims=True), dtype=np.float64)

    def problem(self, **changes: Any) -> TabularProblem:
        """The problem for :func:`mopo_kernels.tabular.solve`, with ``thresholds``, ``tau``, ... replaced as asked."""
        arguments: dict[str, Any] = {
            "preference": self.preference,
            "behaviour": self.behaviour,
            "reference": self.reference,
            "tau": self.tau,
            "thresholds": self.thresholds,
            "primary": self.primary,
            "prompt_weight": self.prompt_weight,
        }
        return TabularProblem(**(arguments | changes))


# --- ways to make preferences -----------------------------------------------------------------------------------------


def _bradley_terry(score: Array) -> Array:
    """``sigmoid(u(y) - u(z))``: scores (..., X, Y) -> (..., X, Y, Y)."""
    # tanh makes opposite entries sum to 1 to the last bit, and the diagonal exactly 1/2.
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * (score[..., :, None] - score[..., None, :])), dtype=np.float64)


def _linear(score: Array) -> Array:
    """``1/2 + (u(y) - u(z)) / 2``, scores in [0, 1]: win rates are then linear in the scores, (..., X, Y, Y)."""
    return np.asarray(0.5 + 0.5 * (score[..., :, None] - score[..., None, :]), dtype=np.float64)


def _order(rank: Array) -> Array:
    """1 where ``rank(y) > rank(z)``, 0 where it is less, 1/2 where equal: (..., X, Y) -> (..., X, Y, Y)."""
    return np.asarray(0.5 + 0.5 * np.sign(rank[..., :, None] - rank[..., None, :]), dtype=np.float64)


def _distribution(rng: np.random.Generator, *shape: int) -> Array:
    """Random probabilities over the last axis, none below half of uniform."""
    random = rng.dirichlet(np.full(shape[-1], 3.0), shape[:-1])
    return np.asarray(0.5 * random + 0.5 / shape[-1], dtype=np.float64)


def _structure(
    name: str,
    *,
    title: str,
    description: str,
    objectives: tuple[str, ...],
    preference: Array,
    behaviour: Array,
    prompt_weight: Array,
    multiplier: Mapping[int, float],
    reference: Array | None = None,
    slack: Mapping[int, float] | None = None,
    tau: float = 0.1,
    **other: Any,
) -> Structure:
    """A structure whose primary is objective 0 and whose thresholds follow from the multipliers, less ``slack``."""
    reference = behaviour if reference is None else reference
    weight = np.zeros(len(objectives))
    weight[0] = 1.0
    weight[list(multiplier)] = list(multiplier.values())
    win_rate = np.einsum("kxyz,xz->kxy", preference, behaviour)
    policy = closed_form_policy(reference, win_rate, weight, tau)
    value = np.einsum("kxy,xy,x->k", win_rate, policy, prompt_weight)
    thresholds = {k: float(value[k] - (slack or {}).get(k, 0.0)) for k in multiplier}
    return Structure(
        name=name,
        title=title,
        description=description,
        objectives=objectives,
        primary=0,
        preference=preference,
        behaviour=behaviour,
        reference=reference,
        prompt_weight=prompt_weight,
        tau=tau,
        thresholds=thresholds,
        multiplier=weight,
        **other,
    )


# --- the structures ---------------------------------------------------------------------------------------------------


def _bradley_terry_agreeing(rng: np.random.Generator) -> Structure:
    quality = rng.normal(size=(X, Y))
    scale = np.array([1.2, 0.8])[:, None, None]
    return _structure(
        "bradley_terry_agreeing",
        title="Bradley-Terry, agreeing",
        description="Two objectives score responses by the same quality. Maximising one serves the other, so no "
        "constraint binds and the problem is a single-objective one.",
        objectives=("helpful", "clear"),
        preference=_bradley_terry(scale * quality),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.0},
        slack={1: 0.03},
    )


def _bradley_terry_opposed(rng: np.random.Generator) -> Structure:
    quality = rng.normal(size=(X, Y))
    # Where much is at stake for one objective, little is for the other: that is what there is to gain from trading.
    stake = rng.permutation(np.linspace(0.5, 1.5, X))
    return _structure(
        "bradley_terry_opposed",
        title="Bradley-Terry, opposed",
        description="On every pair of responses the two objectives disagree. The constraint binds and the front is a "
        "trade-off from end to end; both gain on the reference only because the stakes differ between prompts.",
        objectives=("detailed", "brief"),
        preference=_bradley_terry(np.stack([stake, stake - 2])[:, :, None] * quality),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.7},
    )


def _bradley_terry_independent(rng: np.random.Generator) -> Structure:
    return _structure(
        "bradley_terry_independent",
        title="Bradley-Terry, independent",
        description="Three objectives with independent scores: the ordinary case. Both constraints bind.",
        objectives=("helpful", "harmless", "honest"),
        preference=_bradley_terry(rng.normal(size=(3, X, Y))),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.7, 2: 0.4},
    )


def _shifted_reference(rng: np.random.Generator) -> Structure:
    return _structure(
        "shifted_reference",
        title="Reference is not the behaviour",
        description="Bradley-Terry preferences where another policy than the reference wrote the responses. The loss "
        "is as exact as elsewhere; self-normalised importance weights against the reference are biased.",
        objectives=("helpful", "harmless"),
        preference=_bradley_terry(rng.normal(size=(2, X, Y))),
        behaviour=_distribution(rng, X, Y),
        reference=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.7},
    )


def _total_orders(rng: np.random.Generator) -> Structure:
    rank = rng.permuted(np.broadcast_to(np.arange(1.0 * Y), (2, X, Y)), axis=-1)
    return _structure(
        "total_orders",
        title="Deterministic total orders",
        description="Each objective ranks the responses of a prompt strictly and every label follows the ranking. "
        "Bradley-Terry scores would be infinite; win rates are not.",
        objectives=("first", "second"),
        preference=_order(rank),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.7},
        tau=0.25,
    )


def _partial_orders(rng: np.random.Generator) -> Structure:
    shared, rich, lean = _order(rng.random((3, X, Y)))
    # The mean of two strict orders is 1 where a response is better in both, 0 where worse, 1/2 where they disagree.
    preference = np.stack([(shared + rich) / 2, (shared.swapaxes(1, 2) + lean) / 2])
    return _structure(
        "partial_orders",
        title="Partial orders with ties",
        description="A response beats another only if it is better in both of two traits, otherwise labellers report "
        "a tie (0.5). The objectives pull one shared trait in opposite directions. Being tied is not transitive.",
        objectives=("rich", "lean"),
        preference=preference,
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.7},
        tau=0.15,
        observed_ties=True,
    )


def _condorcet_within(rng: np.random.Generator) -> Structure:
    place = rng.permuted(np.broadcast_to(np.arange(Y), (X, Y)), axis=-1)
    ahead = (place[:, None, :] - place[:, :, None]) % Y
    # Each response beats the three that follow it on a circle and loses to the three before it, however good they are.
    cycle = 0.3 * (np.isin(ahead, (1, 2, 3)) * 1.0 - np.isin(ahead, (5, 6, 7)))
    cyclic = 0.5 + cycle + 0.4 * (_linear(rng.random((X, Y))) - 0.5)
    return _structure(
        "condorcet_within",
        title="Condorcet cycle within an objective",
        description="On every prompt the primary's preferences run in a circle (a beats b beats c beats a), so no "
        "scores reproduce them. Win rates exist all the same and least squares finds their policy.",
        objectives=("cyclic", "safe"),
        preference=np.stack([cyclic, _bradley_terry(rng.normal(size=(X, Y)))]),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.4},
        tau=0.05,
    )


def _condorcet_across(rng: np.random.Generator) -> Structure:
    # Three groups a, b, c of responses; the objectives rank them a b c, b c a and c a b.
    score = np.array([[1.0, 0.0, -1.0], [-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]])
    group = rng.permuted(np.broadcast_to(np.arange(Y) % 3, (X, Y)), axis=-1)
    noise = 0.1 * rng.uniform(-1, 1, size=(3, X, Y))
    return _structure(
        "condorcet_across",
        title="Condorcet cycle across objectives",
        description="Each of three objectives is Bradley-Terry, but they rank three groups of responses a b c, b c a "
        "and c a b: two of three prefer a to b, b to c and c to a, so no vote between them has a winner.",
        objectives=("first", "second", "third"),
        preference=_bradley_terry(score[:, group] + noise),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.5, 2: 0.7},
    )


def _flat_objective(rng: np.random.Generator) -> Structure:
    score = rng.normal(size=(3, X, Y))
    score[2] = 0.0
    return _structure(
        "flat_objective",
        title="One objective flat",
        description="The third objective is indifferent between all responses: its win rate is 1/2 under any policy, "
        "its multiplier is 0 and a threshold above 1/2 cannot be met.",
        objectives=("helpful", "harmless", "indifferent"),
        preference=_bradley_terry(score),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.7, 2: 0.0},
        slack={2: 0.05},
    )


def _rare_catastrophe(rng: np.random.Generator) -> Structure:
    rate = 0.03
    marked = np.arange(Y) == rng.integers(Y, size=(X, 1))
    helpful = np.where(marked, 3.0, 0.6 * rng.normal(size=(X, Y)))
    behaviour = rng.dirichlet(np.full(Y, 10.0), X)
    behaviour[marked] = 0.0
    behaviour *= (1 - rate) / behaviour.sum(1, keepdims=True)
    behaviour[marked] = rate
    return _structure(
        "rare_catastrophe",
        title="Rare catastrophic responses",
        description="On every prompt one response in 33 is catastrophic, and it is the most helpful one. It loses "
        "every safety comparison; all others are equally safe. The unconstrained optimum picks it, the constrained one "
        "does not.",
        objectives=("helpful", "safe"),
        preference=np.stack([_bradley_terry(helpful), _order(-1.0 * marked)]),
        behaviour=behaviour,
        prompt_weight=_distribution(rng, X),
        multiplier={1: 1.0},
        marked=marked,
    )


def _many_objectives(rng: np.random.Generator) -> Structure:
    return _structure(
        "many_objectives",
        title="Eight objectives",
        description="Eight objectives with independent scores and seven thresholds, four of which bind.",
        objectives=tuple(f"objective {k}" for k in range(8)),
        preference=_bradley_terry(rng.normal(size=(8, X, Y))),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2, 5: 0.0, 6: 0.0, 7: 0.0},
        slack={5: 0.02, 6: 0.03, 7: 0.04},
    )


def _flat_faces(rng: np.random.Generator) -> Structure:
    # Three corners and five responses below the faces between them, in scores that win rates are linear in.
    corners = [[1.0, 0.0], [0.75, 0.65], [0.0, 1.0]]
    points = np.array([*corners, [0.45, 0.25], [0.2, 0.5], [0.3, 0.3], [0.6, 0.1], [0.1, 0.7]])
    order = rng.permuted(np.broadcast_to(np.arange(Y), (X, Y)), axis=-1)
    score = points[order].transpose(2, 0, 1)
    first, middle = points[0], points[1]
    return _structure(
        "flat_faces",
        title="Front with flat faces",
        description="Every prompt offers the same trade: without the KL term the front is two straight faces between "
        "three corners. A weighted sum lands on a corner and jumps to the next one; a threshold reaches every point "
        "in between.",
        objectives=("helpful", "safe"),
        preference=_linear(score),
        behaviour=_distribution(rng, X, Y),
        prompt_weight=_distribution(rng, X),
        # The slope of the first face, at which its two corners tie.
        multiplier={1: float((first[0] - middle[0]) / (middle[1] - first[1]))},
        tau=0.05,
    )


def _restricted_class(rng: np.random.Generator) -> Structure:
    # Responses 0 and 1 are the best for one objective and the worst for the other, which mirrors it; 2 and 3 the other
    # way round. 4 to 7 lie between them, but below their average.
    good, poor = rng.uniform(1.5, 2.0, (X, 2)), rng.uniform(-1.4, -1.1, (X, 2))
    middling = rng.uniform(-0.7, -0.5, (X, 4))
    score = np.stack([np.hstack([good, poor, middling]), np.hstack([poor, good, middling])])
    feature = np.array([[1, 0], [1, 0], [-1, 0], [-1, 0], [0, 1], [0, -1], [0, 0.5], [0, -0.5]])
    return _structure(
        "restricted_class",
        title="Restricted policy class",
        description="Policies softmax(features @ theta) with two features, of which the first leads from one good "
        "response to the other through middling ones. The attainable set is not convex: without the KL term every "
        "weighted sum runs to one of the two ends, and with it there still is a jump, while thresholds reach the "
        "points between.",
        objectives=("helpful", "safe"),
        preference=_bradley_terry(score),
        # Uniform, so that the reference is in the class.
        behaviour=np.full((X, Y), 1 / Y),
        prompt_weight=_distribution(rng, X),
        multiplier={1: 0.8},
        tau=0.08,
        features=np.tile(feature, (X, 1, 1)),
    )


_MAKERS: tuple[Callable[[np.random.Generator], Structure], ...] = (
    _bradley_terry_agreeing,
    _bradley_terry_opposed,
    _bradley_terry_independent,
    _total_orders,
    _partial_orders,
    _condorcet_within,
    _condorcet_across,
    _flat_objective,
    _rare_catastrophe,
    _many_objectives,
    _flat_faces,
    _restricted_class,
    _shifted_reference,
)


def _seeded(name: str, maker: Callable[[np.random.Generator], Structure]) -> Callable[[int], Structure]:
    def from_seed(seed: int) -> Structure:
        # The name is part of the seed: structures of one seed are not made of the same draws.
        return maker(np.random.default_rng([zlib.crc32(name.encode()), seed]))

    return from_seed


STRUCTURES: dict[str, Callable[[int], Structure]] = {
    maker.__name__[1:]: _seeded(maker.__name__[1:], maker) for maker in _MAKERS
}


def make(name: str, seed: int = 0) -> Structure:
    """The structure called ``name``; the same seed gives the same numbers."""
    if name not in STRUCTURES:
        raise ValueError(f"name must be one of {', '.join(STRUCTURES)}, got {name!r}")
    return STRUCTURES[name](seed)
