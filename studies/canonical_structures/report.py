"""Tables and pictures of the study, made from its JSON and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.canonical_structures import figures
from studies.canonical_structures.baselines import SETTINGS, STRENGTHS, TOLD, TOLERANCE, VOLUME_POINTS, mean_interval
from studies.canonical_structures.estimators import BATCHES
from studies.canonical_structures.run import load
from studies.canonical_structures.sections import MANY_PAIRS
from studies.canonical_structures.structures import STRUCTURES

README = "README.md"
OVERVIEW = "overview.png"
# Policies of a front.
FRONT = SETTINGS * len(STRENGTHS)
# Policies that a method is searched in: those of both fronts, which share some.
POLICIES = FRONT + SETTINGS * (len(STRENGTHS) - 1)
Record = Mapping[str, Any]
Records = Mapping[str, Mapping[str, Record]]

METHODS = {
    "mopo": "MOPO",
    "one_shot": "one-shot dual",
    "sigmoid_dual": "sigmoid with dual",
    "multiplier_grid": "multiplier grid",
    "max_min": "max-min",
    "modpo": "MODPO",
    "scalarised_ipo": "scalarised IPO",
    "scalarised_dpo": "scalarised DPO",
    "soup_dpo": "soup of DPO",
}
# What methods are compared by: the name in rows, and in words.
MEASURES = {
    "hypervolume": "hypervolume",
    "volume": "hypervolume in all dimensions",
    "budget_hypervolume": "hypervolume at equal KL",
    "distance": "distance to the front",
}


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table: fixed digits, or powers of ten where those would show none; 0 where it is but rounding."""
    if value is None:
        return "-"
    if abs(value) < 1e-9:
        value = 0.0
    if value != 0 and abs(value) < 0.5 * 10.0**-digits:
        return f"{value:.0e}"
    return f"{value:.{digits}f}"


def interval(entry: Mapping[str, Any], key: str = "mean", digits: int = 3) -> str:
    """``mean [low, high]``, as one cell that is not broken."""
    # Adding 0 makes a negative zero positive.
    mean, low, high = (f"{round(entry[part], digits) + 0.0:.{digits}f}" for part in (key, "low", "high"))
    return f"{mean} [{low},&nbsp;{high}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others are numbers."""
    line = "|" + "---|" + "---:|" * (len(header) - 1)
    return [f"| {' | '.join(header)} |", line, *(f"| {' | '.join(row)} |" for row in rows), ""]


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return "".join(names) if len(names) < 2 else f"{', '.join(names[:-1])} and {names[-1]}"


def picture(record: Record, words: str) -> list[str]:
    """The picture that lies beside a record's JSON."""
    return [f"![{record['structure']}: {words}]({record['section']}/{record['structure']}.png)", ""]


# --- exact ------------------------------------------------------------------------------------------------------------


def exact_lines(record: Record) -> list[str]:
    """The setting of a structure and its exact solution."""
    optimum, thresholds = record["optimum"], record["thresholds"]
    rows = []
    for k, name in enumerate(record["objectives"]):
        bound = thresholds.get(str(k))
        role = "maximised" if k == record["primary"] else number(bound, 4)
        rows.append([name, role, number(optimum["value"][k], 4), number(optimum["multiplier"][k], 4)])
    return [
        f"{record['description']} {record['prompts']} prompts, {record['responses']} responses, tau {record['tau']:g}.",
        "",
        *table(["objective", "threshold", "win rate at the optimum", "multiplier"], rows),
        f"Optimum: win rate less tau KL {number(optimum['primal'], 6)}, KL {number(optimum['kl'], 4)} nats, "
        f"KKT residual {optimum['kkt_residual']:.0e}, duality gap {abs(optimum['gap']):.0e}.",
        "",
    ]


# --- baselines --------------------------------------------------------------------------------------------------------


def by_method(record: Record) -> dict[str, Record]:
    """Rows of the baselines by method, in the order of :data:`METHODS`."""
    rows = {row["method"]: row for row in record["rows"] if row["method"] != "exact"}
    return {method: rows[method] for method in METHODS if method in rows} | rows


def exact_row(record: Record) -> Record:
    """The row of the exact optima at MOPO's thresholds."""
    found: Record = next(row for row in record["rows"] if row["method"] == "exact")
    return found


def measures(record: Record) -> dict[str, str]:
    """What methods are compared by on a structure: with two objectives MOPO's plane has all dimensions."""
    rows = by_method(record).values()
    same = all(row["volume"] == row["hypervolume"] for row in rows)
    return {measure: words for measure, words in MEASURES.items() if not (same and measure == "volume")}


def standing(record: Record, measure: str) -> tuple[dict[str, Record], list[str]]:
    """Methods ahead of MOPO, with their paired difference to it, and those that cannot be told from it."""
    difference = {method: row["minus_mopo"][measure] for method, row in by_method(record).items() if method != "mopo"}
    ahead = {method: each for method, each in difference.items() if each["verdict"] == "better"}
    return ahead, [method for method, each in difference.items() if each["verdict"] == "no difference"]


def where_it_does_not_win(record: Record) -> str:
    """A paragraph: on which measure which methods do at least as well as MOPO."""
    sentences = []
    won = []
    for measure, words in measures(record).items():
        ahead, level = standing(record, measure)
        parts = []
        if ahead:
            better = [
                f"{METHODS[method]} ({difference['mean']:+.3f})"
                for method, difference in sorted(ahead.items(), key=lambda item: -abs(item[1]["mean"]))
            ]
            parts.append(f"{listed(better)} {'is' if len(better) == 1 else 'are'} ahead of it")
        if level:
            parts.append(f"{listed([METHODS[method] for method in level])} cannot be told from it")
        if parts:
            sentences.append(f"On {words} MOPO does not win: {'; '.join(parts)}.")
        else:
            won.append(words)
    if won:
        sentences.insert(0, f"MOPO is ahead of every other method on {listed(won)}.")
    rows = by_method(record)
    hits = {method: row["violation"]["count"] for method, row in rows.items()}
    runs = np.size(rows["mopo"]["slack"]["each"])
    fewer = [f"{METHODS[method]} ({hits[method]})" for method in hits if hits[method] < hits["mopo"]]
    rest = f"fewer by {listed(fewer)}" if fewer else "fewer by none"
    sentences.append(
        f"Thresholds missed by more than {TOLERANCE:g}: in {hits['mopo']} of {runs} runs by MOPO, {rest}; by however "
        f"little: in {rows['mopo']['missed']['count']}."
    )
    return " ".join(sentences)


def methods_table(record: Record) -> list[str]:
    """Every method on a structure by all measures."""
    rows = []
    shown = measures(record)
    for method, row in by_method(record).items():
        rows.append(
            [
                f"**{METHODS[method]}**" if method == "mopo" else METHODS[method],
                str(row["trained"]),
                *(interval(row[measure]) for measure in shown),
                interval(row["missed"], "rate", 2),
                interval(row["violation"], "rate", 2),
                interval(row["slack"]),
                interval(row["regret"]),
            ]
        )
    ideal = exact_row(record)
    # What exact optima at MOPO's thresholds cover: with infinite data MOPO would, and a finite grid covers no more.
    best = [number(ideal.get(measure)) for measure in shown]
    rows.append(["exact optima", "-", *best, "-", "-", "-", "-"])
    header = ["method", "policies trained", *shown.values()]
    return table([*header, "missed", f"missed by {TOLERANCE:g}", "worst slack", "regret"], rows)


def baseline_lines(record: Record) -> list[str]:
    """The comparison of methods on a structure, and that with more pairs folded away."""
    lines = [
        f"## Methods, {record['pairs']} pairs",
        "",
        *picture(record, "policies of every method over the exact front"),
        *methods_table(record),
        where_it_does_not_win(record),
        "",
    ]
    if many := record.get("many"):
        lines += [
            f"With {many['pairs']} pairs: {where_it_does_not_win(many)}",
            "",
            f"<details><summary>Methods, {many['pairs']} pairs</summary>",
            "",
            *methods_table(many),
            "</details>",
            "",
        ]
    return lines


def baseline_figure(record: Record, exact: Record, path: Path) -> Path:
    """The picture of a structure: every method's policies over the exact front."""
    rows = by_method(record)
    primary, objectives, held = exact["primary"], exact["objectives"], list(exact["thresholds"])
    attainable = [row for row in exact["rows"] if row["kind"] == "attainable"]
    return figures.plot_methods(
        path,
        title=exact["title"],
        across=f"{objectives[int(held[0])]}: win rate - threshold" if len(held) == 1 else "worst slack",
        up=f"{objectives[primary]}: win rate - {exact['tau']:g} KL",
        front=exact_row(record)["front"],
        attainable=[(row["worst_slack"], row["value"][primary]) for row in attainable],
        points={METHODS[m]: [(p["worst_slack"], p["primal"]) for p in row["picture"]] for m, row in rows.items()},
        taken={
            # The picture is of the first instance: others have other fronts.
            METHODS[m]: list(zip(row["slack"]["each"][0], row["primal"]["each"][0], strict=True))
            for m, row in rows.items()
        },
    )


# --- learning ---------------------------------------------------------------------------------------------------------

# A way of learning whose limit is further than this from the optimum is said to be biased.
BIASED = 0.005
GROUPS = ("estimators", "labels", "losses and pools", "policies and batches")


def way(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a row of the learning study was trained by, in words, and its group; the default has no group."""
    sampling = row["sampling"]
    kinds = {
        GROUPS[0]: [f"estimator {row['estimator']}"] if row["estimator"] != "snis" else [],
        GROUPS[1]: [
            *([f"{sampling['missing']:.0%} of labels missing"] if sampling["missing"] else []),
            *(["one objective a pair"] if sampling["one_objective"] else []),
            *([f"{sampling['label_noise']:.0%} of labels flipped"] if sampling["label_noise"] else []),
            *(["pairs of distinct responses"] if sampling["distinct"] else []),
        ],
        GROUPS[2]: [
            *([row["loss_type"]] if row["loss_type"] != "regression" else []),
            *([f"pools of {row['pool']}"] if row["pool"] > 2 else []),
        ],
        GROUPS[3]: [
            *([f"{row['policy']} policy"] if row["policy"] != "table" else []),
            *([f"batches of {row['batch']}"] if row["batch"] else []),
        ],
    }
    words = [each for some in kinds.values() for each in some]
    return ", ".join(words) or DEFAULT_WAY, next((group for group, some in kinds.items() if some), "")


DEFAULT_WAY = "regression, snis, table"


def by_way(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by way of learning, in the order they come in."""
    ways: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        ways.setdefault(way(row)[0], []).append(row)
    return ways


def by_count(rows: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Rows by the number of pairs."""
    counts: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        counts.setdefault(row["count"], []).append(row)
    return dict(sorted(counts.items()))


def averaged(rows: Sequence[Mapping[str, Any]], key: str, digits: int = 4) -> str:
    """Mean over data sets, with its interval where there are enough of them for one."""
    values = [row[key] for row in rows]
    if any(value is None for value in values):
        return "-"
    found = mean_interval(values)
    return interval(found, digits=digits) if len(values) >= 5 else number(found["mean"], digits)


def learning_lines(record: Record) -> list[str]:
    """Rates of convergence, and all errors folded away."""
    summary = {way(line)[0]: line for line in record["summary"]}
    rates, errors = [], []
    for name, line in summary.items():
        slope = "-"
        if line["slope"] is not None:
            spread = 1.96 * line["slope_deviation"] if line["slope_deviation"] is not None else None
            ends = {"mean": line["slope"]}
            ends |= {"low": line["slope"] - spread, "high": line["slope"] + spread} if spread is not None else {}
            slope = interval(ends, digits=2) if spread is not None else number(line["slope"], 2)
        rejected = "-" if line["rejected"] is None else f"{line['rejected'] * line['tested']:.0f} of {line['tested']}"
        rates.append([name, number(line["bias_tv"], 4), slope, "-0.50" if slope != "-" else "-", rejected])
    for name, rows in by_way(record["rows"]).items():
        for count, some in by_count(rows).items():
            errors.append(
                [
                    name,
                    str(count),
                    str(len(some)),
                    *(averaged(some, key) for key in ("tv", "kl", "slack", "gap", "tv_limit")),
                    number(some[0]["expected_tv"], 4),
                ]
            )
    header = ["trained by", "pairs", "data sets", "TV", "KL", "worst slack", "gap", "TV to the limit", "expected"]
    fronts = [[str(count), averaged(some, "hypervolume_ratio")] for count, some in by_count(record["fronts"]).items()]
    return [
        "## Learning from pairs",
        "",
        *picture(record, "error against the number of pairs"),
        learning_paragraph(record),
        "",
        *table(["trained by", "bias", "slope", "expected", "p < 0.01"], rates),
        "<details><summary>Errors by number of pairs</summary>",
        "",
        *table(header, errors),
        *table(["pairs", "hypervolume of learned points / exact"], fronts),
        "</details>",
        "",
    ]


def learning_paragraph(record: Record) -> str:
    """What the default way of learning reaches and which others are biased."""
    rows = by_count(by_way(record["rows"])[DEFAULT_WAY])
    most = max(rows)
    text = (
        f"Learned from {most} pairs ({DEFAULT_WAY}): total variation to the exact optimum {averaged(rows[most], 'tv')}"
    )
    text += f", worst slack {averaged(rows[most], 'slack')}."
    lines = [(way(line)[0], line["bias_tv"]) for line in record["summary"]]
    biased = [f"{name} ({bias:.3f})" for name, bias in lines if bias is not None and bias > BIASED]
    unknown = [name for name, bias in lines if bias is None]
    text += f" Biased, in total variation: {'; '.join(biased)}." if biased else " No way of learning is biased here."
    return text + (f" Without a limit that could be solved for: {'; '.join(unknown)}." if unknown else "")


def learning_panels(record: Record) -> dict[str, list[figures.Curve]]:
    """Groups of curves for :func:`figures.plot_rates`, the default way of learning in each."""
    panels: dict[str, list[figures.Curve]] = {}
    default = None
    for name, rows in by_way(record["rows"]).items():
        counts = by_count(rows)
        errors = {count: [row["tv"] for row in some] for count, some in counts.items()}
        expected = [(count, some[0]["expected_tv"]) for count, some in counts.items()] if name == DEFAULT_WAY else []
        bias = rows[0]["bias_tv"]
        curve = figures.Curve(
            name,
            [(count, sum(each) / len(each), min(each), max(each)) for count, each in errors.items()],
            [point for point in expected if point[1] is not None],
            bias if bias is not None and bias > BIASED else None,
        )
        if name == DEFAULT_WAY:
            default = curve
        else:
            panels.setdefault(way(rows[0])[1], []).append(curve)
    first = [] if default is None else [default]
    return {group: [*first, *panels[group]] for group in GROUPS if group in panels}


# --- ablations --------------------------------------------------------------------------------------------------------

ABLATIONS = {
    "tau": "tau",
    "reference": "lagged reference: beta, t0",
    "dual_step": "dual step",
    "noise": "labels flipped",
    "robustness": "robustness: radius (exact)",
}
# What a learned row is shown by: the key in rows, and in words.
ABLATION_MEASURES = {
    "slack": "worst slack",
    "primary": "primary win rate",
    "kl": "KL, nats",
    "distance": "distance to exact",
}


# Beside settings under which a threshold is missed on average: what the primary has there is no achievement.
LOST = "†"


def setting_label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def ablation_table(record: Record, ablation: str) -> list[str]:
    """One ablation's rows on a structure."""
    some = [row for row in record["rows"] if row["ablation"] == ablation]
    names = list(some[0]["setting"])
    rows = []
    for row in some:
        setting = [setting_label(row["setting"][name]) for name in names]
        if row.get("lost"):
            setting[0] += f" {LOST}"
        if ablation == "robustness":
            worth = [number(row["reference_slack"]), number(row["best_slack"]), number(row["price"])]
            rows.append([*setting, "yes" if row["feasible"] else "no", *worth, number(row["largest_radius"], 4)])
            continue
        exact = row["exact"] or {}
        slack = f"short by {exact['infeasible_by']:.3f}" if "infeasible_by" in exact else number(exact.get("slack"))
        learned = [interval(row[key]) if row[key] else "-" for key in ABLATION_MEASURES]
        rows.append([*setting, *learned, slack])
    if ablation == "robustness":
        header = ["can be met", "slack of the reference", "best slack", "price", "largest radius"]
    else:
        header = [*ABLATION_MEASURES.values(), "exact worst slack"]
    return [f"{ABLATIONS[ablation][0].upper()}{ABLATIONS[ablation][1:]}:", "", *table([*names, *header], rows)]


def ablation_lines(record: Record) -> list[str]:
    """All ablations on a structure, folded away."""
    lines = [f"## Ablations, {record['pairs']} pairs", "", *picture(record, "small multiples of the ablations")]
    lost = sum(bool(row.get("lost")) for row in record["rows"])
    lines += [
        f"{LOST} (hollow in the picture): the constraint is lost, on average a threshold is missed by more than "
        f"{TOLERANCE:g}; {lost} settings.",
        "",
    ]
    lines += ["<details><summary>Tables</summary>", ""]
    for ablation in ABLATIONS:
        lines += ablation_table(record, ablation)
    return [*lines, "</details>", ""]


def ablation_panels(record: Record, primary: int) -> dict[str, dict[str, figures.Series]]:
    """Measure -> ablation -> curves for :func:`studies.canonical_structures.figures.plot_multiples`."""
    panels: dict[str, dict[str, figures.Series]] = {words: {} for words in ABLATION_MEASURES.values()}
    for row in record["rows"]:
        ablation, setting = row["ablation"], dict(row["setting"])
        if ablation == "robustness":
            curve, value = f"robust, {setting['problem']}", setting["radius"]
            exact = {"primary": row["value"][primary], "kl": row["kl"]} if row["feasible"] else {}
            found = {key: figures.Dot(setting_label(value), *(exact.get(key),) * 3) for key in ("primary", "kl")}
        else:
            lagged = setting.get("t0", "never") != "never"
            curve = f"t0 {setting['t0']}" if lagged else "learned"
            value = setting["beta"] if lagged else next(iter(setting.values()))
            found = {
                key: figures.Dot(setting_label(value), row[key]["mean"], row[key]["low"], row[key]["high"], row["lost"])
                for key in ABLATION_MEASURES
                if row[key] is not None
            }
            solved = (row["exact"] or {}).get
            for key, entry in (("slack", solved("slack")), ("kl", solved("kl")), ("distance", None)):
                if entry is not None and not lagged:
                    points = panels[ABLATION_MEASURES[key]].setdefault(ABLATIONS[ablation], {})
                    points.setdefault("exact", []).append(figures.Dot(setting_label(value), entry, entry, entry))
        for key, dot in found.items():
            panel = panels[ABLATION_MEASURES[key]].setdefault(ABLATIONS[ablation], {})
            panel.setdefault(curve, []).append(dot)
    return panels


HOW_TO_READ = f"""
## How to read this

Every structure is a finite problem whose exact solution is known; `studies/canonical_structures` makes them, three
random instances of each, and all that follows. All policies are trained by the library's own loss and multiplier step.
Square brackets hold 95% intervals over data sets, Student's for means, Wilson's for rates; instances count alike and
their differences are no noise. There are many comparisons: of those where there is no difference, one in twenty will be
said to have one. Pages of the structures, which the table links to, have every method, way of learning and ablation.

**Exact.** The optimum of the constrained problem, its multipliers, and how well the conditions for an optimum hold; of
the first instance, as are all of "learning", the pictures of methods and robustness.

**Learning.** Distance of what is learned from finite labels to the exact optimum, against the number of pairs. "Bias"
is the total variation between the optimum and what training tends to with infinitely many labels (dashed lines in the
pictures), for the losses and estimators that aim elsewhere; "slope" is that of log error against log pairs, error
measured from that limit. "Expected" error and the p-values (of the learned policy and multipliers, from 100000 pairs
on) are by the delta method. The slack is of the threshold that is kept worst, the gap is what the optimum has more of
the maximised quantity. Bars in the pictures go from the least to the largest of the data sets.

**Methods.** All train the same policy class on the same pairs from the same reference. A front has {FRONT} policies,
whatever the method: all at the structure's own tau, or a third of them at each of three strengths of the KL term,
whichever does better on a measure (chosen with hindsight, for all methods alike); "policies trained" is what the front
costs that is best by hypervolume. DPO and IPO on one objective are corners of the scalarised grids and soups of IPO
are scalarised IPO to rounding, so none of these is a method here. One-shot dual and sigmoid with dual are told
thresholds, as MOPO is. In the pictures a point is a policy by its exact win rates. Across: the worst slack, the least
win rate less threshold. Up: the primary's win rate less tau KL, which is what is to be maximised.

* Hypervolume: of these points, as a share of the exact front's; the plane is the one that MOPO's thresholds move in.
  In all dimensions: of the primary's win rate less tau KL and every other win rate, no threshold in it, as a share of
  what {VOLUME_POINTS} exact optima cover (half of the threshold vectors that MOPO is given move all of them together,
  half point in all directions); with two objectives it is the same. At equal KL: by the win rate alone, of
  policies whose KL is at most a budget, so that tau plays no part. Distance to the front: the mean distance by which
  points of the exact front, in all objectives, are missed; less is better. "Exact optima" are those at MOPO's
  thresholds: what it would have with infinite data.
* Missed: how often the one policy that a user of the method would take (crosses in the pictures) misses some threshold,
  by however little and by more than {TOLERANCE:g}. Methods that are told thresholds are trained for these; of all
  others' policies it is the best of those that measure as keeping them. Worst slack and regret (what the exact optimum
  has more of the maximised quantity; negative only for policies that miss a threshold) are of the same policy.
* "Ahead" and "cannot be told from" are by the interval of the paired difference to MOPO.

**Ablations.** One setting at a time away from the default. "Exact" is the solution of the problem that the setting
makes, the distance is the total variation to it. With a lagged reference, each t0 steps the reference becomes the
policy as it was and thresholds become beta times what it attained. Robustness is exact: the radius of the KL ball, in
nats.
"""

# --- the whole --------------------------------------------------------------------------------------------------------


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def spread(values: Iterable[float], digits: int = 3) -> str:
    """``least to largest``, or one number where the digits show no difference."""
    least, *_, largest = (f"{round(value, digits) + 0.0:.{digits}f}" for value in sorted([*values] * 2))
    return least if least == largest else f"{least} to {largest}"


def binding(records: Records) -> list[str]:
    """Structures on which some threshold binds at the optimum."""
    return [
        name
        for name, record in records["exact"].items()
        if any(m > 1e-6 for k, m in enumerate(record["optimum"]["multiplier"]) if k != record["primary"])
    ]


def many_pairs(baselines: Mapping[str, Record]) -> dict[str, Record]:
    """The comparison with more pairs, of structures that have it."""
    return {name: record["many"] for name, record in baselines.items() if "many" in record}


def learning_sentence(records: Records) -> str:
    lines = {
        name: next(line for line in record["summary"] if way(line)[0] == DEFAULT_WAY)
        for name, record in records["learning"].items()
    }
    exact = {name: line for name, line in lines.items() if line["bias_tv"] < BIASED}
    far = {name: line["tv"][-1] for name, line in lines.items() if name not in exact}
    (most,) = {line["counts"][-1] for line in lines.values()}
    other = "".join(f", {value:.3f} on {name}, where importance weights are biased" for name, value in far.items())
    slopes = [line["slope"] for line in lines.values() if line["slope"] is not None]
    falls = f"; log error falls by {spread(slopes, 2)} per log pairs, where -0.5 is expected" if slopes else ""
    return (
        f"**It reaches the optimum**: from {most:,} pairs policies are within a total variation of "
        f"{spread([line['tv'][-1] for line in exact.values()])} of it on {len(exact)} of {len(lines)} structures "
        f"(theory "
        f"expects {spread([line['expected_tv'][-1] for line in exact.values()])}){other}{falls}."
    )


def covers(baselines: Mapping[str, Record], method: str, measure: str) -> float:
    """Mean over structures."""
    return _mean(by_method(record)[method][measure]["mean"] for record in baselines.values())


def ahead_on(baselines: Mapping[str, Record], measure: str) -> int:
    """Instances on which some method is ahead of MOPO."""
    total = 0
    for record in baselines.values():
        verdicts = [row["minus_mopo"][measure]["verdicts"] for m, row in by_method(record).items() if m != "mopo"]
        total += sum("better" in same for same in zip(*verdicts, strict=True))
    return total


def front_sentence(records: Records) -> str:
    few = records["baselines"]
    (pairs,) = {record["pairs"] for record in few.values()}
    parts, leads = [], []
    for measure, words in (
        ("hypervolume", "of the exact front in the plane of its thresholds"),
        ("volume", "in all dimensions where there are more than two"),
    ):
        some = {name: record for name, record in few.items() if measure in measures(record)}
        if not some:
            continue
        others = {method: covers(some, method, measure) for method in METHODS if method != "mopo"}
        best = max(others, key=others.__getitem__)
        leads.append(covers(some, "mopo", measure) >= others[best])
        parts.append(
            f"{covers(some, 'mopo', measure):.3f} {words} (the best other, {METHODS[best]}, {others[best]:.3f}; some "
            f"other is ahead on {ahead_on(some, measure)} of {sum(record['instances'] for record in some.values())} "
            "instances)"
        )
    where = "covers most" if all(leads) else "covers most where its thresholds lie, not everywhere"
    return (
        f"**Its front {where if leads[0] else 'is not the best'}**: {FRONT} policies trained on {pairs:,} pairs cover, "
        f"in "
        f"the mean over structures, {' and '.join(parts)}."
    )


def regret_sentence(records: Records) -> str:
    """What being told the thresholds is worth."""
    few = {name: record for name, record in records["baselines"].items() if name in binding(records)}

    def regret(method: str) -> float:
        return _mean(by_method(record)[method]["regret"]["mean"] for record in few.values())

    told = {method: regret(method) for method in METHODS if method in TOLD}
    searched = [regret(method) for method in METHODS if method not in TOLD]
    return (
        "**To be told the thresholds is what counts**: for given ones the policy taken has "
        f"{_join(told)} less of the maximised quantity than the exact optimum, and the best of {POLICIES} policies "
        f"where "
        f"one has to be searched for {spread(searched)} less."
    )


def _join(values: Mapping[str, float]) -> str:
    return listed([f"{value:.4f} ({METHODS[method]})" for method, value in values.items()])


def missed_share(records: Mapping[str, Record], method: str, key: str) -> str:
    """How often a method's policy misses a threshold, over all structures, instances and data sets."""
    rows = [by_method(record)[method] for record in records.values()]
    return f"{100 * sum(row[key]['count'] for row in rows) / sum(np.size(row['slack']['each']) for row in rows):.0f} %"


def missed_sentence(records: Records) -> str:
    names = binding(records)
    few = {name: record for name, record in records["baselines"].items() if name in names}
    slack = {name: by_method(record)["mopo"]["slack"]["mean"] for name, record in few.items()}
    parts = []
    for some in (few, many_pairs(few)):
        if some:
            (pairs,) = {record["pairs"] for record in some.values()}
            missed, far = (missed_share(some, "mopo", key) for key in ("missed", "violation"))
            parts.append(f"{missed} of runs with {pairs:,} pairs miss one, {far} by more than {TOLERANCE:g}")
    return (
        f"**Thresholds are aimed at, not guaranteed**: on the {len(slack)} structures where one binds "
        f"{'; '.join(parts)}; "
        f"the mean worst slack, {spread(slack.values())}, is negative on {sum(s < 0 for s in slack.values())} of "
        f"these, so "
        "train for a higher threshold where it must hold, and measure on held-out prompts."
    )


def _by_estimator(records: Records, estimator: str) -> list[Record]:
    rows = [row for record in records["estimators"].values() for row in record["rows"]]
    return [row for row in rows if row["estimator"] == estimator]


def _solved(rows: Iterable[Record]) -> list[Record]:
    """Of rows whose limit could be solved for."""
    return [row for row in rows if row["residual"] < 1e-6]


def estimator_sentence(records: Records) -> str:
    own = [row["bias_tv"] for row in _by_estimator(records, "snis") if row["structure"] != SHIFTED]
    pair = [row["bias_tv"] for row in _solved(_by_estimator(records, "pair"))]
    return (
        "**What the multipliers listen to decides what is held**: with `snis` training tends to the exact optimum "
        "(total "
        f"variation {max(own):.2f} where the reference wrote the data), with `pair`, at the same thresholds, to a "
        f"policy "
        f"up to {max(pair):.2f} away."
    )


SHIFTED = "shifted_reference"
SENTENCES: tuple[tuple[tuple[str, ...], Callable[[Records], str]], ...] = (
    (("learning",), learning_sentence),
    (("baselines",), front_sentence),
    (("baselines", "exact"), regret_sentence),
    (("baselines", "exact"), missed_sentence),
    (("estimators",), estimator_sentence),
)


def sentences(records: Records) -> list[str]:
    """What the study found, in five sentences, of the sections that there are."""
    return [make(records) for needed, make in SENTENCES if all(records.get(section) for section in needed)]


def summary_lines(records: Records) -> list[str]:
    """One row a structure: MOPO, the best other method, who is ahead, and thresholds missed."""
    baselines = records.get("baselines", {})
    if not baselines:
        return []
    rows = []
    for name in ordered(baselines):
        methods = by_method(baselines[name])
        others = {method: row for method, row in methods.items() if method != "mopo"}
        cells = []
        for measure in ("hypervolume", "volume"):
            if measure not in measures(baselines[name]):
                cells.append("the same")
                continue
            mean = {method: float(row[measure]["mean"]) for method, row in others.items()}
            best = max(mean, key=mean.__getitem__)
            ours = interval(methods["mopo"][measure])
            lead = others[best]["minus_mopo"][measure]["verdict"] == "better"
            cells.append(f"{ours}; {METHODS[best]} {interval(others[best][measure])}{', ahead' if lead else ''}")
        ahead = standing(baselines[name], "hypervolume")[0]
        many = by_method(baselines[name]["many"])["mopo"] if "many" in baselines[name] else None
        rows.append(
            [
                f"[{title(records, name)}]({name}.md)",
                *cells,
                listed([METHODS[method] for method in ahead]) if ahead else "none",
                interval(methods["mopo"]["slack"]),
                *(f"{methods['mopo'][key]['rate']:.2f}" for key in ("missed", "violation")),
                *(f"{many[key]['rate']:.2f}" if many else "-" for key in ("missed", "violation")),
            ]
        )
    header = ["structure", "hypervolume: MOPO; best other", "in all dimensions", "ahead of MOPO", "MOPO's worst slack"]
    for pairs in ("", f", {MANY_PAIRS} pairs"):
        header += [f"missed{pairs}", f"missed by {TOLERANCE:g}{pairs}"]
    return ["## All structures", "", *table(header, rows)]


def estimator_lines(records: Records) -> list[str]:
    """Which estimator tends where, how noisy it is, and when to use which."""
    estimators = records.get("estimators", {})
    if not estimators:
        return []
    rows = []
    for name in ordered(estimators):
        by: dict[str, list[Record]] = {}
        for row in _solved(estimators[name]["rows"]):
            by.setdefault(row["estimator"], []).append(row)
        cells = [
            spread([row["bias_tv"] for row in by[kind]]) if kind in by else "-"
            for kind in ("snis", "pair", "closed_form")
        ]
        cells.append(spread([row["slack"] for row in by["pair"]]) if "pair" in by else "-")
        for size in (str(BATCHES[0]), str(BATCHES[-1])):
            noise = [
                [row["noise"][size] for row in by.get(kind, []) if row["noise"][size]] for kind in ("snis", "pair")
            ]
            cells.append(
                " / ".join(f"{_mean(each['deviation'] for each in some):.3f}" if some else "-" for some in noise)
            )
        rows.append([title(records, name), *cells])
    header = ["structure", "bias, snis", "bias, pair", "bias, closed_form", "pair: worst slack in win rates"]
    header += [f"noise of {size} pairs, snis / pair" for size in (BATCHES[0], BATCHES[-1])]
    return ["## Which estimator", "", estimator_paragraph(records), "", *table(header, rows)]


def estimator_paragraph(records: Records) -> str:
    """When to use which, by the figures of the table below it."""
    snis, pair = _by_estimator(records, "snis"), _solved(_by_estimator(records, "pair"))
    own = [row["bias_tv"] for row in snis if row["structure"] != SHIFTED]
    shifted = [[row["bias_tv"] for row in rows if row["structure"] == SHIFTED] for rows in (snis, pair)]
    lowest, *_, highest = sorted((row for row in pair if row["binding"]), key=lambda row: float(row["slack"]))
    size = str(BATCHES[0])
    noisy = {
        kind: {
            (row["structure"], row["instance"]): float(row["noise"][size]["deviation"])
            for row in rows
            if row["noise"][size]
        }
        for kind, rows in (("snis", snis), ("pair", pair))
    }
    times = {at: noisy["snis"][at] / noisy["pair"][at] for at in noisy["snis"] if at in noisy["pair"]}
    worst = max(times, key=times.__getitem__)
    text = (
        "**Use `snis`** wherever a threshold is a promise in win rates: where the reference wrote the responses its "
        "limit "
        f"is the exact optimum (bias {max(own):.3f} at most). At the same thresholds `pair` is biased by "
        f"{spread([row['bias_tv'] for row in pair])}: its policy misses a threshold by "
        f"{max(0.0, -lowest['slack']):.3f} in "
        f"win rates ({title(records, lowest['structure'])}), or keeps it with {highest['slack']:.3f} to spare, paid "
        f"for "
        f"by the primary ({title(records, highest['structure'])}). "
    )
    if all(shifted):
        text += (
            "Where another policy than the reference wrote the responses neither is exact: "
            f"`snis` is off by {spread(shifted[0])}, `pair` by {spread(shifted[1])}. "
        )
    text += (
        "Nor is `pair` the steadier one in general: at the optimum a batch of "
        f"{size} pairs is {spread(times.values(), 1)} times as noisy with `snis`, the most on "
        f"{title(records, worst[0])} ({noisy['snis'][worst]:.3f} against {noisy['pair'][worst]:.3f}). **Use `pair`**, "
        f"with "
        "thresholds on its own scale (`mopo pareto` prints them), where importance weights have collapsed: few "
        "responses "
        "carry a dual step (a small effective sample size), as after a policy has gone far from its reference. "
    )
    if closed := _solved(_by_estimator(records, "closed_form")):
        text += (
            f"`closed_form` never looks at the policy and is biased by {spread([row['bias_tv'] for row in closed])}: "
            "leave it to soft labels and large pools. "
        )
    return (
        text + "Bias is in total variation; noise is the standard deviation of one batch's measurement, in win rates."
    )


def ordered(records: Collection[str]) -> list[str]:
    """Names of structures in the order of :data:`studies.canonical_structures.structures.STRUCTURES`."""
    return [name for name in STRUCTURES if name in records]


def title(records: Records, name: str) -> str:
    exact = records.get("exact", {}).get(name)
    return str(exact["title"]) if exact else name


def origin_lines(records: Records) -> list[str]:
    """How the results were made."""
    every = [record for section in records.values() for record in section.values()]
    rows = []
    for section, parts in records.items():
        some = list(parts.values())
        # Sections that have one instance of a structure take all seeds, others fewer of each.
        sets = sorted({(record.get("instances", 1), record.get("data_sets", len(record["seeds"]))) for record in some})
        rows.append(
            [
                section,
                str(len(some)),
                ", ".join(str(instances) for instances, _ in sets),
                "-" if section == "exact" else ", ".join(str(count) for _, count in sets),
                ", ".join(sorted({record["commit"] for record in some})),
                f"{sum(record['seconds'] for record in some) / 60:.1f}",
            ]
        )
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in every})
    commands = listed(sorted({f"`{record['command']}`" for record in every}))
    header = ["section", "structures", "instances of each", "data sets of each", "commit", "minutes of one core"]
    lines = [
        "## How it was made",
        "",
        f"By {commands}, one thread a part, on a machine that others used too; {'; '.join(versions)}.",
        "The same seeds give the same numbers, whatever the number of parts at once.",
        "",
        *table(header, rows),
    ]
    if any(record["fast"] for record in every):
        lines = ["**Made with --fast: sizes too small to conclude anything from.**", "", *lines]
    return lines


Lines = Callable[[Record], list[str]]
PER_STRUCTURE: dict[str, Lines] = {
    "exact": exact_lines,
    "learning": learning_lines,
    "baselines": baseline_lines,
    "ablations": ablation_lines,
}


def render(records: Records) -> str:
    """README.md of a folder of results: five sentences and a picture, then tables."""
    lines = ["# Results", "", *(f"{number}. {text}" for number, text in enumerate(sentences(records), 1)), ""]
    if records.get("baselines"):
        lines += [f"![what each method covers, loses and misses, a dot a structure]({OVERVIEW})", ""]
    lines += [*summary_lines(records), *estimator_lines(records), *HOW_TO_READ.splitlines()[1:], ""]
    lines += ["How these methods relate to published ones: [docs/related_work.md](../../../docs/related_work.md).", ""]
    return "\n".join([*lines, *origin_lines(records)]).rstrip() + "\n"


def render_structure(records: Records, name: str) -> str:
    """The page of a structure."""
    lines = [f"# {title(records, name)}", "", "How to read this: [README.md](README.md#how-to-read-this).", ""]
    for section, make in PER_STRUCTURE.items():
        if name in records.get(section, {}):
            lines += make(records[section][name])
    return "\n".join(lines).rstrip() + "\n"


def pages(records: Records) -> dict[str, str]:
    """Every Markdown file of a folder of results, by name."""
    names = {name for section in records.values() for name in section}
    return {README: render(records), **{f"{name}.md": render_structure(records, name) for name in ordered(names)}}


def overview(baselines: Mapping[str, Record]) -> dict[str, dict[str, list[float]]]:
    """Panel -> method -> a value for each structure, for :func:`studies.canonical_structures.figures.plot_overview`."""
    rows = {name: by_method(record) for name, record in baselines.items()}
    several = [name for name, record in baselines.items() if "volume" in measures(record)]
    panels = {
        "share of the exact front\nin MOPO's plane": (list(rows), "hypervolume", "mean"),
        "in all dimensions\n(three objectives and more)": (several, "volume", "mean"),
        "regret of the\npolicy taken": (list(rows), "regret", "mean"),
        f"share of runs that miss a\nthreshold by more than {TOLERANCE:g}": (list(rows), "violation", "rate"),
    }
    return {
        words: {title: [rows[name][method][key][entry] for name in names] for method, title in METHODS.items()}
        for words, (names, key, entry) in panels.items()
        if names
    }


def write(folder: Path) -> list[Path]:
    """Make all pages and pictures from the JSON in a folder, if there is any; returns what was made."""
    records = load(folder)
    if not records:
        return []
    written = []
    exact, learning = records.get("exact", {}), records.get("learning", {})
    baselines, ablations = records.get("baselines", {}), records.get("ablations", {})
    for name in ordered(exact):
        if name in learning:
            path = folder / "learning" / f"{name}.png"
            panels = learning_panels(learning[name])
            written.append(figures.plot_rates(path, title=exact[name]["title"], panels=panels))
        if name in baselines:
            written.append(baseline_figure(baselines[name], exact[name], folder / "baselines" / f"{name}.png"))
        if name in ablations:
            path = folder / "ablations" / f"{name}.png"
            multiples = ablation_panels(ablations[name], exact[name]["primary"])
            written.append(figures.plot_multiples(path, title=exact[name]["title"], panels=multiples))
    if baselines:
        written.append(figures.plot_overview(folder / OVERVIEW, panels=overview(baselines)))
    for name, text in pages(records).items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
