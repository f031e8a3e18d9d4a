"""Section "step": whole optimizer steps of a model of 1.3 billion numbers, this library's trainer beside TRL's.

LoRA and every weight trained, prompts shared with sdpa and with flex_attention, on the same rows (:mod:`bench.step`):
pairs of two responses, the reference beforehand, no checkpointing, bf16. The model has random weights, made in place.
Runs follow one another in one process, as imports take longer than runs do, and go once more in reverse order, so that
a drift of the device shows. The first loss and gradient norm of runs with the same weights trained are compared.

Runs as a child too: ``python -m bench.device.stepping PLAN``.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import step
from bench.device import subprocesses
from bench.device.record import NotHere, Section
from bench.device.subprocesses import report
from bench.step import IMPLEMENTATIONS, TUNINGS, Work

OURS, THEIRS = "mopo_kernels", "TRL, fastest"
# Steps of a run, after one that is not counted.
ROUNDS = {"cuda": 8, "cpu": 2}
WORK = {
    "cuda": Work(shape="1.3b", pairs=8, length=1024, shares=(0.5,), dtype="bfloat16", device="cuda"),
    "cpu": Work(shape="tiny", pairs=2, length=24, shares=(0.5,)),
}
AGAIN = ", again"
# Both trainers name what they computed beforehand after all weights, read on the host: many seconds, which are no part
# of a step. Nor may the next run find it.
NAMES = {OURS: "mopo_kernels.trainer.trainer.fingerprint", THEIRS: "trl.trainer.dpo_trainer.hash_module"}
# Seconds without a word that a run may take where attention is compiled, for each new length of a row.
COMPILING = 120.0


class Run(NamedTuple):
    """What is trained, by whom, with which attention."""

    tuning: str
    implementation: str
    attention: str

    @property
    def name(self) -> str:
        return f"{self.tuning}, {self.implementation}, {self.attention}"


# Attention that is compiled comes last: it may take the time of the others.
RUNS = (
    *(Run(tuning, implementation, "sdpa") for tuning in TUNINGS for implementation in (OURS, THEIRS)),
    *(Run(tuning, OURS, "flex_attention") for tuning in TUNINGS),
)


def unavailable(one: Run, work: Work) -> str | None:
    """Why the run cannot be made here, None if it can."""
    if one.attention == "flex_attention" and work.device == "cpu":
        return "flex_attention has no backward pass on a CPU"
    return IMPLEMENTATIONS[one.implementation].unavailable(work)


def make_model(work: Work, attention: str) -> Any:
    """Random weights, the same for every run, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=51200 if work.shape == "1.3b" else 1000,
        hidden_size=2048 if work.shape == "1.3b" else 64,
        intermediate_size=5504 if work.shape == "1.3b" else 128,
        num_hidden_layers=24 if work.shape == "1.3b" else 2,
        num_attention_heads=16 if work.shape == "1.3b" else 4,
        num_key_value_heads=16 if work.shape == "1.3b" else 2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(step.SEED)
    dtype = torch.bfloat16 if work.dtype == "bfloat16" else torch.float32
    with torch.device(work.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def held_mib(device: str) -> float | None:
    """Of the device's memory, by this process, after what nobody refers to is gone; not known on the CPU."""
    gc.collect()
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    return round(torch.cuda.memory_allocated() / 2**20, 1)


def take(name: str, device: str, deadline: float) -> None:
    """Make a run, reporting its steps, or why it cannot be made here."""
    one = next(one for one in RUNS if one.name == name.removesuffix(AGAIN))
    work = replace(WORK[device], tuning=one.tuning)
    reason = unavailable(one, work)
    if reason is not None:
        report(run=one.name, unavailable=reason)
        return
    patience = {"patience": COMPILING} if one.attention == "flex_attention" else {}
    report(run=name, held_before_mib=held_mib(device), **patience)

    def answer(message: dict[str, Any]) -> None:
        report(run=name, step=message, **patience)

    with tempfile.TemporaryDirectory() as folder, mock.patch(NAMES[one.implementation], return_value=name):
        model = make_model(work, one.attention)
        tokenizer = step.make_tokenizer(model.get_input_embeddings().weight.shape[0])
        trainer = step.trainer_of(IMPLEMENTATIONS[one.implementation], work, ROUNDS[device], model, tokenizer, folder)
        report(run=name, parameters=sum(p.numel() for p in model.parameters()), **patience)
        turns = step.turns(trainer, step.Meter(device), answer, lambda: time.monotonic() < deadline)
        trainer.add_callback(turns)
        # The time may be up before the first step.
        with suppress(SystemExit):
            trainer.train()
        trainer.accelerator.free_memory()


def child(plan: dict[str, Any]) -> None:
    """Takes the plan's runs; what libraries print goes to the log."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
    deadline = time.monotonic() + plan["seconds"]
    subprocesses.take_pieces(plan, lambda name: take(name, plan["device"], deadline))


# ----------------------------------------------------------------------------------------------------------- the parent


def summaries(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each run with a step that counts, its second round included, beside TRL's with the same weights trained."""
    results: dict[str, dict[str, Any]] = {}
    for one in RUNS:
        rounds = [found[name] for name in (one.name, one.name + AGAIN) if len(found.get(name, {}).get("steps", ())) > 1]
        if not rounds:
            continue
        steps = [s for taken in rounds for s in taken["steps"][1:]]
        seconds = statistics.median(s["seconds"] for s in steps)
        results[one.name] = {
            "steps": len(steps),
            "seconds": seconds,
            "by_round": [statistics.median(s["seconds"] for s in taken["steps"][1:]) for taken in rounds],
            "peak_mib": max(s["peak_mib"] for s in steps),
            "before_mib": [taken["before_mib"] for taken in rounds],
            "held_before_mib": [taken["held_before_mib"] for taken in rounds],
            "trained": rounds[0]["trained"],
            "parameters": rounds[0]["parameters"],
            "tokens_per_second": steps[0]["tokens"] / seconds,
            "first": {key: rounds[0]["steps"][0][key] for key in ("loss", "grad_norm", "rows", "tokens", "scored")},
        }
    for name, row in results.items():
        theirs = results.get(Run(name.partition(",")[0], THEIRS, "sdpa").name)
        row["over_TRL"] = row["seconds"] / theirs["seconds"] if theirs else None
    return results


def disagreements(results: dict[str, dict[str, Any]], tolerance: float) -> list[str]:
    """Runs with the same weights trained whose first step was another one's: rows, loss or gradient norm."""
    lines = []
    for tuning in TUNINGS:
        rows = {name: row["first"] for name, row in results.items() if name.startswith(f"{tuning},")}
        for name, first in list(rows.items())[1:]:
            standard, expected = next(iter(rows.items()))
            if first["rows"] != expected["rows"]:
                lines.append(f"{name} trained on other rows than {standard}")
            for key in ("loss", "grad_norm"):
                difference = abs(first[key] - expected[key]) / abs(expected[key])
                if not difference <= tolerance:
                    lines.append(f"{name}: {key} of the first step differs from that of {standard} by {difference:.1e}")
    return lines


def table(results: dict[str, dict[str, Any]]) -> str:
    width = max(map(len, results))
    lines = [f"{'':{width}}  step, s      by round  / TRL  peak MiB   tokens/s"]
    for name, row in results.items():
        rounds = " ".join(f"{value:.3f}" for value in row["by_round"])
        ratio = "-" if row["over_TRL"] is None else f"{row['over_TRL']:.3f}"
        lines.append(
            f"{name:{width}}  {row['seconds']:7.3f}  {rounds:>12}  {ratio:>5}  {row['peak_mib']:8.0f}  "
            f"{row['tokens_per_second']:9.0f}"
        )
    return "\n".join(lines)


def run(section: Section) -> None:
    for package in ("transformers", "accelerate", "peft", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise NotHere(f"{package} is not installed")
    work = WORK[section.device]
    section.data["work"] = {key: value for key, value in asdict(work).items() if key not in ("tuning", "data")}
    section.data["unavailable"] = absent = {}
    found: dict[str, dict[str, Any]] = {}

    def each(fields: dict[str, Any]) -> None:
        name = fields.pop("run")
        if "unavailable" in fields:
            if name not in absent:
                print(f"  {name}: cannot run here: {fields['unavailable']}", flush=True)
            absent[name] = fields["unavailable"]
            return
        mine = found.setdefault(name, {"steps": []})
        message = fields.pop("step", None)
        if message is not None and "seconds" in message:
            mine["steps"].append(message)
        else:
            mine |= message or fields
        section.data["results"] = summaries(found)
        section.save()

    names = [one.name for one in RUNS]
    again = [name + AGAIN for name in reversed(names)]
    plan = {"device": section.device}
    failed = subprocesses.run_pieces("bench.device.stepping", plan, [*names, *again], lambda: section.left, each)
    section.data["failed"] = failed
    results = section.data["results"] = summaries(found)
    if results:
        print(table(results), flush=True)
    section.failures += [f"{name}: {why}" for name, why in failed.items()]
    known = results.keys() | failed.keys() | absent.keys()
    section.failures += [f"{name}: not reached" for name in names if name not in known]
    section.failures += disagreements(results, step.TOLERANCE[work.dtype])


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
