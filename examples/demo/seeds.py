"""How often the demo would fail by chance: the margins of its claims over runs with several seeds.

    python examples/demo/seeds.py runs/demo-*/report.json --output examples/demo/results/seeds.json

A claim's margin is by how much it holds: what has to be above a number, minus that number. Over seeds margins vary with
training and sampling, not with the prompts, which are the same. The chance of failing is that of a normal variable with
their mean and standard deviation to be below 0; for the whole demo, at most the sum over the claims.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any


def margins(report: dict[str, Any]) -> dict[str, float]:
    """By how much each claim of a report holds, in win rate."""
    settings, rates, bounds = report["settings"], report["win_rates"], report["bounds"]
    thresholds: dict[str, float] = settings["thresholds"]
    primary = rates["constrained"]["win_rates"][settings["primary"]]
    return {
        **{f"kept: {name}": bounds["constrained"][name][0] - bound for name, bound in thresholds.items()},
        "gained": primary["low"] - 0.5,
        "needed": max(bound - bounds["unconstrained"][name][1] for name, bound in thresholds.items()),
        "worth": report["difference"]["low"],
    }


def summary(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Margins by claim over reports of one protocol, and the chances of failing.

    Raises:
        ValueError: fewer than two reports, or of more than one protocol, or two with the same seed.
    """
    if len(reports) < 2:
        raise ValueError(f"reports: expected at least 2; got {len(reports)}")
    if len({report["protocol"] for report in reports}) > 1:
        raise ValueError("reports: expected one protocol; got several")
    seeds = [report["settings"]["seed"] for report in reports]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"reports: expected a seed each; got {seeds}")
    rows = [margins(report) for report in reports]
    claims: dict[str, dict[str, Any]] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        chance = statistics.NormalDist(mean, deviation).cdf(0) if deviation else float(mean <= 0)
        claims[name] = {"margins": values, "mean": mean, "standard_deviation": deviation, "chance_of_failing": chance}
    return {
        "protocol": reports[0]["protocol"],
        "seeds": seeds,
        "failed": sum(not all(report["claims"].values()) for report in reports),
        "scales": [report["turned_down"]["scale"] for report in reports],
        "claims": claims,
        "chance_of_failing": min(1.0, sum(claim["chance_of_failing"] for claim in claims.values())),
        "commits": sorted({str(report["versions"]["commit"]) for report in reports}),
        "devices": sorted({report["settings"]["device"] for report in reports}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="report.json of runs that differ in the seed")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    try:
        found = summary([json.loads(file.read_text(encoding="utf-8")) for file in arguments.reports])
    except ValueError as error:
        parser.error(str(error))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, claim in found["claims"].items():
        print(
            f"{name}: margin {claim['mean']:+.3f}, standard deviation {claim['standard_deviation']:.3f}, least "
            f"{min(claim['margins']):+.3f}; fails by chance in {claim['chance_of_failing']:.1%}"
        )
    print(
        f"{found['failed']} of {len(found['seeds'])} runs failed; estimated chance, at most "
        f"{found['chance_of_failing']:.1%}"
    )


if __name__ == "__main__":
    main()
