"""What MOPOTrainer settles before training: objectives, data, multipliers to start from, and what these need to be."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mopo_kernels.data import DataError, PreferenceData, load_preferences, win_rates
from mopo_kernels.dual import LabelSolution, ThresholdError, solve_labels
from mopo_kernels.evaluation import Judge
from mopo_kernels.trainer.config import BEST_METRIC, MOPOConfig
from mopo_kernels.trainer.lm_head import causal_lm
from mopo_kernels.trainer.shared_prompts import share_prompts

logger = logging.getLogger(__name__)


def as_preference_data(data: Any, argument: str) -> PreferenceData:
    """``PreferenceData`` from itself, or from rows that ``load_preferences`` takes: TRL's columns too.

    Raises:
        ValueError: something else, or a stream; DataError: a bad row.
    """
    if isinstance(data, PreferenceData):
        return data
    expected = f"{argument}: expected PreferenceData, a datasets.Dataset, a pandas frame, or a sequence of rows"
    if isinstance(data, (str, bytes, os.PathLike)):
        raise ValueError(f"{expected}; got {type(data).__name__} (load_preferences reads files)")
    try:
        return load_preferences(data)
    except TypeError as error:
        raise ValueError(f"{expected}; got {type(data).__name__}") from error
    except DataError:
        raise
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def resolve_objectives(args: MOPOConfig, train: PreferenceData | None, evaluation: Any) -> tuple[tuple[str, ...], str]:
    """Names of the objectives, in order, and the primary."""
    data = train
    if data is None:
        data = next(iter(evaluation.values())) if isinstance(evaluation, dict) and evaluation else evaluation
    known: tuple[str, ...] = () if data is None else data.objectives
    objectives = known if args.objectives is None else tuple(args.objectives)
    if not objectives:
        raise ValueError("objectives: expected their names, as there is no data set to take them from; got None")
    if known and (unknown := [name for name in objectives if name not in known]):
        raise ValueError(f"objectives: expected names among the data's {', '.join(known)}; got {', '.join(unknown)}")
    if hidden := [name for name in objectives if not name.isprintable()]:
        raise ValueError(f"objectives: expected names of printable characters; got {hidden[0]!r}")
    primary = objectives[0] if args.primary is None else args.primary
    if primary not in objectives:
        raise ValueError(f"primary: expected one of {', '.join(objectives)}; got {primary!r}")
    for argument in ("thresholds", "fixed_multipliers", "initial_multiplier", "label_rate"):
        value = getattr(args, argument)
        for name in value if isinstance(value, Mapping) else ():
            if name not in objectives:
                raise ValueError(f"{argument}: expected objectives among {', '.join(objectives)}; got {name!r}")
    if primary in (args.fixed_multipliers or ()):
        raise ValueError(
            f"fixed_multipliers: expected none for the primary objective, whose weight is 1; got {primary!r}"
        )
    return objectives, primary


def check_margins(args: MOPOConfig, data: PreferenceData | None, argument: str) -> None:
    """Raise where pairs have a margin and the loss would not take it."""
    if data is not None and args.loss_type != "sigmoid" and data.has_margins:
        raise ValueError(
            f"{argument}: expected pairs without a margin, which only loss_type 'sigmoid' takes; got some with one and "
            f"loss_type {args.loss_type!r}"
        )


def check_best_metric(args: MOPOConfig, evaluation: Any) -> None:
    """Raise unless the metric of the best model is one that evaluation gives.

    Of several data sets every metric has the name of its own, but for the one that all have together.
    """
    metric = (args.metric_for_best_model or BEST_METRIC).removeprefix("eval_")
    if not isinstance(evaluation, dict) or metric == BEST_METRIC:
        return
    if not any(metric.startswith(f"{name}_") for name in evaluation):
        raise ValueError(
            f"metric_for_best_model: expected {BEST_METRIC} or a metric of one of the evaluation sets, as "
            f"{next(iter(evaluation), 'name')}_{metric}; got {args.metric_for_best_model!r}"
        )


def check_judges(args: MOPOConfig, judges: Mapping[str, Judge], objectives: Sequence[str]) -> None:
    """Raise unless every threshold has a judge, every judge an objective, and the estimator is on the judges' scale."""
    assert isinstance(args.thresholds, dict)
    if unknown := [name for name in judges if name not in objectives]:
        raise ValueError(f"judges: expected objectives among {', '.join(objectives)}; got {', '.join(unknown)}")
    if lacking := [name for name in args.thresholds if name not in judges]:
        raise ValueError(
            f"judges: expected one for every objective with a threshold; got none for {', '.join(lacking)}"
        )
    if args.estimator == "pair":
        raise ValueError(
            "estimator: expected snis or closed_form with judges, who measure win rates, as the multipliers start on "
            "the estimator's scale; got pair"
        )


def without_reference(data: PreferenceData) -> list[int]:
    """Which examples have no log-probabilities under the reference."""
    if "ref_logprob" not in data.dataset.column_names:
        return list(range(len(data)))
    return [index for index, value in enumerate(data.dataset["ref_logprob"]) if value is None]


def init_multipliers(
    args: MOPOConfig, objectives: Sequence[str], primary: str, data: PreferenceData | None
) -> tuple[dict[str, float], LabelSolution | None]:
    """By constrained objective, and the solution on the labels that they come from, if they do.

    Raises:
        ThresholdError: the thresholds cannot be met on the labels and ``on_infeasible="error"``.
    """
    assert isinstance(args.thresholds, dict)
    if isinstance(args.initial_multiplier, dict):
        return args.initial_multiplier, None
    if args.initial_multiplier == "zero" or not args.thresholds or data is None:
        return {}, None
    solution = solve_dual(args, objectives, primary, data)
    if solution.message:
        message = f"on the training labels (estimator {args.estimator}, dual_max {args.dual_max:g}): {solution.message}"
        # A search that has not converged proves nothing: training starts from where it ended, and finds out.
        if not solution.feasible and solution.converged and args.on_infeasible == "error":
            raise ThresholdError(solution.unmet, message)
        logger.warning(message)
    return solution.multiplier, solution


def solve_dual(args: MOPOConfig, objectives: Sequence[str], primary: str, data: PreferenceData) -> LabelSolution:
    """The dual's solution on the labels of ``data``."""
    assert isinstance(args.thresholds, dict)
    rates = win_rates(data, objectives)
    examples = list(data)
    pairs = [(x, pair) for x, example in enumerate(examples) for pair in example.pairs]
    nan = float("nan")
    labels = [
        [nan if (value := pair.preference.get(name)) is None else value for name in objectives] for _, pair in pairs
    ]
    return solve_labels(
        rates.win_rate,
        rates.reference,
        objectives,
        primary,
        args.thresholds,
        args.tau,
        estimator=args.estimator,
        maximum=args.dual_max,
        prompt_weight=rates.prompt_weight,
        prompt=[x for x, _ in pairs],
        i=[pair.i for _, pair in pairs],
        j=[pair.j for _, pair in pairs],
        preference=labels,
        weight=[examples[x].weight for x, _ in pairs],
    )


def precomputes(args: MOPOConfig, is_adapter: bool, examples: int, step: int) -> bool:
    """Whether the first reference's log-probabilities are computed before training, on so many examples, ``step`` of
    them an optimiser step."""
    if args.reference != "auto":
        return args.reference == "precomputed"
    if not is_adapter:
        return True
    planned = args.num_train_epochs * examples
    if args.max_steps > 0:
        planned = args.max_steps * step
    return planned >= examples


def _coverage(data: PreferenceData, objectives: Sequence[str]) -> dict[str, float]:
    """The share of all pairs that carry a label, by objective."""
    labels = [pair["preference"] for row in data.dataset.select_columns(["pairs"]) for pair in row["pairs"]]
    return {name: sum(label[name] is not None for label in labels) / len(labels) for name in objectives}


def label_rates(args: MOPOConfig, objectives: Sequence[str], data: PreferenceData | None) -> list[float] | None:
    """The share of labelled pairs per objective, in their order, or None."""
    if args.label_rate is None:
        return None
    if isinstance(args.label_rate, dict):
        return [args.label_rate.get(name, 1.0) for name in objectives]
    if data is None:
        raise ValueError("label_rate: expected numbers when there is no train_dataset to measure; got 'auto'")
    coverage = _coverage(data, objectives)
    if empty := [name for name in objectives if not coverage[name]]:
        raise ValueError(f"label_rate: expected every objective to be labelled somewhere; got none for {empty}")
    return list(coverage.values())


def warn_of_missing_labels(
    args: MOPOConfig, objectives: Sequence[str], primary: str, data: PreferenceData | None
) -> None:
    """A missing label acts on the policy as a tie does, which is no wish of anyone's."""
    if data is None or args.label_rate is not None or args.loss_type != "regression" or args.process_index != 0:
        return
    assert isinstance(args.thresholds, dict)
    assert isinstance(args.fixed_multipliers, dict)
    acting = [name for name in objectives if name in (primary, *args.thresholds, *args.fixed_multipliers)]
    if missing := {name: share for name, share in _coverage(data, acting).items() if share < 1}:
        logger.warning(
            "labels are missing (pairs that have one: %s): regression draws the margin of a pair without a label to 0, "
            "as for a tie; label_rate=auto weights the labels there are instead",
            ", ".join(f"{name} {share:.1%}" for name, share in missing.items()),
        )


def shares_prompts(model: nn.Module, args: MOPOConfig) -> bool:
    """Whether a prompt is computed once for its responses; ``model``'s attention is set to it.

    Raises:
        ValueError: it is to be, and the model cannot.
    """
    if args.shared_prompts == "never":
        return False
    reason = share_prompts(model, args.max_length)
    if reason is None:
        return True
    name = type(causal_lm(model)).__name__
    if args.shared_prompts == "always":
        raise ValueError(f"shared_prompts: expected a model that can compute a prompt once; {name} cannot: {reason}")
    if args.process_index == 0:
        logger.warning("prompts are computed anew for each response, as %s cannot share them: %s", name, reason)
    return False


def warn_of_moving_positions(model: nn.Module, max_length: int | None) -> None:
    """Rotary positions that are scaled by a batch's longest row make a log-probability depend on the other rows."""
    config = causal_lm(model).config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or {}
    for part in [settings] if "rope_type" in settings else settings.values():
        if not isinstance(part, Mapping) or part.get("rope_type") not in ("longrope", "dynamic"):
            continue
        limit = part.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_length is None or max_length >= limit:
            logger.warning(
                "%s positions depend on the longest row of a batch from %d tokens on: log-probabilities of policy and "
                "reference may differ (max_length is %s)",
                part["rope_type"],
                limit,
                max_length,
            )
