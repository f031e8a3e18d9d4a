"""The figures of README.md and of the pages in docs, made from bench/results and examples/demo/results.

python -m bench.tables            # rewrites what is between marks in these documents
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DEMO = ROOT / "examples" / "demo" / "results"
OWN, OURS, GPU, PLAIN = "mopo_kernels", "mopo_kernels cpp", "mopo_kernels triton", "plain PyTorch, scored rows"
# Other shapes than the first table's: title, files with the head trained and frozen.
SHAPES = {
    "H 2048, V 51200, fp32": ("head_v51200_cpu.json", "head_v51200_frozen_cpu.json"),
    "H 2048, V 128256, fp32": ("head_v128256_cpu.json", "head_v128256_frozen_cpu.json"),
    "H 1024, V 50304, bf16": ("head_bf16_cpu.json", "head_bf16_frozen_cpu.json"),
}


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


def demo() -> str:
    """What the demo measured on its test prompts."""
    file = DEMO / "report.json"
    if not file.is_file():
        return (
            "`make demo` prints the table. It has not been run in full under this protocol yet: whether its claims "
            "hold is not known.\n"
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    settings, rates, ahead = record["settings"], record["win_rates"], record["difference"]
    thresholds, scale = settings["thresholds"], record["turned_down"]["scale"]
    (prompts,) = {rate["prompts"] for rate in rates["constrained"]["win_rates"].values()}
    samples, precision = settings["samples"], "bf16" if settings["bfloat16"] else "fp32"
    text = [
        f"Win rates over the base model, {prompts} prompts with {samples} answers, 95% intervals by prompt; "
        f"seed {settings['seed']}, trained in {precision}, "
        f"commit {record['versions']['commit']} ([report](../examples/demo/results/report.json)). On another processor "
        "the samples, and so the figures, differ a little:\n\n",
        f"| objective | | with thresholds | without | without, adapter x {scale:g} |\n|---|---|---|---|---|\n",
    ]
    held = rates["constrained"]["win_rates"]
    for name in sorted(held, key=lambda name: (name != settings["primary"], name not in thresholds)):
        role = "maximised" if name == settings["primary"] else "watched"
        role = f"held at {thresholds[name]:.2f}" if name in thresholds else role
        cells = [rates[policy]["win_rates"][name] for policy in ("constrained", "unconstrained", "turned_down")]
        shown = " | ".join(f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" for cell in cells)
        text.append(f"| {name} | {role} | {shown} |\n")
    looked_at = record["turned_down"]["win_rates_on_validation"]
    tried = "; ".join(
        f"x {other}: {', '.join(f'{name} {rates[name]:.3f}' for name in (settings['primary'], *thresholds))}"
        for other, rates in sorted(looked_at.items())
    )
    nothing = f"On validation prompts no scale of it kept both ({tried}), so that it is the base model. "
    nothing = nothing if scale == 0 else ""
    lowest = ", ".join(f"`{name}` at least {record['bounds']['constrained'][name][0]:.3f}" for name in thresholds)
    text.append(
        f"\nWith thresholds {lowest} (one-sided 95%), and `{ahead['objective']}` ahead of the adapter turned down by "
        f"{ahead['mean']:.3f} [{ahead['low']:.3f}, {ahead['high']:.3f}]. {nothing}{_seeds()}\n\n"
        "![Win rates of the policies]"
        f"(../examples/demo/results/plane_{settings['primary']}_{next(iter(thresholds))}.png)\n"
    )
    return "".join(text)


def _seeds() -> str:
    """How often the demo fails by chance."""
    file = DEMO / "seeds.json"
    if not file.is_file():
        return "It is one run: how often a claim fails by chance was not estimated yet."
    record = json.loads(file.read_text(encoding="utf-8"))
    devices = " and ".join({"cuda": "a GPU", "cpu": "a CPU"}[device] for device in record["devices"])
    return (
        f"Of {len(record['seeds'])} runs with seeds of their own on {devices}, {record['failed']} failed; by the "
        f"spread of their margins a run fails by chance in at most {100 * record['chance_of_failing']:.1f}% of cases "
        "([margins](../examples/demo/results/seeds.json))."
    )


def rows(
    trained: dict[str, Any], frozen: dict[str, Any], label: str = "", names: Sequence[str] | None = None
) -> list[str]:
    """A table row for each implementation, or for those named: ratios and peaks with the head trained and frozen."""
    lines = []
    for name in names or trained["results"]:
        row, other = trained["results"][name], frozen["results"][name]
        title = name if row["loss"] in ("regression", "none") else f"{name} ({row['loss']})"
        lines.append(
            f"| {label}{title} | {row['ratio']:.2f} | {other['ratio']:.2f} "
            f"| {row['peak_mib']:.0f} MiB | {other['peak_mib']:.0f} MiB |\n"
        )
    return lines


def performance() -> str:
    """The tables of the head."""
    trained, frozen = load("head_cpu.json"), load("head_frozen_cpu.json")
    work = trained["workload"]
    text = [
        f"{work['scored']} scored tokens, half of all rows prompt, H {work['hidden']}, V {work['vocabulary']}, fp32, "
        f"{trained['threads']} threads ({trained['cpu_capability']}), torch {trained['torch']}, medians of "
        f"{trained['rounds']} interleaved rounds; `python -m bench.head` (commit {trained['commit']}) and `python -m "
        f"bench.head --frozen` (commit {frozen['commit']}):\n\n",
        "| | time / bare products, head trained | head frozen | peak memory, gradients included | head frozen |\n",
        "|---|---|---|---|---|\n",
        *rows(trained, frozen),
        "\nOther sizes, the same number of tokens:\n\n",
        "| | time / bare products, head trained | head frozen | peak memory, gradients included | head frozen |\n",
        "|---|---|---|---|---|\n",
    ]
    for title, files in SHAPES.items():
        text += rows(load(files[0]), load(files[1]), label=f"{title}: ")
    measured = ", ".join(
        f"{record['rounds']} rounds at {record['commit']}" for files in SHAPES.values() for record in map(load, files)
    )
    text.append(f"\nIn the order of these shapes, trained and frozen: {measured} (+: with other files changed).\n")
    absent = [f"{name}: {why}" for name, why in trained["unavailable"].items() if not name.startswith("mopo_kernels")]
    return "".join([*text, "\n", *behind(), "\nNot compared here. ", "; ".join(absent), ".\n"])


def behind() -> list[str]:
    """Every implementation in these tables that is faster or leaner than "cpp", beyond the digits shown."""
    tables = {"H 1024, V 50304, fp32": ("head_cpu.json", "head_frozen_cpu.json"), **SHAPES}
    lines = []
    for word, key, format_one, least in (
        ("Faster", "ratio", "{:.2f}", 0.01),
        ("Leaner", "peak_mib", "{:.0f} MiB", 1.0),
    ):
        places: dict[str, list[str]] = {}
        for title, files in tables.items():
            for head, record in zip(("trained", "frozen"), map(load, files), strict=True):
                ours = record["results"][OURS][key]
                for name, row in record["results"].items():
                    if row["loss"] != "none" and not name.startswith("mopo_kernels") and row[key] < ours - least:
                        shown = " against ".join(format_one.format(value) for value in (row[key], ours))
                        places.setdefault(name, []).append(f"{title}, {head} ({shown})")
        said = "; ".join(f"{name}: {', '.join(where)}" for name, where in places.items())
        lines.append(f"{word} than `cpp` in these tables. {said or 'None'}.\n\n")
    return lines


def scaling_curves() -> str:
    """How time and memory grow, from the fits."""
    record = load("scaling_curves_cpu.json")
    plan = record["plan"]

    def fit(axis: str, name: str, key: str, dtype: str = "float32") -> str:
        both = [
            curve["fits"][name][key]
            for trained in (True, False)
            for curve in record["curves"]
            if (curve["axis"], curve["dtype"], curve["trained"]) == (axis, dtype, trained)
        ]
        return " / ".join(f"{value:.2f}" for value in both)

    names = {OURS: "mopo_kernels cpp", PLAIN: PLAIN, f"{PLAIN}, compiled": f"{PLAIN}, compiled"}
    text = [
        f"Growth from H {plan['hidden']}, N {plan['tokens']}, V {plan['vocabulary']}, K {plan['objectives']}, prompt "
        f"share {plan['share']:g} along one axis (N to {plan['axis_tokens'][-1]}, V to {plan['axis_vocabulary'][-1]}), "
        f"head trained / frozen, fp32; `{record['command']}`, commit {record['commit']}, "
        "[picture](../bench/results/scaling_curves_cpu_float32.png), "
        "[in bf16](../bench/results/scaling_curves_cpu_bfloat16.png). "
        "Powers over N and V (1: proportional), quotients over K and the prompt's share (1: no difference):\n\n",
        "| | time, power of N | of V | time / bare products, K 8 over K 1 | peak memory of the call, power of N | "
        "of V |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for name, title in names.items():
        cells = (
            fit("N", name, "seconds"),
            fit("V", name, "seconds"),
            fit("K", name, "ratio"),
            fit("N", name, "beyond_mib"),
            fit("V", name, "beyond_mib"),
        )
        text.append(f"| {title} | {' | '.join(cells)} |\n")
    accuracy = load("accuracy_cpu.json")
    parts = [
        f"{group['dtype']}, head {'trained' if group['trained'] else 'frozen'}, {row['times_plain']:.2f}"
        for group in accuracy["groups"]
        for row in [group["results"][OURS]]
    ]
    text.append(
        f"\nError of the gradients against fp64, as a multiple of plain PyTorch's on the same rows "
        f"({accuracy['draws']} random inputs; `{accuracy['command']}`, commit {accuracy['commit']}): "
        f"{'; '.join(parts)}.\n"
    )
    return "".join(text)


def gradient_filter() -> str:
    """What the gradient filter is worth, by threshold, precision and head."""
    kinds = {
        f"{short}, {head}": load(f"gradient_filter_{dtype}{'' if head == 'trained' else '_frozen'}_cpu.json")
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16"))
        for head in ("trained", "frozen")
    }
    first = next(iter(kinds.values()))
    work = first["workload"]
    commits = ", ".join(dict.fromkeys(record["commit"] for record in kinds.values()))
    text = [
        f"{work['tokens']} tokens of SmolLM2's own answers, H {work['hidden']}, V {work['vocabulary']}, "
        f"{first['threads']} threads, medians of {first['rounds']} interleaved rounds (`python -m "
        f"bench.gradient_filter`, commit {commits}; +: with other files changed): time / bare products, without a "
        "reference, and relative error of dhidden:\n\n",
        f"| `gradient_filter` | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}\n",
    ]
    for name in ("exact", "2^-10", "2^-12", "2^-14"):
        rows = [record["results"][name] for record in kinds.values()]
        cells = [f"{row['ratio']:.2f}" + (f", {row['errors'][0]:.1e}" if row["errors"][0] else "") for row in rows]
        text.append(f"| {'None' if name == 'exact' else name} | {' | '.join(cells)} |\n")
    many, wide, wide_frozen = (load(f"gradient_filter_{name}_cpu.json") for name in ("8192", "wide", "wide_frozen"))
    rows = [record["results"]["2^-12"] for record in (many, wide, wide_frozen)]
    plain = kinds["bf16, trained"]["results"]["plain PyTorch"]["errors"][0]
    text.append(
        f"\nOn {many['workload']['tokens']:,} tokens 2^-12 takes {rows[0]['ratio']:.2f} (fp32, trained); on a head of "
        f"H {wide['workload']['hidden']} and V {wide['workload']['vocabulary']} with rows made as peaked, "
        f"{wide['workload']['tokens']:,} tokens, {rows[1]['ratio']:.2f} trained and {rows[2]['ratio']:.2f} frozen, off "
        f"by {rows[1]['errors'][0]:.1e} and {rows[2]['errors'][0]:.1e} (commit {wide['commit']}). Plain PyTorch in "
        f"bf16 is off by {plain:.1e} on SmolLM2's rows.\n"
    )
    return "".join(text)


def steps() -> str:
    """Whole optimiser steps beside TRL's trainer."""
    records = [load("step_demo_cpu.json"), load("step_cpu.json")]
    text = []
    for record in records:
        text += _steps_table(record)
    settings = {
        name: row["about"] for record in records for rows in record["results"].values() for name, row in rows.items()
    }
    unavailable = {name: why for record in records for name, why in record["unavailable"].items()}
    leaner = [
        f"{name} ({record['workload']['shape']}, {tuning}, {part['peak_mib']:.0f} MiB against {ours['peak_mib']:.0f})"
        for record in records
        for tuning, rows in record["results"].items()
        for name, row in rows.items()
        if row["settings"]["trainer"] == "trl"
        for share, part in row["by_prompt_share"].items()
        if (ours := rows[row["compared_with"]]["by_prompt_share"][share])["peak_mib"] > part["peak_mib"]
    ]
    faster = [
        f"{name} ({record['workload']['shape']}, {tuning}, {part['ratio']:.2f})"
        for record in records
        for tuning, rows in record["results"].items()
        for name, row in rows.items()
        if row["settings"]["trainer"] == "trl"
        for part in row["by_prompt_share"].values()
        if part["ratio"] < 1
    ]
    return "".join(
        [
            *text,
            f"\n{'; '.join(f'{name}: {about}' for name, about in settings.items())}.\n\n",
            f"Faster here than this library with the same checkpointing: {'; '.join(faster) or 'none'}. Leaner: "
            f"{'; '.join(leaner) or 'none'}.\n\n",
            f"Not compared. {'; '.join(f'{name}: {why}' for name, why in unavailable.items())}.\n",
        ]
    )


def _steps_table(record: dict[str, Any]) -> list[str]:
    """What was trained on, and a table for each way of tuning."""
    work = record["workload"]
    shares = [str(share) for share in work["shares"]]
    one = next(iter(next(iter(record["results"].values())).values()))["by_prompt_share"][shares[0]]
    what = f"{work['shape']} with random weights, rows of at most {work['length']} tokens"
    if work["data"]:
        what = f"The demo's model and data, {one['tokens']:.0f} tokens in distinct rows a step"
    text = [
        f"\n{what}, {work['pairs']} pairs a step from prompts with {work['responses']} responses, {work['dtype']}, "
        f"{record['threads']} threads, medians of {record['rounds']} interleaved rounds at commit {record['commit']}; "
        f"`{record['command']}`. Time is that over this library's with the same checkpointing and one objective; "
        "memory is the process's high-water mark:\n"
    ]
    for tuning, rows in record["results"].items():
        heading = "".join(f" time, prompt share {share} | peak memory |" for share in shares)
        text.append(f"\n| {tuning} |{heading}\n|---|{'---|' * (2 * len(shares))}\n")
        for name, row in rows.items():
            cells = "".join(
                f" {part['ratio']:.2f} ({part['seconds']:.2f} s) | {part['peak_mib']:.0f} MiB |"
                for part in (row["by_prompt_share"][share] for share in shares)
            )
            text.append(f"| {name} |{cells}\n")
    return text


def layout() -> str:
    """What computing a prompt once is worth, by responses to a prompt and the prompt's part of a row."""
    records = {count: load(f"step_layout_n{count}_cpu.json") for count in (2, 4, 8)}
    first = records[2]
    shares = [str(share) for share in first["workload"]["shares"]]
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records.values()))
    commands = ", ".join(f"`{record['command']}`" for record in records.values())
    heading = "".join(f" prompt share {share} |" for share in shares)
    text = [
        "Time of a LoRA step with a row for each response over that with prompts computed once "
        f"({first['workload']['shape']}, rows of at most {first['workload']['length']} tokens, medians of "
        f"{first['rounds']} interleaved rounds, commit {commits}; {commands}):\n\n",
        f"| responses to a prompt |{heading}\n|---|{'---|' * len(shares)}\n",
    ]
    for count, record in records.items():
        row = record["results"]["LoRA"]["mopo_kernels, a row a response"]["by_prompt_share"]
        cells = "".join(f" {row[share]['ratio']:.2f} |" for share in shares)
        text.append(f"| {count} |{cells}\n")
    return "".join(text)


def summary() -> str:
    """Six rows of the head's table, and in a sentence each what else was measured."""
    trained, frozen, step = load("head_cpu.json"), load("head_frozen_cpu.json"), load("step_cpu.json")
    device = load("device_compare_nvidia_h100_80gb_hbm3.json")
    work = trained["workload"]
    names = (
        "bare products",
        OURS,
        PLAIN,
        f"{PLAIN}, compiled",
        "TRL ChunkedLogProb, scored rows",
        "Liger DPO, scored rows, compiled",
    )
    ratios = [
        part["ratio"]
        for rows in step["results"].values()
        for row in rows.values()
        if row["settings"]["trainer"] == "trl"
        for part in row["by_prompt_share"].values()
    ]
    text = [
        "| | time / bare products, head trained | head frozen | peak memory, gradients included | head frozen |\n",
        "|---|---|---|---|---|\n",
        *rows(trained, frozen, names=names),
        f"\nForward and backward of {work['scored']} scored tokens on a CPU: H {work['hidden']}, V "
        f"{work['vocabulary']}, fp32, {trained['threads']} threads, commit {trained['commit']}. 1.00 is what a loss "
        "would cost that did nothing but multiply. A whole training step of a model of SmolLM2-135M's shape takes "
        f"TRL's DPOTrainer {min(ratios):.1f} to {max(ratios):.1f} times as long as this library's trainer, on a CPU "
        f"too. On one {device['device']['name']}, in bf16, the loss takes "
        f"{_range(shape['results'][GPU]['ratio'] for shape in _shapes(device))} of the bare products' time, and the "
        f"fastest peer {_range(_fastest_peers(device))} of this loss's. Not measured: fp16, fp32 and fp64 on a GPU, "
        "other GPUs, more than one device.\n",
    ]
    return "".join(text)


def _shapes(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What was timed on a GPU, a record a shape."""
    return list(record["sections"]["time"]["shapes"].values())


def _fastest_peers(record: dict[str, Any]) -> list[float]:
    """The fastest peer's time over ours, a shape."""
    return [
        min(row["ms"] for name, row in shape["results"].items() if row["loss"] != "none" and OWN not in name)
        / shape["results"][GPU]["ms"]
        for shape in _shapes(record)
    ]


def _range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.2f} to {max(values):.2f}"


def gpu() -> str:
    """The head beside every peer, and whole steps beside TRL's, on a borrowed GPU."""
    record, smoke, step = (load(f"device_{name}_nvidia_h100_80gb_hbm3.json") for name in ("compare", "smoke", "step"))
    shapes = _shapes(record)
    tests = record["sections"]["tests"]["counts"]
    versions, first = record["versions"], shapes[0]["shape"]
    kinds = [f"V {s['shape']['vocabulary']}, {'trained' if s['shape']['trained'] else 'frozen'}" for s in shapes]
    text = [
        f"{first['tokens']} scored tokens, H {first['hidden']}, {first['dtype']}, the reference computed, on an "
        f"{record['device']['name']}, {record['date'][:10]}; torch {versions['torch']}, triton {versions['triton']}, "
        f"TRL {versions['trl']}, Liger {versions['liger-kernel']}, cut-cross-entropy {versions['cut-cross-entropy']}; "
        f"medians of interleaved rounds; `python -m bench.device compare`, commit {record['commit']}, where "
        f"{tests['passed']} of {tests['passed'] + tests['failed']} tests passed. Time / bare products, and the "
        f"allocator's peak:\n\n| | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}\n",
    ]
    # The backend of plain operations is there for devices that no other serves.
    for name in (name for name in shapes[0]["results"] if name != "mopo_kernels torch"):
        found = [shape["results"].get(name) for shape in shapes]
        cells = [f"{row['ratio']:.2f}, {row['peak_mib']:.0f} MiB" if row else "-" for row in found]
        text.append(f"| {name} | {' | '.join(cells)} |\n")
    best = smoke["sections"]["tune"]["rows"][0]["over_product"]
    buffers = {
        figure["piece"]: figure["ratio"] for figure in smoke["sections"]["probe"]["figures"] if "ratio" in figure
    }
    tried = [
        ", ".join(f"{buffers[f'call V {v} N 8192 H 2048 trained, {mib} MiB']:.2f}" for mib in (256, 512, 1024))
        for v in (51200, 128256)
    ]
    found = step["sections"]["step"]["results"]
    ours, theirs = (found[f"LoRA, {name}, sdpa"] for name in ("mopo_kernels", "TRL, fastest"))
    work = step["sections"]["step"]["work"]
    text += [
        f"\nThe fastest peer takes {_range(_fastest_peers(record))} times as long. The goal of 1.08 is not "
        f"reached: the fused product takes {best[0]:.2f} of the BLAS library's time where its exponentials are stored, "
        f"which does not hide behind the next tile's products, and {best[2]:.2f} where not; and the many small "
        f"launches keep the host busy for {shapes[0]['results'][GPU]['host_ms']:.0f} ms a call, which shows where "
        "tokens are few. "
        f"At buffers of 256, 512 and 1024 MiB, commit {smoke['commit']}: {tried[0]} (V 51200), {tried[1]} (V 128256). "
        "QuACK was not there.\n\n",
        f"A LoRA step of {ours['parameters'] / 1e9:.1f} billion random weights ({work['pairs']} pairs of "
        f"{work['responses']} responses, rows of at most {work['length']} tokens, bf16, no checkpointing): "
        f"{ours['seconds']:.3f} s and {ours['peak_mib'] / 1024:.1f} GiB, TRL's DPOTrainer as fast as it goes "
        f"{theirs['seconds']:.3f} s and {theirs['peak_mib'] / 1024:.1f} GiB ({ours['over_TRL']:.2f} of its time; one "
        f"round of {ours['steps']} steps each; `python -m bench.device step`, commit {step['commit']}).\n",
    ]
    return "".join(text)


# What makes each section of each document.
DOCUMENTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"summary": summary},
    "docs/demo.md": {"demo": demo},
    "docs/benchmarks.md": {
        "performance": performance,
        "gradient_filter": gradient_filter,
        "scaling_curves": scaling_curves,
        "steps": steps,
        "layout": layout,
        "gpu": gpu,
    },
}


def fill_marks(document: str, sections: dict[str, Callable[[], str]], module: str, file: str) -> str:
    """A document with what is between the marks of its sections made anew.

    Raises:
        ValueError: a section's marks are not there exactly once.
    """
    for name, make in sections.items():
        begin, end = f"<!-- {name}: made by python -m {module} -->\n", "<!-- end -->\n"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = f"{begin}\n{make()}\n{end}"
        document, found = pattern.subn(text.replace("\\", r"\\"), document)
        if found != 1:
            raise ValueError(f"{file}: expected one part that begins with {begin!r}; got {found}")
    return document


def replaced(file: str, document: str) -> str:
    """The text of one of :data:`DOCUMENTS` with its tables made anew."""
    return fill_marks(document, DOCUMENTS[file], "bench.tables", file)


if __name__ == "__main__":
    for file in DOCUMENTS:
        path = ROOT / file
        path.write_text(replaced(file, path.read_text(encoding="utf-8")), encoding="utf-8")
