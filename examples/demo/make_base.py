"""Sample the base model's answers to the validation and test prompts: they are the same in every run of the demo.

    python examples/demo/make_base.py            # writes examples/demo/data/base.jsonl and base_metadata.json

Each block of prompts has its own seed and is stored when done: an interrupted run goes on where it stopped. The answers
are drawn as the demo draws those of its policies, and none is rejected: an answer that does not end within
MAX_NEW_TOKENS is judged as it stands.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from make_model import DEFAULT_FOLDER, RECORD, ensure_model
from prompts import test_prompts, validation_prompts

from mopo_kernels.evaluation import load_policy, sample_responses

DATA = Path(__file__).parent / "data"
FILE = DATA / "base.jsonl"
SAMPLES = 16
"""Answers per prompt, twice those of a policy: more of them take noise out of every comparison, and are made once."""
MAX_NEW_TOKENS = 48
PROMPTS_PER_BLOCK = 15
SEED = 20261127


def splits() -> dict[str, list[str]]:
    """The prompts to be answered, by the name of their split."""
    return {"validation": validation_prompts(), "test": test_prompts()}


def read(file: Path = FILE) -> dict[str, dict[str, list[str]]]:
    """Split -> prompt -> the base model's answers; empty where there is no file.

    A line that an interruption cut short is passed over.
    """
    answers: dict[str, dict[str, list[str]]] = {name: {} for name in splits()}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        answers[row["split"]][row["prompt"]] = row["responses"]
    return answers


def sample_all(model_folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Every answer, a row a prompt; prompts whose answers are in ``cache`` are not answered again."""
    done = read(cache)
    cache.parent.mkdir(parents=True, exist_ok=True)
    policy = load_policy(model_folder, device="cpu")
    with policy.active() as model, cache.open("a", encoding="utf-8") as stream:
        stream.write("\n")  # ends a line that an interruption cut short
        for offset, (split, prompts) in enumerate(splits().items()):
            for start in range(0, len(prompts), PROMPTS_PER_BLOCK):
                block = prompts[start : start + PROMPTS_PER_BLOCK]
                if all(prompt in done[split] for prompt in block):
                    continue
                drawn = sample_responses(
                    model,
                    policy.tokenizer,
                    block,
                    samples_per_prompt=SAMPLES,
                    max_new_tokens=MAX_NEW_TOKENS,
                    batch_size=PROMPTS_PER_BLOCK * SAMPLES // 2,
                    seed=SEED + 1000 * offset + start,
                    description=f"{split} prompts from {start}",
                )
                done[split] |= dict(zip(block, drawn, strict=True))
                stream.writelines(
                    json.dumps({"split": split, "prompt": prompt, "responses": done[split][prompt]}, ensure_ascii=False)
                    + "\n"
                    for prompt in block
                )
                stream.flush()
    return [
        {"split": split, "prompt": prompt, "responses": done[split][prompt]}
        for split, prompts in splits().items()
        for prompt in prompts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample the base model's answers to validation and test prompts.")
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER, help="folder of the model, made when missing")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo/base.jsonl"), help="finished blocks")
    parser.add_argument("--output", type=Path, default=DATA, help="folder for base.jsonl and base_metadata.json")
    arguments = parser.parse_args()

    model_folder = ensure_model(arguments.model)
    rows = sample_all(model_folder, arguments.cache)
    metadata = {
        "model": json.loads((model_folder / RECORD).read_text(encoding="utf-8")),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "sampling": {
            "seed": SEED,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": MAX_NEW_TOKENS,
            "prompts_per_block": PROMPTS_PER_BLOCK,
            "dtype": "float32",
        },
        "prompts": {split: len(prompts) for split, prompts in splits().items()},
        "responses_per_prompt": SAMPLES,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / FILE.name).open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (arguments.output / "base_metadata.json").write_text(
        json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"{len(rows)} prompts with {SAMPLES} answers each written to {arguments.output / FILE.name}")


if __name__ == "__main__":
    main()
