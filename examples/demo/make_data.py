"""Make the demo's preference data: sample responses from the demo's own model, label every pair by the judges.

    python examples/demo/make_data.py --device cuda --prompts_per_batch 140    # as the committed data were made
    python examples/demo/make_data.py                                          # on a CPU, in half an hour

Both write examples/demo/data/preferences.jsonl and metadata.json.

Responses are independent draws from the model's own probabilities (no top-k, no top-p; its temperature is folded into
its weights, see make_model.py), kept when they end by themselves within MAX_NEW_TOKENS and rejected otherwise, so the
behaviour policy is the reference conditioned on a finished answer. Each batch has its own seed and is stored when done:
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers
from judges import JUDGES, judge_correlations, label_pair
from make_model import DEFAULT_FOLDER, RECORD, ensure_model
from prompts import train_prompts
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

RESPONSES = 4
"""Responses kept per prompt."""
DRAWS = 6
"""Draws per prompt and round; about one in eight is rejected."""
ROUNDS = 4
"""Rounds of draws before a prompt that lacks responses is given up."""
PROMPTS_PER_BATCH = 16
MAX_NEW_TOKENS = 48
SEED = 20261121
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Draw:
    """One sampled response.

    Attributes:
        text: the response without its end-of-turn token.
        tokens: number of sampled tokens, without the end-of-turn token.
        verdict: "kept", or why it can't be used: "truncated" (no end within MAX_NEW_TOKENS), "blank" (nothing to read,
            or white space around the text), "retokenised" (the text's own tokens differ from those sampled, so
            training would score another sequence than the one drawn).
    """

    text: str
    tokens: int
    verdict: str


def sample_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], draws: int, seed: int, device: str = "cpu"
) -> list[list[Draw]]:
    """`draws` independent responses to each prompt, as `[prompt][draw]`; one left-padded batch, one seed."""
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
        for _ in range(draws)
    ]
    encoded = tokenizer(rendered, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(
        device
    )
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            **encoded, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS
        )
    sampled = output[:, encoded["input_ids"].shape[1] :].tolist()
    judged = [_read_draw(tokenizer, row) for row in sampled]
    return [judged[start : start + draws] for start in range(0, len(judged), draws)]


def _read_draw(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> Draw:
    ended = tokenizer.eos_token_id in row
    tokens = row[: row.index(tokenizer.eos_token_id)] if ended else row
    text = str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
    if not ended:
        verdict = "truncated"
    elif not text or text != text.strip():
        verdict = "blank"
    elif tokenizer(text, add_special_tokens=False)["input_ids"] != tokens:
        verdict = "retokenised"
    else:
        verdict = "kept"
    return Draw(text, len(tokens), verdict)


def sample_all(
    model_folder: Path, cache: Path, prompts_per_batch: int = PROMPTS_PER_BATCH, device: str = "cpu"
) -> dict[str, list[Draw]]:
    """Every draw for every training prompt, in order; batches already in `cache` are read, not sampled again."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = loaded.to(device).eval()
    done = _read_cache(cache)
    draws: dict[str, list[Draw]] = {prompt: [] for prompt in train_prompts()}
    cache.parent.mkdir(parents=True, exist_ok=True)
    with Progress() as progress, cache.open("a", encoding="utf-8") as stream:
        stream.write("\n")  # ends a line that an interruption cut short
        for round_index in range(ROUNDS):
            lacking = [prompt for prompt in draws if len(_kept(draws[prompt])) < RESPONSES]
            if not lacking:
                break
            lacking.sort(key=lambda prompt: len(tokenizer(prompt)["input_ids"]))
            starts = range(0, len(lacking), prompts_per_batch)
            for batch_index, start in enumerate(progress.track(starts, description=f"sampling, round {round_index}")):
                prompts = lacking[start : start + prompts_per_batch]
                key = f"{round_index}/{batch_index}"
                if done.get(key, ([], []))[0] != prompts:
                    seed = SEED + 1000 * round_index + batch_index
                    rows = sample_batch(model, tokenizer, prompts, DRAWS, seed, device)
                    done[key] = (prompts, rows)
                    record = {"key": key, "prompts": prompts, "draws": [[asdict(draw) for draw in row] for row in rows]}
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                    stream.flush()
                for prompt, row in zip(*done[key], strict=True):
                    draws[prompt].extend(row)
    return draws


def _read_cache(cache: Path) -> dict[str, tuple[list[str], list[list[Draw]]]]:
    """Finished batches: key -> (prompts, draws). A line cut short by an interruption is passed over."""
    batches: dict[str, tuple[list[str], list[list[Draw]]]] = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        batches[record["key"]] = (record["prompts"], [[Draw(**draw) for draw in row] for row in record["draws"]])
    return batches


def _kept(draws: list[Draw]) -> list[Draw]:
    return [draw for draw in draws if draw.verdict == "kept"]


def make_row(index: int, prompt: str, responses: list[str]) -> dict[str, object]:
    """One line of preferences.jsonl: every pair of responses labelled by every judge."""
    scores = {name: [judge(prompt, response) for response in responses] for name, judge in JUDGES.items()}
    pairs = [
        {"i": i, "j": j, "preference": {name: label_pair(score[i], score[j]) for name, score in scores.items()}}
        for i, j in combinations(range(len(responses)), 2)
    ]
    return {"id": f"demo-{index:03d}", "prompt": prompt, "responses": responses, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample and label the demo's preference data.")
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER, help="folder of the model, made when missing")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo/samples.jsonl"), help="finished batches")
    parser.add_argument("--output", type=Path, default=DATA, help="folder for preferences.jsonl and metadata.json")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts_per_batch", type=int, default=PROMPTS_PER_BATCH, help="that the draws depend on")
    arguments = parser.parse_args()

    model_folder = ensure_model(arguments.model)
    draws = sample_all(model_folder, arguments.cache, arguments.prompts_per_batch, arguments.device)
    kept = {prompt: _kept(row)[:RESPONSES] for prompt, row in draws.items()}
    dropped = [prompt for prompt, row in kept.items() if len(row) < RESPONSES]
    usable = {prompt: row for prompt, row in kept.items() if len(row) == RESPONSES}
    rows = [
        make_row(index, prompt, [draw.text for draw in responses])
        for index, (prompt, responses) in enumerate(usable.items())
    ]
    every = [draw for row in draws.values() for draw in row]
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
            "draws_per_prompt_and_round": DRAWS,
            "prompts_per_batch": arguments.prompts_per_batch,
            "device": arguments.device,
            "draws": len(every),
            "verdicts": {
                verdict: sum(draw.verdict == verdict for draw in every)
                for verdict in ("kept", "truncated", "blank", "retokenised")
            },
        },
        "prompts": len(rows),
        "dropped_prompts": dropped,
        "responses_per_prompt": RESPONSES,
        "mean_response_tokens": sum(draw.tokens for row in usable.values() for draw in row) / (RESPONSES * len(rows)),
        "rank_correlation_within_prompts": judge_correlations(rows),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "preferences.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (arguments.output / "metadata.json").write_text(
        json.dumps(metadata, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"{len(rows)} prompts written to {arguments.output / 'preferences.jsonl'}; {len(dropped)} dropped")


if __name__ == "__main__":
    main()
