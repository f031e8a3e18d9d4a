"""A training run and the judging of a policy: what the study is made of, in forms that a file can hold."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mopo_kernels import MOPOConfig, MOPOTrainer, linear_mopo_loss
from mopo_kernels.data import PreferenceCollator, PreferenceData
from mopo_kernels.evaluation import encode_prompt, judge_responses, sample_responses
from mopo_kernels.trainer.trainer import peak_memory_mib
from studies.language_model.policies import Mixture, Policies, Weights, response_logprobs
from studies.language_model.problem import (
    DUAL_SHARE,
    JUDGES,
    MAX_NEW_TOKENS,
    OBJECTIVES,
    PRIMARY,
    RESPONSES,
    has_fast_bfloat16,
    held_out_pairs,
    labelled_pairs,
    some_prompts,
)

logger = logging.getLogger(__name__)

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16")}
# Log lines a run, whatever its length, beside those of its dual steps: all results together are to stay small.
_LOG_LINES = 40
# The most that tf32 or bf16 may move the loss, or its gradient, relatively.
_BACKEND_ERROR = 0.05
# Of the warm-up of the learning rate, optimiser steps.
_WARMUP = 3


@dataclass(frozen=True)
class Device:
    """Where runs are computed, and how.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        precision: of products: ``fp32``, ``tf32`` (a GPU's alone, weights in fp32) or ``bf16`` (autocast in training;
            answers are sampled without it).
        backend: of the fused loss.
        rows: sequences sampled at once.
        forward: prompts, each with its responses, in a pass without gradient.
        shared_prompts: see ``MOPOConfig``. One row without padding saves a CPU's products; padded rows save a GPU's
            launches, of which there are two for every response and layer otherwise.
        threads: of each process on the CPU.
    """

    kind: str = "cpu"
    precision: str = "fp32"
    backend: str = "auto"
    rows: int = 64
    forward: int = 8
    shared_prompts: str = "auto"
    threads: int = 1

    @classmethod
    def of(cls, kind: str, precision: str | None = None, threads: int = 1) -> Device:
        """The settings for ``cpu`` or ``cuda``; precision by default ``bf16`` on a CPU that multiplies it itself."""
        if kind not in PRECISIONS:
            raise ValueError(f"device: expected {' or '.join(PRECISIONS)}; got {kind!r}")
        if precision is None:
            precision = "tf32" if kind == "cuda" else "bf16" if has_fast_bfloat16(kind) else "fp32"
        if precision not in PRECISIONS[kind]:
            raise ValueError(f"precision on {kind}: expected one of {', '.join(PRECISIONS[kind])}; got {precision!r}")
        if kind == "cpu":
            return cls(precision=precision, threads=threads)
        return cls("cuda", precision, rows=600, forward=32, shared_prompts="never", threads=threads)

    @property
    def torch(self) -> torch.device:
        return torch.device(self.kind)

    def prepare(self) -> None:
        """Settings of this process."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision("highest" if self.precision == "fp32" else "high")


@dataclass(frozen=True)
class Run:
    """One trained policy.

    Attributes:
        name: of its folder and its result.
        method: for tables.
        primary: the objective with weight 1.
        thresholds: with dual ascent; empty without.
        multipliers: of the other objectives, fixed; empty with thresholds.
        loss_type, estimator, tau, reference_update_steps: see ``MOPOConfig``.
        learning_rate: its peak; a cosine to 0.
        lora_rank: of all linear layers; alpha is twice that.
        steps: of the optimiser.
        prompts_per_step: each with its responses and all their pairs.
        responses: of a prompt that the loss fits; the dual data have all answers there are.
        prompts: number of training prompts, dual data included; 0 is all.
        seed: of the adapter, the order, and the split into loss and dual data.
        judged: whether the multipliers follow fresh judged answers in place of the dual data's labels.
        settings: any further ones of ``MOPOConfig``.
        checkpoints: steps after which the adapter is kept as well.
        held_out: so many validation prompts, whose base answers the judges compare, are evaluated before the first step
            and after every ``held_out_steps``: what the log history has as ``eval_r_squared`` and so on.
        held_out_steps: see there.
        margins: run -> factor: what MODPO takes off a pair's log-odds, the sum of factor times the difference of the
            responses' log-ratios under that run, as a ``ratios`` job found them.
        start: run (or ``run/step-N``) -> factor on its update: the policy that this one starts from, and its reference.
    """

    name: str
    method: str = "mopo"
    primary: str = PRIMARY
    thresholds: Mapping[str, float] = field(default_factory=dict)
    multipliers: Mapping[str, float] = field(default_factory=dict)
    loss_type: str = "regression"
    estimator: str = "snis"
    tau: float = 0.15
    learning_rate: float = 2e-4
    lora_rank: int = 16
    steps: int = 70
    prompts_per_step: int = 8
    responses: int = RESPONSES
    prompts: int = 0
    seed: int = 0
    judged: bool = False
    reference_update_steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Sequence[int] = ()
    held_out: int = 0
    held_out_steps: int = 35
    margins: Mapping[str, float] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.thresholds and self.multipliers:
            raise ValueError(f"run {self.name}: expected thresholds or multipliers; got both")
        if late := [step for step in self.checkpoints if not 0 < step < self.steps]:
            raise ValueError(f"checkpoints of {self.name}: expected steps before the last, {self.steps}; got {late}")


class _KeepAdapter(TrainerCallback):
    """Saves the adapter after some of the steps; the trainer's own checkpoints hold the optimiser's state as well."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            kwargs["model"].save_pretrained(str(self.folder / f"step-{state.global_step}"))


def _config(run: Run, folder: Path, reference: Path, device: Device, **changes: Any) -> MOPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "primary": run.primary,
        **({"fixed_multipliers": dict(run.multipliers)} if run.multipliers else {"thresholds": dict(run.thresholds)}),
        "tau": run.tau,
        "loss_type": run.loss_type,
        "estimator": run.estimator,
        "on_infeasible": "warn",
        "reference": "precomputed",
        "reference_path": str(reference),
        "reference_update_steps": run.reference_update_steps,
        "max_steps": run.steps,
        "per_device_train_batch_size": run.prompts_per_step,
        "per_device_eval_batch_size": device.forward,
        "max_response_length": MAX_NEW_TOKENS,
        "truncate_responses": True,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": _WARMUP,
        "logging_steps": max(1, run.steps // _LOG_LINES),
        "save_strategy": "no",
        **({"eval_strategy": "steps", "eval_steps": run.held_out_steps, "eval_on_start": True} if run.held_out else {}),
        "report_to": "none",
        "disable_tqdm": True,
        "shared_prompts": device.shared_prompts,
        "backend": device.backend,
        "bf16": device.precision == "bf16",
        "use_cpu": device.kind == "cpu",
        "seed": run.seed,
        **run.settings,
        **changes,
    }
    return MOPOConfig(**settings)


def rounded(value: Any, digits: int = 5) -> Any:
    """``value`` with every float in it to so many significant digits, fit for JSON: NaN and infinities become None."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    return value


def with_margins(data: PreferenceData, ratios: Sequence[tuple[Sequence[Sequence[float]], float]]) -> PreferenceData:
    """``data`` with ``sum factor * (ratio[i] - ratio[j])`` as the margin of every pair, nats.

    Args:
        data: the examples.
        ratios: by reward, [example][response] log-ratios and their factor.
    """
    examples = []
    for index, example in enumerate(data):
        pairs = [
            dataclasses.replace(
                pair, margin=sum(factor * (ratio[index][pair.i] - ratio[index][pair.j]) for ratio, factor in ratios)
            )
            for pair in example.pairs
        ]
        examples.append(dataclasses.replace(example, pairs=tuple(pairs)))
    return PreferenceData.from_examples(examples, data.objectives)


def log_ratios(policies: Policies, weights: Weights, data: PreferenceData, device: Device) -> list[list[float]]:
    """[example][response] log-probability of the data's responses under a policy over that under the base, nats."""
    collator = PreferenceCollator(
        policies.tokenizer, data.objectives, max_response_length=MAX_NEW_TOKENS, truncate=True
    )
    items = collator.tokenize(list(data))
    sequences = [(item.prompt, response) for item in items for response in item.responses]
    rows = 4 * device.forward
    base = response_logprobs(policies.model, sequences, rows, device.backend)
    with policies.merged(weights) as model:
        ratio = iter(
            [a - b for a, b in zip(response_logprobs(model, sequences, rows, device.backend), base, strict=True)]
        )
    return [[next(ratio) for _ in item.responses] for item in items]


def train(
    run: Run,
    policies: Policies,
    answers: Mapping[str, Sequence[str]],
    out: Path,
    device: Device,
    ratios: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> dict[str, Any]:
    """Train ``run`` and save its adapter in ``out/adapters/<name>``, those of checkpoints in ``step-N`` below it.

    The reference's log-probabilities are shared by all runs of the same data that start from the same policy: whichever
    process comes first computes them, in ``out/reference``, and the others wait for it.

    Args:
        run, policies, out, device: what, of which model, where.
        answers: of the base model, by prompt. With thresholds the multipliers follow a fifth of the prompts.
        ratios: for ``run.margins``, by run, the log-ratios of the first ``run.responses`` answers to every prompt.

    Returns:
        log history, final multipliers, the last measurement on the dual data, the labels' own solution, seconds and
        peak memory, fit for JSON.
    """
    folder = out / "adapters" / run.name
    begun = time.perf_counter()
    data = labelled_pairs(answers, run.responses)
    if run.margins:
        assert ratios is not None
        data = with_margins(data, [(ratios[name], factor) for name, factor in run.margins.items()])
    data, dual = some_prompts(data, run.prompts), None
    if run.thresholds:
        rest, held = data.split_indices(DUAL_SHARE, run.seed)
        data, dual = data.select(rest), some_prompts(labelled_pairs(answers), run.prompts).select(held)
    model = policies.copied({str(out / "adapters" / name): factor for name, factor in run.start.items()})
    torch.manual_seed(run.seed)
    policy = get_peft_model(
        model,
        LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer = MOPOTrainer(
        model=policy,
        args=_config(run, folder, out / "reference", device),
        train_dataset=data,
        dual_dataset=dual,
        eval_dataset=held_out_pairs(run.held_out) if run.held_out else None,
        processing_class=policies.tokenizer,
        judges={name: JUDGES[name] for name in OBJECTIVES} if run.judged else None,
        callbacks=[_KeepAdapter(folder, run.checkpoints)],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    policy.save_pretrained(str(folder))
    solution, measured = trainer.label_solution, trainer.measurement
    return rounded(
        {
            "history": trainer.state.log_history,
            "steps": trainer.state.global_step,
            "fitted_prompts": len(trainer.train_dataset),
            "multiplier": {**trainer.dual.multiplier, **run.multipliers},
            "measurement": None if measured is None else dataclasses.asdict(measured),
            "label_solution": None
            if solution is None
            else {
                "multiplier": solution.multiplier,
                "satisfaction": solution.satisfaction,
                "feasible": solution.feasible,
            },
            "seconds": time.perf_counter() - begun,
            "peak_memory_mib": peak_memory_mib(device.torch),
            "backend": device.backend,
        }
    )


def draw(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    rows: int,
    tokens: int = MAX_NEW_TOKENS,
) -> list[list[str]]:
    """[prompt][sample] answers at temperature 1, of at most ``tokens`` tokens, ``rows`` of them at once."""
    return sample_responses(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=samples,
        max_new_tokens=tokens,
        batch_size=rows,
        seed=seed,
        progress=False,
    )


def evaluate(
    policies: Policies,
    weights: Weights,
    prompts: Sequence[str],
    samples: int,
    device: Device,
    seed: int,
    *,
    mixture: bool = False,
    kl_samples: int = 0,
    tokens: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:
    """Sample answers of the policy ``base + sum weights[a] * update_a`` and judge them.

    Args:
        policies, weights: the policy; no weights are the base model.
        prompts (X): in the order of the scores.
        samples: answers a prompt, at temperature 1, of at most ``tokens`` tokens.
        seed: of the answers.
        mixture: instead of the updates, mix the logits of the policies ``base + update_a``.
        kl_samples: so many answers a prompt are scored under policy and base; 0, and for a mixture, none.

    Returns:
        ``scores``: objective -> [prompt][sample], so that anything can be computed later without sampling again;
        ``kl``: [prompt] mean log-ratio of the policy's own answers to the base, nats, or None. Texts are tokenised
        again for it, and an answer that fills ``tokens`` is taken for unfinished;
        ``seconds``, and the first answer to each of the first prompts as ``texts``.
    """
    begun = time.perf_counter()

    def sample(model: Any, rows: int) -> list[list[str]]:
        return draw(model, policies.tokenizer, prompts, samples, seed, rows, tokens)

    kl: list[float] | None = None
    if mixture:
        models = [policies.copied({folder: 1.0}) for folder in weights]
        answers = sample(Mixture(models, list(weights.values())), max(1, device.rows // len(models)))
    else:
        with policies.merged(weights) as model:
            answers = sample(model, device.rows)
            if kl_samples:
                sequences = _scored(policies.tokenizer, prompts, [row[:kl_samples] for row in answers], tokens)
                own = response_logprobs(model, sequences, 4 * device.forward, device.backend)
        if kl_samples:
            base = response_logprobs(policies.model, sequences, 4 * device.forward, device.backend)
            ratio = torch.tensor(own) - torch.tensor(base)
            kl = ratio.view(len(prompts), -1).mean(1).tolist()
    sampled = time.perf_counter()
    scores = judge_responses(JUDGES, prompts, answers, progress=False)
    return {
        "scores": rounded(scores, 6),
        "kl": rounded(kl),
        "texts": [answer[0] for answer in answers[:5]],
        "seconds": rounded(sampled - begun),
        "judging_seconds": rounded(time.perf_counter() - sampled),
    }


def _scored(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]], tokens: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids, prompt after prompt, each finished answer with its end."""
    sequences = []
    for prompt, drawn in zip(prompts, answers, strict=True):
        opening = encode_prompt(tokenizer, prompt)
        for answer in drawn:
            ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])[:tokens]
            sequences.append((opening, ids if len(ids) == tokens else [*ids, tokenizer.eos_token_id]))
    return sequences


def backend_error(head: Tensor, device: Device) -> float:
    """How far the fused loss on the device is from the plain one of a CPU in fp32: relative, loss or gradient.

    Args:
        head: (V, H) the model's output embeddings, on any device.
        device: where, in which precision and with which backend.
    """
    generator = torch.Generator().manual_seed(0)
    rows = 192
    hidden = torch.randn(rows, head.shape[1], generator=generator)
    target = torch.randint(head.shape[0], (rows,), generator=generator)

    def loss_and_gradient(kind: str, backend: str, bf16: bool) -> tuple[Tensor, Tensor]:
        # A leaf of its own: on the CPU `to` gives the tensor itself.
        leaf = hidden.clone().to(kind).detach().requires_grad_()
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
            output = linear_mopo_loss(
                leaf,
                head.detach().to(kind),
                target.to(kind),
                torch.tensor([0, 40, 90, 140, rows]),
                torch.tensor([[0, 1], [2, 3]]),
                torch.tensor([[1.0, 0.0], [0.5, 1.0]], device=kind),
                torch.tensor([1.0, 0.3], device=kind),
                ref_logprob=torch.full((4,), -500.0, device=kind),
                tau=0.15,
                backend=backend,
            )
        output.loss.backward()
        assert leaf.grad is not None
        return output.loss.detach().cpu(), leaf.grad.cpu()

    loss, plain = loss_and_gradient("cpu", "naive", False)
    found, gradient = loss_and_gradient(device.kind, device.backend, device.precision == "bf16")
    return max(float((gradient - plain).norm() / plain.norm()), float((found - loss).abs() / loss.abs()))


def checked_backend(model: Any, device: Device) -> Device:
    """``device`` with the fastest backend that is right on it.

    On a GPU ``auto`` is tried on the model's own head: where it fails, or is further off than the precision explains,
    runs take ``torch``, and a line says so.
    """
    if device.kind != "cuda" or device.backend != "auto":
        return device
    try:
        error = backend_error(model.get_output_embeddings().weight, device)
    except Exception as failure:  # whatever a compiler or a driver raises
        logger.warning("backend auto fails here (%s: %s): taking torch", type(failure).__name__, failure)
        return dataclasses.replace(device, backend="torch")
    if not error < _BACKEND_ERROR:
        logger.warning("backend auto is off by %.3g here: taking torch", error)
        return dataclasses.replace(device, backend="torch")
    return device
