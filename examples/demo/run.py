"""The demo: tune a real chat model on conflicting preferences, hold the secondary ones, and check that it worked.

    python examples/demo/run.py                 # what `make demo` runs; results in runs/demo
    python examples/demo/run.py --resume        # go on after an interruption

SmolLM2-135M-Instruct is tuned with LoRA twice on the same preference pairs: with thresholds on the secondary
objectives, and without. Both policies then answer prompts that training never saw, and deterministic judges compare
their answers with the base model's. The run checks its own claims and exits 1 if one does not hold:

* the primary objective's win rate over the base is above 1/2, its whole interval is;
* every constrained objective's win rate is at or above its threshold;
* with the constraints off, at least one of them falls below its threshold.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from judges import JUDGES
from make_model import ensure_model
from peft import LoraConfig, get_peft_model
from prompts import heldout_prompts
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, TrainerCallback

from mopo_kernels import MOPOConfig, MOPOTrainer, load_preferences
from mopo_kernels.data import PreferenceData
from mopo_kernels.evaluation import Comparison, compare_responses, load_policy, sample_responses
from mopo_kernels.plots import plot_plane, plot_training
from mopo_kernels.trainer import last_complete_checkpoint

# transformers warns about a deprecated name that only its own code uses.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

HERE = Path(__file__).parent
DATA = HERE / "data" / "preferences.jsonl"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome; the report holds it.

    Attributes:
        primary: the objective that is maximised.
        thresholds: least win rate over the base model, per constrained objective, as checked on held-out prompts. They
            and the other settings were chosen after looking at results on those same prompts (see the README).
        safety: added to the thresholds during training: a policy that sits exactly on a threshold would miss it on half
            of all held-out samples.
        steps, prompts_per_step: optimiser steps, and prompts (of 4 responses, 6 pairs each) in one.
        samples: held-out responses per prompt and policy.
    """

    primary: str = "detail"
    thresholds: dict[str, float] = field(default_factory=lambda: {"plain": 0.44, "brevity": 0.39})
    safety: float = 0.05
    steps: int = 22
    prompts_per_step: int = 8
    learning_rate: float = 2e-4
    lora_rank: int = 16
    tau: float = 0.15
    estimator: str = "snis"
    dual_lr: float = 0.6
    dual_warmup_steps: int = 6
    dual_smoothing: float = 0.8
    samples: int = 6
    max_new_tokens: int = 48
    seed: int = 0


class Bar(TrainerCallback):
    """One line that says how far training is, what each objective is worth and what holding it costs.

    Where nobody watches, as in a log file, a line of its own every so many steps.
    """

    def __init__(self, name: str, lines_every: int = 5) -> None:
        self.name, self.lines_every = name, lines_every
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self.progress = Progress(*columns)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, state="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        parts = []
        for name in JUDGES:
            price = logs.get(f"multiplier/{name}")
            if (value := logs.get(f"dual/satisfaction/{name}", logs.get(f"in_sample/satisfaction/{name}"))) is not None:
                parts.append(f"{name} {value:.2f}" + ("" if price is None else f" (x{price:.2f})"))
        if parts:
            self.progress.update(self.task, state="  ".join(parts))
            if not self.progress.console.is_terminal and (
                state.global_step % self.lines_every == 0 or state.global_step == state.max_steps
            ):
                print(f"{self.name} {state.global_step}/{state.max_steps}  {'  '.join(parts)}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def train(
    name: str,
    settings: Settings,
    thresholds: dict[str, float],
    data: PreferenceData,
    model: Path,
    out: Path,
    resume: bool,
) -> tuple[list[dict[str, Any]], PreferenceData]:
    """One policy, saved as an adapter in ``out / name``. Returns its log history, and the data with log-probabilities.

    The reference is the same for every policy, so its log-probabilities are computed once and handed on.
    """
    folder = out / name
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(settings.seed)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer = MOPOTrainer(
        model=policy,
        args=MOPOConfig(
            output_dir=str(folder),
            primary=settings.primary,
            thresholds=thresholds,
            tau=settings.tau,
            estimator=settings.estimator,
            dual_lr=settings.dual_lr,
            dual_warmup_steps=settings.dual_warmup_steps,
            dual_smoothing=settings.dual_smoothing,
            reference="precomputed",
            reference_path=str(out),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.prompts_per_step,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            logging_steps=1,
            save_steps=10,
            save_total_limit=1,
            report_to="none",
            seed=settings.seed,
            use_cpu=True,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar(name))
    trainer.train(resume_from_checkpoint=resume and last_complete_checkpoint(folder) is not None)
    trainer.save_model(str(folder))
    return trainer.state.log_history, trainer.train_dataset


def sample(
    settings: Settings, model: Path, out: Path, names: list[str]
) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Held-out prompts, and every policy's responses to them; all adapters share one model in memory."""
    prompts = heldout_prompts()
    base = load_policy(model)
    policies = {"base": base, **{name: load_policy(model, out / name, share=base) for name in names}}
    drawn = {}
    for number, (name, policy) in enumerate(policies.items()):
        with policy.active() as active:
            drawn[name] = sample_responses(
                active,
                policy.tokenizer,
                prompts,
                samples_per_prompt=settings.samples,
                max_new_tokens=settings.max_new_tokens,
                batch_size=64,
                seed=1000 * settings.seed + number,
                description=f"sampling {name}",
            )
    return prompts, drawn


def verify(settings: Settings, comparisons: dict[str, Comparison]) -> dict[str, bool]:
    """The demo's claims, each with whether it holds."""
    held, free = comparisons["constrained"].win_rates, comparisons["unconstrained"].win_rates
    primary = held[settings.primary]
    claims = {
        f"{settings.primary}: win rate over the base above 0.5 (interval from {primary.low:.3f})": primary.low > 0.5
    }
    for name, bound in settings.thresholds.items():
        claims[f"{name}: {held[name].mean:.3f} at or above its threshold {bound:.2f}"] = held[name].mean >= bound
    fallen = [name for name, bound in settings.thresholds.items() if free[name].mean < bound]
    shown = ", ".join(f"{name} {free[name].mean:.3f}" for name in settings.thresholds)
    claims[f"without constraints below a threshold: {shown}"] = bool(fallen)
    return claims


def table(settings: Settings, comparisons: dict[str, Comparison]) -> Table:
    """Win rates over the base, a row an objective, a column a policy."""
    result = Table(title="Win rate over the base model on held-out prompts (95% interval by prompt)")
    for heading in ("objective", "role", *comparisons):
        result.add_column(heading)
    for name in JUDGES:
        bound = settings.thresholds.get(name)
        role = "primary" if name == settings.primary else "watched" if bound is None else f"hold >= {bound:.2f}"
        cells = []
        for comparison in comparisons.values():
            rate = comparison.win_rates[name]
            colour = "default" if bound is None else "green" if rate.mean >= bound else "red"
            cells.append(f"[{colour}]{rate.mean:.3f}[/] [{rate.low:.3f}, {rate.high:.3f}]")
        result.add_row(name, role, *cells)
    return result


def commit() -> str | None:
    """The checkout's commit, with "+" if it has changes; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def main() -> int:
    """Run everything; 0 if every claim holds, 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints of an interrupted run")
    arguments = parser.parse_args()
    out: Path = arguments.output
    console, settings, started = Console(), Settings(), time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    model = ensure_model(out / "model")
    lap("model")
    data = load_preferences(DATA)
    trained = {name: bound + settings.safety for name, bound in settings.thresholds.items()}
    histories = {}
    for name, thresholds in (("constrained", trained), ("unconstrained", {})):
        console.rule(f"Training: {name}")
        histories[name], data = train(name, settings, thresholds, data, model, out, arguments.resume)
        lap(f"train {name}")

    console.rule("Answers to prompts that training never saw")
    prompts, drawn = sample(settings, model, out, list(histories))
    lap("sample")
    comparisons = {
        name: compare_responses(prompts, drawn[name], drawn["base"], JUDGES, progress=False) for name in histories
    }
    claims = verify(settings, comparisons)
    plots = [
        plot_training(histories[name], out / f"training_{name}.png", title=f"{name} run", primary=settings.primary)
        for name in histories
    ]
    plots += [
        plot_plane(
            {name: comparison.win_rates for name, comparison in comparisons.items()},
            out / f"plane_{settings.primary}_{objective}.png",
            x=settings.primary,
            y=objective,
            thresholds=settings.thresholds,
            parity="base model",
        )
        for objective in settings.thresholds
    ]
    lap("judge and plot")
    report = {
        "claims": claims,
        "settings": asdict(settings),
        "thresholds_in_training": trained,
        "win_rates": {name: comparison.as_dict(responses=False) for name, comparison in comparisons.items()},
        "history": histories,
        "seconds": {**seconds, "total": round(time.perf_counter() - started, 1)},
        "model": json.loads((model / "mopo_demo_model.json").read_text()),
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "commit": commit(),
            **{name: version(name) for name in ("mopo-kernels", "torch", "transformers", "peft")},
        },
        "samples": [
            {"prompt": prompt, **{name: responses[i] for name, responses in drawn.items()}}
            for i, prompt in enumerate(prompts)
        ],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    console.print(table(settings, comparisons))
    for claim, holds in claims.items():
        console.print(f"{'[green]holds[/] ' if holds else '[red]FAILS[/] '} {claim}")
    console.print(
        f"{out / 'report.json'}, {', '.join(str(p) for p in plots)}; {report['seconds']['total'] / 60:.1f} minutes"
    )
    return 0 if all(claims.values()) else 1


def again(arguments: list[str]) -> str:
    """The command that goes on where this one was interrupted."""
    kept = [argument for argument in arguments if argument != "--resume"]
    return shlex.join([sys.executable, sys.argv[0], "--resume", *kept])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # Without the exception's own words: they name a checkpoint for those who call the trainer themselves.
        print(f"interrupted; go on with: {again(sys.argv[1:])}", file=sys.stderr)
        sys.exit(130)
