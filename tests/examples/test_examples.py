"""The short scripts of examples/ run, and say what their docstrings promise."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from trainer_samples import make_model, make_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a script prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A tiny model and a preference file."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {
            "prompt": f"w{number}",
            "responses": ["w1 w2", "w3 w4 w5"],
            "pairs": [{"i": 0, "j": 1, "preference": {"helpful": number % 2, "harmless": (number + 1) % 2}}],
        }
        for number in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return "model", "pairs.jsonl"


def test_the_loss_in_a_loop_comes_near_its_threshold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("01_loss.py", monkeypatch=monkeypatch, capsys=capsys)
    last = re.search(r"step 60: helpful (\S+), harmless (\S+),", out)
    assert last is not None
    assert float(last[1]) > 0.5
    assert float(last[2]) == pytest.approx(0.6, abs=0.05)


def test_the_custom_loss_equals_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "gradients agree" in run("02_custom_loss.py", monkeypatch=monkeypatch, capsys=capsys)


def test_the_trainer_trains_and_answers(
    inputs: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("03_trainer.py", *inputs, "--steps", "2", monkeypatch=monkeypatch, capsys=capsys)
    assert "'w0' -> " in out
    assert Path("runs/03_trainer/final/adapter_config.json").is_file()


def test_the_sweep_trains_an_adapter_for_each_threshold(
    inputs: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--steps", "2", "--thresholds", "0.45", "0.5")
    out = run("04_sweep.py", *inputs, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    for threshold in ("0.45", "0.5"):
        assert f"harmless >= {threshold}: helpful 0." in out
        assert Path(f"runs/04_sweep/{threshold}/adapter_config.json").is_file()
    assert len(list(Path("runs/04_sweep").glob("*.logprob"))) == 1


def test_the_front_trades_one_objective_for_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("05_pareto_front.py", monkeypatch=monkeypatch, capsys=capsys)
    rows = [[float(cell) for cell in line.split()] for line in out.splitlines() if re.match(r"\s+0\.\d\d\s+0\.", line)]
    assert len(rows) == 8
    assert all(after[1] < before[1] and after[2] > before[2] for before, after in itertools.pairwise(rows))
    assert "0.80     cannot be met" in out
