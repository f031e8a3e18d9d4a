"""The README's code blocks, as printed, and its commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer_samples import make_model, make_tokenizer

from bench import readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README assumes it: a model of the reader's own and ``pairs.jsonl``."""
    make_model().save_pretrained(tmp_path / "my-model")
    make_tokenizer().save_pretrained(tmp_path / "my-model")
    (row,) = blocks("json")
    rows = [json.loads(row) for _ in range(8)]
    for number, item in enumerate(rows):
        item["prompt"] += " " * number + str(number)
        item["pairs"][0]["preference"] = {"helpful": float(number % 2), "harmless": float(number % 3 == 0)}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    (tmp_path / "judges.py").write_text(next(block for block in blocks("python") if block.startswith("JUDGES")))
    (tmp_path / "prompts.txt").write_text("Name a fruit.\nName a tree.\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run_as_printed(reader: Path) -> None:
    assert len(blocks("python")) >= 4
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    assert namespace["after"].loss.item() == pytest.approx(namespace["before"].item(), rel=1e-5)
    assert namespace["trainer"].state.global_step == 2
    assert (reader / "runs/mine/final").is_dir()


def test_commands_run_as_printed(reader: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("mopo ")]
    assert len(commands) >= 3
    for command in commands:
        arguments = [sys.executable, "-m", "mopo_kernels.cli", *shlex.split(command, comments=True)[1:]]
        done = subprocess.run(arguments, cwd=reader, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = [line.split()[1] for line in lines if line.startswith("make ")]
    assert {"demo", "test"} <= set(made) <= set(targets)


def test_the_json_block_is_a_row_of_the_schema() -> None:
    from mopo_kernels import PreferenceExample

    (row,) = blocks("json")
    assert PreferenceExample.from_dict(json.loads(row)).responses == ("An apple.", "Go away.")


def test_names_in_the_readme_exist() -> None:
    import mopo_kernels

    for name in re.findall(r"`([A-Za-z_]+)`", README):
        if name.startswith(("linear_", "MOPO", "Linear", "Dual", "mopo_loss", "load_", "Preference", "pack_")):
            assert hasattr(mopo_kernels, name), f"README names {name}, which does not exist"


def test_the_demos_table_is_of_a_run_under_its_protocol_whose_claims_hold() -> None:
    file = ROOT / "examples/demo/results/report.json"
    if not file.exists():
        assert "It has not been run in full under this protocol yet" in README
        return
    report = json.loads(file.read_text())
    protocol = json.loads((ROOT / "examples/demo/protocol.json").read_text())
    assert all(report["claims"].values())
    assert report["claims_in_words"] == protocol.pop("claims")
    assert {name: report["settings"][name] for name in protocol} == protocol
    for policy in ("constrained", "unconstrained", "turned_down"):
        for rate in report["win_rates"][policy]["win_rates"].values():
            assert f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" in README
    assert report["versions"]["commit"] in README
    seeds_file = ROOT / "examples/demo/results/seeds.json"
    if not seeds_file.exists():
        assert "how often a claim fails by chance was not estimated yet" in README
        return
    seeds = json.loads(seeds_file.read_text())
    assert seeds["protocol"] == report["protocol"]
    assert len(seeds["seeds"]) >= 5


def test_the_performance_tables_are_made_from_the_committed_results() -> None:
    assert readme.replaced(README) == README, "run python -m bench.readme"
    assert readme.replaced(README.replace("| mopo_kernels cpp | 1", "| mopo_kernels cpp | 0", 1)) == README
