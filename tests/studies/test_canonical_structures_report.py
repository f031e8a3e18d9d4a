"""The study's runner keeps what finishes, its numbers can be reproduced, and its tables say what its JSON says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from studies.canonical_structures import learning, report
from studies.canonical_structures.baselines import METHODS
from studies.canonical_structures.command import main
from studies.canonical_structures.estimators import BATCHES
from studies.canonical_structures.exact import solve_structure
from studies.canonical_structures.run import RUN_FIELDS, Part, PartsFailed, Progress, load, plain, run_parts, save
from studies.canonical_structures.sections import SECTIONS, structures_of, study
from studies.canonical_structures.structures import make

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "studies" / "canonical_structures" / "results"
ORIGIN = {"commit": "0123456789ab", "command": "test", "date": "today", "versions": {"torch": "2"}, "machine": "m"}


def a_study(part: Part, progress: Progress) -> dict[str, Any]:
    """What each name does: finish, fail, kill the worker, or go on for long."""
    import torch

    progress(1, 2)
    if part.structure == "endless":
        time.sleep(3600)
    if part.structure == "failing":
        raise ValueError("no such thing")
    if part.structure == "killed":
        os._exit(9)
    spared = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    row = {"threads": torch.get_num_threads(), "nothing": float("nan"), "pid": os.getpid(), "spared": spared}
    return {"rows": [row]}


def test_finished_parts_are_kept_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    parts = [Part("made", name) for name in ("first", "failing", "killed", "last")]
    with pytest.raises(PartsFailed) as failed:
        list(run_parts(a_study, parts, tmp_path, ORIGIN))
    assert failed.value.failures.keys() == {parts[1], parts[2]}
    assert "no such thing" in failed.value.failures[parts[1]]
    assert "exit code 9" in failed.value.failures[parts[2]]
    records = load(tmp_path)["made"]
    assert records.keys() == {"first", "last"}
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["first.json", "last.json"]
    rows = [record["rows"][0] for record in records.values()]
    # JSON has no NaN, and a worker is neither this process nor another part's.
    assert [row["nothing"] for row in rows] == [None, None]
    assert [row["threads"] for row in rows] == [1, 1]
    # Ctrl-C is the parent's to deal with.
    assert [row["spared"] for row in rows] == [True, True]
    assert len({os.getpid(), *(row["pid"] for row in rows)}) == 3
    assert records["first"].items() >= {**ORIGIN, "seeds": list(range(10)), "fast": False}.items()


def test_workers_are_ended_not_waited_for(tmp_path: Path) -> None:
    events = run_parts(a_study, [Part("made", "endless"), Part("made", "first")], tmp_path, ORIGIN)
    while next(events).kind != "finished":
        continue
    events.close()
    assert load(tmp_path)["made"].keys() == {"first"}


def test_a_kept_part_is_one_of_the_same_commit_and_options(tmp_path: Path) -> None:
    part = Part("made", "first", seeds=3)
    assert not part.is_kept(tmp_path, ORIGIN["commit"])
    save({**ORIGIN, "seeds": [0, 1, 2], "fast": False, "rows": []}, part.path(tmp_path))
    assert part.is_kept(tmp_path, ORIGIN["commit"])
    assert not part.is_kept(tmp_path, "another")
    assert not Part("made", "first", seeds=4).is_kept(tmp_path, ORIGIN["commit"])
    assert not Part("made", "first", seeds=3, fast=True).is_kept(tmp_path, ORIGIN["commit"])
    part.path(tmp_path).write_text("{")
    assert not part.is_kept(tmp_path, ORIGIN["commit"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "argument --only: invalid choice: 'nothing'"),
        (["--structures", "nothing"], "argument --structures: invalid choice: 'nothing'"),
        (["--seeds", "1"], "argument --seeds: must be at least 2, got 1"),
        (["--jobs", "0"], "argument --jobs: must be at least 1, got 0"),
    ],
    ids=["section", "structure", "seeds", "jobs"],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a small study, every section of one structure."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--fast", "--structures", "bradley_terry_opposed", "--seeds", "2", "--output", str(folder)]
    assert main(arguments) == 0
    return folder


def test_a_study_leaves_json_a_picture_and_a_section_of_the_readme_for_every_part(made: Path) -> None:
    records = load(made)
    assert records.keys() == set(SECTIONS)
    readme = (made / "README.md").read_text()
    assert "Made with --fast" in readme
    assert "](overview.png)" in readme
    assert "](bradley_terry_opposed.md)" in readme
    text = (made / "bradley_terry_opposed.md").read_text()
    for section, parts in records.items():
        record = parts["bradley_terry_opposed"]
        assert record["rows"]
        assert record["seeds"] == [0, 1]
        assert {"commit", "command", "date", "seconds", "versions"} <= record.keys()
        # What estimators lead to is in the table of all structures.
        if section not in ("exact", "estimators"):
            assert f"]({section}/bradley_terry_opposed.png)" in text
            picture = (made / section / "bradley_terry_opposed.png").read_bytes()
            assert picture.startswith(b"\x89PNG")
            assert len(picture) > 20_000


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run."""
    return {key: value for key, value in record.items() if key not in RUN_FIELDS}


def test_the_same_seeds_give_the_same_numbers(made: Path, tmp_path: Path) -> None:
    parts = [Part(section, "bradley_terry_opposed", seeds=2, fast=True) for section in ("exact", "baselines")]
    list(run_parts(study, parts, tmp_path, ORIGIN, jobs=1))
    again, before = load(tmp_path), load(made)
    for part in parts:
        assert numbers(again[part.section][part.structure]) == numbers(before[part.section][part.structure])
    changed = numbers(before["baselines"]["bradley_terry_opposed"])
    assert changed["rows"][0]["hypervolume"]["each"][0] != changed["rows"][0]["hypervolume"]["each"][1]


def test_the_pages_in_docs_are_what_their_json_makes() -> None:
    made = report.pages(load(RESULTS))
    assert {path.name for path in RESULTS.glob("*.md")} == made.keys()
    for name, text in made.items():
        assert text == (RESULTS / name).read_text(encoding="utf-8"), name


def test_the_results_in_docs_are_whole_and_have_their_pictures() -> None:
    records = load(RESULTS)
    assert records.keys() == set(SECTIONS)
    assert (RESULTS / report.OVERVIEW).exists()
    for section, parts in records.items():
        assert parts.keys() == set(structures_of(section))
        for name, record in parts.items():
            assert not record["fast"]
            assert len(record["seeds"]) >= 10
            # One commit made it, with no other files changed.
            assert not record["commit"].endswith("+")
            if section in ("estimators", "baselines", "ablations"):
                assert record["instances"] >= 3
            if section not in ("exact", "estimators"):
                assert (RESULTS / section / f"{name}.png").exists()


def test_the_results_open_with_five_sentences_and_a_picture() -> None:
    lines = (RESULTS / report.README).read_text(encoding="utf-8").splitlines()
    assert [line[:5] for line in lines[2:7]] == [f"{number}. **" for number in range(1, 6)]
    assert f"]({report.OVERVIEW})" in lines[8]


@pytest.mark.parametrize("name", ["condorcet_within", "flat_faces"])
def test_the_results_in_docs_are_those_of_the_code(name: str) -> None:
    """What is quick to do again: the exact front, and learning from the fewest pairs."""
    records = load(RESULTS)
    exact = plain(solve_structure(name))
    for row, kept in zip(exact["rows"], records["exact"][name]["rows"], strict=True):
        # Other processors round otherwise.
        assert row["value"] == pytest.approx(kept["value"], abs=1e-7)
    learned = learning.study(make(name), [1000], [0, 1])
    kept = [row for row in records["learning"][name]["rows"] if report.way(row)[0] == report.DEFAULT_WAY]
    for row, old in zip(learned, kept, strict=False):
        assert (row["count"], row["seed"]) == (old["count"], old["seed"])
        assert row["value"] == pytest.approx(old["value"], abs=1e-4)


def a_row(method: str, shift: float, misses: int = 0, noise: float = 0.001) -> dict[str, Any]:
    """A method whose every measure is better than MOPO's by ``shift``, give or take noise; two of three instances are
    the other way round."""
    interval = {"low": shift - noise, "high": shift + noise, "mean": shift, "each": [[0.0] * 2] * 3}

    def verdict(by: float) -> str:
        return "better" if by > noise else "worse" if by < -noise else "no difference"

    rate = {"rate": misses / 4, "low": 0.0, "high": 1.0, "count": misses}
    apart = {**interval, "verdict": verdict(shift), "verdicts": [verdict(shift), *[verdict(-shift)] * 2]}
    return {
        "method": method,
        "violation": rate,
        "missed": rate,
        "slack": {**interval, "mean": -0.1 * misses, "each": [[-0.1] * misses + [0.1] * (4 - misses)]},
        "regret": interval,
        "minus_mopo": dict.fromkeys(report.MEASURES, apart),
        **dict.fromkeys(report.MEASURES, interval),
        # More than two objectives: the volume is another number.
        "volume": {**interval, "mean": shift + 0.01},
    }


def test_what_is_said_of_mopo_follows_from_the_numbers() -> None:
    said = report.where_it_does_not_win
    rows = [a_row("mopo", 0.0), a_row("max_min", -0.2), a_row("modpo", -0.1), {"method": "exact"}]
    assert said({"rows": rows}) == (
        "MOPO is ahead of every other method on hypervolume, hypervolume in all dimensions, hypervolume at equal KL "
        "and "
        "distance to the front. Thresholds missed by more than 0.01: in 0 of 4 runs by MOPO, fewer by none; by however "
        "little: in 0."
    )
    # With two objectives the plane has all dimensions.
    for row in rows[:3]:
        row["volume"] = row["hypervolume"]
    assert "in all dimensions" not in said({"rows": rows})
    # One ahead on everything, one that differs from MOPO by noise alone.
    mixed = said({"rows": [a_row("mopo", 0.0, misses=2), a_row("modpo", 0.2, misses=1), a_row("max_min", 0.0005)]})
    for words in report.MEASURES.values():
        expected = f"On {words} MOPO does not win: MODPO (+0.200) is ahead of it; max-min cannot be told from it."
        assert expected in mixed
    assert "in 2 of 4 runs by MOPO, fewer by max-min (0) and MODPO (1); by however little: in 2." in mixed
    assert "ahead of every other" not in mixed


def a_study_of(shift: float, misses: int) -> dict[str, Any]:
    """Records with two structures, on one of which a threshold binds, and methods at ``shift`` from MOPO."""
    rows = [a_row(m, 0.0 if m == "mopo" else shift, misses if m == "mopo" else 0) for m in METHODS]
    record = {"pairs": 5000, "instances": 3, "rows": rows}
    optima = {"first": {"multiplier": [1.0, 0.5]}, "second": {"multiplier": [1.0, 0.0]}}
    exact = {name: {"primary": 0, "optimum": optimum} for name, optimum in optima.items()}
    return {"exact": exact, "baselines": dict.fromkeys(optima, record)}


def test_the_sentences_count_instances_and_runs() -> None:
    worse, better = a_study_of(-0.2, 1), a_study_of(0.2, 3)
    assert report.binding(worse) == ["first"]
    # Of two structures with three instances each.
    assert report.ahead_on(worse["baselines"], "hypervolume") == 4
    assert report.ahead_on(better["baselines"], "hypervolume") == 2
    assert report.ahead_on(a_study_of(0.0, 0)["baselines"], "hypervolume") == 0
    assert "0.000 of the exact front in the plane of its thresholds (the best other" in report.front_sentence(better)
    assert "**Its front is not the best**" in report.front_sentence(better)
    assert "**Its front covers most**" in report.front_sentence(worse)
    for row in worse["baselines"]["first"]["rows"]:
        row["volume"] = {**row["volume"], "mean": 0.0 if row["method"] == "mopo" else 0.1}
    assert "**Its front covers most where its thresholds lie, not everywhere**" in report.front_sentence(worse)
    assert "on 2 of 6 instances" in report.front_sentence(better)
    missed = report.missed_sentence(better)
    assert "75 % of runs with 5,000 pairs miss one, 75 % by more than 0.01" in missed
    assert "on the 1 structures" in missed
    assert "negative on 1 of these" in missed
    assert "negative on 0 of these" in report.missed_sentence(a_study_of(0.2, 0))
    assert "25 % of runs" in report.missed_sentence(worse)
    told = report.regret_sentence(worse)
    assert "0.0000 (MOPO), -0.2000 (one-shot dual)" in told
    assert "searched for -0.200 less" in told


def an_estimator(name: str, structure: str, bias: float, slack: float, noise: float) -> dict[str, Any]:
    return {
        "estimator": name,
        "structure": structure,
        "instance": 0,
        "binding": True,
        "residual": 0.0,
        "bias_tv": bias,
        "slack": slack,
        "noise": {str(size): {"deviation": noise} for size in BATCHES},
    }


def test_which_estimator_to_use_is_said_with_the_figures_of_its_table() -> None:
    rows = {
        "flat_faces": [
            an_estimator("snis", "flat_faces", 0.0, 0.0, 0.08),
            an_estimator("pair", "flat_faces", 0.3, -0.05, 0.02),
        ],
        "shifted_reference": [
            an_estimator("snis", "shifted_reference", 0.04, 0.01, 0.03),
            an_estimator("pair", "shifted_reference", 0.2, 0.06, 0.02),
        ],
    }
    records: dict[str, Any] = {"estimators": {name: {"rows": some} for name, some in rows.items()}}
    text = "\n".join(report.estimator_lines(records))
    for words in (
        "(bias 0.000 at most)",
        "biased by 0.200 to 0.300",
        "misses a threshold by 0.050 in win rates (flat_faces)",
        "keeps it with 0.060 to spare",
        "`snis` is off by 0.040, `pair` by 0.200",
        "1.5 to 4.0 times as noisy with `snis`, the most on flat_faces (0.080 against 0.020)",
        "| flat_faces | 0.000 | 0.300 | - | -0.050 | 0.080 / 0.020 | 0.080 / 0.020 |",
    ):
        assert words in text
    assert "up to 0.30 away" in report.estimator_sentence(records)
    # A limit that was not found says nothing.
    rows["flat_faces"][1]["residual"] = 0.1
    assert "up to 0.20 away" in report.estimator_sentence(records)


def test_settings_whose_constraint_is_lost_are_marked() -> None:
    record = load(RESULTS)["ablations"]["flat_faces"]
    table = report.ablation_table(record, "reference")
    some = [row for row in record["rows"] if row["ablation"] == "reference"]
    lost = [row["lost"] for row in some]
    assert any(lost)
    assert not all(lost)
    # A header and a line that rules it off come before.
    body = [line for line in table if line.startswith("| ")][1:]
    assert [report.LOST in line for line in body] == lost
    panels = report.ablation_panels(record, 0)
    dots = panels["worst slack"]["lagged reference: beta, t0"]["t0 1"]
    assert [dot.lost for dot in dots] == [True] * len(dots)


def test_every_method_that_is_compared_has_a_name() -> None:
    assert set(report.METHODS) == set(METHODS)


def test_ctrl_c_ends_every_process_with_130_and_keeps_what_was_finished(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "studies.canonical_structures",
        "--only",
        "exact",
        "baselines",
        "--output",
        str(tmp_path),
    ]
    running = subprocess.Popen(
        [*command, "--structures", "flat_faces"],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = Part("exact", "flat_faces").path(tmp_path)
    deadline = time.monotonic() + 120
    while not first.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    # As the terminal does: to the workers too.
    os.killpg(running.pid, signal.SIGINT)
    _, shown = running.communicate(timeout=300)
    assert running.returncode == 130, shown
    assert "Traceback" not in shown
    assert "interrupted" in shown
    assert json.loads(first.read_text())["rows"]
    assert [path.name for path in tmp_path.rglob("*.*")] == ["flat_faces.json"]
    while time.monotonic() < deadline:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("a process is left")
