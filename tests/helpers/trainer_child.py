"""A training run in a process of its own, so that it can be killed.

python trainer_child.py KIND FOLDER [kill-at-step-5 | kill-while-saving-6]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from trainer_samples import STEERED, brevity, lora, make_data, make_dual_data, make_model, make_trainer
from transformers import TrainerCallback

from mopo_kernels.trainer import MOPOTrainer


def build(kind: str, folder: Path) -> MOPOTrainer:
    """8 prompts, 4 steps an epoch, 10 steps, checkpoints after 3, 6 and 9; log lines that span checkpoints."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 5,
        "thresholds": {"brief": 0.8},
        "on_infeasible": "warn",
        "initial_multiplier": "zero",
        "reference_update_steps": 2,
        "threshold_relaxation": 0.99,
        **STEERED,
        "dual_steps": 2,
        "dual_smoothing": 0.8,
        # In turns: 5, 10, ... of 7.
        "dual_dataset": make_dual_data(7),
        "dual_prompts": 5,
    }
    model = make_model()
    if kind == "judged":
        # Their answers must neither depend on the random state nor leave a trace in it.
        settings |= {"judges": {"brief": brevity}, "estimator": "snis", "dual_samples": 5}
    if kind != "full":
        # Dropout, so that the run depends on the random state.
        return make_trainer(folder, lora(model, lora_dropout=0.3), make_data(8), disable_dropout=False, **settings)
    return make_trainer(folder, model, make_data(8), save_total_limit=1, reference="precomputed", **settings)


class KillAtStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    kind, folder, how = sys.argv[1:]
    torch.set_num_threads(1)
    trainer = build(kind, Path(folder))
    if how == "kill-at-step-5":
        trainer.add_callback(KillAtStep())
    else:
        state = trainer._state

        def die_once_the_trainer_has_written() -> dict[str, Any]:
            if trainer.state.global_step == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return state()

        trainer._state = die_once_the_trainer_has_written  # type: ignore[method-assign]
    trainer.train()


if __name__ == "__main__":
    main()
