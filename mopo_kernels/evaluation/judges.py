"""Judges: what scores a response to a prompt, a higher score being better, and where they are loaded from."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mopo_kernels.evaluation.progress import progress_bar
from mopo_kernels.evaluation.prompts import Prompt, prompt_text

Judge = Callable[[str, str], float]


@runtime_checkable
class BatchJudge(Protocol):
    """A judge that can be given many responses at once."""

    def __call__(self, prompt: str, response: str) -> float:
        """The score of one response."""

    def score_batch(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The scores of responses, each to the prompt of its place: what a call gives for each."""


def load_judges(spec: str) -> dict[str, Judge]:
    """The judges a spec points to.

    spec: "package.module:ATTR", looked up among what is installed and then from the current folder, or
    "path/to/file.py:ATTR"; ATTR is a dict from objective to judge. What it imports may lie beside it. Raises ValueError
    where any part of that is missing or of another kind.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f'judges: expected "package.module:ATTR" or "path/to/file.py:ATTR"; got {spec!r}')
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    if not hasattr(module, attribute):
        raise ValueError(f"judges {spec!r}: {place} has no attribute {attribute!r}")
    judges = getattr(module, attribute)
    if not isinstance(judges, dict) or not judges:
        raise ValueError(
            f"judges {spec!r}: expected {attribute} to be a non-empty dict of name -> callable; got {judges!r}"
        )
    for name, judge in judges.items():
        if not isinstance(name, str) or not callable(judge):
            raise ValueError(f"judges {spec!r}: expected str -> callable; got {name!r}: {judge!r}")
        if not name.isprintable():
            raise ValueError(f"judges {spec!r}: expected names of printable characters; got {name!r}")
    return dict(judges)


@contextlib.contextmanager
def _import_from(folder: str) -> Iterator[None]:
    if folder in sys.path:
        yield
        return
    # Last, so that a file beside a judge never stands in for a module that is installed.
    sys.path.append(folder)
    try:
        yield
    finally:
        # The imported module may have changed sys.path itself, so the entry is found by value, not by place.
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"judges: no file {path}")
    spec = importlib.util.spec_from_file_location(f"_mopo_judges_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None  # both are always there for a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    with _import_from(str(path.resolve().parent)):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"judges: {path} failed to import: {type(error).__name__}: {error}") from error
    return module


def _module_by_name(name: str) -> Any:
    with _import_from(str(Path.cwd())):
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise ValueError(f"judges: module {name!r} failed to import: {type(error).__name__}: {error}") from error


def judge_responses(
    judges: Mapping[str, Judge],
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    *,
    progress: bool = True,
    description: str = "judging",
) -> dict[str, list[list[float]]]:
    """Score every response with every judge: objective -> [prompt][sample].

    Raises ValueError for a score that is not a finite number, naming judge and prompt, and for a `BatchJudge` that
    gives another number of scores.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"responses: expected a list for each of {len(prompts)} prompts; got {len(responses)}")
    asked = [prompt_text(prompt) for prompt, drawn in zip(prompts, responses, strict=True) for _ in drawn]
    answers = [response for drawn in responses for response in drawn]
    scores: dict[str, list[list[float]]] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task(description, total=len(answers) * len(judges))
        for name, judge in judges.items():
            if isinstance(judge, BatchJudge):
                values = judge.score_batch(asked, answers)
                if len(values) != len(answers):
                    raise ValueError(f"judge {name!r}: expected {len(answers)} scores; got {len(values)}")
                bar.advance(task, len(answers))
            else:
                values = []
                for text, response in zip(asked, answers, strict=True):
                    values.append(judge(text, response))
                    bar.advance(task)
            rest = iter(values)
            scores[name] = [[float(next(rest)) for _ in drawn] for drawn in responses]
            for index, row in enumerate(scores[name]):
                if not np.isfinite(row).all():
                    raise ValueError(f"judge {name!r}: expected finite scores; got {row} for prompts[{index}]")
    return scores
