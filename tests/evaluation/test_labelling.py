"""mopo data label: rows that are right, whoever wrote the responses, and the same after an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from trainer_samples import make_model, make_tokenizer
from typer.testing import CliRunner, Result

from mopo_kernels.cli.data import data_app
from mopo_kernels.data import load_preferences
from mopo_kernels.evaluation import Draw, load_policy
from mopo_kernels.labelling import Sampler, label_pair, label_row

JUDGES = """
import os

CALLS = []

def length(prompt, response):
    CALLS.append(prompt)
    if len(CALLS) > int(os.environ.get("FAIL_AFTER", 10**9)):
        raise KeyboardInterrupt
    return float(len(response.split()))

def early(prompt, response):
    return -float(sum(int(word[1:]) for word in response.split() if word[1:].isdigit()))

JUDGES = {"length": length, "early": early}
"""
PROMPTS = [f"w{index} w{index + 1}" for index in range(7)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, judges and prompts."""
    folder = tmp_path_factory.mktemp("label")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "judges.py").write_text(JUDGES)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def label(place: Path, output: Path, *arguments: object, source: object = None, policy: bool = True) -> Result:
    options: list[object] = ["--judges", f"{place / 'judges.py'}:JUDGES", "--output", output, "--chunk", 3]
    if policy:
        options += ["--policy", place / "model", "--device", "cpu", "--max_new_tokens", 6, "--unfinished", "keep"]
    given = [source or place / "prompts.txt", *options, *arguments]
    return CliRunner().invoke(data_app, ["label", *(str(argument) for argument in given)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("first", "second", "scale", "expected"),
    [
        (2.0, 2.0, None, 0.5),
        (3.0, 2.0, None, 1.0),
        (1.0, 2.0, None, 0.0),
        (2.0, 2.0, 1.0, 0.5),
        (3.0, 2.0, 1.0, 1 / (1 + math.exp(-1))),
        (3.0, 2.0, 0.5, 1 / (1 + math.exp(-2))),
        (2.0, 3.0, 2.0, 1 / (1 + math.exp(0.5))),
        (1e6, 0.0, 1.0, 1.0),
        (0.0, 1e6, 1.0, 0.0),
    ],
)
def test_a_label_is_bradley_and_terrys_or_the_order(
    first: float, second: float, scale: float | None, expected: float
) -> None:
    assert label_pair(first, second, scale) == pytest.approx(expected, abs=1e-15)


def test_a_row_has_every_pair_and_the_scores() -> None:
    row = label_row("p", ["a", "b", "c"], {"x": [1.0, 2.0, 2.0], "y": [0.0, 1.0, 3.0]}, {"x": None, "y": 1.0})
    assert [(pair["i"], pair["j"], pair["preference"]["x"]) for pair in row["pairs"]] == [
        (0, 1, 0.0),
        (0, 2, 0.0),
        (1, 2, 0.5),
    ]
    assert row["pairs"][1]["preference"]["y"] == pytest.approx(1 / (1 + math.exp(3)))
    assert row["scores"] == {"x": [1.0, 2.0, 2.0], "y": [0.0, 1.0, 3.0]}


def test_sampled_rows_load_and_carry_the_judges_labels(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    result = label(place, output, "--samples", 3, "--scale", "length=2,early=10")
    assert result.exit_code == 0, result.stderr
    data = load_preferences(output)
    written = rows(output)
    assert f"{len(data)} rows" in result.stdout
    assert data.objectives == ("length", "early")
    left_out = len(PROMPTS) - len(data)
    assert f"{left_out} prompts left out" in result.stdout
    assert len(data) > 4
    assert [row["prompt"] for row in written] == [p for p in PROMPTS if p in {row["prompt"] for row in written}]
    for row in written:
        assert row["scores"]["length"] == [len(response.split()) for response in row["responses"]]
        for pair in row["pairs"]:
            i, j = pair["i"], pair["j"]
            difference = row["scores"]["length"][i] - row["scores"]["length"][j]
            assert pair["preference"]["length"] == pytest.approx(1 / (1 + math.exp(-difference / 2)))


def test_an_interrupted_run_goes_on_with_the_same_rows(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert label(place, whole).exit_code == 0
    monkeypatch.setenv("FAIL_AFTER", "16")
    assert label(place, parts).exit_code != 0
    monkeypatch.delenv("FAIL_AFTER")
    done = len(rows(parts))
    assert 0 < done < len(rows(whole))
    with parts.open("ab") as file:
        file.write(b'{"prompt": "half a ro')
    assert label(place, parts).exit_code == 0
    strip = [{key: value for key, value in row.items() if key != "id"} for row in rows(whole)]
    assert [{key: value for key, value in row.items() if key != "id"} for row in rows(parts)] == strip
    before = parts.read_bytes()
    assert label(place, parts).exit_code == 0, "finished: nothing to do"
    assert parts.read_bytes() == before


def test_the_parts_have_draws_of_their_own(place: Path, tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("w1 w2\n" * 6)
    output = tmp_path / "rows.jsonl"
    assert label(place, output, source=tmp_path / "same.txt").exit_code == 0
    drawn = [tuple(row["responses"]) for row in rows(output)]
    assert len(set(drawn)) > len(drawn) // 2


@pytest.mark.parametrize(
    ("change", "name"),
    [(("--seed", 1), "seed"), (("--scale", 2), "scale"), (("--chunk", 4), "chunk"), (("--limit", 5), "prompts")],
)
def test_a_file_is_gone_on_with_under_the_same_settings_only(
    place: Path, tmp_path: Path, change: tuple[object, ...], name: str
) -> None:
    output = tmp_path / "rows.jsonl"
    assert label(place, output).exit_code == 0
    before = output.read_bytes()
    result = label(place, output, *change)
    assert result.exit_code == 2
    assert f"mopo: error: {name}: expected" in result.stderr
    assert output.read_bytes() == before


def test_other_prompts_are_other_settings_and_a_strangers_file_is_left_alone(place: Path, tmp_path: Path) -> None:
    output, other = tmp_path / "rows.jsonl", tmp_path / "other.txt"
    assert label(place, output).exit_code == 0
    other.write_text("\n".join(reversed(PROMPTS)))
    assert "source: expected" in label(place, output, source=other).stderr
    stranger = tmp_path / "stranger.jsonl"
    stranger.write_text("{}\n")
    result = label(place, stranger)
    assert result.exit_code == 2
    assert "expected a new file or one begun by this command" in result.stderr
    assert stranger.read_text() == "{}\n"


def test_without_a_policy_the_responses_of_a_data_set_are_labelled(place: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "pairs.jsonl", tmp_path / "rows.jsonl"
    start = "\n\nHuman: Tea?\n\nAssistant:"
    texts = [(" w1 w2", " w3"), (" w1 w2", " w4 w5 w6")]
    source.write_text("".join(json.dumps({"chosen": start + a, "rejected": start + b}) + "\n" for a, b in texts))
    options = ("--hard", "--format", "trl")
    result = label(place, output, *options, source=source, policy=False)
    assert result.exit_code == 0, result.stderr
    (row,) = rows(output)
    assert row["responses"] == [" w1 w2", " w3", " w4 w5 w6"], "joined by prompt"
    found = {(pair["i"], pair["j"]): pair["preference"] for pair in row["pairs"]}
    assert found == {
        (0, 1): {"length": 1.0, "early": 0.5},
        (0, 2): {"length": 0.0, "early": 1.0},
        (1, 2): {"length": 0.0, "early": 1.0},
    }


def test_unfinished_and_blank_responses_are_dropped_and_a_stop_text_ends_one(place: Path) -> None:
    policy = load_policy(place / "model", device="cpu")
    drop, keep = Sampler(policy, stop="\n\nHuman:"), Sampler(policy, stop="\n\nHuman:", keep_unfinished=True)
    for draw, dropped, kept in (
        (Draw("tea", True), "tea", "tea"),
        (Draw("tea", False), None, "tea"),
        (Draw("tea\n\nHuman: more", False), "tea", "tea"),
        (Draw("\n\nHuman: more", False), None, None),
        (Draw("  ", True), None, None),
    ):
        assert (drop._kept(*draw), keep._kept(*draw)) == (dropped, kept)
    # A model that never ends within 2 tokens has nothing to give.
    assert all(len(row) < 3 for row in Sampler(policy, samples=3, max_new_tokens=1)(0, PROMPTS))


def test_a_new_line_in_a_stop_text_is_written_as_in_a_string(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert label(place, output, "--stop", "\\n\\nHuman:").exit_code == 0
    record = json.loads((tmp_path / "rows.jsonl.label.json").read_text())
    assert record["settings"]["stop"] == "\n\nHuman:"
    assert record["progress"]["prompts"] == len(PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--scale", "0"], "--scale: expected a positive number, or one for each of length, early; got 0"),
        (["--scale", "length=1"], "--scale: expected a positive number, or one for each of length, early"),
        (["--unfinished", "no"], "--unfinished: expected drop or keep; got 'no'"),
        (["--output", "{dir}/rows.parquet"], "--output: expected a name ending in .jsonl; got 'rows.parquet'"),
        (["--judges", "absent.py:JUDGES"], "judges: no file absent.py"),
        (["--policy", "{dir}/absent"], "model: expected a folder or a hub name"),
    ],
)
def test_bad_input_exits_2_with_one_line(place: Path, tmp_path: Path, arguments: list[str], problem: str) -> None:
    result = label(place, tmp_path / "rows.jsonl", *(item.format(dir=tmp_path) for item in arguments))
    assert result.exit_code == 2
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1
