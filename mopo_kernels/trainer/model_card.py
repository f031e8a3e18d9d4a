"""The model card: what a policy was trained for, and what was measured. What was not measured is said to be so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from mopo_kernels.text import markdown
from mopo_kernels.trainer.checkpoint import write_atomically
from mopo_kernels.trainer.lm_head import causal_lm, is_peft

if TYPE_CHECKING:
    from mopo_kernels.trainer.trainer import MOPOTrainer

NOT_MEASURED = "not measured"
_CERTIFICATE = "## Certificate"


def installed_version(package: str) -> str:
    """Of a package, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def model_card(trainer: MOPOTrainer, base_model: str | None = None, merged: bool = False) -> ModelCard:
    """The card of the policy as ``trainer`` would save it now.

    Args:
        trainer: before, in or after training.
        base_model: what training started from; default what the model's configuration says.
        merged: the adapters are merged into the weights that the card is for.
    """
    args, state = trainer.args, trainer.state
    base = causal_lm(trainer.model)
    base_model = base_model or getattr(base.config, "_name_or_path", "") or "not named"
    adapter = _adapter(trainer.model)
    data = ModelCardData(
        base_model=base_model if re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", base_model) else None,
        library_name="peft" if adapter and not merged else "transformers",
        pipeline_tag="text-generation",
        tags=["mopo", "preference-optimization", *(["lora"] if adapter else [])],
    )
    best = state.best_global_step if args.load_best_model_at_end and _has_ended(trainer) else None
    weights = f"after step {state.global_step}"
    if best is not None and state.best_metric is not None:
        weights = f"of step {best}, the best by {markdown(str(args.metric_for_best_model))} ({state.best_metric:.4g})"
    found, measured_at = _held_out(state.log_history, best)
    several: dict[str, str] = {}
    for name in trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else ():
        part, measured_at = _held_out(state.log_history, best, f"eval_{name}_")
        several[f"Held out: {name}"] = ", ".join(
            f"{objective} {_number(part.get(f'eval_{name}_satisfaction/{objective}'))}"
            f"{_error(part.get(f'eval_{name}_standard_error/{objective}'))}"
            for objective in trainer.objectives
        )
    steps = f"{state.global_step:,}" + (f" of {state.max_steps:,} planned" if state.max_steps > 0 else "")
    facts = {
        "Base model": markdown(base_model) + (", in 4 bits" if getattr(base, "is_loaded_in_4bit", False) else ""),
        "Trained": (f"{adapter}, merged into the weights" if merged else adapter) or "every weight",
        "Weights": weights,
        "Optimizer steps": steps,
        "Training data": _size(trainer.train_dataset),
        "Dual data": _size(trainer.dual_dataset),
        "Held-out data": "the dual data"
        if trainer.eval_dataset is not None and trainer.eval_dataset is trainer.dual_dataset
        else _held_out_size(trainer.eval_dataset),
        "tau": f"{args.tau:g}",
        "loss_type": args.loss_type,
        "estimator": f"{args.estimator} (the scale of thresholds and satisfaction)",
        "Reference": _reference(args, trainer.reference.without_adapters or not adapter),
        "Learning rate": f"{args.learning_rate:g}, {getattr(args.optim, 'value', args.optim)}",
        "Seed": str(args.seed),
        "Held-out KL to the first reference": _number(found.get("eval_kl_first"), "{:.4g} nats a response"),
        **several,
        "Versions": ", ".join(
            f"{name} {installed_version(name)}" for name in ("mopo-kernels", "torch", "transformers", "peft")
        ),
    }
    title = markdown(base_model.rstrip("/").rsplit("/", 1)[-1])
    measured = "nothing was measured on held-out data" if measured_at is None else f"measured after step {measured_at}"
    text = "\n".join(
        [
            f"# {title}, tuned under thresholds",
            "",
            "Trained by constrained preference optimisation "
            f"(MOPO, [arXiv 2505.10892](https://arxiv.org/abs/2505.10892)) to maximise {markdown(trainer.primary)}"
            + (", each threshold below being a lower bound." if trainer.dual.threshold else _weights(trainer)),
            "",
            "| objective | | threshold | multiplier | dual data | slack | held out | slack |",
            "|---|---|---|---|---|---|---|---|",
            *(_row(trainer, name, found) for name in trainer.objectives),
            "",
            f"Dual data, which the loss did not fit and the multipliers followed: {_dual(trainer)}. Held-out: "
            f"{measured}. ± is the standard error by prompt.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "",
        ]
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def add_certificate(folder: Path, record: Mapping[str, Any]) -> None:
    """Write what ``mopo certify`` found into the card of the policy in ``folder``, in place of an earlier such record.

    Args:
        folder: of the policy; without a README.md one is made.
        record: what ``mopo certify --output`` writes.
    """
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else f"# {markdown(folder.name)}\n"
    before, _, rest = card.partition(f"\n{_CERTIFICATE}\n")
    after = rest.partition("\n## ")
    settings = record["settings"]
    how = (
        f"labelled pairs of {markdown(settings['data'])}, estimator {settings['estimator']}"
        if "data" in settings
        else f"fresh answers to {markdown(settings['prompts'])}, judged by {markdown(settings['judges'])}"
    )
    scaled = "" if record["scale"] == 1 else f" Of the update here times {record['scale']:g}."
    chosen = f" Chosen among {len(record['candidates'])} policies on other prompts." if record["candidates"] else ""
    section = [
        _CERTIFICATE,
        "",
        f"{'Certified' if record['certified'] else 'Not certified'}: with probability {record['confidence']:g} all "
        f"lower bounds hold on prompts drawn as these {record['prompts']} were ({how}; baseline "
        f"{markdown(record['baseline'])}).{scaled}{chosen}",
        "",
        "| objective | threshold | measured | lower bound | effective prompts | |",
        "|---|---|---|---|---|---|",
        *(
            f"| {markdown(bound['objective'])} | {bound['threshold']:.4g} | {_number(bound['value'])}"
            f"{_error(bound['standard_error'])} | {_number(bound['lower'])} | {bound['effective_prompts']:.0f} | "
            f"{'kept' if bound['kept'] else 'not shown'} |"
            for bound in record["bounds"]
        ),
        "",
        *(f"Refused: {markdown(reason)}.\n" for reason in record["refused"]),
        f"Weights: sha256 {record['weights'] or 'not known'}; mopo-kernels {record['versions']['mopo-kernels']}.",
        "",
    ]
    text = f"{before.rstrip()}\n\n" + "\n".join(section)
    # In place of what a link points to, which may be a file of another folder.
    write_atomically(path, text if not after[1] else f"{text}\n## {after[2]}")


def _row(trainer: MOPOTrainer, name: str, found: dict[str, float]) -> str:
    threshold = trainer.dual.threshold.get(name)
    dual = trainer.measurement
    satisfaction = None if dual is None else dual.satisfaction.get(name)
    error = None if dual is None else dual.standard_error.get(name)
    multiplier = trainer.multiplier.get(name)
    role = "maximised"
    if name != trainer.primary:
        role = "held" if threshold is not None else "watched" if multiplier is None else "weighted"
    held_out = found.get(f"eval_satisfaction/{name}")
    cells = [
        markdown(name),
        role,
        "" if threshold is None else f"{threshold:.4g}",
        "" if multiplier is None else _number(multiplier),
        _number(satisfaction) + _error(error),
        _slack(satisfaction, threshold),
        _number(held_out) + _error(found.get(f"eval_standard_error/{name}")),
        _slack(held_out, found.get(f"eval_threshold/{name}", threshold)),
    ]
    return f"| {' | '.join(cells)} |"


def _weights(trainer: MOPOTrainer) -> str:
    if not trainer.multiplier:
        return "; no threshold was set."
    return ", the multipliers below being fixed weights; no threshold was set."


def _number(value: float | None, form: str = "{:.4f}") -> str:
    return NOT_MEASURED if value is None else form.format(value)


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"


def _dual(trainer: MOPOTrainer) -> str:
    """What its column is of."""
    measurement = trainer.measurement
    if measurement is None:
        return "nothing was measured"
    how = "fresh answers, judged," if trainer.judges else "labels"
    return f"{how} of {measurement.prompts:,} prompts after step {measurement.step}"


def _slack(satisfaction: float | None, threshold: float | None) -> str:
    if threshold is None:
        return ""
    return NOT_MEASURED if satisfaction is None else f"{satisfaction - threshold:+.4f}"


def _has_ended(trainer: MOPOTrainer) -> bool:
    """Whether training is over, when the best checkpoint's weights have been loaded."""
    return trainer.state.global_step > 0 and not trainer.is_in_train


def _held_out(
    history: list[dict[str, Any]], step: int | None, prefix: str = "eval_"
) -> tuple[dict[str, float], int | None]:
    """The newest evaluation, or the first at ``step``, and its step."""
    lines = [line for line in history if any(key.startswith(f"{prefix}satisfaction/") for key in line)]
    if step is not None:
        lines = [line for line in lines if line["step"] == step][:1]
    return (lines[-1], int(lines[-1]["step"])) if lines else ({}, None)


def _adapter(model: Any) -> str | None:
    if not is_peft(model):
        return None
    config = model.peft_config[model.active_adapters[0]]
    rank = getattr(config, "r", None)
    kind = getattr(config.peft_type, "value", config.peft_type)
    return f"{kind} adapter" + ("" if rank is None else f" of rank {rank}, alpha {config.lora_alpha}")


def _size(data: Any) -> str:
    if data is None:
        return "none"
    pairs = sum(len(row["pairs"]) for row in data.dataset.select_columns(["pairs"]))
    return f"{len(data):,} prompts, {pairs:,} pairs"


def _held_out_size(data: Any) -> str:
    if isinstance(data, dict):
        return "; ".join(f"{markdown(name)}: {_size(part)}" for name, part in data.items()) or "none"
    return _size(data)


def _reference(args: Any, is_base: bool) -> str:
    """``is_base``: training started from the base model itself, not from an adapter that adds something."""
    if args.reference_update_steps is None:
        return "the base model" if is_base else "the policy as training started"
    relaxed = "" if args.threshold_relaxation is None else f", thresholds relaxed by {args.threshold_relaxation:g}"
    return f"the policy itself, every {args.reference_update_steps} steps{relaxed}"
