"""One sweep beside separate runs of its points: time and peak memory of whole `mopo train` processes.

    python -m bench.sweep                       # SmolLM2-135M's shape with random weights, 3 points, 4 steps each
    python -m bench.sweep --shape tiny          # seconds

The separate runs train the same points on the same rows, one process each: once with a copy of the data each, so that
every run computes the reference's log-probabilities, and once on the same file, beside which the first run leaves them
for the others. All end with the same adapters, which is checked. Seconds are wall time of the processes, start and
imports included; memory is the resident high-water mark of a process (`ru_maxrss`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.provenance import ROOT, provenance
from bench.step import SHAPES, make_model, make_tokenizer

THRESHOLDS = (0.45, 0.5, 0.55, 0.6, 0.65, 0.7)


def make_rows(file: Path, vocabulary: int, prompts: int, responses: int, length: int) -> None:
    """Random words: a prompt of half the row and responses of ragged length, labelled for length and against it."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(count))

    lines = []
    for _ in range(prompts):
        sizes = [draw.randint(length // 4, length // 2 - 1) for _ in range(responses)]
        pairs = []
        for i in range(responses):
            for j in range(i):
                longer = 0.5 + 0.5 * ((sizes[i] > sizes[j]) - (sizes[i] < sizes[j]))
                brief = 1 - longer if draw.random() < 0.75 else longer
                pairs.append({"i": i, "j": j, "preference": {"long": longer, "brief": brief}})
        row = {"prompt": words(length // 2), "responses": [" " + words(size) for size in sizes], "pairs": pairs}
        lines.append(json.dumps(row) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")


def run(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of one ``mopo train``."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "mopo_kernels.cli", "train", *arguments]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{log.read().decode()}")
    return seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, float]]:
    """Implementation -> (seconds of all its processes, largest peak MiB of one), in a fresh folder."""
    data = folder / "data" / "pairs.jsonl"
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    make_rows(data, vocabulary, options.prompts, options.responses, options.length)
    names = [str(bound) for bound in THRESHOLDS[: options.points]]
    points = {f"p{name}": {"brief": float(name)} for name in names}
    (folder / "sweep.json").write_text(json.dumps(points))
    common = ["--model_name_or_path", str(options.model), "--lora_r", "16", "--tau", "0.5", "--primary", "long"]
    common += ["--max_steps", str(options.steps), "--per_device_train_batch_size", str(options.batch)]
    common += ["--per_device_eval_batch_size", str(options.batch), "--initial_multiplier", "zero"]
    common += ["--reference", "precomputed", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
    common += ["--use_cpu"] if options.device == "cpu" else []

    def alone(out: Path, name: str, rows: Path) -> tuple[float, float]:
        more = ["--output_dir", str(out / f"p{name}"), "--thresholds", f"brief={name}", "--train_file", str(rows)]
        return run([*common, *more])

    def copied(name: str) -> Path:
        copy = folder / f"data_{name}" / data.name
        copy.parent.mkdir()
        return Path(shutil.copy(data, copy))

    def swept() -> list[tuple[float, float]]:
        rows = copied("sweep")
        more = ["--output_dir", str(folder / "sweep"), "--sweep", str(folder / "sweep.json"), "--train_file", str(rows)]
        return [run([*common, *more])]

    found = {
        "sweep": swept(),
        "separate runs": [alone(folder / "own", name, copied(name)) for name in names],
        "separate runs, reference found": [alone(folder / "shared", name, data) for name in names],
    }
    for name in names:
        adapters = {
            (folder / place / f"p{name}" / "adapter_model.safetensors").read_bytes()
            for place in ("sweep", "own", "shared")
        }
        if len(adapters) != 1:
            raise RuntimeError(f"expected one adapter for the threshold {name} whichever way; got {len(adapters)}")
    return {name: (sum(s for s, _ in runs), max(m for _, m in runs)) for name, runs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of a model with random weights")
    parser.add_argument("--points", type=int, choices=range(1, len(THRESHOLDS) + 1), default=3)
    parser.add_argument("--steps", type=int, default=4, help="of every point")
    parser.add_argument("--prompts", type=int, default=16, help="in the data")
    parser.add_argument("--responses", type=int, default=4, help="to a prompt")
    parser.add_argument("--batch", type=int, default=4, help="prompts a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=1, help="of every implementation in turn; the median counts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, as torch finds no CUDA device; got cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.model = folder / "model"
        make_model(options.shape, options.model)
        vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
        make_tokenizer(vocabulary).save_pretrained(options.model)
        rounds = []
        for index in range(options.rounds):
            place = folder / f"round_{index}"
            place.mkdir()
            rounds.append(measure(options, place))
    table = Table(title=f"{options.points} points, {options.steps} steps each, {options.shape}", title_justify="left")
    for heading in ("", "seconds", "peak memory of a process"):
        table.add_column(heading, justify="right" if heading else "left")
    results = {}
    for implementation in rounds[0]:
        seconds, peak = (statistics.median(found[implementation][k] for found in rounds) for k in (0, 1))
        results[implementation] = {"seconds": seconds, "peak_mib": peak}
        table.add_row(implementation, f"{seconds:.1f}", f"{peak:.0f} MiB")
    Console().print(table)
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("model", "output")}
    report = {"settings": settings, "results": results, **provenance("bench.sweep", sys.argv[1:])}
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
