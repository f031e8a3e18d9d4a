"""What every rank of a distributed test run does; started by torchrun.

    torchrun --nproc-per-node RANKS trainer_ranks.py FOLDER [--kill | --deepspeed]

Rank 0 writes what it ends with to FOLDER/KIND.pt for each kind of run, for comparison with a single process. With
``--kill`` rank 1 kills itself in the middle of a run; with ``--deepspeed`` the runs are those of ZeRO-3.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from trainer_samples import STEERED, brevity, lora, make_config, make_data, make_dual_data, make_model, make_trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from mopo_kernels.data import PreferenceCollator, PreferenceData
from mopo_kernels.fused.vocab_parallel import full_tensor
from mopo_kernels.trainer import MOPOTrainer

KINDS = ("full", "lora", "lagged", "cloning", "hollow", "scarce", "judged", "experts")
SHARDED = ("full", "lora", "hollow")
HELD_OUT = 5
STEPS = 4
LIMIT = 240  # seconds of a launch
PROMPTS = 6  # an optimiser step
ZERO_LEARNING_RATE = 1e-4  # in fp32 errors grow with larger ones
# On 2 ranks every prompt of the second, on 3 ranks every prompt of the second, but not all of the others'.
HOLLOW = (1, 3, 4, 5)


class Gradients(TrainerCallback):
    """The gradients that each optimiser step used."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = getattr(model, "module", model).named_parameters()
        self.seen.append({name: full_tensor(p.grad).clone() for name, p in named if p.grad is not None})


class Kill(TrainerCallback):
    """The process is gone after two steps and their checkpoints, as when the machine takes its memory back."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


class MaskingCollator(PreferenceCollator):
    """Scores no token of the examples whose id is "masked"."""

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        masked = torch.tensor([example.id == "masked" for example in examples])[batch["prompt_index"]]
        if "cu_seqlens" in batch:
            batch["target"][masked.repeat_interleave(batch["cu_seqlens"].diff())] = -100
        else:
            batch["labels"][masked] = -100
        return batch


def hollow_data() -> PreferenceData:
    """Of the first step's prompts some have no label, of the second's some have no token that is scored."""
    examples = list(make_data(2 * PROMPTS))
    for place in HOLLOW:
        pairs = tuple(replace(pair, preference={}) for pair in examples[place].pairs)
        examples[place] = replace(examples[place], pairs=pairs)
        examples[PROMPTS + place] = replace(examples[PROMPTS + place], id="masked")
    return PreferenceData.from_examples(examples, ["helpful", "brief"])


def make_policy(kind: str, dtype: torch.dtype) -> Any:
    model = make_model("experts" if kind == "experts" else "llama", dtype=dtype)
    if kind not in ("lora", "lagged", "judged"):
        return model
    return lora(model, target_modules=["q_proj", "lm_head"]).to(dtype)


def build(
    kind: str,
    folder: Path,
    ranks: int,
    sharded: bool = False,
    stand_in: int = 1,
    model: Any = None,
    **changes: Any,
) -> MOPOTrainer:
    """6 prompts an optimiser step: 2 ranks x 3 micro-batches of one, 3 ranks x 2, or one batch of 6.

    "scarce" has 2 prompts, one for each of two ranks; the third rank repeats the first prompt.

    Args:
        stand_in: for one process: of how many ranks it gets the prompts.
        model: default one in fp64.
    """
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1 if ranks > 1 else PROMPTS,
        "gradient_accumulation_steps": PROMPTS // ranks if ranks > 1 else 1,
        "per_device_eval_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 1e-3,
        "thresholds": {"brief": 0.55},
        "on_infeasible": "warn",
        "initial_multiplier": {"brief": 0.2},
        "eval_dataset": make_data(HELD_OUT, seed=9),
        # 3 batches of 2, 2 and 1 prompts, so that a rank has one that another has as well.
        "dual_dataset": make_dual_data(HELD_OUT),
        **STEERED,
    }
    # The prompts of make_data have 2 to 4 responses: the ranks' micro-batches differ in pairs and tokens.
    data = hollow_data() if kind == "hollow" else make_data(2 * PROMPTS)
    if model is None:
        model = make_policy(kind, torch.float64)
    if kind == "lagged":
        settings |= {"reference": "model", "reference_update_steps": 2, "threshold_relaxation": 0.9}
    if kind == "judged":
        settings |= {"judges": {"brief": brevity}, "estimator": "snis", "dual_samples": HELD_OUT - 1}
    if kind == "cloning":
        settings |= {"loss_type": "cloning"}
    if kind == "scarce":
        data = PreferenceData.from_examples(
            [data[i] for i in ((0, 1, 0) if stand_in == 3 else (0, 1))], data.objectives
        )
        settings |= {"per_device_train_batch_size": len(data) if ranks == 1 else 1, "gradient_accumulation_steps": 1}
    if sharded:
        settings |= {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
        settings |= {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(folder, model, data, **{**settings, **changes})
    if kind == "hollow":
        given = trainer.data_collator
        options = {item.name: getattr(given, item.name) for item in fields(given) if item.init}
        trainer.data_collator = MaskingCollator(**options)
    return trainer


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """By the names that the parameters have in training; peft saves the head under its adapter as well."""
    from safetensors.torch import load_file

    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    found = load_file(folder / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): value for name, value in found.items() if ".lora_" in name}


def run(kind: str, folder: Path, ranks: int, sharded: bool = False, stand_in: int = 1) -> dict[str, Any]:
    trainer = build(kind, folder, ranks, sharded, stand_in)
    recorder = Gradients()
    trainer.add_callback(recorder)
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    result = {
        "gradients": recorder.seen,
        "weights": {name: full_tensor(p.detach()) for name, p in parameters.items()},
        "dual": trainer.dual.state_dict(),
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "measured": [line for line in trainer.state.log_history if "dual/satisfaction/brief" in line],
        "ref_logprob": [example.ref_logprob for example in trainer.train_dataset],
    }
    if sharded:
        result["units"] = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
        result["whole"] = [name for name, p in parameters.items() if p.to_local().numel() >= p.numel()]
        again = build(kind, folder, ranks, sharded)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        result["resumed"] = {name: full_tensor(p.detach()) for name, p in again.model.named_parameters()}
        result["resumed dual"] = again.dual.state_dict()
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(folder / "final"))
        dist.barrier()
        result["saved"] = saved_weights(folder / "final")
    # Last: evaluation leaves the parameters outside the layers gathered.
    result["eval"] = trainer.evaluate()
    return result


def run_deepspeed(kind: str, folder: Path, ranks: int) -> dict[str, Any]:
    """ZeRO-3, in fp32; its gradients are gone when the Trainer's callbacks are called."""
    import deepspeed
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    def build_sharded() -> MOPOTrainer:
        # transformers makes models in parts while a configuration with ZeRO-3 is alive.
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
        model = make_policy(kind, torch.float32)
        zero = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        changes: dict[str, Any] = {"use_cpu": False, "deepspeed": zero, "learning_rate": ZERO_LEARNING_RATE}
        changes |= {"accelerator_config": {"use_configured_state": True}, "save_strategy": "steps", "save_steps": 2}
        if kind == "full":
            if dist.get_rank() == 0:
                model.save_pretrained(folder / "model")
            dist.barrier()
            # As mopo train does it: the configuration first. It must live until the model is there.
            config = make_config(folder, **copy.deepcopy(changes))
            model = AutoModelForCausalLM.from_pretrained(folder / "model")
            assert model.lm_head.weight.numel() == 0
            del config
        return build(kind, folder, ranks, model=model, **changes)

    def weights(trainer: MOPOTrainer) -> dict[str, Tensor]:
        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    trainer = build_sharded()
    trainer.train()
    parameters = dict(trainer.model.named_parameters())
    result = {
        "weights": weights(trainer),
        "whole": [name for name, p in parameters.items() if p.ds_tensor.numel() >= p.ds_numel],
        "dual": trainer.dual.state_dict(),
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "ref_logprob": [example.ref_logprob for example in trainer.train_dataset],
        "eval": trainer.evaluate(),
    }
    again = build_sharded()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return result | {"resumed": weights(again), "resumed dual": again.dual.state_dict()}


def launch(ranks: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """torchrun, nothing of which outlives the call."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"),
        *(__file__, str(folder), *arguments),
    ]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        try:
            output, _ = child.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            # torchrun gives its workers sessions of their own: they would outlive it.
            for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                process.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, output)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if "--deepspeed" in sys.argv:
        from accelerate import PartialState  # type: ignore[import-untyped]

        # accelerate has no DeepSpeed on CPUs by itself: without a backend each rank takes itself for the only one.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        for kind in SHARDED:
            result = run_deepspeed(kind, folder / kind, ranks)
            if dist.get_rank() == 0:
                torch.save(result, folder / f"{kind}.pt")
        dist.barrier()
        os._exit(0)
    if "--kill" in sys.argv:
        trainer = build("full", folder, ranks, save_strategy="steps", save_steps=1)
        if os.environ["RANK"] == "1":
            trainer.add_callback(Kill())
        trainer.train()
        os._exit(0)
    for sharded in (False, True):
        for kind in SHARDED if sharded else KINDS:
            name = f"sharded-{kind}" if sharded else kind
            result = run(kind, folder / name, ranks, sharded)
            if dist.get_rank() == 0:
                torch.save(result, folder / f"{name}.pt")
    dist.barrier()
    # Everything is written. Gloo's threads are left alone: taking them down aborts now and then ("terminate called
    # without an active exception"), which says nothing about the run.
    os._exit(0)


if __name__ == "__main__":
    main()
