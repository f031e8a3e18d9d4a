"""MOPOTrainer: transformers.Trainer with the constrained preference loss, its multipliers and its references."""

from __future__ import annotations

import logging
import math
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from mopo_kernels.arguments import HeadOptions, LossOptions
from mopo_kernels.data import PreferenceData
from mopo_kernels.data.dataset import prompt_key
from mopo_kernels.dual import DualAscent, LabelSolution, ThresholdError, UnmetThreshold
from mopo_kernels.evaluation import Judge, sample_responses
from mopo_kernels.trainer.adapters import StackedAdapters, adapters_add_nothing, turn_off_adapter_dropout
from mopo_kernels.trainer.batch_layout import forward_arguments, scored_lengths
from mopo_kernels.trainer.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    WriteError,
    begin_checkpoint,
    begin_run,
    complete_checkpoint,
    continue_run,
    disk_is_full,
    find_damage,
    last_complete_checkpoint,
    rotate,
    sole_run,
    writing,
)
from mopo_kernels.trainer.config import AUTO, BEST_METRIC, MOPOConfig
from mopo_kernels.trainer.control import Controller, Measurement, hold_out
from mopo_kernels.trainer.distributed import (
    check_deepspeed,
    gathered,
    register_head,
    resolve_fsdp,
    with_whole_model,
)
from mopo_kernels.trainer.experts import load_balancing
from mopo_kernels.trainer.finite import (
    NamingCollator,
    any_not_finite,
    first_not_finite,
    gradients,
    not_finite,
    weights,
)
from mopo_kernels.trainer.forward import PolicyForward, attach
from mopo_kernels.trainer.interrupts import Interrupts, signal_name
from mopo_kernels.trainer.lm_head import check_model, find_transform, is_peft
from mopo_kernels.trainer.metrics import RunningMean, Statistics
from mopo_kernels.trainer.model_card import model_card
from mopo_kernels.trainer.noise import NoiseOff, check_noise_off, use_training_kernels
from mopo_kernels.trainer.reference_cache import SUFFIX, reference_logprobs
from mopo_kernels.trainer.reference_model import (
    ReferenceModel,
    check_adapters_cover_training,
    fingerprint,
    trained_parameters,
)
from mopo_kernels.trainer.resume import (
    adapter_config,
    differences,
    free_settings,
    may_change,
    optimizer_options,
    row_hint,
    row_settings,
    rows_fingerprint,
    set_optimizer_options,
)
from mopo_kernels.trainer.rows import check_labels, make_collator, prepare_rows
from mopo_kernels.trainer.sampler import TokenBudgetLoader, TokenBudgetSampler
from mopo_kernels.trainer.setup import (
    as_preference_data,
    check_best_metric,
    check_judges,
    check_margins,
    init_multipliers,
    label_rates,
    precomputes,
    resolve_objectives,
    shares_prompts,
    solve_dual,
    warn_of_missing_labels,
    warn_of_moving_positions,
    without_reference,
)
from mopo_kernels.trainer.shared_prompts import check_padded_rows, share_prompts
from mopo_kernels.transfer import to_device

logger = logging.getLogger(__name__)

# Dual steps an epoch, and the fewest optimiser steps between two of them, where dual_steps does not say.
_DUAL_STEPS_AN_EPOCH, _FEWEST_STEPS_BETWEEN = 8, 8
# The share of an epoch that the multipliers wait, where dual_warmup_steps does not say.
_WARMUP_EPOCHS = 0.5
# Of the running means of satisfaction on the training pairs, which are reported and steer nothing.
_IN_SAMPLE_DECAY = 0.9

# Below this share of the responses the importance-weighted estimate rests on a handful of them.
_COLLAPSED_SHARE = 0.1

# What a run solves: a checkpoint is resumed from only under the same. (Thresholds may change.)
_PROBLEM = (
    "tau",
    "loss_type",
    "estimator",
    "reference_update_steps",
    "threshold_relaxation",
    "label_rate",
    "max_ratio",
    "length_normalize",
    "fixed_multipliers",
    "max_length",
    "max_response_length",
    "truncate_responses",
    "optim",
    "chat",
    "control_tokens",
    "chat_template_kwargs",
)


_CTRL_C = int(signal.SIGINT)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or another signal to end during training, after the step was finished and a checkpoint written.

    Attributes:
        checkpoint: folder to resume from, or None when the run keeps no checkpoints to resume from.
        signal: the number of the signal.
    """

    def __init__(self, checkpoint: str | None, signal: int = signal.SIGINT) -> None:
        self.checkpoint, self.signal = checkpoint, int(signal)
        by = "" if self.signal == _CTRL_C else f" by {signal_name(self.signal)}"
        where = f"resume with {checkpoint}" if checkpoint else "there is no checkpoint to resume from"
        super().__init__(f"training interrupted{by}; {where}")


class _StepCallback(TrainerCallback):
    """Calls the trainer around every optimiser step, and tells it how many an epoch has."""

    def __init__(self, trainer: MOPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = len(kwargs["train_dataloader"])
        self.trainer._steps_an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._look_at_gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._end_step(control)


class _EarlyStopping(EarlyStoppingCallback):
    """Looks at evaluations that have its metric: of several data sets each is one, and all of them together another."""

    def on_evaluate(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        name = str(args.metric_for_best_model)
        if (name if name.startswith("eval_") else f"eval_{name}") in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class MOPOTrainer(Trainer):
    """Trains a causal language model on pairwise preferences for several objectives under thresholds.

    The loss runs inside the wrapped model's forward, so DDP and FSDP reduce its gradients. Gradient accumulation and
    data parallelism give the gradient of the whole batch exactly: the loss is divided by the total pair weight. Every
    ``dual_steps`` optimiser steps one dual step follows, on satisfaction measured on the *dual data*: prompts that the
    loss never fits. Figures of the training pairs are logged as ``in_sample/...`` and steer nothing.

    Args:
        model: a decoder-only transformers model, or a ``PeftModel`` of one, whose adapters may be trained already. The
            policy that it is now is the reference.
        args: the configuration.
        data_collator: default ``PreferenceCollator`` over ``processing_class`` with the configured lengths.
        train_dataset: ``PreferenceData``, or rows that ``load_preferences`` takes: a ``datasets.Dataset``, a pandas
            frame or a sequence, in the columns of any format, or a dict by objective of such.
        eval_dataset: the same, or a dict of them.
        processing_class: the tokenizer.
        callbacks, optimizers and further keywords: as in ``transformers.Trainer``.
        dual_dataset: the dual data, none of whose prompts is in ``train_dataset``, in the same forms; default a share
            of the training prompts (``dual_data``). Not looked at without thresholds.
        judges: by objective, a function of prompt and response that gives a score, the higher the better. With them a
            dual step answers ``dual_samples`` prompts of the dual data with the policy, and measures how often the
            answers beat the stored responses: on the scale of win rates, with errors that average out over the
            steps. Every objective with a threshold needs one.

    Attributes:
        multiplier: by objective with a threshold or a fixed multiplier.
        train_dataset, dual_dataset: what the loss fits, and the dual data, or None.
        given_dataset: the training data as given, before a share became the dual data.
        dual: the ``DualAscent`` that holds the multipliers of objectives with a threshold.
        measurement: what the last dual step was made on (``control.Measurement``), or None.
        label_solution: what the exact solve on the training labels found, or None.
        already_finished: whether the last ``train`` resumed from a checkpoint that had every step, and so took none.

    Raises:
        ValueError: an argument that cannot work, named.
        ThresholdError: the thresholds cannot be met on the training labels and ``on_infeasible="error"``.
    """

    args: MOPOConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    _step_sums: Tensor
    _step_names: list[list[str]]
    _batch_sums: list[Tensor]
    loss_is_scaled_for_ga = True

    @with_whole_model
    def __init__(
        self,
        model: nn.Module,
        args: MOPOConfig,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        dual_dataset: Any = None,
        judges: Mapping[str, Judge] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MOPOConfig):
            raise ValueError(f"args: expected a MOPOConfig; got {type(args).__name__}")
        if model is None:
            raise ValueError("model: expected a model; got None")
        for name in ("model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: expected None, as the loss and its metrics are the trainer's own; got a value"
                )
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one process a GPU (start with torchrun or accelerate launch); got one process that "
                f"sees {args.n_gpu} GPUs"
            )
        check_model(model)
        use_training_kernels(model)
        if is_peft(model):
            check_adapters_cover_training(model)
        if train_dataset is not None and not trained_parameters(model):
            raise ValueError(
                "model: expected parameters to train; all are frozen (a trained adapter is loaded so unless "
                "is_trainable=True)"
            )
        train_dataset = None if train_dataset is None else as_preference_data(train_dataset, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: as_preference_data(part, "eval_dataset") for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = as_preference_data(eval_dataset, "eval_dataset")
        check_best_metric(args, eval_dataset)
        check_margins(args, train_dataset, "train_dataset")
        for part in eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,):
            check_margins(args, part, "eval_dataset")
        self.objectives, self.primary = resolve_objectives(args, train_dataset, eval_dataset)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("processing_class: expected the tokenizer; got None")
            data_collator = make_collator(
                args, processing_class, self.objectives, shared_prompts=shares_prompts(model, args)
            )
        elif getattr(data_collator, "shared_prompts", False) and (
            reason := share_prompts(model, data_collator.max_length)
        ):
            raise ValueError(f"data_collator: expected shared_prompts=False, as the model cannot share them: {reason}")
        if not getattr(data_collator, "shared_prompts", False):
            check_padded_rows(model)
        if args.process_index == 0:
            warn_of_moving_positions(model, getattr(data_collator, "max_length", args.max_length))
        self._noise: NoiseOff | None = None
        if args.disable_dropout:
            self._noise = NoiseOff(model)
            continued = is_peft(model) and not adapters_add_nothing(model)
            if continued and turn_off_adapter_dropout(model) and args.process_index == 0:
                logger.warning(
                    "dropout inside the adapters is off, as they are not fresh: the policy would differ from the "
                    "reference by noise at the first step (disable_dropout=false keeps it)"
                )
            check_noise_off(model)

        self._balance = load_balancing(model, announce=args.process_index == 0)
        self._expert_load: Tensor | None = None

        self.label_solution: LabelSolution | None
        self._initial_multiplier, self.label_solution = init_multipliers(
            args, self.objectives, self.primary, train_dataset
        )
        self.dual = self._new_dual(args)
        self.given_dataset = train_dataset
        train_dataset = self._split(args, train_dataset, dual_dataset, judges)
        parts, quiet = self._given_parts(eval_dataset), args.process_index != 0
        best = args.metric_for_best_model
        check_labels(args, self.objectives, self.primary, parts, best=best, judged=judges is not None, quiet=quiet)
        prepare_rows(model, data_collator, parts, args, quiet=quiet)
        if eval_dataset is None and args.eval_strategy != "no":
            eval_dataset = self.dual_dataset
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        # For versions of transformers without loss_is_scaled_for_ga.
        self.model_accepts_loss_kwargs = True
        self._statistics = Statistics(self.objectives)
        self._reference_fingerprint = fingerprint(model)
        without_adapters = is_peft(model) and adapters_add_nothing(model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._precompute = train_dataset is None or precomputes(
            args,
            without_adapters or (is_peft(model) and not sharded),
            len(train_dataset),
            self.get_total_train_batch_size(args),
        )
        keep_copy = not without_adapters and (args.reference == "model" or (is_peft(model) and not sharded))
        if sharded and (keep_copy or args.reference_update_steps is not None):
            raise ValueError(
                "reference: expected 'precomputed' (or fresh LoRA) and reference_update_steps=None under FSDP and "
                f"DeepSpeed, whose shards cannot be swapped; got {args.reference!r} and {args.reference_update_steps}"
            )
        self._stacked = StackedAdapters.of(model)
        if self._stacked is not None and sharded:
            raise ValueError(
                "model: expected one active adapter under FSDP and DeepSpeed; got " + ", ".join(self._stacked.active)
            )
        if judges is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.get_tp_size() > 1):
            raise ValueError("judges: expected None under FSDP, DeepSpeed and tensor parallelism, which do not sample")
        warn_of_missing_labels(args, self.objectives, self.primary, train_dataset)
        self.reference = ReferenceModel(
            dtype=torch.bfloat16 if args.reference_dtype == "bfloat16" else None,
            offload=args.reference_offload,
            without_adapters=without_adapters,
        )
        if keep_copy:
            self.reference.keep_first(model)
        self._label_rate = label_rates(args, self.objectives, train_dataset)
        attach(
            model,
            PolicyForward(
                reference=self.reference,
                statistics=self._statistics,
                loss=LossOptions(args.tau, args.loss_type, args.max_ratio, args.estimator),
                head=HeadOptions(
                    transform=find_transform(model),
                    backend=args.backend,
                    max_buffer_bytes=args.max_buffer_bytes,
                    gradient_filter=args.gradient_filter,
                ),
                label_rate=self._label_rate,
                length_normalize=args.length_normalize,
                primary=self.objectives.index(self.primary),
                balance=self._balance,
            ),
        )
        if self.is_deepspeed_enabled:
            register_head(model)
        self.already_finished = self._stopped = False
        self._interrupts = Interrupts()
        self._train_data: str | None = None
        self._run: str | None = None
        self._unmet: list[UnmetThreshold] = []
        self._warned: set[str] = set()
        self._eval_sums: Tensor | None = None
        self._steps_an_epoch = 1
        self._reset_sums()
        self.add_callback(_StepCallback(self))
        if args.early_stopping_patience is not None:
            self.add_callback(_EarlyStopping(args.early_stopping_patience))

    def create_accelerator_and_postprocess(self) -> None:
        """As of ``transformers.Trainer``, with FSDP2 on CPUs as well."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = resolve_fsdp(self.accelerator, self.args.fsdp_plugin_args)
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator)

    # ------------------------------------------------------------------------------------------------ multipliers

    def _new_dual(self, args: MOPOConfig) -> DualAscent:
        assert isinstance(args.thresholds, dict)
        # The controller gives each step's own lengths; a win rate's slope is at most 1 / (4 tau), so this is the least.
        return DualAscent(
            self.objectives,
            self.primary,
            args.thresholds,
            lr=4 * args.tau if args.dual_lr == AUTO else float(args.dual_lr),  # type: ignore[arg-type]
            maximum=args.dual_max,
            smoothing=args.dual_smoothing,
            initial=self._initial_multiplier,
            patience=args.dual_patience,
        )

    def _split(
        self, args: MOPOConfig, data: PreferenceData | None, dual_dataset: Any, judges: Mapping[str, Judge] | None
    ) -> PreferenceData | None:
        """Settle the dual data and who measures on it; what is left for the loss."""
        self.dual_dataset: PreferenceData | None = None
        self._controller: Controller | None = None
        self._parts: tuple[list[int], list[int]] | None = None
        if data is None or not args.thresholds:
            return data
        reason = None
        if dual_dataset is not None:
            self.dual_dataset = as_preference_data(dual_dataset, "dual_dataset")
            fitted = {prompt_key(prompt) for prompt in data.dataset["prompt"]}
            if both := [1 for prompt in self.dual_dataset.dataset["prompt"] if prompt_key(prompt) in fitted]:
                raise ValueError(
                    f"dual_dataset: expected prompts that the loss never fits; {len(both)} of "
                    f"{len(self.dual_dataset)} are in train_dataset"
                )
        else:
            rest, held, reason = hold_out(args, data)
            if held:
                self._parts = rest, held
                data, self.dual_dataset = data.select(rest), data.select(held)
        if reason is not None and args.process_index == 0:
            logger.warning(reason)
        if self.dual_dataset is None:
            if args.threshold_relaxation is not None:
                raise ValueError(
                    "threshold_relaxation: expected dual data, on which values are measured; there is none"
                )
            return data
        if judges is not None:
            check_judges(args, judges, self.objectives)
            if context := self.dual_dataset.template_columns:
                raise ValueError(
                    f"judges: expected dual data without {context[0]}, which judges are not shown; got some"
                )
        solution = self.label_solution or solve_dual(args, self.objectives, self.primary, self.given_dataset)
        self._controller = Controller(args, self.objectives, self.dual_dataset, solution.slope, judges)
        return data

    @property
    def measurement(self) -> Measurement | None:
        """What the last dual step was made on."""
        return None if self._controller is None else self._controller.last

    @property
    def judges(self) -> Mapping[str, Judge] | None:
        """Who judges fresh answers in the dual steps."""
        return None if self._controller is None else self._controller.judges

    @property
    def in_sample(self) -> dict[str, float]:
        """Running means of satisfaction on the training pairs, by objective: what the policy has fitted, no measure of
        it."""
        return self._in_sample.value

    @property
    def multiplier(self) -> dict[str, float]:
        """Of every objective with a threshold, as it is now, or with a fixed multiplier."""
        assert isinstance(self.args.fixed_multipliers, dict)
        return self.dual.multiplier | self.args.fixed_multipliers

    @property
    def objective_weight(self) -> Tensor:
        """(K,) fp32: 1 for the primary, ``multiplier`` for those that have one, 0 for the others."""
        multiplier = self.multiplier
        return torch.tensor(
            [1.0 if name == self.primary else multiplier.get(name, 0.0) for name in self.objectives],
            dtype=torch.float32,
        )

    def _dual_steps(self) -> int:
        if self.args.dual_steps is not None:
            return self.args.dual_steps
        return max(_FEWEST_STEPS_BETWEEN, round(self._steps_an_epoch / _DUAL_STEPS_AN_EPOCH))

    def _dual_step(self, control: TrainerControl) -> None:
        """Measure on the dual data, move the multipliers, and log both."""
        controller, args, step = self._controller, self.args, self.state.global_step
        assert controller is not None
        part = controller.next_part()
        if controller.judges is not None:
            measurement = controller.from_win_rates(step, self._judged(part))
        else:
            ratios = self._log_ratios(part)
            measurement = controller.from_log_ratios(step, ratios, self.objective_weight, self._label_rate)
        warmup = _WARMUP_EPOCHS * self._steps_an_epoch if args.dual_warmup_steps is None else args.dual_warmup_steps
        logs, refused = controller.move(
            self.dual,
            measurement,
            self._learning_rate_share(),
            self._dual_steps() / self.state.max_steps,
            waiting=step <= warmup,
        )
        for name in refused if step > warmup else ():
            coverage = (
                "" if measurement.coverage is None else f", their mean importance weight is {measurement.coverage:.2f}"
            )
            self._warn_once(
                f"dual {name}",
                f"the multiplier of {name} was left as it is at step {step}: its value rests on an effective number of "
                f"{measurement.effective_prompts[name]:.1f} prompts{coverage}; asked for are dual_effective_prompts "
                f"{args.dual_effective_prompts:g} and dual_coverage {args.dual_coverage:g} (this is said once)",
            )
        logs |= self._multiplier_metrics()
        # A callback's answer to a log line takes back that one is due.
        due = control.should_log
        self.log(logs)
        control.should_log = due

    def _learning_rate_share(self) -> float:
        """Of its peak."""
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        peak = getattr(scheduler, "base_lrs", [self.args.learning_rate])[0]
        return float(scheduler.get_last_lr()[0] / peak) if peak else 0.0

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Evaluation mode, without gradient; modes and random states are left as they were."""
        modes = [(module, module.training) for module in self.model.modules()]
        optimizer: Any = self.optimizer
        device = self.args.device
        self.model.eval()
        if callable(getattr(optimizer, "eval", None)):
            optimizer.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
            if callable(getattr(optimizer, "train", None)):
                optimizer.train()

    def _dealt(self, part: Sequence[int], size: int) -> list[tuple[int, list[int]]]:
        """This rank's batches of a part of the dual data, each with its number, as many on every rank."""
        batches = [list(part[start : start + size]) for start in range(0, len(part), size)]
        sharing = self.get_tp_size()
        ranks, rank = self.accelerator.num_processes // sharing, self.accelerator.process_index // sharing
        rounds = math.ceil(len(batches) / ranks)
        own = [min(turn * ranks + rank, len(batches) - 1) for turn in range(rounds)]
        return [(number, batches[number]) for number in own]

    def _log_ratios(self, part: Sequence[int]) -> dict[int, list[float]]:
        """Of the policy to the first reference, for every response of these examples of the dual data, on every
        rank."""
        data = self.dual_dataset
        assert data is not None
        if self.args.estimator == "closed_form":
            return {index: [0.0] * len(data[index].responses) for index in part}
        found: dict[int, list[float]] = {}
        with self._measuring():
            for _, indices in self._dealt(part, self.args.per_device_eval_batch_size):
                batch = self._prepare_inputs(self.data_collator([data[index] for index in indices]))
                with self.compute_loss_context_manager():
                    ratio = self.model(**batch, log_ratio_only=True)["log_ratio"].double().tolist()
                rows: list[list[float]] = [[] for _ in indices]
                for place, value in zip(batch["prompt_index"].tolist(), ratio, strict=True):
                    rows[place].append(value)
                found |= dict(zip(indices, rows, strict=True))
        found = self._from_all_ranks(found)
        if not all(math.isfinite(value) for row in found.values() for value in row):
            raise FloatingPointError(self._not_finite("the log-probabilities", []))
        return found

    @cached_property
    def _dual_sampling(self) -> tuple[int, int]:
        """How many fresh answers are sampled at once, as many as an evaluation batch has responses at most; and the
        longest of them, in tokens."""
        args = self.args
        assert self.dual_dataset is not None
        items = self.data_collator.tokenize(list(self.dual_dataset))
        longest = max(len(response) for item in items for response in item.responses)
        rows = args.per_device_eval_batch_size * max(len(item.responses) for item in items)
        return rows, args.dual_max_new_tokens or args.max_response_length or longest

    def _judged(self, part: Sequence[int]) -> dict[int, dict[str, float]]:
        """Win rates of an answer of the policy to each of these prompts of the dual data, on every rank."""
        controller, data, args = self._controller, self.dual_dataset, self.args
        assert controller is not None
        assert data is not None
        size, tokens = self._dual_sampling
        found: dict[int, dict[str, float]] = {}
        with self._measuring(), self.compute_loss_context_manager():
            for number, indices in self._dealt(part, size):
                # The same on any number of ranks, and another in every dual step.
                seed = np.random.SeedSequence([args.seed, controller.rounds, number]).generate_state(1)
                answers = sample_responses(
                    self.model,
                    self.data_collator.tokenizer,
                    [self.data_collator.renderer.example_prompt_ids(data[index]) for index in indices],
                    samples_per_prompt=1,
                    max_new_tokens=tokens,
                    batch_size=len(indices),
                    seed=int(seed[0]),
                    renderer=self.data_collator.renderer,
                    progress=False,
                )
                found |= {
                    index: controller.win_rates(index, answer[0])
                    for index, answer in zip(indices, answers, strict=True)
                }
        return self._from_all_ranks(found)

    def _from_all_ranks(self, found: dict[int, Any]) -> dict[int, Any]:
        if self.accelerator.num_processes == 1:
            return found
        return dict(gather_object(list(found.items())))

    # -------------------------------------------------------------------------------------------------- reference

    def _given_parts(self, eval_dataset: Any) -> dict[str, PreferenceData]:
        """The data sets by the names that they were given as, each once."""
        parts: dict[str, PreferenceData] = {}
        if self.given_dataset is not None:
            # As given, so that runs with and without dual data share what is made of it.
            parts["train"] = self.given_dataset
        if self.dual_dataset is not None and self._parts is None:
            parts["dual"] = self.dual_dataset
        if isinstance(eval_dataset, dict):
            parts.update({f"eval_{name}": part for name, part in eval_dataset.items()})
        elif eval_dataset is not None and eval_dataset is not self.dual_dataset:
            parts["eval"] = eval_dataset
        return parts

    def _prepare_references(self) -> None:
        """Give every data set its log-probabilities under the first reference, if they are to be computed before."""
        if not self._precompute:
            return
        if self._parts is None:
            self.given_dataset = self.train_dataset
        parts = self._given_parts(self.eval_dataset)
        evaluates_dual = self.eval_dataset is self.dual_dataset
        lacking = {name: indices for name, part in parts.items() if (indices := without_reference(part))}
        if not lacking:
            return
        if self.reference.initial is None and not self.reference.without_adapters:
            with gathered(self.model):
                changed = fingerprint(self.model) != self._reference_fingerprint
            if changed:
                raise ValueError(
                    "model: expected the weights it had when the trainer was made, which are the reference"
                )
            self.reference.untrained = True
        place = self._output_dir() if self.args.reference_path is None else Path(self.args.reference_path)
        try:
            for name, indices in lacking.items():
                part = parts[name]
                # The pass draws a seed for its loader: training must not depend on whether it was needed.
                with torch.random.fork_rng(devices=[]), gathered(self.model):
                    values = reference_logprobs(
                        self.model,
                        part.select(indices),
                        self.data_collator,
                        self.accelerator,
                        place=place.parent if name != "train" and place.suffix == SUFFIX else place,
                        fallback=self._output_dir(),
                        model_fingerprint=self._reference_fingerprint,
                        batch_size=self.args.per_device_eval_batch_size,
                        progress=not self.args.disable_tqdm,
                        sharing=self.get_tp_size(),
                    )
                found = dict(zip(indices, values, strict=True))
                parts[name] = part.with_ref_logprob(
                    [found.get(index) or example.ref_logprob or () for index, example in enumerate(part)]
                )
        finally:
            self.reference.untrained = False
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: parts[f"eval_{name}"] for name in self.eval_dataset}
        if self._parts is None:
            self.train_dataset, self.dual_dataset = parts.get("train"), parts.get("dual")
            self.given_dataset = self.train_dataset
        else:
            self.given_dataset = parts["train"]
            self.train_dataset, self.dual_dataset = (self.given_dataset.select(part) for part in self._parts)
        if not isinstance(self.eval_dataset, dict):
            self.eval_dataset = self.dual_dataset if evaluates_dual else parts.get("eval")

    # --------------------------------------------------------------------------------------------------- training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As ``transformers.Trainer.train``; ``resume_from_checkpoint=True`` takes the newest *complete* checkpoint.

        The first Ctrl-C finishes the optimiser step and writes a checkpoint, the second stops at once; SIGTERM, SIGHUP,
        SIGUSR1 and SIGUSR2 do as the first, unless the program handles them itself. From a finished run's checkpoint
        the weights are loaded, and nothing is trained. Another run in ``output_dir`` is refused meanwhile.

        A checkpoint is resumed from under the same problem and the same rows in the same order only; with
        ``ignore_data_skip`` the rows may change, and an epoch begins anew. Thresholds, the length of training, the
        learning rate with its schedule and other numbers of the optimiser, precision, dropout, what moves the
        multipliers, and how the prompts of a step are laid out over micro-batches and processes, may change, which a
        line says.

        Raises:
            ValueError: nothing complete to resume from, a checkpoint of another reference, another problem or other
                rows, or another run in ``output_dir``.
            ThresholdError: a threshold could not be met and ``on_infeasible="error"``; a checkpoint is there.
            TrainingInterrupted: after such a signal; a checkpoint is there.
            FloatingPointError: loss, gradient or weights of a step are not finite; nothing of it is saved.
            WriteError: a checkpoint could not be written, as on a full disk; says what survived.
        """
        with sole_run(self._output_dir()) if self.args.should_save else nullcontext():
            try:
                return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            except OSError as error:
                if not disk_is_full(error):
                    raise
                with writing("a file of the run", self._output_dir(), self._survived):
                    raise

    def _train(
        self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
        self._prepare_references()
        self.dual = self._new_dual(self.args)
        self.reference.snapshot = None
        self._reset_sums()
        self._unmet, self._stopped = [], False
        self.already_finished = False
        if self._controller is not None:
            self._controller.reset()
        if checkpoint is not None:
            self._load_state(checkpoint)
        self._name_run(checkpoint)
        self._steps_taken = 0
        with self._interrupts.deferred():
            try:
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"resume_from_checkpoint: expected tensors and plain values in {checkpoint}, as nothing else is "
                    "unpickled; got other objects"
                ) from error
        self.already_finished = checkpoint is not None and self._steps_taken == 0
        if self.already_finished and self.is_world_process_zero():
            logger.warning(
                "nothing left to train: %s has %d of %d steps",
                checkpoint,
                self.state.global_step,
                self.state.max_steps,
            )
        if self._stopped:
            # Another rank's signal ends this one as well.
            raise TrainingInterrupted(last_complete_checkpoint(self._output_dir()), self._interrupts.signal or _CTRL_C)
        if self._unmet and self.args.on_infeasible == "error":
            raise ThresholdError(self._unmet)
        return output

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As of ``transformers.Trainer``, or batches by tokens with ``max_tokens_per_batch``; on the CPU."""
        args = self.args
        if args.max_tokens_per_batch is None:
            collator, self.data_collator = self.data_collator, NamingCollator(self.data_collator)
            try:
                return _left_on_cpu(super().get_train_dataloader())
            finally:
                self.data_collator = collator
        # The ranks take their own parts of one plan, so accelerate must not deal the batches out again.
        sampler = TokenBudgetSampler(
            self.data_collator.sizes(list(self.train_dataset)),
            args.max_tokens_per_batch,
            shared_prompts=self.data_collator.shared_prompts,
            shuffle=args.train_sampling_strategy != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
            ranks=self.accelerator.num_processes // self.get_tp_size(),
            rank=self.accelerator.process_index // self.get_tp_size(),
        )
        return TokenBudgetLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=NamingCollator(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As of ``transformers.Trainer``; its batches are on the CPU."""
        return _left_on_cpu(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As of ``transformers.Trainer``; its batches are on the CPU."""
        return _left_on_cpu(super().get_test_dataloader(test_dataset))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What of a batch is read on the host is read here, before the model runs: see ``forward_arguments``."""
        return super()._prepare_inputs(forward_arguments(inputs, self.args.device))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As of ``transformers.Trainer``; what the examples of the step are called is kept until it has ended."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._step_names = [getattr(batch, "names", []) for batch in batches]
        self._batch_sums = []
        return batches, items

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not entered when every step is done: the Trainer looks at that only after another one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _name_run(self, checkpoint: str | None) -> None:
        """Settle which run the checkpoints to come belong to."""
        if not self.args.should_save:
            return
        folder = self._output_dir()
        if checkpoint is not None:
            self._run = continue_run(folder, checkpoint)
            return
        if (other := last_complete_checkpoint(folder)) is not None:
            logger.warning(
                "starting afresh beside checkpoints of an earlier run, the last of which is %s: "
                "resume_from_checkpoint=true will take this run's only",
                other,
            )
        self._run = begin_run(folder)

    def _output_dir(self) -> Path:
        """Where the run keeps its files; the Trainer has filled in a default."""
        return Path(str(self.args.output_dir))

    def _resolve_checkpoint(self, resume: str | bool | None) -> str | None:
        if not resume:
            return None
        if resume is True:
            found = last_complete_checkpoint(self._output_dir())
            if found is None:
                raise ValueError(
                    "resume_from_checkpoint: expected a complete checkpoint in output_dir; "
                    f"{self.args.output_dir} has none"
                )
            return found
        if (damage := find_damage(resume)) is not None:
            raise ValueError(
                f"resume_from_checkpoint: expected a complete checkpoint ({MANIFEST_FILE} and every file it names, as "
                f"they were written); got {resume}: {damage}"
            )
        return str(resume)

    def _survived(self) -> str:
        """What is left of a run that cannot go on."""
        last = last_complete_checkpoint(self._output_dir())
        return f"training stopped at step {self.state.global_step}, the last complete checkpoint is {last or 'none'}"

    def _not_finite(self, what: str, names: list[str]) -> str:
        return not_finite(
            f"{what} of step {self.state.global_step} are", names, last_complete_checkpoint(self._output_dir())
        )

    def _refuse_weights_not_finite(self) -> None:
        """Before they are saved."""
        bad = any_not_finite(weights(self.model))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            bad = self._all_reduce(bad.to(self.args.device))
        if bad > 0:
            raise FloatingPointError(self._not_finite(f"the weights{first_not_finite(self.model)}", []))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """What the loss is a mean of, over the micro-batches of an optimiser step and all ranks: () fp64.

        Total pair weight, or responses for cloning. A mixture of experts' choices are counted on the way.
        """
        self._expert_load = self._count_experts(batch_samples)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batch_samples:
            if self.args.loss_type == "cloning" and "cu_seqlens" in batch:
                total += (scored_lengths(batch["target"], batch["cu_seqlens"]) > 0).sum().cpu()
            elif self.args.loss_type == "cloning":
                total += (batch["labels"][:, 1:] != -100).any(dim=1).sum().cpu()
            else:
                total += batch["pair_weight"].to("cpu", torch.float64).sum()
        return self._all_reduce(to_device(total, _fp64_device(device)))

    def _count_experts(self, batch_samples: list[Any]) -> Tensor | None:
        """How often the step chooses each expert; None where its loss has none, or a single batch that counts its
        own."""
        if self._balance is None or len(batch_samples) * self.accelerator.num_processes == 1:
            return None
        device = self.args.device
        total = torch.zeros(self._balance.experts + 1, dtype=torch.float64, device=_fp64_device(device))
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            for batch in batch_samples:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    total += self.model(**inputs, expert_load_only=True)["expert_load"].to(total)
        return self._all_reduce(total)

    def _all_reduce(self, sums: Tensor) -> Tensor:
        """The sum over ranks that have a batch of their own; every rank must call it."""
        if self.accelerator.num_processes == 1:
            return sums
        # Ranks that share their products (tensor parallelism) have the same batch.
        result: Tensor = self.accelerator.reduce(sums, reduction="sum") / self.get_tp_size()
        return result

    def _policy_arguments(self, normalizer: Tensor | float | None) -> dict[str, Any]:
        device = self.args.device
        if isinstance(normalizer, Tensor):
            normalizer = to_device(normalizer, device) if device.type != "mps" else float(normalizer)
        return {"objective_weight": to_device(self.objective_weight, device), "normalizer": normalizer}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's loss, times the ranks over which DDP and FSDP average gradients."""
        balance = {} if self._balance is None else {"balanced": True, "expert_load": self._expert_load}
        outputs = model(**inputs, **self._policy_arguments(num_items_in_batch), **balance)
        self._step_sums = self._step_sums + outputs["statistics"].to(self._step_sums.device)
        self._batch_sums.append(outputs["statistics"])
        loss = outputs["loss"] * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _reset_sums(self) -> None:
        self._step_sums = torch.zeros(self._statistics.size, dtype=torch.float64, device=_fp64_device(self.args.device))
        self._window_sums = torch.zeros(self._statistics.size, dtype=torch.float64)
        self._window_steps = 0
        self._window_sizes: list[float] = []
        self._window_seconds = 0.0
        self._in_sample = RunningMean(_IN_SAMPLE_DECAY)
        self._steps_taken = 0
        self._step_started = time.perf_counter()
        # Of the step that is under way: what its examples are called and what they came to, by micro-batch.
        self._step_names, self._batch_sums = [], []
        self._bad_gradient = torch.zeros((), device=self._step_sums.device)

    def _look_at_gradients(self) -> None:
        # A scaler of fp16 looks itself, and passes over a step that has overflowed.
        if self.accelerator.scaler is None:
            self._bad_gradient = any_not_finite(gradients(self.model))

    def _begin_step(self) -> None:
        self._step_started = time.perf_counter()

    def _end_step(self, control: TrainerControl) -> None:
        """After every optimiser step: its figures, a dual step if one is due, then the reference's turn."""
        # All ranks must stop at the same step, whichever of them has seen a signal or a number that is not finite.
        flags = self._step_sums.new_tensor([float(self._interrupts.signal is not None), 0.0, 0.0])
        flags[1] = self._bad_gradient
        flags[2] = any_not_finite(weights(self.model))
        sums = self._all_reduce(torch.cat([self._step_sums, flags])).cpu()
        self._step_sums = torch.zeros_like(self._step_sums)
        sums, (interrupted, bad_gradient, bad_weights) = sums[:-3], (sums[-3:] > 0).tolist()
        if bad_gradient or bad_weights or not torch.isfinite(sums).all():
            self._stop_not_finite(sums, bad_gradient)
        self._window_sums += sums
        self._window_steps += 1
        # Sums merge over steps, effective sample sizes do not: each is of one step's weights among themselves.
        summary = self._statistics.summary(sums)
        size = summary.get("effective_sample_size")
        if size is not None:
            self._window_sizes.append(size)
        self._window_seconds += time.perf_counter() - self._step_started
        self._steps_taken += 1
        values = {name: summary.get(f"satisfaction/{name}") for name in self.objectives}
        self._in_sample.update({name: value for name, value in values.items() if value is not None})

        args, step = self.args, self.state.global_step
        moves_reference = args.reference_update_steps is not None and step % args.reference_update_steps == 0
        # A relaxed threshold is a share of the value that the policy has now.
        due = step % self._dual_steps() == 0 or (moves_reference and args.threshold_relaxation is not None)
        if self._controller is not None and due:
            self._dual_step(control)
        if moves_reference:
            self.reference.update(self.model)
            if args.threshold_relaxation is not None:
                smoothed = self.dual.smoothed
                self.dual.set_thresholds(
                    {
                        name: args.threshold_relaxation * smoothed[name]
                        for name in self.dual.threshold
                        if name in smoothed
                    }
                )
        if args.estimator == "snis":
            share = (size or 0.0) / self._statistics.scalar(sums, "responses")
            if share < _COLLAPSED_SHARE:
                self._warn_once(
                    "snis",
                    f"the effective sample size of the snis estimate is {share:.1%} of the responses: "
                    "in-sample satisfaction rests on a handful of them, and steers nothing",
                )
        if unmet := self.dual.unmet():
            self._unmet = unmet
            if args.on_infeasible == "warn":
                self._warn_once("unmet", "; ".join(map(str, unmet)))
            else:
                control.should_save = control.should_training_stop = True
        if interrupted:
            self._stopped = control.should_save = control.should_training_stop = True

    def _stop_not_finite(self, sums: Tensor, bad_gradient: bool) -> NoReturn:
        """End the run at the step that has just been made.

        Raises:
            FloatingPointError: always.
        """
        in_loss = not bool(torch.isfinite(sums).all())
        if in_loss:
            what = "the loss or the log-probabilities"
        else:
            what = "the gradients" if bad_gradient else f"the weights{first_not_finite(self.model)}"
        names = []
        for batch, found in zip(self._step_names, self._batch_sums, strict=False):
            if not in_loss or not bool(torch.isfinite(found).all()):
                names += batch
        names = names if self.accelerator.num_processes == 1 else gather_object(names)
        raise FloatingPointError(self._not_finite(what, names))

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned and self.is_world_process_zero():
            logger.warning(message)
        self._warned.add(key)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds, to a training step's line, what the multipliers and the policy did since the last one."""
        if "loss" in logs and self._window_steps:
            logs.update(self._window_metrics())
            self._window_sums = torch.zeros_like(self._window_sums)
            self._window_steps, self._window_sizes, self._window_seconds = 0, [], 0.0
        super().log(logs, start_time)

    def _window_metrics(self) -> dict[str, float]:
        summary = self._statistics.summary(self._window_sums)
        summary.pop("effective_sample_size", None)
        # The policy fits these pairs: by its name no one should take a figure of theirs for a measure of it. TRL's
        # figures have TRL's names.
        values = ("satisfaction/", "standard_error/", "r_squared")
        result = {f"in_sample/{key}" if key.startswith(values) else key: value for key, value in summary.items()}
        result |= self._multiplier_metrics()
        if self._window_sizes:
            result["effective_sample_size"] = sum(self._window_sizes) / len(self._window_sizes)
        if self._balance is not None:
            result["aux_loss"] = self._statistics.scalar(self._window_sums, "aux_loss") / self._window_steps
        seconds = max(self._window_seconds, 1e-9)
        result["tokens_per_second"] = self._statistics.scalar(self._window_sums, "tokens") / seconds
        result["scored_tokens_per_second"] = self._statistics.scalar(self._window_sums, "scored_tokens") / seconds
        result["peak_memory_mib"] = peak_memory_mib(self.args.device)
        return result

    def _control_metrics(self, summary: dict[str, float]) -> dict[str, float]:
        """A summary with the multipliers, and threshold and slack of every constrained objective."""
        result = summary | self._multiplier_metrics()
        for name, bound in self.dual.threshold.items():
            if f"satisfaction/{name}" in summary:
                result[f"slack/{name}"] = summary[f"satisfaction/{name}"] - bound
        return result

    def _multiplier_metrics(self) -> dict[str, float]:
        found = {f"multiplier/{name}": value for name, value in self.multiplier.items()}
        return found | {f"threshold/{name}": bound for name, bound in self.dual.threshold.items()}

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As ``transformers.Trainer.evaluate``, with satisfaction, its standard error by prompt, slack, margin and KL
        among the metrics.

        The loss is the one training minimises, under the multipliers of the moment: it is not comparable between steps
        at which they differ; satisfaction is. ``feasible_primary`` orders policies as the problem does: the primary
        objective's satisfaction where no threshold is missed, else the worst slack, which is below any satisfaction.

        Of several data sets, ``feasible_primary`` is the least of theirs: no threshold is missed on any of them.
        """
        self._prepare_references()
        given: dict[str, PreferenceData] = {}
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: as_preference_data(part, "eval_dataset") for name, part in eval_dataset.items()}
            given = {f"eval_{name}": part for name, part in eval_dataset.items()}
        elif eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = as_preference_data(eval_dataset, "eval_dataset")
            given = {"eval": eval_dataset}
        if given:
            check_labels(self.args, self.objectives, self.primary, given, quiet=True)
            prepare_rows(self.model, self.data_collator, given, self.args, quiet=True)
        result: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        parts = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(parts, dict):
            found = [result.get(f"{metric_key_prefix}_{name}_{BEST_METRIC}") for name in parts]
            if found and None not in found:
                least = {f"{metric_key_prefix}_{BEST_METRIC}": min(value for value in found if value is not None)}
                self.log(dict(least))
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, least)
                result |= least
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Sums over the whole data set replace the mean of batch means."""
        self._eval_sums = torch.zeros(self._statistics.size, dtype=torch.float64, device=_fp64_device(self.args.device))
        output = super().evaluation_loop(*args, **kwargs)
        sums = self._all_reduce(self._eval_sums).cpu()
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = self._control_metrics(self._statistics.summary(sums))
        slacks = [metrics.get(f"slack/{name}") for name in self.dual.threshold]
        primary = metrics.get(f"satisfaction/{self.primary}")
        if primary is not None and None not in slacks:
            worst = min((slack for slack in slacks if slack is not None), default=0.0)
            metrics[BEST_METRIC] = primary if worst >= 0 else worst
        if items := self._statistics.scalar(sums, "items"):
            metrics["loss"] = self._statistics.scalar(sums, "loss") / items
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Adds a batch to the sums; the loss returned is a sum, too."""
        inputs = self._prepare_inputs(self._mask_duplicate_examples(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, **self._policy_arguments(1.0))
        assert self._eval_sums is not None
        self._eval_sums += outputs["statistics"].to(self._eval_sums.device)
        return outputs["loss"].detach(), None, None

    def _mask_duplicate_examples(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The last batch with several ranks is filled up by repeating examples: those count nothing."""
        state, sharing = self.accelerator.gradient_state, self.get_tp_size()
        if self.accelerator.num_processes == sharing or not state.end_of_dataloader or state.remainder <= 0:
            return inputs
        first = self.accelerator.process_index // sharing * self.args.per_device_eval_batch_size
        real = inputs["prompt_index"] < state.remainder - first
        inputs = {**inputs, "pair_weight": inputs["pair_weight"] * real[inputs["pairs"][:, 0]]}
        if "cu_seqlens" in inputs:
            scored = real.repeat_interleave(inputs["cu_seqlens"].diff())
            return {**inputs, "target": inputs["target"].masked_fill(~scored, -100)}
        return {**inputs, "labels": inputs["labels"].masked_fill(~real[:, None], -100)}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``transformers.Trainer.save_model``, with the model card as README.md.

        Raises:
            FloatingPointError: a weight is NaN or infinite; nothing is written.
            WriteError: the policy could not be written, as on a full disk; says what survived.
        """
        if not _internal_call:
            self._refuse_weights_not_finite()
        folder = Path(output_dir or str(self.args.output_dir))
        with nullcontext() if _internal_call else writing(f"the policy in {folder}", folder, self._survived):
            super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                model_card(self).save(folder / "README.md")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As of ``transformers.Trainer``, with the model's own dropout in its configuration; adapters that act together
        become one."""
        if self._stacked is None:
            with self.as_configured():
                super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self._stacked.save(self.model, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    @contextmanager
    def as_configured(self) -> Iterator[None]:
        """The model has the dropout of its own configuration, to be saved with it."""
        with nullcontext() if self._noise is None else self._noise.as_configured():
            yield

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._stacked is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._stacked.load(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._stacked is None:
            super()._load_best_model()
        else:
            self._stacked.load(self.model, Path(str(self.state.best_model_checkpoint)))

    def _load_callback_state(self) -> None:
        """A resumed run stops early where an undisturbed one would."""
        super()._load_callback_state()
        state: Any = self.state
        for callback in self.callback_handler.callbacks:
            stored = state.stateful_callbacks.get(type(callback).__name__, {})
            if isinstance(callback, EarlyStoppingCallback) and isinstance(stored, dict):
                for name, value in stored.get("attributes", {}).items():
                    setattr(callback, name, value)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's files, then ours, then the manifest; old checkpoints go only when the new one counts."""
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._refuse_weights_not_finite()
        try:
            with writing(f"checkpoint {folder}", folder, self._survived):
                self._write_checkpoint(folder, model, trial)
        except WriteError:
            # What there is of it counts for nothing, and takes up the disk.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.args.should_save:
            rotate(Path(run_dir), self.args.save_total_limit, folder, self.state.best_model_checkpoint)

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            begin_checkpoint(folder)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and not self.args.save_only_model:
            torch.save(self._state(), folder / STATE_FILE)
        # The other ranks' random states belong to the checkpoint.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete_checkpoint(folder, self._run)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As of ``transformers.Trainer``; options of the optimiser that were changed take effect, with a warning."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        wanted = optimizer_options(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        changed = set_optimizer_options(self.optimizer, self.lr_scheduler, wanted)
        if changed and self.is_world_process_zero():
            logger.warning("resuming from %s with %s", checkpoint, ", ".join(changed))

    def _state(self) -> dict[str, Any]:
        snapshot = self.reference.snapshot
        return {
            "dual": self.dual.state_dict(),
            "controller": None if self._controller is None else self._controller.state_dict(),
            "in_sample": self._in_sample.sums,
            "settings": self._settings(),
            "reference_fingerprint": self._reference_fingerprint,
            "snapshot": None if snapshot is None else {name: value.cpu() for name, value in snapshot.items()},
            "window_sums": self._window_sums,
            "window_steps": self._window_steps,
            "window_sizes": self._window_sizes,
            "window_seconds": self._window_seconds,
        }

    def _settings(self) -> dict[str, Any]:
        """The problem as it was set, and the rows; ``self.dual`` has the thresholds as they have moved."""
        assert isinstance(self.args.thresholds, dict)
        if self._train_data is None:
            self._train_data = rows_fingerprint(self.train_dataset)
        problem = {name: getattr(self.args, name) for name in _PROBLEM}
        if self.is_deepspeed_enabled:
            # Which loads its optimiser whole, and leaves none of today's numbers in it.
            problem |= {name: getattr(self.args, name) for name in ("learning_rate", "weight_decay")}
        return {
            "objectives": list(self.objectives),
            "primary": self.primary,
            **{name: getattr(value, "value", value) for name, value in problem.items()},
            **free_settings(self.args),
            **adapter_config(self.model),
            **row_settings(self.args, self.accelerator.num_processes // self.get_tp_size(), self._train_data),
            "dual_data": "none" if self._controller is None else self._controller.fingerprint(),
            "thresholds": dict(self.args.thresholds),
        }

    def _load_state(self, checkpoint: str) -> None:
        """What ``_state`` saved. Thresholds that were set to another value since then are taken, with a warning.

        Raises:
            ValueError: the checkpoint's reference was another model than this trainer's, or its problem another.
        """
        try:
            state = torch.load(os.path.join(checkpoint, STATE_FILE), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"resume_from_checkpoint: expected tensors and plain values in {checkpoint}, as nothing else is "
                "unpickled; got other objects"
            ) from error
        # Earlier versions did not keep the settings: nothing is known to differ.
        current = self._settings()
        settings = current | state.get("settings", {})
        wanted, before = current.pop("thresholds"), settings.pop("thresholds")
        current["objectives with thresholds"], settings["objectives with thresholds"] = sorted(wanted), sorted(before)
        for name, (old, value) in differences(current, settings).items():
            if not may_change(name, current, settings, skips_rows=not self.args.ignore_data_skip):
                raise ValueError(
                    f"{name}: expected {old!r}, with which {checkpoint} was trained; got {value!r} ({row_hint(name)})"
                )
            if self.is_world_process_zero():
                logger.warning("resuming from %s with %s %s (was %s)", checkpoint, name, value, old)
        if state["reference_fingerprint"] != self._reference_fingerprint:
            raise ValueError(
                f"model: expected the model that {checkpoint} started from, which is its reference; got other weights"
            )
        self.dual.load_state_dict(state["dual"])
        if changed := {name: bound for name, bound in wanted.items() if bound != before[name]}:
            self.dual.set_thresholds(changed)
            if self.is_world_process_zero():
                shown = ", ".join(f"{name} {bound:g} (was {before[name]:g})" for name, bound in changed.items())
                logger.warning("resuming from %s with other thresholds: %s", checkpoint, shown)
        if state["snapshot"] is not None:
            self.reference.load(self.model, state["snapshot"])
        if self._controller is not None and state.get("controller") is not None:
            self._controller.load_state_dict(state["controller"])
        self._in_sample.sums = state.get("in_sample", {})
        if state["window_sums"].shape != self._window_sums.shape:
            return  # of a version with fewer sums: the log line that is under way begins here
        self._window_sums = state["window_sums"]
        self._window_steps, self._window_seconds = state["window_steps"], state["window_seconds"]
        self._window_sizes = list(state.get("window_sizes", []))


def _left_on_cpu(loader: DataLoader[Any]) -> DataLoader[Any]:
    """``loader`` without accelerate moving its batches to a device: what is read of them would be read back."""
    loader.device = None
    return loader


def _fp64_device(device: torch.device) -> torch.device:
    """``device``, or the CPU where it has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far, MiB: the allocator's on a GPU, the process's otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows keeps no such count.
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
