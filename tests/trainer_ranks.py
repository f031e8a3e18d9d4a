"""What every rank of a distributed test run does; started by torchrun.

    torchrun --nproc-per-node 2 trainer_ranks.py FOLDER

Rank 0 writes what it ends with to FOLDER/KIND.pt for each kind of run, for comparison with a single process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trainer_samples import lora, make_data, make_model, make_trainer
from transformers import TrainerCallback

from mopo_kernels.trainer import MOPOTrainer

KINDS = ("full", "lora", "lagged", "cloning")
SHARDED = ("full", "lora")
HELD_OUT = 5


class Gradients(TrainerCallback):
    """The gradients that each optimiser step used."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = getattr(model, "module", model).named_parameters()
        self.seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def build(kind: str, folder: Path, ranks: int) -> MOPOTrainer:
    """4 prompts an optimiser step: 2 ranks x 2 micro-batches of one, or one batch of 4."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1 if ranks == 2 else 4,
        "gradient_accumulation_steps": 2 if ranks == 2 else 1,
        "per_device_eval_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "thresholds": {"brief": 0.55},
        "on_infeasible": "warn",
        "initial_multiplier": {"brief": 0.2},
        "eval_dataset": make_data(HELD_OUT, seed=9),
    }
    model = make_model(dtype=torch.float64)
    if kind in ("lora", "lagged"):
        model = lora(model, target_modules=["q_proj", "lm_head"])
        model = model.to(torch.float64)
    if kind == "lagged":
        settings |= {"reference": "model", "reference_update_steps": 2, "threshold_relaxation": 0.9}
    if kind == "cloning":
        settings |= {"loss_type": "cloning"}
    # The first prompts of make_data(8) have 2 to 4 responses: the ranks' micro-batches differ in pairs and tokens.
    return make_trainer(folder, model, make_data(8), **settings)


def run(kind: str, folder: Path, ranks: int) -> dict[str, Any]:
    trainer = build(kind, folder, ranks)
    recorder = Gradients()
    trainer.add_callback(recorder)
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "gradients": recorder.seen,
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "dual": trainer.dual.state_dict(),
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "eval": metrics,
        "ref_logprob": [example.ref_logprob for example in trainer.train_dataset],
    }


def shard_gradients(kind: str, folder: Path) -> dict[str, float]:
    """Under FSDP2, one prompt on rank 0 and three on rank 1: the worst error of each gradient, relative to the largest.

    transformers ignores its FSDP options without a GPU, so the attached forward is sharded here by hand; the expected
    gradients are those of the four prompts on the same model before it is sharded.
    """
    model = make_model(dtype=torch.float64)
    if kind == "lora":
        model = lora(model, target_modules=["q_proj", "lm_head"]).to(torch.float64)
    reference = "model" if kind == "lora" else "precomputed"
    trainer = make_trainer(folder, model, make_data(8), reference=reference)
    trainer._prepare_references()
    data, weight = trainer.train_dataset, trainer.dual.weight
    model.train()
    whole = trainer.data_collator([data[i] for i in range(4)])
    model(**whole, objective_weight=weight)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.get_base_model() if kind == "lora" else model).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    part = trainer.data_collator([data[i] for i in ((0,), (1, 2, 3))[torch.distributed.get_rank()]])
    normalizer = whole["pair_weight"].double().sum()
    loss = model(**part, objective_weight=weight, normalizer=normalizer)["loss"]
    (loss * 2).backward()
    largest = max(float(value.abs().max()) for value in expected.values())
    return {
        name: float((p.grad.full_tensor() - expected[name]).abs().max()) / largest
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for kind in KINDS:
        result = run(kind, folder / kind, 2)
        if torch.distributed.get_rank() == 0:
            torch.save(result, folder / f"{kind}.pt")
    for kind in SHARDED:
        errors = shard_gradients(kind, folder / f"shards-{kind}")
        if torch.distributed.get_rank() == 0:
            torch.save(errors, folder / f"shards-{kind}.pt")
    torch.distributed.barrier()
    # Everything is written. Gloo's threads are left alone: taking them down aborts now and then ("terminate called
    # without an active exception"), which says nothing about the run.
    os._exit(0)


if __name__ == "__main__":
    main()
