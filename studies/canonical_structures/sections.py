"""What each section of the study runs for a structure, and how large."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from studies.canonical_structures.ablations import STRUCTURES as ABLATED
from studies.canonical_structures.ablations import ablate
from studies.canonical_structures.baselines import compare
from studies.canonical_structures.estimators import study_estimators
from studies.canonical_structures.exact import solve_structure
from studies.canonical_structures.learning import study_structure
from studies.canonical_structures.run import Part, Progress
from studies.canonical_structures.structures import STRUCTURES, Structure, make

PAIRS = 5_000
# Of the methods once more: with few pairs it is noise in the labels that tells them apart.
MANY_PAIRS = 20_000
FAST_PAIRS = 1_000
# Random instances of every structure. Where there are several, each has half as many data sets.
INSTANCES = 3
FAST_INSTANCES = 2
FAST_STRUCTURES = ("bradley_terry_opposed", "condorcet_across", "restricted_class")


def _exact(part: Part, progress: Progress) -> dict[str, Any]:
    return solve_structure(part.structure, points=13 if part.fast else 41, progress=progress)


def _learning(part: Part, progress: Progress) -> dict[str, Any]:
    record = study_structure(make(part.structure), range(part.seeds), fast=part.fast, progress=progress)
    for row in record["rows"]:
        # The same seeds give the same numbers; how long it took is not one of them.
        del row["seconds"]
    return record


def _instances(part: Part) -> list[Structure]:
    return [make(part.structure, number) for number in range(FAST_INSTANCES if part.fast else INSTANCES)]


def _halved(part: Part) -> range:
    return range(max(2, part.seeds // 2))


def _estimators(part: Part, progress: Progress) -> dict[str, Any]:
    sizes: dict[str, Any] = {"counts": (1_000,), "draws": 10} if part.fast else {}
    instances, seeds = _instances(part), range(2 if part.fast else 3)
    rows = study_estimators(instances, seeds, progress=progress, **sizes)
    return {"instances": len(instances), "data_sets": len(seeds), "rows": rows}


def _baselines(part: Part, progress: Progress) -> dict[str, Any]:
    instances, seeds = _instances(part), _halved(part)
    pairs = FAST_PAIRS if part.fast else PAIRS
    sizes = {"settings": 2, "steps": 30} if part.fast else {}
    rows = compare(instances, pairs, seeds, progress=progress, **sizes)
    record: dict[str, Any] = {"instances": len(instances), "data_sets": len(seeds), "pairs": pairs, "rows": rows}
    if not part.fast:
        many = compare(instances, MANY_PAIRS, seeds, progress=progress)
        for row in many:
            # Of these there is no picture.
            row.pop("picture", None)
        record["many"] = {**record, "pairs": MANY_PAIRS, "rows": many}
    return record


def _ablations(part: Part, progress: Progress) -> dict[str, Any]:
    instances, seeds = _instances(part), _halved(part)
    pairs = FAST_PAIRS if part.fast else PAIRS
    sizes = {"steps": 50} if part.fast else {}
    rows = ablate(instances, seeds, count=pairs, progress=progress, **sizes)
    return {"instances": len(instances), "data_sets": len(seeds), "pairs": pairs, "rows": rows}


SECTIONS: dict[str, Callable[[Part, Progress], dict[str, Any]]] = {
    "exact": _exact,
    "estimators": _estimators,
    "learning": _learning,
    "baselines": _baselines,
    "ablations": _ablations,
}


def structures_of(section: str, names: Iterable[str] = STRUCTURES) -> list[str]:
    """Those of ``names`` that a section covers: all, but the ablations only some."""
    return [name for name in names if section != "ablations" or name in ABLATED]


def study(part: Part, progress: Progress) -> dict[str, Any]:
    """Run a part; see :func:`studies.canonical_structures.run.run_parts`."""
    return SECTIONS[part.section](part, progress)
