"""MOPOConfig: the training arguments of MOPOTrainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from transformers import TrainingArguments

from mopo_kernels.checks import LARGEST, SMALLEST
from mopo_kernels.data.rendering import CHAT, CONTROL_TOKENS
from mopo_kernels.mappings import parse_json, parse_mapping
from mopo_kernels.naive import ESTIMATORS, LOSS_TYPES

REFERENCES = ("auto", "precomputed", "model")
REFERENCE_DTYPES = ("auto", "bfloat16")
ON_INFEASIBLE = ("error", "warn")
SHARED_PROMPTS = ("auto", "always", "never")
# Prefers what keeps the thresholds: see MOPOTrainer.evaluate.
BEST_METRIC = "feasible_primary"
AUTO = "auto"


def parse_names(name: str, value: list[str] | str | None) -> list[str] | None:
    """A list of objective names, or one comma-separated string; None stays None."""
    if value is None:
        return None
    parts = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name}: expected a list of names; got {value!r}")
    names = [item.strip() for part in parts for item in part.split(",") if item.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{name}: expected at least one name, each once; got {value!r}")
    return names


@dataclass
class MOPOConfig(TrainingArguments):
    """``transformers.TrainingArguments`` plus what constrained preference optimisation needs.

    One item of a batch is one prompt with all its responses and pairs: ``per_device_train_batch_size`` counts prompts,
    unless ``max_tokens_per_batch`` is set.

    Args:
        objectives: names of the K objectives in the order of the multipliers; None takes the data set's.
        primary: the objective that is maximised (weight 1); None takes the first.
        thresholds: objective -> lower bound on its satisfaction, as a dict, JSON or ``"name=0.45,other=0.5"``. On the
            scale of ``estimator``. An objective other than the primary without a threshold has weight 0: it is
            measured, and does not act.
        fixed_multipliers: in place of thresholds, objective -> multiplier (at least 0) that never moves, in the same
            forms: a scalarisation of known weights, 1 for the primary. The loss fits every training prompt; there are
            no dual data and no dual steps. An objective other than the primary that is not named has weight 0.
        tau: KL weight of the regression and cloning losses, beta of ``sigmoid``. Between 1e-10 and 1e10.
        loss_type: ``regression``, ``cloning`` or ``sigmoid`` (see ``mopo_kernels.mopo_loss``).
        estimator: how satisfaction is measured: ``pair`` (0.5 at the reference; not the win rate) for responses that
            anybody wrote, ``snis`` (win rates) for those that the reference wrote, several a prompt, or
            ``closed_form``. Section 14 of docs/method.md has the figures.
        dual_data: share of the training prompts, in [0, 1), that the loss never fits and the multipliers listen to:
            drawn by prompt with ``data_seed`` (default ``seed``), where there are thresholds and no ``dual_dataset`` is
            given to the trainer. With 0, or where the share is fewer than ``dual_effective_prompts`` prompts, nothing
            is held out and the multipliers stand where they start.
        dual_steps: optimiser steps from one dual step to the next. None: an eighth of an epoch, and at least 8. Each
            costs a forward pass over ``dual_prompts`` prompts (none with ``closed_form``).
        dual_prompts: most prompts of the dual data that one dual step looks at, in turns.
        dual_effective_prompts: the effective number of prompts, eq. (39) of docs/method.md, that an objective's
            measurement must rest on to move its multiplier.
        dual_coverage: with ``snis``, the least mean importance weight at which multipliers move. It is 1 while the
            policy's responses are among those of the dual data, which the reference wrote; when it falls, the weights
            tell less and less of the policy, and only ``judges`` can. 0: whatever it is.
        dual_samples: prompts answered afresh in a dual step, one answer each, where the trainer is given ``judges``.
        dual_max_new_tokens: longest such answer. None: ``max_response_length``, or the longest response in the dual
            data.
        dual_lr: step size of the multipliers. ``auto`` takes as much of a Newton step on the labels' own dual as leaves
            no more than ``dual_noise`` of the measurement's error in an objective's value, at most half of one in an
            eighth of the run, times the learning rate's share of its peak, so that the multipliers settle with the
            policy. A number is a plain step, the same throughout.
        dual_noise: see ``dual_lr``; in units of satisfaction.
        dual_max: upper limit of a multiplier.
        dual_warmup_steps: optimiser steps before the multipliers move. None: half of the first epoch, in which the
            policy is on its way from the reference to what its multipliers ask for, and its values mean little.
        dual_smoothing: share of the old value in the running mean of what is measured, in [0, 1). 0 is no smoothing.
        dual_patience: dual steps in a row that a multiplier may spend at ``dual_max`` with its threshold unmet,
            before the thresholds count as impossible to meet (see ``on_infeasible``).
        threshold_confidence: aim at ``b + z s`` in place of b, z the one-sided normal quantile of this level (in
            [0.5, 1)) and s the standard error by prompt of the dual data, so that a threshold is kept with about this
            probability and not every other time. None: aim at b.
        initial_multiplier: ``"labels"`` solves the dual exactly on the training labels (for the optimum of
            ``regression`` and ``cloning``; a starting point only for ``sigmoid``), ``"zero"`` starts at 0, a
            mapping gives numbers (in the forms of ``thresholds``).
        reference: where the first reference's log-probabilities come from, for examples without ``ref_logprob``.
            ``precomputed``: one pass before training, kept in a file (see ``reference_path``). ``model``: during
            training, from the same network with fresh adapters switched off, or with a frozen copy of the starting
            weights (adapters that were trained before, full fine-tuning). ``auto``: precomputed, except that LoRA
            training for less than one epoch uses ``model``, which is then the cheaper.
        reference_path: the folder for the precomputed log-probabilities, a file for each model, data set, tokenizer,
            precision and length limit: runs that differ in other things share it, whichever comes first. A name ending
            in ``.logprob`` is the training data's file itself, which is refused when any of these is another. None:
            ``output_dir`` (``mopo train``: the folder of ``train_file``, if it can be written).
        reference_update_steps: every so many optimiser steps the reference becomes the policy as it was (the paper's
            t0). None: never.
        reference_dtype: of the copies of trained weights that a lagged reference, or full fine-tuning with
            ``reference="model"``, keeps: ``auto`` is the weights' own, ``bfloat16`` halves the memory of fp32 ones
            (``mopo_kernels.trainer.reference_model.ReferenceModel`` says what it costs).
        reference_offload: keep these copies in the CPU's memory and bring them to the device for the reference's
            forward pass, block by block.
        threshold_relaxation: beta; at each such update ``b_k = beta * value_k``. None keeps the thresholds.
        label_rate: objective -> share of pairs that carry its label, to weight the labels that exist by 1/rate;
            ``"auto"`` measures it on the training data. None: a missing label counts as 1/2, which with ``regression``
            draws the pair's margin to 0.
        max_ratio: cap on the policy ratio of ``cloning`` and ``closed_form``; at least 1.
        length_normalize: divide log-probabilities by the number of scored tokens.
        max_length: tokens of prompt plus response; None is no limit.
        max_response_length: tokens of a response; None is no limit.
        truncate_responses: a response beyond these limits is cut, and loses its end token, in place of an error: what
            a sampler that stopped at ``max_response_length`` tokens has drawn of it.
        chat: what prompts that are strings are. ``always``: a user's turn, which goes through the chat template;
            ``never``: text that the responses continue; ``auto``: by what each row is
            (``mopo_kernels.data.rendering.Renderer``).
        control_tokens: what of control tokens inside the texts of a conversation: ``neutralize`` encodes them as
            ordinary text, ``refuse`` refuses the row.
        chat_template_kwargs: variables for the chat template, such as ``{"enable_thinking": false}``, as a dict or
            JSON.
        dataset_num_proc: processes that tokenise the data before training. None: one for every 2000 examples, at most
            one a core.
        shared_prompts: ``auto`` computes each prompt once for all its responses, in one row without padding, where the
            model's attention can be told so (``attn_implementation`` sdpa or flex_attention, no window shorter than
            ``max_length``), and says so where it cannot. ``always`` refuses instead. ``never``: a padded row a
            response.
        max_tokens_per_batch: form the training batches by tokens, as they are laid out, instead of by prompts: each at
            most this many on a device, examples of similar length together, as many batches on every rank. With
            ``train_sampling_strategy="sequential"`` the examples keep their order. None: by prompts.
        backend: of the fused loss: ``auto``, ``naive``, ``torch``, ``cpp``, ...
        max_buffer_bytes: bytes the fused loss may hold beyond inputs, outputs and gradients; None is the default.
        gradient_filter: share of the largest element that the fused loss may leave out of its gradients, e.g. 2^-13, on
            the CPU; see ``mopo_kernels.linear_logprob``. None: exact.
        on_infeasible: ``error`` stops (with a checkpoint when training had begun) with ``ThresholdError`` when the
            thresholds cannot be met, ``warn`` says so once and goes on.
        early_stopping_patience: stop once so many evaluations in a row have not improved ``metric_for_best_model``.
            None: never. That metric is ``feasible_primary`` here, unless another is named (``load_best_model_at_end``
            goes by it, too): the primary objective's satisfaction where every slack is at least 0, and the worst slack
            elsewhere, so that a checkpoint which keeps the thresholds always comes before one that does not. Without an
            ``eval_dataset`` the dual data are evaluated; the multipliers were moved by them, so their slacks flatter.
            Of a dict of evaluation sets it is the least of theirs, and ``name_feasible_primary`` that of one.
        disable_dropout: set every dropout and jitter to 0, as a module, a number of a layer or an entry of the model's
            configuration (which is saved as it was), and refuse a model that then computes in training mode what it
            does not in evaluation mode. With dropout the policy differs from the reference by noise at the first step.
            Inside adapters it stays where they are fresh and so add nothing at the first step.
    """

    objectives: list[str] | None = field(default=None, metadata={"help": "Objective names; default: the data set's."})
    primary: str | None = field(default=None, metadata={"help": "The maximised objective; default: the first."})
    thresholds: dict | str | None = field(
        default=None, metadata={"help": "Lower bounds, as name=0.45,other=0.5 or a mapping."}
    )
    fixed_multipliers: dict | str | None = field(
        default=None, metadata={"help": "Multipliers that never move, as name=0.39,other=0.08, instead of thresholds."}
    )
    tau: float = field(default=0.1, metadata={"help": "KL weight (beta of the sigmoid loss)."})
    loss_type: str = field(default="regression", metadata={"help": f"One of {', '.join(LOSS_TYPES)}."})
    estimator: str = field(default="pair", metadata={"help": f"One of {', '.join(ESTIMATORS)}."})
    dual_data: float = field(default=0.2, metadata={"help": "Share of the prompts that steers the multipliers."})
    dual_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps between dual steps; default: 1/8 epoch, at least 8."}
    )
    dual_prompts: int = field(
        default=128, metadata={"help": "Most prompts of the dual data that a dual step looks at."}
    )
    dual_effective_prompts: float = field(
        default=25.0, metadata={"help": "Effective number of prompts that a dual step must rest on."}
    )
    dual_coverage: float = field(
        default=0.7, metadata={"help": "With snis: least mean importance weight at which multipliers move."}
    )
    dual_samples: int = field(default=32, metadata={"help": "Prompts answered in a dual step, with judges."})
    dual_max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest such answer; default: the longest response in the dual data."}
    )
    dual_lr: float | str | None = field(default="auto", metadata={"help": "Step size of the multipliers, or auto."})
    dual_noise: float = field(default=0.01, metadata={"help": "What auto lets the measurement's noise add to a value."})
    dual_max: float = field(default=10.0, metadata={"help": "Upper limit of a multiplier."})
    dual_warmup_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps before the multipliers move; default: half an epoch."}
    )
    dual_smoothing: float = field(default=0.0, metadata={"help": "Share of the old value in the running mean."})
    dual_patience: int = field(default=10, metadata={"help": "Dual steps at dual_max, unmet, before giving up."})
    threshold_confidence: float | None = field(
        default=None, metadata={"help": "Probability to keep a threshold with: aims above it; default: aims at it."}
    )
    initial_multiplier: dict | str | None = field(
        default="labels", metadata={"help": "labels, zero, or name=number,..."}
    )
    reference: str = field(default="auto", metadata={"help": f"One of {', '.join(REFERENCES)}."})
    reference_update_steps: int | None = field(
        default=None, metadata={"help": "Steps between updates of the reference (t0); default: never."}
    )
    reference_path: str | None = field(
        default=None, metadata={"help": "Folder (or .logprob file) for the reference's log-probabilities."}
    )
    reference_dtype: str = field(
        default="auto", metadata={"help": f"Of copies of the weights: one of {', '.join(REFERENCE_DTYPES)}."}
    )
    reference_offload: bool = field(default=False, metadata={"help": "Keep copies of the weights on the CPU."})
    threshold_relaxation: float | None = field(
        default=None, metadata={"help": "beta: thresholds become beta * value at each update of the reference."}
    )
    label_rate: dict | str | None = field(
        default=None, metadata={"help": "auto, or name=share,... of pairs that are labelled."}
    )
    max_ratio: float | None = field(default=None, metadata={"help": "Cap on the policy ratio of cloning."})
    length_normalize: bool = field(default=False, metadata={"help": "Divide log-probabilities by token counts."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of prompt plus response."})
    max_response_length: int | None = field(default=None, metadata={"help": "Tokens of a response."})
    truncate_responses: bool = field(default=False, metadata={"help": "Cut longer responses, in place of an error."})
    chat: str = field(default="auto", metadata={"help": f"String prompts as user turns: one of {', '.join(CHAT)}."})
    control_tokens: str = field(
        default="neutralize", metadata={"help": f"Control tokens in texts: one of {', '.join(CONTROL_TOKENS)}."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Variables for the chat template, as JSON or a mapping."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the data; default: by its size, at most one a core."}
    )
    shared_prompts: str = field(
        default="auto", metadata={"help": f"Compute a prompt once for its responses: {', '.join(SHARED_PROMPTS)}."}
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Tokens of a training batch on a device, instead of a number of prompts."}
    )
    backend: str = field(default="auto", metadata={"help": "Backend of the fused loss."})
    max_buffer_bytes: int | None = field(default=None, metadata={"help": "Buffer limit of the fused loss, in bytes."})
    gradient_filter: float | None = field(
        default=None, metadata={"help": "Share of the largest element to leave out of the fused loss's gradients."}
    )
    on_infeasible: str = field(default="error", metadata={"help": f"One of {', '.join(ON_INFEASIBLE)}."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without improvement after which training stops; default: never."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set dropout to 0, but inside fresh adapters."})

    # The collator needs every column, and a log line every 500 steps hides a run that is going wrong.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimiser steps."})
    # The filter looks at every micro-batch's loss, for which the host waits; a step that is not finite raises anyway.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave losses that are not finite out."})

    def __post_init__(self) -> None:
        if self.deepspeed is not None and find_spec("deepspeed") is None:
            raise ValueError("deepspeed: expected the package deepspeed to be installed; it is not")
        best = self.early_stopping_patience is not None or self.load_best_model_at_end or self.save_strategy == "best"
        if best and self.metric_for_best_model is None:
            self.metric_for_best_model = BEST_METRIC
        super().__post_init__()
        if self.device.type == "cpu":
            # Pinned memory speeds up copies to an accelerator; without one torch warns about it in every run.
            self.dataloader_pin_memory = False
        self.objectives = parse_names("objectives", self.objectives)
        self.thresholds = parse_mapping("thresholds", self.thresholds)
        self.fixed_multipliers = parse_mapping("fixed_multipliers", self.fixed_multipliers)
        if self.fixed_multipliers and self.thresholds:
            raise ValueError(
                "fixed_multipliers: expected no thresholds with them, as multipliers that follow thresholds move; got "
                f"thresholds for {', '.join(self.thresholds)}"
            )
        for name, value in self.fixed_multipliers.items():
            if value < 0:
                raise ValueError(f"fixed_multipliers[{name!r}]: expected a number of at least 0; got {value}")
        if self.initial_multiplier is None:
            self.initial_multiplier = "labels"
        if self.initial_multiplier not in ("labels", "zero"):
            self.initial_multiplier = parse_mapping("initial_multiplier", self.initial_multiplier)
            for name, value in self.initial_multiplier.items():
                if not 0 <= value <= self.dual_max:
                    raise ValueError(
                        f"initial_multiplier[{name!r}]: expected a number from 0 to dual_max ({self.dual_max}); "
                        f"got {value}"
                    )
        if self.label_rate is not None and self.label_rate != "auto":
            self.label_rate = parse_mapping("label_rate", self.label_rate)
            for name, value in self.label_rate.items():
                if not 0 < value <= 1:
                    raise ValueError(f"label_rate[{name!r}]: expected a share in (0, 1]; got {value}")
        self.chat_template_kwargs = parse_json("chat_template_kwargs", self.chat_template_kwargs)
        if self.dual_lr is None:
            self.dual_lr = AUTO
        if isinstance(self.dual_lr, str) and self.dual_lr != AUTO:
            try:
                self.dual_lr = float(self.dual_lr)
            except ValueError as error:
                raise ValueError(f"dual_lr: expected a number or {AUTO}; got {self.dual_lr!r}") from error
        for name, choices in (
            ("loss_type", LOSS_TYPES),
            ("estimator", ESTIMATORS),
            ("reference", REFERENCES),
            ("reference_dtype", REFERENCE_DTYPES),
            ("on_infeasible", ON_INFEASIBLE),
            ("shared_prompts", SHARED_PROMPTS),
            ("chat", CHAT),
            ("control_tokens", CONTROL_TOKENS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name, low, high, low_open, high_open in (
            ("tau", SMALLEST, LARGEST, False, False),
            ("dual_data", 0, 1, False, True),
            ("dual_steps", 1, math.inf, False, True),
            ("dual_prompts", 1, math.inf, False, True),
            ("dual_effective_prompts", 1, math.inf, False, True),
            ("dual_coverage", 0, 1, False, False),
            ("dual_samples", 1, math.inf, False, True),
            ("dual_max_new_tokens", 1, math.inf, False, True),
            ("dual_lr", 0, math.inf, True, True),
            ("dual_noise", 0, math.inf, True, True),
            ("threshold_confidence", 0.5, 1, False, True),
            ("dual_max", 0, math.inf, True, True),
            ("dual_warmup_steps", 0, math.inf, False, True),
            ("dual_smoothing", 0, 1, False, True),
            ("dual_patience", 1, math.inf, False, True),
            ("reference_update_steps", 1, math.inf, False, True),
            ("threshold_relaxation", 0, 1, True, False),
            ("max_ratio", 1, LARGEST, False, False),
            ("max_length", 2, math.inf, False, True),
            ("max_response_length", 1, math.inf, False, True),
            ("max_tokens_per_batch", 1, math.inf, False, True),
            ("dataset_num_proc", 1, math.inf, False, True),
            ("early_stopping_patience", 1, math.inf, False, True),
            ("max_buffer_bytes", 1, math.inf, False, True),
            ("gradient_filter", 0, 1, True, True),
            ("learning_rate", 0, math.inf, False, True),
            ("weight_decay", 0, math.inf, False, True),
            ("max_grad_norm", 0, math.inf, False, False),
        ):
            value = getattr(self, name)
            if value is None or value == AUTO:
                continue
            if not (low < value if low_open else low <= value) or not (value < high if high_open else value <= high):
                interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
                raise ValueError(f"{name}: expected a number in {interval}; got {value}")
        if self.label_rate is not None and self.loss_type == "cloning":
            raise ValueError(f"label_rate: expected None with loss_type 'cloning'; got {self.label_rate!r}")
        if self.threshold_relaxation is not None and self.reference_update_steps is None:
            raise ValueError("threshold_relaxation: expected reference_update_steps with it; got None")
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience: expected eval_strategy steps or epoch with it; got no")
        checkpointing: Any = self.gradient_checkpointing_kwargs or {}
        if self.device.type == "cpu" and checkpointing.get("offload"):
            raise ValueError(
                "gradient_checkpointing_kwargs: expected offload=False on a CPU, in whose memory activations are "
                "already; got True"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, the collator needs every column; got True")
        if self.max_tokens_per_batch is None and self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                "train_sampling_strategy: expected random or sequential, or max_tokens_per_batch, which groups by "
                f"length; got {self.train_sampling_strategy!r}"
            )
        if self.primary is not None and self.objectives is not None and self.primary not in self.objectives:
            raise ValueError(f"primary: expected one of {', '.join(self.objectives)}; got {self.primary!r}")
        if self.deepspeed is not None and self.use_cpu:
            raise ValueError("deepspeed: expected use_cpu False with it, or accelerate runs DDP; got True")
        for name, expected, why in (
            ("label_smoothing_factor", 0.0, "the loss has soft labels of its own"),
            ("use_liger_kernel", False, "it replaces the forward that holds the loss"),
            ("auto_find_batch_size", False, "the multipliers would have moved before the batch was found too large"),
        ):
            if getattr(self, name) != expected:
                raise ValueError(f"{name}: expected {expected}, as {why}; got {getattr(self, name)}")
