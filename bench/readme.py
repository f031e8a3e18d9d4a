"""The README's performance tables, made from bench/results.

python -m bench.readme            # rewrites the part of README.md between its two marks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- made by python -m bench.readme -->\n", "<!-- end -->\n"
# Other shapes than the first table's: title, files with the head trained and frozen.
SHAPES = {
    "H 2048, V 51200, fp32": ("head_v51200_cpu.json", "head_v51200_frozen_cpu.json"),
    "H 2048, V 128256, fp32": ("head_v128256_cpu.json", "head_v128256_frozen_cpu.json"),
    "H 1024, V 50304, bf16": ("head_bf16_cpu.json", "head_bf16_frozen_cpu.json"),
}


def load(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return record


def rows(trained: dict[str, Any], frozen: dict[str, Any], label: str = "") -> list[str]:
    """A table row for each contender: ratios and peaks with the head trained and frozen."""
    lines = []
    for name, row in trained["results"].items():
        other = frozen["results"][name]
        title = name if row["loss"] in ("regression", "none") else f"{name} ({row['loss']})"
        lines.append(
            f"| {label}{title} | {row['ratio']:.2f} | {other['ratio']:.2f} "
            f"| {row['peak_mib']:.0f} MiB | {other['peak_mib']:.0f} MiB |\n"
        )
    return lines


def section() -> str:
    """What belongs between the marks."""
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
        text += rows(*map(load, files), label=f"{title}: ")
    measured = ", ".join(
        f"{record['rounds']} rounds at {record['commit']}" for files in SHAPES.values() for record in map(load, files)
    )
    text.append(f"\nIn the order of these shapes, trained and frozen: {measured} (+: with other files changed).\n")
    absent = [f"{name}: {why}" for name, why in trained["unavailable"].items() if not name.startswith("mopo_kernels")]
    return "".join([*text, "\nNot compared here. ", "; ".join(absent), ".\n"])


def replaced(readme: str) -> str:
    """The README with its part between the marks made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
