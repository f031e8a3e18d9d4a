"""Whole optimiser steps: this library's MOPOTrainer against TRL's DPOTrainer, on the same rows.

    python -m bench.step                     # SmolLM2-135M's shape on the CPU; --help for others, --quick for a trial
    python -m bench.step --demo              # the demo's model and data, 2 prompts with 4 responses a step
    python -m bench.step --device cuda --shape phi-1b --length 1024 --dtype bfloat16

Every implementation trains in a process of its own, which is told to do one step at a time; implementations with the
same trained weights and the same gradient checkpointing take turns. With n responses to a prompt every two of them are
a pair; TRL's trainer gets each pair as a row of its own, as that is what it takes. A step is all that a trainer does
between two of them: the next batch, forward, backward, clipping, optimiser, its metrics. Reference log-probabilities
computed beforehand are not part of a step. Before anything is timed, the first loss and gradient norm of every
implementation with the same loss are compared, as are the rows they trained on. What cannot run here is listed with the
reason.

Memory is the process's high-water mark during a step (``VmHWM``, reset before each; where that is not permitted, the
greatest resident size since the process began), or the allocator's peak on a GPU; beside it stands what that is beyond
what was held before the first step.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import random
import resource
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.implementations import import_error
from bench.provenance import ROOT, provenance
from examples.demo.make_model import DEFAULT_FOLDER, ensure_model

SEED = 42
BETA = 0.1
OBJECTIVES = ("helpful", "harmless", "honest", "brief")
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
TUNINGS = ("LoRA", "full")
DTYPES = {
    "float32": "weights and arithmetic fp32",
    "autocast": "weights fp32, bf16 autocast, as TRL has it by default",
    "bfloat16": "weights and arithmetic bf16",
}
# Relative, of loss and gradient norm.
TOLERANCE = {"float32": 1e-4, "autocast": 5e-2, "bfloat16": 5e-2}
DEMO_DATA = ROOT / "examples" / "demo" / "data" / "preferences.jsonl"
# Seconds that an implementation may take to answer.
PATIENCE = 1800.0
CHILD = [sys.executable, "-m", "bench.step", "--child"]


@dataclass(frozen=True)
class Work:
    """What every implementation trains on: ``pairs`` pairs a step, each response's row at most ``length`` tokens.

    A prompt has ``responses`` responses, every two of which are a pair. A step's rows have one of ``shares`` as the
    prompt's part of the longest row; steps go through the shares in turn. With ``data``, a JSON Lines file of
    preference examples, a step takes the next of its prompts that have so many responses, and ``shares`` is one number
    that says how much of them is prompt.
    """

    shape: str = "smollm2-135m"
    tuning: str = "LoRA"
    pairs: int = 2
    responses: int = 2
    length: int = 128
    shares: tuple[float, ...] = (0.5, 0.8)
    dtype: str = "float32"
    device: str = "cpu"
    learning_rate: float = 1e-4
    data: str = ""

    @property
    def prompts(self) -> int:
        """Prompts a step."""
        return self.pairs // math.comb(self.responses, 2)


class Prompt(NamedTuple):
    """A prompt and its responses; of two of them, ``wins[i, j]`` says whether the first is preferred."""

    text: str
    responses: tuple[str, ...]
    wins: dict[tuple[int, int], bool]


def prompts(work: Work, vocabulary: int, rounds: int) -> list[Prompt]:
    """Those of a run, step after step.

    Synthetic ones come a batch a share, as words of one token each, lengths ragged. The first prompt of a batch has a
    row of ``length`` tokens and the others at least half of that; of a prompt, one response is as long as the row
    permits and the others at least half as long. The EOS token, which both trainers add, is counted.

    Raises:
        SystemExit: ``data`` has too few prompts with so many responses.
    """
    if work.data:
        return _prompts_of(work, rounds)
    draw = random.Random(SEED)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(count))

    made = []
    for share in work.shares:
        for number in range(work.prompts):
            total = work.length if number == 0 else draw.randint(work.length // 2, work.length)
            prompt = max(1, round(total * share))
            long = max(2, total - prompt)
            lengths = [long, *(draw.randint(max(2, long // 2), long) for _ in range(work.responses - 1))]
            draw.shuffle(lengths)
            responses = tuple(" " + words(count - 1) for count in lengths)
            wins = dict.fromkeys(itertools.combinations(range(work.responses), 2), True)
            made.append(Prompt(words(prompt), responses, wins))
    return made


def _prompts_of(work: Work, rounds: int) -> list[Prompt]:
    """Of ``work.data``: the first objective's label decides, and a tie or a missing label counts for the first."""
    needed = (rounds + 1) * len(work.shares) * work.prompts
    made: list[Prompt] = []
    for line in Path(work.data).read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        if len(made) == needed:
            break
        if len(example["responses"]) != work.responses:
            continue
        wins = dict.fromkeys(itertools.combinations(range(work.responses), 2), True)
        for pair in example["pairs"]:
            label = next(iter(pair["preference"].values()))
            if label is not None and label != 0.5:
                wins[min(pair["i"], pair["j"]), max(pair["i"], pair["j"])] = (label > 0.5) == (pair["i"] < pair["j"])
        made.append(Prompt(example["prompt"], tuple(" " + text for text in example["responses"]), wins))
    if len(made) < needed:
        raise SystemExit(
            f"--data: expected {needed} prompts with {work.responses} responses; {work.data} has {len(made)}"
        )
    return made


def prompt_share(data: Path, model: Path, responses: int) -> float:
    """The prompt's part of the rows of a file's examples with so many responses, in tokens of a model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    examples = [example for example in examples if len(example["responses"]) == responses]

    def tokens(texts: list[str]) -> int:
        return sum(map(len, tokenizer(texts)["input_ids"]))

    before = responses * tokens([example["prompt"] for example in examples])
    return round(before / (before + tokens([text for example in examples for text in example["responses"]])), 2)


# ------------------------------------------------------------------------------------------------------ implementations


def always(work: Work) -> str | None:
    """Needs nothing."""
    return None


@dataclass(frozen=True)
class Implementation:
    """A trainer with its settings.

    Attributes:
        trainer: ``mopo`` or ``trl``.
        settings: of its configuration, beside :func:`settings_of`.
        checkpointing: gradient checkpointing; implementations that have the same take turns.
        objectives: K.
        apart: each pair is an example of its own, its prompt and responses computed for it alone, as TRL does.
        loss: implementations with the same loss must agree.
        about: what the settings come to.
        unavailable: why it cannot run such work here, None if it can.
    """

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    objectives: int = 1
    apart: bool = False
    loss: str = "DPO"
    about: str = ""
    unavailable: Callable[[Work], str | None] = always


def _trl_missing(work: Work) -> str | None:
    return import_error("trl")


def _no_liger(work: Work) -> str | None:
    if work.device == "cpu":
        return (
            "use_liger_kernel replaces layers by Triton kernels, which need a GPU (on a CPU it stops with "
            "RuntimeError: 0 active drivers)"
        )
    return _trl_missing(work) or import_error("liger_kernel.transformers")


def _no_offloading(work: Work) -> str | None:
    if work.device == "cpu":
        return (
            "activation_offloading moves activations from a GPU to the CPU (on a CPU it stops with AttributeError: "
            "'NoneType' object has no attribute 'type')"
        )
    return _trl_missing(work)


def _no_padding_free(work: Work) -> str | None:
    return _trl_missing(work) or "padding_free is disabled in TRL 1.16: it warns, and pads"


def _no_hub(work: Work) -> str | None:
    return _trl_missing(work) or "model_init_kwargs={'use_kernels': True} fetches kernels from the Hub while it runs"


MOPO = {"loss_type": "sigmoid", "tau": BETA, "reference": "precomputed"}
MANY = {
    "tau": BETA,
    "reference": "precomputed",
    "primary": OBJECTIVES[0],
    "thresholds": dict.fromkeys(OBJECTIVES[1:], 0.4),
    "initial_multiplier": dict.fromkeys(OBJECTIVES[1:], 0.5),
    "on_infeasible": "warn",
}
TRL = {"beta": BETA, "precompute_ref_log_probs": True}
IMPLEMENTATIONS = {
    "mopo_kernels": Implementation("mopo", MOPO, about="reference beforehand"),
    "mopo_kernels, a row a response": Implementation(
        "mopo", {**MOPO, "shared_prompts": "never"}, about="reference beforehand, prompts not shared"
    ),
    "mopo_kernels, two rows a pair": Implementation(
        "mopo", {**MOPO, "shared_prompts": "never"}, apart=True, about="reference beforehand, nothing shared"
    ),
    "mopo_kernels, 4 objectives": Implementation(
        "mopo", MANY, objectives=4, loss="regression", about="reference beforehand, 3 thresholds"
    ),
    "TRL, fastest": Implementation("trl", TRL, about="reference beforehand", unavailable=_trl_missing),
    "TRL, Liger's layers": Implementation(
        "trl", {**TRL, "use_liger_kernel": True}, about="reference beforehand, Liger's layers", unavailable=_no_liger
    ),
    "TRL, Hub's kernels": Implementation("trl", unavailable=_no_hub),
    "TRL, padding-free": Implementation("trl", {**TRL, "padding_free": True}, unavailable=_no_padding_free),
    "mopo_kernels, checkpointing": Implementation("mopo", MOPO, True, about="reference beforehand"),
    "mopo_kernels, checkpointing, reference each step": Implementation(
        "mopo", {**MOPO, "reference": "model"}, True, about="reference in every step"
    ),
    "TRL, defaults": Implementation(
        "trl", {"beta": BETA}, True, about="reference in every step", unavailable=_trl_missing
    ),
    "TRL, leanest": Implementation("trl", TRL, True, about="reference beforehand", unavailable=_trl_missing),
    "TRL, activations offloaded": Implementation(
        "trl",
        {**TRL, "activation_offloading": True},
        True,
        about="reference beforehand, activations on the CPU",
        unavailable=_no_offloading,
    ),
}
# On a CPU: two that run, and those that cannot.
QUICK = ("mopo_kernels", "TRL, fastest", "TRL, Liger's layers", "TRL, padding-free", "TRL, activations offloaded")


def settings_of(implementation: Implementation, work: Work, rounds: int) -> dict[str, Any]:
    """Of its configuration: the same for all but for its own, and for what an item of its batch is."""
    by_pair = implementation.apart or implementation.trainer == "trl"
    return {
        "per_device_train_batch_size": work.pairs if by_pair else work.prompts,
        "max_steps": len(work.shares) * (1 + rounds),
        "max_length": work.length,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": work.dtype == "autocast",
        "use_cpu": work.device == "cpu",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        "gradient_checkpointing": implementation.checkpointing,
        **implementation.settings,
    }


# --------------------------------------------------------------------------------------------------------------- models


def make_model(shape: str, folder: Path) -> None:
    """Random weights of a known shape, saved as transformers saves them."""
    from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    llama = functools.partial(LlamaConfig, tie_word_embeddings=True, **ids)
    configs = {
        "smollm2-135m": lambda: llama(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
        ),
        "phi-1b": lambda: PhiConfig(**ids),
        "tiny": lambda: llama(
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    }
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(configs[shape]()).save_pretrained(folder)


SHAPES = ("smollm2-135m", "phi-1b", "tiny")


def make_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of the model's size in which ``w17`` is token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_trainer(implementation: Implementation, work: Work, rounds: int, model_folder: str, output: str) -> Any:
    """The implementation's trainer over the rows of ``work``.

    Args:
        model_folder: of the model, which is loaded from there; so is TRL's copy that serves as reference.
        output: folder for what the trainers keep.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.bfloat16 if work.dtype == "bfloat16" else torch.float32
    )
    if work.data:
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        # The texts as they are, so that both trainers see the same tokens.
        tokenizer.chat_template = None
    else:
        tokenizer = make_tokenizer(model.get_input_embeddings().weight.shape[0])
    return trainer_of(implementation, work, rounds, model, tokenizer, output)


def trainer_of(implementation: Implementation, work: Work, rounds: int, model: Any, tokenizer: Any, output: str) -> Any:
    """:func:`make_trainer` of a model that is made already; one that was not loaded from a folder cannot serve TRL as a
    reference in every step."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    data = prompts(work, model.get_input_embeddings().weight.shape[0], rounds)
    settings = {"output_dir": output, **settings_of(implementation, work, rounds)}
    if settings.get("use_liger_kernel"):
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise ValueError(f"Liger has no layers for a model of type {model.config.model_type}")
    lora = LoraConfig(**LORA, task_type="CAUSAL_LM") if work.tuning == "LoRA" else None
    if implementation.trainer == "trl":
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(
            model,
            args=DPOConfig(**settings),
            train_dataset=Dataset.from_list(
                [
                    {
                        "prompt": prompt.text,
                        "chosen": prompt.responses[i if first else j],
                        "rejected": prompt.responses[j if first else i],
                    }
                    for prompt in data
                    for (i, j), first in prompt.wins.items()
                ]
            ),
            processing_class=tokenizer,
            peft_config=lora,
        )

    from mopo_kernels.data import PreferenceData, PreferenceExample, PreferencePair
    from mopo_kernels.trainer import MOPOConfig, MOPOTrainer

    if lora is not None:
        # As TRL does, so that both start from the same adapter.
        set_seed(SEED)
        model = get_peft_model(model, lora)
    names = OBJECTIVES[: implementation.objectives]

    def pair(i: int, j: int, first: bool) -> PreferencePair:
        # Every objective disagrees with the one before it.
        return PreferencePair(i, j, {name: float((k % 2 == 0) == first) for k, name in enumerate(names)})

    if implementation.apart:
        examples = [
            PreferenceExample(prompt.text, (prompt.responses[i], prompt.responses[j]), (pair(0, 1, first),))
            for prompt in data
            for (i, j), first in prompt.wins.items()
        ]
    else:
        examples = [
            PreferenceExample(
                prompt.text, prompt.responses, tuple(pair(i, j, first) for (i, j), first in prompt.wins.items())
            )
            for prompt in data
        ]
    return MOPOTrainer(
        model,
        MOPOConfig(**settings),
        train_dataset=PreferenceData.from_examples(examples, list(names)),
        processing_class=tokenizer,
    )


# ------------------------------------------------------------------------------------------ an implementation's process


def scored_rows(batch: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids and scored positions of a trainer's distinct rows, padding left out: the same for all trainers."""
    if "segment_length" in batch:
        made = set()
        ids, lengths = batch["input_ids"][0].tolist(), batch["segment_length"].tolist()
        target, ends = batch["target"].tolist(), batch["cu_seqlens"].tolist()
        place = segment = response = 0
        for count in batch["response_count"].tolist():
            prompt = ids[place : place + lengths[segment]]
            for _ in range(count):
                own = target[ends[response] : ends[response + 1]]
                made.add(((*prompt, *own), (0,) * len(prompt) + (1,) * len(own)))
                response += 1
            place += sum(lengths[segment : segment + 1 + count])
            segment += 1 + count
        return sorted(made)
    scored = batch["completion_mask"] != 0 if "completion_mask" in batch else batch["labels"] != -100
    return sorted(
        {
            (tuple(ids[keep].tolist()), tuple(mask[keep].long().tolist()))
            for ids, keep, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), scored, strict=True)
        }
    )


def memory_mib(name: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 2**10
    raise OSError(f"/proc/self/status has no {name}")


@dataclass
class Meter:
    """Time and peak memory of one step at a time."""

    device: str
    method: str = ""
    started: float = 0.0

    def held_mib(self) -> float:
        """Memory held now."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated() / 2**20
        try:
            return memory_mib("VmRSS")
        except OSError:
            return self._greatest_mib()

    def start(self) -> None:
        if self.device == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self.method = "VmHWM"
            except OSError:
                self.method = "ru_maxrss"
        self.started = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """Seconds and peak MiB since :meth:`start`."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        if self.device == "cuda":
            return seconds, torch.cuda.max_memory_allocated() / 2**20
        return seconds, memory_mib("VmHWM") if self.method == "VmHWM" else self._greatest_mib()

    @staticmethod
    def _greatest_mib() -> float:
        greatest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return greatest / (2**20 if sys.platform == "darwin" else 2**10)


def turns(trainer: Any, meter: Meter, answer: Callable[[dict[str, Any]], None], wait: Callable[[], bool]) -> Any:
    """A callback that lets ``trainer`` do one step whenever ``wait`` returns, until it returns False."""
    from transformers import TrainerCallback

    batches: list[dict[str, Any]] = []
    step = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batches.append(inputs)
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step

    class Turns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Weights that lie in a file are held once they are read.
            for model in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
                for weight in model.parameters():
                    weight.detach().sum()
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            answer({"before_mib": meter.held_mib(), "threads": torch.get_num_threads(), "trained": trained})
            if not wait():
                raise SystemExit
            meter.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            # The line of a step, not of the whole run: it comes after all else that belongs to the step.
            if "grad_norm" not in logs:
                return
            seconds, peak = meter.stop()
            data = scored_rows(batches.pop())
            answer(
                {
                    "seconds": seconds,
                    "peak_mib": peak,
                    "method": meter.method,
                    "loss": logs["loss"],
                    "grad_norm": logs["grad_norm"],
                    "tokens": sum(len(ids) for ids, _ in data),
                    "scored": sum(sum(mask) for _, mask in data),
                    "rows": hashlib.sha256(repr(data).encode()).hexdigest(),
                }
            )
            # After the last step, too: what a trainer does at its end would disturb whose turn it is.
            control.should_training_stop = not wait()
            meter.start()

    return Turns()


def child() -> None:
    """Trains as told by a job, one JSON line on stdin, a step for each further line; answers by lines on stdout."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    work = Work(**{**job["work"], "shares": tuple(job["work"]["shares"])})
    try:
        trainer = make_trainer(
            Implementation(**job["implementation"]), work, job["rounds"], job["model"], tempfile.mkdtemp()
        )
        trainer.add_callback(turns(trainer, Meter(work.device), answer, lambda: bool(sys.stdin.readline())))
        trainer.train()
    except Exception as error:
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())})


# ----------------------------------------------------------------------------------------------------------- the parent


class Stopped(RuntimeError):
    """An implementation's process ended, or failed; the message says how, in one line."""


class Child:
    """An implementation's process.

    Args:
        job: what it is to do.
        folder: for what it prints and leaves behind.
    """

    def __init__(self, job: dict[str, Any], folder: str) -> None:
        environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": folder}
        self.log = Path(folder) / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                CHILD, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self.waiting = selectors.DefaultSelector()
        assert self.process.stdout is not None
        self.waiting.register(self.process.stdout, selectors.EVENT_READ)
        self._send(json.dumps(job))

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        # A process that has ended answers nothing, which is when it is noticed.
        with suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Its next answer.

        Raises:
            Stopped: there is none.
        """
        assert self.process.stdout is not None
        if not self.waiting.select(PATIENCE):
            raise Stopped(f"gave no answer within {PATIENCE:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Stopped(self._how_it_ended())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise Stopped(message["error"])
        return message

    def step(self) -> dict[str, Any]:
        """One optimiser step."""
        self._send("step")
        return self.receive()

    def _how_it_ended(self) -> str:
        code = self.process.wait(PATIENCE)
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return " ".join([f"its process ended with code {code}", *last])

    def close(self) -> None:
        """Ends the process."""
        self.waiting.close()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@contextmanager
def children(jobs: dict[str, dict[str, Any]]) -> Iterator[dict[str, Child]]:
    """A process for each job; none is left behind."""
    with ExitStack() as stack:
        started = {}
        for name, job in jobs.items():
            started[name] = Child(job, stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(started[name].close)
        yield started


def disagreement(firsts: dict[str, list[dict[str, Any]]], losses: dict[str, str], tolerance: float) -> dict[str, float]:
    """Largest relative difference in loss and gradient norm from the first implementation with the same loss.

    Args:
        firsts: implementation -> the answers to its first steps.
        losses: implementation -> name of its loss.
        tolerance: how large it may be.

    Raises:
        SystemExit: it is larger, or an implementation trained on other rows.
    """
    standard: dict[str, str] = {}
    found = {}
    for name, steps in firsts.items():
        one = standard.setdefault(losses[name], name)
        first = next(iter(firsts))
        if [step["rows"] for step in steps] != [step["rows"] for step in firsts[first]]:
            raise SystemExit(f"{name} trained on other rows than {first}: nothing is reported")
        differences = [
            abs(got[key] - expected[key]) / abs(expected[key])
            for got, expected in zip(steps, firsts[one], strict=True)
            for key in ("loss", "grad_norm")
        ]
        for difference in differences:
            if not difference <= tolerance:
                raise SystemExit(f"{name} disagrees with {one} by {difference:.1e}: nothing is reported")
        found[name] = max(differences)
    return found


def take_turns(
    work: Work, implementations: dict[str, Implementation], rounds: int, model: str, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results of the implementations that held out, and why the others did not.

    Raises:
        SystemExit: implementations disagree.
    """
    jobs = {
        name: {
            "implementation": {k: v for k, v in asdict(implementation).items() if k != "unavailable"},
            "work": asdict(work),
            "rounds": rounds,
            "model": model,
        }
        for name, implementation in implementations.items()
    }
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    begun: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    with children(jobs) as alive:

        def each(ask: Callable[[Child], dict[str, Any]], keep: Callable[[str, dict[str, Any]], None]) -> None:
            for name, process in list(alive.items()):
                try:
                    keep(name, ask(process))
                except Stopped as reason:
                    failed[name] = str(reason)
                    alive.pop(name).close()

        each(Child.receive, begun.__setitem__)
        say(f"{work.tuning}: {len(alive)} implementations are ready")
        for number in range(rounds + 1):
            for _ in work.shares:
                each(Child.step, lambda name, answer: steps[name].append(answer))
            if number == 0:
                firsts = {name: steps[name] for name in alive}
                losses = {name: implementation.loss for name, implementation in implementations.items()}
                errors = disagreement(firsts, losses, TOLERANCE[work.dtype])
        held_out = list(alive)
    standard = held_out[0] if held_out else ""
    results = {}
    for name in held_out:
        timed = steps[name][len(work.shares) :]
        results[name] = {
            "about": implementations[name].about,
            "checkpointing": implementations[name].checkpointing,
            "objectives": implementations[name].objectives,
            "loss": implementations[name].loss,
            "compared_with": standard,
            "first_steps_differ": errors[name],
            "threads": begun[name]["threads"],
            "trained_parameters": begun[name]["trained"],
            "settings": {
                "trainer": implementations[name].trainer,
                **settings_of(implementations[name], work, rounds),
                **({"lora": LORA} if work.tuning == "LoRA" else {}),
            },
            "by_prompt_share": {
                str(share): summary(
                    timed[i :: len(work.shares)],
                    steps[standard][len(work.shares) :][i :: len(work.shares)],
                    begun[name]["before_mib"],
                )
                for i, share in enumerate(work.shares)
            },
        }
    return results, failed


def summary(timed: list[dict[str, Any]], standard: list[dict[str, Any]], before_mib: float) -> dict[str, Any]:
    """Of the timed steps of one prompt share, beside those of the implementation they are compared with."""
    seconds = [step["seconds"] for step in timed]
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    median = statistics.median(seconds)
    peak = max(step["peak_mib"] for step in timed)
    tokens, scored = (statistics.mean(step[key] for step in timed) for key in ("tokens", "scored"))
    return {
        "seconds": median,
        "p20": cuts[1],
        "p80": cuts[7],
        "ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(timed, standard, strict=True)),
        "tokens": tokens,
        "scored": scored,
        "tokens_per_second": tokens / median,
        "scored_tokens_per_second": scored / median,
        "peak_mib": peak,
        "beyond_mib": peak - before_mib,
        "memory_method": timed[0]["method"],
    }


def show(record: dict[str, Any], console: Console) -> None:
    """A table for each way of tuning and each prompt share, and below it what could not run."""
    work = record["workload"]
    for tuning, results in record["results"].items():
        for share in map(str, work["shares"]):
            parts = [row["by_prompt_share"][share] for row in results.values()]
            if not parts:
                continue
            table = Table(
                title=f"{work['shape']}, {tuning}, {work['dtype']}, {work['pairs']} pairs a step of "
                f"{work['responses']} responses a prompt, {parts[0]['tokens']:.0f} tokens in distinct rows, "
                f"{parts[0]['scored']:.0f} of them scored (prompt share {share}), {record['threads']} threads"
            )
            for heading in (
                "implementation",
                "step, s",
                "p20 to p80",
                "ratio",
                "tokens/s",
                "scored/s",
                "peak MiB",
                "beyond",
            ):
                table.add_column(heading, no_wrap=True)
            for (name, row), part in zip(results.items(), parts, strict=True):
                if row["compared_with"] == name and table.rows:
                    table.add_section()
                table.add_row(
                    name,
                    f"{part['seconds']:.3f}",
                    f"{part['p20']:.3f} to {part['p80']:.3f}",
                    f"{part['ratio']:.2f}",
                    f"{part['tokens_per_second']:.0f}",
                    f"{part['scored_tokens_per_second']:.0f}",
                    f"{part['peak_mib']:.0f}",
                    f"{part['beyond_mib']:.0f}",
                )
            console.print(table)
    console.print(
        "ratio: time over that of the first implementation since the last rule, in the same rounds; beyond: MiB of the "
        "peak that were not held before the first step, as weights are, a copy that serves as reference included",
        highlight=False,
        soft_wrap=True,
    )
    for name, row in {name: row for results in record["results"].values() for name, row in results.items()}.items():
        loss = "" if row["loss"] == "DPO" else f"; its own loss, {row['loss']}, on the same rows"
        checkpointing = "with" if row["checkpointing"] else "without"
        console.print(
            f"{name}: {row['about']}, {checkpointing} gradient checkpointing{loss}", highlight=False, soft_wrap=True
        )
    for tuning, reasons in record["failed"].items():
        for name, reason in reasons.items():
            console.print(f"{name} ({tuning}): stopped: {reason}", markup=False, highlight=False, soft_wrap=True)
    for name, reason in record["unavailable"].items():
        console.print(f"{name}: cannot run here: {reason}", markup=False, highlight=False, soft_wrap=True)


def measure(work: Work, tunings: list[str], names: list[str], rounds: int, model: str | None) -> dict[str, Any]:
    """Results, failures and reasons, by tuning and implementation.

    Args:
        names: of the implementations.
        model: folder of a model; None makes one of ``work.shape``.
    """
    console = Console(stderr=True)
    record: dict[str, Any] = {"results": {}, "failed": {}, "unavailable": {}}
    runs = {}
    for name in names:
        reason = IMPLEMENTATIONS[name].unavailable(work)
        if reason is None:
            runs[name] = IMPLEMENTATIONS[name]
        else:
            record["unavailable"][name] = reason
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            make_model(work.shape, Path(folder))
        for tuning in tunings:
            results, failed = record["results"].setdefault(tuning, {}), record["failed"].setdefault(tuning, {})
            for checkpointing in (False, True):
                group = {name: one for name, one in runs.items() if one.checkpointing is checkpointing}
                if group:
                    got = take_turns(
                        replace(work, tuning=tuning),
                        group,
                        rounds,
                        model or folder,
                        lambda text: console.print(text, highlight=False),
                    )
                    results.update(got[0])
                    failed.update(got[1])
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of a model with random weights")
    model.add_argument("--model", type=Path, metavar="FOLDER", help="a causal language model to train instead")
    parser.add_argument("--tuning", nargs="+", choices=TUNINGS, default=list(TUNINGS))
    model.add_argument("--demo", action="store_true", help="the demo's model and data, as --model, --data and the like")
    parser.add_argument("--data", type=Path, metavar="FILE", help="preference examples as JSON Lines; with --model")
    parser.add_argument("--pairs", type=int, default=2, help="a step")
    parser.add_argument("--responses", type=int, default=2, help="to a prompt, every two of them a pair")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row")
    parser.add_argument("--prompt_share", nargs="+", type=float, help="prompt's part of a row; default: 0.5 0.8")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="; ".join(f"{k}: {v}" for k, v in DTYPES.items())
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="implementations that take turns share its memory"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed; at least 2")
    parser.add_argument(
        "--implementations", nargs="+", default=[], metavar="NAME", help="only those whose name contains one of these"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, few implementations: does it work?")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.child:
        child()
        return
    if options.quick:
        options.shape, options.model = "tiny", None
        options.pairs, options.length, options.rounds = 2, 24, 2
    if options.demo:
        try:
            options.model = ensure_model(ROOT / DEFAULT_FOLDER)
        except FileNotFoundError as missing:
            parser.error(f"argument --demo: {missing}")
        options.data, options.responses, options.pairs, options.length = DEMO_DATA, 4, 12, 512
    for name, value, low in (("rounds", options.rounds, 2), ("pairs", options.pairs, 1), ("length", options.length, 8)):
        if value < low:
            parser.error(f"argument --{name}: expected at least {low}; got {value}")
    if options.responses < 2 or options.pairs % math.comb(options.responses, 2):
        parser.error(
            f"argument --pairs: expected a multiple of the pairs that {options.responses} responses make; "
            f"got {options.pairs}"
        )
    if options.data is not None and (options.model is None or options.prompt_share):
        parser.error("argument --data: takes --model, whose tokens its texts become, and no --prompt_share")
    if options.data is not None and not options.data.is_file():
        parser.error(f"argument --data: there is no file {options.data}")
    if options.data is not None:
        options.prompt_share = [prompt_share(options.data, options.model, options.responses)]
    if options.prompt_share is None:
        options.prompt_share = [0.5, 0.8]
    if not all(0 < share < 1 for share in options.prompt_share):
        parser.error(f"argument --prompt_share: expected numbers between 0 and 1; got {options.prompt_share}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device here")
    asked = options.implementations or (QUICK if options.quick else list(IMPLEMENTATIONS))
    for part in asked:
        if not any(part in name for name in IMPLEMENTATIONS):
            parser.error(f"argument --implementations: no implementation is called like {part!r}")
    # A whole name is that implementation alone, though it may begin others' names.
    names = [
        name for name in IMPLEMENTATIONS if name in asked or any(part in name for part in {*asked} - {*IMPLEMENTATIONS})
    ]

    work = Work(
        shape=options.shape if options.model is None else options.model.name,
        pairs=options.pairs,
        responses=options.responses,
        length=options.length,
        shares=tuple(options.prompt_share),
        dtype=options.dtype,
        device=options.device,
        data="" if options.data is None else str(options.data.resolve()),
    )
    folder = None if options.model is None else str(options.model.resolve())
    record = measure(work, options.tuning, names, options.rounds, folder)
    threads = {row["threads"] for results in record["results"].values() for row in results.values()}
    origin = provenance("bench.step", sys.argv[1:] if arguments is None else arguments)
    record = {
        "workload": {
            **{name: value for name, value in asdict(work).items() if name != "tuning"},
            "data": "" if options.data is None else options.data.name,
        },
        **record,
        "rounds": options.rounds,
        **origin,
        "threads": max(threads, default=origin["threads"]),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "peers": {**origin["peers"], **{name: importlib.metadata.version(name) for name in ("peft", "accelerate")}},
    }
    show(record, Console(width=max(150, Console().width)))
    print(json.dumps(record))
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
