"""From prompts to preference data: responses drawn from a model, scored by judges, every pair labelled.

Rows are written as they are made, a part of the prompts at a time, and a run that was interrupted goes on where it
ended, with the same rows as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopo_kernels.evaluation import Judge, Policy, Prompt, draw_responses, judge_responses
from mopo_kernels.trainer.checkpoint import write_atomically

# Beside the rows: how they were made, and how far the run has come.
RECORD_SUFFIX = ".label.json"
# From a prompt's number in the whole and its prompts to their responses.
Source = Callable[[int, Sequence[Prompt]], list[list[str]]]


def label_pair(first: float, second: float, scale: float | None) -> float:
    """P(the first response beats the second) from their scores.

    Args:
        first, second: scores of one judge; a higher one is better.
        scale: of Bradley and Terry's model, ``1 / (1 + exp(-(first - second) / scale))``: the difference of scores at
            which the better one wins 73 of 100 times. A reward model that was trained on pairs has 1. None: 1, 0, or
            0.5 for a tie.
    """
    if scale is None:
        return 0.5 + 0.5 * ((first > second) - (first < second))
    # As a hyperbolic tangent it overflows at neither end.
    return 0.5 + 0.5 * math.tanh((first - second) / (2 * scale))


def label_row(
    prompt: Prompt,
    responses: Sequence[str],
    scores: Mapping[str, Sequence[float]],
    scale: Mapping[str, float | None],
    name: str | None = None,
) -> dict[str, Any]:
    """A canonical row with every pair of responses labelled for every objective, and the scores beside them.

    Args:
        scores: objective -> a score a response. The loaders leave this column aside.
        scale: objective -> see :func:`label_pair`.
        name: the row's id.
    """
    pairs = [
        {
            "i": i,
            "j": j,
            "preference": {key: label_pair(value[i], value[j], scale[key]) for key, value in scores.items()},
        }
        for i, j in itertools.combinations(range(len(responses)), 2)
    ]
    return {
        "prompt": prompt,
        "responses": list(responses),
        "pairs": pairs,
        "id": name,
        "scores": {key: list(value) for key, value in scores.items()},
    }


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws responses from a policy.

    Attributes:
        policy: of ``evaluation.load_policy``.
        samples: draws a prompt.
        max_new_tokens, temperature, top_p, batch_size: as in ``evaluation.draw_responses``.
        seed: a part of the prompts has its own, made from this and the number of its first prompt.
        stop: a response ends before this text, as one that ended by itself; None: only at the model's own end.
        keep_unfinished: keep responses that were cut at ``max_new_tokens``. They are not what the model would write,
            and a policy learns from them to end there.
    """

    policy: Policy
    samples: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16
    seed: int = 0
    stop: str | None = None
    keep_unfinished: bool = False

    def __call__(self, first: int, prompts: Sequence[Prompt]) -> list[list[str]]:
        """Responses to a part of the prompts, whose first one has the number ``first``; blank ones are left out."""
        seed = int(np.random.SeedSequence([self.seed, first]).generate_state(1)[0])
        with self.policy.active() as model:
            drawn = draw_responses(
                model,
                self.policy.tokenizer,
                prompts,
                samples_per_prompt=self.samples,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                batch_size=self.batch_size,
                seed=seed,
                renderer=self.policy.renderer,
                progress=False,
            )
        return [[text for draw in row if (text := self._kept(*draw)) is not None] for row in drawn]

    def _kept(self, text: str, ended: bool) -> str | None:
        if self.stop is not None and self.stop in text:
            text, ended = text[: text.index(self.stop)], True
        return text if text.strip() and (ended or self.keep_unfinished) else None


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    prompts: done. rows: written. left_out: prompts with fewer than two responses. size: bytes of the rows' file.
    """

    prompts: int = 0
    rows: int = 0
    left_out: int = 0
    size: int = 0


def label_file(
    path: str | Path,
    prompts: Sequence[Prompt],
    responses: Source,
    judges: Mapping[str, Judge],
    scale: Mapping[str, float | None],
    *,
    settings: Mapping[str, Any],
    chunk: int = 64,
    advance: Callable[[int], object] = lambda count: None,
) -> Progress:
    """Write labelled rows to a JSON Lines file; go on with a file that an earlier call left unfinished.

    Args:
        path: of the file. Beside it ``<path>.label.json`` holds ``settings`` and the progress.
        prompts: X of them. One that gets fewer than two responses is left out and counted.
        responses: gives those of a part of the prompts, by the number of its first; a :class:`Sampler`, or a look-up.
        judges: objective -> judge.
        scale: objective -> see :func:`label_pair`.
        settings: what else decides the rows, in plain values: a file is gone on with under the same only.
        chunk: prompts sampled, scored and written together. It is among what decides the rows.
        advance: called with the number of prompts that an earlier call had done, then with that of each part.

    Returns:
        the progress, of all calls together.

    Raises:
        ValueError: the file was begun under other settings, or was not made here.
    """
    path = Path(path)
    record = path.with_name(path.name + RECORD_SUFFIX)
    own = json.loads(json.dumps({**settings, "chunk": chunk, "prompts": len(prompts), "scale": dict(scale)}))
    progress = _begin(path, record, own)
    advance(progress.prompts)
    while progress.prompts < len(prompts):
        part = prompts[progress.prompts : progress.prompts + chunk]
        drawn = responses(progress.prompts, part)
        places = [place for place, row in enumerate(drawn) if len(row) >= 2]
        scores = judge_responses(
            judges, [part[place] for place in places], [drawn[place] for place in places], progress=False
        )
        lines = [
            label_row(
                part[place],
                drawn[place],
                {name: rows[number] for name, rows in scores.items()},
                scale,
                name=f"{path.stem}-{progress.prompts + place}",
            )
            for number, place in enumerate(places)
        ]
        with path.open("ab") as file:
            file.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        progress = Progress(
            progress.prompts + len(part),
            progress.rows + len(lines),
            progress.left_out + len(part) - len(lines),
            size,
        )
        _save(record, own, progress)
        advance(len(part))
    return progress


def _begin(path: Path, record: Path, settings: dict[str, Any]) -> Progress:
    """The progress so far; rows of a part that was not finished are cut off."""
    if not record.exists():
        if path.exists() and path.stat().st_size:
            raise ValueError(f"output: expected a new file or one begun by this command; {path} is neither")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        _save(record, settings, Progress())
        return Progress()
    found = json.loads(record.read_text(encoding="utf-8"))
    for name in sorted({*found["settings"], *settings}):
        before, now = found["settings"].get(name), settings.get(name)
        if before != now:
            raise ValueError(f"{name}: expected {before!r}, with which {path} was begun; got {now!r}")
    progress = Progress(**found["progress"])
    size = path.stat().st_size if path.exists() else 0
    if size < progress.size:
        raise ValueError(
            f"output: expected {path} to have at least {progress.size} bytes, as {record} says; got {size}"
        )
    os.truncate(path, progress.size)
    return progress


def _save(record: Path, settings: Mapping[str, Any], progress: Progress) -> None:
    content = {"settings": settings, "progress": dataclasses.asdict(progress)}
    write_atomically(record, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
