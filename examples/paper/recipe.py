"""The paper's text experiment: label public data by public reward models, train MOPO and baselines, draw the front.

    python examples/paper/recipe.py assistant        # phi-1.5 on hh-rlhf: helpful, harmless, humour
    python examples/paper/recipe.py summary          # phi-1.5 on Reddit posts: summary, faithful

It needs a GPU, the hub, and the extras train, pareto and plot. Everything that is finished is kept: started again, it
goes on where it ended.
See README.md beside this file for what it costs, and for what of the paper it does not do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from reward_models import SUMMARY_TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_kernels import MOPOConfig, MOPOTrainer, load_preferences
from mopo_kernels.data import PreferenceData
from mopo_kernels.data.schema import response_text
from mopo_kernels.evaluation import (
    Judge,
    Policy,
    judge_responses,
    load_judges,
    load_policy,
    sample_responses,
    win_rate,
)
from mopo_kernels.labelling import label_file
from mopo_kernels.plots import plot_policies
from mopo_kernels.tabular import hypervolume, nondominated
from mopo_kernels.trainer import last_complete_checkpoint
from mopo_kernels.trainer.checkpoint import write_atomically

HERE = Path(__file__).parent
# The settings that the paper prints. Its learning rate and LoRA rank are not known to us: those below are ours.
TAU, BETA, REFERENCE_STEPS, STEPS, PROMPTS_A_STEP = 0.08, 0.9995, 500, 10_000, 8
# Of the front's volume: a standard deviation of the base model's scores below its mean, in every objective.
CORNER = -1.0


@dataclass(frozen=True)
class Task:
    """One of the two experiments.

    Attributes:
        source: hub name, and the options of ``load_preferences`` for it.
        splits: of the training and the test data.
        judges: attribute of reward_models.py. Its first objective is the primary.
        stop: text at which a response ends.
        new_tokens: longest response that is sampled; RiC's.
    """

    source: str
    options: Mapping[str, Any]
    splits: tuple[str, str]
    judges: str
    stop: str
    new_tokens: int


TASKS = {
    "assistant": Task(
        "Anthropic/hh-rlhf",
        {"format": "hh-rlhf", "objective": "human", "conversational": False},
        ("train", "test"),
        "ASSISTANT",
        "\n\nHuman:",
        128,
    ),
    # The data set's own script is no longer run by the datasets library: the hub's copy as parquet is read.
    "summary": Task(
        "openai/summarize_from_feedback",
        {
            "format": "summarize-from-feedback",
            "data_dir": "comparisons",
            "revision": "refs/convert/parquet",
            "template": SUMMARY_TEMPLATE,
        },
        ("train", "validation"),
        "SUMMARY",
        "\n",
        48,
    ),
}


@dataclass(frozen=True)
class Run:
    """A policy to train: its name, the method that it is a point of, and what it sets in ``MOPOConfig``."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def weight_vectors(objectives: int, parts: int) -> list[tuple[float, ...]]:
    """All vectors of so many weights that are multiples of 1 / parts and sum to 1."""
    counts = itertools.product(range(parts + 1), repeat=objectives)
    return [tuple(count / parts for count in row) for row in counts if sum(row) == parts]


def weighted(objectives: Sequence[str], weight: Sequence[float], loss_type: str, tau: float) -> dict[str, Any]:
    """The settings that minimise a loss of the weighted labels, multipliers standing still.

    The objective with the largest weight becomes the primary, whose weight is 1. ``regression`` then has the weighted
    labels over tau if tau is divided by that weight; ``sigmoid``, a weighted sum of losses, only changes its unit.
    """
    largest = max(range(len(objectives)), key=lambda k: weight[k])
    rest = {name: weight[k] / weight[largest] for k, name in enumerate(objectives) if k != largest and weight[k] > 0}
    return {
        "primary": objectives[largest],
        "loss_type": loss_type,
        "tau": tau / weight[largest] if loss_type == "regression" else tau,
        "initial_multiplier": rest or "zero",
        "thresholds": dict.fromkeys(rest, 0.0),
        "dual_data": 0.0,  # nothing moves the multipliers, so nothing is held out
    }


def runs(objectives: Sequence[str], thresholds: Sequence[float], parts: int) -> list[Run]:
    """Everything that is trained."""
    common = {"primary": objectives[0], "tau": TAU}
    found = [
        Run(f"mopo_{bound:g}", "MOPO", common | {"thresholds": dict.fromkeys(objectives[1:], bound)})
        for bound in thresholds
    ]
    # The paper's moving reference and thresholds, from its own start: a share beta of what the reference has, 0.5.
    moving = common | {
        "thresholds": dict.fromkeys(objectives[1:], BETA * 0.5),
        "reference_update_steps": REFERENCE_STEPS,
        "threshold_relaxation": BETA,
    }
    found.append(Run("mopo_moving", "MOPO, moving reference", moving))
    printed = moving | {"loss_type": "cloning", "estimator": "closed_form"}
    found.append(Run("mopo_as_printed", "MOPO as printed", printed))
    for weight in weight_vectors(len(objectives), parts):
        name = "_".join(f"{value:g}" for value in weight)
        found.append(Run(f"ipo_{name}", "scalarised IPO", weighted(objectives, weight, "regression", TAU)))
        found.append(Run(f"dpo_{name}", "scalarised DPO", weighted(objectives, weight, "sigmoid", TAU)))
    return found


# ---------------------------------------------------------------------------------------------------------------- data


def prepare(
    task: Task, judges: Mapping[str, Judge], spec: str, options: argparse.Namespace
) -> tuple[PreferenceData, list[str]]:
    """Training pairs labelled by the reward models, and prompts of the test split that are not among theirs."""
    rows, held_out = options.output / "train.jsonl", options.output / "test_prompts.json"
    if not held_out.exists():
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        fitted = usable(task, task.splits[0], tokenizer, options)[: options.train_prompts]
        label_file(
            rows,
            [prompt for prompt, _ in fitted],
            lambda first, part: [texts for _, texts in fitted[first : first + len(part)]],
            judges,
            dict.fromkeys(judges, options.scale),
            settings={"source": options.source, "judges": spec, "max_length": options.max_length, "seed": options.seed},
            advance=lambda count: print(f"labelled {count} more of {len(fitted)} prompts", flush=True),
            chunk=1024,
        )
        known = {prompt for prompt, _ in fitted}
        found = [prompt for prompt, _ in usable(task, task.splits[1], tokenizer, options) if prompt not in known]
        write_atomically(held_out, json.dumps(found[: options.test_prompts]) + "\n")
    prompts: list[str] = json.loads(held_out.read_text())
    return load_preferences(rows, objectives=list(judges)), prompts


def usable(task: Task, split: str, tokenizer: Any, options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Prompts and responses of a split that fit in ``max_length``, in a random order: subsets follow each other."""
    # A local copy has no revisions.
    own = {
        name: value for name, value in task.options.items() if name != "revision" or not Path(options.source).exists()
    }
    data = load_preferences(options.source, split=split, on_error="skip", group=True, **own)
    print(f"{options.source}, {split}: {len(data)} prompts, {len(data.skipped)} bad rows", flush=True)
    found = []
    for index in np.random.default_rng(options.seed).permutation(len(data)):
        example = data[int(index)]
        prompt, responses = str(example.prompt), [response_text(response) for response in example.responses]
        length = len(tokenizer(prompt)["input_ids"])
        rest = max(task.new_tokens, *(len(tokenizer(response)["input_ids"]) for response in responses))
        if length + rest < options.max_length:
            found.append((prompt, responses))
    return found


# ------------------------------------------------------------------------------------------------------------ training


def train(run: Run, data: PreferenceData, options: argparse.Namespace) -> Path:
    """One adapter, in the folder of its name; nothing to do where it is finished."""
    folder: Path = options.output / run.name
    if (folder / "adapter_config.json").exists():
        return folder
    on_gpu = torch.cuda.is_available()
    torch.manual_seed(options.seed)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if on_gpu else torch.float32),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        # One pass for all the policies, which share the reference.
        "reference": "precomputed",
        "reference_path": str(options.output),
        "objectives": list(data.objectives),
        "max_steps": options.steps,
        "per_device_train_batch_size": PROMPTS_A_STEP,
        "per_device_eval_batch_size": 4 * PROMPTS_A_STEP,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(100, options.steps // 10),
        "logging_steps": max(1, options.steps // 200),
        "save_steps": max(1, options.steps // 10),
        "save_total_limit": 1,
        "max_length": options.max_length,
        "on_infeasible": "warn",
        "report_to": "none",
        "use_cpu": not on_gpu,
        "seed": options.seed,
        **run.settings,
    }
    if options.reference_steps is not None and "reference_update_steps" in settings:
        settings["reference_update_steps"] = options.reference_steps
    trainer = MOPOTrainer(model=policy, args=MOPOConfig(**settings), train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder / "checkpoints") is not None)
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    trainer.save_model(str(folder))
    return folder


def policies(
    options: argparse.Namespace, trained: Sequence[Run], objectives: Sequence[str]
) -> Iterator[tuple[Run, Policy]]:
    """The base, every adapter, and soups of the single-objective DPO adapters, on one model in memory."""
    base = load_policy(options.model, dtype=torch.bfloat16 if torch.cuda.is_available() else None)
    yield Run("base", "base"), base
    corners: dict[int, str] = {}
    for run in trained:
        folder = options.output / run.name
        if run.method == "scalarised DPO" and run.settings["initial_multiplier"] == "zero":
            corners[objectives.index(run.settings["primary"])] = str(folder)
        yield run, load_policy(options.model, folder, share=base)
    for weight in weight_vectors(len(objectives), options.soup_parts):
        if max(weight) < 1:  # the corners are there already
            # Rewarded soups, arXiv 2306.04488.
            parts = {corners[k]: value for k, value in enumerate(weight) if value > 0}
            name = "soup_" + "_".join(f"{value:g}" for value in weight)
            yield Run(name, "soup of DPO"), load_policy(options.model, parts, share=base)


# ---------------------------------------------------------------------------------------------------------- evaluation


def measure(
    task: Task,
    options: argparse.Namespace,
    candidates: Iterator[tuple[Run, Policy]],
    prompts: list[str],
    judges: Mapping[str, Judge],
) -> dict[str, dict[str, Any]]:
    """By policy: its method, answers to the test prompts, and their scores; each kept in a file when it is made.

    Unfinished and blank answers count: a policy answers for all that it writes.
    """
    results: dict[str, dict[str, Any]] = {}
    for run, policy in candidates:
        path = options.output / "scores" / f"{run.name}.json"
        if not path.exists():
            with policy.active() as model:
                drawn = sample_responses(
                    model,
                    policy.tokenizer,
                    prompts,
                    samples_per_prompt=options.samples,
                    max_new_tokens=task.new_tokens,
                    top_p=0.9,
                    batch_size=options.sample_batch,
                    # All are compared with the base, whose draws must be independent of theirs.
                    seed=options.seed + (not policy.adapters),
                    description=f"sampling {run.name}",
                )
            answers = [[text.split(task.stop)[0] for text in row] for row in drawn]
            scores = judge_responses(judges, prompts, answers, description=f"scoring {run.name}")
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps({"method": run.method, "scores": scores, "answers": answers}) + "\n")
        results[run.name] = json.loads(path.read_text())
    return results


def same_settings(options: argparse.Namespace) -> None:
    """What is finished was made with settings: an output folder goes on under the same only.

    Raises:
        ValueError: naming one that differs.
    """
    path = options.output / "settings.json"
    settings = json.loads(json.dumps({name: value for name, value in vars(options).items() if name != "output"}))
    if path.exists():
        for name, value in json.loads(path.read_text()).items():
            if settings[name] != value:
                raise ValueError(
                    f"{name}: expected {value!r}, with which {options.output} was begun; got {settings[name]!r}"
                )
    path.write_text(json.dumps(settings, indent=1) + "\n")


def front(results: Mapping[str, Mapping[str, Any]], objectives: Sequence[str]) -> dict[str, Any]:
    """Mean rewards in the base's units, win rates over it, which policies none dominates, and each method's volume.

    A reward is the mean score less the base's, over the standard deviation of the base's scores.
    """
    base = {name: np.concatenate([np.asarray(row) for row in results["base"]["scores"][name]]) for name in objectives}
    points: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        point: dict[str, Any] = {"method": result["method"], "reward": {}, "error": {}, "win_rate": {}}
        for objective in objectives:
            by_prompt = np.array([np.mean(row) for row in result["scores"][objective]])
            spread = float(base[objective].std()) or 1.0
            point["reward"][objective] = float((by_prompt.mean() - base[objective].mean()) / spread)
            point["error"][objective] = float(by_prompt.std(ddof=1) / math.sqrt(len(by_prompt)) / spread)
            rate = win_rate(result["scores"][objective], results["base"]["scores"][objective], objective=objective)
            point["win_rate"][objective] = [rate.mean, rate.low, rate.high]
        points[name] = point
    table = np.array([[point["reward"][objective] for objective in objectives] for point in points.values()])
    for point, mark in zip(points.values(), nondominated(table), strict=True):
        point["nondominated"] = bool(mark)
    methods = [method for method in dict.fromkeys(point["method"] for point in points.values()) if method != "base"]
    volumes = {}
    for method in methods:
        own = [point["reward"] for point in points.values() if point["method"] in (method, "base")]
        volumes[method] = hypervolume([[row[name] for name in objectives] for row in own], [CORNER] * len(objectives))
    return {
        "objectives": list(objectives),
        "hypervolume": volumes,
        "hypervolume_corner": CORNER,
        "policies": {method: sum(point["method"] == method for point in points.values()) for method in methods},
        "points": points,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything, or what is left of it; returns what front.json holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--output", type=Path, help="default: runs/paper/TASK")
    parser.add_argument("--model", default="microsoft/phi-1_5", help="folder or hub name")
    parser.add_argument("--source", help="folder or hub name of the data set; default: the task's")
    parser.add_argument("--rewards", help="file.py:ATTR of the judges, primary first; default: reward_models.py")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.45, 0.5, 0.55], help="of MOPO, on the scale of pair"
    )
    parser.add_argument("--parts", type=int, default=2, help="baselines' weights are multiples of one part of these")
    parser.add_argument("--soup_parts", type=int, default=4, help="the same of soups, which need no training")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--reference_steps", type=int, help=f"t0; default: {REFERENCE_STEPS}")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--train_prompts", type=int, default=100_000)
    parser.add_argument("--test_prompts", type=int, default=500)
    parser.add_argument("--samples", type=int, default=2, help="answers to a test prompt")
    parser.add_argument("--sample_batch", type=int, default=64, help="answers decoded together")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt and response")
    parser.add_argument("--scale", type=float, default=1.0, help="of the soft labels: see mopo data label")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    task = TASKS[options.task]
    options.output = options.output or Path("runs/paper") / options.task
    options.source = options.source or task.source
    options.output.mkdir(parents=True, exist_ok=True)
    same_settings(options)

    spec = options.rewards or f"{HERE / 'reward_models.py'}:{task.judges}"
    judges = load_judges(spec)
    objectives = list(judges)
    data, prompts = prepare(task, judges, spec, options)
    plan = runs(objectives, options.thresholds, options.parts)
    for number, run in enumerate(plan, 1):
        print(f"training {run.name} ({number} of {len(plan)})", flush=True)
        train(run, data, options)
    results = measure(task, options, policies(options, plan, objectives), prompts, judges)
    report = front(results, objectives)
    (options.output / "front.json").write_text(json.dumps(report, indent=1) + "\n")
    points = report["points"]
    plot_policies(
        {name: point["reward"] for name, point in points.items()},
        options.output / "front.png",
        x=objectives[1:],
        y=objectives[0],
        nondominated=[name for name, point in points.items() if point["nondominated"]],
        scale="reward, in standard deviations of the base's",
    )
    for name, point in points.items():
        rewards = "  ".join(
            f"{key} {value:+.3f} +- {point['error'][key]:.3f}" for key, value in point["reward"].items()
        )
        print(f"{name:24} {rewards}{'' if point['nondominated'] else '  (dominated)'}")
    for method, volume in report["hypervolume"].items():
        print(f"hypervolume of {method} ({report['policies'][method]} policies): {volume:.3f}")
    return report


if __name__ == "__main__":
    main()
