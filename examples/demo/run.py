"""The demo: tune a real chat model on conflicting preferences, hold the secondary ones, and check that it worked.

    python examples/demo/run.py                       # what `make demo` runs; results in runs/demo
    python examples/demo/run.py --resume              # go on after an interruption
    python examples/demo/run.py --seed 1 --device cuda --output runs/demo-1    # another seed, on a GPU

SmolLM2-135M-Instruct is tuned with LoRA twice on the same preference pairs: with thresholds on the secondary
objectives, and without. A rival, the unconstrained adapter turned down until it keeps the same thresholds, is found on
validation prompts. All three policies then answer test prompts, which nothing saw before, and deterministic judges
compare their answers with the base model's. The run checks the claims of protocol.json and exits 1 if one does not
hold:

* every held objective keeps its threshold, with a one-sided 95% bound;
* the primary objective's win rate over the base is above 1/2, its whole interval is;
* the unconstrained policy is below a threshold;
* the primary objective is above that of the rival, with the interval of the paired difference above 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from judges import JUDGES
from make_base import read as read_base
from make_model import RECORD, ensure_model
from peft import LoraConfig, get_peft_model
from prompts import split_digest, test_prompts, validation_prompts
from protocol import PREFERENCES, Protocol, check_digests, load_protocol
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, TrainerCallback

from mopo_kernels import MOPOConfig, MOPOTrainer, load_preferences
from mopo_kernels.data import PreferenceData
from mopo_kernels.evaluation import (
    Comparison,
    Difference,
    Policy,
    WinRate,
    compare_responses,
    load_policy,
    sample_responses,
    win_rate,
    win_rate_difference,
)
from mopo_kernels.plots import plot_plane, plot_training
from mopo_kernels.trainer import last_complete_checkpoint

# transformers warns about a deprecated name that only its own code uses.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

HERE = Path(__file__).parent
CONSTRAINED, UNCONSTRAINED, TURNED_DOWN = "constrained", "unconstrained", "turned_down"
"""The policies, as the report and the folders call them."""
RUN_FILE = "run.json"
"""What the folder of results was made under: a run goes on under the same only."""


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


def has_fast_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices itself; training is a few times faster there under autocast."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass(frozen=True)
class Run:
    """One run of the demo under a protocol.

    Attributes:
        out: folder of the results.
        model: folder of the base model.
        bfloat16: train under bf16 autocast. Answers are sampled in fp32 anyway, as the base model's were.
    """

    protocol: Protocol
    out: Path
    model: Path
    seed: int
    device: str
    bfloat16: bool

    def mark(self) -> dict[str, Any]:
        """What the outcome depends on, beside the machine."""
        return {
            "protocol": self.protocol.fingerprint(),
            "seed": self.seed,
            "device": self.device,
            "bfloat16": self.bfloat16,
        }


def prepare(run: Run, resume: bool) -> None:
    """The folder of results, empty but for the model, or as it was interrupted.

    Raises:
        ValueError: the folder is no place for a run, or holds one that this cannot go on with.
    """
    out, record = run.out, run.out / RUN_FILE
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output: expected a folder; {out} is a file")
    ours = record.is_file() or (out / "model" / RECORD).is_file()
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise ValueError(f"--output: expected a new or empty folder, or one of this demo; {out} holds other files")
    if resume:
        _check_same_run(run)
    else:
        for name in (CONSTRAINED, UNCONSTRAINED, "answers"):
            shutil.rmtree(out / name, ignore_errors=True)
        for file in (out / "report.json", *out.glob("training_*.png"), *out.glob("plane_*.png")):
            file.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(run.mark(), indent=1) + "\n", encoding="utf-8")


def _check_same_run(run: Run) -> None:
    record = run.out / RUN_FILE
    if not record.is_file():
        if any((run.out / name).exists() for name in (CONSTRAINED, UNCONSTRAINED)):
            raise ValueError(f"--resume: {run.out} was made by an older demo; start over without --resume")
        return
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        before = {}
    other = [name for name, value in run.mark().items() if before.get(name) != value]
    if other:
        raise ValueError(
            f"--resume: {run.out} was made with another {', '.join(other)}; name that one, or start over without "
            "--resume"
        )


def train(name: str, run: Run, data: PreferenceData, resume: bool) -> tuple[list[dict[str, Any]], PreferenceData]:
    """One policy, saved as an adapter in ``run.out / name``. Returns its log history, and the data with
    log-probabilities.

    The reference is the same for every policy, so its log-probabilities are computed once and handed on.
    """
    folder, protocol = run.out / name, run.protocol
    torch.manual_seed(run.seed)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **protocol.lora),
    )
    constrained: dict[str, Any] = {"thresholds": protocol.aims, **protocol.control}
    trainer = MOPOTrainer(
        model=policy,
        args=MOPOConfig(
            output_dir=str(folder),
            primary=protocol.primary,
            reference="precomputed",
            reference_path=str(run.out),
            logging_steps=1,
            save_steps=10,
            save_total_limit=1,
            report_to="none",
            seed=run.seed,
            use_cpu=run.device == "cpu",
            bf16=run.bfloat16,
            **protocol.training,
            **(constrained if name == CONSTRAINED else {}),
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(run.model),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar(name))
    trainer.train(resume_from_checkpoint=resume and last_complete_checkpoint(folder) is not None)
    trainer.save_model(str(folder))
    return trainer.state.log_history, trainer.given_dataset


class Sampler:
    """Answers of the run's policies, kept in ``run.out / "answers"``: none is sampled twice.

    All adapters share one model in memory.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.base = load_policy(run.model, device=run.device, dtype=torch.float32)

    def __call__(
        self, name: str, prompts: list[str], samples: int, *, adapter: str, scale: float = 1.0, stream: int
    ) -> list[list[str]]:
        """Answers, [prompt][sample].

        Args:
            name: of the file, and for the progress bar.
            adapter: name of the policy that was trained; scale: of its update of the weights.
            stream: answers with the same number are drawn with the same random numbers.
        """
        protocol, folder = self.run.protocol, self.run.out / adapter
        weights, seed = (folder / "adapter_model.safetensors").read_bytes(), 1000 * self.run.seed + stream
        key = {
            "adapter": hashlib.sha256(weights).hexdigest(),
            "scale": scale,
            "prompts": split_digest(prompts),
            "samples": samples,
            "seed": seed,
        }
        file = self.run.out / "answers" / f"{name}.json"
        if file.is_file() and (kept := json.loads(file.read_text(encoding="utf-8")))["key"] == key:
            return list(kept["responses"])
        policy: Policy = load_policy(self.run.model, folder, share=self.base, scale=scale)
        with policy.active() as active:
            drawn = sample_responses(
                active,
                policy.tokenizer,
                prompts,
                samples_per_prompt=samples,
                max_new_tokens=protocol.max_new_tokens,
                batch_size=protocol.batch_size,
                seed=seed,
                description=f"sampling {name.replace('_', ' ')}",
            )
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"key": key, "responses": drawn}, ensure_ascii=False), encoding="utf-8")
        unfinished.replace(file)
        return drawn


def rival_scale(
    protocol: Protocol, win_rates: Callable[[float], Mapping[str, WinRate]]
) -> tuple[float, dict[float, dict[str, float]]]:
    """The largest scale of the grid that keeps every threshold, and the win rates of those looked at.

    By bisection: an adapter turned down further is nearer to the base model, which stands at 0.5 in everything. Where
    none keeps them it is 0, the base model itself.

    Args:
        win_rates: of the unconstrained adapter at a scale, on validation prompts.
    """
    looked_at: dict[float, dict[str, float]] = {}
    keeps, misses = -1, len(protocol.scales)
    while misses - keeps > 1:
        middle = (keeps + misses) // 2
        scale = protocol.scales[middle]
        looked_at[scale] = {name: rate.mean for name, rate in win_rates(scale).items()}
        if all(looked_at[scale][name] >= bound for name, bound in protocol.thresholds.items()):
            keeps = middle
        else:
            misses = middle
    return protocol.scales[keeps] if keeps >= 0 else 0.0, looked_at


def bounds(protocol: Protocol, comparison: Comparison, objective: str) -> tuple[float, float]:
    """The one-sided lower and the one-sided upper bound of a win rate."""
    rate = win_rate(
        comparison.candidate_scores[objective],
        comparison.baseline_scores[objective],
        confidence=2 * protocol.confidence - 1,
    )
    return rate.low, rate.high


def difference(protocol: Protocol, comparisons: Mapping[str, Comparison]) -> Difference:
    """Of the primary objective: the constrained policy's win rate over the base minus the rival's."""
    name = protocol.primary
    first, second = comparisons[CONSTRAINED], comparisons[TURNED_DOWN]
    return win_rate_difference(
        first.candidate_scores[name],
        second.candidate_scores[name],
        first.baseline_scores[name],
        objective=name,
        confidence=protocol.confidence,
    )


def verify(protocol: Protocol, comparisons: Mapping[str, Comparison], scale: float) -> dict[str, bool]:
    """The protocol's claims with their figures, each with whether it holds."""
    claims: dict[str, bool] = {}
    level = f"{protocol.confidence:.0%}"
    for name, bound in protocol.thresholds.items():
        low, _ = bounds(protocol, comparisons[CONSTRAINED], name)
        mean = comparisons[CONSTRAINED].win_rates[name].mean
        claims[f"kept: {name} {mean:.3f}, with {level} at or above {low:.3f}, threshold {bound:.2f}"] = low >= bound
    primary = comparisons[CONSTRAINED].win_rates[protocol.primary]
    claims[f"gained: {primary.objective} {primary.mean:.3f} [{primary.low:.3f}, {primary.high:.3f}], base 0.5"] = (
        primary.low > 0.5
    )
    high = {name: bounds(protocol, comparisons[UNCONSTRAINED], name)[1] for name in protocol.thresholds}
    shown = ", ".join(
        f"{name} {comparisons[UNCONSTRAINED].win_rates[name].mean:.3f}, with {level} at or below {high[name]:.3f}"
        for name in protocol.thresholds
    )
    claims[f"needed: without thresholds {shown}"] = any(
        high[name] < bound for name, bound in protocol.thresholds.items()
    )
    ahead = difference(protocol, comparisons)
    claims[
        f"worth: {ahead.objective} {ahead.mean:+.3f} [{ahead.low:+.3f}, {ahead.high:+.3f}] against the unconstrained "
        f"adapter x {scale:g}"
    ] = ahead.low > 0
    return claims


def shown_name(name: str, scale: float) -> str:
    """Of a policy, in tables and plots."""
    return f"{UNCONSTRAINED} x {scale:g}" if name == TURNED_DOWN else name


def table(protocol: Protocol, comparisons: Mapping[str, Comparison], scale: float) -> Table:
    """Win rates over the base, a row an objective, a column a policy."""
    result = Table(title=f"Win rate over the base model on test prompts ({protocol.confidence:.0%} interval by prompt)")
    for heading in ("objective", "role", *(shown_name(name, scale) for name in comparisons)):
        result.add_column(heading)
    for name in JUDGES:
        bound = protocol.thresholds.get(name)
        role = "primary" if name == protocol.primary else "watched" if bound is None else f"hold >= {bound:.2f}"
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


def compare(
    protocol: Protocol, prompts: list[str], drawn: list[list[str]], base: Mapping[str, list[str]]
) -> Comparison:
    """A policy's answers with the base model's."""
    against = [base[prompt] for prompt in prompts]
    return compare_responses(prompts, drawn, against, JUDGES, confidence=protocol.confidence, progress=False)


def judge(run: Run) -> tuple[dict[str, Comparison], float, dict[float, dict[str, float]]]:
    """The policies on the test prompts; the rival's scale, and the win rates on validation prompts behind it."""
    protocol, sampler, base = run.protocol, Sampler(run), read_base()
    validation, test = validation_prompts(), test_prompts()

    def turned_down(scale: float) -> Mapping[str, WinRate]:
        name = f"validation_{scale:g}"
        drawn = sampler(name, validation, protocol.validation_samples, adapter=UNCONSTRAINED, scale=scale, stream=0)
        return compare(protocol, validation, drawn, base["validation"]).win_rates

    scale, looked_at = rival_scale(protocol, turned_down)
    comparisons = {}
    for stream, (name, adapter, factor) in enumerate(
        ((CONSTRAINED, CONSTRAINED, 1.0), (UNCONSTRAINED, UNCONSTRAINED, 1.0), (TURNED_DOWN, UNCONSTRAINED, scale)),
        start=1,
    ):
        drawn = sampler(f"test_{name}", test, protocol.samples, adapter=adapter, scale=factor, stream=stream)
        comparisons[name] = compare(protocol, test, drawn, base["test"])
    return comparisons, scale, looked_at


def draw(
    run: Run, histories: Mapping[str, list[dict[str, Any]]], comparisons: Mapping[str, Comparison], scale: float
) -> list[Path]:
    """The plots."""
    protocol = run.protocol
    training = [
        plot_training(history, run.out / f"training_{name}.png", title=f"{name} run", primary=protocol.primary)
        for name, history in histories.items()
    ]
    points = {shown_name(name, scale): comparison.win_rates for name, comparison in comparisons.items()}
    return training + [
        plot_plane(
            points,
            run.out / f"plane_{protocol.primary}_{objective}.png",
            x=protocol.primary,
            y=objective,
            thresholds=protocol.thresholds,
            parity="base model",
        )
        for objective in protocol.thresholds
    ]


def main() -> int:
    """Run everything; 0 if every claim holds, 1 if one fails, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the results")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints of an interrupted run")
    parser.add_argument("--seed", type=int, default=0, help="of training and sampling")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="folder of the base model, made when missing (default OUTPUT/model)")
    arguments = parser.parse_args()
    console, started = Console(), time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch sees no CUDA device")
    try:
        protocol = load_protocol()
        check_digests(protocol)
        run = Run(
            protocol=protocol,
            out=arguments.output,
            model=arguments.model or arguments.output / "model",
            seed=arguments.seed,
            device=arguments.device,
            bfloat16=has_fast_bfloat16(arguments.device),
        )
        prepare(run, arguments.resume)
        ensure_model(run.model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    lap("model")
    data = load_preferences(PREFERENCES)
    histories = {}
    for name in (CONSTRAINED, UNCONSTRAINED):
        console.rule(f"Training: {name}")
        histories[name], data = train(name, run, data, arguments.resume)
        lap(f"train {name}")

    console.rule("Answers to validation and test prompts, which training never saw")
    comparisons, scale, looked_at = judge(run)
    lap("sample and judge")
    claims = verify(protocol, comparisons, scale)
    plots = draw(run, histories, comparisons, scale)
    lap("plot")
    report = {
        "claims": claims,
        "settings": {
            **{name: value for name, value in asdict(protocol).items() if name != "claims"},
            "seed": run.seed,
            "device": run.device,
            "bfloat16": run.bfloat16,
        },
        "claims_in_words": protocol.claims,
        "protocol": protocol.fingerprint(),
        "turned_down": {"scale": scale, "win_rates_on_validation": looked_at},
        "bounds": {
            name: {objective: bounds(protocol, comparison, objective) for objective in protocol.thresholds}
            for name, comparison in comparisons.items()
        },
        "difference": asdict(difference(protocol, comparisons)),
        "win_rates": {name: comparison.as_dict(responses=False) for name, comparison in comparisons.items()},
        "history": histories,
        "seconds": {**seconds, "total": round(time.perf_counter() - started, 1)},
        "model": json.loads((run.model / RECORD).read_text(encoding="utf-8")),
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "commit": commit(),
            **{name: version(name) for name in ("mopo-kernels", "torch", "transformers", "peft")},
        },
        "samples": [
            {"prompt": prompt, "base": comparisons[CONSTRAINED].baseline[i][0]}
            | {name: comparison.candidate[i][0] for name, comparison in comparisons.items()}
            for i, prompt in enumerate(test_prompts())
        ],
    }
    (run.out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    console.print(table(protocol, comparisons, scale))
    for claim, holds in claims.items():
        console.print(f"{'[green]holds[/] ' if holds else '[red]FAILS[/] '} {claim}", highlight=False, soft_wrap=True)
    written = ", ".join(str(path) for path in (run.out / "report.json", *plots))
    console.print(f"{written}; {report['seconds']['total'] / 60:.1f} minutes", highlight=False, soft_wrap=True)
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
